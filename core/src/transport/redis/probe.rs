//! What the live server keeps, as it says itself.
//!
//! A user without the permission for CONFIG is no failure: INFO tells most of it, and what it does not tell is reported as
//! unknown, never as safe.

use std::collections::HashMap;

use redis::Value;

use super::fault::Failure;
use super::link::Link;
use super::value;
use crate::error::{Error, Result};
use crate::transport::{Confirm, Durability, Guarantees};

/// What was measured.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    version: String,
    mode: String,
    aof: bool,
    /// `always`, `everysec`, `no`, or `unknown`.
    fsync: String,
    eviction: String,
    max_memory: u64,
    replicas: u64,
    has_waitaof: bool,
    /// Bytes of an argument, and so of an event; at a larger one the server hangs up, and all that is under way fails.
    pub largest: usize,
}

impl Probe {
    pub async fn of(link: &Link, deadline: tokio::time::Instant) -> Result<Self, Failure> {
        let info = value::text(link.run(&redis::cmd("INFO"), deadline).await?)?;
        let info: HashMap<&str, &str> = info.lines().filter_map(|line| line.split_once(':')).collect();
        let fact = |name: &str| info.get(name).map_or("", |fact| fact.trim()).to_owned();
        let mut ask = redis::cmd("CONFIG");
        let fsync = link.run(ask.arg("GET").arg("appendfsync"), deadline).await;
        let fsync = match fsync {
            Ok(answer) => value::list(answer)?.into_iter().nth(1).map(value::text).transpose()?,
            Err(failure) if failure.unknown => return Err(failure),
            Err(_) => None,
        };
        let mut ask = redis::cmd("CONFIG");
        let largest = match &fsync {
            Some(_) => link.run(ask.arg("GET").arg("proto-max-bulk-len"), deadline).await.ok(),
            None => None, // it may not ask
        };
        let largest = largest.and_then(|answer| value::text(value::list(answer).ok()?.into_iter().nth(1)?).ok());
        let mut ask = redis::cmd("COMMAND");
        let waitaof = link.run(ask.arg("INFO").arg("WAITAOF"), deadline).await;
        let has_waitaof = match waitaof {
            Ok(answer) => value::list(answer)?.into_iter().any(|command| command != Value::Nil),
            Err(_) => false,
        };
        let version = match fact("valkey_version") {
            version if !version.is_empty() => format!("valkey {version}"),
            _ => fact("redis_version"),
        };
        Ok(Self {
            version,
            mode: fact("redis_mode"),
            aof: fact("aof_enabled") == "1",
            fsync: fsync.unwrap_or_else(|| "unknown".to_owned()),
            eviction: fact("maxmemory_policy"),
            max_memory: fact("maxmemory").parse().unwrap_or(0),
            replicas: fact("connected_slaves").parse().unwrap_or(0),
            has_waitaof,
            largest: largest.and_then(|bytes| bytes.parse().ok()).unwrap_or(usize::MAX),
        })
    }

    /// What a confirmed publish survives.
    fn durability(&self, confirm: Confirm) -> &'static str {
        match (self.aof, self.fsync.as_str()) {
            (false, _) => "memory",
            (true, "always") => "disk",
            (true, _) if confirm == Confirm::Disk => "disk",
            (true, "no" | "everysec") => "process",
            (true, _) => "memory",
        }
    }

    fn warnings(&self, confirm: Confirm) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.aof {
            warnings.push(
                "the server keeps events in memory only, a restart loses them; turn its log on: redis-cli CONFIG SET appendonly yes (and in redis.conf)"
                    .to_owned(),
            );
        } else if self.durability(confirm) == "memory" {
            warnings.push(
                "whether the server's log reaches the disk cannot be read (no permission for CONFIG GET), so nothing is promised; grant it: ACL SETUSER <user> +config|get"
                    .to_owned(),
            );
        }
        if self.eviction.starts_with("allkeys") {
            warnings.push(format!(
                "a full server throws away any key, events included (maxmemory-policy {}); let it refuse writes instead: redis-cli CONFIG SET maxmemory-policy noeviction (and in redis.conf)",
                self.eviction
            ));
        }
        warnings
    }

    /// Refuses what the options demand and the server cannot keep, and warns once of the rest.
    pub fn judge(&self, durability: Durability, confirm: Confirm) -> Result<()> {
        match confirm {
            Confirm::Disk if !self.aof => {
                return Err(Error::unsupported(
                    "confirm=\"disk\" needs a server that writes a log; turn it on: redis-cli CONFIG SET appendonly yes",
                ));
            }
            Confirm::Disk if self.fsync != "always" && !self.has_waitaof => {
                return Err(Error::unsupported(format!(
                    "Redis {} cannot confirm that an event is on its disk (WAITAOF came with 7.2); set appendfsync always, or confirm=\"memory\"",
                    self.version
                )));
            }
            Confirm::Replica if self.replicas == 0 => {
                return Err(Error::unsupported(
                    "confirm=\"replica\" needs a replica, and the server has none; add one, or set confirm=\"memory\"",
                ));
            }
            _ => {}
        }
        let warnings = self.warnings(confirm);
        match durability {
            Durability::Off => Ok(()),
            Durability::Full if self.durability(confirm) != "disk" => Err(Error::unsupported(format!(
                "durability=\"full\" needs every event on the server's disk (appendfsync is {}); run redis-cli CONFIG SET appendfsync always, or set confirm=\"disk\"",
                self.fsync
            ))),
            Durability::Required if !warnings.is_empty() => {
                Err(Error::unsupported(format!("durability=\"required\", and {}", warnings.join("; and "))))
            }
            _ => {
                if !warnings.is_empty() {
                    log::warn!("{}", warnings.join("; "));
                }
                Ok(())
            }
        }
    }

    /// Whether a confirmation has to be waited for: a server that syncs before it answers needs no WAITAOF.
    pub fn confirm(&self, wanted: Confirm) -> Confirm {
        match wanted {
            Confirm::Disk if self.fsync == "always" => Confirm::Memory,
            other => other,
        }
    }

    pub fn guarantees(&self, confirm: Confirm, details: Vec<(&'static str, String)>) -> Guarantees {
        let mut all = vec![
            ("version", self.version.clone()),
            ("mode", self.mode.clone()),
            ("appendonly", if self.aof { "yes" } else { "no" }.to_owned()),
            ("appendfsync", self.fsync.clone()),
            ("maxmemory", self.max_memory.to_string()),
            ("maxmemory_policy", self.eviction.clone()),
            ("replicas", self.replicas.to_string()),
            (
                "confirm",
                match confirm {
                    Confirm::Memory => "memory",
                    Confirm::Disk => "disk",
                    Confirm::Replica => "replica",
                }
                .to_owned(),
            ),
        ];
        all.extend(details);
        Guarantees {
            transport: "redis",
            delivery: "at-least-once",
            durability: self.durability(confirm),
            ordering: "publish",
            details: all,
            warnings: self.warnings(confirm),
        }
    }
}
