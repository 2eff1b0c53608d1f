//! Keyword arguments as the JSON that the core's options are read from. Names and values are judged there; here seconds
//! become milliseconds, and a word that Python itself would refuse becomes a `TypeError`.

use std::collections::HashMap;
use std::time::Duration;

use polybus_core::RetryPolicy;
use polybus_core::config;
use polybus_core::error::nearest;
use polybus_core::options::Naming;
use polybus_core::retry::Jitter;
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDelta, PyDict, PyFloat, PyInt, PyString};

use crate::error::{invalid_config, raise};
use crate::json;

/// How a value becomes JSON.
#[derive(Clone, Copy)]
enum Kind {
    Plain,
    /// Seconds as a number or timedelta → milliseconds, under the name with `_ms`.
    Seconds,
    /// A datetime or seconds since 1970 → milliseconds since 1970; words stay.
    Time,
    Retry,
    /// A dict with options of its own, or a flag. What is not known the core names.
    Members(&'static Options),
    /// A bool, or a function that tells the key of an event.
    Key,
}

use Kind::{Key, Members, Plain, Retry, Seconds, Time};

/// The options of one call: what they belong to, and their names.
pub struct Options {
    what: &'static str,
    known: &'static [(&'static str, Kind)],
}

pub const BUS: Options = Options {
    what: "Bus()",
    known: &[
        ("service", Plain),
        ("bus", Plain),
        ("mode", Plain),
        ("worker_count", Plain),
        ("buffer_size", Plain),
        ("when_full", Plain),
        ("publish_buffer_bytes", Plain),
        ("fail_open", Plain),
        ("max_payload_bytes", Plain),
        ("retry", Retry),
        ("durability", Plain),
        ("lease", Seconds),
        ("publish_timeout", Seconds),
        ("retention", Seconds),
        ("max_age", Seconds),
        ("max_events", Plain),
        ("max_bytes", Plain),
        ("confirm", Plain),
        ("idempotency_window", Seconds),
        ("partitions", Plain),
        ("allow_network_fs", Plain),
        ("on_duplicate", Plain),
        ("virtual_clock", Plain),
    ],
};

pub const SUBSCRIBE: Options = Options {
    what: "subscribe()",
    known: &[
        ("name", Plain),
        ("group", Plain),
        ("concurrency", Plain),
        ("prefetch", Plain),
        ("retry", Retry),
        ("timeout", Seconds),
        ("start", Time),
        ("broadcast", Plain),
        ("ordered", Plain),
        ("dead_letter", Plain),
        ("dead_letter_expired", Plain),
        ("respond", Plain),
        ("batch", Members(&BATCH)),
        ("idempotent", Key),
        ("idempotent_retention", Seconds),
        ("breaker", Members(&BREAKER)),
    ],
};

const BREAKER: Options = Options {
    what: "breaker",
    known: &[("threshold", Plain), ("window", Seconds), ("recovery", Seconds), ("probes", Plain)],
};

const BATCH: Options = Options { what: "batch", known: &[("size", Plain), ("wait", Seconds)] };

pub const PUBLISH: Options =
    Options { what: "publish()", known: &[("delay", Seconds), ("expires_in", Seconds), ("mode", Plain)] };

pub const REQUEST: Options = Options { what: "request()", known: &[("timeout", Seconds)] };

pub const DEAD_LETTERS: Options = Options {
    what: "dead_letters",
    known: &[
        ("id", Plain),
        ("group", Plain),
        ("pattern", Plain),
        ("since", Time),
        ("before", Time),
        ("older_than", Seconds),
        ("after", Plain),
        ("limit", Plain),
    ],
};

pub const HISTORY: Options = Options {
    what: "history()",
    known: &[
        ("pattern", Plain),
        ("since", Time),
        ("until", Time),
        ("limit", Plain),
        ("after", Plain),
        ("records", Plain),
    ],
};

pub const REPLAY: Options = Options {
    what: "replay()",
    known: &[
        ("pattern", Plain),
        ("since", Time),
        ("until", Time),
        ("group", Plain),
        ("after", Plain),
        ("limit", Plain),
    ],
};

pub const OUTBOX: Options =
    Options { what: "Outbox()", known: &[("table", Plain), ("service", Plain), ("max_payload_bytes", Plain)] };

pub const RELAY: Options = Options {
    what: "Relay()",
    known: &[
        ("table", Plain),
        ("batch", Plain),
        ("workers", Plain),
        ("lease", Seconds),
        ("poll_interval", Seconds),
        ("listen", Plain),
        ("listen_url", Plain),
        ("retry", Retry),
    ],
};

pub const INBOX: Options = Options { what: "Inbox()", known: &[("table", Plain)] };

