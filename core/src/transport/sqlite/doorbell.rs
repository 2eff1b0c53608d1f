//! Waking those who wait for work, in this process and in others.
//!
//! Inside the process a `watch` counter is raised after each commit that made work; every waiting source holds a
//! receiver, which also remembers a ring that came while it was looking.
//!
//! Between processes the committer writes one byte to `<db>.bell`; a thread of every other process sleeps in poll(2)
//! on an inotify watch of that file. Should the file be deleted, or the system have no inotify, the thread compares
//! `PRAGMA data_version` each [`FALLBACK`] and rings when it changed.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::watch;

use super::fork::{self, PrivateFile, Tracked};
use super::schema;
use crate::error::{Error, Result};

/// How long a lost ring may go unnoticed.
const FALLBACK: Duration = Duration::from_millis(100);
/// After a ring, further ones are collected for this long: in a burst the thread wakes once, not once per commit.
const COLLECT: Duration = Duration::from_micros(300);
/// Likewise after a ring of our own, which our watch hears too: our sources know already.
const COLLECT_OWN: Duration = Duration::from_millis(2);

/// The ringing side.
pub(super) struct Doorbell {
    rings: watch::Sender<u64>,
    /// Rings that we sent to others.
    sent: AtomicU64,
    file: Arc<PrivateFile>,
}

impl Doorbell {
    /// Over the bell file.
    pub(super) fn new(file: Arc<PrivateFile>) -> Self {
        Self { rings: watch::Sender::new(0), sent: AtomicU64::new(0), file }
    }

    /// A receiver for one waiting source.
    pub(super) fn listen(&self) -> watch::Receiver<u64> {
        self.rings.subscribe()
    }

    /// Wakes the sources of this process.
    pub(super) fn ring_here(&self) {
        self.rings.send_modify(|rings| *rings = rings.wrapping_add(1));
    }

    /// Wakes the sources of this and of every other process.
    pub(super) fn ring(&self) {
        self.ring_here();
        self.sent.fetch_add(1, Ordering::Release);
        if let Err(cause) = self.file.write_all_at(b"!", 0) {
            // Others notice through the fallback.
            log::warn!("ringing the event store's bell failed: {cause}");
        }
    }
}

/// The listening thread's means.
pub(super) struct Listener {
    path: PathBuf,
    /// The thread ends when the other end of this pipe is closed.
    stop: OwnedFd,
    watch: Option<OwnedFd>,
}

impl Listener {
    /// Watches the bell file `bell` of the store at `path`. Keep the returned pipe end; dropping it ends the thread.
    pub(super) fn new(path: &Path, bell: &Path) -> Result<(Self, OwnedFd)> {
        let failed = |cause: rustix::io::Errno| {
            Error::connection_failed(format!("watching the event store failed ({cause})")).caused_by(cause)
        };
        let (stop, keep) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed)?;
        Ok((Self { path: path.to_owned(), stop, watch: inotify(bell) }, keep))
    }

    /// Rings `bell` for the commits of other processes, until stopped.
    pub(super) fn run(self, bell: &Doorbell) {
        let data = match Tracked::open(|| schema::connect_again(&self.path)) {
            Ok(data) => Some(data),
            Err(cause) => {
                log::warn!("no fallback for lost rings of the event store: {cause}");
                None
            }
        };
        let version = || {
            let _inside = fork::enter();
            data.as_ref().and_then(|data| {
                data.prepare_cached("PRAGMA data_version").ok()?.query_row([], |row| row.get::<_, i64>(0)).ok()
            })
        };
        let (mut seen, mut sent) = (version(), 0);
        loop {
            match self.wait() {
                Woken::Stopped => break,
                Woken::Rung => {
                    bell.ring_here();
                    let now = bell.sent.load(Ordering::Acquire);
                    std::thread::sleep(if now == sent { COLLECT } else { COLLECT_OWN });
                    sent = now;
                }
                Woken::Idle => {
                    let now = version();
                    if now != seen {
                        seen = now;
                        bell.ring_here();
                    }
                }
            }
        }
    }

    fn wait(&self) -> Woken {
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(FALLBACK.subsec_nanos()) };
        let mut set = vec![PollFd::new(&self.stop, PollFlags::IN)];
        set.extend(self.watch.as_ref().map(|watch| PollFd::new(watch, PollFlags::IN)));
        match poll(&mut set, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Woken::Idle,
            Err(cause) => {
                log::warn!("waiting for the event store's bell failed: {cause}");
                std::thread::sleep(FALLBACK);
                return Woken::Idle;
            }
            Ok(_) => {}
        }
        if !set[0].revents().is_empty() {
            return Woken::Stopped;
        }
        if let Some(watch) = &self.watch {
            // The content does not matter; one read takes all that has gathered.
            let _ = rustix::io::read(watch.as_fd(), &mut [0_u8; 4096]);
        }
        Woken::Rung
    }
}

enum Woken {
    Stopped,
    Rung,
    Idle,
}

#[cfg(target_os = "linux")]
fn inotify(bell: &Path) -> Option<OwnedFd> {
    use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
    let made = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
        .and_then(|watch| add_watch(&watch, bell, WatchFlags::MODIFY).map(|_| watch));
    match made {
        Ok(watch) => Some(watch),
        Err(cause) => {
            log::warn!("no inotify for the event store ({cause}); other processes are noticed within 100 ms");
            None
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn inotify(_bell: &Path) -> Option<OwnedFd> {
    None
}
