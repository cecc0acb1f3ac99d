//! What clients of this sidecar hold, as far as it knows: sessions' locks are renewed, and what has ended is counted.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::counter;
use tokio::sync::oneshot;

use super::Settings;
use crate::domain::LockName;
use crate::limits;

struct Hold {
    name: LockName,
    /// When its lease surely has ended, by our clock: it counts from before it was asked for.
    until: Instant,
    /// When that was said last: what was sent before says nothing more.
    said: Instant,
    session: Option<Session>,
}

struct Session {
    lease: Duration,
    renew_at: Instant,
    /// Beyond this it is not renewed.
    ends: Instant,
    /// Whether a renewal is under way.
    renewing: bool,
    lost: oneshot::Sender<()>,
}

/// One hold that is to be renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Renewal {
    pub name: LockName,
    pub token: u64,
    pub lease: Duration,
}

/// One hold whose lease has ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub name: LockName,
    pub token: u64,
    /// Whether it was a session's.
    pub session: bool,
}

/// See the module. By token: no two holds have the same. A token that comes from a client may be that of another lock, so the name has to fit.
#[derive(Default)]
pub(super) struct Holds(Mutex<HashMap<u64, Hold>>);

impl Holds {
    fn all(&self) -> MutexGuard<'_, HashMap<u64, Hold>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn len(&self) -> usize {
        self.all().len()
    }

    /// Whether it is held as far as is known.
    pub fn has(&self, token: u64) -> bool {
        self.all().contains_key(&token)
    }

    /// The hold of this lock under this token.
    fn take(&self, name: &LockName, token: u64) -> Option<Hold> {
        let mut all = self.all();
        all.get(&token).filter(|hold| hold.name == *name)?;
        all.remove(&token)
    }

    /// Notes a lock that was asked for at `sent`. For a session, given how it holds, returns what tells when it is lost. What no session holds is
    /// noted to count how it ends, and not where there is a great deal of it.
    pub fn add(
        &self,
        name: &LockName,
        token: u64,
        sent: Instant,
        lease: Duration,
        session: Option<&Settings>,
    ) -> Option<oneshot::Receiver<()>> {
        let (session, lost) = session
            .map(|settings| {
                let (lost, hears) = oneshot::channel();
                (Session { lease, renew_at: sent + lease / 3, ends: sent + settings.max_hold, renewing: false, lost }, hears)
            })
            .unzip();
        let mut all = self.all();
        if session.is_none() && all.len() >= limits::LOCKS_COUNTED_MAX && !all.contains_key(&token) {
            return None;
        }
        let hold = all.entry(token).or_insert_with(|| Hold { name: name.clone(), until: sent, said: sent, session: None });
        hold.until = hold.until.max(sent + lease);
        hold.session = session.or(hold.session.take());
        lost
    }

    /// It was released, or whoever held it knows that it is held no more.
    pub fn remove(&self, name: &LockName, token: u64) {
        drop(self.take(name, token));
    }

    /// It was found to be held no more.
    pub fn lose(&self, name: &LockName, token: u64) {
        if let Some(hold) = self.take(name, token) {
            lose(hold);
        }
    }

    /// Its client has left.
    pub fn renew_no_more(&self, token: u64) {
        if let Some(hold) = self.all().get_mut(&token) {
            hold.session = None;
        }
    }

    /// How long it may last from `now` on where somebody asks for `lease`; `None` where its session may hold it no longer.
    pub fn bounded(&self, name: &LockName, token: u64, lease: Duration, now: Instant) -> Option<Duration> {
        let mut all = self.all();
        let Some(session) = of(&mut all, name, token).and_then(|hold| hold.session.as_ref()) else { return Some(lease) };
        let left = session.ends.saturating_duration_since(now);
        (left >= Duration::from_millis(1)).then(|| lease.min(left))
    }

    /// It was asked at `sent` to last so long from then on. A session's is renewed in time for that.
    pub fn extended(&self, name: &LockName, token: u64, sent: Instant, lease: Duration) {
        if let Some(hold) = of(&mut self.all(), name, token) {
            (hold.until, hold.said) = (sent + lease, sent);
            if let Some(session) = &mut hold.session {
                session.renew_at = session.renew_at.min(sent + lease / 3);
            }
        }
    }

    /// It was asked at `sent` to last so long from then on, and may have been: a session's may end by that, and is renewed at once.
    pub fn may_be_extended(&self, name: &LockName, token: u64, sent: Instant, lease: Duration) {
        if let Some(hold) = of(&mut self.all(), name, token)
            && let Some(session) = &mut hold.session
        {
            (hold.until, hold.said) = (hold.until.min(sent + lease), sent);
            session.renew_at = sent;
        }
    }

    /// The sessions' locks that are to be renewed now. Each is due again a third of its lease later.
    pub fn due(&self, now: Instant) -> Vec<Renewal> {
        let mut due = Vec::new();
        for (token, hold) in self.all().iter_mut() {
            let Some(session) = &mut hold.session else { continue };
            let left = session.ends.saturating_duration_since(now);
            if session.renewing || now < session.renew_at || now >= hold.until || left.is_zero() {
                continue;
            }
            session.renewing = true;
            due.push(Renewal { name: hold.name.clone(), token: *token, lease: session.lease.min(left) });
        }
        due
    }

    /// What became of a renewal: when it was sent, or `None` where the lock was held no more.
    pub fn renewed(&self, renewal: &Renewal, sent: Option<Instant>) {
        match sent {
            Some(sent) => {
                if let Some(hold) = self.all().get_mut(&renewal.token) {
                    let is_news = sent >= hold.said;
                    if is_news {
                        hold.until = hold.until.max(sent + renewal.lease);
                    }
                    if let Some(session) = &mut hold.session {
                        session.renewing = false;
                        if is_news {
                            session.renew_at = sent + session.lease / 3;
                        }
                    }
                }
            }
            None => self.lose(&renewal.name, renewal.token),
        }
    }

    /// A renewal could not be carried out: it is due again at once.
    pub fn not_renewed(&self, renewal: &Renewal) {
        if let Some(session) = self.all().get_mut(&renewal.token).and_then(|hold| hold.session.as_mut()) {
            session.renewing = false;
        }
    }

    /// Removes the holds whose leases have ended, and returns them; of `all` or only of sessions. They may have been released through
    /// another sidecar before.
    pub fn end(&self, now: Instant, all: bool) -> Vec<Ended> {
        let mut holds = self.all();
        let ended: Vec<u64> =
            holds.iter().filter(|(_, hold)| now >= hold.until && (all || hold.session.is_some())).map(|(token, _)| *token).collect();
        let ended: Vec<(u64, Hold)> = ended.iter().filter_map(|token| holds.remove_entry(token)).collect();
        drop(holds);
        let gone = |(token, hold): (u64, Hold)| {
            let ended = Ended { name: hold.name.clone(), token, session: hold.session.is_some() };
            lose(hold);
            ended
        };
        ended.into_iter().map(gone).collect()
    }

    /// The locks of all sessions.
    pub fn sessions(&self) -> Vec<(LockName, u64)> {
        let all = self.all();
        all.iter().filter(|(_, hold)| hold.session.is_some()).map(|(token, hold)| (hold.name.clone(), *token)).collect()
    }
}

