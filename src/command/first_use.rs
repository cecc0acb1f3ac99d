//! Products and coupons that Postgres has and Redis does not: loaded when they are first used.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::spawn_local;

use super::Context;
use super::coupon::CouponWaiter;
use super::stock::StockWaiter;
use crate::domain::Id;
use crate::limits;
use crate::store::coupon::{Action, CouponOp, CouponOutcome, Part};
use crate::store::partition::{FoundCoupon, LoadRequest, Wanted};
use crate::store::stock::{StockOp, StockOutcome};

/// Why a product could not be looked up.
const NOT_KNOWN: &str = "TRYAGAIN Redis does not have this product, and Postgres cannot say yet whether there is one; nothing was changed";

/// What is being looked up, and what is known not to be anywhere.
#[derive(Default)]
pub struct FirstUse {
    /// Who waits for what somebody is looking up already.
    loading: RefCell<HashMap<Id, Vec<oneshot::Sender<bool>>>>,
    absent: RefCell<HashMap<Id, Instant>>,
    /// Those that wait for it, by what they are about and the client that sent them.
    waiting: RefCell<HashMap<(Id, u64), Waiting>>,
}

impl FirstUse {
    /// Whether Postgres said moments ago that it does not have it either.
    pub fn is_nowhere(&self, product: &Id) -> bool {
        self.absent.borrow().get(product).is_some_and(|until| Instant::now() < *until)
    }

    /// It exists now.
    pub fn exists(&self, product: &Id) {
        self.absent.borrow_mut().remove(product);
    }

    /// Whether something that this client has sent waits for it.
    pub fn is_waited_for(&self, id: &Id, client: u64) -> bool {
        !self.waiting.borrow().is_empty() && self.waiting.borrow().contains_key(&(id.clone(), client))
    }

    /// Whether it is being looked up.
    pub fn is_under_way(&self, id: &Id) -> bool {
        self.loading.borrow().contains_key(id)
    }

    fn remember_absent(&self, product: Id) {
        let mut absent = self.absent.borrow_mut();
        if absent.len() >= limits::ABSENT_MAX {
            let now = Instant::now();
            absent.retain(|_, until| now < *until);
            if absent.len() >= limits::ABSENT_MAX {
                absent.clear();
            }
        }
        absent.insert(product, Instant::now() + limits::ABSENT_FOR);
    }
}

/// The operations of one client that wait for the look-up of a coupon.
#[derive(Default)]
struct Waiting {
    count: usize,
    /// Until when the last of them that was submitted again has time.
    until: Option<Instant>,
}

/// One operation that waits for the look-up of a coupon, until this is dropped.
pub struct WaitsForCoupon {
    cx: Rc<Context>,
    of: (Id, u64),
}

impl WaitsForCoupon {
    /// `client`: who has sent it.
    pub fn new(cx: &Rc<Context>, coupon: &Id, client: u64) -> Self {
        let of = (coupon.detached(), client);
        cx.backend.first_coupons.waiting.borrow_mut().entry(of.clone()).or_default().count += 1;
        Self { cx: Rc::clone(cx), of }
    }

    /// Until when it has time as it is submitted again: what has more is served later, so none has less than those in front of it.
    pub fn submitted_until(&self, until: Instant) -> Instant {
        let mut waiting = self.cx.backend.first_coupons.waiting.borrow_mut();
        let Some(waiting) = waiting.get_mut(&self.of) else { return until };
        let until = waiting.until.map_or(until, |before| before.max(until));
        waiting.until = Some(until);
        until
    }
}

impl Drop for WaitsForCoupon {
    fn drop(&mut self) {
        let mut waiting = self.cx.backend.first_coupons.waiting.borrow_mut();
        if let Some(of_the_client) = waiting.get_mut(&self.of) {
            of_the_client.count -= 1;
            if of_the_client.count == 0 {
                waiting.remove(&self.of);
            }
        }
    }
}

/// Looks the products up, gives Redis those that Postgres has, and tries the operation again.
pub fn load_and_retry(cx: &Rc<Context>, products: Vec<Id>, op: StockOp, deadline: Instant, waiter: StockWaiter) {
    let cx = Rc::clone(cx);
    spawn_local(async move {
        let lookups: Vec<_> = products.into_iter().map(|product| spawn_local(load(Rc::clone(&cx), Kind::Product, product))).collect();
        let all = async {
            for lookup in lookups {
                if !lookup.await.unwrap_or(false) {
                    return false;
                }
            }
            true
        };
        match tokio::time::timeout_at(deadline.into(), all).await {
            Ok(true) => waiter.lane(&cx.backend).submit_until(op, deadline.min(Instant::now() + cx.backend.within), waiter),
            _ => waiter.refuse(NOT_KNOWN),
        }
    });
}

/// Looks a coupon up, and gives it to Redis where Postgres has it, by `deadline`. `false` where Postgres cannot say.
pub async fn load_coupon(cx: &Rc<Context>, coupon: &Id, deadline: Instant) -> bool {
    tokio::time::timeout_at(deadline.into(), load(Rc::clone(cx), Kind::Coupon, coupon.clone())).await.unwrap_or(false)
}

/// Whether Postgres has a coupon now; `None` where it cannot say by `deadline`. What the outbox still brings to it, Redis has.
pub async fn has_coupon(cx: &Rc<Context>, coupon: &Id, deadline: Instant) -> Option<bool> {
    if !cx.backend.partition.ledger_up() {
        return None;
    }
    let asking = ask(cx, 0, |answer| Wanted::Exists(coupon.clone(), answer));
    tokio::time::timeout_at(deadline.into(), asking).await.ok()?.ok().map(|found| found.is_some())
}

