//! How many commands may be refused for want of time, beside those that are served.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::limits::{REFUSED_AT_ONCE_MAX, SERVED_FOR_EACH_REFUSED};

/// The most that is earned, or owed, in operations.
const CREDIT_MAX: i64 = REFUSED_AT_ONCE_MAX * SERVED_FOR_EACH_REFUSED;

/// A refusal takes time from what is served: so there are only so many of them for each that goes to Redis. Who comes beyond that is not
/// looked at for a while, and what was refused all the same is worked off first. Where nothing is served, since Redis stands still, nothing is
/// taken from anybody, and all are refused.
pub struct Refusals {
    count: Cell<u64>,
    /// Served operations that no refusal has been counted against; below 0 what has to be served for those that there were.
    credit: Cell<i64>,
    served: Cell<u64>,
    /// When more had been served than before.
    moved: Cell<Instant>,
}

impl Default for Refusals {
    /// None yet.
    fn default() -> Self {
        Self { count: Cell::new(0), credit: Cell::new(0), served: Cell::new(0), moved: Cell::new(Instant::now()) }
    }
}

impl Refusals {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count.get()
    }

    /// One more; `served`: how many operations have gone to Redis up to `now`.
    pub fn add(&self, served: u64, now: Instant) {
        self.earn(served, now);
        self.credit.set((self.credit.get() - SERVED_FOR_EACH_REFUSED).max(-CREDIT_MAX));
        self.count.set(self.count.get() + 1);
    }

    /// Whether there shall be no more for now. `still`: after how long without anything served all may be refused.
    pub fn are_spent(&self, served: u64, now: Instant, still: Duration) -> bool {
        self.earn(served, now);
        self.credit.get() < SERVED_FOR_EACH_REFUSED && now.saturating_duration_since(self.moved.get()) < still
    }

    fn earn(&self, served: u64, now: Instant) {
        let before = self.served.replace(served);
        if served != before {
            self.moved.set(now);
        }
        let more = i64::try_from(served.saturating_sub(before)).unwrap_or(i64::MAX);
        self.credit.set(self.credit.get().saturating_add(more).min(CREDIT_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STILL: Duration = Duration::from_millis(20);

    #[test]
    fn there_are_so_many_for_each_that_is_served() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        refusals.add(0, now);
        assert!(refusals.are_spent(0, now, STILL), "nothing is served");
        let served = u64::try_from(11 * SERVED_FOR_EACH_REFUSED).unwrap() + 1;
        refusals.add(served, now);
        let mut more = 0;
        while !refusals.are_spent(served, now, STILL) {
            refusals.add(served, now);
            more += 1;
        }
        assert_eq!(more, 9);
        assert_eq!(refusals.count(), 2 + more);
    }

    #[test]
    fn a_quiet_time_earns_no_more_than_a_burst() {
        let refusals = Refusals::default();
        refusals.add(1 << 40, Instant::now());
        assert_eq!(refusals.credit.get(), (REFUSED_AT_ONCE_MAX - 1) * SERVED_FOR_EACH_REFUSED);
    }

    #[test]
    fn where_nothing_is_served_all_are_refused() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        refusals.add(1, now);
        assert!(refusals.are_spent(1, now, STILL));
        refusals.add(1, now + STILL);
        assert!(!refusals.are_spent(1, now + STILL, STILL));
        refusals.add(2, now + STILL);
        assert!(refusals.are_spent(2, now + STILL, STILL), "it goes on");
        let owed = 3 * u64::try_from(SERVED_FOR_EACH_REFUSED).unwrap();
        assert!(refusals.are_spent(2 + owed, now + STILL, STILL), "what was refused is worked off first");
        assert!(!refusals.are_spent(3 + owed + owed / 3, now + STILL, STILL), "before anybody is refused");
    }
}
