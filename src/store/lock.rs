//! Locks on the backing Redis, in Redisson's layout, for all threads of this sidecar.
//!
//! Those who want one lock stand in a line, first come first served; one task a line tries for the first of them, sleeps until it is told
//! that the lock is free, and looks itself now and then. A release passes the lock on to the next in line, in the same script, until the
//! turn of this sidecar is over; then everybody else gets a chance. Every try and release is a script that can be repeated: it
//! carries a name, and is carried out once.
//!
//! What is won for a client that has gone is released at once: a [`Grant`] that nobody takes releases itself.

mod call;
mod hold;
mod line;
pub mod link;
mod subscriber;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use metrics::{counter, gauge, histogram};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use self::call::{Asked, Released, Tried};
use self::hold::Holds;
use self::line::{By, Line, Waiter};
use self::link::{EpochRequest, Link, jittered};
use self::subscriber::{Heard, Subscriber};
use crate::domain::{Id, LockName};
use crate::limits;

/// How locks are held.
#[derive(Clone, Debug)]
pub struct Settings {
    pub redis_url: String,
    /// This process, among the sidecars.
    pub instance: String,
    /// How long a session's lock lasts without being renewed.
    pub session_lease: Duration,
    /// How long a session may hold a lock.
    pub max_hold: Duration,
    /// How long this sidecar passes a lock on among its own clients while others may want it.
    pub max_turn: Duration,
    /// How long a coupon's lock lasts in Redis if this process dies while it issues; `None`: it takes none.
    pub coupon_lease: Option<Duration>,
}

/// What a client asks for. It is kept for as long as it waits and holds: what it names is in memory of its own.
#[derive(Debug)]
pub struct Ask {
    pub name: LockName,
    /// Of no account for a session.
    pub lease: Duration,
    /// Who may acquire it once more.
    pub owner: Option<Id>,
    /// Held while a connection lives.
    pub session: bool,
    /// Waits where somebody holds it.
    pub patient: bool,
    /// The server itself asks, to issue the lock's coupon, which has to be there: also while it shuts down.
    pub of_the_server: bool,
}

/// What a client is told.
#[derive(Debug)]
pub enum Answer {
    Got(Grant),
    /// Somebody holds it, for so many ms; -1: without end.
    Held(i64),
    Refused(Refusal),
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Surely not done.
    TryAgain(String),
    /// Surely not done: starting or shutting down.
    Loading(String),
    /// Sent, and no answer in time.
    InDoubt,
    /// Surely not done: Redis, or this sidecar, refuses it, and would again.
    Failed(String),
    /// The key holds something of this type.
    NotALock(String),
    /// The server itself asked for the lock of a coupon that Redis does not have.
    NoCoupon,
}

/// What LOCK.INFO shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    /// OWNER, or the field in the lock's key.
    pub owner: String,
    /// `None` where it is not held by a client of this installation.
    pub token: Option<String>,
    pub remaining_ms: i64,
    /// How many wait for it in this sidecar.
    pub waiters: usize,
}

/// A lock that was acquired. Dropped without [`Grant::take`], it is released.
#[derive(Debug)]
pub struct Grant {
    locks: Locks,
    pub name: LockName,
    pub token: u64,
    /// How long it lasts.
    pub lease_ms: i64,
    /// Of a session: told when it was lost.
    pub lost: Option<oneshot::Receiver<()>>,
    /// Whether it is noted whether it is still held.
    noted: bool,
    taken: bool,
}

impl Grant {
    /// From here on the client releases it.
    pub fn take(mut self) {
        self.taken = true;
    }

    /// It is not held any more: there is nothing to release.
    pub fn lost(mut self) {
        self.locks.0.holds.remove(&self.name, self.token);
        self.taken = true;
    }

    /// Releases it. Returns once Redis has done that, or will not, or it is not known whether it has. Dropped, it goes on.
    pub async fn give_back(mut self) {
        if let Some(released) = self.let_go() {
            _ = released.await;
        }
    }

    /// Begins to release it, where there is something to release. What is returned is told when that is over.
    fn let_go(&mut self) -> Option<oneshot::Receiver<()>> {
        if std::mem::replace(&mut self.taken, true) || (self.noted && !self.lasts()) {
            return None;
        }
        // Whether or not Redis can be told, nobody is there to renew it for.
        self.locks.0.holds.renew_no_more(self.token);
        Some(self.locks.0.release_soon(self.name.clone(), self.token))
    }

    /// The holder's field in the lock's key.
    pub fn field(&self) -> String {
        format!("{}:{}", self.locks.0.link.installation(), self.token)
    }

    /// Whether it is still held, as far as is known.
    pub fn lasts(&self) -> bool {
        self.locks.0.holds.has(self.token)
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Locks(Arc<Inner>);

impl std::fmt::Debug for Locks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Locks")
    }
}

