//! `Event`, `Meta`, `Delivery`: frozen views of the core's event, converted on first touch.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::time::SystemTime;

use bytes::Bytes;
use polybus_core::codec;
use polybus_core::error::nearest;
use polybus_core::event::{self, Aggregate, EventType, Text};
use polybus_core::{Event, Meta};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple, PyType};

use crate::error::{invalid_event, raise};
use crate::json;

/// What happened, with the facts around it. Immutable; made by `Event.create`, `event.child` and `Event.from_dict`.
#[pyclass(name = "Event", module = "polybus", frozen)]
pub struct PyEvent {
    pub event: Event,
    payload: PyOnceLock<Py<PyAny>>,
    delivery: Option<Delivery>,
}

impl PyEvent {
    pub fn new(event: Event) -> Self {
        Self { event, payload: PyOnceLock::new(), delivery: None }
    }

    pub fn delivered(event: Event, delivery: Delivery) -> Self {
        Self { event, payload: PyOnceLock::new(), delivery: Some(delivery) }
    }
}

/// Facts of one attempt. They travel beside the event, never inside it.
#[pyclass(module = "polybus", frozen)]
#[derive(Clone)]
pub struct Delivery {
    pub attempt: u32,
    pub redelivered: bool,
    pub group: Text,
    pub received_at: SystemTime,
}

#[pymethods]
impl Delivery {
    #[getter]
    fn attempt(&self) -> u32 {
        self.attempt
    }

    #[getter]
    fn redelivered(&self) -> bool {
        self.redelivered
    }

    #[getter]
    fn group(&self) -> &str {
        &self.group
    }

    #[getter]
    fn received_at(&self) -> SystemTime {
        self.received_at
    }

    fn __repr__(&self) -> String {
        let redelivered = if self.redelivered { "True" } else { "False" };
        format!("Delivery(attempt={}, redelivered={redelivered}, group={:?})", self.attempt, self.group)
    }
}

#[pymethods]
impl PyEvent {
    /// A new event. `raw` is the payload as JSON text that is already encoded.
    #[classmethod]
    #[pyo3(signature = (r#type, payload=None, *, raw=None, **meta))]
    fn create(
        cls: &Bound<'_, PyType>,
        r#type: &Bound<'_, PyAny>,
        payload: Option<&Bound<'_, PyAny>>,
        raw: Option<&Bound<'_, PyAny>>,
        meta: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        make(cls.py(), r#type, payload, raw, meta, None).map(Self::new)
    }

    /// A new event in this one's chain.
    #[pyo3(signature = (r#type, payload=None, *, raw=None, **meta))]
    fn child(
        &self,
        py: Python<'_>,
        r#type: &Bound<'_, PyAny>,
        payload: Option<&Bound<'_, PyAny>>,
        raw: Option<&Bound<'_, PyAny>>,
        meta: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        make(py, r#type, payload, raw, meta, Some(&self.event)).map(Self::new)
    }

    /// The same event with other members of meta.
    #[pyo3(signature = (**meta))]
    fn with_meta(&self, py: Python<'_>, meta: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let mut facts = self.event.meta.clone();
        if let Some(given) = meta {
            apply(py, &mut facts, given)?;
        }
        let event = self.event.clone().with_meta(|meta| *meta = facts);
        Ok(Self { event, payload: PyOnceLock::new(), delivery: self.delivery.clone() })
    }

    #[getter(r#type)]
    fn event_type<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        PyString::new(py, self.event.event_type.as_str())
    }

    /// The payload, decoded on first touch.
    #[getter]
    fn payload<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let decode = || json::decode(py, &self.event.payload).map(Bound::unbind);
        Ok(self.payload.get_or_try_init(py, decode)?.bind(py).clone())
    }

