//! Holds the locks of the coupons that are issued, a turn each: all that waits in this lane is issued under one holding.
//!
//! A turn begins with the first issue that comes, waits in the line of the lock as any client of this sidecar does, and ends after
//! `lock.max_turn_ms`, or when nothing was issued for a moment. Where nobody waits for the lock then, another turn follows it without a release,
//! a bounded number of times; then it is left free for a moment, for those who only try now and then. It may end early without our knowing, where
//! this process was stopped for longer than the lease: every issue carries the token, and the script refuses one under which the lock is not held
//! any more.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::spawn_local;

use super::CouponOp;
use crate::domain::{Id, LockName};
use crate::limits;
use crate::store::lane::{Bell, Desk};
use crate::store::lock::{Answer, Ask, Locks, Refusal};

/// How the locks of coupons are held.
#[derive(Clone, Copy)]
struct Turns {
    /// How long one lasts in Redis if this process dies.
    lease: Duration,
    /// How long one is held while others may want it.
    longest: Duration,
    /// How long an operation may wait for it.
    within: Duration,
}

/// Under what an operation may be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The holder's field in the lock's key.
    pub field: String,
    pub token: u64,
}

/// See the module.
pub struct CouponDesk(Rc<Inner>);

struct Inner {
    bell: Rc<Bell>,
    locks: Locks,
    /// `None`: no lock is taken, the script goes ahead only while nobody holds it.
    turns: Option<Turns>,
    coupons: RefCell<HashMap<Id, Rc<Turn>, foldhash::fast::RandomState>>,
    /// The clients that wait with an issue of a coupon, until they are asked about again: what they want of it for the same user, or for none,
    /// comes behind that.
    waiting: RefCell<HashMap<(Id, u64), Waits>>,
    /// Those that the batch under way is about.
    under_way: RefCell<Vec<Rc<Turn>>>,
    /// Where no lock is taken: the coupons of which the script said that somebody holds theirs.
    locked: RefCell<HashMap<Id, Locked>>,
    /// Those of them that the batch under way tries.
    tried: RefCell<Vec<Id>>,
}

/// A coupon whose lock somebody else holds: one of its issues tries whether that is over, and the others wait for that.
struct Locked {
    why: Rc<str>,
    /// Whether the next one may try.
    may_try: bool,
    wanted: Instant,
}

/// With what a client waits.
struct Waits {
    why: Rc<str>,
    users: HashSet<Id>,
    /// Whatever it wants: something without a user waits.
    all: bool,
}

/// The turn of one coupon, from the first wish for it on.
struct Turn {
    state: RefCell<State>,
    wanted: Cell<Instant>,
    /// Whether anything was issued under it.
    used: Cell<bool>,
    /// Whether a batch under it is on its way.
    is_under_way: Cell<bool>,
    /// Whether nothing more is issued under it.
    is_ending: Cell<bool>,
    /// Why what waits for it waits, as long as it was not asked about again.
    why: RefCell<Option<Rc<str>>>,
    changed: Notify,
}

enum State {
    Waiting,
    Held(Arc<Fence>),
    /// The script did not take it any more.
    Fenced,
    /// What has the lock's name is none: the script says so.
    NotALock,
    /// It could not be had; why.
    Refused(String),
}

impl CouponDesk {
    /// An operation waits `within` that time for its turn.
    pub fn new(locks: Locks, within: Duration) -> Self {
        let settings = locks.settings();
        let turns = settings.coupon_lease.map(|lease| Turns { lease, longest: settings.max_turn.min(lease / 2), within });
        Self(Rc::new(Inner {
            bell: Rc::default(),
            locks,
            turns,
            coupons: RefCell::default(),
            waiting: RefCell::default(),
            under_way: RefCell::default(),
            locked: RefCell::default(),
            tried: RefCell::default(),
        }))
    }