struct Inner {
    settings: Settings,
    link: Link,
    subscriber: Subscriber,
    lines: Mutex<HashMap<LockName, Line>>,
    holds: Holds,
    numbers: AtomicU64,
    /// Read and written while `lines` is locked.
    closing: AtomicBool,
    /// Where tasks run.
    runtime: OnceLock<Handle>,
    /// The tasks that change something in Redis.
    under_way: TaskTracker,
    /// The threads whose clients hold locks.
    users: TaskTracker,
}

impl Locks {
    /// Connects to nothing yet. Whoever receives the requests answers them with what Postgres says.
    pub fn new(settings: Settings) -> (Self, mpsc::Receiver<EpochRequest>) {
        let (epochs, requests) = mpsc::channel(limits::LOCK_EPOCH_REQUESTS_MAX);
        let inner = Arc::new_cyclic(|inner| Inner {
            link: Link::new(&settings.redis_url, epochs),
            subscriber: Subscriber::new(&settings.redis_url, inner.clone()),
            lines: Mutex::default(),
            holds: Holds::default(),
            numbers: AtomicU64::new(1),
            closing: AtomicBool::new(false),
            runtime: OnceLock::new(),
            under_way: TaskTracker::new(),
            users: TaskTracker::new(),
            settings,
        });
        (Self(inner), requests)
    }

    /// Says where the tasks run: before anybody asks for anything.
    pub fn run_on(&self, runtime: &Handle) {
        _ = self.0.runtime.set(runtime.clone());
    }

    /// Keeps the connections, on the runtime that [`Locks::run_on`] has named. After `shutdown` nobody gets a lock any more; once the last user is gone and what sessions held is released, it
    /// ends.
    pub async fn run(&self, shutdown: CancellationToken) {
        let serving = async { tokio::join!(self.0.link.run(), self.0.subscriber.run(), self.0.look_after(), self.0.forget_idle()) };
        let closing = async {
            shutdown.cancelled().await;
            self.0.close();
            self.0.users.close();
            self.0.users.wait().await;
            self.0.release_sessions();
            self.0.under_way.close();
            _ = tokio::time::timeout(limits::LOCK_CLOSE_WITHIN, self.0.under_way.wait()).await;
        };
        tokio::select! { _ = serving => {}, () = closing => {} }
    }

    /// Says that there is one more thread whose clients hold locks, until this is dropped.
    pub fn user(&self) -> TaskTrackerToken {
        self.0.users.token()
    }

    /// How locks are held.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// Whether locks are served, and why not.
    pub fn trouble(&self) -> Option<String> {
        self.0.link.trouble()
    }

    /// How many clients of this sidecar wait.
    pub fn waiting(&self) -> usize {
        self.0.waiting()
    }

    /// Who holds it, as far as this sidecar was told when it tried for it, and for how many ms.
    pub fn holder(&self, name: &LockName) -> Option<(String, i64)> {
        let lines = self.0.lines();
        let line = lines.get(name)?;
        let left = line.held_until?.saturating_duration_since(Instant::now());
        line.holder.clone().map(|holder| (holder, millis(left)))
    }

    /// Stands in line, or asks once.
    pub fn acquire(&self, ask: Ask) -> Waiting {
        let inner = &self.0;
        let id = inner.number();
        let (answer, answered) = oneshot::channel();
        let Ask { name, lease, owner, session, patient, of_the_server } = ask;
        let waiter = Waiter {
            op: inner.op(),
            lease: if session { inner.settings.session_lease.min(inner.settings.max_hold) } else { lease },
            owner,
            session,
            patient,
            of_the_server,
            arrived: Instant::now(),
            answer,
        };
        inner.enqueue(&name, id, waiter);
        Waiting { locks: self.clone(), name, id, answered }
    }

    /// Releases it once. `false` where it is not held under this token. `within`: how long that takes at most. Where nothing can be sent by then
    /// it is not done; once it is sent, it is done even if nobody waits for the answer.
    pub async fn release(&self, name: LockName, token: u64, within: Duration) -> Result<bool, Refusal> {
        let until = Instant::now() + within;
        // Nothing but the client waits for a Redis that is away.
        if tokio::time::timeout_at(until.into(), self.0.link.node()).await.is_err() {
            return Err(self.0.silent());
        }
        let (answer, answered) = oneshot::channel();
        let releasing = Arc::clone(&self.0);
        self.0.spawn(async move { _ = answer.send(releasing.release(name, token, Some(until)).await) });
        match tokio::time::timeout_at(until.into(), answered).await {
            Ok(Ok(released)) => released,
            // It goes on, and may be done yet.
            _ => Err(Refusal::InDoubt),
        }
    }