    /// The payload's JSON text.
    #[getter]
    fn raw<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.event.payload)
    }

    #[getter]
    fn meta(&self) -> PyMeta {
        PyMeta(self.event.clone())
    }

    /// Facts of this attempt; `None` for an event that was not delivered.
    #[getter]
    fn delivery(&self) -> Option<Delivery> {
        self.delivery.clone()
    }

    /// The event in the wire's shape: `type`, `payload`, `meta` with camelCase names.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::decode(py, &codec::encode(&self.event).map_err(raise(py))?)
    }

    /// The event in a dict of the wire's shape.
    #[classmethod]
    fn from_dict(cls: &Bound<'_, PyType>, data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let wire = json::encode(data, "event", codec::MAX_DEPTH + 2)?;
        Self::from_wire(cls.py(), wire)
    }

    /// As a handler of `group` gets it, for a publish that this process handles itself.
    #[pyo3(name = "_delivered")]
    fn delivered_to(&self, group: &str) -> Self {
        let received_at = SystemTime::now();
        let delivery = Delivery { attempt: 1, redelivered: false, group: group.into(), received_at };
        Self::delivered(self.event.clone(), delivery)
    }

    /// The event as it goes over the wire.
    #[pyo3(name = "_to_wire")]
    fn to_wire<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &codec::encode(&self.event).map_err(raise(py))?))
    }

    #[staticmethod]
    #[pyo3(name = "_from_wire")]
    fn from_wire(py: Python<'_>, wire: Vec<u8>) -> PyResult<Self> {
        codec::decode(&Bytes::from(wire), LARGEST).map(Self::new).map_err(raise(py))
    }

    /// Pickles as wire bytes: the facts of the delivery stay in the process that has the delivery.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((py.get_type::<Self>().getattr(intern!(py, "_from_wire"))?, (self.to_wire(py)?,)))
    }

    fn __copy__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Shares the event; its payload will be decoded anew.
    fn __deepcopy__(&self, _memo: &Bound<'_, PyAny>) -> Self {
        Self { event: self.event.clone(), payload: PyOnceLock::new(), delivery: self.delivery.clone() }
    }

    #[classmethod]
    fn __class_getitem__<'py>(cls: &Bound<'py, PyType>, item: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        cls.py().import("types")?.getattr("GenericAlias")?.call1((cls, item))
    }

    /// Same id, type and payload: copies of one event are equal, whoever delivered them.
    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| {
            let (ours, theirs) = (&self.event, &other.get().event);
            ours.meta.id == theirs.meta.id && ours.event_type == theirs.event_type && ours.payload == theirs.payload
        })
    }

    fn __hash__(&self) -> u64 {
        static STATE: OnceLock<RandomState> = OnceLock::new();
        STATE.get_or_init(RandomState::new).hash_one(&self.event.meta.id)
    }

    /// Without the payload, which may be large or secret.
    fn __repr__(&self) -> String {
        let attempt = self.delivery.as_ref().map_or(String::new(), |delivery| format!(" attempt={}", delivery.attempt));
        format!("<Event {} id={}{attempt}>", self.event.event_type, self.event.meta.id)
    }
}

/// Payloads are checked against the bus's limit when they are published; an event alone may have any size.
const LARGEST: usize = 512 << 20;

/// An event of Python arguments.
pub fn make(
    py: Python<'_>,
    event_type: &Bound<'_, PyAny>,
    payload: Option<&Bound<'_, PyAny>>,
    raw: Option<&Bound<'_, PyAny>>,
    meta: Option<&Bound<'_, PyDict>>,
    parent: Option<&Event>,
) -> PyResult<Event> {
    let text = event_type.cast::<PyString>().map_err(|_| {
        invalid_event(
            py,
            format!("the event type is a {}; give a str like \"order.created\"", json::type_name(event_type)),
        )
    })?;
    let text = text.to_str().map_err(|_| invalid_event(py, "the event type is not text"))?;
    let event_type = EventType::new(text).map_err(raise(py))?;
    let payload = match (payload, raw) {
        (None, None) => Bytes::from_static(b"null"),
        (Some(payload), None) => json::encode(payload, "payload", codec::MAX_DEPTH)?.into(),
        (None, Some(raw)) => {
            let bytes: Cow<'_, [u8]> = match raw.cast::<PyString>() {
                Ok(text) => Cow::Owned(text.to_str()?.as_bytes().to_vec()),
                Err(_) => {
                    raw.extract::<Cow<'_, [u8]>>().map_err(|_| PyTypeError::new_err("raw= takes bytes or str"))?
                }
            };
            codec::check_payload(&bytes, LARGEST).map_err(raise(py))?;
            bytes.into_owned().into()
        }
        (Some(_), Some(_)) => return Err(PyTypeError::new_err("give the payload or raw=, not both")),
    };
    let now = SystemTime::now();
    let mut facts = parent.map_or_else(|| Meta::new(now), |parent| parent.child_meta(now));
    if let Some(given) = meta {
        apply(py, &mut facts, given)?;
    }
    Ok(Event::new(event_type, payload, facts))
}

