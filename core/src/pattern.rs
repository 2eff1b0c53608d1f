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

/// Many patterns, matched at once.
#[derive(Debug)]
pub struct PatternIndex<T>(Vec<(Pattern, T)>);

impl<T> Default for PatternIndex<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy + Eq> PatternIndex<T> {
    /// Adds `id` under `pattern`.
    pub fn insert(&mut self, pattern: &Pattern, id: T) {
        self.0.push((pattern.clone(), id));
    }
    /// Removes it.
    pub fn remove(&mut self, pattern: &Pattern, id: T) {
        self.0.retain(|(other, known)| other.as_str() != pattern.as_str() || *known != id);
    }
    /// Adds the ids that match.
    pub fn matches(&self, event_type: &str, ids: &mut Vec<T>) {
        ids.extend(self.0.iter().filter(|(pattern, _)| pattern.matches(event_type)).map(|(_, id)| *id));
    }
}
