//! From text to segments: characters, then alternatives, then the segments of each expansion.

use std::sync::Arc;

use super::path::{Path, Positions, Separator, each};
use super::segment::{Class, Glob};
use crate::error::{Error, Result};
use crate::event::{Excerpt, SEPARATORS};

/// Longest pattern, in bytes.
pub const MAX_PATTERN_LEN: usize = 255;
/// Most segments of a pattern, after expansion.
pub const MAX_SEGMENTS: usize = 32;
/// Most `**` of a pattern, after expansion.
pub const MAX_DOUBLE_STARS: usize = 3;
/// Most texts that the alternatives of a pattern may stand for.
pub const MAX_EXPANSIONS: usize = 64;

/// The rule that a pattern breaks, worded to follow "pattern …".
pub(super) type Fault = &'static str;

const TOO_MANY_EXPANSIONS: Fault = "has alternatives '{…}' that stand for more than 64 patterns";

/// A pattern without alternatives.
#[derive(Debug)]
pub(super) struct Variant(Box<[Segment]>);

#[derive(Debug)]
pub(super) struct Segment {
    pub(super) separator: Separator,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// This text.
    Exact(Box<str>),
    /// `*`: one segment.
    One,
    /// `**`: any number of segments.
    Rest,
    /// One segment that fits. Shared with the index.
    Glob(Arc<Glob>),
}

/// Compiles `text` into its expansions, all different.
pub(super) fn parse(text: &str) -> Result<Box<[Variant]>> {
    variants(text).map_err(|fault| Error::invalid_pattern(format!("pattern {:?} {fault}", Excerpt(text))))
}

fn variants(text: &str) -> Result<Box<[Variant]>, Fault> {
    if text.is_empty() {
        return Err("is empty; '**' matches every event");
    }
    if text.len() > MAX_PATTERN_LEN {
        return Err("is longer than 255 bytes");
    }
    check_characters(text.as_bytes())?;
    let mut texts = Alternatives { text, at: 0 }.sequence()?;
    texts.iter_mut().filter(|text| *text == "*").for_each(|lone_star| "**".clone_into(lone_star));
    texts.sort_unstable();
    texts.dedup();
    texts.iter().map(|text| Variant::parse(text)).collect()
}

/// Characters allowed in the segments of event types.
pub(super) fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')
}

/// Checks every character and that brackets pair up, so that what comes later may cut without looking inside classes.
fn check_characters(bytes: &[u8]) -> Result<(), Fault> {
    let (mut depth, mut at) = (0, 0);
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'[' => at += Class::parse(&bytes[at..])?.1,
            b'{' => depth += 1,
            b'}' if depth > 0 => depth -= 1,
            b']' | b'}' => return Err("closes a bracket that it did not open"),
            b',' if depth > 0 => {}
            b',' => return Err("has a ',' outside of '{…}'"),
            b'!' | b'^' => return Err("has a '!' or '^' that does not stand right after '['"),
            b'*' | b'?' => {}
            _ if is_name_byte(byte) || Separator::of(byte).is_some() => {}
            _ => return Err("has a character that is neither a wildcard nor allowed in event types"),
        }
    }
    if depth == 0 { Ok(()) } else { Err("has an unclosed '{'") }
}

/// Expands `{a,b}`. The text was checked: braces pair up, and neither they nor `,` stand in a class.
struct Alternatives<'a> {
    text: &'a str,
    at: usize,
}

impl Alternatives<'_> {
    /// Reads up to the `,` or `}` that ends this alternative, or to the end of the text.
    fn sequence(&mut self) -> Result<Vec<String>, Fault> {
        let mut texts = vec![String::new()];
        loop {
            let ahead = &self.text[self.at..];
            let literal = &ahead[..ahead.find(['{', ',', '}']).unwrap_or(ahead.len())];
            texts.iter_mut().for_each(|text| text.push_str(literal));
            self.at += literal.len();
            if !self.text[self.at..].starts_with('{') {
                return Ok(texts);
            }
            let choices = self.choices()?;
            if texts.len() * choices.len() > MAX_EXPANSIONS {
                return Err(TOO_MANY_EXPANSIONS);
            }
            texts = texts.iter().flat_map(|text| choices.iter().map(move |choice| format!("{text}{choice}"))).collect();
        }
    }

    /// Reads from `{` to behind its `}`.
    fn choices(&mut self) -> Result<Vec<String>, Fault> {
        let mut choices = Vec::new();
        while !self.text[self.at..].starts_with('}') {
            self.at += 1; // the `{` or `,` before the alternative
            choices.append(&mut self.sequence()?);
            if choices.len() > MAX_EXPANSIONS {
                return Err(TOO_MANY_EXPANSIONS);
            }
        }
        self.at += 1;
        Ok(choices)
    }
}

