//! How much the outbox may hold that Postgres does not have: beyond it nothing more is accepted, and Redis keeps its memory.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// See the module. What is full opens again when a tenth of it is free, so that it does not open and close with each change.
#[derive(Debug)]
pub struct Bound {
    changes_max: u64,
    bytes_max: u64,
    /// What the outbox took of Redis's memory at the last look.
    bytes: AtomicU64,
    too_many: AtomicBool,
    too_large: AtomicBool,
}

impl Bound {
    /// So many changes that are not applied, and so many bytes of Redis's memory.
    pub fn new(changes_max: u64, bytes_max: u64) -> Self {
        Self { changes_max, bytes_max, bytes: AtomicU64::new(0), too_many: AtomicBool::new(false), too_large: AtomicBool::new(false) }
    }

    /// Notes how many changes are not applied.
    pub(super) fn note_changes(&self, changes: u64) {
        flip(&self.too_many, changes, self.changes_max);
    }

    /// Notes how many bytes of Redis's memory the outbox takes.
    pub fn note_bytes(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
        flip(&self.too_large, bytes, self.bytes_max);
    }

    /// Whether this is half of the bytes that the outbox may take, or more.
    pub fn is_half(&self, bytes: u64) -> bool {
        bytes >= self.bytes_max / 2
    }

    /// What the outbox took of Redis's memory at the last look, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How many bytes of what is applied may stay for people to look at: a part of all, so that it never keeps anybody from selling.
    pub fn kept_bytes_max(&self) -> u64 {
        self.bytes_max / 4
    }

    /// Why nothing more is accepted, and what to do; `None` while there is room.
    pub fn refusal(&self) -> Option<&'static str> {
        if self.too_many.load(Ordering::Relaxed) {
            return Some("the outbox is full, as many changes wait for Postgres as outbox.max_changes permits: bring Postgres back");
        }
        let too_large = self.too_large.load(Ordering::Relaxed);
        too_large.then_some("the outbox is full, it takes as much of Redis's memory as outbox.max_mib permits: bring Postgres back")
    }
}

fn flip(flag: &AtomicBool, value: u64, max: u64) {
    if value >= max {
        flag.store(true, Ordering::Relaxed);
    } else if value <= max - max / 10 {
        flag.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_full_opens_again_when_a_tenth_is_free() {
        let bound = Bound::new(100, 1000);
        for (changes, bytes, full) in
            [(99, 0, false), (100, 0, true), (91, 0, true), (90, 0, false), (0, 1000, true), (0, 901, true), (0, 900, false)]
        {
            bound.note_changes(changes);
            bound.note_bytes(bytes);
            assert_eq!(bound.refusal().is_some(), full, "{changes} {bytes}");
        }
    }
}
