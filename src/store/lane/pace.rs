//! How much may wait in a lane so that it is served in time.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::limits;

/// How many batches the average looks back on.
const MEMORY: u32 = 8;

/// Measures how long a large batch takes, from its start to that of the next one, and bounds the queue by that. What is measured is the whole
/// round: the script, its way, and what this thread does for its clients meanwhile.
pub(super) struct Pace {
    within: Duration,
    /// The average of such rounds.
    round: Cell<Duration>,
    /// When the batch before went, if that was a large one and more waited behind it.
    before: Cell<Option<Instant>>,
    queue_max: Cell<usize>,
    served: Cell<u64>,
}

impl Pace {
    /// `within`: the time an operation has.
    pub(super) fn new(within: Duration) -> Self {
        Self {
            within,
            round: Cell::new(Duration::ZERO),
            before: Cell::new(None),
            queue_max: Cell::new(limits::LANE_QUEUE_MAX),
            served: Cell::new(0),
        }
    }

    /// How many operations may wait.
    pub(super) fn queue_max(&self) -> usize {
        self.queue_max.get()
    }

    /// How many operations have gone.
    pub(super) fn served(&self) -> u64 {
        self.served.get()
    }

    /// A batch of so many operations goes; whether more wait behind it.
    pub(super) fn sent(&self, operations: usize, more: bool) {
        self.served.set(self.served.get() + operations as u64);
        let now = Instant::now();
        if let Some(before) = self.before.get() {
            self.took(now - before);
        }
        self.before.set((more && operations >= limits::BATCH_OPERATIONS_MAX / 2).then_some(now));
    }

    /// Nothing goes for now: when the next does says nothing about the pace.
    pub(super) fn rests(&self) {
        self.before.set(None);
    }

    fn took(&self, round: Duration) {
        // One that took longer than an operation has is a stall, not a pace.
        let round = round.min(self.within);
        let known = self.round.get();
        let average = if known.is_zero() { round } else { known - known / MEMORY + round / MEMORY };
        self.round.set(average);
        let rounds = (self.within / limits::QUEUE_PART).as_nanos() / average.as_nanos().max(1);
        let batches = usize::try_from(rounds).unwrap_or(usize::MAX).max(limits::QUEUE_BATCHES_MIN);
        self.queue_max.set(batches.saturating_mul(limits::BATCH_OPERATIONS_MAX).min(limits::LANE_QUEUE_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_may_wait_as_is_served_in_half_of_the_time() {
        let pace = Pace::new(Duration::from_millis(85));
        assert_eq!(pace.queue_max(), limits::LANE_QUEUE_MAX, "nothing is known yet");
        (0..50).for_each(|_| pace.took(Duration::from_millis(1)));
        assert_eq!(pace.queue_max(), 42 * limits::BATCH_OPERATIONS_MAX);
        (0..50).for_each(|_| pace.took(Duration::from_secs(9)));
        assert_eq!(pace.queue_max(), limits::QUEUE_BATCHES_MIN * limits::BATCH_OPERATIONS_MAX);
        (0..200).for_each(|_| pace.took(Duration::from_nanos(1)));
        assert_eq!(pace.queue_max(), limits::LANE_QUEUE_MAX);
    }

    #[test]
    fn only_what_is_large_and_followed_at_once_tells_the_pace() {
        let pace = Pace::new(Duration::from_millis(85));
        for (operations, more) in [(10, true), (10, true), (limits::BATCH_OPERATIONS_MAX, false), (10, false)] {
            pace.sent(operations, more);
            assert!(pace.round.get().is_zero());
        }
        pace.sent(limits::BATCH_OPERATIONS_MAX, true);
        pace.rests();
        pace.sent(1, false);
        assert!(pace.round.get().is_zero(), "what stood behind it was parked");
        pace.sent(limits::BATCH_OPERATIONS_MAX, true);
        pace.sent(1, false);
        assert!(!pace.round.get().is_zero());
    }
}