/// The hold of this lock under this token, among all.
fn of<'a>(all: &'a mut HashMap<u64, Hold>, name: &LockName, token: u64) -> Option<&'a mut Hold> {
    all.get_mut(&token).filter(|hold| hold.name == *name)
}

/// Tells a session that its lock is gone.
fn lose(hold: Hold) {
    if let Some(session) = hold.session {
        counter!("holdfast_lock_lost_total").increment(1);
        // A session that has ended does not hear it.
        _ = session.lost.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Id;

    const LEASE: Duration = Duration::from_secs(9);

    fn settings() -> Settings {
        Settings {
            redis_url: String::new(),
            instance: String::new(),
            session_lease: LEASE,
            max_hold: Duration::from_secs(20),
            max_turn: Duration::ZERO,
            coupon_lease: None,
        }
    }

    #[test]
    fn a_session_is_renewed_at_a_third_and_never_beyond_its_end() {
        let (holds, name) = (Holds::default(), LockName::of(Id::from("l")).unwrap());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut lost = holds.add(&name, 7, start, LEASE, Some(&settings())).unwrap();
        assert_eq!(holds.due(at(2)), []);
        let first = Renewal { name: name.clone(), token: 7, lease: LEASE };
        assert_eq!(holds.due(at(3)), std::slice::from_ref(&first));
        assert_eq!(holds.due(at(3)), [], "one renewal at a time");
        holds.renewed(&first, Some(at(3)));
        assert_eq!(holds.due(at(5)), []);
        let last = holds.due(at(12)).pop();
        assert_eq!(last, None, "its lease had ended: it is not brought back");
        holds.add(&name, 8, start, LEASE, Some(&settings()));
        holds.extended(&name, 8, start, Duration::from_secs(18));
        let last = holds.due(at(15)).pop().unwrap();
        assert_eq!((last.token, last.lease), (8, Duration::from_secs(5)));
        holds.renewed(&last, Some(at(15)));
        assert_eq!(holds.due(at(20)), []);
        holds.end(at(13), false);
        assert!(lost.try_recv().is_ok() && !holds.has(7) && holds.has(8));
        holds.end(at(20), false);
        assert_eq!(holds.len(), 0);
    }

    #[test]
    fn what_a_session_is_given_by_hand_is_kept_by_its_renewals_and_bounded_by_its_end() {
        let (holds, name) = (Holds::default(), LockName::of(Id::from("l")).unwrap());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let _lost = holds.add(&name, 7, start, LEASE, Some(&settings()));
        assert_eq!(holds.bounded(&name, 7, Duration::from_secs(60), at(2)), Some(Duration::from_secs(18)));
        assert_eq!(holds.bounded(&name, 7, Duration::from_secs(5), at(2)), Some(Duration::from_secs(5)));
        assert_eq!(holds.bounded(&name, 7, Duration::from_secs(60), at(20)), None);
        assert_eq!(holds.bounded(&name, 8, Duration::from_secs(60), at(20)), Some(Duration::from_secs(60)), "no session's");
        // Longer than a renewal gives.
        holds.extended(&name, 7, at(2), Duration::from_secs(16));
        let renewal = holds.due(at(3)).pop().unwrap();
        holds.renewed(&renewal, Some(at(3)));
        holds.end(at(17), false);
        assert!(holds.has(7), "a renewal does not take it back");
        holds.end(at(18), false);
        assert!(!holds.has(7));
        // Shorter, while a renewal of before is under way.
        let _lost = holds.add(&name, 9, start, LEASE, Some(&settings()));
        let renewal = holds.due(at(3)).pop().unwrap();
        holds.extended(&name, 9, at(4), Duration::from_secs(3));
        holds.renewed(&renewal, Some(at(3)));
        assert_eq!(holds.due(at(5)).len(), 1, "it is renewed in time");
        holds.end(at(7), false);
        assert!(!holds.has(9));
        // Shorter or not, that is not known; and longer or not.
        let _lost = holds.add(&name, 10, start, LEASE, Some(&settings()));
        holds.may_be_extended(&name, 10, at(1), Duration::from_secs(2));
        let renewal = holds.due(at(1)).pop().expect("it is renewed at once");
        holds.end(at(3), false);
        assert!(!holds.has(10), "it may have ended");
        holds.renewed(&renewal, Some(at(1)));
        let _lost = holds.add(&name, 11, start, LEASE, Some(&settings()));
        holds.may_be_extended(&name, 11, at(1), Duration::from_secs(12));
        holds.end(at(9), false);
        assert!(!holds.has(11), "it may not have been extended");
    }

    #[test]
    fn a_lock_whose_client_has_left_is_renewed_no_more() {
        let (holds, name, now) = (Holds::default(), LockName::of(Id::from("l")).unwrap(), Instant::now());
        let hears = holds.add(&name, 1, now, LEASE, Some(&settings()));
        let renewal = holds.due(now + LEASE / 3).pop().unwrap();
        holds.not_renewed(&renewal);
        assert_eq!(holds.due(now + LEASE / 2).len(), 1);
        holds.not_renewed(&renewal);
        holds.renew_no_more(1);
        assert!(holds.due(now + LEASE / 2).is_empty() && holds.has(1));
        drop(hears);
    }

    #[test]
    fn a_lock_that_is_released_is_neither_renewed_nor_lost() {
        let (holds, name) = (Holds::default(), LockName::of(Id::from("l")).unwrap());
        let start = Instant::now();
        let mut lost = holds.add(&name, 7, start, LEASE, Some(&settings())).unwrap();
        let renewal = holds.due(start + LEASE / 2).pop().unwrap();
        holds.remove(&name, 7);
        holds.renewed(&renewal, None);
        holds.end(start + LEASE * 2, true);
        assert_eq!(lost.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }
    #[test]
    fn a_token_changes_nothing_of_a_lock_of_another_name() {
        let (holds, name, other) = (Holds::default(), LockName::of(Id::from("l")).unwrap(), LockName::of(Id::from("m")).unwrap());
        let start = Instant::now();
        let mut lost = holds.add(&name, 7, start, LEASE, Some(&settings())).unwrap();
        holds.remove(&other, 7);
        holds.lose(&other, 7);
        assert_eq!(holds.bounded(&other, 7, LEASE * 9, start), Some(LEASE * 9), "its session says nothing of the other");
        holds.extended(&other, 7, start, LEASE / 9);
        holds.may_be_extended(&other, 7, start, LEASE / 9);
        assert_eq!((holds.end(start + LEASE / 2, true), lost.try_recv()), (Vec::new(), Err(oneshot::error::TryRecvError::Empty)));
        assert_eq!(holds.due(start), [], "it is not renewed early");
        holds.lose(&name, 7);
        assert!(lost.try_recv().is_ok() && !holds.has(7));
    }
}
