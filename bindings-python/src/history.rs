//! Pages of the log, and replay.

use std::sync::Arc;

use polybus_core::history::{HistoryEntry, Record, ReplayResult};
use polybus_core::options::{HistoryQuery, Naming, ReplayOptions};
use polybus_core::{Bus, Replay};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use tokio::sync::Mutex;

use crate::bridge::Operation;
use crate::bus::view;
use crate::dead_letter::PyFailure;
use crate::error::raise;
use crate::event::PyEvent;
use crate::options;

/// A page.
pub fn page(py: Python<'_>, bus: &Bus, given: &Bound<'_, PyDict>) -> PyResult<Operation> {
    let query = HistoryQuery::from_json(&options::HISTORY.json(given)?, Naming::Python).map_err(raise(py))?;
    let bus = bus.clone();
    Ok(Operation::new(async move { bus.history(query).await }, |py, entries| {
        let entries = entries.into_iter().map(|found| entry(py, found)).collect::<PyResult<Vec<_>>>()?;
        Ok(PyList::new(py, entries)?.into_any().unbind())
    }))
}

fn entry(py: Python<'_>, found: HistoryEntry) -> PyResult<Py<PyAny>> {
    let fields = PyDict::new(py);
    fields.set_item("event", found.event.map(PyEvent::new))?;
    fields.set_item("raw", found.raw.map(|raw| PyBytes::new(py, &raw)))?;
    fields.set_item("position", &*found.position)?;
    fields.set_item("published_at", found.published_at)?;
    let records = match found.records {
        None => py.None(),
        Some(records) => {
            let records = records.into_iter().map(|found| record(py, found)).collect::<PyResult<Vec<_>>>()?;
            PyTuple::new(py, records)?.into_any().unbind()
        }
    };
    fields.set_item("records", records)?;
    view(py, "HistoryEntry", &fields)
}

fn record(py: Python<'_>, found: Record) -> PyResult<Py<PyAny>> {
    let fields = PyDict::new(py);
    fields.set_item("group", &*found.group)?;
    fields.set_item("status", found.status.as_str())?;
    fields.set_item("attempts", found.attempts)?;
    fields.set_item("first_failed_at", found.first_failed_at)?;
    fields.set_item("last_failed_at", found.last_failed_at)?;
    fields.set_item("retry_at", found.retry_at)?;
    fields.set_item("completed_at", found.completed_at)?;
    fields.set_item("error", found.error.map(PyFailure))?;
    fields.set_item("dead_letter", found.dead_letter.as_deref())?;
    fields.set_item("reason", found.reason.map(polybus_core::delivery::DeadReason::as_str))?;
    view(py, "Record", &fields)
}

/// A replay under way.
#[pyclass(name = "NativeReplay", module = "polybus._native", frozen)]
pub struct PyReplay(Arc<Mutex<Replay>>);

/// Reads the options.
pub fn replay(py: Python<'_>, bus: &Bus, given: &Bound<'_, PyDict>) -> PyResult<PyReplay> {
    let options = ReplayOptions::from_json(&options::REPLAY.json(given)?, Naming::Python);
    let replay = options.and_then(|options| Replay::new(bus.clone(), options)).map_err(raise(py))?;
    Ok(PyReplay(Arc::new(Mutex::new(replay))))
}

#[pymethods]
impl PyReplay {
    /// The next batch; `None` after the last.
    fn next(&self) -> Operation {
        let replay = self.0.clone();
        Operation::new(async move { replay.lock().await.next().await }, |py, result: Option<ReplayResult>| {
            let Some(result) = result else { return Ok(py.None()) };
            let fields = PyDict::new(py);
            fields.set_item("count", result.count)?;
            fields.set_item("skipped", result.skipped)?;
            fields.set_item("position", result.position.as_deref())?;
            fields.set_item("done", result.done)?;
            view(py, "ReplayResult", &fields)
        })
    }
}
