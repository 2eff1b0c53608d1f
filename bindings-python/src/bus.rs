//! The bus and its subscriptions. Each method takes its arguments, names what the core is to do, and returns it as an
//! [`Operation`]; Python awaits it on a loop or waits for it on a thread.

use std::time::{Duration, SystemTime};

use polybus_core::options::{DeadLetterQuery, Mode, Naming, OnDuplicate, PublishOptions, RequestOptions};
use polybus_core::transport::{GroupStats, Outgoing, Receipt};
use polybus_core::{Bus, BusOptions, Result, SubscribeOptions, Subscription, process};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::bridge::{Bridge, Here, Operation, Reporter, untracked};
use crate::dead_letter::PyDeadLetter;
use crate::error::raise;
use crate::event::{PyEvent, make};
use crate::history;
use crate::options;

/// The core's bus.
#[pyclass(name = "NativeBus", module = "polybus._native", frozen)]
pub struct PyBus(pub(crate) Bus);

/// Says that an event was accepted.
#[pyclass(name = "Receipt", module = "polybus", frozen)]
pub struct PyReceipt(Receipt);

#[pymethods]
impl PyReceipt {
    #[new]
    #[pyo3(signature = (id, position=None, duplicate=false))]
    fn new(id: &str, position: Option<&str>, duplicate: bool) -> Self {
        Self(Receipt { id: id.into(), position: position.map(Into::into), duplicate })
    }

    /// The event's id.
    #[getter]
    fn id(&self) -> &str {
        &self.0.id
    }

    /// Position in the transport's log; `None` while it is delayed.
    #[getter]
    fn position(&self) -> Option<&str> {
        self.0.position.as_deref()
    }

    /// Whether an event with the same idempotency key was published before; `id` and `position` are that one's.
    #[getter]
    fn duplicate(&self) -> bool {
        self.0.duplicate
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().0 == self.0)
    }

    fn __repr__(&self) -> String {
        let position = self.0.position.as_ref().map_or("None".to_owned(), |position| format!("{position:?}"));
        let duplicate = if self.0.duplicate { ", duplicate=True" } else { "" };
        format!("Receipt(id={:?}, position={position}{duplicate})", self.0.id)
    }
}

fn none(py: Python<'_>, (): ()) -> PyResult<Py<PyAny>> {
    Ok(py.None())
}

fn count(py: Python<'_>, count: u64) -> PyResult<Py<PyAny>> {
    Ok(count.into_pyobject(py)?.into_any().unbind())
}

#[pymethods]
impl PyBus {
    #[new]
    fn new(py: Python<'_>, url: &str, given: &Bound<'_, PyDict>) -> PyResult<Self> {
        let options = BusOptions::from_json(&options::BUS.json(given)?, Naming::Python).map_err(raise(py))?;
        Bus::new(url, options).map(Self).map_err(raise(py))
    }

    /// Of options that `polybus_core::config` has read.
    #[staticmethod]
    fn from_json(py: Python<'_>, url: &str, options: &str) -> PyResult<Self> {
        let options = BusOptions::from_json(options, Naming::Python).map_err(raise(py))?;
        Bus::new(url, options).map(Self).map_err(raise(py))
    }

    /// Without the password.
    #[getter]
    fn url(&self) -> String {
        self.0.url()
    }

    #[getter]
    fn service(&self) -> &str {
        &self.0.options().service
    }

    #[getter]
    fn bus(&self) -> &str {
        &self.0.options().bus
    }

