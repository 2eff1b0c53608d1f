//! A connection that any thread may write to.
//!
//! The library's connection hands every command to a task, and every answer through another: for a lone publish these
//! wakes cost more than the server, and its parser more than the rest of a delivery. Here whoever has a command writes it
//! to the socket itself; a task reads answers, and writes what the socket did not take at once. An event loop that waits
//! for an answer may read it instead ([`Watched`]): then the task steps aside, and only looks now and then whether the loop
//! still does. The library still says hello (login, database, protocol), and still does TLS.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ConnectionAddr, RedisError, RedisResult, Value};
use tokio::io::Interest;
use tokio::sync::{Notify, oneshot};

use super::partition::lock;
use super::resp::Reader;
use crate::transport::Watched;

/// Bytes of one read, and first size of the buffer for answers.
const BUFFER: usize = 32 << 10;
/// So much is read before answers are handed out.
const MOST: usize = 256 << 10;

/// How often the task looks while an event loop reads: as long does a loop that is busy hold up an answer that others wait
/// for.
const LOOK: Duration = Duration::from_millis(20);
/// So often it looks without anything having come, and then it reads again itself.
const QUIET: u32 = 50;

/// See the module's page. Cheap to clone; it closes when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Wire(Arc<Handle>);

struct Handle(Arc<Inner>);

impl Drop for Handle {
    fn drop(&mut self) {
        lock(&self.0.out).closed = true;
        self.0.wanted.notify_one();
    }
}

struct Inner {
    /// Does not block.
    stream: TcpStream,
    out: Mutex<Out>,
    incoming: Mutex<Incoming>,
    /// An event loop reads.
    aside: AtomicBool,
    /// There is something to write, another one reads now, or the end.
    wanted: Notify,
}

#[derive(Default)]
struct Out {
    /// What the socket did not take.
    rest: BytesMut,
    waiting: VecDeque<Waiting>,
    closed: bool,
}

/// What was read. Whoever holds its lock reads, so answers are handed out in their order.
struct Incoming {
    chunk: Box<[u8]>,
    buffer: BytesMut,
    reader: Reader,
    /// How often something came.
    reads: u64,
    /// Who is owed the next answer.
    current: Option<Waiting>,
}

/// A caller, and how many answers it is owed.
struct Waiting {
    count: usize,
    answers: Vec<Value>,
    done: Box<dyn FnOnce(RedisResult<Vec<Value>>) + Send>,
}

impl Wire {
    /// Connects where `client` says. `lost` is called once, when the server has gone. Nothing for what only the library can
    /// do.
    pub async fn open(
        client: &redis::Client,
        config: &AsyncConnectionConfig,
        lost: impl FnOnce() + Send + 'static,
    ) -> RedisResult<Option<Self>> {
        let info = client.get_connection_info();
        let ConnectionAddr::Tcp(host, port) = info.addr() else { return Ok(None) };
        let stream = tokio::net::TcpStream::connect((host.as_str(), *port)).await?;
        stream.set_nodelay(true)?;
        if let Some(keepalive) = info.tcp_settings().keepalive() {
            socket2::SockRef::from(&stream).set_tcp_keepalive(keepalive)?;
        }
        let stream = stream.into_std()?;
        // A second handle of the same socket: the library closes it after its greeting, and the connection stays.
        let greeting = tokio::net::TcpStream::from_std(stream.try_clone()?)?;
        drop(MultiplexedConnection::new_with_config(info.redis_settings(), greeting, config.clone()).await?);
        let inner = Arc::new(Inner {
            stream,
            out: Mutex::default(),
            incoming: Mutex::new(Incoming {
                chunk: vec![0; BUFFER].into(),
                buffer: BytesMut::with_capacity(BUFFER),
                reader: Reader::default(),
                reads: 0,
                current: None,
            }),
            aside: AtomicBool::new(false),
            wanted: Notify::new(),
        });
        let wire = Self(Arc::new(Handle(inner.clone())));
        tokio::spawn(async move {
            let end = inner.drive().await;
            // First: whoever hears of the end must not find this connection again.
            lost();
            inner.end(&end);
        });
        Ok(Some(wire))
    }

    /// Sends commands; `done` is called with their answers, on any thread, and must return at once. Commands reach the
    /// server in the order of the calls.
    pub fn send(&self, commands: &[u8], count: usize, done: impl FnOnce(RedisResult<Vec<Value>>) + Send + 'static) {
        let (done, inner) = (Box::new(done), &self.0.0);
        let mut out = lock(&inner.out);
        if out.closed {
            drop(out);
            return done(Err(io::Error::from(io::ErrorKind::BrokenPipe).into()));
        }
        out.waiting.push_back(Waiting { count, answers: Vec::with_capacity(count), done });
        let written = match out.rest.is_empty() {
            // An error here is seen by the reader too, which tells everybody.
            true => (&inner.stream).write(commands).unwrap_or(0),
            false => 0,
        };
        if written < commands.len() {
            out.rest.extend_from_slice(&commands[written..]);
            inner.wanted.notify_one();
        }
    }

