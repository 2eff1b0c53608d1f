use std::time::Instant;

use super::*;

fn pattern(text: &str) -> Pattern {
    Pattern::new(text).unwrap()
}

fn index(patterns: &[&str]) -> PatternIndex<usize> {
    let mut index = PatternIndex::new();
    patterns.iter().enumerate().for_each(|(id, text)| index.insert(&pattern(text), id));
    index
}

/// Sorted, but not made unique: a repeated id must show.
fn found<T: Copy + Ord + Hash>(index: &PatternIndex<T>, event_type: &str) -> Vec<T> {
    let mut matching = Vec::new();
    index.matches(event_type, &mut matching);
    matching.sort_unstable();
    matching
}

#[test]
fn finds_every_kind_of_segment() {
    let index =
        index(&["a.b", "a.*", "a.**", "**", "*", "*.b", "a:b", "a.b*", "a.[b-d]", "**.b", "{a,x}.b", "a.b.**.c"]);
    assert_eq!(found(&index, "a.b"), [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]);
    assert_eq!(found(&index, "a:b"), [3, 4, 6]);
    assert_eq!(found(&index, "b"), [3, 4, 9]);
    assert_eq!(found(&index, "a.b.c"), [2, 3, 4, 11]);
    assert!(found(&index, "a..b").is_empty());
}

#[test]
fn an_id_comes_once_however_it_matches() {
    let mut index = index(&["{a.*,*.b,**}"]);
    assert_eq!(found(&index, "a.b"), [0]);
    for text in ["**.a.**", "a.**", "**.a.**.a.**"] {
        index.insert(&pattern(text), 7);
    }
    assert_eq!(found(&index, "a.a.a.a"), [0, 7]);
    assert!(index.remove(&pattern("**.a.**"), 7));
    assert_eq!(found(&index, "a.a.a.a"), [0, 7]);
    assert_eq!(index.len(), 2);
}

#[test]
fn insertions_count() {
    let mut index = PatternIndex::new();
    index.insert(&pattern("{a,b}"), 1);
    index.insert(&pattern("b"), 1);
    assert_eq!(found(&index, "b"), [1]);
    assert!(index.remove(&pattern("{a,b}"), 1));
    assert_eq!((found(&index, "a"), found(&index, "b")), (vec![], vec![1]));
    assert!(!index.remove(&pattern("{a,b}"), 1) && index.remove(&pattern("b"), 1) && !index.remove(&pattern("b"), 1));
    assert!(index.is_empty());
}

#[test]
fn what_is_not_there_cannot_be_removed() {
    let mut index = index(&["a.b", "a.x*"]);
    for (text, id) in [("a.b", 1), ("a", 0), ("a.*", 0), ("a.**", 0), ("a.x?", 1), ("a.b.c", 0), ("{a.b,c}", 0)] {
        assert!(!index.remove(&pattern(text), id), "{text}");
    }
    assert_eq!((found(&index, "a.b"), found(&index, "a.xy")), (vec![0], vec![1]));
}

#[test]
fn removing_gives_nodes_back() {
    let texts = ["a.b.c", "a.*.c", "a.**.d", "a.x*.y", "a.x*.z", "a.xy?", "{a,b}:q", "**.b", "**"];
    let mut index = index(&texts[..1]);
    let nodes = index.node_count();
    for _ in 0..3 {
        texts[1..].iter().for_each(|text| index.insert(&pattern(text), 9));
        assert!(texts[1..].iter().rev().all(|text| index.remove(&pattern(text), 9)));
        assert_eq!((index.node_count(), index.edges.len()), (nodes, 3));
    }
    let slots = index.nodes.len();
    texts[1..].iter().for_each(|text| index.insert(&pattern(text), 9));
    assert_eq!(index.nodes.len(), slots, "the free list is used first");
    texts[1..].iter().for_each(|text| assert!(index.remove(&pattern(text), 9)));
    assert!(index.remove(&pattern(texts[0]), 0));
    assert_eq!((index.nodes.len(), index.free.len(), index.edges.len()), (1, 0, 0));
}

#[test]
fn globs_are_found_by_their_start() {
    let mut index = index(&["x.a*", "x.ab*", "x.abc*", "x.ac*", "x.*d", "x.[a-c]b*", "x.b*", "x.abd*", "x.ab?d"]);
    assert_eq!(found(&index, "x.abcd"), [0, 1, 2, 4, 5, 8]);
    assert_eq!(found(&index, "x.ad"), [0, 4]);
    assert!(found(&index, "x.zz").is_empty());
    assert_eq!(found(&index, "x.acd"), [0, 3, 4]);
    assert!(index.remove(&pattern("x.ab*"), 1));
    assert_eq!(found(&index, "x.abcd"), [0, 2, 4, 5, 8]);
}

/// Live patterns that cannot match must not cost time; the bound is loose, a scan of all would take milliseconds.
#[test]
fn a_hundred_thousand_globs_are_not_scanned() {
    let mut index = PatternIndex::new();
    (0..100_000).for_each(|i| index.insert(&pattern(&format!("tenant-{i}-*.created")), i));
    let started = Instant::now();
    for _ in 0..100 {
        assert_eq!(found(&index, "tenant-4711-eu.created"), [4711]);
    }
    assert!(started.elapsed().as_millis() < 100, "{:?}", started.elapsed());
}

/// With backtracking, each of these would take n³ steps and the pattern with names in between far more.
#[test]
fn several_rests_do_not_multiply() {
    let rest = "**.a.*.a.**.a.a.**.a.a?*";
    let texts: Vec<_> =
        (0..26).map(|i| format!("{}{}", "*.".repeat(i % 8), rest.replace("?", &"?".repeat(i / 8)))).collect();
    let index = index(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let event_type = ["a"; 100].join(".");
    let started = Instant::now();
    for _ in 0..20 {
        assert_eq!(found(&index, &event_type), (0..8).collect::<Vec<_>>());
    }
    assert!(started.elapsed().as_millis() < 1000, "{:?}", started.elapsed());
}

#[test]
fn a_search_visits_a_node_once() {
    let index = index(&["**.a.**.a.**.a", "**.a*.**.?.**", "a.**:a.**"]);
    let event_type = format!("a{}:a", ".a".repeat(97));
    // An id stands at one node; met twice through that node, it would be listed twice.
    assert_eq!(found(&index, &event_type), [1, 2]);
    assert_eq!(found(&index, &["a"; 100].join(".")), [0, 1]);
}

#[test]
fn a_node_fits_a_cache_line() {
    assert_eq!(size_of::<Node<u64>>(), 64);
}

#[test]
fn names_of_any_length_are_kept() {
    let texts: Vec<_> = (1..=100).map(|len| "x".repeat(len)).collect();
    let index = index(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    for (id, text) in texts.iter().enumerate() {
        assert_eq!(found(&index, text), [id]);
    }
}
