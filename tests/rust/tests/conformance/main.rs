//! Every behaviour on every transport: one trial for each pair. `tests/README.md` says which behaviours of the
//! reliability research they stand for.
#![allow(clippy::unwrap_used, reason = "tests")]

mod delivery;
mod lifecycle;
mod publishing;
mod trouble;

use libtest_mimic::{Arguments, Trial};
use polybus_conformance::{TRANSPORTS, World};

type Behaviour = (&'static str, fn(World) -> futures::BoxFuture);

mod futures {
    pub type BoxFuture = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// Names the behaviours of a module, each an `async fn(World)`.
#[macro_export]
macro_rules! behaviours {
    ($($name:ident),* $(,)?) => {
        pub const ALL: &[super::Behaviour] = &[$((stringify!($name), |world| Box::pin($name(world)))),*];
    };
}

fn main() {
    let modules = [
        ("publishing", publishing::ALL),
        ("delivery", delivery::ALL),
        ("trouble", trouble::ALL),
        ("lifecycle", lifecycle::ALL),
    ];
    let mut trials = Vec::new();
    for transport in TRANSPORTS {
        for (module, behaviours) in &modules {
            for (name, behaviour) in *behaviours {
                trials.push(Trial::test(format!("{transport}::{module}::{name}"), move || {
                    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
                    runtime.block_on(behaviour(World::new(transport)));
                    Ok(())
                }));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