/// Every keyword that is a member of meta.
const MEMBERS: [&str; 18] = [
    "id",
    "timestamp",
    "source",
    "schema_version",
    "correlation_id",
    "causation_id",
    "partition_key",
    "idempotency_key",
    "resource",
    "resource_id",
    "user_id",
    "organization_id",
    "session_id",
    "instance_id",
    "aggregate",
    "traceparent",
    "tracestate",
    "headers",
];

/// Sets the members that are given; `None` means: leave it as it is.
fn apply(py: Python<'_>, meta: &mut Meta, given: &Bound<'_, PyDict>) -> PyResult<()> {
    for (name, value) in given.iter() {
        let name = name.cast::<PyString>()?.to_str()?;
        if value.is_none() && MEMBERS.contains(&name) {
            continue;
        }
        let member = match name {
            "id" => {
                meta.id = required(py, name, &value)?;
                continue;
            }
            "timestamp" => {
                meta.timestamp = match value.extract::<SystemTime>() {
                    Ok(time) => event::timestamp(time),
                    Err(_) => required(py, name, &value)?,
                };
                continue;
            }
            "schema_version" => {
                let version = value.extract().map_err(|_| wrong(py, name, &value, "an int from 0 to 4294967295"))?;
                meta.schema_version = Some(version);
                continue;
            }
            "aggregate" => {
                meta.aggregate = Some(aggregate(py, &value)?);
                continue;
            }
            "headers" => {
                meta.headers = headers(py, &value)?;
                continue;
            }
            "source" => &mut meta.source,
            "correlation_id" => &mut meta.correlation_id,
            "causation_id" => &mut meta.causation_id,
            "partition_key" => &mut meta.partition_key,
            "idempotency_key" => &mut meta.idempotency_key,
            "resource" => &mut meta.resource,
            "resource_id" => &mut meta.resource_id,
            "user_id" => &mut meta.user_id,
            "organization_id" => &mut meta.organization_id,
            "session_id" => &mut meta.session_id,
            "instance_id" => &mut meta.instance_id,
            "traceparent" => &mut meta.traceparent,
            "tracestate" => &mut meta.tracestate,
            _ => {
                let known = MEMBERS.into_iter().chain(["raw", "delay", "expires_in", "mode"]);
                let hint = match nearest(name, known) {
                    Some(near) => format!("did you mean {near}?"),
                    None => "free values go into headers={…}".to_owned(),
                };
                return Err(PyTypeError::new_err(format!("unexpected keyword argument {name:?}; {hint}")));
            }
        };
        *member = Some(text(py, name, &value)?);
    }
    Ok(())
}

fn wrong(py: Python<'_>, name: &str, value: &Bound<'_, PyAny>, wanted: &str) -> PyErr {
    invalid_event(py, format!("meta.{name} is a {}; give {wanted}", json::type_name(value)))
}