    /// Has what its client wants of the coupon behind it wait, too.
    fn waits(&self, op: &CouponOp, why: &Rc<str>) {
        if op.client == 0 {
            return;
        }
        let mut waiting = self.0.waiting.borrow_mut();
        let waits = waiting.entry((op.coupon.detached(), op.client)).or_insert_with(|| Waits {
            why: Rc::clone(why),
            users: HashSet::new(),
            all: false,
        });
        match op.action.user() {
            Some(user) => _ = waits.users.insert(user.detached()),
            None => waits.all = true,
        }
    }

    /// Why an operation has to wait behind another of its client.
    fn comes_behind(&self, op: &CouponOp) -> Option<Rc<str>> {
        let waiting = self.0.waiting.borrow();
        if op.client == 0 || waiting.is_empty() {
            return None;
        }
        let waits = waiting.get(&(op.coupon.clone(), op.client))?;
        let behind = waits.all || op.action.user().is_none_or(|user| waits.users.contains(user));
        behind.then(|| Rc::clone(&waits.why))
    }

    /// Where no lock is taken: lets an issue go, unless somebody holds the lock and another one tries already.
    fn admit_elided(&self, op: &CouponOp) -> Result<(), Rc<str>> {
        let mut all = self.0.locked.borrow_mut();
        let Some(locked) = all.get_mut(&op.coupon) else { return Ok(()) };
        locked.wanted = Instant::now();
        let mut tried = self.0.tried.borrow_mut();
        // However many coupons are locked, what else there is finds room in the batch.
        if locked.may_try && tried.len() < limits::BATCH_OPERATIONS_MAX / 2 {
            locked.may_try = false;
            tried.push(op.coupon.detached());
            return Ok(());
        }
        let why = Rc::clone(&locked.why);
        self.waits(op, &why);
        Err(why)
    }
}

impl Desk<CouponOp> for CouponDesk {
    fn admit(&self, op: &mut CouponOp) -> Result<(), Rc<str>> {
        if let Some(why) = self.comes_behind(op) {
            self.waits(op, &why);
            return Err(why);
        }
        if !op.is_issue() {
            return Ok(());
        }
        let Some(turns) = self.0.turns else { return self.admit_elided(op) };
        let known = self.0.coupons.borrow().get(&op.coupon).cloned();
        let turn = known.unwrap_or_else(|| {
            let turn = Rc::new(Turn::new(Instant::now()));
            let coupon = op.coupon.detached();
            self.0.coupons.borrow_mut().insert(coupon.clone(), Rc::clone(&turn));
            spawn_local(take_a_turn(Rc::clone(&self.0), turns, coupon, Rc::clone(&turn)));
            turn
        });
        // One that joins others of its batch wants it no later than they do.
        if !turn.is_under_way.get() {
            turn.wanted.set(Instant::now());
        }
        let fence = match &*turn.state.borrow() {
            State::Held(fence) if !turn.is_ending.get() => Some(Arc::clone(fence)),
            State::NotALock => None,
            State::Refused(why) => {
                let why = format!("{why}; nothing was changed").into();
                self.waits(op, &why);
                return Err(why);
            }
            State::Held(_) | State::Waiting | State::Fenced => {
                let why = turn.held_by(&self.0.locks, &op.coupon);
                self.waits(op, &why);
                return Err(why);
            }
        };
        op.fence = fence;
        turn.used.set(true);
        if !turn.is_under_way.replace(true) {
            self.0.under_way.borrow_mut().push(turn);
        }
        Ok(())
    }

    fn again(&self) {
        self.0.waiting.borrow_mut().clear();
        self.0.coupons.borrow().values().for_each(|turn| _ = turn.why.take());
        let now = Instant::now();
        let mut locked = self.0.locked.borrow_mut();
        locked.retain(|_, locked| now.saturating_duration_since(locked.wanted) < limits::LOCKED_FORGET_AFTER);
        locked.values_mut().for_each(|locked| locked.may_try = true);
    }

