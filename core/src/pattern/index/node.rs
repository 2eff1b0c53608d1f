//! What a [`PatternIndex`](super::PatternIndex) is made of: nodes, and the edges that hang on them.

use std::collections::BTreeMap;
use std::ops::Bound::{Included, Unbounded};
use std::sync::Arc;

use ahash::RandomState;

use super::super::path::Separator;
use super::super::segment::Glob;

/// Number of a node. 32 bits suffice: that many nodes would not fit in memory.
pub(super) type NodeId = u32;

/// The root; it is nobody's child, so its number also stands for "no child".
pub(super) const ROOT: NodeId = 0;

/// A search touches a few nodes here and there in a large arena and waits for the memory most of its time. Hence a node
/// fits one cache line, with its name and its one id in place.
#[derive(Clone)]
#[repr(align(64))]
pub(super) struct Node<T> {
    /// The patterns that end here.
    pub(super) ids: Ids<T>,
    /// The way here, if it is an edge by exact name.
    pub(super) name: Name,
    pub(super) parent: NodeId,
    pub(super) separator: Separator,
    /// Whether a search may have met one of `ids` before. See [`insert`](super::PatternIndex::insert).
    pub(super) repeats: bool,
    /// Edges by exact name.
    pub(super) exact: u32,
    /// Other edges.
    pub(super) wild: Option<Box<Wild>>,
}

/// Ids, sorted; an id inserted twice is here twice. Several are boxed twice, to keep the usual none or one small.
#[derive(Clone)]
pub(super) enum Ids<T> {
    None,
    One(T),
    #[allow(clippy::box_collection, reason = "a vector would make every node larger than a cache line")]
    Many(Box<Vec<T>>),
}

/// The name of a segment, in place if it is not long.
#[derive(Clone)]
pub(super) enum Name {
    Short { len: u8, bytes: [u8; Name::SHORT] },
    Long(Box<str>),
}

/// Edges with wildcards; where there is one per separator, the separator is the index.
#[derive(Clone, Default)]
pub(super) struct Wild {
    pub(super) one: [NodeId; 4],
    pub(super) rest: [NodeId; 4],
    pub(super) globs: Option<Box<[Globs; 4]>>,
}

/// Edges with wildcards inside the segment, by what the segment starts with.
#[derive(Clone, Default)]
pub(super) struct Globs(BTreeMap<Box<str>, Vec<(Arc<Glob>, NodeId)>>);

/// Mixes the way to a child into a hash of full width: the table takes bits from both ends.
#[inline]
pub(super) fn edge_hash(parent: NodeId, separator: Separator, name_hash: u64) -> u64 {
    let way = u64::from(parent) << 2 | separator as u64;
    // The constants only have to be odd and well mixed: the golden ratio, and one of MurmurHash's.
    let product = u128::from(name_hash ^ way.wrapping_mul(0x9E37_79B9_7F4A_7C15)) * 0xFF51_AFD7_ED55_8CCD;
    product as u64 ^ (product >> 64) as u64
}

impl Globs {
    pub(super) fn get(&self, glob: &Glob) -> Option<NodeId> {
        let same_start = self.0.get(glob.prefix())?;
        same_start.iter().find(|(other, _)| **other == *glob).map(|(_, child)| *child)
    }

    pub(super) fn insert(&mut self, glob: &Arc<Glob>, child: NodeId) {
        self.0.entry(glob.prefix().into()).or_default().push((glob.clone(), child));
    }

    pub(super) fn remove(&mut self, glob: &Glob) {
        if let Some(same_start) = self.0.get_mut(glob.prefix()) {
            same_start.retain(|(other, _)| **other != *glob);
            if same_start.is_empty() {
                self.0.remove(glob.prefix());
            }
        }
    }

    /// Calls `found` for each edge that `segment` fits.
    ///
    /// Only globs whose literal start is a start of the segment are tried. In sorted order such starts come before
    /// the segment, and any entry between tells by its common part with the segment how long they can be at most; so
    /// a few steps find them among any number of others.
    pub(super) fn each_match(&self, segment: &str, mut found: impl FnMut(NodeId)) {
        let mut start = segment;
        while let Some((prefix, globs)) = self.0.range::<str, _>((Unbounded, Included(start))).next_back() {
            let common = start.bytes().zip(prefix.bytes()).take_while(|(a, b)| a == b).count();
            if common == prefix.len() {
                globs.iter().filter(|(glob, _)| glob.matches(segment)).for_each(|(_, child)| found(*child));
                let Some(shorter) = common.checked_sub(1) else { return };
                start = &start[..shorter];
            } else {
                start = &start[..common];
            }
        }
    }
}

impl<T: Copy + Ord> Ids<T> {
    pub(super) fn as_slice(&self) -> &[T] {
        match self {
            Self::None => &[],
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }

    pub(super) fn insert(&mut self, id: T) {
        match self {
            Self::None => *self = Self::One(id),
            Self::One(other) => *self = Self::Many(Box::new(vec![id.min(*other), id.max(*other)])),
            Self::Many(ids) => ids.insert(ids.partition_point(|other| *other < id), id),
        }
    }

    /// Removes one `id`, if there is one.
    pub(super) fn remove(&mut self, id: T) {
        match self {
            Self::One(only) if *only == id => *self = Self::None,
            Self::Many(ids) => {
                if let Ok(found) = ids.binary_search(&id) {
                    ids.remove(found);
                }
                if ids.len() < ids.capacity() / 4 {
                    ids.shrink_to(ids.capacity() / 2); // half stays free, so that the next few fit
                }
                if let [only] = ids[..] {
                    *self = Self::One(only);
                }
            }
            _ => {}
        }
    }
}

impl Name {
    /// As long as a name can be without making the enum larger than it is with a boxed one and its tag.
    const SHORT: usize = 22;

    pub(super) fn new(name: &str) -> Self {
        let mut bytes = [0; Self::SHORT];
        match bytes.get_mut(..name.len()) {
            None => Self::Long(name.into()),
            Some(place) => {
                place.copy_from_slice(name.as_bytes());
                Self::Short { len: name.len() as u8, bytes }
            }
        }
    }

    #[inline]
    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short { len, bytes } => &bytes[..usize::from(*len)],
            Self::Long(name) => name.as_bytes(),
        }
    }
}

impl<T: Copy + Ord> Node<T> {
    pub(super) fn edge_hash(&self, hasher: &RandomState) -> u64 {
        edge_hash(self.parent, self.separator, hasher.hash_one(self.name.as_bytes()))
    }

    pub(super) fn is_unused(&self) -> bool {
        matches!(self.ids, Ids::None) && self.exact == 0 && self.wild.is_none()
    }
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Self {
            ids: Ids::None,
            name: Name::new(""),
            parent: ROOT,
            separator: Separator::Start,
            repeats: false,
            exact: 0,
            wild: None,
        }
    }
}

impl Wild {
    pub(super) fn remove_glob(&mut self, at: usize, glob: &Glob) {
        let Some(globs) = &mut self.globs else { return };
        globs[at].remove(glob);
        if globs.iter().all(|globs| globs.0.is_empty()) {
            self.globs = None;
        }
    }

    pub(super) fn is_unused(&self) -> bool {
        self.globs.is_none() && self.one.iter().chain(&self.rest).all(|child| *child == ROOT)
    }
}
