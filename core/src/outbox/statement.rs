//! SQL text together with its parameters.

use std::fmt::Write as _;

use super::dialect::{Dialect, Style};

/// What stands in for a placeholder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Param {
    /// SQL's NULL.
    Null,
    /// A number of at most 64 bits.
    Integer(i64),
    /// Text without NUL.
    Text(String),
}

impl Param {
    /// The text, if it is one.
    pub(crate) fn text(self) -> Option<String> {
        if let Param::Text(text) = self { Some(text) } else { None }
    }
}

impl From<&str> for Param {
    fn from(text: &str) -> Self {
        Param::Text(text.to_owned())
    }
}

impl From<String> for Param {
    fn from(text: String) -> Self {
        Param::Text(text)
    }
}

impl From<i64> for Param {
    fn from(number: i64) -> Self {
        Param::Integer(number)
    }
}

impl<T: Into<Param>> From<Option<T>> for Param {
    fn from(value: Option<T>) -> Self {
        value.map_or(Param::Null, Into::into)
    }
}

/// One statement for a driver: the text, and what its placeholders stand for in order of appearance. With
/// [`Style::Named`] the first is `p1`, the second `p2`, and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// The text.
    pub sql: String,
    /// Values of the placeholders, in order of appearance.
    pub params: Vec<Param>,
}

/// Writes a [`Statement`]: the one place where placeholders are numbered.
///
/// Text given to [`Sql::push`] must not contain `%`, `?` or `:`, which one driver or another reads as a placeholder.
/// (PostgreSQL's `::type` is written `CAST(… AS type)` for that reason.)
#[derive(Debug)]
pub struct Sql {
    dialect: Dialect,
    style: Style,
    text: String,
    params: Vec<Param>,
}

impl Sql {
    /// An empty statement.
    pub fn new(dialect: Dialect, style: Style) -> Self {
        Self { dialect, style, text: String::new(), params: Vec::new() }
    }

    /// Which database it is for.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Appends text as it is.
    pub fn push(&mut self, text: &str) -> &mut Self {
        debug_assert!(!text.contains(['%', '?', ':']), "{text:?} holds what a driver reads as a placeholder");
        self.text.push_str(text);
        self
    }

    /// Appends a placeholder for `value`.
    pub fn bind(&mut self, value: impl Into<Param>) -> &mut Self {
        self.params.push(value.into());
        let number = self.params.len();
        // Writing into a String cannot fail.
        let _ = match self.style {
            Style::Dollar => write!(self.text, "${number}"),
            Style::Question => write!(self.text, "?"),
            Style::Percent => write!(self.text, "%s"),
            Style::Named => write!(self.text, ":p{number}"),
        };
        self
    }

    /// Appends placeholders for `values`, joined by commas.
    pub fn bind_all<T: Into<Param>>(&mut self, values: impl IntoIterator<Item = T>) -> &mut Self {
        for (index, value) in values.into_iter().enumerate() {
            if index > 0 {
                self.text.push_str(", ");
            }
            self.bind(value);
        }
        self
    }

    /// Appends the database's own time.
    pub fn now(&mut self) -> &mut Self {
        let now = self.dialect.now();
        self.push(now)
    }

    /// Appends the database's own time plus `milliseconds`, which may be negative.
    pub fn now_plus(&mut self, milliseconds: i64) -> &mut Self {
        match self.dialect {
            // The cast tells drivers that ask the server for types that this is an integer.
            Dialect::Postgres => {
                self.push("now() + CAST(").bind(milliseconds).push(" AS BIGINT) * INTERVAL '1 millisecond'")
            }
            Dialect::Sqlite => self.now().push(" + ").bind(milliseconds),
            Dialect::MySql => {
                self.push("TIMESTAMPADD(MICROSECOND, ").bind(milliseconds).push(" * 1000, UTC_TIMESTAMP(6))")
            }
        }
    }

    /// The statement.
    pub fn finish(self) -> Statement {
        Statement { sql: self.text, params: self.params }
    }
}
