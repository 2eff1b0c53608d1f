//! Which database a statement is for, and how the driver that runs it writes placeholders.

use crate::error::{Error, Result, nearest};

/// A family of databases. MariaDB speaks as MySQL does here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// PostgreSQL 11 and newer.
    Postgres,
    /// SQLite 3.35 and newer (`RETURNING`).
    Sqlite,
    /// MySQL 8.0.16 and MariaDB 10.5, and newer (`CHECK`, defaults that are expressions).
    MySql,
}

/// How a driver writes the place of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Style {
    /// `$1`, `$2`, …: asyncpg, node-postgres, postgres.js, Prisma.
    Dollar,
    /// `?`: sqlite3, better-sqlite3, mysql2, Knex.
    Question,
    /// `%s`: psycopg, PyMySQL, Django.
    Percent,
    /// `:p1`, `:p2`, …: SQLAlchemy's `text()`.
    Named,
}

const DIALECTS: [(&str, Dialect); 5] = [
    ("postgres", Dialect::Postgres),
    ("postgresql", Dialect::Postgres),
    ("sqlite", Dialect::Sqlite),
    ("mysql", Dialect::MySql),
    ("mariadb", Dialect::MySql),
];

const STYLES: [(&str, Style); 4] =
    [("$", Style::Dollar), ("?", Style::Question), ("%s", Style::Percent), (":name", Style::Named)];

fn choose<T: Copy>(what: &str, word: &str, known: &[(&'static str, T)]) -> Result<T> {
    if let Some((_, value)) = known.iter().find(|(name, _)| *name == word) {
        return Ok(*value);
    }
    let words = known.iter().map(|(name, _)| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    let near = nearest(word, known.iter().map(|(name, _)| *name)).filter(|near| near.len() > 2);
    let hint = near.map_or(String::new(), |near| format!("; did you mean {near:?}?"));
    Err(Error::invalid_config(format!("unknown {what} {word:?}; give one of {words}{hint}")))
}

impl Dialect {
    /// The dialect of that name; `InvalidConfig` lists the names.
    pub fn parse(name: &str) -> Result<Self> {
        choose("dialect", name, &DIALECTS)
    }

    /// The name that [`Dialect::parse`] and `ddl` take.
    pub const fn name(self) -> &'static str {
        match self {
            Dialect::Postgres => "postgres",
            Dialect::Sqlite => "sqlite",
            Dialect::MySql => "mysql",
        }
    }

    /// `name` quoted as an identifier. Names are validated: none holds a quote.
    pub(crate) fn quote(self, name: &str) -> String {
        match self {
            Dialect::MySql => format!("`{name}`"),
            Dialect::Postgres | Dialect::Sqlite => format!("\"{name}\""),
        }
    }

    /// The database's own time, in the type of the tables' columns. Without `%`, `?` and `:`, which drivers read.
    pub(crate) const fn now(self) -> &'static str {
        match self {
            Dialect::Postgres => "now()",
            // `unixepoch('subsec')` is younger than many installed SQLites.
            Dialect::Sqlite => "CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER)",
            Dialect::MySql => "UTC_TIMESTAMP(6)",
        }
    }
}

impl Style {
    /// The style written like `sign`: `$`, `?`, `%s` or `:name`; `InvalidConfig` lists them.
    pub fn parse(sign: &str) -> Result<Self> {
        choose("style", sign, &STYLES)
    }

    /// The dialect that a driver with these placeholders most likely speaks: `?` is SQLite's, the others PostgreSQL's.
    pub const fn usual_dialect(self) -> Dialect {
        match self {
            Style::Question => Dialect::Sqlite,
            Style::Dollar | Style::Percent | Style::Named => Dialect::Postgres,
        }
    }
}