    /// Lets it last so long from now on, but a session's no longer than it may be held. Returns how long; `None` where it is not held under this
    /// token.
    pub async fn extend(&self, name: &LockName, token: u64, lease: Duration, within: Duration) -> Result<Option<Duration>, Refusal> {
        let sent = Instant::now();
        let Some(lease) = self.0.holds.bounded(name, token, lease, sent) else { return Ok(None) };
        match self.0.extend(&[(name.clone(), token, lease)], true, sent + within).await {
            Ok(extended) => {
                let extended = extended.first() == Some(&true);
                if extended {
                    self.0.holds.extended(name, token, sent, lease);
                }
                Ok(extended.then_some(lease))
            }
            Err(refusal) => {
                if refusal == Refusal::InDoubt {
                    self.0.holds.may_be_extended(name, token, sent, lease);
                }
                Err(refusal)
            }
        }
    }

    /// Lets it last so long from now on if nobody waits for it, here or elsewhere. `false`: it is to be released.
    pub async fn keep(&self, grant: &Grant, lease: Duration) -> bool {
        let (name, token, sent) = (&grant.name, grant.token, Instant::now());
        let waits_here = || self.0.lines().get(name).is_some_and(|line| !line.waiters.is_empty());
        if waits_here() {
            return false;
        }
        let kept = self.0.keep(name, token, lease, self.0.subscriber.hears(name), sent + lease / 2).await;
        match kept {
            Ok(true) => _ = self.0.holds.add(name, token, sent, lease, None),
            // It may last so long: then there is something to release.
            Err(Refusal::InDoubt) => _ = self.0.holds.add(name, token, Instant::now(), lease, None),
            _ => {}
        }
        kept == Ok(true) && !waits_here()
    }

    /// How many ms it is still held under this token; -1: without end. `None` where it is not.
    pub async fn check(&self, name: &LockName, token: u64, within: Duration) -> Result<Option<i64>, Refusal> {
        Ok(self.0.look(name, token, Instant::now() + within).await?.filter(|seen| seen.held).map(|seen| seen.remaining_ms))
    }

    /// Who holds it; `None` where nobody does.
    pub async fn info(&self, name: &LockName, within: Duration) -> Result<Option<LockInfo>, Refusal> {
        let seen = self.0.look(name, 0, Instant::now() + within).await?;
        let waiters = self.0.lines().get(name).map_or(0, |line| line.waiters.len());
        Ok(seen.map(|seen| LockInfo {
            owner: seen.owner.filter(|owner| !owner.is_empty()).unwrap_or(seen.field),
            token: seen.token,
            remaining_ms: seen.remaining_ms,
            waiters,
        }))
    }
}

/// A place in line. Dropped, it is given up.
pub struct Waiting {
    locks: Locks,
    name: LockName,
    id: u64,
    answered: oneshot::Receiver<Answer>,
}

impl Waiting {
    /// What became of it, at `until` at the latest.
    pub async fn answer(mut self, until: Instant) -> Answer {
        match tokio::time::timeout_at(until.into(), &mut self.answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Answer::Refused(Refusal::TryAgain("the lock was not decided".to_owned())),
            Err(_) => {
                let known = self.locks.0.leave(&self.name, self.id);
                // It may have been decided this very moment.
                self.answered.try_recv().unwrap_or_else(|_| self.locks.0.known(known))
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.locks.0.leave(&self.name, self.id);
    }
}

impl Inner {
    fn lines(&self) -> MutexGuard<'_, HashMap<LockName, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> usize {
        self.lines().values().map(|line| line.waiters.len()).sum()
    }

    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Runs a task that changes something in Redis to its end.
    fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = self.runtime.get() {
            runtime.spawn(self.under_way.track_future(task));
        }
    }

    fn enqueue(self: &Arc<Self>, name: &LockName, id: u64, waiter: Waiter) {
        if waiter.session && self.holds.len() >= limits::LOCKS_HELD_MAX {
            return refuse(waiter, Refusal::Failed("this sidecar's clients hold too many locks".to_owned()));
        }
        let mut lines = self.lines();
        if self.closing.load(Ordering::Relaxed) && !waiter.of_the_server {
            drop(lines);
            return refuse(waiter, Refusal::Loading("shutting down".to_owned()));
        }
        let line = lines.entry(name.clone()).or_default();
        if !line.waiters.is_empty() && !waiter.patient {
            drop(lines);
            let (inner, name) = (Arc::clone(self), name.clone());
            return self.spawn(async move { inner.ask_beside_the_line(&name, waiter).await });
        }
        if !line.waiters.is_empty() && waiter.owner.is_some() {
            let (inner, name, lease, owner) = (Arc::clone(self), name.clone(), waiter.lease, waiter.owner.clone());
            self.spawn(async move { inner.ask_once_more(&name, id, lease, owner).await });
        }
        line.waiters.insert(id, waiter);
        line.idle_since = None;
        if !line.contending {
            line.contending = true;
            let (inner, name) = (Arc::clone(self), name.clone());
            self.spawn(async move { inner.contend(name).await });
        } else if line.waiters.len() == 1 {
            line.rouse(By::Free);
        }
    }

