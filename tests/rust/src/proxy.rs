//! A TCP proxy that misbehaves on request: it stops forwarding without closing (a half-open connection), cuts, or cuts
//! when so much of a reply has passed (the request was done, its answer is lost).

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// Forwards connections to one server until it is dropped.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    server: SocketAddr,
    state: Mutex<State>,
    /// The black hole has opened or closed.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    black_hole: bool,
    /// Bytes of replies that still pass, over all connections; then everything is cut.
    reply_budget: Option<usize>,
    /// Both ends of each connection.
    open: Vec<TcpStream>,
    closed: bool,
    arrivals: Vec<Instant>,
}

impl Proxy {
    /// A proxy on a free port of the loopback.
    pub fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let own = listener.local_addr().unwrap().port();
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let shared = Arc::new(Shared { server, state: Mutex::default(), changed: Condvar::new() });
        let accepting = shared.clone();
        thread::spawn(move || accepting.accept(&listener));
        Self { port: own, shared }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `127.0.0.1:<port>`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// How many connections it has taken.
    pub fn accepted(&self) -> usize {
        self.shared.lock().arrivals.len()
    }

    /// When it took each of them.
    pub fn arrivals(&self) -> Vec<Instant> {
        self.shared.lock().arrivals.clone()
    }

    /// From now on nothing passes in either direction, on old connections and new ones, and nothing is closed.
    pub fn black_hole(&self) {
        self.shared.lock().black_hole = true;
    }

    /// Everything passes again, what was held back first: as TCP does when a network returns.
    pub fn heal(&self) {
        self.shared.lock().black_hole = false;
        self.shared.changed.notify_all();
    }

    /// Cuts every connection. New ones are served.
    pub fn cut(&self) {
        self.shared.lock().cut();
        self.shared.changed.notify_all();
    }

    /// Lets so many bytes of replies pass and then cuts every connection, once. With 0, the next request reaches the
    /// server and none of its answer comes back.
    pub fn cut_after(&self, reply_bytes: usize) {
        self.shared.lock().reply_budget = Some(reply_bytes);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.cut();
        drop(state);
        self.shared.changed.notify_all();
        drop(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))); // wakes `accept`
    }
}

impl State {
    fn cut(&mut self) {
        for stream in self.open.drain(..) {
            drop(stream.shutdown(Shutdown::Both)); // it may have ended by itself
        }
    }

    /// How much of `count` bytes may pass, in the direction of replies.
    fn allowance(&mut self, count: usize) -> usize {
        let Some(budget) = &mut self.reply_budget else { return count };
        let pass = count.min(*budget);
        *budget -= pass;
        pass
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for client in listener.incoming() {
            let Ok(client) = client else { continue };
            // A server that is down looks like one: the client's connection is closed again.
            let server = TcpStream::connect(self.server);
            let mut state = self.lock();
            if state.closed {
                return;
            }
            state.arrivals.push(Instant::now());
            let Ok(server) = server else { continue };
            for stream in [&client, &server] {
                stream.set_nodelay(true).unwrap();
                state.open.push(stream.try_clone().unwrap());
            }
            for (from, to, reply) in [(&client, &server, false), (&server, &client, true)] {
                let (from, to, shared) = (from.try_clone().unwrap(), to.try_clone().unwrap(), self.clone());
                thread::spawn(move || shared.pump(from, to, reply));
            }
        }
    }

    /// Forwards one direction until either side closes.
    fn pump(&self, mut from: TcpStream, mut to: TcpStream, reply: bool) {
        let mut buffer = [0; 16 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let held = |state: &mut State| state.black_hole && !state.closed;
            let mut state = self.changed.wait_while(self.lock(), held).unwrap_or_else(PoisonError::into_inner);
            let pass = if reply { state.allowance(count) } else { count };
            let spent = reply && state.reply_budget == Some(0);
            drop(state);
            let written = to.write_all(&buffer[..pass]);
            if spent {
                let mut state = self.lock();
                state.reply_budget = None;
                state.cut();
            }
            if written.is_err() {
                break;
            }
        }
        for stream in [from, to] {
            drop(stream.shutdown(Shutdown::Both));
        }
    }
}
