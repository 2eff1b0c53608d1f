//! Errors cross as one JSON text, thrown or as the outcome of an operation; `ts/errors.ts` makes the class of it.
//!
//! A thrown napi error could carry a code, a rejected napi promise cannot: one form for both is simpler.

use napi::Status;
use polybus_core::{Error, ErrorKind};
use serde_json::{Value, json};

/// Throws `error` into JavaScript.
pub fn throw(error: Error) -> napi::Error {
    napi::Error::new(Status::GenericFailure, text(&error))
}

/// `error` as the JSON text that `ts/errors.ts` reads.
pub fn text(error: &Error) -> String {
    value(error).to_string()
}

fn value(error: &Error) -> Value {
    let failures: Vec<_> =
        error.failures().iter().map(|(index, error)| json!({"index": index, "error": value(error)})).collect();
    json!({
        "code": error.kind().code(),
        "message": error.to_string(),
        "cause": std::error::Error::source(error).map(ToString::to_string),
        "failures": failures,
        "remote": error.remote().map(|remote| json!({
            "type": remote.kind, "message": remote.message, "code": remote.code,
        })),
    })
}

/// The table of kinds: `[class name, code, retryable]`.
#[napi_derive::napi]
pub fn error_kinds() -> Vec<(&'static str, &'static str, bool)> {
    ErrorKind::ALL.iter().map(|kind| (kind.class_name(), kind.code(), kind.is_retryable())).collect()
}