    /// Ends it now: what waits for an answer fails.
    pub fn close(&self) {
        lock(&self.0.0.out).closed = true;
        self.0.0.wanted.notify_one();
    }

    /// For an event loop that wants to hand out answers itself. It does not keep the connection open.
    pub fn watched(&self) -> Arc<dyn Watched> {
        self.0.0.clone()
    }

    /// Sends commands and waits for their answers.
    pub async fn ask(&self, commands: &[u8], count: usize) -> RedisResult<Vec<Value>> {
        let (reply, answers) = oneshot::channel();
        self.send(commands, count, move |answers| drop(reply.send(answers)));
        answers.await.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::BrokenPipe).into()))
    }
}

impl Inner {
    /// Reads answers and writes what is left, until the connection ends; why it did.
    async fn drive(&self) -> io::Error {
        loop {
            let done = match self.aside.load(Ordering::Acquire) {
                true => self.look().await,
                false => self.serve().await,
            };
            if let Err(end) = done {
                return end;
            }
        }
    }

    /// The whole work, until an event loop reads.
    async fn serve(&self) -> io::Result<()> {
        let socket = tokio::net::TcpStream::from_std(self.stream.try_clone()?)?;
        while !self.aside.load(Ordering::Acquire) {
            let interest = if self.has_rest()? { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            let ready = tokio::select! {
                ready = socket.ready(interest) => ready?,
                () = self.wanted.notified() => continue,
            };
            // By this handle, which notes when there is no more.
            if ready.is_writable() {
                self.write_rest(|bytes| socket.try_write(bytes))?;
            }
            if ready.is_readable() || ready.is_read_closed() {
                self.take(lock(&self.incoming), |chunk| socket.try_read(chunk))?;
            }
        }
        Ok(())
    }

    /// While an event loop reads.
    async fn look(&self) -> io::Result<()> {
        let (mut seen, mut quiet) = (lock(&self.incoming).reads, 0);
        while quiet < QUIET && self.aside.load(Ordering::Acquire) && !self.has_rest()? {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = self.wanted.notified() => continue,
            }
            self.take(lock(&self.incoming), |chunk| (&self.stream).read(chunk))?;
            let reads = lock(&self.incoming).reads;
            quiet = if reads == seen { quiet + 1 } else { 0 };
            seen = reads;
        }
        self.aside.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether there is more to write. An error at the end.
    fn has_rest(&self) -> io::Result<bool> {
        let out = lock(&self.out);
        if out.closed { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(!out.rest.is_empty()) }
    }

    fn write_rest(&self, write: impl Fn(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        let mut out = lock(&self.out);
        while !out.rest.is_empty() {
            match write(&out.rest) {
                Ok(written) => out.rest.advance(written),
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => break,
                Err(cause) => return Err(cause),
            }
        }
        Ok(())
    }

    /// Reads what there is, up to a limit, and hands out the answers that are complete.
    fn take(
        &self,
        mut incoming: MutexGuard<'_, Incoming>,
        read: impl Fn(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<()> {
        let Incoming { chunk, buffer, reads, .. } = &mut *incoming;
        let end = loop {
            match read(chunk) {
                Ok(0) => break Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => {
                    *reads += 1;
                    buffer.extend_from_slice(&chunk[..length]);
                    if buffer.len() >= MOST {
                        break Ok(());
                    }
                }
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(cause) => break Err(cause),
            }
        };
        self.answer(&mut incoming).and(end)
    }

    fn answer(&self, Incoming { buffer, reader, current, .. }: &mut Incoming) -> io::Result<()> {
        while let Some(value) = reader.next(buffer)? {
            if matches!(value, Value::Push { .. }) {
                continue;
            }
            let waiting = match current.take() {
                Some(waiting) => Some(waiting),
                None => lock(&self.out).waiting.pop_front(),
            };
            let Some(mut waiting) = waiting else {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer that nobody asked for"));
            };
            waiting.answers.push(value);
            if waiting.answers.len() < waiting.count {
                *current = Some(waiting);
            } else {
                (waiting.done)(Ok(waiting.answers));
            }
        }
        Ok(())
    }

    fn end(&self, why: &io::Error) {
        // Others may have handles of the socket: they see its end, and so does the server.
        drop(self.stream.shutdown(Shutdown::Both));
        let current = lock(&self.incoming).current.take();
        let waiting = {
            let mut out = lock(&self.out);
            out.closed = true;
            std::mem::take(&mut out.waiting)
        };
        for one in current.into_iter().chain(waiting) {
            (one.done)(Err(RedisError::from(io::Error::new(why.kind(), why.to_string()))));
        }
    }
}

impl Watched for Inner {
    fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn watch(&self, yes: bool) {
        if self.aside.swap(yes, Ordering::AcqRel) != yes {
            self.wanted.notify_one();
        }
    }

    fn read(&self) -> bool {
        // Who has the lock is reading.
        if let Ok(incoming) = self.incoming.try_lock()
            && self.take(incoming, |chunk| (&self.stream).read(chunk)).is_err()
        {
            lock(&self.out).closed = true;
            self.wanted.notify_one();
        }
        !lock(&self.out).closed
    }
}
