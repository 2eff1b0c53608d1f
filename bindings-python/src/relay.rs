//! The relay. Its results are dicts; `polybus/outbox/relay.py` makes classes of them, and answers the core's questions.

use std::sync::Arc;
use std::time::Duration;

use polybus_core::options::Naming;
use polybus_core::outbox::relay::host::{Desk, Question, Reply};
use polybus_core::outbox::relay::{Answer, DeadRow, Decision, Relay, RelayBatch, RelayOptions, RelayStats};
use polybus_core::outbox::{Dialect, Param, Style};
use polybus_core::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::bridge::Operation;
use crate::bus::PyBus;
use crate::error::{raise, to_py};
use crate::options;
use crate::outbox;

/// A relay of the core, and where it asks Python.
#[pyclass(name = "NativeRelay", module = "polybus._native", frozen)]
pub struct PyRelay {
    relay: Relay,
    desk: Arc<Desk>,
    style: Style,
}

fn none(py: Python<'_>, (): ()) -> PyResult<Py<PyAny>> {
    Ok(py.None())
}

fn count(py: Python<'_>, count: u64) -> PyResult<Py<PyAny>> {
    Ok(count.into_pyobject(py)?.into_any().unbind())
}

fn text(py: Python<'_>, text: String) -> PyResult<Py<PyAny>> {
    Ok(text.into_pyobject(py)?.into_any().unbind())
}

macro_rules! dict {
    ($py:expr, $($name:literal: $value:expr),* $(,)?) => {{
        let fields = PyDict::new($py);
        $(fields.set_item($name, $value)?;)*
        fields.into_any().unbind()
    }};
}

fn batch(py: Python<'_>, done: RelayBatch) -> PyResult<Py<PyAny>> {
    Ok(dict!(py,
        "attempted": done.attempted,
        "relayed": done.relayed,
        "publish_failed": done.publish_failed,
        "ack_failed": done.ack_failed,
        "ownership_mismatches": done.ownership_mismatches,
        "malformed": done.malformed,
        "dead_lettered": done.dead_lettered,
        "returned": done.returned,
        "outage": done.outage,
    ))
}

fn stats(py: Python<'_>, stats: RelayStats) -> PyResult<Py<PyAny>> {
    Ok(dict!(py,
        "pending": stats.pending,
        "claimed": stats.claimed,
        "retrying": stats.retrying,
        "dead": stats.dead,
        "oldest": stats.oldest.map(|age| age.as_secs_f64()),
    ))
}

fn dead(py: Python<'_>, row: DeadRow) -> PyResult<Py<PyAny>> {
    Ok(dict!(py,
        "seq": row.seq,
        "event_id": row.event_id,
        "type": row.event_type,
        "event": row.event,
        "partition_key": row.partition_key,
        "attempts": row.attempts,
        "last_error": row.last_error,
        "created_at": row.created_at_ms,
        "dead_at": row.dead_at_ms,
    ))
}

#[pymethods]
impl PyRelay {
    /// `url`, or, if that is missing, the dialect and the placeholders of whoever runs the statements.
    #[new]
    #[pyo3(signature = (url, dialect, style, bus, policy, given))]
    fn new(
        py: Python<'_>,
        url: Option<&str>,
        dialect: &str,
        style: &str,
        bus: &PyBus,
        policy: bool,
        given: &Bound<'_, PyDict>,
    ) -> PyResult<Self> {
        let given = RelayOptions::from_json(&options::RELAY.json(given)?, Naming::Python).map_err(raise(py))?;
        let (retry, bus, desk) = (given.retry.clone(), Arc::new(bus.0.clone()), Desk::new());
        let dialect = Dialect::parse(dialect).map_err(raise(py))?;
        let style = Style::parse(style).map_err(raise(py))?;
        let relay = match url {
            Some(url) => Relay::new(url, bus, given),
            None => Relay::through(desk.executor(dialect, style), bus, given),
        };
        let mut relay = relay.map_err(raise(py))?;
        if policy {
            relay = relay.with_policy(desk.policy(retry));
        }
        Ok(Self { relay, desk, style })
    }

    /// Without the password; `None` if Python runs the statements.
    #[getter]
    fn database(&self) -> Option<&str> {
        self.relay.database()
    }

