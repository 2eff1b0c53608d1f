//! Errors of the core as exceptions of `polybus.errors`. The classes are Python's own; here they are only found.

use polybus_core::{Error, ErrorKind};
use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

/// The exception that stands for `error`.
pub fn to_py(py: Python<'_>, error: &Error) -> PyErr {
    instance(py, error).map_or_else(|failure| failure, PyErr::from_value)
}

/// For `map_err` where Python is attached anyway.
pub fn raise(py: Python<'_>) -> impl Fn(Error) -> PyErr {
    move |error| to_py(py, &error)
}

/// A short way to the most frequent one.
pub fn invalid_event(py: Python<'_>, message: impl Into<String>) -> PyErr {
    to_py(py, &Error::invalid_event(message))
}

/// Likewise.
pub fn invalid_config(py: Python<'_>, message: impl Into<String>) -> PyErr {
    to_py(py, &Error::invalid_config(message))
}

fn instance<'py>(py: Python<'py>, error: &Error) -> PyResult<Bound<'py, PyAny>> {
    let exception = class(py, error.kind())?.call1((error.to_string(),))?;
    let failures: Vec<_> =
        error.failures().iter().map(|(index, why)| Ok((*index, instance(py, why)?))).collect::<PyResult<_>>()?;
    if !failures.is_empty() {
        exception.setattr(intern!(py, "failures"), failures)?;
    }
    if let Some(remote) = error.remote() {
        let class = py.import("polybus.errors")?.getattr("Remote")?;
        let told = class.call1((&remote.kind, &remote.message, remote.code.as_deref()))?;
        exception.setattr(intern!(py, "remote"), told)?;
    }
    if let Some(source) = std::error::Error::source(error) {
        let cause = PyRuntimeError::new_err(source.to_string());
        exception.setattr(intern!(py, "__cause__"), cause.into_value(py))?;
    }
    Ok(exception)
}

fn class<'py>(py: Python<'py>, kind: ErrorKind) -> PyResult<Bound<'py, PyAny>> {
    static BY_CODE: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
    let classes = BY_CODE.get_or_try_init(py, || {
        let table = py.import("polybus.errors")?.getattr("BY_CODE")?;
        PyResult::Ok(table.cast_into::<PyDict>()?.unbind())
    })?;
    let class = classes.bind(py).get_item(kind.code())?;
    class.ok_or_else(|| PyRuntimeError::new_err(format!("polybus.errors lacks {}", kind.class_name())))
}

/// Code, class name and whether it is retryable, of every kind: for the tests of `polybus.errors`.
#[pyfunction]
pub fn error_kinds() -> Vec<(&'static str, &'static str, bool)> {
    ErrorKind::ALL.iter().map(|kind| (kind.class_name(), kind.code(), kind.is_retryable())).collect()
}

/// The word of `known` nearest to `word`, if one is near.
#[pyfunction]
pub fn nearest(word: &str, known: Vec<String>) -> Option<String> {
    polybus_core::error::nearest(word, known.iter().map(String::as_str)).map(str::to_owned)
}
