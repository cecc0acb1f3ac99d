//! How much may wait in a lane so that it is served in time.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::limits;

/// How many batches the average looks back on.
const MEMORY: u32 = 8;

/// After so many batches in a row that took all that waited, what was measured before says nothing any more.
const CALM: u32 = 16;

/// Takes one more into an average, and returns it.
fn averaged(known: &Cell<Duration>, one: Duration) -> Duration {
    let before = known.get();
    let average = if before.is_zero() { one } else { before - before / MEMORY + one / MEMORY };
    known.set(average);
    average
}

/// Measures how long the operations of a full batch take, from its start to that of the next one, and bounds the queue by that. What is measured is
/// the whole round: the script, its way, and what this thread does for its clients meanwhile.
pub(super) struct Pace {
    within: Duration,
    /// The average time of such a round, and of an operation in it.
    round: Cell<Duration>,
    each: Cell<Duration>,
    /// When the batch before went and how many operations it had, if it was full and more waited behind it.
    before: Cell<Option<(Instant, usize)>>,
    /// How many batches have taken all that waited since one did not.
    calm: Cell<u32>,
    queue_max: Cell<usize>,
    served: Cell<u64>,
}

impl Pace {
    /// `within`: the time an operation has.
    pub(super) fn new(within: Duration) -> Self {
        Self {
            within,
            round: Cell::new(Duration::ZERO),
            each: Cell::new(Duration::ZERO),
            before: Cell::new(None),
            calm: Cell::new(0),
            queue_max: Cell::new(limits::LANE_QUEUE_MAX),
            served: Cell::new(0),
        }
    }

    /// How many operations may wait.
    pub(super) fn queue_max(&self) -> usize {
        self.queue_max.get()
    }

    /// What is left of an operation's time when its batch goes, so that its answer is in time: twice as long as full batches take, since one may take
    /// longer than the others.
    pub(super) fn sent_within(&self) -> Duration {
        (2 * self.round.get()).min(self.within / limits::QUEUE_PART).max(limits::SEND_WITHIN)
    }

    /// How many operations have gone.
    pub(super) fn served(&self) -> u64 {
        self.served.get()
    }

    /// A batch of so many operations goes; whether more wait behind it, for which it had no room.
    pub(super) fn sent(&self, operations: usize, more: bool) {
        self.served.set(self.served.get() + operations as u64);
        let now = Instant::now();
        if let Some((before, operations)) = self.before.get() {
            self.took(now - before, operations);
        }
        self.before.set(more.then_some((now, operations)));
        self.calm.set(if more { 0 } else { self.calm.get().saturating_add(1) });
        if self.calm.get() == CALM {
            self.round.set(Duration::ZERO);
            self.each.set(Duration::ZERO);
            self.queue_max.set(limits::LANE_QUEUE_MAX);
        }
    }

    /// Nothing goes for now: when the next does says nothing about the pace.
    pub(super) fn rests(&self) {
        self.before.set(None);
    }

    fn took(&self, round: Duration, operations: usize) {
        // One that took longer than an operation has is a stall, not a pace.
        let round = round.min(self.within);
        averaged(&self.round, round);
        let average = averaged(&self.each, round / u32::try_from(operations).unwrap_or(u32::MAX).max(1));
        let in_time = (self.within / limits::QUEUE_PART).as_nanos() / average.as_nanos().max(1);
        let in_time = usize::try_from(in_time).unwrap_or(usize::MAX);
        self.queue_max.set(in_time.max(limits::QUEUE_BATCHES_MIN * operations).min(limits::LANE_QUEUE_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_may_wait_as_is_served_in_half_of_the_time() {
        let pace = Pace::new(Duration::from_millis(85));
        assert_eq!(pace.queue_max(), limits::LANE_QUEUE_MAX, "nothing is known yet");
        let took = |round, operations| (0..200).for_each(|_| pace.took(round, operations));
        took(Duration::from_millis(1), 512);
        assert_eq!(pace.queue_max() / 512, 42);
        took(Duration::from_millis(10), 60);
        assert_eq!(pace.queue_max() / 60, 4, "of large operations fewer fit into a batch");
        took(Duration::from_secs(9), 512);
        assert_eq!(pace.queue_max(), limits::QUEUE_BATCHES_MIN * 512);
        took(Duration::from_nanos(1), 512);
        assert_eq!(pace.queue_max(), limits::LANE_QUEUE_MAX);
    }

    #[test]
    fn what_has_less_time_than_a_batch_takes_is_not_sent() {
        let pace = Pace::new(Duration::from_millis(85));
        assert_eq!(pace.sent_within(), limits::SEND_WITHIN);
        for (round, expected) in [(1, 5), (20, 40), (9_000, 43)] {
            (0..200).for_each(|_| pace.took(Duration::from_millis(round), 100));
            assert_eq!((pace.sent_within().as_secs_f64() * 1000.0).round(), f64::from(expected));
        }
    }

    #[test]
    fn what_large_operations_took_is_forgotten_once_all_that_waits_goes_at_once() {
        let pace = Pace::new(Duration::from_millis(85));
        (0..200).for_each(|_| pace.took(Duration::from_millis(40), 2));
        assert_eq!(pace.queue_max(), 4, "less than a batch of small ones: they never fill one");
        (1..CALM).for_each(|_| pace.sent(4, false));
        pace.sent(4, true);
        pace.rests();
        (1..CALM).for_each(|_| pace.sent(4, false));
        assert_eq!((pace.queue_max(), pace.sent_within().as_millis()), (4, 42));
        pace.sent(4, false);
        assert_eq!((pace.queue_max(), pace.sent_within()), (limits::LANE_QUEUE_MAX, limits::SEND_WITHIN));
    }

    #[test]
    fn only_what_is_full_and_followed_at_once_tells_the_pace() {
        let pace = Pace::new(Duration::from_millis(85));
        for (operations, more) in [(10, false), (limits::BATCH_OPERATIONS_MAX, false), (10, false)] {
            pace.sent(operations, more);
            assert!(pace.each.get().is_zero());
        }
        pace.sent(limits::BATCH_OPERATIONS_MAX, true);
        pace.rests();
        pace.sent(1, false);
        assert!(pace.each.get().is_zero(), "what stood behind it was parked");
        pace.sent(60, true);
        std::thread::sleep(Duration::from_millis(1));
        pace.sent(1, false);
        assert!(!pace.each.get().is_zero());
    }
}