const RETRY: Options = Options {
    what: "RetryPolicy()",
    known: &[
        ("max_retries", Plain),
        ("initial_delay", Seconds),
        ("max_delay", Seconds),
        ("factor", Plain),
        ("jitter", Plain),
    ],
};

impl Options {
    /// The JSON object of `given`; `None` counts as absent.
    pub fn json(&self, given: &Bound<'_, PyDict>) -> PyResult<String> {
        let py = given.py();
        let mut out = String::from("{");
        for (name, value) in given.iter() {
            let name = name.cast::<PyString>()?.to_str()?;
            let Some((_, kind)) = self.known.iter().find(|(known, _)| *known == name) else {
                return Err(self.unknown(name));
            };
            if value.is_none() {
                continue;
            }
            kind.write(&mut out, py, name, &value)?;
        }
        out.push('}');
        Ok(out)
    }

    /// The JSON object of a dict that is the value of `option`.
    fn members(&self, option: &str, given: &Bound<'_, PyDict>) -> PyResult<String> {
        let py = given.py();
        let mut out = String::from("{");
        for (name, value) in given.iter() {
            let Ok(name) = name.cast::<PyString>() else {
                let message = format!("{option} has a {} as a name; names are strings", json::type_name(&name));
                return Err(invalid_config(py, message));
            };
            let name = name.to_str()?;
            let kind = self.known.iter().find(|(known, _)| *known == name).map_or(Plain, |(_, kind)| *kind);
            if !value.is_none() {
                kind.write(&mut out, py, name, &value)?;
            }
        }
        out.push('}');
        Ok(out)
    }

    fn unknown(&self, name: &str) -> PyErr {
        // These two are said by a test bus and by `respond`, not by users.
        let told = |name: &&str| !matches!(*name, "virtual_clock" | "respond");
        let known = || self.known.iter().map(|(known, _)| *known).filter(told);
        let hint = match nearest(name, known()) {
            Some(near) => format!("did you mean {near}?"),
            None => format!("it knows {}", known().collect::<Vec<_>>().join(", ")),
        };
        PyTypeError::new_err(format!("{} got an unexpected keyword argument {name:?}; {hint}", self.what))
    }
}

impl Kind {
    /// Appends a member to a JSON object.
    fn write(self, out: &mut String, py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        if out.len() > 1 {
            out.push(',');
        }
        let suffix = if matches!(self, Seconds) { "_ms" } else { "" };
        out.push_str(&format!(
            "{}:{}",
            serde_json::Value::from(format!("{name}{suffix}")),
            self.json(py, name, value)?
        ));
        Ok(())
    }

    fn json(self, py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<String> {
        let number =
            !value.is_instance_of::<PyBool>() && (value.is_instance_of::<PyFloat>() || value.is_instance_of::<PyInt>());
        match self {
            Seconds if value.is_instance_of::<PyDelta>() => {
                millis(py, name, value.call_method0(intern!(py, "total_seconds"))?.extract()?)
            }
            Seconds | Time if number => millis(py, name, value.extract()?),
            Time if value.hasattr(intern!(py, "timestamp"))? => {
                millis(py, name, value.call_method0(intern!(py, "timestamp"))?.extract()?)
            }
            Retry => match value.cast::<PyRetryPolicy>() {
                Ok(policy) => Ok(policy.get().json()),
                Err(_) => Err(invalid_config(
                    py,
                    format!("{name} is a {}; give RetryPolicy(max_retries=…)", json::type_name(value)),
                )),
            },
            Members(options) if value.is_instance_of::<PyDict>() => options.members(name, value.cast::<PyDict>()?),
            Key if value.is_callable() => Ok("\"function\"".to_owned()),
            Key if !value.is_instance_of::<PyBool>() => Err(invalid_config(
                py,
                format!(
                    "{name} is a {}; give True, or a function that tells the key of an event",
                    json::type_name(value)
                ),
            )),
            _ => json::encode(value, name, 8).and_then(|json| Ok(String::from_utf8(json)?)).map_err(|_| {
                invalid_config(py, format!("{name} is a {}; that is no value for it", json::type_name(value)))
            }),
        }
    }
}

fn millis(py: Python<'_>, name: &str, seconds: f64) -> PyResult<String> {
    if !seconds.is_finite() {
        return Err(invalid_config(py, format!("{name}={seconds} is not valid; give seconds")));
    }
    Ok((seconds * 1000.0).to_string())
}

/// Seconds as a number or timedelta.
pub fn seconds(py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<Duration> {
    let seconds: Option<f64> = match value.cast::<PyDelta>() {
        Ok(delta) => delta.call_method0(intern!(py, "total_seconds"))?.extract().ok(),
        Err(_) => value.extract().ok(),
    };
    seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).ok_or_else(|| {
        let shown = value.repr().map_or_else(|_| json::type_name(value), |shown| shown.to_string());
        invalid_config(py, format!("{name}={shown} is not valid; give seconds, at least 0"))
    })
}

/// When to try again: exponential back-off with a cap.
#[pyclass(name = "RetryPolicy", module = "polybus", frozen)]
pub struct PyRetryPolicy(pub RetryPolicy);

#[pymethods]
impl PyRetryPolicy {
    #[new]
    #[pyo3(signature = (max_retries=None, initial_delay=None, max_delay=None, factor=None, jitter=None, **unknown))]
    fn new(
        py: Python<'_>,
        max_retries: Option<Bound<'_, PyAny>>,
        initial_delay: Option<Bound<'_, PyAny>>,
        max_delay: Option<Bound<'_, PyAny>>,
        factor: Option<Bound<'_, PyAny>>,
        jitter: Option<Bound<'_, PyAny>>,
        unknown: Option<Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let given = unknown.unwrap_or_else(|| PyDict::new(py));
        let values = [max_retries, initial_delay, max_delay, factor, jitter];
        for ((name, _), value) in RETRY.known.iter().zip(values) {
            given.set_item(name, value)?;
        }
        RetryPolicy::from_json(&RETRY.json(&given)?, Naming::Python).map(Self).map_err(raise(py))
    }