#[derive(Clone, Copy)]
enum Kind {
    Product,
    Coupon,
}

impl Kind {
    fn first_use(self, cx: &Context) -> &FirstUse {
        match self {
            Self::Product => &cx.backend.first_use,
            Self::Coupon => &cx.backend.first_coupons,
        }
    }

    const fn within(self) -> Duration {
        match self {
            Self::Product => limits::LOAD_WITHIN,
            Self::Coupon => limits::LOAD_COUPON_WITHIN,
        }
    }
}

/// Looks one up, once for all who ask meanwhile, and to its end though they give up. `false` where Postgres cannot say.
async fn load(cx: Rc<Context>, kind: Kind, id: Id) -> bool {
    let (sender, receiver) = oneshot::channel();
    let first = {
        let mut loading = kind.first_use(&cx).loading.borrow_mut();
        let first = !loading.contains_key(&id);
        let waiting = loading.entry(id.clone()).or_default();
        if waiting.len().is_power_of_two() {
            waiting.retain(|waiting| !waiting.is_closed());
        }
        waiting.push(sender);
        first
    };
    if first {
        spawn_local(async move {
            let looking = async {
                match kind {
                    Kind::Product => look_up(&cx, &id).await,
                    Kind::Coupon => look_up_coupon(&cx, &id).await,
                }
            };
            let known = tokio::time::timeout(kind.within(), looking).await.unwrap_or(false);
            for waiting in kind.first_use(&cx).loading.borrow_mut().remove(&id).unwrap_or_default() {
                // Whoever has given up does not hear it.
                _ = waiting.send(known);
            }
        });
    }
    receiver.await.unwrap_or(false)
}

/// Asks the loader once Postgres has everything up to `absent_at`; errors where it cannot be asked or does not say.
async fn ask<T>(cx: &Context, absent_at: u64, wanted: impl FnOnce(oneshot::Sender<Option<T>>) -> Wanted) -> Result<Option<T>, ()> {
    let (answer, answered) = oneshot::channel();
    let request = LoadRequest { absent_at, wanted: wanted(answer) };
    cx.backend.partition.loads.try_send(request).map_err(|_| ())?;
    answered.await.map_err(|_| ())
}

/// Gives Redis a product that Postgres has. `false` where that cannot be done.
async fn look_up(cx: &Context, product: &Id) -> bool {
    while cx.backend.partition.ledger_up() {
        let Ok(found) = ask(cx, cx.backend.partition.head().n, |answer| Wanted::Product(product.clone(), answer)).await else {
            return false;
        };
        let Some(found) = found else {
            cx.backend.first_use.remember_absent(product.clone());
            return true;
        };
        let (answer, answered) = oneshot::channel();
        cx.backend.stock.submit(StockOp::init(product.clone(), found), Instant::now(), StockWaiter::Server(answer));
        match answered.await {
            // Another program has changed something in Postgres meanwhile, and Redis has been told; or a person has unfrozen it.
            Ok(Ok(StockOutcome::Moved)) => {}
            Ok(Ok(StockOutcome::Done { .. } | StockOutcome::Absent { .. })) => return true,
            _ => return false,
        }
    }
    false
}

/// The same for a coupon.
async fn look_up_coupon(cx: &Context, coupon: &Id) -> bool {
    if !cx.backend.partition.ledger_up() {
        return false;
    }
    let Ok(found) = ask(cx, cx.backend.partition.head().n, |answer| Wanted::Coupon(coupon.clone(), answer)).await else { return false };
    let Some(found) = found else {
        cx.backend.first_coupons.remember_absent(coupon.clone());
        return true;
    };
    match found.more {
        false => give(cx, coupon, found, Part::Whole).await.is_some_and(|outcome| outcome != CouponOutcome::Absent),
        true => give_in_pieces(cx, coupon, found).await,
    }
}

/// Gives Redis a coupon whose users are too many for one script. They are kept aside until all are there.
async fn give_in_pieces(cx: &Context, coupon: &Id, mut found: FoundCoupon) -> bool {
    let mut count = 0;
    while let Some((last, _)) = found.users.last() {
        let last = last.clone();
        let piece = FoundCoupon { users: std::mem::take(&mut found.users), ..found.clone() };
        count += piece.users.len();
        match give(cx, coupon, piece, Part::Piece).await {
            Some(CouponOutcome::Loaded) => {}
            // Somebody else was faster.
            outcome => return outcome == Some(CouponOutcome::Exists),
        }
        // Since it is absent nobody gets or returns any of it meanwhile.
        let Ok(Some(next)) = ask(cx, 0, |answer| Wanted::Users(coupon.clone(), last, answer)).await else { return false };
        found.users = next;
    }
    give(cx, coupon, found, Part::Last(count)).await.is_some_and(|outcome| outcome != CouponOutcome::Absent)
}

/// Gives Redis a part of a coupon, again and again as long as Postgres is there. `None` where that cannot be done.
async fn give(cx: &Context, coupon: &Id, found: FoundCoupon, part: Part) -> Option<CouponOutcome> {
    let action = Action::Init(Box::new(found), part);
    while cx.backend.partition.ledger_up() {
        let (answer, answered) = oneshot::channel();
        let op = CouponOp::new(coupon.clone(), action.clone(), None);
        cx.backend.coupon.submit(op, Instant::now(), CouponWaiter::Server(answer));
        match answered.await.ok()? {
            Ok(outcome) => return Some(outcome).filter(|outcome| *outcome != CouponOutcome::Corrupt),
            Err(_) if part == Part::Whole => return None,
            // To give it twice changes nothing.
            Err(_) => tokio::time::sleep(limits::LOAD_PIECE_AGAIN).await,
        }
    }
    None
}
