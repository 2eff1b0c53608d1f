//! All live patterns together, searched at once.
//!
//! A trie of pattern segments: a node stands for the start of some patterns and holds the ids of those that end there.
//! Nodes live in an arena and name each other by number; removed nodes go to a free list and are used again.
//!
//! Edges by exact name are entries of one hash table for the whole trie, which stores only the number of the child; the
//! child knows its parent and its name. So an edge takes five bytes, and most look-ups that fail end in the cache. A
//! name of an event type is hashed once, however many nodes look for it: the hash of an edge mixes the hash of the name
//! with the node. The other edges (`*`, `**`, wildcards inside a segment) hang on the node; most nodes have none.
//!
//! A search carries a set of positions from node to node (see [`super`]). Each node has one way in, and all positions
//! that reach it arrive together, so a search visits a node at most once and only if the start of the type fits it:
//! the cost follows from what matches, not from how many patterns live, and several `**` cannot multiply.

mod node;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;

use ahash::RandomState;
use hashbrown::HashTable;

use self::node::{Globs, Ids, Name, Node, NodeId, ROOT, edge_hash};
use super::Pattern;
use super::parse::{Kind, Segment, Variant};
use super::path::{MAX_TYPE_SEGMENTS, Path, Positions, Separator, each};

/// Which of many patterns match an event type. An id stands for whatever the caller keeps: a subscription, say.
///
/// One id may have several patterns, and one pattern several ids. Changes need `&mut self`; searches share `&self`.
#[derive(Clone)]
pub struct PatternIndex<T> {
    nodes: Vec<Node<T>>,
    free: Vec<NodeId>,
    /// Children by exact name.
    edges: HashTable<NodeId>,
    /// Keyed at random, so that nobody can choose names that collide.
    hasher: RandomState,
    /// How many entries each id has.
    ids: HashMap<T, u32, RandomState>,
}

impl<T: Copy + Ord + Hash> PatternIndex<T> {
    /// An empty index.
    pub fn new() -> Self {
        Self {
            nodes: vec![Node::default()],
            free: Vec::new(),
            edges: HashTable::new(),
            hasher: RandomState::new(),
            ids: HashMap::default(),
        }
    }

    /// Makes `id` match what `pattern` matches.
    ///
    /// Insertions count: what was inserted twice lives until it is removed twice.
    pub fn insert(&mut self, pattern: &Pattern, id: T) {
        for variant in pattern.variants() {
            let end = variant.segments().iter().fold(ROOT, |node, segment| self.child_or_new(node, segment));
            let entries = self.ids.entry(id).or_insert(0);
            *entries += 1;
            let node = &mut self.nodes[end as usize];
            // Of the entries of one id at most one, its first, stands at an unmarked node. So a search that met the
            // id twice also met a mark, and only then it pays for telling ids apart.
            node.repeats |= *entries > 1;
            node.ids.insert(id);
        }
    }

    /// Undoes one [`insert`](Self::insert) of the same pattern and id. Returns false, and changes nothing, if there
    /// was none.
    pub fn remove(&mut self, pattern: &Pattern, id: T) -> bool {
        let holds = |variant: &Variant| {
            let end = variant.segments().iter().try_fold(ROOT, |node, segment| self.child(node, segment));
            end.is_some_and(|end| self.nodes[end as usize].ids.as_slice().binary_search(&id).is_ok())
        };
        if !pattern.variants().iter().all(holds) {
            return false;
        }
        pattern.variants().iter().for_each(|variant| self.remove_variant(variant, id));
        if self.ids.is_empty() {
            // The free list keeps the arena's memory for later; when nothing lives, it is given back.
            *self = Self::new();
        }
        true
    }

    /// Fills `matching` with the ids whose pattern matches `event_type`: each id once, in no particular order.
    ///
    /// What `matching` held before is dropped, so that one vector can serve many searches without allocating.
    pub fn matches(&self, event_type: &str, matching: &mut Vec<T>) {
        matching.clear();
        let Some(path) = Path::split(event_type) else { return };
        // Clearing room for the longest type would take a short one as long as the search itself.
        let repeats = match path.len() {
            0..=8 => Search::<T, 8>::run(self, &path, matching),
            _ => Search::<T, MAX_TYPE_SEGMENTS>::run(self, &path, matching),
        };
        if repeats {
            matching.sort_unstable();
            matching.dedup();
        }
    }

