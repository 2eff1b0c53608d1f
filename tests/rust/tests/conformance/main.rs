//! Every behaviour on every transport: one trial for each pair. `tests/README.md` says which behaviours of the
//! reliability research they stand for.
#![allow(clippy::unwrap_used, reason = "tests")]

mod batches;
mod delivery;
mod expiry;
mod flow;
mod history;
mod lifecycle;
mod ordered;
mod once;
mod publishing;
mod requests;
mod trouble;

use std::sync::Arc;

use libtest_mimic::{Arguments, Conclusion, Trial};
use polybus_conformance::{World, redis_server, transports};
use polybus_core::transport::Capabilities;
use tokio::runtime::{Builder, Runtime};

/// What every transport does that has the needed capabilities.
#[derive(Clone, Copy)]
pub struct Behaviour {
    name: &'static str,
    possible: fn(&Capabilities) -> bool,
    run: fn(World) -> BoxFuture,
}

type BoxFuture = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Names the behaviours of a module, each an `async fn(World)`, and after a colon the capabilities that it needs.
#[macro_export]
macro_rules! behaviours {
    ($($name:ident $(: $need:ident $(+ $more:ident)*)?),* $(,)?) => {
        pub const ALL: &[super::Behaviour] = &[$(super::Behaviour {
            name: stringify!($name),
            possible: |_can| true $(&& _can.$need $(&& _can.$more)*)?,
            run: |world| Box::pin($name(world)),
        }),*];
    };
}

fn main() {
    run().exit(); // drops nothing
}

fn run() -> Conclusion {
    let _end = redis_server::EndShared;
    let arguments = Arguments::from_args();
    let modules = [
        ("publishing", publishing::ALL),
        ("delivery", delivery::ALL),
        ("trouble", trouble::ALL),
        ("lifecycle", lifecycle::ALL),
        ("ordered", ordered::ALL),
        ("requests", requests::ALL),
        ("flow", flow::ALL),
        ("batches", batches::ALL),
        ("once", once::ALL),
        ("history", history::ALL),
        ("expiry", expiry::ALL),
    ];
    let mut trials = Vec::new();
    for transport in transports().into_iter().filter(|transport| asked_for(&arguments, transport)) {
        let can = capabilities(&transport);
        let transport: Arc<str> = transport.into();
        for (module, behaviours) in &modules {
            for behaviour in behaviours.iter().copied().filter(|behaviour| (behaviour.possible)(&can)) {
                let transport = transport.clone();
                trials.push(Trial::test(format!("{transport}::{module}::{}", behaviour.name), move || {
                    runtime().block_on((behaviour.run)(World::new(&transport)));
                    Ok(())
                }));
            }
        }
    }
    libtest_mimic::run(&arguments, trials)
}

/// nextest runs each trial in a process of its own, and that needs no server for the other transports.
fn asked_for(arguments: &Arguments, transport: &str) -> bool {
    let exact = arguments.filter.as_deref().filter(|_| arguments.exact);
    exact.is_none_or(|name| name.starts_with(&format!("{transport}::")))
}

/// Asked on a live bus: one that cannot be opened is a failure, not a reason to leave its trials out.
fn capabilities(transport: &str) -> Capabilities {
    let world = World::new(transport);
    runtime().block_on(async {
        let bus = world.bus();
        let can = bus.capabilities().await.unwrap_or_else(|error| panic!("{transport}: {error}"));
        bus.close(polybus_conformance::DEADLINE).await;
        can
    })
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
