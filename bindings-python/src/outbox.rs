//! Statements of the outbox and the inbox. Python's adapters run them on the connection that the user hands in.

use std::time::Duration;

use polybus_core::Event;
use polybus_core::options::Naming;
use polybus_core::outbox::table::{INBOX_RIGHTS, OUTBOX_RIGHTS, RELAY_RIGHTS};
use polybus_core::outbox::{Change, Dialect, Entry, Inbox, Insert, Outbox, Param, Statement, Style};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::error::{raise, to_py};
use crate::event::PyEvent;
use crate::options;

/// `(sql, params)`: a dict for named placeholders, a tuple for all others.
pub(crate) type Sql = (String, Py<PyAny>);

pub(crate) fn sql(py: Python<'_>, statement: &Statement, style: Style) -> PyResult<Sql> {
    let value = |param: &Param| match param {
        Param::Null => Ok(py.None()),
        Param::Integer(number) => Ok(number.into_pyobject(py)?.into_any().unbind()),
        Param::Text(text) => Ok(text.into_pyobject(py)?.into_any().unbind()),
    };
    let values = statement.params.iter().map(value).collect::<PyResult<Vec<_>>>()?;
    let params = if style == Style::Named {
        let named = PyDict::new(py);
        for (index, value) in values.into_iter().enumerate() {
            named.set_item(format!("p{}", index + 1), value)?;
        }
        named.into_any()
    } else {
        PyTuple::new(py, values)?.into_any()
    };
    Ok((statement.sql.clone(), params.unbind()))
}

/// Which database and which placeholders; a style alone means its usual dialect.
fn spoken(py: Python<'_>, dialect: Option<&str>, style: &str) -> PyResult<(Dialect, Style)> {
    let style = Style::parse(style).map_err(raise(py))?;
    let dialect = dialect.map_or(Ok(style.usual_dialect()), Dialect::parse).map_err(raise(py))?;
    Ok((dialect, style))
}

/// Renders what stores events in one outbox table.
#[pyclass(name = "NativeOutbox", module = "polybus._native", frozen)]
pub struct PyOutbox(Outbox);

#[pymethods]
impl PyOutbox {
    #[new]
    #[pyo3(signature = (**given))]
    fn new(py: Python<'_>, given: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let json = given.map_or(Ok("{}".to_owned()), |given| options::OUTBOX.json(given))?;
        Outbox::from_json(&json, Naming::Python).map(Self).map_err(raise(py))
    }

    /// Statements that store the events.
    fn insert(
        &self,
        py: Python<'_>,
        dialect: Option<&str>,
        style: &str,
        events: Vec<PyRef<'_, PyEvent>>,
        dedupe_key: Option<String>,
    ) -> PyResult<Vec<PyInsert>> {
        let (dialect, style) = spoken(py, dialect, style)?;
        let mut entries: Vec<Entry> = events.iter().map(|event| Entry::from(Event::clone(&event.event))).collect();
        if let (Some(key), [entry]) = (dedupe_key, &mut entries[..]) {
            entry.dedupe_key = Some(key.into());
        }
        let inserts = self.0.insert(dialect, style, entries).map_err(raise(py))?;
        Ok(inserts.into_iter().map(|insert| PyInsert { insert, style }).collect())
    }

    /// The text that stores one `row`, and returns nothing; none for MySQL.
    fn one(&self, py: Python<'_>, dialect: &str, style: &str) -> PyResult<Option<String>> {
        let (dialect, style) = spoken(py, Some(dialect), style)?;
        Ok(self.0.one(dialect, style))
    }

    /// What the text of `one` stores.
    fn row<'py>(
        &self,
        py: Python<'py>,
        event: PyRef<'_, PyEvent>,
        dedupe_key: Option<&str>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let mut entry = Entry::from(Event::clone(&event.event));
        if let Some(key) = dedupe_key {
            entry.dedupe_key = Some(key.into());
        }
        PyTuple::new(py, self.0.row(entry).map_err(raise(py))?.values())
    }

    fn ddl(&self, py: Python<'_>, dialect: &str) -> PyResult<Vec<String>> {
        Ok(self.0.table().outbox_ddl(Dialect::parse(dialect).map_err(raise(py))?))
    }

    /// What tells relays that listen that rows were committed; none if they were told a moment ago. PostgreSQL only.
    fn wake(&self, py: Python<'_>, style: &str, now: i64) -> PyResult<Option<Sql>> {
        let style = Style::parse(style).map_err(raise(py))?;
        self.0.wake(style, now).map(|statement| sql(py, &statement, style)).transpose()
    }

    /// What fails if and only if the table cannot be used.
    fn check(&self, py: Python<'_>, dialect: &str, style: &str) -> PyResult<Sql> {
        let (dialect, style) = spoken(py, Some(dialect), style)?;
        sql(py, &self.0.table().outbox_check(dialect, style), style)
    }

    /// The error for a table that cannot be used.
    fn missing<'py>(&self, py: Python<'py>, dialect: &str) -> PyResult<Bound<'py, PyAny>> {
        let dialect = Dialect::parse(dialect).map_err(raise(py))?;
        Ok(to_py(py, &self.0.table().missing(dialect, "Outbox")).into_value(py).into_bound(py).into_any())
    }

    /// The error for a user who lacks a right on it.
    fn denied<'py>(&self, py: Python<'py>, dialect: &str, relaying: bool) -> PyResult<Bound<'py, PyAny>> {
        let dialect = Dialect::parse(dialect).map_err(raise(py))?;
        let error = self.0.table().denied(dialect, if relaying { RELAY_RIGHTS } else { OUTBOX_RIGHTS });
        Ok(to_py(py, &error).into_value(py).into_bound(py).into_any())
    }

    /// The error for a database that takes no writes.
    fn read_only<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        to_py(py, &self.0.table().read_only()).into_value(py).into_bound(py).into_any()
    }
}

