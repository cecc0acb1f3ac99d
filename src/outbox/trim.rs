//! Where the outbox may be cut: what has been applied stays a while, for whoever asks what became of a batch, but not for ever.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::domain::Position;
use crate::limits::{OUTBOX_KEEP_BYTES, OUTBOX_KEEP_CHANGES, OUTBOX_KEEP_TIME, OUTBOX_MARKS_MAX};

/// Marks closer than this are one: finer cuts are of no use.
const MARK_TIME: Duration = Duration::from_secs(1);
const MARK_BYTES: u64 = 1 << 20;

/// The last entry of a stretch that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    position: Position,
    /// When the stretch began and ended to be applied.
    began: Instant,
    ended: Instant,
    /// How many bytes the stretch has.
    bytes: u64,
}

/// What has been applied and not been cut yet, as a bounded list of places to cut at.
#[derive(Debug)]
pub(super) struct Marks {
    list: VecDeque<Mark>,
    /// How many bytes of what is applied may stay.
    bytes_max: u64,
    /// Where it was cut last.
    cut: Position,
}

impl Marks {
    /// `bytes_max`: how many bytes of what is applied may stay, where that is less than [`OUTBOX_KEEP_BYTES`].
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { list: VecDeque::new(), bytes_max: bytes_max.min(OUTBOX_KEEP_BYTES), cut: Position::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Notes that everything up to `position` has been applied, the last `bytes` of it now. A position that is not beyond the last one
    /// noted adds nothing.
    pub(super) fn push(&mut self, position: Position, bytes: u64, now: Instant) {
        match self.list.back_mut() {
            Some(last) if position <= last.position => {}
            Some(last) if last.bytes + bytes <= MARK_BYTES && now.duration_since(last.began) <= MARK_TIME => {
                *last = Mark { position, began: last.began, ended: now, bytes: last.bytes + bytes };
            }
            _ => {
                self.list.push_back(Mark { position, began: now, ended: now, bytes });
                self.thin();
            }
        }
    }

    /// Forgets what lies beyond `applied`: Postgres went back, and those entries are still needed.
    pub(super) fn retain_applied(&mut self, applied: Position) {
        self.list.retain(|mark| mark.position <= applied);
    }

    /// The entry before which everything may go: it stays itself, and the last one applied always does. `None` where nothing more may go
    /// than went before. Forgets the marks before it.
    pub(super) fn cut(&mut self, now: Instant) -> Option<Position> {
        let index = choose(self.list.make_contiguous(), self.bytes_max, now)?;
        self.list.drain(..index);
        let mark = self.list.front_mut()?;
        // Of its stretch only the last entry stays.
        mark.bytes = 0;
        let further = mark.position > self.cut;
        self.cut = mark.position;
        further.then_some(self.cut)
    }

    /// Joins every two neighbours when there are too many.
    fn thin(&mut self) {
        if self.list.len() <= OUTBOX_MARKS_MAX {
            return;
        }
        let marks: Vec<Mark> = self.list.drain(..).collect();
        self.list.extend(marks.chunks(2).filter_map(|pair| {
            let (first, last) = (pair.first()?, pair.last()?);
            Some(Mark { began: first.began, bytes: pair.iter().map(|mark| mark.bytes).sum(), ..*last })
        }));
    }
}

/// Which mark to cut at; `None` where everything stays. The newest that is old enough in changes and in time, or a newer one where else
/// too many bytes would stay.
fn choose(marks: &[Mark], bytes_max: u64, now: Instant) -> Option<usize> {
    let applied = marks.last()?.position;
    let old = |mark: &Mark| {
        applied.n.saturating_sub(mark.position.n) >= OUTBOX_KEEP_CHANGES && now.saturating_duration_since(mark.ended) >= OUTBOX_KEEP_TIME
    };
    let by_age = marks.iter().rposition(old);
    // Marks are few and bytes add up from the newest: the first one after which no more than the limit stays.
    let mut bytes = 0;
    let too_many = marks.iter().rposition(|mark| {
        bytes += mark.bytes;
        bytes > bytes_max
    });
    by_age.max(too_many)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn marks(start: Instant, list: &[(u64, u64, u64)]) -> Vec<Mark> {
        let mark = |&(n, seconds, bytes): &(u64, u64, u64)| {
            let at = start + Duration::from_secs(seconds);
            Mark { position: Position::new(1, n), began: at, ended: at, bytes }
        };
        list.iter().map(mark).collect()
    }

    #[test]
    fn an_entry_stays_until_it_is_old_in_changes_and_in_time() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let list = marks(start, &[(10, 0, 1), (20, 100, 1), (100_010, 200, 1), (100_020, 300, 1)]);
        assert_eq!(choose(&list, OUTBOX_KEEP_BYTES, at(599)), None, "not old enough");
        assert_eq!(choose(&list, OUTBOX_KEEP_BYTES, at(600)), Some(0));
        assert_eq!(choose(&list, OUTBOX_KEEP_BYTES, at(700)), Some(1));
        assert_eq!(choose(&list, OUTBOX_KEEP_BYTES, at(1_000_000)), Some(1), "too few changes since");
        assert_eq!(choose(&[], OUTBOX_KEEP_BYTES, at(0)), None);
    }