    #[getter]
    fn max_retries(&self) -> u32 {
        self.0.max_retries
    }

    #[getter]
    fn initial_delay(&self) -> f64 {
        self.0.initial_delay.as_secs_f64()
    }

    #[getter]
    fn max_delay(&self) -> f64 {
        self.0.max_delay.as_secs_f64()
    }

    #[getter]
    fn factor(&self) -> f64 {
        self.0.factor
    }

    #[getter]
    fn jitter(&self) -> &'static str {
        match self.0.jitter {
            Jitter::Full => "full",
            Jitter::None => "none",
        }
    }

    /// Seconds to wait after failed attempt number `attempt` (from 1), or `None` to give up.
    #[pyo3(signature = (attempt, random=None))]
    fn delay(&self, attempt: u32, random: Option<f64>) -> Option<f64> {
        self.0.delay(attempt, random.unwrap_or_else(fastrand::f64)).map(|delay| delay.as_secs_f64())
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().0 == self.0)
    }

    fn __hash__(&self) -> u64 {
        u64::from(self.0.max_retries) ^ self.0.initial_delay.as_nanos() as u64 ^ self.0.factor.to_bits()
    }

    fn __repr__(&self) -> String {
        format!(
            "RetryPolicy(max_retries={}, initial_delay={:?}, max_delay={:?}, factor={:?}, jitter={:?})",
            self.max_retries(),
            self.initial_delay(),
            self.max_delay(),
            self.factor(),
            self.jitter()
        )
    }

    fn __getnewargs__(&self) -> (u32, f64, f64, f64, &'static str) {
        (self.max_retries(), self.initial_delay(), self.max_delay(), self.factor(), self.jitter())
    }
}

impl PyRetryPolicy {
    fn json(&self) -> String {
        let policy = &self.0;
        format!(
            r#"{{"max_retries":{},"initial_delay_ms":{},"max_delay_ms":{},"factor":{},"jitter":"{}"}}"#,
            policy.max_retries,
            policy.initial_delay.as_secs_f64() * 1000.0,
            policy.max_delay.as_secs_f64() * 1000.0,
            policy.factor,
            self.jitter()
        )
    }
}

/// URL and options of a file.
#[pyfunction]
pub fn options_from_file(
    py: Python<'_>,
    path: &str,
    env: HashMap<String, String>,
) -> PyResult<(Option<String>, String)> {
    pair(py, config::from_file(path, &|name| env.get(name).cloned()))
}

/// URL and options of a dict of the same shape.
#[pyfunction]
pub fn options_from_dict(
    given: &Bound<'_, PyDict>,
    env: HashMap<String, String>,
) -> PyResult<(Option<String>, String)> {
    let py = given.py();
    let json = json::encode(given, "config", 16).map_err(|cause| {
        let error = invalid_config(py, format!("the configuration is not plain data: {}", cause.value(py)));
        error.set_cause(py, Some(cause));
        error
    })?;
    let json = String::from_utf8(json)?;
    pair(py, config::from_json(&json, &|name| env.get(name).cloned()))
}

/// URL and options of environment variables.
#[pyfunction]
pub fn options_from_env(py: Python<'_>, env: HashMap<String, String>) -> PyResult<(Option<String>, String)> {
    pair(py, config::from_env(env))
}

fn pair(py: Python<'_>, found: polybus_core::Result<config::Config>) -> PyResult<(Option<String>, String)> {
    found.map(|config| (config.url, config.options)).map_err(raise(py))
}
