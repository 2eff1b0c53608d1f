//! One file.
use super::*;
use std::path::PathBuf;
pub(super) fn path_of(rest: &str) -> Result<PathBuf> {
    Ok(rest.into())
}
pub(super) fn open(_: PathBuf, _: Settings) -> Task<Result<Arc<dyn Transport>>> {
    Box::pin(async { Err(Error::unsupported("later")) })
}