    #[test]
    fn too_many_bytes_go_at_once_and_the_last_entry_stays() {
        let now = Instant::now();
        let list = marks(now, &[(1, 0, 100 * MIB), (2, 0, 100 * MIB), (3, 0, 100 * MIB)]);
        assert_eq!(choose(&list, OUTBOX_KEEP_BYTES, now), Some(0), "200 MiB stay");
        assert_eq!(choose(&list[1..], OUTBOX_KEEP_BYTES, now), None);
        let list = marks(now, &[(1, 0, 1), (2, 0, 300 * MIB)]);
        assert_eq!(choose(&list, OUTBOX_KEEP_BYTES, now), Some(1), "all but the last entry");
    }

    #[test]
    fn a_cut_is_made_once() {
        let start = Instant::now();
        let mut marks = Marks::new(OUTBOX_KEEP_BYTES);
        for n in 1..=10_u64 {
            marks.push(Position::new(1, n * 20_000), MIB, start + Duration::from_secs(n * 60));
        }
        let now = start + Duration::from_secs(1_000);
        assert_eq!(marks.cut(now), Some(Position::new(1, 100_000)));
        assert_eq!(marks.cut(now), None);
        assert_eq!(marks.list.len(), 6);
    }

    #[test]
    fn marks_close_together_are_one_and_their_number_is_bounded() {
        let start = Instant::now();
        let mut marks = Marks::new(OUTBOX_KEEP_BYTES);
        marks.push(Position::new(1, 1), 1, start);
        marks.push(Position::new(1, 2), 1, start + Duration::from_millis(500));
        marks.push(Position::new(1, 2), 1, start + Duration::from_millis(500));
        assert_eq!((marks.list.len(), marks.list[0].bytes, marks.list[0].position.n), (1, 2, 2));
        for n in 0..3 * OUTBOX_MARKS_MAX as u64 {
            marks.push(Position::new(1, n + 3), 1, start + Duration::from_secs(n * 2 + 2));
        }
        assert!(marks.list.len() <= OUTBOX_MARKS_MAX);
        assert_eq!(marks.list.iter().map(|mark| mark.bytes).sum::<u64>(), 3 * OUTBOX_MARKS_MAX as u64 + 2);
        assert_eq!(marks.list.back().unwrap().position.n, 3 * OUTBOX_MARKS_MAX as u64 + 2);
    }

    #[test]
    fn what_postgres_no_longer_has_is_never_cut() {
        let mut marks = Marks::new(OUTBOX_KEEP_BYTES);
        let start = Instant::now();
        marks.push(Position::new(1, 10), MIB, start);
        marks.push(Position::new(1, 20), MIB, start + Duration::from_secs(10));
        marks.retain_applied(Position::new(1, 15));
        assert_eq!(marks.list.len(), 1);
    }
}
