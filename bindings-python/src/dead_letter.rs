//! `DeadLetter`: what no handler could finish.

use std::time::SystemTime;

use polybus_core::dead_letter::DeadLetter;
use polybus_core::delivery::Failure;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::event::PyEvent;

/// A dead letter: the event and what went wrong with it.
#[pyclass(name = "DeadLetter", module = "polybus", frozen)]
pub struct PyDeadLetter(pub DeadLetter);

/// What a handler raised last, each part cut to 4 KiB.
#[pyclass(name = "Failure", module = "polybus", frozen)]
pub struct PyFailure(pub Failure);

#[pymethods]
impl PyDeadLetter {
    #[getter]
    fn id(&self) -> &str {
        &self.0.id
    }

    /// `None` when the bytes could not be decoded; they are in `raw`.
    #[getter]
    fn event(&self) -> Option<PyEvent> {
        self.0.event.clone().map(PyEvent::new)
    }

    #[getter]
    fn raw<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.raw)
    }

    #[getter]
    fn error(&self) -> PyFailure {
        PyFailure(self.0.error.clone())
    }

    #[getter]
    fn attempts(&self) -> u32 {
        self.0.attempts
    }

    #[getter]
    fn first_failed_at(&self) -> SystemTime {
        self.0.first_failed_at
    }

    #[getter]
    fn last_failed_at(&self) -> SystemTime {
        self.0.last_failed_at
    }

    #[getter]
    fn subscription(&self) -> &str {
        &self.0.subscription
    }

    #[getter]
    fn group(&self) -> &str {
        &self.0.group
    }

    #[getter]
    fn reason(&self) -> &'static str {
        self.0.reason.as_str()
    }

    #[getter]
    fn replayed_from(&self) -> Option<&str> {
        self.0.replayed_from.as_deref()
    }

    fn __repr__(&self) -> String {
        let kind = self.0.event.as_ref().map_or("(undecodable)", |event| event.event_type.as_str());
        format!(
            "<DeadLetter {} {kind} {} attempts={} {}>",
            self.0.id,
            self.0.reason.as_str(),
            self.0.attempts,
            self.0.error.kind
        )
    }
}

#[pymethods]
impl PyFailure {
    #[getter(r#type)]
    fn kind(&self) -> &str {
        &self.0.kind
    }

    #[getter]
    fn message(&self) -> &str {
        &self.0.message
    }

    #[getter]
    fn stack(&self) -> &str {
        &self.0.stack
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().0 == self.0)
    }

    fn __repr__(&self) -> String {
        format!("Failure(type={:?}, message={:?})", self.0.kind, self.0.message)
    }
}
