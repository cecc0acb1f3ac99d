//! Wrong passwords by the address that they come from: whoever guesses on is answered later and later, over however many connections.
//!
//! A wrong password's answer waits, and while it does, no other name and password of that address are looked at: each has a turn, as long as its
//! answer would wait if it is wrong. So it gains nothing to guess on without waiting for answers, or over many connections at once. A right one
//! is answered as its turn comes. Where nobody guesses, everybody's turn is at once.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::{GUESS_ADDRESSES_MAX, GUESS_DELAYS_MAX, GUESSES_FREE, GUESSES_WITHIN};

/// See the module. Shared by every thread.
#[derive(Debug, Default)]
pub struct Guesses {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    wrong: HashMap<IpAddr, Wrong, foldhash::fast::RandomState>,
    /// Each address once, with when it was looked at last: the oldest first.
    looked_at: VecDeque<(IpAddr, Instant)>,
}

#[derive(Debug)]
struct Wrong {
    /// How many there have been, no two of them further apart than [`GUESSES_WITHIN`]; those whose turn is yet to come count.
    count: u32,
    last: Instant,
    /// Until when all turns last that have been given out.
    busy: Instant,
}

/// When a name and a password are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// At once.
    Now,
    /// Then. Where they are wrong, they count already, and their answer waits so long after that.
    At(Instant, Duration),
    /// Not at all: too many of this address wait.
    Never,
}

impl Guesses {
    /// The turn of one more name and password from this address; `step` is what each further wrong one adds, `within` how long it may wait.
    pub fn turn(&self, address: IpAddr, now: Instant, step: Duration, within: Duration) -> Turn {
        let mut table = self.table();
        let Some(wrong) = table.wrong.get_mut(&network(address)).filter(|wrong| wrong.busy > now) else { return Turn::Now };
        if wrong.busy - now > within {
            return Turn::Never;
        }
        let at = wrong.busy;
        let delay = wrong.one_more(now, step);
        wrong.busy = at + delay;
        Turn::At(at, delay)
    }

    /// What had to wait for its turn was right: it counts no more.
    pub fn right(&self, address: IpAddr) {
        if let Some(wrong) = self.table().wrong.get_mut(&network(address)) {
            wrong.count = wrong.count.saturating_sub(1);
        }
    }

    /// Counts one more wrong password that was looked at at once; returns how long its answer waits.
    pub fn wrong(&self, address: IpAddr, now: Instant, step: Duration) -> Duration {
        let address = network(address);
        let mut table = self.table();
        table.forget(now);
        if table.wrong.len() >= GUESS_ADDRESSES_MAX && !table.wrong.contains_key(&address) {
            // So many guess at a time that nobody is believed to have mistyped.
            return step * GUESS_DELAYS_MAX;
        }
        if let Some(wrong) = table.wrong.get_mut(&address) {
            let delay = wrong.one_more(now, step);
            wrong.busy = wrong.busy.max(now + delay);
            return delay;
        }
        table.wrong.insert(address, Wrong { count: 1, last: now, busy: now });
        table.looked_at.push_back((address, now));
        Duration::ZERO
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wrong {
    /// Counts one more, and returns how long its answer waits.
    fn one_more(&mut self, now: Instant, step: Duration) -> Duration {
        self.count = if is_over(self.last, now) { 1 } else { self.count.saturating_add(1) };
        self.last = now;
        step * self.count.saturating_sub(GUESSES_FREE).min(GUESS_DELAYS_MAX)
    }
}

impl Table {
    /// Forgets who has been quiet. Each address is looked at once in [`GUESSES_WITHIN`], however many guesses come.
    fn forget(&mut self, now: Instant) {
        while let Some((address, at)) = self.looked_at.front().copied().filter(|(_, at)| is_over(*at, now)) {
            self.looked_at.pop_front();
            match self.wrong.get(&address) {
                Some(wrong) if !is_over(wrong.last, now) => self.looked_at.push_back((address, now.max(at))),
                _ => _ = self.wrong.remove(&address),
            }
        }
    }
}

fn is_over(last: Instant, now: Instant) -> bool {
    now.saturating_duration_since(last) > GUESSES_WITHIN
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
        let table = guesses.table();
        assert_eq!((table.wrong.len(), table.looked_at.len()), (1, 1));
    }

    #[test]
    fn whoever_does_not_wait_for_the_answer_waits_for_its_turn() {
        let guesses = Guesses::default();
        let (begin, from) = (Instant::now(), address("10.0.0.1"));
        let within = Duration::from_millis(400);
        let turn = |at: Duration| guesses.turn(from, begin + at, STEP, within);
        for _ in 0..GUESSES_FREE {
            assert_eq!(turn(Duration::ZERO), Turn::Now);
            assert_eq!(guesses.wrong(from, begin, STEP), Duration::ZERO);
        }
        assert_eq!((turn(Duration::ZERO), guesses.wrong(from, begin, STEP)), (Turn::Now, STEP));
        // All of these come before any of them is answered.
        assert_eq!(turn(Duration::ZERO), Turn::At(begin + STEP, STEP * 2));
        assert_eq!(turn(Duration::ZERO), Turn::At(begin + STEP * 3, STEP * 3));
        assert_eq!(turn(Duration::ZERO), Turn::At(begin + STEP * 6, STEP * 4));
        assert_eq!(turn(Duration::ZERO), Turn::Never, "it would wait for 500 ms");
        assert_eq!(guesses.turn(address("10.0.0.2"), begin, STEP, within), Turn::Now, "another address");
        // One was right: the next is as long as the one before.
        guesses.right(from);
        assert_eq!(turn(STEP * 5), Turn::At(begin + STEP * 10, STEP * 4));
        assert_eq!(turn(STEP * 14), Turn::Now);
    }

    #[test]
    fn an_address_that_guesses_on_is_remembered_and_looked_at_once() {
        let guesses = Guesses::default();
        let begin = Instant::now();
        for n in 0..1_000_u32 {
            let now = begin + GUESSES_WITHIN / 100 * n;
            guesses.wrong(address("10.0.0.1"), now, STEP);
            guesses.wrong(IpAddr::from(n.to_be_bytes()), now, STEP);
            let table = guesses.table();
            assert_eq!(table.wrong.len(), table.looked_at.len());
            assert!(table.wrong[&address("10.0.0.1")].count > n && table.wrong.len() < 210, "{n}: {}", table.wrong.len());
        }
    }
}
