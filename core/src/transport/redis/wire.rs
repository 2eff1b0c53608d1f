//! A connection that any thread may write to.
//!
//! The library's connection hands every command to a task, and every answer through another: for a lone publish these
//! wakes cost more than the server, and its parser more than the rest of a delivery. Here whoever has a command writes it
//! to the socket itself; a task reads answers, and writes what the socket did not take at once. The library still says
//! hello (login, database, protocol), and still does TLS.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use bytes::{Buf, BytesMut};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ConnectionAddr, RedisError, RedisResult, Value};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};

use super::partition::lock;
use super::resp::Reader;

/// Bytes of one read, and first size of the buffer for answers.
const BUFFER: usize = 32 << 10;
/// So much is read before answers are handed out.
const MOST: usize = 256 << 10;

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
    stream: TcpStream,
    out: Mutex<Out>,
    /// There is something to write, or the end.
    wanted: Notify,
}

#[derive(Default)]
struct Out {
    /// What the socket did not take.
    rest: BytesMut,
    waiting: VecDeque<Waiting>,
    closed: bool,
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
        let stream = TcpStream::connect((host.as_str(), *port)).await?;
        stream.set_nodelay(true)?;
        if let Some(keepalive) = info.tcp_settings().keepalive() {
            socket2::SockRef::from(&stream).set_tcp_keepalive(keepalive)?;
        }
        let stream = stream.into_std()?;
        // A second handle of the same socket: the library closes it after its greeting, and the connection stays.
        let greeting = TcpStream::from_std(stream.try_clone()?)?;
        drop(MultiplexedConnection::new_with_config(info.redis_settings(), greeting, config.clone()).await?);
        let inner =
            Arc::new(Inner { stream: TcpStream::from_std(stream)?, out: Mutex::default(), wanted: Notify::new() });
        let wire = Self(Arc::new(Handle(inner.clone())));
        tokio::spawn(async move {
            let mut current = None;
            let end = inner.drive(&mut current).await;
            // First: whoever hears of the end must not find this connection again.
            lost();
            inner.end(current, &end);
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
            true => inner.stream.try_write(commands).unwrap_or(0),
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

    /// Sends commands and waits for their answers.
    pub async fn ask(&self, commands: &[u8], count: usize) -> RedisResult<Vec<Value>> {
        let (reply, answers) = oneshot::channel();
        self.send(commands, count, move |answers| drop(reply.send(answers)));
        answers.await.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::BrokenPipe).into()))
    }
}

impl Inner {
    /// Reads answers and writes what is left, until the connection ends; why it did. `current` is who is owed the next
    /// answer.
    async fn drive(&self, current: &mut Option<Waiting>) -> io::Error {
        let (mut buffer, mut reader) = (BytesMut::with_capacity(BUFFER), Reader::default());
        let mut chunk = vec![0; BUFFER];
        loop {
            let wanted = {
                let out = lock(&self.out);
                if out.closed {
                    return io::ErrorKind::BrokenPipe.into();
                }
                if out.rest.is_empty() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE }
            };
            let ready = tokio::select! {
                ready = self.stream.ready(wanted) => ready,
                () = self.wanted.notified() => continue,
            };
            let moved = ready.and_then(|ready| {
                if ready.is_writable() {
                    self.write_rest()?;
                }
                if ready.is_readable() || ready.is_read_closed() { self.read(&mut chunk, &mut buffer) } else { Ok(()) }
            });
            let answered = self.answer(&mut buffer, &mut reader, current);
            if let Err(end) = answered.and(moved) {
                return end;
            }
        }
    }

    fn write_rest(&self) -> io::Result<()> {
        let mut out = lock(&self.out);
        while !out.rest.is_empty() {
            match self.stream.try_write(&out.rest) {
                Ok(written) => out.rest.advance(written),
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => break,
                Err(cause) => return Err(cause),
            }
        }
        Ok(())
    }

    /// Reads what there is.
    fn read(&self, chunk: &mut [u8], buffer: &mut BytesMut) -> io::Result<()> {
        loop {
            match self.stream.try_read(chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => {
                    buffer.extend_from_slice(&chunk[..length]);
                    if buffer.len() >= MOST {
                        return Ok(());
                    }
                }
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(cause) => return Err(cause),
            }
        }
    }

    /// Hands out the answers that are complete.
    fn answer(&self, buffer: &mut BytesMut, reader: &mut Reader, current: &mut Option<Waiting>) -> io::Result<()> {
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

    fn end(&self, current: Option<Waiting>, why: &io::Error) {
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
