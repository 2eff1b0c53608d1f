//! The names of the keys, as in `docs/wire.md`.

/// The keys of one partition of a bus. All are in one slot of a cluster.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
    /// Of a bus that has several: where their number is kept, and how many there are.
    parts: Option<(String, u32)>,
    pub events: String,
    pub delayed: String,
    pub delayed_data: String,
    pub groups: String,
    pub counts: String,
    pub meta: String,
    pub bell: String,
    /// Who answers requests, by the end of its lease.
    pub responders: String,
}

/// The keys of one group in one partition.
#[derive(Debug, Clone)]
pub(super) struct GroupKeys {
    /// Waits for its time: retries, what was handed back, replays.
    pub retry: String,
    /// Taken from `retry`, by the end of the lease.
    pub held: String,
    /// The events and facts of both.
    pub work: String,
    pub dead: String,
    /// Of an ordered group: what waits for an earlier event of its key.
    pub lanes: String,
    /// Keys that idempotent subscriptions handle or have handled, by the time at which they are forgotten.
    pub marks: String,
    /// Who handles a key.
    pub handling: String,
}

impl Keys {
    /// Of partition `number` of `partitions`.
    pub fn new(bus: &str, number: u32, partitions: u32) -> Self {
        let prefix = match partitions {
            1 => format!("polybus:{{{bus}}}"),
            _ => format!("polybus:{{{bus}:{number}}}"),
        };
        let key = |name: &str| format!("{prefix}:{name}");
        Self {
            events: key("events"),
            delayed: key("delayed"),
            delayed_data: key("delayed:data"),
            groups: key("groups"),
            counts: key("counts"),
            meta: key("meta"),
            bell: key("bell"),
            responders: key("responders"),
            parts: (partitions > 1).then(|| (Self::bus_meta(bus), partitions)),
            prefix,
        }
    }

    /// What the partitions of a bus have in common.
    pub fn bus_meta(bus: &str) -> String {
        format!("polybus:{{{bus}}}:meta")
    }

    /// Where the number of partitions is kept, and the number; `None` when there is one.
    pub fn parts(&self) -> Option<(&str, u32)> {
        self.parts.as_ref().map(|(key, count)| (key.as_str(), *count))
    }

    /// The list of replies to one process.
    pub fn mail(&self, mailbox: &str) -> String {
        format!("{}:mail:{mailbox}", self.prefix)
    }

    /// What was published under an idempotency key.
    pub fn seen(&self, key: &str) -> String {
        format!("{}:seen:{key}", self.prefix)
    }

    pub fn group(&self, group: &str) -> GroupKeys {
        let key = |name: &str| format!("{}:{name}:{group}", self.prefix);
        GroupKeys {
            retry: key("retry"),
            held: key("held"),
            work: key("work"),
            dead: key("dead"),
            lanes: key("lanes"),
            marks: key("marks"),
            handling: key("handling"),
        }
    }
}

/// The partition of an event: those with one key are together, those without are spread.
pub(super) fn partition_of(key: Option<&str>, partitions: u32) -> u32 {
    match (partitions, key) {
        (1, _) => 0,
        (_, None) => fastrand::u32(..partitions),
        (_, Some(key)) => (fnv(key.as_bytes()) % u64::from(partitions)) as u32,
    }
}

/// FNV-1a, 64 bits. Part of the wire format: every version must choose the same partition.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_partitions_are_fixed() {
        assert_eq!(Keys::new("default", 0, 1).group("shop/mail").retry, "polybus:{default}:retry:shop/mail");
        assert_eq!(Keys::new("b", 2, 3).events, "polybus:{b:2}:events");
        assert_eq!((fnv(b""), fnv(b"a")), (0xcbf2_9ce4_8422_2325, 0xaf63_dc4c_8601_ec8c));
        assert_eq!(partition_of(Some("o-1"), 3), (fnv(b"o-1") % 3) as u32);
        assert_eq!(partition_of(Some("anything"), 1), 0);
    }
}
