//! `polybus._native`: what Python calls in the core. A list; the work is in the modules.

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

mod error;
mod json;
mod event;
mod history;
mod options;
mod outbox;
mod relay;
mod log;
mod bridge;
mod dead_letter;
mod bus;

/// The version of the Rust core under this package.
#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Runs the command `polybus` with these arguments, the program's name first. Returns its exit code.
#[pyfunction]
fn cli(py: Python<'_>, args: Vec<String>) -> i32 {
    py.detach(|| polybus_core::cli::run(args))
}

/// The module `polybus._native`.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    refuse_subinterpreters(module.py())?;
    module.add_class::<event::PyEvent>()?;
    module.add_class::<event::PyMeta>()?;
    module.add_class::<event::PyAggregate>()?;
    module.add_class::<event::Delivery>()?;
    module.add_class::<options::PyRetryPolicy>()?;
    module.add_class::<bus::PyBus>()?;
    module.add_class::<bus::PySubscription>()?;
    module.add_class::<bus::PyReceipt>()?;
    module.add_class::<history::PyReplay>()?;
    module.add_class::<dead_letter::PyDeadLetter>()?;
    module.add_class::<dead_letter::PyFailure>()?;
    module.add_class::<outbox::PyOutbox>()?;
    module.add_class::<outbox::PyInsert>()?;
    module.add_class::<outbox::PyInbox>()?;
    module.add_class::<relay::PyRelay>()?;
    module.add_class::<bridge::Bridge>()?;
    module.add_class::<bridge::Operation>()?;
    module.add_class::<bridge::Reporter>()?;
    module.add_function(wrap_pyfunction!(error::error_kinds, module)?)?;
    module.add_function(wrap_pyfunction!(error::nearest, module)?)?;
    module.add_function(wrap_pyfunction!(log::set_log_level, module)?)?;
    module.add_function(wrap_pyfunction!(log::take_logs, module)?)?;
    module.add_function(wrap_pyfunction!(options::options_from_dict, module)?)?;
    module.add_function(wrap_pyfunction!(options::options_from_env, module)?)?;
    module.add_function(wrap_pyfunction!(options::options_from_file, module)?)?;
    module.add_function(wrap_pyfunction!(cli, module)?)?;
    module.add_function(wrap_pyfunction!(version, module)?)
}

/// Isolated subinterpreters refuse by themselves; those that share a GIL (mod_wsgi) would share our statics too.
fn refuse_subinterpreters(_py: Python<'_>) -> PyResult<()> {
    // SAFETY: attached to an interpreter, which is all that these two need.
    let id = unsafe { pyo3::ffi::PyInterpreterState_GetID(pyo3::ffi::PyInterpreterState_Get()) };
    if id == 0 {
        return Ok(());
    }
    Err(PyImportError::new_err(
        "polybus cannot run in a subinterpreter; with mod_wsgi set WSGIApplicationGroup %{GLOBAL}",
    ))
}
