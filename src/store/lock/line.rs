//! Those of this sidecar who want one lock, in the order in which they came, and whose turn it is among the sidecars.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use super::Answer;
use crate::domain::Id;
use crate::limits::{LOCK_ECHO_WITHIN, LOCK_STAY_OUT};

/// By what a lock came to be acquired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// It was free at the first try.
    Free,
    /// The same owner held it already.
    Again,
    /// It was handed on by the one before in the same sidecar.
    Passed,
    /// This sidecar released it.
    Release,
    /// Another one said that it released it.
    Message,
    /// The subscription had been lost, and was there again.
    Resubscribed,
    /// Nobody said anything: its lease had ended, or a message was lost.
    Timer,
}

impl By {
    /// Its metric's label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Again => "again",
            Self::Passed => "passed",
            Self::Release => "release",
            Self::Message => "message",
            Self::Resubscribed => "resubscribed",
            Self::Timer => "timer",
        }
    }
}

/// One client that wants the lock.
pub(super) struct Waiter {
    /// The name of every try for it: what one of them got is known to the next.
    pub op: String,
    pub lease: Duration,
    pub owner: Option<Id>,
    /// Whether it is held while a connection lives.
    pub session: bool,
    /// Whether it waits where somebody holds it.
    pub patient: bool,
    /// Whether the server itself asks.
    pub of_the_server: bool,
    pub arrived: Instant,
    pub answer: oneshot::Sender<Answer>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Line {
    /// By their numbers, which grow.
    pub waiters: BTreeMap<u64, Waiter>,
    /// Whether a task looks after it.
    pub contending: bool,
    /// The waiter for whom a script is under way.
    pub trying: Option<u64>,
    /// Until when somebody holds it, as far as is known.
    pub held_until: Option<Instant>,
    /// Who that is, where it is somebody else: the field in the lock's key.
    pub holder: Option<String>,
    /// Wakes the task, and says why.
    pub wake: Arc<Notify>,
    pub woken: Option<By>,
    pub turn: Turn,
    /// Since when nobody waits.
    pub idle_since: Option<Instant>,
}

impl Line {
    /// Who is first, if anybody waits.
    pub fn head(&self) -> Option<(u64, &Waiter)> {
        self.waiters.first_key_value().map(|(id, waiter)| (*id, waiter))
    }

    /// Makes the task look again.
    pub fn rouse(&mut self, by: By) {
        self.woken = Some(by);
        self.wake.notify_one();
    }

    /// Somebody said on the lock's channel that it is free. Whether that was another sidecar or service, as far as can be told.
    pub fn heard(&mut self, now: Instant) -> bool {
        if self.turn.is_echo(now) {
            return false;
        }
        self.turn.others_had_it();
        self.rouse(By::Message);
        true
    }

    /// Who is to have it next if it is released now, for whom no script is under way.
    pub fn heir(&self, now: Instant, max_turn: Duration) -> Option<(u64, &Waiter)> {
        let free_to_pass = self.trying.is_none() && self.turn.lasts(now, max_turn);
        self.head().filter(|_| free_to_pass)
    }
}

/// How long this sidecar has had a lock, so that others get their share.
#[derive(Debug, Default)]
pub(super) struct Turn {
    began: Option<Instant>,
    released: Option<Instant>,
    /// Whether a release that tells everybody is under way.
    releasing: bool,
    /// Until when others are left to take it.
    out_until: Option<Instant>,
    /// Until when a message is taken for that of our own release.
    echo_until: Option<Instant>,
}

impl Turn {
    /// It was acquired, after no more than a moment by the same sidecar: the turn goes on.
    pub fn acquired(&mut self, now: Instant) {
        let goes_on = self.released.is_some_and(|released| now.saturating_duration_since(released) < LOCK_STAY_OUT);
        if !goes_on || self.began.is_none() {
            self.began = Some(now);
        }
        self.out_until = None;
    }

    /// Whether the lock may be passed on inside this sidecar.
    pub fn lasts(&self, now: Instant, max_turn: Duration) -> bool {
        self.began.is_some_and(|began| now.saturating_duration_since(began) < max_turn)
    }

    /// It is being released for everybody, ourselves included where we are `subscribed`.
    pub fn releases(&mut self, now: Instant, subscribed: bool) {
        self.releasing = true;
        self.echo_until = subscribed.then(|| now + LOCK_ECHO_WITHIN);
    }

    /// It was; `others` wait for it elsewhere.
    pub fn released(&mut self, now: Instant, max_turn: Duration, others: bool) {
        let over = !self.lasts(now, max_turn);
        self.releasing = false;
        self.released = Some(now);
        if !others {
            self.began = None;
        } else if over {
            self.out_until = Some(now + LOCK_STAY_OUT);
        }
    }

    /// Nothing came of it.
    pub fn not_released(&mut self) {
        self.releasing = false;
        self.echo_until = None;
    }

    /// Another one has had it.
    pub fn others_had_it(&mut self) {
        self.began = None;
        self.out_until = None;
    }

    /// Whether nobody here may try yet; and until when, if that is known.
    pub fn keeps_out(&self, now: Instant) -> Option<Option<Instant>> {
        if self.releasing {
            return Some(None);
        }
        self.out_until.filter(|until| *until > now).map(Some)
    }

    fn is_echo(&mut self, now: Instant) -> bool {
        self.echo_until.take().is_some_and(|until| until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_TURN: Duration = Duration::from_millis(20);

    #[test]
    fn a_turn_ends_after_its_time_and_others_are_let_in() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut turn = Turn::default();
        turn.acquired(at(0));
        assert!(turn.lasts(at(19), MAX_TURN) && !turn.lasts(at(20), MAX_TURN));
        turn.releases(at(21), true);
        assert_eq!(turn.keeps_out(at(21)), Some(None));
        turn.released(at(21), MAX_TURN, true);
        assert_eq!(turn.keeps_out(at(22)), Some(Some(at(26))));
        assert_eq!(turn.keeps_out(at(26)), None);
        turn.acquired(at(26));
        assert!(turn.lasts(at(45), MAX_TURN), "nobody else wanted it: a new turn");
    }

    #[test]
    fn a_turn_goes_on_over_a_release_that_nobody_else_used() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut turn = Turn::default();
        turn.acquired(at(0));
        turn.releases(at(10), true);
        turn.released(at(10), MAX_TURN, true);
        assert_eq!(turn.keeps_out(at(11)), None, "its turn was not over");
        turn.acquired(at(12));
        assert!(!turn.lasts(at(20), MAX_TURN), "it counts from the first");
        turn.releases(at(21), true);
        turn.released(at(21), MAX_TURN, false);
        assert_eq!(turn.keeps_out(at(21)), None, "nobody else waits");
    }

    #[test]
    fn the_message_of_an_own_release_lets_nobody_in_and_that_of_another_does() {
        let start = Instant::now();
        let mut line = Line::default();
        line.turn.acquired(start);
        line.turn.releases(start + MAX_TURN, true);
        line.turn.released(start + MAX_TURN, MAX_TURN, true);
        assert!(!line.heard(start + MAX_TURN));
        assert!(line.turn.keeps_out(start + MAX_TURN).is_some() && line.woken.is_none());
        assert!(line.heard(start + MAX_TURN));
        assert!(line.turn.keeps_out(start + MAX_TURN).is_none());
        assert_eq!(line.woken, Some(By::Message));
        line.turn.releases(start + MAX_TURN, false);
        assert!(line.heard(start + MAX_TURN), "our own is not heard here");
    }
}
