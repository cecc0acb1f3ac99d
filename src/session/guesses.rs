//! Wrong passwords by the address that they come from: whoever guesses on is answered later and later, over however many connections.
//!
//! Only a wrong password waits. A right one is answered at once, so that a service behind the same address as one that guesses, or that is
//! configured wrongly, notices nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::{GUESS_ADDRESSES_MAX, GUESS_DELAYS_MAX, GUESSES_FREE, GUESSES_WITHIN};

/// See the module. Shared by every thread.
#[derive(Debug, Default)]
pub struct Guesses {
    wrong: Mutex<HashMap<IpAddr, (u32, Instant), foldhash::fast::RandomState>>,
}

impl Guesses {
    /// Counts one more wrong password from this address; returns how long its answer waits, `step` being what each further one adds.
    pub fn wrong(&self, address: IpAddr, now: Instant, step: Duration) -> Duration {
        step * self.count(network(address), now).saturating_sub(GUESSES_FREE).min(GUESS_DELAYS_MAX)
    }

    /// How many there have been, no two of them further apart than [`GUESSES_WITHIN`].
    fn count(&self, address: IpAddr, now: Instant) -> u32 {
        let is_over = |last: Instant| now.saturating_duration_since(last) > GUESSES_WITHIN;
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if wrong.len() >= GUESS_ADDRESSES_MAX && !wrong.contains_key(&address) {
            wrong.retain(|_, (_, last)| !is_over(*last));
            if wrong.len() >= GUESS_ADDRESSES_MAX {
                // So many guess at a time that nobody is believed to have mistyped.
                return u32::MAX;
            }
        }
        let (count, last) = wrong.entry(address).or_insert((0, now));
        *count = if is_over(*last) { 1 } else { count.saturating_add(1) };
        *last = now;
        *count
    }
}

/// What one guesser has for itself: an address of IPv4, and of IPv6 the network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(six) => IpAddr::from((six.to_bits() & !u128::from(u64::MAX)).to_be_bytes()),
        four => four,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(50);

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn each_further_one_waits_longer_until_the_address_was_quiet() {
        let guesses = Guesses::default();
        let begin = Instant::now();
        let wait = |at: Duration, from: &str| guesses.wrong(address(from), begin + at, STEP).as_millis();
        let waits: Vec<_> = (0..GUESSES_FREE + 3).map(|_| wait(Duration::ZERO, "10.0.0.1")).collect();
        assert_eq!(waits, [0, 0, 0, 50, 100, 150]);
        assert_eq!(wait(Duration::ZERO, "10.0.0.2"), 0, "another address");
        (0..100).for_each(|_| _ = wait(GUESSES_WITHIN, "10.0.0.1"));
        assert_eq!(wait(GUESSES_WITHIN, "::ffff:10.0.0.1"), 50 * u128::from(GUESS_DELAYS_MAX), "the same address, written otherwise");
        assert_eq!(wait(GUESSES_WITHIN * 2 + Duration::from_millis(1), "10.0.0.1"), 0);
        (0..GUESSES_FREE).for_each(|n| assert_eq!(wait(Duration::ZERO, &format!("2001:db8::{n}")), 0));
        assert_eq!(wait(Duration::ZERO, "2001:db8::ffff:9"), 50, "the same network");
        assert_eq!(wait(Duration::ZERO, "2001:db8:0:1::1"), 0);
    }

    #[test]
    fn addresses_are_bounded_and_forgotten() {
        let guesses = Guesses::default();
        let begin = Instant::now();
        for n in 0..u32::try_from(GUESS_ADDRESSES_MAX).unwrap() {
            assert_eq!(guesses.wrong(IpAddr::from(n.to_be_bytes()), begin, STEP), Duration::ZERO);
        }
        let one_more = address("192.168.0.1");
        assert_eq!(guesses.wrong(one_more, begin, STEP), STEP * GUESS_DELAYS_MAX);
        assert_eq!(guesses.wrong(one_more, begin + GUESSES_WITHIN + STEP, STEP), Duration::ZERO);
        assert_eq!(guesses.wrong.lock().unwrap().len(), 1);
    }
}
