//! The tables in the words of ORMs that want to know every table of their database.
//!
//! The templates hold `{names}`; `polybus outbox ddl` stays the truth that they follow, and the tests make tables from
//! both.

use clap::ValueEnum;

use crate::error::{Error, Result};
use crate::outbox::{Dialect, Table};

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Tool {
    Prisma,
    Drizzle,
    Knex,
}

/// The text to paste.
pub(super) fn render(tool: Tool, dialect: Dialect, outbox: &Table, inbox: &Table) -> Result<String> {
    if dialect == Dialect::Sqlite && outbox.schema().or(inbox.schema()).is_some() {
        return Err(Error::invalid_config("SQLite's tables have no schema here; leave out what stands before the dot"));
    }
    match tool {
        Tool::Prisma => Ok(prisma(dialect, outbox, inbox)),
        Tool::Drizzle => drizzle(dialect, outbox, inbox),
        Tool::Knex => Ok(knex(dialect, outbox, inbox)),
    }
}

fn prisma(dialect: Dialect, outbox: &Table, inbox: &Table) -> String {
    let template = match dialect {
        Dialect::Postgres => include_str!("templates/prisma-postgres.txt"),
        Dialect::Sqlite => include_str!("templates/prisma-sqlite.txt"),
        Dialect::MySql => include_str!("templates/prisma-mysql.txt"),
    };
    let schema = |table: &Table| table.schema().map_or(String::new(), |schema| format!("\n  @@schema(\"{schema}\")"));
    fill(
        template,
        &[
            ("ddl", &format!("npx polybus outbox ddl --dialect {}{}", dialect.name(), names(outbox, inbox))),
            ("outbox", outbox.name()),
            ("inbox", inbox.name()),
            ("schema", &schema(outbox)),
            ("inbox_schema", &schema(inbox)),
        ],
    )
}

fn drizzle(dialect: Dialect, outbox: &Table, inbox: &Table) -> Result<String> {
    if outbox.schema() != inbox.schema() {
        return Err(Error::invalid_config(
            "give both tables the same schema, or print one at a time and take its half",
        ));
    }
    let (template, table, of_schema) = match dialect {
        Dialect::Postgres => (include_str!("templates/drizzle-postgres.txt"), "pgTable", "pgSchema"),
        Dialect::Sqlite => (include_str!("templates/drizzle-sqlite.txt"), "sqliteTable", ""),
        Dialect::MySql => (include_str!("templates/drizzle-mysql.txt"), "mysqlTable", "mysqlSchema"),
    };
    let (factory, make, declare) = match outbox.schema() {
        None => (table, table, String::new()),
        Some(schema) => (of_schema, "polybus.table", format!("const polybus = {of_schema}('{schema}')\n")),
    };
    let names = [
        ("factory", factory),
        ("make", make),
        ("declare", &declare),
        ("outbox", outbox.name()),
        ("inbox", inbox.name()),
    ];
    Ok(fill(template, &names))
}

fn knex(dialect: Dialect, outbox: &Table, inbox: &Table) -> String {
    // Knex reads `?` as a placeholder, of which the statements have none. Names are letters, digits and `_`.
    let literal = |sql: &str| format!("`{}`", sql.replace('`', "\\`"));
    let mut statements = String::from("[\n");
    for statement in outbox.outbox_ddl(dialect).iter().chain(&inbox.inbox_ddl(dialect)) {
        statements += &format!("  {},\n", literal(statement));
    }
    statements.push(']');
    let drop = |table: &Table| literal(&format!("DROP TABLE IF EXISTS {}", table.quoted(dialect)));
    fill(
        include_str!("templates/knex.txt"),
        &[("up", &statements), ("down_outbox", &drop(outbox)), ("down_inbox", &drop(inbox))],
    )
}

/// The options that name the tables, as they were given.
fn names(outbox: &Table, inbox: &Table) -> String {
    use crate::outbox::table::{INBOX, OUTBOX};
    let mut options = String::new();
    for (option, table, usual) in [("--table", outbox, OUTBOX), ("--inbox-table", inbox, INBOX)] {
        if table.full() != usual {
            options += &format!(" {option} {}", table.full());
        }
    }
    options
}

fn fill(template: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
}
