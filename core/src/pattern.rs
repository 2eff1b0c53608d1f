//! Glob patterns over event types.
use crate::error::Result;
use crate::event::Text;

/// A compiled pattern.
#[derive(Debug, Clone)]
pub struct Pattern {
    text: Text,
}

impl Pattern {
    /// Compiles `text`.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        Ok(Self { text: text.as_ref().into() })
    }
    /// Whether `event_type` matches.
    pub fn matches(&self, event_type: &str) -> bool {
        *self.text == *event_type
    }
    /// The text it was compiled from.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}
