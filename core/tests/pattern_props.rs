//! `Pattern` and `PatternIndex` against a naive matcher that shares no code with them.

use polybus_core::pattern::{Pattern, PatternIndex};
use proptest::prelude::*;

mod naive {
    //! The definition, word for word: expand, cut, try everything.

    /// All texts that the braces stand for.
    fn expand(pattern: &str) -> Vec<String> {
        let Some(open) = pattern.find('{') else { return vec![pattern.to_owned()] };
        let (mut depth, mut cuts, mut close) = (0, vec![open], 0);
        for (at, c) in pattern.char_indices().skip(open) {
            match c {
                '{' => depth += 1,
                '}' if depth == 1 => {
                    close = at;
                    break;
                }
                '}' => depth -= 1,
                ',' if depth == 1 => cuts.push(at),
                _ => {}
            }
        }
        cuts.push(close);
        let choices = cuts.windows(2).map(|cut| &pattern[cut[0] + 1..cut[1]]);
        choices.flat_map(|choice| expand(&format!("{}{choice}{}", &pattern[..open], &pattern[close + 1..]))).collect()
    }

    /// Segments, each with the separator before it.
    fn cut(text: &str) -> Vec<(Option<char>, &str)> {
        let mut separator = None;
        text.split_inclusive(['.', ':', '/'])
            .map(|piece| {
                let name = piece.trim_end_matches(['.', ':', '/']);
                let before = separator;
                separator = piece.chars().nth(name.len());
                (before, name)
            })
            .collect()
    }

    fn one(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern, text) {
            ([], _) => text.is_empty(),
            ([b'*', tail @ ..], _) => (0..=text.len()).any(|taken| one(tail, &text[taken..])),
            (_, []) => false,
            ([b'?', tail @ ..], [_, rest @ ..]) => one(tail, rest),
            ([b'[', tail @ ..], [c, rest @ ..]) => {
                let end = tail.iter().position(|b| *b == b']').expect("the pattern is valid");
                let (negated, items) = match &tail[..end] {
                    [b'!' | b'^', items @ ..] => (true, items),
                    items => (false, items),
                };
                let inside = match items {
                    [low, b'-', high] => (low..=high).contains(&c),
                    items => items.contains(c),
                };
                inside != negated && one(&tail[end + 1..], rest)
            }
            ([p, tail @ ..], [c, rest @ ..]) => p == c && one(tail, rest),
        }
    }

    fn all(pattern: &[(Option<char>, &str)], text: &[(Option<char>, &str)]) -> bool {
        // The first segment of a type has no separator: any that the pattern wrote fits.
        let joins = |separator: Option<char>| text.first().is_some_and(|(own, _)| own.is_none() || *own == separator);
        match pattern {
            [] => text.is_empty(),
            [(separator, "**"), tail @ ..] => {
                let longest = if joins(*separator) { text.len() } else { 0 };
                (0..=longest).any(|taken| all(tail, &text[taken..]))
            }
            [(separator, name), tail @ ..] => {
                joins(*separator) && one(name.as_bytes(), text[0].1.as_bytes()) && all(tail, &text[1..])
            }
        }
    }

    pub fn matches(pattern: &str, event_type: &str) -> bool {
        expand(pattern).iter().any(|pattern| pattern == "*" || all(&cut(pattern), &cut(event_type)))
    }
}

/// Few letters and segments, so that patterns and types meet often.
fn event_type() -> impl Strategy<Value = String> {
    "[abc]{1,3}([.:/][abc]{1,3}){0,5}"
}

fn pattern() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        4 => "[abc]{1,2}",
        2 => Just("*".to_owned()),
        2 => Just("**".to_owned()),
        2 => "[abc]?(\\*[abc]|\\?|\\[[!^]?[abc]{1,2}\\]|\\[a-c\\])\\*?",
        1 => "\\{[abc]{1,2},[abc]?\\*?[abc]([.:/][abc*])?(,\\{a,b\\}c?)?\\}",
    ];
    let separator = prop_oneof![6 => Just("."), 1 => Just(":"), 1 => Just("/")];
    (name.clone(), prop::collection::vec((separator, name), 0..5))
        .prop_map(|(first, others)| others.iter().fold(first, |text, (separator, name)| text + separator + name))
        .prop_filter("no more than three **", |text| Pattern::new(text).is_ok())
}

