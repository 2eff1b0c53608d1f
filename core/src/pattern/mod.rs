//! Glob patterns over event types.
//!
//! # The language
//! A pattern is a list of segments joined by `.`, `:` or `/`, like an event type. Separators are literal: `order.*`
//! matches `order.created`, not `order:created`.
//!
//! | in a pattern | matches |
//! |---|---|
//! | `*`, a whole segment | exactly one segment |
//! | `*`, part of a segment | any run of characters in that segment, also none |
//! | `**`, always a whole segment | any number of segments, also none, whatever their separators |
//! | `?` | one character of a segment |
//! | `[a-z_]`, `[!a]`, `[^a]` | one character of a segment that is, or is not, in the class |
//! | `{a,b.c}` | either text; may nest, may hold separators |
//! | a lone `*` | every event, as `**` does |
//!
//! # Separators beside `**`
//! One rule: *a segment owns the separator written before it.* So when `**` takes segments, the first of them carries
//! the separator written before `**`, and the others carry any. The separator written after `**` belongs to the next
//! segment of the pattern and is found before that segment, however many `**` took. The first segment of an event type
//! has no separator, so nothing is asked of it when a leading `**` takes nothing.
//!
//! | pattern | matches | does not match |
//! |---|---|---|
//! | `a.**` | `a`, `a.b`, `a.b:c` | `a:b` |
//! | `a.**:z` | `a:z`, `a.b:z`, `a.b/c:z` | `a.z`, `a.b.z`, `a:b:z` |
//! | `**.z` | `z`, `a.z`, `a:b.z` | `a:z` |
//!
//! # Alternatives
//! `{…}` is expanded when the pattern is compiled; each expansion must be a pattern in its own right, and the pattern
//! matches what any of them matches. Hence `{*,a}` matches every event, and `a.{b,}` is refused: `a.` ends with an
//! empty segment. [`MAX_EXPANSIONS`] bounds the product.
//!
//! # How matching works
//! A position is a count of segments taken so far. A search keeps the *set* of positions it may be at, as the bits of
//! one integer (an event type has at most 100 segments), and moves the whole set over one pattern segment at a time.
//! There is no backtracking between segments, so several `**` cost no more than one. [`PatternIndex`] does the same
//! for all live patterns together, in a trie.

mod index;
mod parse;
mod path;
mod segment;

use std::fmt;
use std::sync::Arc;

pub use self::index::PatternIndex;
pub use self::parse::{MAX_DOUBLE_STARS, MAX_EXPANSIONS, MAX_PATTERN_LEN, MAX_SEGMENTS};

use self::parse::Variant;
use self::path::Path;
use crate::error::Result;
use crate::event::Text;

/// A compiled pattern. Cheap to clone; equal when written the same.
#[derive(Clone)]
pub struct Pattern(Arc<Compiled>);

struct Compiled {
    text: Text,
    variants: Box<[Variant]>,
}

impl Pattern {
    /// Compiles `text`. The error, of kind `InvalidPattern`, says which rule the text breaks.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        let text = text.as_ref();
        let variants = parse::parse(text)?;
        Ok(Self(Arc::new(Compiled { text: text.into(), variants })))
    }

    /// Whether `event_type` matches.
    ///
    /// Text that is longer than an event type may be, or has an empty segment, matches nothing.
    pub fn matches(&self, event_type: &str) -> bool {
        Path::split(event_type).is_some_and(|path| self.0.variants.iter().any(|variant| variant.matches(&path)))
    }

    /// The text it was compiled from.
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// Whether it names one event type, without wildcards or alternatives.
    pub fn is_exact(&self) -> bool {
        matches!(&*self.0.variants, [only] if only.is_exact())
    }

    /// Its expansions, all different.
    fn variants(&self) -> &[Variant] {
        &self.0.variants
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.text == other.0.text
    }
}

impl Eq for Pattern {}