    /// How many ids have a pattern.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether no id has a pattern.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// How many nodes the trie has, the root included: a measure of the memory in use.
    pub fn node_count(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    fn child(&self, node: NodeId, Segment { separator, kind }: &Segment) -> Option<NodeId> {
        let wild = self.nodes[node as usize].wild.as_deref();
        let at = *separator as usize;
        let child = match kind {
            Kind::Exact(name) => self.exact_child(node, *separator, name, self.hasher.hash_one(name.as_bytes()))?,
            Kind::One => wild?.one[at],
            Kind::Rest => wild?.rest[at],
            Kind::Glob(glob) => wild?.globs.as_ref()?[at].get(glob)?,
        };
        (child != ROOT).then_some(child)
    }

    fn exact_child(&self, parent: NodeId, separator: Separator, name: &str, name_hash: u64) -> Option<NodeId> {
        let is_it = |child: &NodeId| {
            let child = &self.nodes[*child as usize];
            child.parent == parent && child.separator == separator && child.name.as_bytes() == name.as_bytes()
        };
        self.edges.find(edge_hash(parent, separator, name_hash), is_it).copied()
    }

    fn child_or_new(&mut self, node: NodeId, segment: &Segment) -> NodeId {
        if let Some(child) = self.child(node, segment) {
            return child;
        }
        let child = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(Node::default());
            self.nodes.len() as NodeId - 1
        });
        let parent = &mut self.nodes[node as usize];
        let at = segment.separator as usize;
        match &segment.kind {
            Kind::Exact(name) => {
                parent.exact += 1;
                let child_node = &mut self.nodes[child as usize];
                (child_node.parent, child_node.separator, child_node.name) = (node, segment.separator, Name::new(name));
                let hash = |child: &NodeId| self.nodes[*child as usize].edge_hash(&self.hasher);
                self.edges.insert_unique(hash(&child), child, hash);
            }
            Kind::One => parent.wild.get_or_insert_default().one[at] = child,
            Kind::Rest => parent.wild.get_or_insert_default().rest[at] = child,
            Kind::Glob(glob) => {
                let wild = parent.wild.get_or_insert_default();
                wild.globs.get_or_insert_default()[at].insert(glob, child);
            }
        }
        child
    }

    /// Removes an entry that is known to be there, then every node that nothing needs any more, from the end upwards.
    fn remove_variant(&mut self, variant: &Variant, id: T) {
        let mut way = vec![ROOT];
        for segment in variant.segments() {
            let Some(child) = way.last().and_then(|node| self.child(*node, segment)) else { return };
            way.push(child);
        }
        let Some(end) = way.last().map(|end| &mut self.nodes[*end as usize]) else { return };
        end.ids.remove(id);
        end.repeats &= !matches!(end.ids, Ids::None);
        if let Some(entries) = self.ids.get_mut(&id) {
            *entries -= 1;
            if *entries == 0 {
                self.ids.remove(&id);
            }
        }
        for (segment, pair) in variant.segments().iter().zip(way.windows(2)).rev() {
            let [parent, child] = [pair[0], pair[1]];
            if !self.nodes[child as usize].is_unused() {
                return;
            }
            self.unlink(parent, segment, child);
            self.nodes[child as usize] = Node::default();
            self.free.push(child);
        }
    }

    fn unlink(&mut self, parent: NodeId, Segment { separator, kind }: &Segment, child: NodeId) {
        let hash = self.nodes[child as usize].edge_hash(&self.hasher);
        let parent = &mut self.nodes[parent as usize];
        if let Kind::Exact(_) = kind {
            parent.exact -= 1;
            if let Ok(edge) = self.edges.find_entry(hash, |other| *other == child) {
                edge.remove();
            }
        } else if let Some(wild) = &mut parent.wild {
            let at = *separator as usize;
            match kind {
                Kind::One => wild.one[at] = ROOT,
                Kind::Rest => wild.rest[at] = ROOT,
                Kind::Glob(glob) => wild.remove_glob(at, glob),
                Kind::Exact(_) => {}
            }
            if wild.is_unused() {
                parent.wild = None;
            }
        }
    }
}

