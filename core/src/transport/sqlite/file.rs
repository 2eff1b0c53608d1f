//! From the URL to a file that may be opened, without opening it.
//!
//! POSIX locks belong to the process and the inode: whoever opens and closes the database file beside SQLite drops
//! SQLite's locks. So everything here looks at names and metadata only; the one exception creates the file, which
//! nobody can have locked before.

use std::fs::OpenOptions;
use std::io::ErrorKind as Io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The path that follows `sqlite://`: `/events.db` is relative, `//var/lib/events.db` absolute.
pub(in crate::transport) fn path_of(rest: &str) -> Result<PathBuf> {
    let refuse = |what: &str| {
        Err(Error::invalid_config(format!(
            "{what}; write sqlite:///events.db for a relative path, sqlite:////var/lib/app/events.db for an absolute one"
        )))
    };
    if rest.contains(['?', '#']) {
        return refuse("a sqlite URL takes no query string (write %3F for a question mark in a path)");
    }
    let Some(path) = rest.strip_prefix('/') else {
        return refuse(if rest.is_empty() { "the sqlite URL names no file" } else { "a sqlite URL has no host" });
    };
    if path.is_empty() || path.ends_with('/') {
        return refuse("the sqlite URL names no file");
    }
    if path == ":memory:" {
        return Err(Error::invalid_config("the event store needs a file; write memory:// for a bus in memory"));
    }
    match percent_decode(path) {
        Some(path) if !path.contains('\0') => Ok(path.into()),
        _ => refuse("the path in the sqlite URL is not percent-encoded UTF-8"),
    }
}

fn percent_decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let high = char::from(bytes.next()?).to_digit(16)?;
        let low = char::from(bytes.next()?).to_digit(16)?;
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(out).ok()
}

/// What identifies a file while it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// Of the file at `path`, without opening it.
    pub(super) fn of(path: &Path) -> std::io::Result<Self> {
        std::fs::symlink_metadata(path).map(|meta| Self { device: meta.dev(), inode: meta.ino() })
    }
}

/// The one name of the file at `path`: directories resolved, the file itself neither a link nor shared by a second
/// name, because two names mean two sets of side files, and SQLite cannot lock across them.
pub(super) fn canonical(path: &Path) -> Result<PathBuf> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = std::fs::canonicalize(parent).map_err(|cause| missing_directory(path, parent, cause))?;
    let Some(name) = path.file_name() else {
        return Err(Error::invalid_config(format!("{} names no file", path.display())));
    };
    let full = directory.join(name);
    match std::fs::symlink_metadata(&full) {
        Err(cause) if cause.kind() == Io::NotFound => {}
        Err(cause) => return Err(unreadable(&full, cause)),
        Ok(meta) if meta.is_symlink() => {
            return Err(Error::invalid_config(format!(
                "{} is a symbolic link; name the file that it points to",
                full.display()
            )));
        }
        Ok(meta) if !meta.is_file() => {
            return Err(Error::invalid_config(format!("{} is not a regular file", full.display())));
        }
        Ok(meta) if meta.nlink() > 1 => {
            return Err(Error::invalid_config(format!(
                "{} has {} names (hard links); processes that use different names would damage it, remove all but one",
                full.display(),
                meta.nlink()
            )));
        }
        Ok(_) => {}
    }
    Ok(full)
}

fn missing_directory(path: &Path, parent: &Path, cause: std::io::Error) -> Error {
    let rooted = Path::new("/").join(parent);
    let hint = if path.is_relative() && parent != Path::new(".") && rooted.is_dir() {
        format!(
            "; did you mean /{}? an absolute path takes four slashes: sqlite:////{}",
            path.display(),
            path.display()
        )
    } else {
        "; create it first".to_owned()
    };
    Error::connection_failed(format!("the directory {} cannot be used ({cause}){hint}", parent.display()))
        .caused_by(cause)
}

