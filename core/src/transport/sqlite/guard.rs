//! Looks for what would lose committed events, at open and at most every 200 ms while committing.
//!
//! * **A second SQLite library in this process** (Python's `sqlite3`, `better-sqlite3`, …) on our file. POSIX locks
//!   belong to the process: when one library closes the file, the locks of the other are gone, and other processes
//!   delete the log under it. One library maps each part of `<db>-shm` once, however many connections it has, so a
//!   part that is mapped twice proves a second one.
//! * **A file that was deleted or replaced** while we have it open: commits would go to a file that nobody else sees.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::file::{Identity, beside};
use crate::error::{Error, Result};

const INTERVAL: Duration = Duration::from_millis(200);

/// The watch over one store.
pub(super) struct Guard {
    path: PathBuf,
    identity: Identity,
    checked: Option<Instant>,
}

impl Guard {
    /// Over the store at `path`, opened just now.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let identity = Identity::of(path).map_err(|cause| replaced(path).caused_by(cause))?;
        Ok(Self { path: path.to_owned(), identity, checked: None })
    }

    /// Fails when the store must not be written; looks again at most every 200 ms.
    pub(super) fn check(&mut self, now: Instant) -> Result<()> {
        if self.checked.is_some_and(|at| now.duration_since(at) < INTERVAL) {
            return Ok(());
        }
        if Identity::of(&self.path).ok() != Some(self.identity) {
            return Err(replaced(&self.path));
        }
        if let Ok(maps) = std::fs::read_to_string("/proc/self/maps")
            && mapped_twice(&maps, &beside(&self.path, "-shm"))
        {
            return Err(Error::invalid_config(format!(
                "a second SQLite library in this process has {} open, which loses committed events; let only polybus open that file, or open it from another process",
                self.path.display()
            )));
        }
        // A failure is not cached: the caller should hear it each time until it is over.
        self.checked = Some(now);
        Ok(())
    }
}

fn replaced(path: &Path) -> Error {
    Error::connection_failed(format!(
        "{} was deleted or replaced while it was open; stop all its users, restore the file and start again",
        path.display()
    ))
}

/// Whether two mappings of `shm` overlap, in the text of `/proc/self/maps`.
fn mapped_twice(maps: &str, shm: &Path) -> bool {
    // The kernel writes a line feed as \012 and nothing else specially.
    let Some(name) = shm.to_str().map(|name| name.replace('\n', "\\012")) else { return false };
    let mut parts: Vec<(&str, u64, u64)> = maps.lines().filter_map(|line| part(line, &name)).collect();
    parts.sort_unstable();
    parts.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2)
}

/// Inode, start and end in the file, when the line of `/proc/self/maps` is about the file `name`.
fn part<'a>(line: &'a str, name: &str) -> Option<(&'a str, u64, u64)> {
    let rest = line.strip_suffix(name)?;
    let mut fields = rest.split_ascii_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    let (_permissions, offset, _device, inode) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    if fields.next().is_some() {
        return None; // another file, whose name only ends like ours
    }
    let number = |text| u64::from_str_radix(text, 16).ok();
    let start = number(offset)?;
    Some((inode, start, start + number(to)?.checked_sub(number(from)?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "7f0000000000-7f0000008000 rw-s 00000000 fd:00 42      /data/e.db-shm\n\
                       7f0000010000-7f0000018000 rw-s 00008000 fd:00 42      /data/e.db-shm\n\
                       7f0000020000-7f0000028000 rw-s 00000000 fd:00 43      /data/other/data/e.db-shm\n";

    #[test]
    fn one_library_maps_each_part_once() {
        assert!(!mapped_twice(ONE, Path::new("/data/e.db-shm")));
    }

    #[test]
    fn a_part_mapped_twice_is_a_second_library() {
        let two = format!("{ONE}7f0000030000-7f0000038000 rw-s 00000000 fd:00 42 /data/e.db-shm\n");
        assert!(mapped_twice(&two, Path::new("/data/e.db-shm")));
    }
}
