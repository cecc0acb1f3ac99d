//! Something that fails and is tried again: how long to wait, and what to say.

use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use crate::limits::{RELAY_BACKOFF_MAX, RELAY_BACKOFF_MIN, RELAY_LOG_EVERY};

/// One thing that may be failing: a connection, a transaction.
pub(super) struct Trouble {
    what: &'static str,
    since: Option<Instant>,
    logged: Option<Instant>,
    failures: u32,
}

impl Trouble {
    /// `what` names it in the log: "postgres".
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, since: None, logged: None, failures: 0 }
    }

    /// Counts a failure, logs it where it is the first or a while has passed, and returns how long to wait before the next try.
    pub(super) fn failed(&mut self, partition: u32, error: &impl Display) -> Duration {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        self.failures += 1;
        if self.logged.is_none_or(|logged| now.duration_since(logged) >= RELAY_LOG_EVERY) {
            self.logged = Some(now);
            let (failures, seconds) = (self.failures, now.duration_since(since).as_secs());
            tracing::warn!(partition, %error, failures, seconds, "{}: failed, trying again", self.what);
        }
        backoff(self.failures)
    }

    /// It works again, or still.
    pub(super) fn over(&mut self, partition: u32) {
        if let Some(since) = self.since.take() {
            tracing::info!(partition, failures = self.failures, seconds = since.elapsed().as_secs(), "{}: works again", self.what);
        }
        *self = Self::new(self.what);
    }

    /// How often it failed in a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }
}

/// The wait after so many failures in a row: doubling, between half and all of it by chance, so that sidecars that failed together do
/// not come back together.
fn backoff(failures: u32) -> Duration {
    let whole = RELAY_BACKOFF_MIN.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(RELAY_BACKOFF_MAX);
    // A fresh RandomState is as random as this needs.
    let chance = RandomState::new().hash_one(failures) % 1_000;
    whole / 2 + whole.mul_f64(chance as f64 / 2_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_are_never_all_of_it_off() {
        for _ in 0..100 {
            for (failures, whole) in
                [(1, RELAY_BACKOFF_MIN), (2, RELAY_BACKOFF_MIN * 2), (30, RELAY_BACKOFF_MAX), (u32::MAX, RELAY_BACKOFF_MAX)]
            {
                let wait = backoff(failures);
                assert!(wait >= whole / 2 && wait <= whole, "{failures}: {wait:?}");
            }
        }
    }

    #[test]
    fn what_works_again_starts_over() {
        let mut trouble = Trouble::new("test");
        for _ in 0..9 {
            trouble.failed(0, &"no");
        }
        assert_eq!(trouble.failures(), 9);
        trouble.over(0);
        assert_eq!(trouble.failures(), 0);
        assert!(trouble.failed(0, &"no") <= RELAY_BACKOFF_MIN);
    }
}
