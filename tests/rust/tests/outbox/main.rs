//! The relay, on real servers of PostgreSQL and MariaDB. A behaviour that only the SQL has is here; what the policy and the floor compute
//! is tested beside them.
#![allow(clippy::unwrap_used, reason = "a test that cannot set the stage must fail")]

mod databases;
mod errors;
mod executor;
mod ground;
mod locks;
mod maria_tls;
mod order;
mod outages;
mod pool;
mod rows;
mod tls;
mod truth;
