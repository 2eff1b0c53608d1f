//! The event loop looks at a socket of the core itself, while it awaits the answer to a lone publish.
//!
//! Otherwise an answer wakes a thread of the core, and that one wakes this one: each wake takes longer than the server.
//! The core still looks now and then, so an event loop that is busy fails no publish. Only Node's own libuv can do it: other
//! runtimes that load addons end the process at such a call, so TypeScript says where.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr::{NonNull, null, null_mut};
use std::rc::{Rc, Weak};
use std::sync::{Arc, OnceLock};

use libloading::os::unix::Library;
use napi::bindgen_prelude::Function;
use napi::{Env, JsValue as _, sys};
use polybus_core::Bus;
use polybus_core::transport::Watched;

use crate::bridge::Shared;

/// `UV_POLL` of libuv's handle types, and `UV_READABLE` of its events: both are part of its stable interface.
const POLL: c_int = 8;
const READABLE: c_int = 1;

type Handle = *mut c_void;

/// What we use of libuv 1.
struct Libuv {
    handle_size: unsafe extern "C" fn(c_int) -> usize,
    poll_init: unsafe extern "C" fn(*mut sys::uv_loop_s, Handle, c_int) -> c_int,
    poll_start: unsafe extern "C" fn(Handle, c_int, unsafe extern "C" fn(Handle, c_int, c_int)) -> c_int,
    poll_stop: unsafe extern "C" fn(Handle) -> c_int,
    set_data: unsafe extern "C" fn(Handle, *mut c_void),
    get_data: unsafe extern "C" fn(Handle) -> *mut c_void,
    unref: unsafe extern "C" fn(Handle),
    close: unsafe extern "C" fn(Handle, unsafe extern "C" fn(Handle)),
}

/// Libuv of the process, if it has all of it.
fn libuv() -> Option<&'static Libuv> {
    static FOUND: OnceLock<Option<Libuv>> = OnceLock::new();
    let find = || {
        let process = Library::this();
        // SAFETY: the types are those of libuv's documentation.
        unsafe {
            Some(Libuv {
                handle_size: *process.get(b"uv_handle_size\0").ok()?,
                poll_init: *process.get(b"uv_poll_init\0").ok()?,
                poll_start: *process.get(b"uv_poll_start\0").ok()?,
                poll_stop: *process.get(b"uv_poll_stop\0").ok()?,
                set_data: *process.get(b"uv_handle_set_data\0").ok()?,
                get_data: *process.get(b"uv_handle_get_data\0").ok()?,
                unref: *process.get(b"uv_unref\0").ok()?,
                close: *process.get(b"uv_close\0").ok()?,
            })
        }
    };
    FOUND.get_or_init(find).as_ref()
}

/// JavaScript's function that takes what is ready, to be called from libuv.
pub struct Drain {
    env: sys::napi_env,
    function: sys::napi_ref,
    context: sys::napi_async_context,
}

impl Drain {
    pub fn new(env: Env, function: &Function<(), ()>) -> napi::Result<Rc<Self>> {
        let name = env.create_string("polybus")?;
        let (env, mut reference, mut context) = (env.raw(), null_mut(), null_mut());
        // SAFETY: all of them live in this call, on the environment's thread.
        unsafe {
            napi::check_status!(sys::napi_create_reference(env, function.raw(), 1, &mut reference))?;
            napi::check_status!(sys::napi_async_init(env, null_mut(), name.raw(), &mut context))?;
        }
        Ok(Rc::new(Self { env, function: reference, context }))
    }

    /// Calls it as the event loop does: what it resolves goes on before this returns.
    ///
    /// # Safety
    /// On the environment's thread, called by its event loop.
    unsafe fn call(&self) {
        let Self { env, function, context } = *self;
        let (mut scope, mut called, mut this) = (null_mut(), null_mut(), null_mut());
        // SAFETY: the reference is strong, and the scope is closed last. An environment that ends refuses the calls.
        unsafe {
            if sys::napi_open_handle_scope(env, &mut scope) != sys::Status::napi_ok {
                return;
            }
            sys::napi_get_reference_value(env, function, &mut called);
            sys::napi_get_global(env, &mut this);
            let status = sys::napi_make_callback(env, context, this, called, 0, null(), null_mut());
            if status == sys::Status::napi_pending_exception {
                let mut error = null_mut();
                sys::napi_get_and_clear_last_exception(env, &mut error);
                sys::napi_fatal_exception(env, error);
            }
            sys::napi_close_handle_scope(env, scope);
        }
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        // SAFETY: made by the same environment, and dropped on its thread with the object that holds it.
        unsafe {
            sys::napi_delete_reference(self.env, self.function);
            sys::napi_async_destroy(self.env, self.context);
        }
    }
}

/// Decides when a bus is watched. Many publishes at a time are answered together; for them the core's thread is as good.
pub struct Watcher {
    drain: Option<Rc<Drain>>,
    watch: RefCell<Option<Watch>>,
}

impl Watcher {
    pub fn new(drain: Option<Rc<Drain>>) -> Self {
        Self { drain, watch: RefCell::default() }
    }