    /// Gives up a place in line. Returns until when the lock is held: `None` where nothing is known of it.
    fn leave(&self, name: &LockName, id: u64) -> Option<Instant> {
        let mut lines = self.lines();
        let line = lines.get_mut(name)?;
        let waited = line.waiters.remove(&id).is_some_and(|waiter| waiter.patient);
        line.held_until.or_else(|| (waited && line.trying.is_none()).then(Instant::now))
    }

    /// What to say to whoever has waited for long enough.
    fn known(&self, held_until: Option<Instant>) -> Answer {
        match (self.link.trouble(), held_until) {
            (Some(why), _) => Answer::Refused(Refusal::TryAgain(why)),
            (None, Some(until)) => Answer::Held(millis(until.saturating_duration_since(Instant::now()))),
            (None, None) => Answer::Refused(Refusal::TryAgain("Redis does not answer".to_owned())),
        }
    }

    /// Tries for the first in line, again and again, until nobody is left.
    async fn contend(self: Arc<Self>, name: LockName) {
        let mut by = By::Free;
        let mut tried = true;
        loop {
            match self.next_step(&name, tried) {
                Step::Done => return,
                Step::Sleep(wake, pause) => {
                    tried = false;
                    by = match tokio::time::timeout(pause, wake.notified()).await {
                        Ok(()) => self.lines().get_mut(&name).and_then(|line| line.woken.take()).unwrap_or(By::Message),
                        Err(_) => By::Timer,
                    };
                }
                Step::Try { id, asked } => {
                    tried = true;
                    // What became of a try is found out before the next: nothing is held for nobody.
                    let result = self.attempt(&name, &asked, true).await;
                    let held = matches!(result, Ok(Tried::Held(..)));
                    self.settle(&name, id, result, by);
                    // Whoever releases it from now on is heard. A subscription that hangs keeps nobody from looking.
                    if held && self.lines().get(&name).is_some_and(|line| !line.waiters.is_empty()) {
                        match tokio::time::timeout(limits::LOCK_POLL, self.subscriber.hear(&name)).await {
                            Ok(heard) => tried = heard != Heard::FromNow,
                            Err(_) => (tried, by) = (false, By::Timer),
                        }
                    }
                }
            }
        }
    }

    /// What the task of a line does next; `tried`: whether the first in line has just been tried for.
    fn next_step(&self, name: &LockName, tried: bool) -> Step {
        let now = Instant::now();
        let mut lines = self.lines();
        let Some(line) = lines.get_mut(name) else { return Step::Done };
        let Some((id, waiter)) = line.head() else {
            line.contending = false;
            line.idle_since = Some(now);
            return Step::Done;
        };
        let poll = jittered(limits::LOCK_POLL, id ^ self.numbers.load(Ordering::Relaxed));
        if line.trying.is_some() {
            return Step::Sleep(Arc::clone(&line.wake), poll);
        }
        if let Some(until) = line.turn.keeps_out(now) {
            let pause = until.map_or(poll, |until| until.saturating_duration_since(now));
            return Step::Sleep(Arc::clone(&line.wake), pause);
        }
        let asked = Asked::of(waiter);
        if tried && line.held_until.is_some_and(|until| until > now) {
            let left = line.held_until.map_or(poll, |until| until.saturating_duration_since(now));
            return Step::Sleep(Arc::clone(&line.wake), poll.min(left + Duration::from_millis(1)));
        }
        line.trying = Some(id);
        Step::Try { id, asked }
    }

    /// Notes what became of a try for the first in line.
    fn settle(self: &Arc<Self>, name: &LockName, id: u64, result: Result<Tried, Refusal>, by: By) {
        let now = Instant::now();
        let mut lines = self.lines();
        let Some(line) = lines.get_mut(name) else {
            drop(lines);
            if let Ok(Tried::Got { token, .. }) = result {
                self.release_soon(name.clone(), token);
            }
            return;
        };
        line.trying = None;
        match result {
            Ok(Tried::Got { token, lease, sent }) => {
                line.held_until = Some(sent + lease);
                line.holder = None;
                line.turn.acquired(now);
                let waiter = line.waiters.remove(&id);
                drop(lines);
                self.grant(name, waiter, token, lease, sent, by);
            }
            Ok(Tried::Held(ms, holder)) => {
                line.holder = Some(holder);
                // Without end: it is looked at again like all others.
                let lasts = u64::try_from(ms).map_or(limits::LOCK_POLL, Duration::from_millis);
                line.held_until = Some(now + lasts);
                if line.head().is_some_and(|(head, waiter)| head == id && !waiter.patient)
                    && let Some(waiter) = line.waiters.remove(&id)
                {
                    drop(lines);
                    _ = waiter.answer.send(Answer::Held(ms));
                }
            }
            Ok(Tried::Free) => {
                if let Some(waiter) = line.waiters.get_mut(&id) {
                    waiter.op = self.op();
                }
            }
            Err(refusal) => {
                line.held_until = None;
                // Whoever waits goes on waiting for Redis.
                let waits = matches!(refusal, Refusal::TryAgain(_) | Refusal::InDoubt)
                    && line.waiters.get(&id).is_some_and(|waiter| waiter.patient);
                if !waits && let Some(waiter) = line.waiters.remove(&id) {
                    drop(lines);
                    refuse(waiter, refusal);
                }
            }
        }
    }