impl Variant {
    fn parse(text: &str) -> Result<Self, Fault> {
        let mut separator = Separator::Start;
        let mut segments = Vec::new();
        for piece in text.split_inclusive(SEPARATORS) {
            let name = piece.trim_end_matches(SEPARATORS);
            segments.push(Segment { separator, kind: Kind::parse(name)? });
            separator = piece.as_bytes().last().and_then(|&byte| Separator::of(byte)).unwrap_or(Separator::Start);
        }
        if text.is_empty() || text.ends_with(SEPARATORS) {
            return Err("has an empty segment");
        }
        if segments.len() > MAX_SEGMENTS {
            return Err("has more than 32 segments");
        }
        if segments.iter().filter(|segment| matches!(segment.kind, Kind::Rest)).count() > MAX_DOUBLE_STARS {
            return Err("has more than three '**'");
        }
        Ok(Self(segments.into()))
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.0
    }

    pub(super) fn is_exact(&self) -> bool {
        self.0.iter().all(|segment| matches!(segment.kind, Kind::Exact(_)))
    }

    /// Whether the whole of `path` matches.
    pub(super) fn matches(&self, path: &Path<'_>) -> bool {
        let mut reached: Positions = 1;
        for Segment { separator, kind } in &self.0 {
            let next = path.before(reached, *separator);
            let taken = |fits: &dyn Fn(&str) -> bool| {
                each(next).filter(|&i| fits(path.name(i))).fold(0, |taken, i| taken | 1 << i)
            };
            reached = match kind {
                Kind::Rest => path.rest(reached, *separator),
                Kind::One => next << 1,
                Kind::Exact(name) => taken(&|segment| segment == &**name) << 1,
                Kind::Glob(glob) => taken(&|segment| glob.matches(segment)) << 1,
            };
            if reached == 0 {
                return false;
            }
        }
        path.is_done(reached)
    }
}

impl Kind {
    fn parse(name: &str) -> Result<Self, Fault> {
        match name {
            "" => Err("has an empty segment"),
            "*" => Ok(Self::One),
            "**" => Ok(Self::Rest),
            _ if name.contains("**") => Err("has a '**' that is not a whole segment"),
            _ if name.contains(['*', '?', '[']) => Glob::parse(name).map(Arc::new).map(Self::Glob),
            _ => Ok(Self::Exact(name.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Pattern;
    use crate::error::ErrorKind;

    fn fault(pattern: &str) -> String {
        let error = Pattern::new(pattern).expect_err(pattern);
        assert_eq!(error.kind(), ErrorKind::InvalidPattern);
        error.message().to_owned()
    }

    #[test]
    fn each_rule_is_named() {
        let long = "a".repeat(256);
        let deep = ["a"; 33].join(".");
        let cases: &[(&str, &[&str])] = &[
            ("is empty", &[""]),
            ("longer than 255", &[&long]),
            ("neither a wildcard nor allowed", &["a b", "a\0b", "ä", "a\\b", "a.#", "$a", "a\n", "(a)", "a|b", "a+"]),
            (
                "empty segment",
                &["a..b", ".a", "a.", ".", "a.:b", "a/", "{a,}", "a.{b,}", "{,a}.b", "{}", "**.", "a.{}"],
            ),
            ("not a whole segment", &["a**", "**a", "***", "a.b**c", "a.**?", "b{*,x}*", "****"]),
            ("unclosed '['", &["[", "a[", "a.[b.c", "[a", "[!"]),
            ("unclosed '{'", &["{", "a.{b", "{a,{b}", "{[a]"]),
            ("closes a bracket", &["a]", "a}", "{a}}", "[a]]"]),
            ("empty class", &["[]", "[!]", "a.[^]", "[]a]"]),
            ("runs backwards", &["[z-a]", "a.[9-0]", "[a-Z]"]),
            (
                "with something else than letters",
                &["[a.b]", "[*]", "[{a}]", "[a,b]", "[a!]", "[ä]", "[ ]", "[[a]", "[:]"],
            ),
            ("outside of '{…}'", &["a,b", "{a},b", ","]),
            ("right after '['", &["!a", "a^", "{!a}"]),
            ("more than 32 segments", &[&deep]),
            ("more than three '**'", &["**.**.**.**", "{a,**.x.**.y.**.z.**}"]),
            ("more than 64 patterns", &["{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}", "{{a,b}{a,b}{a,b}{a,b}{a,b}{a,b},c}"]),
        ];
        for (rule, patterns) in cases {
            for pattern in *patterns {
                assert!(fault(pattern).contains(rule), "{pattern:?}: {}", fault(pattern));
            }
        }
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        let deep = ["a"; 32].join(".");
        for pattern in [&*"a".repeat(255), &deep, "**.**.**", "{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}"] {
            Pattern::new(pattern).unwrap();
        }
    }

    #[test]
    fn a_message_shows_a_short_excerpt() {
        let message = fault(&"x".repeat(10_000));
        assert!(message.contains(&"x".repeat(60)) && !message.contains(&"x".repeat(61)), "{message}");
    }

    #[test]
    fn equal_expansions_count_once() {
        let expanded = |text| Pattern::new(text).unwrap().variants().len();
        assert_eq!(
            [expanded("{b,a}.{c,{d,e.f}}"), expanded("{a,a}"), expanded("{*,**}"), expanded("a{,b}")],
            [6, 1, 1, 2]
        );
    }
}