    /// After publishes of one turn of the event loop have been sent.
    pub fn after(&self, alone: bool, bus: &Bus, shared: &Arc<Shared>) {
        let Some(drain) = &self.drain else { return };
        let mut watch = self.watch.borrow_mut();
        if !alone {
            return watch.iter().for_each(|watch| watch.set_active(false));
        }
        let Some(source) = bus.watched() else { return };
        if !watch.as_ref().is_some_and(|watch| watch.is_of(&source)) {
            *watch = Watch::new(source, shared, drain);
        }
        watch.iter().for_each(|watch| watch.set_active(true));
    }

    /// Until the next publish.
    pub fn end(&self) {
        *self.watch.borrow_mut() = None;
    }
}

/// A socket that the event loop watches. Belongs to the environment's thread.
struct Watch(NonNull<Watching>);

struct Watching {
    uv: &'static Libuv,
    /// Libuv's handle: it says how many bytes it needs.
    handle: Box<[Cell<u64>]>,
    /// Our own duplicate: closed after libuv has forgotten it.
    _socket: OwnedFd,
    source: Arc<dyn Watched>,
    /// Not ours to keep, both: at the end of a thread libuv forgets the handle after the environment is gone.
    shared: std::sync::Weak<Shared>,
    drain: Weak<Drain>,
    active: Cell<bool>,
    ended: Cell<bool>,
}

impl Watch {
    /// None where libuv will not do it.
    fn new(source: Arc<dyn Watched>, shared: &Arc<Shared>, drain: &Rc<Drain>) -> Option<Self> {
        let uv = libuv()?;
        let socket = source.socket().try_clone_to_owned().ok()?;
        let (number, env) = (socket.as_raw_fd(), Env::from_raw(drain.env));
        // SAFETY: no argument.
        let size = unsafe { (uv.handle_size)(POLL) };
        let handle = vec![Cell::new(0); size.div_ceil(size_of::<u64>())].into();
        let (active, ended) = (Cell::new(false), Cell::new(false));
        let watching = Watching {
            uv,
            handle,
            _socket: socket,
            source,
            shared: Arc::downgrade(shared),
            drain: Rc::downgrade(drain),
            active,
            ended,
        };
        let watching = Box::new(watching);
        let handle = watching.handle();
        // SAFETY: the handle has the size that libuv says, and stays where it is until `closed`.
        unsafe {
            if (uv.poll_init)(env.get_uv_event_loop().ok()?, handle, number) != 0 {
                return None;
            }
            let watching = NonNull::from(Box::leak(watching));
            (uv.set_data)(handle, watching.as_ptr().cast());
            (uv.unref)(handle); // who awaits a publish holds the process
            Some(Self(watching))
        }
    }

    /// Whether it watches this socket, and that lives.
    fn is_of(&self, source: &Arc<dyn Watched>) -> bool {
        let watching = self.watching();
        !watching.ended.get() && Arc::ptr_eq(&watching.source, source)
    }

    /// Looks, or looks no longer.
    fn set_active(&self, active: bool) {
        let watching = self.watching();
        if watching.ended.get() {
            return;
        }
        watching.source.watch(active);
        if watching.active.replace(active) == active {
            return;
        }
        // SAFETY: the handle is initialized and not closed.
        unsafe {
            match active {
                true => (watching.uv.poll_start)(watching.handle(), READABLE, ready),
                false => (watching.uv.poll_stop)(watching.handle()),
            };
        }
    }

    fn watching(&self) -> &Watching {
        // SAFETY: freed only by `closed`, after `self` is dropped.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let watching = self.watching();
        watching.source.watch(false);
        // SAFETY: closed once, here; `closed` frees it.
        unsafe { (watching.uv.close)(watching.handle(), closed) }
    }
}

impl Watching {
    fn handle(&self) -> Handle {
        self.handle.as_ptr().cast_mut().cast()
    }
}

unsafe extern "C" fn ready(handle: Handle, _status: c_int, _events: c_int) {
    // SAFETY: the data was set by `Watch::new`; a handle that is closed calls this no more.
    let watching = unsafe {
        let Some(libuv) = libuv() else { return };
        &*(libuv.get_data)(handle).cast::<Watching>()
    };
    let (Some(shared), Some(drain)) = (watching.shared.upgrade(), watching.drain.upgrade()) else { return };
    if !shared.host.quietly(|| watching.source.read()) {
        watching.ended.set(true);
        // SAFETY: as above.
        unsafe { (watching.uv.poll_stop)(handle) };
    }
    // From here on `watching` may be gone: JavaScript may drop the bus.
    // SAFETY: libuv calls us on the environment's thread.
    unsafe { drain.call() }
}

unsafe extern "C" fn closed(handle: Handle) {
    // SAFETY: the last call for this handle; nobody else has the box.
    unsafe {
        if let Some(libuv) = libuv() {
            drop(Box::from_raw((libuv.get_data)(handle).cast::<Watching>()));
        }
    }
}
