//! What one event has in common with the one before it: its text is shared, not made anew.
//!
//! Events come in runs of one type, one source, one process and often one millisecond. Making each of these texts for each
//! event cost more than finding them in it.

use std::borrow::Cow;
use std::cell::RefCell;

use crate::error::Result;
use crate::event::{EventType, Text};

/// A member of which the last text is remembered.
#[derive(Clone, Copy)]
pub(super) enum Member {
    Timestamp,
    Source,
    Correlation,
    Instance,
}

/// Longer texts are not remembered.
const LONGEST: usize = 128;

thread_local! {
    static TEXTS: RefCell<[Option<Text>; 4]> = const { RefCell::new([const { None }; 4]) };
    static TYPE: RefCell<Option<EventType>> = const { RefCell::new(None) };
}

/// `found` as a text that is shared with the last event's, if that says the same.
pub(super) fn text(member: Member, found: Cow<str>) -> Text {
    TEXTS.with_borrow_mut(|texts| {
        let last = &mut texts[member as usize];
        match last {
            Some(last) if **last == *found => last.clone(),
            _ if found.len() > LONGEST => found.into(),
            _ => last.insert(found.into()).clone(),
        }
    })
}

/// The same for the type, which needs no check then.
pub(super) fn event_type(found: &str) -> Result<EventType> {
    TYPE.with_borrow_mut(|last| match last {
        Some(last) if last.as_str() == found => Ok(last.clone()),
        _ => Ok(last.insert(EventType::new(found)?).clone()),
    })
}
