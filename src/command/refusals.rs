//! How many commands may be refused for want of time, beside those that are served.

use std::cell::Cell;

use crate::limits::{REFUSED_AT_ONCE_MAX, REFUSED_FOR_EACH_SERVED};

/// A refusal takes time from what is served: so there are only so many of them for each that goes to Redis. Who comes beyond that is not
/// looked at for a while.
#[derive(Default)]
pub struct Refusals {
    count: Cell<u64>,
    left: Cell<u64>,
    served: Cell<u64>,
}

impl Refusals {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count.get()
    }

    /// One more; `served`: how many operations have gone to Redis up to now.
    pub fn add(&self, served: u64) {
        let earned = (served - self.served.replace(served).min(served)).saturating_mul(REFUSED_FOR_EACH_SERVED);
        self.left.set(self.left.get().saturating_add(earned).min(REFUSED_AT_ONCE_MAX).saturating_sub(1));
        self.count.set(self.count.get() + 1);
    }

    /// Whether there may be no more for now.
    pub fn are_spent(&self) -> bool {
        self.left.get() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_for_each_that_is_served() {
        let refusals = Refusals::default();
        refusals.add(0);
        assert!(refusals.are_spent(), "nothing is served");
        refusals.add(10);
        let mut more = 0;
        while !refusals.are_spent() {
            refusals.add(10);
            more += 1;
        }
        assert_eq!(more, 10 * REFUSED_FOR_EACH_SERVED - 1);
        assert_eq!(refusals.count(), 2 + more);
    }

    #[test]
    fn a_quiet_time_earns_no_more_than_a_burst() {
        let refusals = Refusals::default();
        refusals.add(1 << 40);
        assert_eq!(refusals.left.get(), REFUSED_AT_ONCE_MAX - 1);
    }
}
