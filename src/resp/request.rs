//! One request as it was read: its words lie in one piece of memory.

use std::ops::{Index, Range};

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use crate::limits::SETTABLE_REQUEST_KIB;

const _: () = assert!(SETTABLE_REQUEST_KIB.1 << 10 <= u32::MAX as u64);

/// Words whose places need no memory of their own: what most requests have.
const WORDS_INLINE: usize = 8;

/// Where a word lies. No request is as long as an `u32` can say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    start: u32,
    end: u32,
}

/// Where the words of a request lie, in their order.
pub(super) type Places = SmallVec<[Place; WORDS_INLINE]>;

impl Place {
    pub(super) fn new(range: Range<usize>) -> Self {
        let narrow = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        Self { start: narrow(range.start), end: narrow(range.end) }
    }

    pub(super) fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// A complete command. `request[0]` is its name; there is always one.
///
/// It shares the read buffer: keep a copy of what outlives the command by long.
#[derive(Clone, Debug)]
pub struct Request {
    whole: Bytes,
    places: Places,
}

impl Request {
    pub(super) fn new(whole: Bytes, places: Places) -> Self {
        Self { whole, places }
    }

    /// How many words it has.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether it has no word; a request that was read has one.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The word at `at`, if there is one.
    pub fn get(&self, at: usize) -> Option<&[u8]> {
        self.places.get(at).map(|place| &self.whole[place.range()])
    }

    /// The words in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> + '_ {
        self.places.iter().map(|place| &self.whole[place.range()])
    }

    /// The word at `at`, sharing the request's memory.
    ///
    /// # Panics
    /// If there is none, as `request[at]` does.
    pub fn shared(&self, at: usize) -> Bytes {
        self.whole.slice(self.places[at].range())
    }

    /// Bytes in its words.
    pub fn bytes(&self) -> usize {
        self.iter().map(<[u8]>::len).sum()
    }

    /// Whether nothing else keeps its memory.
    #[cfg(test)]
    pub(crate) fn shares_memory_with_none(&self) -> bool {
        self.whole.is_unique()
    }

    /// The same in memory of its own.
    pub fn detached(&self) -> Self {
        self.iter().collect()
    }
}

impl Index<usize> for Request {
    type Output = [u8];

    fn index(&self, at: usize) -> &[u8] {
        &self.whole[self.places[at].range()]
    }
}

impl<W: AsRef<[u8]>> FromIterator<W> for Request {
    fn from_iter<I: IntoIterator<Item = W>>(words: I) -> Self {
        let (mut whole, mut places) = (BytesMut::new(), Places::new());
        for word in words {
            let start = whole.len();
            whole.extend_from_slice(word.as_ref());
            places.push(Place::new(start..whole.len()));
        }
        Self { whole: whole.freeze(), places }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_where_they_were_put() {
        let request: Request = ["GET", "", "a b"].into_iter().collect();
        assert_eq!((request.len(), request.bytes()), (3, 6));
        assert_eq!((&request[0], &request[1], &request[2]), (&b"GET"[..], &b""[..], &b"a b"[..]));
        assert_eq!((request.get(2), request.get(3)), (Some(&b"a b"[..]), None));
        assert_eq!(request.shared(2), "a b");
        let copy = request.detached();
        assert!(copy.iter().eq(request.iter()) && copy.whole.as_ptr() != request.whole.as_ptr());
    }
}