    /// Gives a lock to whom it was won for, or back where they have gone.
    fn grant(self: &Arc<Self>, name: &LockName, waiter: Option<Waiter>, token: u64, lease: Duration, sent: Instant, by: By) {
        let Some(waiter) = waiter else {
            self.release_soon(name.clone(), token);
            return;
        };
        let lost = self.holds.add(name, token, sent, lease, waiter.session.then_some(&self.settings));
        counter!("holdfast_lock_acquired_total", "by" => by.label()).increment(1);
        if !matches!(by, By::Free | By::Again) {
            histogram!("holdfast_lock_wait_seconds").record(waiter.arrived.elapsed().as_secs_f64());
        }
        let (locks, noted) = (Locks(Arc::clone(self)), self.holds.has(token));
        let grant = Grant { locks, name: name.clone(), token, lease_ms: millis(lease), lost, noted, taken: false };
        // Where nobody hears it any more, the grant is dropped and releases itself.
        _ = waiter.answer.send(Answer::Got(grant));
    }

    /// Asks once for a client that does not wait, while others do: only who holds it already can get it.
    async fn ask_beside_the_line(self: &Arc<Self>, name: &LockName, waiter: Waiter) {
        let asked = Asked::of(&waiter);
        // Also for a client that has gone: what it got is released.
        match self.attempt(name, &asked, false).await {
            Ok(Tried::Got { token, lease, sent }) => self.grant(name, Some(waiter), token, lease, sent, By::Again),
            Ok(Tried::Held(ms, _)) => _ = waiter.answer.send(Answer::Held(ms)),
            Ok(Tried::Free) => _ = waiter.answer.send(Answer::Held(0)),
            Err(refusal) => refuse(waiter, refusal),
        }
    }

    /// Finds out whether a waiter's owner holds the lock already, for as long as it waits and Redis does not say.
    async fn ask_once_more(self: &Arc<Self>, name: &LockName, id: u64, lease: Duration, owner: Option<Id>) {
        let asked = Asked::once_more(self.op(), lease, owner);
        loop {
            match self.attempt(name, &asked, false).await {
                Ok(Tried::Got { token, lease, sent }) => {
                    let waiter = self.lines().get_mut(name).and_then(|line| line.waiters.remove(&id));
                    return self.grant(name, waiter, token, lease, sent, By::Again);
                }
                Err(Refusal::TryAgain(_) | Refusal::InDoubt)
                    if self.lines().get(name).is_some_and(|line| line.waiters.contains_key(&id)) => {}
                _ => return,
            }
            tokio::time::sleep(jittered(limits::LOCK_POLL, id)).await;
        }
    }

    /// What is returned is told when that is over.
    fn release_soon(self: &Arc<Self>, name: LockName, token: u64) -> oneshot::Receiver<()> {
        let (inner, (over, is_over)) = (Arc::clone(self), oneshot::channel());
        self.spawn(async move {
            _ = inner.release(name, token, None).await;
            _ = over.send(());
        });
        is_over
    }

    /// Finds out whether a release of which nothing is known has passed the lock on: it is its heir's, or given back where they have gone. Until
    /// then nobody is tried for.
    fn look_for_heir(self: &Arc<Self>, name: LockName, id: u64, heir: Asked) {
        let inner = Arc::clone(self);
        self.spawn(async move {
            let result = inner.ask_whether(&name, &heir).await;
            inner.settle(&name, id, result, By::Passed);
            if let Some(line) = inner.lines().get_mut(&name) {
                line.rouse(By::Release);
            }
        });
    }

