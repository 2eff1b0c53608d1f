//! An event type cut into segments, and sets of positions in it.
//!
//! The small functions are `#[inline]` because a search is generic and so compiled in the crate that uses it.

use crate::event::MAX_TYPE_LEN;

/// Most segments of an event type: each takes a character, and a separator stands between two.
pub(super) const MAX_TYPE_SEGMENTS: usize = MAX_TYPE_LEN / 2;

/// What stands before a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Separator {
    /// Nothing: it is the first segment.
    Start,
    Dot,
    Colon,
    Slash,
}

impl Separator {
    pub(super) const ALL: [Self; 4] = [Self::Start, Self::Dot, Self::Colon, Self::Slash];
    pub(super) const WRITTEN: [Self; 3] = [Self::Dot, Self::Colon, Self::Slash];

    #[inline]
    pub(super) fn of(byte: u8) -> Option<Self> {
        match byte {
            b'.' => Some(Self::Dot),
            b':' => Some(Self::Colon),
            b'/' => Some(Self::Slash),
            _ => None,
        }
    }

    /// What stands before `bytes[at]`, the start of a segment.
    #[inline]
    fn before(bytes: &[u8], at: usize) -> Self {
        at.checked_sub(1).and_then(|before| Self::of(bytes[before])).unwrap_or(Self::Start)
    }
}

/// Where the separators are. Looks at eight bytes at a time: byte by byte, this took a fifth of a search.
fn separators(bytes: &[u8]) -> impl Iterator<Item = usize> {
    const LOW_BITS: u64 = u64::from_ne_bytes([0x7f; 8]);
    let spread = |byte: u8| u64::from_ne_bytes([byte; 8]);
    // The high bit of each byte that is zero. The sum cannot carry from one byte into the next.
    let zeroes = |word: u64| !(((word & LOW_BITS) + LOW_BITS) | word | LOW_BITS);
    let (words, tail) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..tail.len()].copy_from_slice(tail);
    words.iter().copied().chain([last]).enumerate().flat_map(move |(i, word)| {
        let word = u64::from_le_bytes(word);
        // '.' and '/' differ in the lowest bit only.
        let mut found = zeroes((word | spread(1)) ^ spread(b'/')) | zeroes(word ^ spread(b':'));
        std::iter::from_fn(move || {
            (found != 0).then(|| {
                let at = found.trailing_zeros() as usize / 8;
                found &= found - 1;
                i * 8 + at
            })
        })
    })
}

/// A set of positions: bit `i` stands for "`i` segments were taken", so segment `i` is next.
pub(super) type Positions = u128;

/// The members of a set, in ascending order.
#[inline]
pub(super) fn each(mut positions: Positions) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (positions != 0).then(|| {
            let lowest = positions.trailing_zeros() as usize;
            positions &= positions - 1;
            lowest
        })
    })
}

/// An event type cut into segments, without allocating.
pub(super) struct Path<'a> {
    text: &'a str,
    /// Segment `i` ends here; the separator of segment `i + 1` follows.
    ends: [u8; MAX_TYPE_SEGMENTS],
    len: usize,
    joined_by: [Positions; 4],
}

impl<'a> Path<'a> {
    /// `None` if the text is longer than an event type may be or has an empty segment.
    pub(super) fn split(text: &'a str) -> Option<Self> {
        if text.len() > MAX_TYPE_LEN {
            return None;
        }
        let (mut ends, mut len, mut start) = ([0; MAX_TYPE_SEGMENTS], 0, 0);
        // Any separator fits before segment 0. It is asked for only when a leading `**` took nothing, for then the
        // pattern has written a separator where the event type has none.
        let mut joined_by = [1; 4];
        for at in separators(text.as_bytes()) {
            if at == start {
                return None;
            }
            ends[len] = at as u8; // below MAX_TYPE_LEN
            len += 1;
            start = at + 1;
            joined_by[Separator::before(text.as_bytes(), start) as usize] |= 1 << len;
        }
        if text.len() == start {
            return None;
        }
        ends[len] = text.len() as u8;
        Some(Self { text, ends, len: len + 1, joined_by })
    }

    /// How many segments.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Segment `i`, without its separator.
    #[inline]
    pub(super) fn name(&self, i: usize) -> &'a str {
        let start = if i == 0 { 0 } else { usize::from(self.ends[i - 1]) + 1 };
        &self.text[start..usize::from(self.ends[i])]
    }

    /// All segments, without separators.
    #[inline]
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        (0..self.len).map(|i| self.name(i))
    }

    /// What stands before segment `i`.
    #[inline]
    pub(super) fn separator(&self, i: usize) -> Separator {
        match i.checked_sub(1) {
            None => Separator::Start,
            Some(previous) => Separator::before(self.text.as_bytes(), usize::from(self.ends[previous]) + 1),
        }
    }

    /// Of `positions`, those that are not the end.
    #[inline]
    pub(super) fn open(&self, positions: Positions) -> Positions {
        positions & !(1 << self.len)
    }

    /// Of `positions`, those whose next segment may be introduced by `separator`; never the end.
    #[inline]
    pub(super) fn before(&self, positions: Positions, separator: Separator) -> Positions {
        positions & self.joined_by[separator as usize]
    }

    /// Where `**` may stop that starts at `positions` and has `separator` before it.
    #[inline]
    pub(super) fn rest(&self, positions: Positions, separator: Separator) -> Positions {
        let start = self.before(positions, separator);
        let lowest = start & start.wrapping_neg();
        // From the lowest start every later position can be reached; `0 - 0` leaves nothing to add.
        let below_end: Positions = (1 << (self.len + 1)) - 1;
        let later = if lowest == 0 { 0 } else { below_end & !(lowest | (lowest - 1)) };
        positions | later
    }

    /// Whether all segments were taken.
    #[inline]
    pub(super) fn is_done(&self, positions: Positions) -> bool {
        positions >> self.len & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_at_every_separator() {
        let path = Path::split("a.bc:d/e").unwrap();
        assert_eq!(path.names().collect::<Vec<_>>(), ["a", "bc", "d", "e"]);
        let separators: Vec<_> = (0..path.len()).map(|i| path.separator(i)).collect();
        assert_eq!(separators, Separator::ALL);
        assert_eq!(Path::split(&["a"; 100].join("/")).unwrap().len(), MAX_TYPE_SEGMENTS);
        assert!(["", ".", "a.", ":a", "a./b"].iter().all(|text| Path::split(text).is_none()));
    }

    #[test]
    fn finds_separators_anywhere() {
        for byte in 0..=255 {
            for at in 0..20 {
                let mut bytes = [b'a'; 20];
                bytes[at] = byte;
                let expected = Separator::of(byte).map(|_| at);
                assert_eq!(separators(&bytes).collect::<Vec<_>>(), expected.into_iter().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_rest_reaches_every_later_position() {
        let path = Path::split("a.b:c.d").unwrap();
        assert_eq!(path.rest(0b00010, Separator::Dot), 0b11110);
        assert_eq!(path.rest(0b00110, Separator::Colon), 0b11110);
        assert_eq!(path.rest(0b00010, Separator::Colon), 0b00010);
        assert_eq!(path.rest(0b10000, Separator::Dot), 0b10000);
        assert_eq!(each(0b10110).collect::<Vec<_>>(), [1, 2, 4]);
    }
}
