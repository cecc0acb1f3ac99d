//! Wrong passwords by the address that they come from: whoever guesses on is answered later and later, over however many connections.
//!
//! Once an address has been wrong too often, its names and passwords are looked at one after the other, in the order in which they come. The next
//! one's turn begins when the one before is decided: at once if that was right, and if it was wrong, when its answer goes out. So it gains nothing to
//! guess on without waiting for answers, or over many connections at once, and those who are right hold up nobody. Who leaves while it waits has not
//! been looked at, and does not count. Names queue in [`GUESS_QUEUES`] parts, so that one service's wrong password mostly does not hold up another
//! service that has the same address.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::{GUESS_ADDRESSES_MAX, GUESS_DELAYS_MAX, GUESS_QUEUES, GUESSES_FREE, GUESSES_WITHIN};

/// See the module. Shared by every thread.
#[derive(Debug, Default)]
pub struct Guesses {
    table: Mutex<Table>,
    /// Which names share a queue: nobody can choose one that shares another's.
    salt: RandomState,
}

#[derive(Debug, Default)]
struct Table {
    wrong: HashMap<IpAddr, Wrong, foldhash::fast::RandomState>,
    /// Each address once, with when it was looked at last: the oldest first.
    looked_at: VecDeque<(IpAddr, Instant)>,
}

#[derive(Debug)]
struct Wrong {
    /// How many there have been, no two of them further apart than [`GUESSES_WITHIN`].
    count: u32,
    last: Instant,
    /// Those in which anybody has waited, with the numbers of their parts.
    queues: Vec<(u64, Arc<Semaphore>)>,
}

/// Where a name and a password wait for their turn.
#[derive(Debug)]
pub struct Queue(Arc<Semaphore>);

/// The turn of a name and a password: until it is dropped, nobody else's in its queue begins.
#[derive(Debug)]
pub struct Turn {
    _held: OwnedSemaphorePermit,
}

/// What came of waiting for a turn.
#[derive(Debug)]
pub enum Waited {
    For(Turn),
    /// It did not begin in time.
    InVain,
}

impl Queue {
    /// Begins at once, where nobody has a turn or waits for one.
    pub fn begin(&self) -> Option<Turn> {
        Arc::clone(&self.0).try_acquire_owned().ok().map(|held| Turn { _held: held })
    }

    /// Waits behind those who came before, and no longer than `within`. Dropped, it leaves the queue.
    pub async fn wait(self, within: Duration) -> Waited {
        match tokio::time::timeout(within, self.0.acquire_owned()).await {
            Ok(Ok(held)) => Waited::For(Turn { _held: held }),
            _ => Waited::InVain,
        }
    }
}

impl Guesses {
    /// Where one more password for this name has to wait for its turn; `None` where it may be looked at without: the next wrong one of this address
    /// is answered at once. `step` is what each further wrong one adds.
    pub fn queue(&self, address: IpAddr, name: &[u8], now: Instant, step: Duration) -> Option<Queue> {
        let mut table = self.table();
        let wrong = table.wrong.get_mut(&network(address))?;
        if step.is_zero() || wrong.count < GUESSES_FREE || is_over(wrong.last, now) {
            return None;
        }
        let part = self.part(name);
        if let Some((_, queue)) = wrong.queues.iter().find(|(known, _)| *known == part) {
            return Some(Queue(Arc::clone(queue)));
        }
        let queue = Arc::new(Semaphore::new(1));
        wrong.queues.push((part, Arc::clone(&queue)));
        Some(Queue(queue))
    }

    fn part(&self, name: &[u8]) -> u64 {
        self.salt.hash_one(name) % GUESS_QUEUES
    }

    /// Counts one more wrong password; returns how long its answer waits.
    pub fn wrong(&self, address: IpAddr, now: Instant, step: Duration) -> Duration {
        let address = network(address);
        let mut table = self.table();
        table.forget(now);
        if table.wrong.len() >= GUESS_ADDRESSES_MAX && !table.wrong.contains_key(&address) {
            // So many guess at a time that nobody is believed to have mistyped.
            return step * GUESS_DELAYS_MAX;
        }
        if let Some(wrong) = table.wrong.get_mut(&address) {
            return wrong.one_more(now, step);
        }
        table.wrong.insert(address, Wrong { count: 1, last: now, queues: Vec::new() });
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

    /// A queue as it is once an address has been wrong so often that the next wrong answer waits.
    fn suspect(guesses: &Guesses, from: &str, name: &[u8], now: Instant) -> Queue {
        for _ in 0..GUESSES_FREE {
            assert!(guesses.queue(address(from), name, now, STEP).is_none());
            assert_eq!(guesses.wrong(address(from), now, STEP), Duration::ZERO);
        }
        guesses.queue(address(from), name, now, STEP).unwrap()
    }

    #[tokio::test]
    async fn turns_begin_in_their_order_each_when_the_one_before_is_decided() {
        let guesses = Guesses::default();
        let now = Instant::now();
        let queue = || guesses.queue(address("10.0.0.1"), b"shop", now, STEP).unwrap();
        let turn = suspect(&guesses, "10.0.0.1", b"shop", now).begin().unwrap();
        assert!(queue().begin().is_none(), "one at a time");
        let long = Duration::from_secs(60);
        let (mut second, mut leaves, mut third) =
            (Box::pin(queue().wait(long)), Box::pin(queue().wait(long)), Box::pin(queue().wait(long)));
        for waiting in [&mut second, &mut leaves, &mut third] {
            assert!(by_now(waiting).is_none());
        }
        assert!(matches!(queue().wait(Duration::from_millis(1)).await, Waited::InVain));
        // However long ago it came: what is decided ends its turn, and nothing else does.
        drop(turn);
        let Some(Waited::For(turn)) = by_now(&mut second) else { panic!("its turn has come") };
        assert!(queue().begin().is_none() && by_now(&mut third).is_none());
        drop(leaves);
        drop(turn);
        let Some(Waited::For(turn)) = by_now(&mut third) else { panic!("who has left has no turn") };
        drop(turn);
        // As many as are right follow each other at once, and none of them counts as wrong.
        for _ in 0..1_000 {
            assert!(queue().begin().is_some());
        }
        assert_eq!(guesses.wrong(address("10.0.0.1"), now, STEP), STEP);
    }

    /// What a future has come to by now.
    fn by_now<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        match future.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }

    #[test]
    fn other_names_addresses_and_times_do_not_wait() {
        let guesses = Guesses::default();
        let now = Instant::now();
        let turn = suspect(&guesses, "10.0.0.1", b"shop", now).begin();
        assert!(turn.is_some());
        let other = (0..).map(|n| format!("other-{n}")).find(|name| guesses.part(name.as_bytes()) != guesses.part(b"shop")).unwrap();
        assert!(guesses.queue(address("10.0.0.1"), other.as_bytes(), now, STEP).unwrap().begin().is_some());
        assert!(guesses.queue(address("10.0.0.2"), b"shop", now, STEP).is_none());
        assert!(guesses.queue(address("10.0.0.1"), b"shop", now, Duration::ZERO).is_none());
        assert!(guesses.queue(address("10.0.0.1"), b"shop", now + GUESSES_WITHIN + STEP, STEP).is_none());
        // However many names there are, their queues are bounded.
        (0..1_000).for_each(|n| _ = guesses.queue(address("10.0.0.1"), format!("name-{n}").as_bytes(), now, STEP));
        assert!(guesses.table().wrong[&address("10.0.0.1")].queues.len() <= usize::try_from(GUESS_QUEUES).unwrap());
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
