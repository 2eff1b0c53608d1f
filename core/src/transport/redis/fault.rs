//! What the server's and the network's errors mean for the caller, and whether the command may have been executed.

use redis::{ErrorKind as Cause, RedisError, ServerErrorKind, Value};

use super::scripts;
pub(super) use crate::error::closed;
use crate::error::{Error, ErrorKind};

/// A command that did not succeed.
#[derive(Debug)]
pub(super) struct Failure {
    pub error: Error,
    /// The command was sent and no answer came: it may have been executed.
    pub unknown: bool,
    /// It was not executed, and may be in a moment: the server starts, fails over, or the key has moved.
    pub again: bool,
    /// Another server may be responsible now: look for it and connect anew.
    pub moved: bool,
    /// The consumer group, or the stream, is not there.
    pub no_group: bool,
    /// The script has to be sent again.
    pub no_script: bool,
    /// The server has no memory for it.
    pub full: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, unknown: false, again: false, moved: false, no_group: false, no_script: false, full: false }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

impl From<RedisError> for Failure {
    fn from(cause: RedisError) -> Self {
        let code = cause.code().unwrap_or_default().to_owned();
        let kind = cause.kind();
        let starts = matches!(
            kind,
            Cause::Server(
                ServerErrorKind::BusyLoading
                    | ServerErrorKind::TryAgain
                    | ServerErrorKind::ClusterDown
                    | ServerErrorKind::MasterDown
                    | ServerErrorKind::ReadOnly
                    | ServerErrorKind::Moved
                    | ServerErrorKind::Ask
            )
        ) || code == "BUSY";
        let moved = matches!(kind, Cause::Server(kind) if is_move(kind));
        Self {
            unknown: !matches!(kind, Cause::Server(_) | Cause::Extension | Cause::AuthenticationFailed),
            again: starts,
            moved,
            no_group: code == "NOGROUP" || code == "UNBLOCKED",
            no_script: kind == Cause::Server(ServerErrorKind::NoScript),
            full: code == "OOM",
            error: explain(cause, &code),
        }
    }
}

fn is_move(kind: ServerErrorKind) -> bool {
    use ServerErrorKind::{Ask, ClusterDown, Moved, ReadOnly};
    matches!(kind, Moved | Ask | ReadOnly | ClusterDown)
}

/// Whether an answer inside a pipeline's reply says that another server may be responsible.
pub(super) fn moved(answer: &Value) -> bool {
    matches!(answer, Value::ServerError(error) if error.kind().is_some_and(is_move))
}

/// The error for the caller, with what to do about it.
fn explain(cause: RedisError, code: &str) -> Error {
    let said = cause.detail().map_or_else(|| cause.to_string(), str::to_owned);
    // Inside a script, servers before 7.2 give no code and name no command.
    let in_script = said.starts_with("The user executing the script can't");
    let error = match (cause.kind(), code) {
        _ if in_script || code == "NOPERM" => {
            let command = scripts::command_at(&said).map_or_else(String::new, |command| format!(" ({command})"));
            Error::new(
                ErrorKind::AuthFailed,
                format!(
                    "the Redis user lacks a permission{command}: {said}; grant it with ACL SETUSER, docs/redis.md lists all"
                ),
            )
        }
        (Cause::AuthenticationFailed, _) | (_, "NOAUTH" | "WRONGPASS") => {
            Error::new(ErrorKind::AuthFailed, format!("Redis refused the user or the password ({said}); check the URL"))
        }
        (_, "OOM") => Error::connection_failed(format!(
            "Redis is out of memory and stored nothing ({said}); raise maxmemory, or let groups catch up"
        )),
        (_, "MISCONF") => {
            Error::connection_failed(format!("Redis cannot write to its disk and stored nothing: {said}"))
        }
        (_, "READONLY") => Error::connection_failed("Redis is a read-only replica; connect to the master"),
        (_, "LOADING") => Error::connection_failed("Redis is loading its data after a start"),
        (_, "WRONGTYPE") => Error::invalid_config(format!(
            "a key of this bus holds something that polybus did not write ({said}); give the bus another name"
        )),
        (Cause::Io, _) => Error::connection_failed(format!("the connection to Redis failed: {said}")),
        _ => Error::connection_failed(format!("Redis said {cause}")),
    };
    error.caused_by(cause)
}

/// The server's error, which the library hands out as an answer: of a single command, and inside a pipeline's reply.
pub(super) fn check(value: Value) -> Result<Value, Failure> {
    match value {
        Value::ServerError(error) => Err(RedisError::from(error).into()),
        value => Ok(value),
    }
}

/// An answer that this version does not understand.
pub(super) fn strange(what: &str) -> Error {
    Error::connection_failed(format!("Redis gave an answer that polybus does not understand: {what}"))
}