    #[getter]
    fn mode(&self) -> &'static str {
        word(self.0.options().mode)
    }

    /// What a second handler of the same name does, if the options say so.
    #[getter]
    fn on_duplicate(&self) -> Option<&'static str> {
        self.0.options().on_duplicate.map(|choice| match choice {
            OnDuplicate::Error => "error",
            OnDuplicate::Replace => "replace",
        })
    }

    #[getter]
    fn closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Whether the transport is open in this process.
    #[getter]
    fn opened(&self) -> bool {
        self.0.is_open()
    }

    fn start(&self) -> Operation {
        let bus = self.0.clone();
        Operation::new(async move { bus.start().await }, none)
    }

    /// One event: what `make` takes, or an event alone.
    #[pyo3(signature = (event, payload, raw, meta, given))]
    fn publish(
        &self,
        py: Python<'_>,
        event: &Bound<'_, PyAny>,
        payload: Option<&Bound<'_, PyAny>>,
        raw: Option<&Bound<'_, PyAny>>,
        meta: Option<&Bound<'_, PyDict>>,
        given: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Operation> {
        let event = event_of(py, event, payload, raw, meta)?;
        let PublishOptions { delay, expires_in, .. } = publish_options(py, given)?;
        let bus = self.0.clone();
        let publish = async move { bus.publish(vec![Outgoing { event, delay, expires_in }]).await };
        Ok(Operation::new(publish, |py, receipts| {
            let first = receipts.into_iter().next().map(PyReceipt);
            Ok(first.into_pyobject(py)?.into_any().unbind())
        }))
    }

    /// All events, in order.
    fn publish_many(&self, events: &Bound<'_, PyAny>) -> PyResult<Operation> {
        let mut batch = Vec::with_capacity(events.len().unwrap_or(0));
        for event in events.try_iter()? {
            let event = event?;
            let event = event.cast::<PyEvent>().map_err(|_| {
                PyTypeError::new_err("publish_many takes events; make them with Event.create(type, payload)")
            })?;
            batch.push(Outgoing { event: event.get().event.clone(), delay: None, expires_in: None });
        }
        let bus = self.0.clone();
        Ok(Operation::new(async move { bus.publish(batch).await }, |py, receipts| {
            let receipts = receipts.into_iter().map(|receipt| untracked(py, PyReceipt(receipt)));
            Ok(PyList::new(py, receipts.collect::<PyResult<Vec<_>>>()?)?.into_any().unbind())
        }))
    }

    /// One request, given as an event is published. Resolves to the reply.
    #[pyo3(signature = (event, payload, raw, meta, given))]
    fn request(
        &self,
        py: Python<'_>,
        event: &Bound<'_, PyAny>,
        payload: Option<&Bound<'_, PyAny>>,
        raw: Option<&Bound<'_, PyAny>>,
        meta: Option<&Bound<'_, PyDict>>,
        given: &Bound<'_, PyDict>,
    ) -> PyResult<Operation> {
        let options = RequestOptions::from_json(&options::REQUEST.json(given)?, Naming::Python).map_err(raise(py))?;
        let (event, bus) = (event_of(py, event, payload, raw, meta)?, self.0.clone());
        Ok(Operation::new(async move { bus.request(event, options).await }, |py, reply| {
            Ok(Py::new(py, PyEvent::new(reply))?.into_any())
        }))
    }

    /// The mode of this publish.
    fn mode_of(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<&'static str> {
        Ok(word(publish_options(py, Some(given))?.mode.unwrap_or(self.0.options().mode)))
    }

    /// For a publish that this process handles itself: the event as it would be published, and the names of the
    /// subscriptions that match, in order of subscription.
    #[pyo3(signature = (event, payload, raw, meta))]
    fn prepare(
        &self,
        py: Python<'_>,
        event: &Bound<'_, PyAny>,
        payload: Option<&Bound<'_, PyAny>>,
        raw: Option<&Bound<'_, PyAny>>,
        meta: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<(PyEvent, Vec<String>)> {
        let event = self.0.prepare(event_of(py, event, payload, raw, meta)?).map_err(raise(py))?;
        let matching = self.0.matching(&event).map_err(raise(py))?;
        Ok((PyEvent::new(event), matching.iter().map(|subscription| subscription.name().to_string()).collect()))
    }

    /// The options, read: for their errors before anything is opened. Returns name and concurrency.
    fn check_subscription(
        &self,
        py: Python<'_>,
        pattern: &str,
        given: &Bound<'_, PyDict>,
    ) -> PyResult<(String, usize)> {
        polybus_core::Pattern::new(pattern).map_err(raise(py))?;
        let options = subscribe_options(py, given)?;
        let concurrency = options.concurrency_on(self.0.options());
        Ok((options.name, concurrency))
    }

    /// Resolves to the subscription. `number` names it in what the bridge hands out.
    fn subscribe(
        &self,
        py: Python<'_>,
        bridge: &Bridge,
        number: u32,
        pattern: String,
        given: &Bound<'_, PyDict>,
    ) -> PyResult<(Operation, Reporter)> {
        let options = subscribe_options(py, given)?;
        let group = options.group_for(&self.0.options().service);
        let handler = bridge.handler(number, group.into());
        let (bus, ours) = (self.0.clone(), handler.clone());
        let subscribe = async move {
            let subscription = bus.subscribe(&pattern, ours, options).await?;
            Ok(Unclaimed(Some((bus, subscription))))
        };
        let operation = Operation::new(subscribe, |py, mut unclaimed: Unclaimed| {
            let claimed = unclaimed.0.take();
            let subscription =
                claimed.map(|(bus, subscription)| PySubscription { bus, subscription: Here::new(subscription) });
            Ok(subscription.into_pyobject(py)?.into_any().unbind())
        });
        Ok((operation, Reporter(Here::new(handler))))
    }

    fn guarantees(&self) -> Operation {
        let bus = self.0.clone();
        let look = async move { Ok((bus.guarantees().await?, bus.capabilities().await?)) };
        Operation::new(look, |py, (found, can)| {
            let facts = PyDict::new(py);
            facts.set_item("transport", found.transport)?;
            facts.set_item("delivery", found.delivery)?;
            facts.set_item("durability", found.durability)?;
            facts.set_item("ordering", found.ordering)?;
            facts.set_item("durable", can.durable)?;
            facts.set_item("cross_process", can.cross_process)?;
            facts.set_item("ack", can.ack)?;
            facts.set_item("delayed_retry", can.delayed_retry)?;
            facts.set_item("delayed_publish", can.delayed_publish)?;
            facts.set_item("dead_letters", can.dead_letters)?;
            facts.set_item("start_position", can.start_position)?;
            facts.set_item("broadcast", can.broadcast)?;
            facts.set_item("ordered", can.ordered)?;
            facts.set_item("request", can.request)?;
            facts.set_item("idempotent", can.idempotent)?;
            facts.set_item("publish_dedupe", can.publish_dedupe)?;
            facts.set_item("history", can.history)?;
            let details = PyDict::new(py);
            for (name, value) in found.details {
                details.set_item(name, value)?;
            }
            facts.set_item("details", details)?;
            facts.set_item("warnings", found.warnings)?;
            view(py, "Guarantees", &facts)
        })
    }

    /// Numbers of each subscription, by name.
    fn stats(&self) -> Operation {
        let bus = self.0.clone();
        Operation::new(async move { bus.stats().await }, |py, all| {
            let named = PyDict::new(py);
            for stats in all {
                named.set_item(&**stats.subscription.name(), numbers(py, &stats.subscription, stats.group)?)?;
            }
            Ok(named.into_any().unbind())
        })
    }

    fn delete_group(&self, group: String) -> Operation {
        let bus = self.0.clone();
        Operation::new(async move { bus.delete_group(&group).await }, |py, existed| {
            Ok(existed.into_pyobject(py)?.to_owned().into_any().unbind())
        })
    }

    fn dead_list(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<Operation> {
        let DeadLetterQuery { filter, after, limit } = query(py, given)?;
        let bus = self.0.clone();
        Ok(Operation::new(async move { bus.dead_letters(filter, after, limit).await }, |py, letters| {
            let letters = letters.into_iter().map(|letter| Py::new(py, PyDeadLetter(letter)));
            Ok(PyList::new(py, letters.collect::<PyResult<Vec<_>>>()?)?.into_any().unbind())
        }))
    }

    /// One record.
    fn dead_get(&self, id: String) -> Operation {
        let bus = self.0.clone();
        Operation::new(async move { bus.dead_letter(&id).await }, |py, letter| {
            Ok(Py::new(py, PyDeadLetter(letter))?.into_any())
        })
    }

    fn dead_count(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<Operation> {
        let (filter, bus) = (query(py, given)?.filter, self.0.clone());
        Ok(Operation::new(async move { bus.dead_count(filter).await }, count))
    }

    fn dead_replay(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<Operation> {
        let (filter, bus) = (query(py, given)?.filter, self.0.clone());
        Ok(Operation::new(async move { bus.dead_replay(filter).await }, count))
    }

    fn dead_purge(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<Operation> {
        let (filter, bus) = (query(py, given)?.filter, self.0.clone());
        Ok(Operation::new(async move { bus.dead_purge(filter).await }, count))
    }

    /// A page of the log.
    fn history(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<Operation> {
        history::page(py, &self.0, given)
    }

    /// A replay that has not begun.
    fn replay(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<history::PyReplay> {
        history::replay(py, &self.0, given)
    }

    fn close(&self, py: Python<'_>, timeout: &Bound<'_, PyAny>) -> PyResult<Operation> {
        let (bus, timeout) = (self.0.clone(), options::seconds(py, "timeout", timeout)?);
        let close = async move {
            bus.close(timeout).await;
            Ok(())
        };
        Ok(Operation::new(close, none))
    }

    /// As `close`, on a thread of the core: nobody waits for it.
    fn close_soon(&self, py: Python<'_>, timeout: &Bound<'_, PyAny>) -> PyResult<()> {
        let (bus, timeout) = (self.0.clone(), options::seconds(py, "timeout", timeout)?);
        process::current().runtime.spawn(async move { bus.close(timeout).await });
        Ok(())
    }

    /// Prometheus text.
    fn metrics(&self) -> String {
        polybus_core::metrics::render(&self.0)
    }

    // Test kit.

    fn published(&self, py: Python<'_>, pattern: &str) -> PyResult<Vec<PyEvent>> {
        let events = self.0.published(pattern).map_err(raise(py))?;
        Ok(events.into_iter().map(PyEvent::new).collect())
    }

    fn wait_for(&self, pattern: String) -> Operation {
        let bus = self.0.clone();
        Operation::new(async move { bus.wait_for(&pattern).await }, |py, event| {
            Ok(Py::new(py, PyEvent::new(event))?.into_any())
        })
    }

    fn fail_next(&self, py: Python<'_>, pattern: &str, times: u32) -> PyResult<()> {
        self.0.fail_next(pattern, times).map_err(raise(py))
    }

    fn duplicate_next(&self, py: Python<'_>, pattern: &str, times: u32) -> PyResult<()> {
        self.0.duplicate_next(pattern, times).map_err(raise(py))
    }

    fn advance(&self, py: Python<'_>, by: &Bound<'_, PyAny>) -> PyResult<Operation> {
        let (bus, by) = (self.0.clone(), options::seconds(py, "seconds", by)?);
        Ok(Operation::new(async move { bus.advance(by).await }, none))
    }

    fn idle(&self) -> Operation {
        let bus = self.0.clone();
        Operation::new(async move { bus.idle().await }, none)
    }
}

fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Async => "async",
        Mode::Sync => "sync",
    }
}

fn event_of(
    py: Python<'_>,
    event: &Bound<'_, PyAny>,
    payload: Option<&Bound<'_, PyAny>>,
    raw: Option<&Bound<'_, PyAny>>,
    meta: Option<&Bound<'_, PyDict>>,
) -> PyResult<polybus_core::Event> {
    let Ok(made) = event.cast::<PyEvent>() else { return make(py, event, payload, raw, meta, None) };
    if payload.is_some() || raw.is_some() || meta.is_some_and(|meta| !meta.is_empty()) {
        return Err(PyTypeError::new_err(
            "an event has its payload and meta already: publish(event), or publish(type, payload, **meta)",
        ));
    }
    Ok(made.get().event.clone())
}

fn publish_options(py: Python<'_>, given: Option<&Bound<'_, PyDict>>) -> PyResult<PublishOptions> {
    match given {
        None => Ok(PublishOptions::default()),
        Some(given) => PublishOptions::from_json(&options::PUBLISH.json(given)?, Naming::Python).map_err(raise(py)),
    }
}

fn subscribe_options(py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<SubscribeOptions> {
    SubscribeOptions::from_json(&options::SUBSCRIBE.json(given)?, Naming::Python).map_err(raise(py))
}

fn query(py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<DeadLetterQuery> {
    let json = options::DEAD_LETTERS.json(given)?;
    DeadLetterQuery::from_json(&json, Naming::Python, SystemTime::now()).map_err(raise(py))
}

/// A dataclass of `polybus._views` with these fields.
pub(crate) fn view(py: Python<'_>, class: &str, fields: &Bound<'_, PyDict>) -> PyResult<Py<PyAny>> {
    Ok(py.import("polybus._views")?.getattr(class)?.call((), Some(fields))?.unbind())
}

fn numbers(py: Python<'_>, subscription: &Subscription, group: Option<GroupStats>) -> PyResult<Py<PyAny>> {
    use std::sync::atomic::Ordering::Relaxed;
    let (counters, group) = (subscription.counters(), group.unwrap_or_default());
    let fields = PyDict::new(py);
    fields.set_item("name", &**subscription.name())?;
    fields.set_item("group", &**subscription.group())?;
    fields.set_item("pattern", subscription.pattern())?;
    fields.set_item("pending", group.lag + group.in_flight + group.retrying)?;
    fields.set_item("lag", group.lag)?;
    fields.set_item("in_flight", group.in_flight)?;
    fields.set_item("retrying", group.retrying)?;
    fields.set_item("dead", group.dead)?;
    fields.set_item("expired", group.expired)?;
    fields.set_item("oldest_age", group.oldest.map(|age| age.as_secs_f64()))?;
    for (name, counter) in [
        ("completed", &counters.completed),
        ("failed", &counters.failed),
        ("retried", &counters.retried),
        ("dead_lettered", &counters.dead_lettered),
        ("dropped", &counters.dropped),
        ("released", &counters.released),
        ("timed_out", &counters.timed_out),
        ("duplicates", &counters.duplicates),
        ("leases_lost", &counters.leases_lost),
        ("running", &counters.running),
        ("buffered", &counters.buffered),
    ] {
        fields.set_item(name, counter.load(Relaxed))?;
    }
    fields.set_item("breaker", subscription.breaker().map(polybus_core::breaker::Phase::as_str))?;
    fields.set_item("busy_seconds", counters.busy_micros.load(Relaxed) as f64 / 1e6)?;
    view(py, "SubscriptionStats", &fields)
}

/// A subscription that nobody has received yet: ends when nobody does.
struct Unclaimed(Option<(Bus, Subscription)>);

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some((_, subscription)) = self.0.take() {
            process::current().runtime.spawn(async move { subscription.drain(Duration::ZERO).await });
        }
    }
}

/// A running subscription.
#[pyclass(name = "NativeSubscription", module = "polybus._native", frozen)]
pub struct PySubscription {
    bus: Bus,
    subscription: Here<Subscription>,
}

impl PySubscription {
    fn here(&self) -> Result<Subscription> {
        if self.subscription.is_ended() || !self.subscription.is_ours() {
            return Err(polybus_core::Error::bus_closed("the subscription has ended; subscribe again"));
        }
        Ok((*self.subscription).clone())
    }
}

#[pymethods]
impl PySubscription {
    #[getter]
    fn name(&self) -> &str {
        self.subscription.name()
    }

    #[getter]
    fn group(&self) -> &str {
        self.subscription.group()
    }

    #[getter]
    fn pattern(&self) -> &str {
        self.subscription.pattern()
    }

    #[getter]
    fn active(&self) -> bool {
        self.here().is_ok()
    }

    fn pause(&self, py: Python<'_>) -> PyResult<()> {
        self.here().map(|subscription| subscription.pause()).map_err(raise(py))
    }

    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        self.here().map(|subscription| subscription.resume()).map_err(raise(py))
    }

    /// Ends it; nothing to do when it has ended.
    fn drain(&self, py: Python<'_>, timeout: &Bound<'_, PyAny>) -> PyResult<Operation> {
        let (here, timeout) = (self.here(), options::seconds(py, "timeout", timeout)?);
        let drain = async move {
            if let Ok(subscription) = here {
                subscription.drain(timeout).await;
            }
            Ok(())
        };
        Ok(Operation::new(drain, none))
    }

    /// Ends it at once: what runs is handed back. Does not wait.
    fn abandon(&self) {
        if let Ok(subscription) = self.here() {
            process::current().runtime.spawn(async move { subscription.drain(Duration::ZERO).await });
        }
    }

    fn stats(&self) -> Operation {
        let (bus, here) = (self.bus.clone(), self.here());
        let count = async move {
            let subscription = here?;
            let group = match subscription.is_broadcast() {
                true => None,
                false => Some(bus.group_stats(subscription.group()).await?),
            };
            Ok((subscription, group))
        };
        Operation::new(count, |py, (subscription, group)| numbers(py, &subscription, group))
    }
}