fn found(index: &PatternIndex<u64>, event_type: &str) -> Vec<u64> {
    let mut matching = Vec::new();
    index.matches(event_type, &mut matching);
    matching.sort_unstable();
    matching
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pattern_agrees_with_the_definition(pattern in pattern(), types in prop::collection::vec(event_type(), 20)) {
        let compiled = Pattern::new(&pattern).unwrap();
        for event_type in types {
            prop_assert_eq!(compiled.matches(&event_type), naive::matches(&pattern, &event_type), "{} {}", pattern, event_type);
        }
    }

    #[test]
    fn wildcards_agree_with_globset(
        glob in "[ab_]?(\\*|\\?|\\[[!^]?[ab_]{1,3}\\]|\\[a-c\\]|[abc-]){1,6}",
        segments in prop::collection::vec("[abc_-]{1,6}", 20),
    ) {
        prop_assume!(!glob.contains("**") && glob != "*");
        let oracle = globset::Glob::new(&glob).unwrap().compile_matcher();
        let compiled = Pattern::new(&glob).unwrap();
        for segment in segments {
            prop_assert_eq!(compiled.matches(&segment), oracle.is_match(&segment), "{} {}", glob, segment);
        }
    }

    #[test]
    fn index_agrees_with_the_definition(
        patterns in prop::collection::vec(pattern(), 1..40),
        types in prop::collection::vec(event_type(), 20),
    ) {
        let mut index = PatternIndex::new();
        for (id, pattern) in (0..).zip(&patterns) {
            index.insert(&Pattern::new(pattern).unwrap(), id);
        }
        for event_type in types {
            let expected: Vec<u64> =
                (0..).zip(&patterns).filter(|(_, p)| naive::matches(p, &event_type)).map(|(id, _)| id).collect();
            prop_assert_eq!(found(&index, &event_type), expected, "{:?} {}", patterns, event_type);
        }
    }

    /// After any changes the index equals one that was made of what is left.
    #[test]
    fn changes_leave_nothing_behind(
        patterns in prop::collection::vec(pattern(), 8),
        changes in prop::collection::vec((any::<bool>(), 0..8usize, 0..4u64), 0..80),
        types in prop::collection::vec(event_type(), 20),
    ) {
        let patterns: Vec<_> = patterns.iter().map(|text| Pattern::new(text).unwrap()).collect();
        let (mut index, mut live) = (PatternIndex::new(), Vec::new());
        for (insert, pattern, id) in changes {
            let known = live.iter().position(|entry| *entry == (pattern, id));
            match known {
                _ if insert => {
                    index.insert(&patterns[pattern], id);
                    live.push((pattern, id));
                }
                Some(known) => {
                    live.swap_remove(known);
                    prop_assert!(index.remove(&patterns[pattern], id));
                }
                None => {}
            }
        }
        let mut fresh = PatternIndex::new();
        live.iter().for_each(|(pattern, id)| fresh.insert(&patterns[*pattern], *id));
        prop_assert_eq!(index.node_count(), fresh.node_count());
        prop_assert_eq!(index.len(), fresh.len());
        for event_type in types {
            let mut expected: Vec<u64> =
                live.iter().filter(|(p, _)| naive::matches(patterns[*p].as_str(), &event_type)).map(|(_, id)| *id).collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(found(&index, &event_type), &*expected);
            prop_assert_eq!(found(&fresh, &event_type), expected);
        }
    }

    /// Any text at all is compiled or refused, and never panics.
    #[test]
    fn any_text_is_compiled_or_refused(text in "[ab.:/*?!^{},\\[\\]-]{0,40}|\\PC{0,20}", event_type in "\\PC{0,20}") {
        if let Ok(pattern) = Pattern::new(&text) {
            pattern.matches(&event_type);
            let mut index = PatternIndex::new();
            index.insert(&pattern, 1u64);
            prop_assert_eq!(found(&index, &event_type).len() == 1, pattern.matches(&event_type));
        }
    }
}
