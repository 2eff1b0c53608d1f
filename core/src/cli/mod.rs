//! The command `polybus`, which the Python and the npm package install alike.
//!
//! A subcommand is a file with its arguments and what it does; this one chooses, and says how it ended.

mod http;
mod outbox;
mod relay;
mod schema;

use std::ffi::OsString;
use std::io::{self, Write};

use clap::{Parser, Subcommand};

use crate::error::Error;

/// The command ended as asked.
const DONE: i32 = 0;
/// It failed; standard error says why.
const FAILED: i32 = 1;

#[derive(Parser)]
#[command(name = "polybus", version, about = "One event bus for Python and TypeScript services", max_term_width = 100)]
struct Polybus {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tables of the outbox and the inbox in your own database
    #[command(subcommand)]
    Outbox(outbox::Command),
    /// Carry events from an outbox to a bus
    Relay(Box<relay::Command>),
}

/// Why a command ends early.
enum Stop {
    Failed(Error),
    Unwritable(io::Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Unwritable(error)
    }
}

/// Runs the command line `args`, the program's name first, and returns its exit code: 0, 1 for a failure that standard
/// error explains, 2 for arguments that make no sense.
pub fn run<A: Into<OsString> + Clone>(args: impl IntoIterator<Item = A>) -> i32 {
    execute(args, &mut io::stdout().lock(), &mut io::stderr())
}

fn execute<A>(args: impl IntoIterator<Item = A>, out: &mut dyn Write, err: &mut dyn Write) -> i32
where
    A: Into<OsString> + Clone,
{
    let asked = match Polybus::try_parse_from(args) {
        Ok(asked) => asked,
        Err(usage) => {
            // A failure to write means that whoever asked has gone.
            let _ = if usage.use_stderr() { write!(err, "{usage}") } else { write!(out, "{usage}") };
            return usage.exit_code();
        }
    };
    let ended = match asked.command {
        Command::Outbox(command) => command.run(out),
        Command::Relay(command) => command.run(out),
    };
    match ended.and_then(|()| Ok(out.flush()?)) {
        Ok(()) => DONE,
        // `polybus … | head` is no failure.
        Err(Stop::Unwritable(error)) if error.kind() == io::ErrorKind::BrokenPipe => DONE,
        Err(Stop::Unwritable(error)) => complain(err, &error.to_string()),
        Err(Stop::Failed(error)) => complain(err, &error.to_string()),
    }
}

fn complain(err: &mut dyn Write, why: &str) -> i32 {
    let _ = writeln!(err, "polybus: {why}"); // there is nowhere else to say it
    FAILED
}

#[cfg(test)]
mod tests {
    use super::execute;

    fn polybus(line: &str) -> (i32, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = execute(["polybus"].into_iter().chain(line.split_whitespace()), &mut out, &mut err);
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn a_failure_says_why_and_ends_with_1() {
        let (code, out, err) = polybus("outbox ddl --dialect postgres --table drop;table");
        assert_eq!((code, out.as_str()), (1, ""));
        assert!(err.starts_with("polybus: ") && err.contains("drop;table") && err.contains("schema.table"), "{err}");
    }

    #[test]
    fn nonsense_ends_with_2_and_names_what_is_right() {
        let (code, out, err) = polybus("outbox ddl --dialect postgras");
        assert_eq!((code, out.as_str()), (2, ""));
        assert!(err.contains("postgres"), "{err}");
        let (code, out, err) = polybus("outbax");
        assert_eq!((code, out.as_str()), (2, ""));
        assert!(err.contains("outbox"), "{err}");
    }

    #[test]
    fn help_and_version_go_to_standard_output() {
        let (code, out, _) = polybus("--version");
        assert_eq!((code, out.trim()), (0, concat!("polybus ", env!("CARGO_PKG_VERSION"))));
        let (code, out, _) = polybus("outbox ddl --help");
        assert_eq!(code, 0);
        assert!(out.contains("--dialect"), "{out}");
    }

    #[test]
    fn the_ddl_ends_each_statement() {
        for dialect in ["postgres", "sqlite", "mysql"] {
            let (code, out, err) =
                polybus(&format!("outbox ddl --dialect {dialect} --table jobs_out --inbox-table seen"));
            assert_eq!((code, err.as_str()), (0, ""));
            assert!(out.contains("jobs_out") && out.contains("seen") && out.ends_with(";\n"), "{out}");
        }
    }

    #[test]
    fn schemas_name_the_tables_that_were_asked_for() {
        for (tool, sign) in
            [("prisma", "@@map(\"jobs_out\")"), ("drizzle", "pgTable(\n  'jobs_out'"), ("knex", "\"jobs_out\"")]
        {
            let (code, out, err) = polybus(&format!("outbox schema --for {tool} --dialect postgres --table jobs_out"));
            assert_eq!((code, err.as_str()), (0, ""));
            assert!(out.contains(sign), "{out}");
        }
    }
}