    fn check(&self) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { relay.check().await }, none)
    }

    fn relay_batch(&self) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { relay.relay_batch().await }, batch)
    }

    fn run(&self) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { relay.run().await }, none)
    }

    fn stop(&self) {
        self.relay.stop();
    }

    fn wake(&self) {
        self.relay.wake();
    }

    fn stats(&self) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { relay.stats().await }, stats)
    }

    fn metrics(&self) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { Ok(relay.metrics().await) }, text)
    }

    fn health(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let health = self.relay.health();
        Ok(dict!(py,
            "healthy": health.healthy,
            "workers": health.workers,
            "database": health.database,
            "bus": health.bus,
            "last_look": health.last_look.map(|age| age.as_secs_f64()),
        ))
    }

    fn dead_letters(&self, after: i64, limit: usize) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { relay.dead_letters(after, limit).await }, |py, rows| {
            let rows = rows.into_iter().map(|row| dead(py, row)).collect::<PyResult<Vec<_>>>()?;
            Ok(PyList::new(py, rows)?.into_any().unbind())
        })
    }

    fn replay(&self, event_id: Option<String>) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { relay.replay(event_id.as_deref()).await }, count)
    }

    fn purge(&self, older_than: Duration) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { relay.purge(older_than).await }, count)
    }

    fn purge_dead(&self, event_id: Option<String>) -> Operation {
        let relay = self.relay.clone();
        Operation::new(async move { relay.purge_dead(event_id.as_deref()).await }, count)
    }

    /// The next question: `(id, sql, params)`, `(id, attempts, error)`, or `None` when there will be none.
    fn next_question(&self) -> Operation {
        let (desk, style) = (self.desk.clone(), self.style);
        Operation::new(async move { Ok(desk.next().await) }, move |py, asked| {
            Ok(match asked {
                None | Some((_, Question::End)) => py.None(),
                Some((id, Question::Run(statement))) => {
                    let (sql, params) = outbox::sql(py, &statement, style)?;
                    PyTuple::new(
                        py,
                        [id.into_pyobject(py)?.into_any(), sql.into_pyobject(py)?.into_any(), params.into_bound(py)],
                    )?
                    .into_any()
                    .unbind()
                }
                Some((id, Question::Decide(failed))) => {
                    let error = to_py(py, &failed.error).into_value(py).into_bound(py).into_any();
                    let attempts = failed.attempts.into_pyobject(py)?.into_any();
                    PyTuple::new(py, [id.into_pyobject(py)?.into_any(), attempts, error])?.into_any().unbind()
                }
            })
        })
    }

    /// What a statement gave.
    fn answer_rows(&self, id: u64, rows: Vec<Vec<Cell>>, affected: u64) {
        let rows = rows.into_iter().map(|row| row.into_iter().map(|cell| cell.0).collect()).collect();
        self.desk.answer(id, Reply::Ran(Answer { affected, rows }));
    }

    /// What becomes of a row: another attempt after so many seconds, or none.
    fn answer_decision(&self, id: u64, retry: Option<f64>) {
        let after = |seconds: f64| Duration::from_secs_f64(seconds.clamp(0.0, 1e9));
        self.desk
            .answer(id, Reply::Decided(retry.map_or(Decision::DeadLetter, |seconds| Decision::Retry(after(seconds)))));
    }

    /// Whoever was asked failed.
    fn answer_error(&self, id: u64, retryable: bool, message: &str) {
        let kind = if retryable { ErrorKind::ConnectionFailed } else { ErrorKind::InvalidConfig };
        self.desk.answer(id, Reply::Failed(Error::new(kind, message)));
    }

    /// Ends `next_question`, after what was asked.
    fn dismiss(&self) {
        self.desk.dismiss();
    }
}

/// What a driver of Python gives: an integer, text, bytes that are text, or `None`; anything else as its text.
struct Cell(Param);

impl<'py> FromPyObject<'_, 'py> for Cell {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if value.is_none() {
            return Ok(Self(Param::Null));
        }
        if let Ok(number) = value.extract::<i64>() {
            return Ok(Self(Param::Integer(number)));
        }
        if let Ok(bytes) = value.extract::<&[u8]>() {
            return Ok(Self(Param::Text(String::from_utf8_lossy(bytes).into_owned())));
        }
        Ok(Self(Param::Text(value.str()?.to_string())))
    }
}