    /// Releases it once, and passes it on to the next in line where it may. `unsent_until`: as of [`Inner::let_go`].
    async fn release(self: &Arc<Self>, name: LockName, token: u64, unsent_until: Option<Instant>) -> Result<bool, Refusal> {
        let began = Instant::now();
        let told_us = self.subscriber.hears(&name);
        let heir = {
            let now = Instant::now();
            let mut lines = self.lines();
            let max_turn = self.settings.max_turn;
            let line = lines.get_mut(&name);
            match line {
                Some(line) => {
                    let heir = line.heir(now, max_turn).map(|(id, waiter)| (id, Asked::of(waiter)));
                    match &heir {
                        Some((id, _)) => line.trying = Some(*id),
                        None => line.turn.releases(now, told_us),
                    }
                    heir
                }
                None => None,
            }
        };
        let until = began + limits::LOCK_RESEND_WITHIN;
        let result = self.let_go(&name, token, &self.op(), heir.as_ref().map(|(_, asked)| asked), until, unsent_until).await;
        let now = Instant::now();
        let mut lines = self.lines();
        let mut passed_to = None;
        // What was passed on may be known no more by the name of the release, and still is by that of the heir's own try.
        let in_doubt = heir.is_some() && matches!(result, Err(Refusal::InDoubt) | Ok(Released::Lost));
        let refused = result.as_ref().is_err_and(|refusal| *refusal != Refusal::InDoubt);
        if let Some(line) = lines.get_mut(&name) {
            if heir.is_some() && !in_doubt {
                line.trying = None;
            }
            match (&result, &heir) {
                (Ok(Released::Passed { lease, sent, .. }), Some((id, _))) => {
                    line.held_until = Some(*sent + *lease);
                    line.holder = None;
                    passed_to = line.waiters.remove(id);
                }
                (Ok(Released::ForAll { told }), _) => {
                    line.held_until = None;
                    let others = *told > u64::from(told_us);
                    line.turn.released(now, self.settings.max_turn, others);
                }
                _ => line.turn.not_released(),
            }
            // By a refusal nothing has changed. Who looks because of it may be refused as well, and wait no more.
            if !refused && !matches!(result, Ok(Released::Passed { .. } | Released::Kept)) {
                line.rouse(By::Release);
            }
            let unwanted = line.waiters.is_empty() && !line.contending && line.trying.is_none() && line.turn.keeps_out(now).is_none();
            // Else it is forgotten together with its channel.
            if unwanted && !self.subscriber.wants(&name) {
                lines.remove(&name);
            }
        }
        drop(lines);
        if let Some((id, asked)) = heir.filter(|_| in_doubt) {
            self.look_for_heir(name.clone(), id, asked);
        }
        match result? {
            Released::Kept => Ok(true),
            Released::ForAll { .. } => {
                self.holds.remove(&name, token);
                Ok(true)
            }
            Released::Passed { token: next, lease, sent } => {
                self.holds.remove(&name, token);
                self.grant(&name, passed_to, next, lease, sent, By::Passed);
                Ok(true)
            }
            Released::Lost => {
                self.holds.lose(&name, token);
                // By now Redis may have forgotten that it was done the first time.
                if began.elapsed() > limits::LOCK_KNOWN_FOR { Err(Refusal::InDoubt) } else { Ok(false) }
            }
        }
    }

    /// Somebody said on this channel that the lock is free.
    fn told(&self, channel: &str) {
        if let Some(name) = self.subscriber.lock_of(channel)
            && let Some(line) = self.lines().get_mut(&name)
        {
            line.heard(Instant::now());
        }
    }

    /// What was said meanwhile was missed: everybody looks.
    fn resubscribed(&self) {
        for line in self.lines().values_mut().filter(|line| line.contending) {
            line.rouse(By::Resubscribed);
        }
    }

    /// Renews what sessions hold, and notices what is lost. Nothing in it waits for Redis. Never returns.
    async fn look_after(self: &Arc<Self>) {
        let mut looked = Instant::now();
        loop {
            tokio::time::sleep(limits::LOCK_LOOK_EVERY).await;
            let now = Instant::now();
            let due = self.holds.due(now);
            for some in due.chunks(limits::LOCK_RENEWALS_AT_ONCE) {
                let (inner, some) = (Arc::clone(self), some.to_vec());
                self.spawn(async move { inner.renew(some).await });
            }
            let thorough = now.saturating_duration_since(looked) >= limits::LOCK_LOOK_THOROUGHLY_EVERY;
            let ended = self.holds.end(now, thorough);
            for ended in ended.iter().filter(|ended| ended.session) {
                // Something of which nothing is known may have let it last longer, now for nobody.
                self.release_soon(ended.name.clone(), ended.token);
            }
            if !ended.is_empty() {
                let inner = Arc::clone(self);
                // Not one that a shutdown would wait for.
                tokio::spawn(async move { inner.count_ended(&ended).await });
            }
            if !thorough {
                continue;
            }
            looked = now;
            gauge!("holdfast_locks_held").set(self.holds.len() as f64);
            gauge!("holdfast_lock_waiters").set(self.waiting() as f64);
        }
    }

    /// Forgets lines in which nobody has stood for a while. Never returns.
    async fn forget_idle(&self) {
        loop {
            tokio::time::sleep(limits::LOCK_LOOK_THOROUGHLY_EVERY).await;
            let now = Instant::now();
            let long_idle = |line: &Line| line.idle_since.is_some_and(|since| now.saturating_duration_since(since) >= limits::LOCK_LINGER);
            let idle = self.lines().iter().filter(|(_, line)| long_idle(line)).map(|(name, _)| name.clone()).collect();
            self.forget(idle).await;
        }
    }