    fn retry_after(&self) -> Duration {
        // A turn rings when it begins and ends: only the reason grows old.
        if self.0.turns.is_some() { limits::LOCKED_REASON_FOR } else { limits::LOCKED_RETRY_AFTER }
    }

    fn sent_back(&self, op: &CouponOp, why: &Rc<str>) {
        self.waits(op, why);
        if self.0.turns.is_none() && op.is_issue() {
            self.0.tried.borrow_mut().retain(|coupon| *coupon != op.coupon);
            let locked = Locked { why: Rc::clone(why), may_try: false, wanted: Instant::now() };
            self.0.locked.borrow_mut().insert(op.coupon.detached(), locked);
        }
    }

    fn lost(&self, op: &CouponOp) {
        // The placeholder of a coupon that was absent is no lock.
        if op.fence.as_ref().is_some_and(|fence| fence.token > 0) {
            metrics::counter!("holdfast_lock_fenced_total").increment(1);
        }
        let turn = self.0.coupons.borrow().get(&op.coupon).cloned();
        if let Some(turn) = turn.filter(|turn| matches!(&*turn.state.borrow(), State::Held(fence) if op.fence.as_ref() == Some(fence))) {
            *turn.state.borrow_mut() = State::Fenced;
            turn.changed.notify_one();
        }
    }

    fn returned(&self) {
        let now = Instant::now();
        for turn in self.0.under_way.take() {
            turn.is_under_way.set(false);
            // Whoever is told now may want the next one.
            turn.wanted.set(now);
            turn.changed.notify_one();
        }
        for coupon in self.0.tried.take() {
            self.0.locked.borrow_mut().remove(&coupon);
            self.0.bell.ring();
        }
    }

    fn bell(&self) -> Rc<Bell> {
        Rc::clone(&self.0.bell)
    }
}

impl Turn {
    fn new(now: Instant) -> Self {
        Self {
            state: RefCell::new(State::Waiting),
            wanted: Cell::new(now),
            used: Cell::new(false),
            is_under_way: Cell::new(false),
            is_ending: Cell::new(false),
            why: RefCell::default(),
            changed: Notify::new(),
        }
    }

    /// Why `coupon` is not issued.
    fn held_by(&self, locks: &Locks, coupon: &Id) -> Rc<str> {
        Rc::clone(self.why.borrow_mut().get_or_insert_with(|| held_by(locks, coupon).into()))
    }

    /// Returns when the turn that `began` then is over, of a holding `since` then: whether because of its time. Else nobody wants it any more, or it
    /// was lost.
    async fn over(&self, since: Instant, began: Instant, turns: Turns) -> bool {
        let ends = began + turns.longest;
        while !matches!(&*self.state.borrow(), State::Fenced) {
            let idle = self.wanted.get().max(since) + limits::COUPON_IDLE;
            let until = match (self.is_under_way.get(), self.used.get()) {
                (true, _) => ends,
                (false, true) => ends.min(idle),
                (false, false) => idle,
            };
            if until <= Instant::now() {
                return until == ends;
            }
            tokio::select! { () = self.changed.notified() => {}, () = tokio::time::sleep_until(until.into()) => {} }
        }
        false
    }

    /// Lets nothing more be issued under it, and returns when what is on its way is back, or it is lost at `lost`.
    async fn ends(&self, lost: Instant) {
        self.is_ending.set(true);
        while self.is_under_way.get() && !matches!(&*self.state.borrow(), State::Fenced) && Instant::now() < lost {
            tokio::select! { () = self.changed.notified() => {}, () = tokio::time::sleep_until(lost.into()) => {} }
        }
    }
}