/// One search in a type of at most `N` segments. `visit` goes down the trie and never comes to a node twice.
struct Search<'a, T, const N: usize> {
    index: &'a PatternIndex<T>,
    path: &'a Path<'a>,
    hashes: [u64; N],
    matching: &'a mut Vec<T>,
    repeats: bool,
}

impl<'a, T: Copy + Ord + Hash, const N: usize> Search<'a, T, N> {
    /// Appends what matches; returns whether an id may be there twice.
    fn run(index: &'a PatternIndex<T>, path: &'a Path<'a>, matching: &'a mut Vec<T>) -> bool {
        let mut hashes = [0; N];
        hashes.iter_mut().zip(path.names()).for_each(|(hash, name)| *hash = index.hasher.hash_one(name.as_bytes()));
        let mut search = Self { index, path, hashes, matching, repeats: false };
        search.visit(ROOT, 1);
        search.repeats
    }

    /// Goes on from `id`, where the type may be at any of the positions `reached`.
    fn visit(&mut self, id: NodeId, reached: Positions) {
        let node = &self.index.nodes[id as usize];
        if self.path.is_done(reached) {
            match &node.ids {
                Ids::None => {}
                Ids::One(id) => self.matching.push(*id),
                Ids::Many(ids) => self.matching.extend_from_slice(ids),
            }
            self.repeats |= node.repeats;
        }
        if node.exact > 0 {
            self.visit_exact(id, self.path.open(reached));
        }
        let Some(wild) = &node.wild else { return };
        for separator in Separator::ALL {
            let at = separator as usize;
            let next = self.path.before(reached, separator);
            if wild.rest[at] != ROOT {
                self.visit(wild.rest[at], self.path.rest(reached, separator));
            }
            if next != 0 && wild.one[at] != ROOT {
                self.visit(wild.one[at], next << 1);
            }
            if let Some(globs) = &wild.globs
                && next != 0
            {
                self.visit_globs(&globs[at], next);
            }
        }
    }

    fn visit_exact(&mut self, id: NodeId, mut open: Positions) {
        if id != ROOT && open & 1 == 1 {
            // A leading `**` took nothing: the pattern has a separator here, the type has none, so any fits.
            for separator in Separator::WRITTEN {
                open &= !self.follow(id, separator, 0, open);
            }
            open &= !1;
        }
        while open != 0 {
            let i = open.trailing_zeros() as usize;
            open &= !(self.follow(id, self.path.separator(i), i, open) | 1 << i);
        }
    }

    /// Visits the child that segment `i` leads to behind `separator`, if any, and returns the positions that lead
    /// there: `i`, and those of `open` with an equal segment. They must go together, or each would visit the child.
    fn follow(&mut self, id: NodeId, separator: Separator, i: usize, open: Positions) -> Positions {
        let (name, hash) = (self.path.name(i), self.hashes[i]);
        let Some(child) = self.index.exact_child(id, separator, name, hash) else { return 0 };
        let others = self.path.before(open, separator) & !(1 << i);
        let equal = |&j: &usize| self.hashes[j] == hash && self.path.name(j) == name;
        let same = each(others).filter(equal).fold(1 << i, |same, j| same | 1 << j);
        self.visit(child, same << 1);
        same
    }

    fn visit_globs(&mut self, globs: &Globs, next: Positions) {
        let mut hits: Vec<(NodeId, Positions)> = Vec::new();
        for i in each(next) {
            globs.each_match(self.path.name(i), |child| hits.push((child, 2 << i)));
        }
        // Together again, as in `follow`.
        hits.sort_unstable();
        for hits in hits.chunk_by(|a, b| a.0 == b.0) {
            self.visit(hits[0].0, hits.iter().fold(0, |reached, hit| reached | hit.1));
        }
    }
}

impl<T: Copy + Ord + Hash> Default for PatternIndex<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for PatternIndex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PatternIndex").field("ids", &self.ids.len()).field("nodes", &self.nodes.len()).finish()
    }
}
