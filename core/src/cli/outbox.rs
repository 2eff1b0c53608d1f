//! `polybus outbox`: the tables, as SQL and in the words of other tools.

use std::io::Write;

use clap::{Args, Subcommand, ValueEnum};

use super::Stop;
use super::schema::{self, Tool};
use crate::outbox::table::{INBOX, OUTBOX};
use crate::outbox::{Dialect, Table};

#[derive(Subcommand)]
pub(super) enum Command {
    /// Print the SQL that makes both tables where they are missing
    Ddl(Tables),
    /// Print both tables for the schema or the migrations of an ORM
    Schema {
        /// For which one
        #[arg(long = "for", value_enum)]
        tool: Tool,
        #[command(flatten)]
        tables: Tables,
    },
}

#[derive(Args)]
pub(super) struct Tables {
    /// The database that holds your own tables
    #[arg(long, value_enum)]
    dialect: DialectName,
    /// Name of the outbox, with its schema if it has one
    #[arg(long, default_value = OUTBOX)]
    table: String,
    /// Name of the inbox
    #[arg(long, default_value = INBOX)]
    inbox_table: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum DialectName {
    #[value(alias = "postgresql")]
    Postgres,
    Sqlite,
    #[value(alias = "mariadb")]
    Mysql,
}

impl From<DialectName> for Dialect {
    fn from(name: DialectName) -> Self {
        match name {
            DialectName::Postgres => Self::Postgres,
            DialectName::Sqlite => Self::Sqlite,
            DialectName::Mysql => Self::MySql,
        }
    }
}

impl Command {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<(), Stop> {
        let (Self::Ddl(tables) | Self::Schema { tables, .. }) = self;
        let (outbox, inbox) = (Table::parse(&tables.table)?, Table::parse(&tables.inbox_table)?);
        let dialect = tables.dialect.into();
        match self {
            Self::Ddl(_) => {
                for statement in outbox.outbox_ddl(dialect).iter().chain(&inbox.inbox_ddl(dialect)) {
                    writeln!(out, "{statement};")?;
                }
            }
            Self::Schema { tool, .. } => out.write_all(schema::render(*tool, dialect, &outbox, &inbox)?.as_bytes())?,
        }
        Ok(())
    }
}
