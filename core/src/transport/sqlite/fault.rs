//! What SQLite's result codes mean to a caller.

use rusqlite::ErrorCode;

pub(super) use crate::error::closed;
use crate::error::{Error, ErrorKind};

impl From<rusqlite::Error> for Error {
    /// A failure of a running store is `ConnectionFailed`: the transaction was rolled back, so nothing was stored.
    fn from(cause: rusqlite::Error) -> Self {
        let what = match cause.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => "the disk is full; nothing of this call was stored, free space and try again",
            Some(ErrorCode::SystemIoFailure) => {
                "reading or writing the event store failed, the disk may be full or faulty; nothing of this call was stored"
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                "another program holds the event store's lock; nothing of this call was stored, close tools that keep the file open"
            }
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                "the event store is damaged; stop all its users, keep a copy, and repair it with `sqlite3 FILE .recover`"
            }
            Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
                "the event store cannot be written; give this user write permission on the file and its directory"
            }
            Some(ErrorCode::CannotOpen) => {
                "the event store cannot be opened; give this user permission on the file and its directory"
            }
            _ => "the event store failed",
        };
        Error::connection_failed(format!("{what} ({cause})")).caused_by(cause)
    }
}

/// Whether SQLite says that the file is not a sound database.
pub(super) fn is_damage(cause: &rusqlite::Error) -> bool {
    matches!(cause.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// A handle that was carried over a fork.
pub(super) fn forked() -> Error {
    Error::connection_failed("this bus was opened before the process forked; open a bus in the child process")
}

/// A publish that did not start in time.
pub(super) fn timed_out() -> Error {
    Error::new(
        ErrorKind::PublishTimeout,
        "the event store was busy until the timeout passed; nothing was stored, try again or raise the timeout",
    )
}