    /// Forgets lines in which nobody stands, and no longer listens for them.
    async fn forget(&self, idle: Vec<LockName>) {
        let gone: Vec<LockName> = {
            let mut lines = self.lines();
            let unwanted = |line: &Line| line.waiters.is_empty() && !line.contending && line.trying.is_none();
            idle.into_iter().filter(|name| lines.get(name).is_some_and(unwanted) && lines.remove(name).is_some()).collect()
        };
        let wanted: Vec<LockName> = gone.into_iter().filter(|name| self.subscriber.wants(name)).collect();
        if !wanted.is_empty() {
            self.subscriber.forget(&wanted).await;
            // Somebody may have come meanwhile and believed that it is heard of.
            wanted.iter().for_each(|name| {
                if let Some(line) = self.lines().get_mut(name) {
                    line.rouse(By::Resubscribed);
                }
            });
        }
    }

    async fn renew(&self, holds: Vec<hold::Renewal>) {
        let sent = Instant::now();
        let wanted: Vec<(LockName, u64, Duration)> = holds.iter().map(|hold| (hold.name.clone(), hold.token, hold.lease)).collect();
        match self.extend(&wanted, false, sent + limits::LOCK_CALL_WITHIN).await {
            Ok(renewed) => {
                for (hold, renewed) in holds.iter().zip(renewed) {
                    self.holds.renewed(hold, renewed.then_some(sent));
                }
            }
            Err(_) => holds.iter().for_each(|hold| self.holds.not_renewed(hold)),
        }
    }

    /// Nobody gets a lock any more, and nobody waits.
    fn close(&self) {
        let mut lines = self.lines();
        // While nobody can enter a line.
        self.closing.store(true, Ordering::Relaxed);
        let waiters: Vec<Waiter> = lines
            .values_mut()
            .flat_map(|line| line.waiters.extract_if(.., |_, waiter| !waiter.of_the_server))
            .map(|(_, waiter)| waiter)
            .collect();
        drop(lines);
        for waiter in waiters {
            refuse(waiter, Refusal::Loading("shutting down".to_owned()));
        }
    }

    fn release_sessions(self: &Arc<Self>) {
        for (name, token) in self.holds.sessions() {
            self.release_soon(name, token);
        }
    }

    /// A name for one try or release, that no other has.
    fn op(&self) -> String {
        format!("{}:{}", self.settings.instance, self.number())
    }
}

/// What the task of a line does next.
enum Step {
    Done,
    Sleep(Arc<tokio::sync::Notify>, Duration),
    Try { id: u64, asked: Asked },
}

