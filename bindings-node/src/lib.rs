//! What TypeScript calls in the core; `bindings-node/native/index.d.ts` is generated from here.

use napi_derive::napi;

/// The version of the Rust core under this package.
#[napi]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}
