//! Requests and their replies.
//!
//! ```text
//! requester                            the store                          responder
//!   desk ──event, polybus-reply-to──►  log ──take──► group of a responder ──► handler
//!     ▲                                                                        │ outcome
//!     └──────────── mailbox ◄──────── post (gone after the time that is left) ◄┘
//! ```
//! A request is an ordinary event that expires with its timeout. Replies are no events of the log: they lie in the
//! mailbox of the requesting process, one for each bus, and carry the token of their request. Mailbox and token are 128
//! random bits of the operating system each: whoever has not seen the request cannot answer it.

mod desk;
mod responder;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Meta, Text};

pub(crate) use self::desk::Desk;
pub(crate) use self::responder::{Facts, Responder};

/// Header of a request: `<mailbox>.<token>`, both 32 lower-case hexadecimal digits.
const REPLY_TO: &str = "polybus-reply-to";
/// Header of a request: for how many milliseconds the requester waits, from when it asked.
const REPLY_WITHIN: &str = "polybus-reply-within";
/// Header of a reply: the token of the request.
const REPLY_FOR: &str = "polybus-reply-for";
/// Header of a reply: `ok`, or `error` with a payload of `type`, `message` and perhaps `code`.
const REPLY_STATUS: &str = "polybus-reply-status";
/// Nobody posts for longer, whatever the header says: it may come from anybody.
const LONGEST: Duration = Duration::from_secs(86_400);
/// What all of them begin with.
const PREFIX: &str = "polybus-reply-";

/// What one bus did in this process.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Counts {
    pub requests: AtomicU64,
    pub replies: AtomicU64,
    /// Came after the timeout, or after another reply to the same request: dropped.
    pub late: AtomicU64,
}

impl Counts {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// 128 bits of the operating system, as 32 hexadecimal digits.
fn secret() -> Result<Text> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|cause| {
        Error::new(ErrorKind::Unsupported, format!("the operating system gives no random numbers: {cause}"))
    })?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)).into())
}

fn is_secret(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Where a reply goes, and for how long it is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    mailbox: Text,
    token: Text,
    within: Duration,
}

impl Address {
    /// Of a request; `None` for any other event, and for headers that we would not have written.
    fn of(event: &Event) -> Option<Self> {
        let (mailbox, token) = header(&event.meta, REPLY_TO)?.split_once('.')?;
        let within = Duration::from_millis(header(&event.meta, REPLY_WITHIN)?.parse().ok()?).min(LONGEST);
        (is_secret(mailbox) && is_secret(token)).then(|| Self { mailbox: mailbox.into(), token: token.into(), within })
    }

    /// Makes a request of an event.
    fn write(&self, meta: &mut Meta) {
        strip(meta);
        meta.headers.push((REPLY_TO.into(), format!("{}.{}", self.mailbox, self.token).into()));
        // Rounded up: a reply that comes in the last millisecond is in time.
        let millis = self.within.as_millis() + u128::from(!self.within.subsec_nanos().is_multiple_of(1_000_000));
        meta.headers.push((REPLY_WITHIN.into(), millis.to_string().into()));
    }
}

fn header<'a>(meta: &'a Meta, name: &str) -> Option<&'a str> {
    meta.headers.iter().find(|(known, _)| **known == *name).map(|(_, value)| &**value)
}

/// Removes what belongs to the exchange and not to the event.
fn strip(meta: &mut Meta) {
    meta.headers.retain(|(name, _)| !name.starts_with(PREFIX));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::new_event;

    #[test]
    fn an_address_survives_the_way() {
        let address =
            Address { mailbox: secret().unwrap(), token: secret().unwrap(), within: Duration::from_micros(1_500) };
        let event =
            new_event("a", "1".into(), Some(br#"{"headers":{"polybus-reply-to":"x","mine":"y"}}"#), 10).unwrap();
        assert_eq!(Address::of(&event), None);
        let request = event.with_meta(|meta| address.write(meta));
        let read = Address::of(&request).unwrap();
        assert_eq!(read, Address { within: Duration::from_millis(2), ..address.clone() });
        assert_eq!(header(&request.meta, "mine"), Some("y"));
        assert_ne!(address.mailbox, address.token);
        let stripped = request.with_meta(strip);
        assert_eq!(stripped.meta.headers.len(), 1);
    }

    #[test]
    fn an_address_that_could_name_another_key_is_none() {
        for bad in ["", ".", "a.b", "../../x", &format!("{}.{}", "0".repeat(32), "G".repeat(32))] {
            let event = new_event("a", "1".into(), None, 10).unwrap().with_meta(|meta| {
                meta.headers.push((REPLY_TO.into(), bad.into()));
                meta.headers.push((REPLY_WITHIN.into(), "5".into()));
            });
            assert_eq!(Address::of(&event), None, "{bad}");
        }
    }
}