/// Waits for the lock, lets the lane issue under it, and gives it back.
async fn take_a_turn(desk: Rc<Inner>, turns: Turns, coupon: Id, turn: Rc<Turn>) {
    // A shutdown waits for it. Dropped last, behind the grant.
    let _user = desk.locks.user();
    match acquire(&desk.locks, turns, &coupon, &turn).await {
        Some(Answer::Got(grant)) => {
            *turn.state.borrow_mut() = State::Held(Arc::new(Fence { field: grant.field(), token: grant.token }));
            desk.bell.ring();
            let since = Instant::now();
            let (mut began, mut count) = (since, 1);
            while turn.over(since, began, turns).await && count < limits::COUPON_TURNS_MAX {
                // Meanwhile it is issued on.
                let asked = Instant::now();
                if !desk.locks.keep(&grant, turns.lease).await {
                    break;
                }
                (began, count) = (asked, count + 1);
            }
            turn.ends(began + turns.lease).await;
            let fenced = matches!(&*turn.state.borrow(), State::Fenced);
            *turn.state.borrow_mut() = State::Waiting;
            if fenced {
                grant.lost();
            } else if count == limits::COUPON_TURNS_MAX {
                // A shutdown does not wait for longer than anything that is held.
                _ = tokio::time::timeout(turns.lease, grant.give_back()).await;
                tokio::time::sleep(limits::LOCK_STAY_OUT).await;
            }
        }
        // There is nothing to hold it for, and nothing is left in Redis by asking. The script says that the coupon is absent; should it be there by
        // then, it sends the issues back, as nobody holds the lock by that name.
        Some(Answer::Refused(Refusal::NoCoupon)) => {
            *turn.state.borrow_mut() = State::Held(Arc::new(Fence { field: "-".to_owned(), token: 0 }));
            desk.bell.ring();
            let since = Instant::now();
            turn.over(since, since, turns).await;
            turn.ends(since + turns.lease).await;
            *turn.state.borrow_mut() = State::Waiting;
        }
        Some(Answer::Refused(Refusal::NotALock(_))) => refuse(&desk, &turn, State::NotALock).await,
        Some(Answer::Refused(Refusal::TryAgain(why) | Refusal::Loading(why) | Refusal::Failed(why))) => {
            refuse(&desk, &turn, State::Refused(why)).await;
        }
        Some(Answer::Held(_) | Answer::Refused(Refusal::InDoubt)) | None => {}
    }
    desk.coupons.borrow_mut().remove(&coupon);
    desk.bell.ring();
}

/// Lets what waits know, and those that come for a moment.
async fn refuse(desk: &Inner, turn: &Turn, state: State) {
    *turn.state.borrow_mut() = state;
    desk.bell.ring();
    tokio::time::sleep(limits::LOCKED_RETRY_AFTER).await;
}

/// Stands in the lock's line while anybody wants it; `None` where nobody does any more.
async fn acquire(locks: &Locks, turns: Turns, coupon: &Id, turn: &Turn) -> Option<Answer> {
    let ask =
        Ask { name: LockName::of_coupon(coupon), lease: turns.lease, owner: None, session: false, patient: true, of_the_server: true };
    let far = Instant::now() + Duration::from_millis(limits::LOCK_WAIT_MAX_MS.unsigned_abs());
    let mut waiting = pin!(locks.acquire(ask).answer(far));
    loop {
        tokio::select! {
            answer = &mut waiting => return Some(answer),
            () = tokio::time::sleep(turns.within) => {
                if turn.wanted.get().elapsed() >= turns.within {
                    return None;
                }
            }
        }
    }
}

/// Why an issue waits.
fn held_by(locks: &Locks, coupon: &Id) -> String {
    let name = LockName::of_coupon(coupon);
    match locks.holder(&name) {
        Some((holder, ms)) => format!("the lock '{name}' is held by '{holder}' for {ms} ms more; nothing was changed"),
        None => match locks.trouble() {
            Some(why) => format!("{why}; nothing was changed"),
            None => format!("the lock '{name}' was not to be had in time; nothing was changed"),
        },
    }
}
