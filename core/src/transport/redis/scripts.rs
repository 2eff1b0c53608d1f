//! The scripts that run inside the server, each one atomic step. Each file opens with its keys, arguments and answer.
//!
//! Numbers are milliseconds of the server's clock. A script is sent once by its text and then named by its digest; a
//! server that does not know it (it was restarted, or another one took over) says so and gets the text.
//!
//! Those with `allow-oom` run on a server that is full, too: they move what is there, or make room. A script may be made of
//! several files; `full` is that flag.

use std::sync::LazyLock;

use redis::Cmd;

pub(super) struct Script {
    pub text: &'static str,
    digest: String,
}

impl Script {
    fn new(text: &'static str) -> Self {
        Self { text, digest: sha1_smol::Sha1::from(text).hexdigest() }
    }

    /// The call, by digest.
    pub fn call(&self, keys: &[&str]) -> Cmd {
        let mut command = redis::cmd("EVALSHA");
        command.arg(&self.digest).arg(keys.len()).arg(keys);
        command
    }

    /// The call, by text: for where an unknown digest could not be repaired, as inside a transaction.
    pub fn call_by_text(&self, keys: &[&str]) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(self.text).arg(keys.len()).arg(keys);
        command
    }
}

macro_rules! scripts {
    ($($name:ident = $($file:literal)+),* $(,)?) => {$(
        pub(super) static $name: LazyLock<Script> =
            LazyLock::new(|| Script::new(concat!($(include_str!(concat!("scripts/", $file, ".lua"))),+)));
    )*

        /// Makes the server know all scripts.
        pub(super) fn load() -> redis::Pipeline {
            let mut load = redis::Pipeline::new();
            $(load.cmd("SCRIPT").arg("LOAD").arg($name.text);)*
            load
        }

        fn all() -> [&'static Script; [$(stringify!($name)),*].len()] {
            [$(&$name),*]
        }
    };
}

scripts! {
    JOIN = "join",
    PULSE = "pulse",
    DUE = "due",
    SETTLE = "settle",
    HEARTBEAT = "heartbeat",
    CLAIM = "claim",
    SKIP = "skip",
    LATER = "later",
    ONCE = "once",
    MARK = "mark",
    PROMOTE = "promote",
    REPLAY = "replay",
    AGAIN = "lanes" "again",
    PEEK = "peek",
    RECORDS = "records",
    FORGET = "forget",
    DELETE = "delete",
    TRIM = "trim",
    DROP = "drop",
    STATS = "stats",
    TYPES = "types",
    ORDERED_TAKE = "full" "lanes" "ordered_take",
    ORDERED_SETTLE = "full" "lanes" "ordered_settle",
    POST = "post",
    ALIVE = "alive",
    RESPONDERS = "responders",
}

/// The command where a script failed, from what the server says of it: `… script: <digest>, on @user_script:<line>.`
pub(super) fn command_at(said: &str) -> Option<&'static str> {
    let (digest, line) = said.split_once("script: ")?.1.split_once(", on @user_script:")?;
    let line: usize = line.trim_end_matches('.').parse().ok()?;
    let script = all().into_iter().find(|script| script.digest == digest)?;
    let call = script.text.lines().nth(line.checked_sub(1)?)?.split_once("call('")?.1;
    Some(call.split_once('\'')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_of_a_failed_script_is_found() {
        let line = 1 + SKIP.text.lines().position(|line| line.contains("'XACK'")).unwrap();
        let said = format!("cannot script: {}, on @user_script:{line}.", SKIP.digest);
        assert_eq!(command_at(&said), Some("XACK"));
        assert_eq!(command_at(&said.replace(&SKIP.digest, "0")), None);
        assert_eq!(command_at("cannot"), None);
    }
}