fn unreadable(path: &Path, cause: std::io::Error) -> Error {
    Error::connection_failed(format!(
        "{} cannot be opened ({cause}); give this user read and write permission on the file and its directory",
        path.display()
    ))
    .caused_by(cause)
}

/// Makes the file, readable by its owner only, if there is none. SQLite gives its side files the same mode.
pub(super) fn create(path: &Path) -> Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => Ok(()),
        Err(cause) if cause.kind() == Io::AlreadyExists => Ok(()),
        Err(cause) => Err(unreadable(path, cause)),
    }
}

/// Opens or makes a side file: `<path><suffix>`. Never the database file.
pub(super) fn side_file(path: &Path, suffix: &str) -> Result<std::fs::File> {
    let name = beside(path, suffix);
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&name)
        .map_err(|cause| unreadable(&name, cause))
}

/// `<path><suffix>`.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Network file systems, by the magic number of statfs(2): their locks do not hold across machines, and their shared
/// memory not at all.
const NETWORK: [(i64, &str); 14] = [
    (0x6969, "nfs"),
    (0x517B, "smb"),
    (0xFE53_4D42, "smb2"),
    (0xFF53_4D42, "cifs"),
    (0x0102_1997, "9p"),
    (0x6573_5546, "fuse"),
    (0x5346_414F, "afs"),
    (0x6B41_4653, "kafs"),
    (0x0BD0_0BD0, "lustre"),
    (0x4750_4653, "gpfs"),
    (0x00C3_6400, "ceph"),
    (0x7375_7245, "coda"),
    (0x564C, "ncp"),
    (0x786F_4256, "vboxsf"),
];

/// Local ones, for people.
const LOCAL: [(i64, &str); 6] = [
    (0xEF53, "ext"),
    (0x5846_5342, "xfs"),
    (0x9123_683E, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x794C_7630, "overlay"),
    (0x2FC1_2FC1, "zfs"),
];

/// The type of the file system that holds `path`; `InvalidConfig` for a network one unless `allowed`.
#[cfg(target_os = "linux")]
pub(super) fn file_system(path: &Path, allowed: bool) -> Result<String> {
    let found = rustix::fs::statfs(path).map_err(|cause| unreadable(path, cause.into()))?;
    // The magic number is 32 bits; its type, and so its sign, differs between machines.
    let magic = i64::from(found.f_type as u32);
    let named = |list: &[(i64, &'static str)]| list.iter().find(|(known, _)| *known == magic).map(|(_, name)| *name);
    match named(&NETWORK) {
        Some(name) if !allowed => Err(Error::invalid_config(format!(
            "{} is on a network file system ({name}), where locks fail and events get lost; use a local disk, or set allow_network_fs to take the risk",
            path.display()
        ))),
        Some(name) => Ok(name.to_owned()),
        None => Ok(named(&LOCAL).map_or_else(|| format!("{magic:#x}"), str::to_owned)),
    }
}

/// The type of the file system, which this system does not tell.
#[cfg(not(target_os = "linux"))]
pub(super) fn file_system(_path: &Path, _allowed: bool) -> Result<String> {
    Ok("unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn three_slashes_are_relative_and_four_absolute() {
        assert_eq!(path_of("/events.db").unwrap(), Path::new("events.db"));
        assert_eq!(path_of("//var/events.db").unwrap(), Path::new("/var/events.db"));
        assert_eq!(path_of("/a%20b%3F.db").unwrap(), Path::new("a b?.db"));
    }

    #[test]
    fn a_url_that_names_no_file_is_refused() {
        for rest in ["", "/", "x", "host/events.db", "/events.db?mode=ro", "/%zz", "/%ff", "/dir/", "/%00", "/:memory:"]
        {
            assert_eq!(path_of(rest).unwrap_err().kind(), ErrorKind::InvalidConfig, "{rest}");
        }
    }

    #[test]
    fn a_forgotten_slash_is_hinted_at() {
        let message = canonical(Path::new("usr/bin/events.db")).unwrap_err().to_string();
        assert!(message.contains("four slashes"), "{message}");
    }
}
