//! What was read from the outbox and is not applied yet, cut into transactions.

use crate::domain::Position;
use crate::domain::change::Entry;

/// A run of entries, applied slice by slice.
#[derive(Debug)]
pub(super) struct Batch {
    entries: Vec<Entry>,
    /// How many bytes the entries had in the stream.
    bytes: usize,
    done: usize,
    /// How many entries the slice at hand has.
    taken: usize,
    /// The most entries a slice may have, while the cause of a refusal is looked for.
    narrow: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self::new(Vec::new(), 0)
    }
}

impl Batch {
    pub(super) fn new(entries: Vec<Entry>, bytes: usize) -> Self {
        Self { entries, bytes, done: 0, taken: 0, narrow: usize::MAX }
    }

    /// Puts what was read next at its end.
    pub(super) fn extend(&mut self, entries: Vec<Entry>, bytes: usize) {
        if self.is_empty() {
            *self = Self::new(entries, bytes);
        } else {
            self.entries.extend(entries);
            self.bytes += bytes;
        }
    }

    /// How many changes of it are not applied yet.
    pub(super) fn changes(&self) -> usize {
        self.entries[self.done..].iter().map(|entry| entry.operations.len()).sum()
    }

    /// Whether all of it is applied.
    pub(super) fn is_empty(&self) -> bool {
        self.done == self.entries.len()
    }

    /// The next entries, as many as have at most `changes_max` operations together, but at least one.
    pub(super) fn slice(&mut self, changes_max: usize) -> &[Entry] {
        let rest = &self.entries[self.done..];
        let mut changes = 0;
        let fitting = rest.iter().take_while(|entry| {
            changes += entry.operations.len();
            changes <= changes_max
        });
        self.taken = fitting.count().max(1).min(self.narrow).min(rest.len());
        &rest[..self.taken]
    }

    /// The slice at hand has been applied. Returns the last position and the bytes of the whole batch once that was its last slice.
    pub(super) fn advance(&mut self) -> Option<(Position, usize)> {
        self.done += self.taken;
        self.taken = 0;
        self.narrow = self.narrow.saturating_mul(2);
        if !self.is_empty() {
            return None;
        }
        self.entries.last().map(|entry| (entry.last, self.bytes))
    }

    /// The slice at hand was refused: halves it. False where it is a single entry already.
    pub(super) fn narrow(&mut self) -> bool {
        if self.taken <= 1 {
            return false;
        }
        self.narrow = self.taken / 2;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::change::Operation;

    fn entries(sizes: &[usize]) -> Vec<Entry> {
        let mut n = 0;
        let entry = |&size: &usize| {
            n += size as u64;
            let operations = vec![Operation::decode("0 incr | a 1 1").unwrap(); size];
            Entry { last: Position::new(1, n), first_n: n + 1 - size as u64, prev: "-".into(), op: "-".into(), at_ms: 0, operations }
        };
        sizes.iter().map(entry).collect()
    }

    #[test]
    fn slices_keep_to_the_limit_but_never_split_an_entry() {
        let mut batch = Batch::new(entries(&[2, 2, 9, 1, 1]), 100);
        let mut taken = Vec::new();
        while !batch.is_empty() {
            taken.push(batch.slice(4).len());
            let done = batch.advance();
            assert_eq!(done.is_some(), batch.is_empty());
            assert!(done.is_none_or(|done| done == (Position::new(1, 15), 100)));
        }
        assert_eq!(taken, [2, 1, 2]);
    }

    #[test]
    fn a_refused_slice_is_halved_until_the_cause_stands_alone() {
        let mut batch = Batch::new(entries(&[1; 100]), 0);
        let (bad, mut tries) = (77, 0);
        let mut done = 0;
        loop {
            tries += 1;
            let taken = batch.slice(1000).len();
            if !(done..done + taken).contains(&bad) {
                done += taken;
                batch.advance();
            } else if !batch.narrow() {
                break;
            }
        }
        assert_eq!(done, bad, "everything before it was applied");
        assert!(tries < 40, "{tries}");
    }
}