/// One statement that stores events.
#[pyclass(name = "NativeInsert", module = "polybus._native", frozen)]
pub struct PyInsert {
    insert: Insert,
    style: Style,
}

#[pymethods]
impl PyInsert {
    #[getter]
    fn statement(&self, py: Python<'_>) -> PyResult<Sql> {
        sql(py, &self.insert.statement, self.style)
    }

    /// To be run next, for the ids of what was stored; `None` where the statement returns them.
    #[getter]
    fn confirm(&self, py: Python<'_>) -> PyResult<Option<Sql>> {
        self.insert.confirm.as_ref().map(|statement| sql(py, statement, self.style)).transpose()
    }

    /// Whether each event was stored, by the ids that the database returned.
    fn stored<'py>(&self, py: Python<'py>, returned: Vec<String>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, self.insert.stored(returned.iter().map(String::as_str)))
    }
}

/// Renders statements for one inbox table.
#[pyclass(name = "NativeInbox", module = "polybus._native", frozen)]
pub struct PyInbox(Inbox);

type Counted = (Sql, Option<Sql>);

fn counted(py: Python<'_>, change: &Change, style: Style) -> PyResult<Counted> {
    let confirm = change.confirm.as_ref().map(|statement| sql(py, statement, style)).transpose()?;
    Ok((sql(py, &change.statement, style)?, confirm))
}

#[pymethods]
impl PyInbox {
    #[new]
    #[pyo3(signature = (**given))]
    fn new(py: Python<'_>, given: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let json = given.map_or(Ok("{}".to_owned()), |given| options::INBOX.json(given))?;
        Inbox::from_json(&json, Naming::Python).map(Self).map_err(raise(py))
    }

    fn mark(&self, py: Python<'_>, dialect: &str, style: &str, consumer: &str, event_id: &str) -> PyResult<Counted> {
        let (dialect, style) = spoken(py, Some(dialect), style)?;
        counted(py, &self.0.mark(dialect, style, consumer, event_id).map_err(raise(py))?, style)
    }

    fn unmark(&self, py: Python<'_>, dialect: &str, style: &str, consumer: &str, event_id: &str) -> PyResult<Sql> {
        let (dialect, style) = spoken(py, Some(dialect), style)?;
        sql(py, &self.0.unmark(dialect, style, consumer, event_id), style)
    }

    fn purge(
        &self,
        py: Python<'_>,
        dialect: &str,
        style: &str,
        older_than: &Bound<'_, PyAny>,
        limit: u32,
    ) -> PyResult<Counted> {
        let (dialect, style) = spoken(py, Some(dialect), style)?;
        let age: Duration = options::seconds(py, "older_than", older_than)?;
        counted(py, &self.0.purge(dialect, style, age, limit).map_err(raise(py))?, style)
    }

    fn ddl(&self, py: Python<'_>, dialect: &str) -> PyResult<Vec<String>> {
        Ok(self.0.table().inbox_ddl(Dialect::parse(dialect).map_err(raise(py))?))
    }

    fn check(&self, py: Python<'_>, dialect: &str, style: &str) -> PyResult<Sql> {
        let (dialect, style) = spoken(py, Some(dialect), style)?;
        sql(py, &self.0.table().inbox_check(dialect, style), style)
    }

    fn missing<'py>(&self, py: Python<'py>, dialect: &str) -> PyResult<Bound<'py, PyAny>> {
        let dialect = Dialect::parse(dialect).map_err(raise(py))?;
        Ok(to_py(py, &self.0.table().missing(dialect, "Inbox")).into_value(py).into_bound(py).into_any())
    }

    fn denied<'py>(&self, py: Python<'py>, dialect: &str, relaying: bool) -> PyResult<Bound<'py, PyAny>> {
        let dialect = Dialect::parse(dialect).map_err(raise(py))?;
        let _ = relaying; // no relay reads an inbox
        let error = self.0.table().denied(dialect, INBOX_RIGHTS);
        Ok(to_py(py, &error).into_value(py).into_bound(py).into_any())
    }

    fn read_only<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        to_py(py, &self.0.table().read_only()).into_value(py).into_bound(py).into_any()
    }
}
