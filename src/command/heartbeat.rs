//! Whether replies are in time, and whose fault it is if not.
//!
//! A task on the thread that serves clients ticks every few ms and notes where the thread stood still: time passed, and it got none of it to
//! compute with. A reply that is late by no more than that had no chance; every other late reply is Holdfast's own doing.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::limits::{STALL_EVERY, STALL_MIN, STALLS_MAX};

/// A stretch in which the thread stood still.
struct Stall {
    ended: Instant,
    lasted: Duration,
}

/// See the module. Used by one thread only.
pub struct Heartbeat {
    stalls: RefCell<VecDeque<Stall>>,
    ticked: RefCell<Tick>,
    late_total: metrics::Counter,
    stalled_total: metrics::Counter,
    late_seconds: metrics::Histogram,
    stall_seconds: metrics::Histogram,
}

#[derive(Clone, Copy)]
struct Tick {
    at: Instant,
    /// What the thread had computed until then.
    computed: Duration,
}

impl Tick {
    fn now() -> Self {
        let computed = clock_gettime(ClockId::ThreadCPUTime);
        let nanoseconds = u32::try_from(computed.tv_nsec).unwrap_or(0);
        Self { at: Instant::now(), computed: Duration::new(u64::try_from(computed.tv_sec).unwrap_or(0), nanoseconds) }
    }

    /// For how long the thread stood still between this tick and a later moment.
    fn stalled_until(self, later: Self) -> Duration {
        let passed = later.at.saturating_duration_since(self.at);
        let stalled = passed.saturating_sub(later.computed.saturating_sub(self.computed).max(STALL_EVERY));
        if stalled < STALL_MIN { Duration::ZERO } else { stalled }
    }
}

impl Heartbeat {
    /// Made after the metrics recorder is installed: the handles are created here, once.
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            stalls: RefCell::default(),
            ticked: RefCell::new(Tick::now()),
            late_total: metrics::counter!("holdfast_late_replies_total"),
            stalled_total: metrics::counter!("holdfast_stalled_replies_total"),
            late_seconds: metrics::histogram!("holdfast_late_reply_seconds"),
            stall_seconds: metrics::histogram!("holdfast_stall_seconds"),
        })
    }

    /// Ticks for ever.
    pub async fn beat(self: Rc<Self>) {
        self.ticked.replace(Tick::now());
        loop {
            tokio::time::sleep(STALL_EVERY).await;
            let now = Tick::now();
            self.note(self.ticked.replace(now), now);
        }
    }

    fn note(&self, before: Tick, now: Tick) {
        let lasted = before.stalled_until(now);
        if !lasted.is_zero() {
            self.stall_seconds.record(lasted.as_secs_f64());
            let mut stalls = self.stalls.borrow_mut();
            if stalls.len() == STALLS_MAX {
                stalls.pop_front();
            }
            stalls.push_back(Stall { ended: now.at, lasted });
        }
    }

    /// Counts a reply to a request that arrived then, late by this much.
    pub fn late(&self, arrived: Instant, by: Duration) {
        if by <= self.stalled_since(arrived, Tick::now()) {
            self.stalled_total.increment(1);
        } else {
            self.late_total.increment(1);
            self.late_seconds.record(by.as_secs_f64());
        }
    }

    fn stalled_since(&self, arrived: Instant, now: Tick) -> Duration {
        let within = |ended: Instant, lasted: Duration| lasted.min(ended.saturating_duration_since(arrived));
        let stalls = self.stalls.borrow();
        let noted: Duration =
            stalls.iter().rev().map_while(|stall| (stall.ended > arrived).then(|| within(stall.ended, stall.lasted))).sum();
        noted + within(now.at, self.ticked.borrow().stalled_until(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_thread_that_computes_does_not_stand_still() {
        let tick = |start: Instant, at, computed| Tick { at: start + MS(at), computed: MS(computed) };
        let start = Instant::now();
        let stalled = |at, computed| tick(start, 0, 0).stalled_until(tick(start, at, computed));
        assert_eq!(stalled(5, 0), Duration::ZERO, "a tick in time");
        assert_eq!(stalled(7, 0), Duration::ZERO, "timers are a little late");
        assert_eq!(stalled(85, 80), Duration::ZERO, "our own work");
        assert_eq!(stalled(85, 0), MS(80));
        assert_eq!(stalled(85, 35), MS(50));
    }

    #[test]
    fn only_what_falls_into_the_life_of_a_request_counts_for_it() {
        let heartbeat = Heartbeat::new();
        let start = Instant::now();
        let tick = |at| Tick { at: start + MS(at), computed: Duration::ZERO };
        let mut last = tick(0);
        for at in [5, 45, 50, 115] {
            heartbeat.note(last, tick(at));
            last = tick(at);
        }
        heartbeat.ticked.replace(tick(115));
        let since = |arrived, now| heartbeat.stalled_since(start + MS(arrived), tick(now));
        assert_eq!(since(0, 116), MS(35 + 60));
        assert_eq!(since(30, 116), MS(15 + 60), "from its arrival on");
        assert_eq!(since(46, 116), MS(60));
        assert_eq!(since(116, 150), MS(30), "one that goes on");
        assert_eq!(since(116, 120), Duration::ZERO);
    }
}