impl std::hash::Hash for Pattern {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.text.hash(state);
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.as_str())
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Pattern {
    type Err = crate::error::Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pattern: &str, hits: &[&str], misses: &[&str]) {
        let compiled = Pattern::new(pattern).unwrap();
        for hit in hits {
            assert!(compiled.matches(hit), "{pattern} must match {hit}");
        }
        for miss in misses {
            assert!(!compiled.matches(miss), "{pattern} must not match {miss}");
        }
    }

    #[test]
    fn separators_are_literal() {
        check("order.created", &["order.created"], &["order:created", "order/created", "order", "order.created.x"]);
        check("order.*", &["order.created", "order.x-y_Z9"], &["order:created", "order", "order.item.created"]);
        check("a:*/c", &["a:b/c"], &["a.b/c", "a:b.c", "a:/c"]);
    }

    #[test]
    fn wildcards_stay_inside_their_segment() {
        check("order.cre*", &["order.cre", "order.created"], &["order.cre.x", "order.xcre"]);
        check("order-?", &["order-1"], &["order-", "order-12", "order.1", "order:1"]);
        check("v[0-9].[!a]x", &["v1.bx", "v9._x"], &["v1.ax", "va.bx", "v1bx", "v1.x"]);
        check("v[^0-9]", &["va"], &["v1", "v."]);
        check("[_-][-_]", &["--", "_-"], &["a-"]);
    }

    #[test]
    fn a_lone_star_matches_every_event() {
        for pattern in ["*", "**", "{*,a.b}", "**.**"] {
            check(pattern, &["a", "a.b", "a:b/c.d"], &[]);
        }
        check("*.*", &["a.b"], &["a", "a:b", "a.b.c"]);
    }

    #[test]
    fn any_number_of_segments() {
        check("public.**", &["public", "public.a", "public.a.b", "public.a:b/c"], &["publicx", "x.public", "public:a"]);
        check("a.**.z", &["a.z", "a.b.z", "a.b:c.z", "a.z.z"], &["a:z", "a:b.z", "a.b:z", "a", "a.z.b"]);
        check("a.**:z", &["a:z", "a.b:z", "a.b/c:z"], &["a.z", "a.b.z", "a:b:z"]);
        check("**.z", &["z", "a.z", "a:b.z"], &["a:z", "z.a", "az"]);
        check("**/a.**", &["a", "a.b", "x/a", "x:y/a.b:c"], &["x.a", "a:b", "x/a/b"]);
        check("**.**:z", &["z", "a:z", "a.b:z", "a/b:z"], &["a.z"]);
        check("**.*", &["a", "a.b", "a:b.c"], &["a:b"]);
        check("a.**.**:**", &["a", "a.b", "a:b", "a.b:c", "a:b.c"], &["a/b"]);
    }

    #[test]
    fn alternatives_nest_and_hold_separators() {
        check("{a,b.{c,d}}.x", &["a.x", "b.c.x", "b.d.x"], &["b.x", "a.c.x"]);
        check("order{,.paid}", &["order", "order.paid"], &["order.", "orderpaid"]);
        check("order{.,:}paid", &["order.paid", "order:paid"], &["order/paid"]);
    }

    #[test]
    fn text_that_is_no_event_type_matches_nothing() {
        check("*", &[&"a".repeat(200)], &["", ".", "a.", ".a", "a..b", "a.:b", &"a".repeat(201), &".".repeat(200)]);
        check("?", &[], &["", "."]);
    }

    #[test]
    fn the_longest_event_types_match() {
        let hundred = ["a"; 100].join(".");
        check("a.**.a", &[&hundred], &[]);
        check("**.a.**.a.**", &[&hundred], &[]);
        check("**.b", &[], &[&hundred]);
    }

    #[test]
    fn patterns_compare_by_text() {
        let pattern = Pattern::new("{a}").unwrap();
        assert_eq!(pattern, pattern.clone());
        assert_ne!(pattern, Pattern::new("a").unwrap());
        assert_eq!(format!("{pattern} {pattern:?}"), "{a} Pattern(\"{a}\")");
        assert!(Pattern::new("a.b").unwrap().is_exact() && !Pattern::new("a.*").unwrap().is_exact());
    }
}