fn text(py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<Text> {
    let text = value.cast::<PyString>().map_err(|_| wrong(py, name, value, "a str"))?;
    let text = text.to_str().map_err(|_| invalid_event(py, format!("meta.{name} holds a lone surrogate")))?;
    Ok(text.into())
}

fn required(py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<Text> {
    let text = text(py, name, value)?;
    if text.is_empty() {
        return Err(invalid_event(py, format!("meta.{name} is empty; leave it out to get a new one")));
    }
    Ok(text)
}

/// An `Aggregate`, a `(type, id)` or a dict of both.
fn aggregate(py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<Aggregate> {
    if let Ok(given) = value.cast::<PyAggregate>() {
        return Ok(given.get().0.clone());
    }
    let (kind, id) = if let Ok(pair) = value.cast::<PyTuple>() {
        (pair.get_item(0), pair.get_item(1))
    } else {
        (value.get_item("type"), value.get_item("id"))
    };
    match (kind, id) {
        (Ok(kind), Ok(id)) => {
            Ok(Aggregate { kind: text(py, "aggregate.type", &kind)?, id: text(py, "aggregate.id", &id)? })
        }
        _ => Err(wrong(py, "aggregate", value, "a dict with \"type\" and \"id\", or a tuple of both")),
    }
}

fn headers(py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<Vec<(Text, Text)>> {
    let dict = value.cast::<PyDict>().map_err(|_| wrong(py, "headers", value, "a dict of str to str"))?;
    dict.iter().map(|(name, value)| Ok((text(py, "headers key", &name)?, text(py, "headers value", &value)?))).collect()
}

/// The thing that an event is about.
#[pyclass(name = "Aggregate", module = "polybus", frozen)]
pub struct PyAggregate(Aggregate);

#[pymethods]
impl PyAggregate {
    #[new]
    fn new(r#type: &str, id: &str) -> Self {
        Self(Aggregate { kind: r#type.into(), id: id.into() })
    }

    #[getter(r#type)]
    fn kind(&self) -> &str {
        &self.0.kind
    }

    #[getter]
    fn id(&self) -> &str {
        &self.0.id
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().0 == self.0)
    }

    fn __hash__(&self) -> u64 {
        static STATE: OnceLock<RandomState> = OnceLock::new();
        STATE.get_or_init(RandomState::new).hash_one((&self.0.kind, &self.0.id))
    }

    fn __repr__(&self) -> String {
        format!("Aggregate(type={:?}, id={:?})", self.0.kind, self.0.id)
    }
}

/// The facts around an event.
#[pyclass(name = "Meta", module = "polybus", frozen, eq)]
pub struct PyMeta(Event);

impl PartialEq for PyMeta {
    fn eq(&self, other: &Self) -> bool {
        // By the wire form, which also has the members that this version does not know.
        let wire = |Self(event): &Self| {
            let null = Bytes::from_static(b"null");
            codec::encode(&Event::new(event.event_type.clone(), null, event.meta.clone())).ok()
        };
        wire(self) == wire(other)
    }
}

macro_rules! members {
    ($($name:ident),* $(,)?) => {
        #[pymethods]
        impl PyMeta {
            $(#[getter]
            fn $name(&self) -> Option<&str> {
                self.0.meta.$name.as_deref()
            })*

            #[getter]
            fn id(&self) -> &str {
                &self.0.meta.id
            }

            /// RFC 3339, UTC, as on the wire.
            #[getter]
            fn timestamp(&self) -> &str {
                &self.0.meta.timestamp
            }

            #[getter]
            fn schema_version(&self) -> Option<u32> {
                self.0.meta.schema_version
            }

            #[getter]
            fn aggregate(&self) -> Option<PyAggregate> {
                self.0.meta.aggregate.clone().map(PyAggregate)
            }

            /// A new dict each time.
            #[getter]
            fn headers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
                let headers = PyDict::new(py);
                for (name, value) in &self.0.meta.headers {
                    headers.set_item(&**name, &**value)?;
                }
                Ok(headers)
            }

            fn __repr__(&self) -> String {
                let meta = &self.0.meta;
                let mut text = format!("Meta(id={:?}, timestamp={:?}", meta.id, meta.timestamp);
                $(if let Some(value) = &meta.$name {
                    text.push_str(&format!(", {}={value:?}", stringify!($name)));
                })*
                text.push(')');
                text
            }
        }
    };
}

members! {
    source, correlation_id, causation_id, partition_key, idempotency_key, resource, resource_id, user_id,
    organization_id, session_id, instance_id, traceparent, tracestate,
}