fn refuse(waiter: Waiter, refusal: Refusal) {
    // Whoever has gone does not hear it.
    _ = waiter.answer.send(Answer::Refused(refusal));
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;
    use crate::domain::lock::Epoch;
    use crate::ledger::testing::RedisServer;
    use crate::store::{Connection, keys};

    const LEASE: Duration = Duration::from_secs(60);

    /// Locks on a Redis of their own, without the subscription.
    fn without_messages() -> (RedisServer, Locks) {
        let server = RedisServer::start();
        let settings = Settings {
            redis_url: server.url(),
            instance: "i".into(),
            session_lease: Duration::from_secs(10),
            max_hold: Duration::from_secs(60),
            max_turn: Duration::ZERO,
            coupon_lease: None,
        };
        let (locks, mut epochs) = Locks::new(settings);
        locks.run_on(&Handle::current());
        let serving = locks.clone();
        tokio::spawn(async move { serving.0.link.run().await });
        tokio::spawn(async move {
            while let Some(request) = epochs.recv().await {
                _ = request.answer.send(Epoch { number: 1, installation: "i".into() });
            }
        });
        (server, locks)
    }

    fn ask(name: &LockName) -> Ask {
        Ask { name: name.clone(), lease: LEASE, owner: None, session: false, patient: true, of_the_server: false }
    }

    async fn got(waiting: Waiting) -> Grant {
        match waiting.answer(Instant::now() + LEASE).await {
            Answer::Got(grant) => grant,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_channel_that_redis_never_confirmed_is_forgotten_with_its_line() {
        let (_server, locks) = without_messages();
        let name = LockName::of(Id::from("l")).unwrap();
        let got = async |waiting: Waiting| {
            let grant = got(waiting).await;
            (grant.token, grant.take()).0
        };
        let first = got(locks.acquire(ask(&name))).await;
        let second = locks.acquire(ask(&name));
        while !locks.0.subscriber.wants(&name) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!locks.0.subscriber.hears(&name));
        assert_eq!(locks.release(name.clone(), first, LEASE).await, Ok(true));
        let second = got(second).await;
        while locks.0.lines().get(&name).is_some_and(|line| line.contending) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(locks.release(name.clone(), second, LEASE).await, Ok(true));
        assert!(locks.0.lines().contains_key(&name), "its line is forgotten with its channel");
        locks.0.forget(vec![name.clone()]).await;
        assert!(locks.0.lines().is_empty() && !locks.0.subscriber.wants(&name));
    }

    #[tokio::test]
    async fn a_lock_is_kept_only_while_it_is_held_and_nobody_waits_for_it() {
        let (server, locks) = without_messages();
        let mut redis = Connection::open(&server.url()).await.unwrap();
        let name = LockName::of(Id::from("l")).unwrap();
        let grant = got(locks.acquire(Ask { of_the_server: true, ..ask(&name) })).await;
        let remaining = async || locks.check(&name, grant.token, LEASE).await.unwrap().unwrap();
        assert!(locks.keep(&grant, 2 * LEASE).await);
        let kept = remaining().await;
        assert!(kept > 60_000, "{kept}");
        // Somebody listens elsewhere.
        let mut other = std::net::TcpStream::connect(("127.0.0.1", server.port())).unwrap();
        let mut said = [0; 4];
        std::io::Write::write_all(&mut other, format!("SUBSCRIBE {}\r\n", keys::lock_channel(&name)).as_bytes()).unwrap();
        std::io::Read::read_exact(&mut other, &mut said).unwrap();
        assert!(!locks.keep(&grant, 9 * LEASE).await);
        drop(other);
        while !locks.keep(&grant, 3 * LEASE).await {}
        assert!((120_001..=180_000).contains(&remaining().await), "those that were refused changed nothing");
        // Somebody waits here.
        let waiting = locks.acquire(ask(&name));
        assert!(!locks.keep(&grant, 9 * LEASE).await);
        drop(waiting);
        while locks.0.lines().get(&name).is_some_and(|line| line.contending) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(locks.keep(&grant, 4 * LEASE).await);
        // Redis hangs: it may have been kept, and is released.
        let signal =
            |name: &str| assert!(std::process::Command::new("kill").args([name, &server.pid().to_string()]).status().unwrap().success());
        signal("-STOP");
        assert!(!locks.keep(&grant, Duration::from_secs(2)).await);
        // Somebody begins to wait here while Redis is asked.
        {
            let mut keeping = pin!(locks.keep(&grant, LEASE));
            tokio::select! {
                kept = &mut keeping => panic!("{kept}"),
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
            let _waiting = locks.acquire(ask(&name));
            signal("-CONT");
            assert!(!keeping.await);
        }
        while locks.0.lines().get(&name).is_some_and(|line| line.contending) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(locks.keep(&grant, LEASE).await, "it is still held");
        // It is lost.
        redis.send(redis::cmd("DEL").arg(keys::lock(&name))).await.unwrap();
        assert!(!locks.keep(&grant, LEASE).await);
        let token = grant.token;
        grant.give_back().await;
        let next = got(locks.acquire(ask(&name))).await;
        assert!(next.token > token);
        let token = next.token;
        next.give_back().await;
        assert_eq!(locks.check(&name, token, LEASE).await, Ok(None), "it is released by then");
    }

    #[tokio::test]
    async fn however_many_are_held_only_sessions_are_refused_and_what_nobody_takes_is_released() {
        let (_server, locks) = without_messages();
        let (held, now) = (LockName::of(Id::from("held")).unwrap(), Instant::now());
        // Beyond all tokens that are given out here.
        let tokens = 1 << 40..;
        for token in tokens.take(limits::LOCKS_HELD_MAX) {
            let session = (token - (1 << 40) >= limits::LOCKS_COUNTED_MAX as u64).then_some(locks.settings());
            locks.0.holds.add(&held, token, now, LEASE, session);
        }
        assert_eq!(locks.0.holds.len(), limits::LOCKS_HELD_MAX);
        let (of_a_client, of_the_server) = (LockName::of(Id::from("l")).unwrap(), LockName::of(Id::from("m")).unwrap());
        for grant in
            [got(locks.acquire(ask(&of_a_client))).await, got(locks.acquire(Ask { of_the_server: true, ..ask(&of_the_server) })).await]
        {
            let (name, token) = (grant.name.clone(), grant.token);
            assert!(locks.check(&name, token, LEASE).await.unwrap().is_some());
            drop(grant);
            let released = async {
                while locks.check(&name, token, LEASE).await.unwrap().is_some() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(LEASE / 2, released).await.expect("it is released before its lease ends");
        }
        assert_eq!(locks.0.holds.len(), limits::LOCKS_HELD_MAX, "nothing was noted of them");
        let refused = locks.acquire(Ask { session: true, ..ask(&of_a_client) }).answer(Instant::now() + LEASE).await;
        assert!(matches!(refused, Answer::Refused(Refusal::Failed(_))), "{refused:?}");
    }
}
