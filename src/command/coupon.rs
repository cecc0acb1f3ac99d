//! COUPON: first come, first served.

use std::rc::Rc;
use std::time::Instant;

use tokio::sync::oneshot;
use tokio::task::spawn_local;

use super::args::Ack;
use super::change::{self, ACK_POSTGRES, ACK_REDIS, CROWDED, Confirmation, accepted, failed, outcome};
use super::first_use::WaitsForCoupon;
use super::spec::{self, ACK, Arg, COUPON, FAST, ORDER, READONLY, REQUEST, Spec, TIMEOUT, USER, WRITE};
use super::{Call, Context, Step, doubt, first_use, read};
use crate::domain::coupon::{CouponStep, CouponTerms, NewTerms};
use crate::domain::quantity::{QUANTITY_MAX, TOTAL_MAX};
use crate::domain::{Id, Position};
use crate::limits;
use crate::resp::{Reply, Ticket};
use crate::session::client::HeldBack;
use crate::store::coupon::{Action, Coupon, CouponOp, CouponOutcome};
use crate::store::keys;
use crate::store::lane::{Failure, Waiter};
use crate::store::reads::{CouponInfo, Live};

/// Why a coupon could not be looked up.
const UNKNOWN: &str = "Redis does not have this coupon, and Postgres cannot say yet whether there is one";
const NOT_KNOWN: &str = "TRYAGAIN Redis does not have this coupon, and Postgres cannot say yet whether there is one; nothing was changed";

/// Which of a user's coupons.
const SERIAL: Arg = spec::integer("serial", 1, TOTAL_MAX, "").token("SERIAL");

pub static CREATE: Spec = Spec::new("COUPON.CREATE", "Creates a coupon that can be issued a number of times.")
    .family("coupon")
    .args(&[
        COUPON,
        spec::integer("total", 1, QUANTITY_MAX, ""),
        spec::integer("peruser", 1, limits::PER_USER_MAX, "").token("PERUSER"),
        spec::unix_ms("start").token("START"),
        spec::unix_ms("end").token("END"),
        REQUEST,
        ACK,
        TIMEOUT,
    ])
    .flags(WRITE | FAST)
    .reply("`OK, position` / `EXISTS`")
    .example("COUPON.CREATE spring 1000")
    .run(create);

pub static ALTER: Spec = Spec::new("COUPON.ALTER", "Changes a coupon's total or its time; a START or END of 0 takes that bound away.")
    .family("coupon")
    .args(&[
        COUPON,
        spec::integer("total", 1, QUANTITY_MAX, "").token("TOTAL"),
        spec::unix_ms("start").token("START"),
        spec::unix_ms("end").token("END"),
        REQUEST,
        ACK,
        TIMEOUT,
    ])
    .flags(WRITE | FAST)
    .reply("`OK, position`")
    .example("COUPON.ALTER spring TOTAL 2000")
    .run(alter);

pub static ISSUE: Spec = Spec::new("COUPON.ISSUE", "Issues a coupon to a user, first come, first served.")
    .family("coupon")
    .args(&[COUPON, USER, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .reply("`ISSUED, serial, remaining, position` / `ALREADY, serial` / `SOLDOUT` / `NOTSTARTED, start` / `ENDED, end`")
    .example("COUPON.ISSUE spring user-7")
    .refused_early(|cx| cx.backend.coupon.is_crowded().then_some(CROWDED))
    .run(|call| {
        let action = Action::step(CouponStep::Issue, call.args.id("user"));
        submit(call, action, ACK_REDIS)
    });

pub static USE: Spec = Spec::new("COUPON.USE", "Redeems a coupon of a user, once; without SERIAL the oldest that is not redeemed.")
    .family("coupon")
    .args(&[COUPON, USER, SERIAL, ORDER.token("ORDER"), REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .reply("`USED, serial, position` / `ALREADY, serial` / `NOTISSUED` / `ENDED, end`")
    .example("COUPON.USE spring user-7 ORDER order-1")
    .run(|call| step(call, CouponStep::Use, ACK_REDIS));

pub static UNUSE: Spec = Spec::new("COUPON.UNUSE", "Takes a redemption back; without SERIAL the newest that is redeemed.")
    .family("coupon")
    .args(&[COUPON, USER, SERIAL, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .reply("`ISSUED, serial, position` / `NOTUSED` / `NOTISSUED`")
    .example("COUPON.UNUSE spring user-7")
    .run(|call| step(call, CouponStep::Unuse, ACK_REDIS));

pub static REVOKE: Spec =
    Spec::new("COUPON.REVOKE", "Takes a coupon back that is not redeemed, so that it can be issued again; without SERIAL the newest.")
        .family("coupon")
        .args(&[COUPON, USER, SERIAL, REQUEST, ACK, TIMEOUT])
        .flags(WRITE | FAST)
        .reply("`REVOKED, serial, remaining, position` / `NOTISSUED` / `USED, serial`")
        .example("COUPON.REVOKE spring user-7")
        .run(|call| step(call, CouponStep::Revoke, ACK_POSTGRES));

pub static DEL: Spec = Spec::new("COUPON.DEL", "Deletes a coupon; its id stays taken, and what was issued stays in Postgres.")
    .family("coupon")
    .args(&[COUPON, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .reply("`OK, position` / `NOTFOUND`")
    .example("COUPON.DEL spring")
    .run(|call| submit(call, Action::Delete, ACK_POSTGRES));

pub static GET: Spec = Spec::new("COUPON.GET", "Returns the coupons that a user holds, redeemed or not.")
    .family("coupon")
    .args(&[COUPON, USER])
    .flags(READONLY | FAST)
    .reply("array of maps `serial state issued_at_ms order`; state: `issued`, `used`")
    .example("COUPON.GET spring user-7")
    .run(|call| {
        let (coupon, user) = (call.args.id("coupon"), call.args.id("user"));
        read::from_redis(call, |cx| held(cx, coupon, user))
    });

pub static SCAN: Spec = Spec::new("COUPON.SCAN", "Iterates over the coupons that are not deleted.")
    .family("coupon")
    .args(&[
        spec::cursor("cursor"),
        spec::pattern("pattern").token("MATCH"),
        spec::integer("count", 1, limits::SCAN_COUNT_MAX, "").token("COUNT"),
    ])
    .flags(READONLY)
    .complexity("O(1) a call, O(N) for a whole iteration")
    .reply("`cursor, [coupon, remaining, ...]`")
    .example("COUPON.SCAN 0 MATCH spring-* COUNT 100")
    .run(|call| {
        let scan = read::Scan::of(&call.args);
        read::from_redis(call, |cx| async move {
            match cx.backend.reads.scan_coupons(&scan.cursor, &scan.pattern, scan.count).await {
                Ok(scanned) => read::scanned(scanned),
                Err(error) => read::failed(&error),
            }
        })
    });

pub static INFO: Spec = Spec::new("COUPON.INFO", "Returns what is known of a coupon.")
    .family("coupon")
    .args(&[COUPON])
    .flags(READONLY | FAST)
    .reply(
        "map `coupon total issued used remaining peruser start end state lock position applied`, or nil; \
         state: `notstarted`, `open`, `soldout`, `ended`, `deleted`",
    )
    .example("COUPON.INFO spring")
    .run(|call| {
        let coupon = call.args.id("coupon");
        read::from_redis(call, |cx| info(cx, coupon))
    });

fn create(call: &mut Call<'_>) -> Step {
    // 0 is how the keys write "no limit": a START in 1970 is none.
    let time = |name| call.args.maybe_integer(name).filter(|ms| *ms > 0);
    let terms = CouponTerms {
        total: call.args.integer("total"),
        per_user: call.args.maybe_integer("peruser").unwrap_or(1),
        start_ms: time("start"),
        end_ms: time("end"),
    };
    if let (Some(start), Some(end)) = (terms.start_ms, terms.end_ms)
        && end <= start
    {
        return Step::Reply(ends_before_start());
    }
    submit(call, Action::Create(terms), ACK_POSTGRES)
}

fn alter(call: &mut Call<'_>) -> Step {
    let number = |name| call.args.maybe_integer(name);
    let terms = NewTerms { total: number("total"), start_ms: number("start"), end_ms: number("end") };
    if terms == NewTerms::default() {
        return Step::Reply(Reply::error("ERR syntax error: give TOTAL, START or END"));
    }
    submit(call, Action::Alter(terms), ACK_POSTGRES)
}

fn step(call: &mut Call<'_>, step: CouponStep, default: Ack) -> Step {
    let order = (step == CouponStep::Use).then(|| call.args.maybe_id("order")).flatten();
    let action = Action::Step { step, user: call.args.id("user"), serial: call.args.maybe_integer("serial"), order };
    submit(call, action, default)
}

fn submit(call: &mut Call<'_>, action: Action, default: Ack) -> Step {
    let confirmation = match Confirmation::of(call, default) {
        Ok(confirmation) => confirmation,
        Err(reply) => return Step::Reply(reply),
    };
    let mut op = CouponOp::new(call.args.id("coupon"), action, change::request(&call.args));
    op.client = call.session.client.id;
    let ticket = call.ticket_with(confirmation.waits_for_postgres());
    // It takes a look-up first, which what follows it must not overtake.
    let held = matches!(op.action, Action::Create(_)).then(|| call.session.hold_back(call.pipeline));
    let waiter = CouponWaiter::Client(ClientWaiter {
        cx: Rc::clone(call.cx),
        ticket,
        confirmation,
        arrived: call.arrived,
        has_looked: false,
        waits: None,
        _held: held,
    });
    doubt::submit(call, &call.cx.backend.coupon, op, confirmation.waits_for_postgres(), waiter);
    Step::Later
}

/// Who waits for a COUPON operation.
pub enum CouponWaiter {
    Client(ClientWaiter),
    /// The server itself.
    Server(oneshot::Sender<Result<CouponOutcome, Failure>>),
}

/// A client that waits.
pub struct ClientWaiter {
    cx: Rc<Context>,
    ticket: Ticket,
    confirmation: Confirmation,
    arrived: Instant,
    /// Whether the coupon was looked up in Postgres for it.
    has_looked: bool,
    /// Once it was submitted again behind a look-up: what its client sends behind it comes behind it still.
    waits: Option<WaitsForCoupon>,
    /// What holds back the commands behind it.
    _held: Option<HeldBack>,
}

impl Waiter<Coupon> for CouponWaiter {
    fn done(self, op: &CouponOp, result: Result<CouponOutcome, Failure>) {
        match self {
            // Whoever has given up does not hear it.
            Self::Server(answer) => _ = answer.send(result),
            Self::Client(client) if matches!(result, Ok(CouponOutcome::Absent)) && client.may_look(op) => client.look(op.clone()),
            Self::Client(client) => client.answer(op, result),
        }
    }

    fn comes_behind(&self, op: &CouponOp) -> bool {
        matches!(self, Self::Client(client) if client.waits.is_none() && client.comes_behind_a_look_up(op))
    }

    fn take_back(self, op: CouponOp) {
        match self {
            Self::Client(client) => client.look(op),
            Self::Server(_) => {}
        }
    }
}

impl ClientWaiter {
    /// Whether Postgres may have the coupon that Redis does not have.
    fn may_look(&self, op: &CouponOp) -> bool {
        let is_creation = matches!(op.action, Action::Create(_));
        !self.has_looked && (is_creation || !self.cx.backend.first_coupons.is_nowhere(&op.coupon))
    }

    /// Whether its client waits for a look-up of the same coupon: what Redis says meanwhile may be of after it. One whose REQUEST is the server's
    /// own is looked up otherwise.
    fn comes_behind_a_look_up(&self, op: &CouponOp) -> bool {
        self.cx.backend.first_coupons.is_waited_for(&op.coupon, op.client)
            && !matches!(op.action, Action::Create(_))
            && op.request.as_ref().is_none_or(|request| request.id.sent().is_none())
    }

    /// Looks the coupon up in Postgres, gives it to Redis if it is there, and tries again.
    fn look(mut self, mut op: CouponOp) {
        // Its own look-up of before is over.
        self.waits = None;
        let behind = self.comes_behind_a_look_up(&op);
        let waits = WaitsForCoupon::new(&self.cx, &op.coupon, op.client);
        spawn_local(async move {
            let (cx, within) = (Rc::clone(&self.cx), self.cx.backend.within);
            let deadline = self.arrived + within + self.confirmation.waits_for_postgres();
            if matches!(op.action, Action::Create(_)) {
                self.has_looked = true;
                match first_use::has_coupon(&cx, &op.coupon, deadline).await {
                    None => return self.ticket.complete(Reply::error(NOT_KNOWN)),
                    Some(true) => return self.ticket.complete(outcome("EXISTS", [])),
                    Some(false) => op.is_nowhere = true,
                }
            } else {
                // Where the look-up has just ended, what this one is behind has been submitted again.
                self.has_looked = !behind || cx.backend.first_coupons.is_under_way(&op.coupon);
                if self.has_looked && !first_use::load_coupon(&cx, &op.coupon, deadline).await {
                    return self.ticket.complete(Reply::error(NOT_KNOWN));
                }
            }
            // In the order in which they came.
            let (soon, late) = (self.arrived + within, Instant::now() + limits::LOCKED_RETRY_WITHIN);
            let until = waits.submitted_until(if soon > late { soon } else { deadline.min(Instant::now() + within) });
            self.waits = Some(waits);
            cx.backend.coupon.submit_until(op, until, CouponWaiter::Client(self));
        });
    }

    fn answer(self, op: &CouponOp, result: Result<CouponOutcome, Failure>) {
        if matches!((&result, &op.action), (Ok(CouponOutcome::Done { .. }), Action::Create(_))) {
            self.cx.backend.first_coupons.exists(&op.coupon);
        }
        let outcome = match result {
            Err(failure) => Err(failed(&self.cx, failure)),
            Ok(CouponOutcome::Done { position, .. }) => Ok((position, accepted("OK", &[], position))),
            Ok(CouponOutcome::Stepped { serial, remaining, position }) => Ok((position, stepped(&op.action, serial, remaining, position))),
            Ok(CouponOutcome::Remembered(remembered)) => change::replay(op.request.as_ref(), &remembered),
            Ok(CouponOutcome::Absent) if matches!(op.action, Action::Create(_)) => Err(Reply::error(NOT_KNOWN)),
            Ok(CouponOutcome::Exists | CouponOutcome::Loaded) => Err(outcome("EXISTS", [])),
            Ok(CouponOutcome::TooFew { issued }) => Err(Reply::error(format!("ERR invalid total: {issued} of them are issued already"))),
            Ok(CouponOutcome::EndsBeforeStart) => Err(ends_before_start()),
            Ok(CouponOutcome::Already { serial }) => Err(outcome("ALREADY", [Reply::Integer(serial)])),
            Ok(CouponOutcome::SoldOut) => Err(outcome("SOLDOUT", [])),
            Ok(CouponOutcome::NotStarted { start_ms }) => Err(outcome("NOTSTARTED", [Reply::Integer(start_ms)])),
            Ok(CouponOutcome::Ended { end_ms }) => Err(outcome("ENDED", [Reply::Integer(end_ms)])),
            Ok(CouponOutcome::NotIssued) => Err(outcome("NOTISSUED", [])),
            Ok(CouponOutcome::NotUsed) => Err(outcome("NOTUSED", [])),
            Ok(CouponOutcome::Used { serial }) => Err(outcome("USED", [Reply::Integer(serial)])),
            Ok(CouponOutcome::Absent | CouponOutcome::Deleted) => Err(match op.action {
                Action::Delete => outcome("NOTFOUND", []),
                _ => Reply::error(format!("NOTFOUND no coupon '{}'", op.coupon)),
            }),
            Ok(CouponOutcome::Frozen { reason }) => Err(Reply::error(format!("FROZEN {reason}"))),
            Ok(CouponOutcome::Moved) => Err(Reply::error("TRYAGAIN it was being corrected; nothing was changed")),
            Ok(CouponOutcome::Corrupt) => Err(Reply::error(format!(
                "FROZEN a key of coupon '{}' holds something that does not belong there: repair it in Redis",
                op.coupon
            ))),
        };
        match outcome {
            Ok((position, reply)) => self.confirmation.confirm(&self.cx.backend, self.arrived, position, self.ticket, reply),
            Err(reply) => self.ticket.complete(reply),
        }
    }
}

fn ends_before_start() -> Reply {
    Reply::error("ERR invalid end: it must be after the start")
}

/// The reply to a step of a user's coupon.
fn stepped(action: &Action, serial: i64, remaining: i64, position: Position) -> Reply {
    let Action::Step { step, .. } = action else { return accepted("OK", &[], position) };
    let numbers = [serial, remaining];
    accepted(step.word(), if step.says_remaining() { &numbers } else { &numbers[..1] }, position)
}

/// Reads something of a coupon; where Redis does not have it, once more after Postgres was asked for it.
async fn known<T>(
    cx: &Rc<Context>,
    coupon: &Id,
    read: impl AsyncFn() -> Result<Option<T>, crate::store::Error>,
) -> Result<Option<T>, crate::store::Error> {
    match read().await {
        Ok(None) if !cx.backend.first_coupons.is_nowhere(coupon) => {
            if first_use::load_coupon(cx, coupon, Instant::now() + cx.backend.within / 2).await {
                read().await
            } else {
                Err(crate::store::Error::Unfit(UNKNOWN.to_owned()))
            }
        }
        answer => answer,
    }
}

async fn held(cx: Rc<Context>, coupon: Id, user: Id) -> Reply {
    let Some(live) = Live::of(&cx.backend.partition) else { return read::not_live() };
    let read = async || cx.backend.reads.coupon_held(&live, &coupon, &user).await;
    match known(&cx, &coupon, read).await {
        Err(error) => read::failed(&error),
        Ok(held) => Reply::Array(
            held.into_iter()
                .flatten()
                .map(|held| {
                    Reply::map([
                        ("serial", Reply::Integer(held.serial)),
                        ("state", Reply::text(held.state)),
                        ("issued_at_ms", Reply::Integer(held.issued_at_ms)),
                        ("order", held.order.map_or(Reply::Nil, Reply::text)),
                    ])
                })
                .collect(),
        ),
    }
}

async fn info(cx: Rc<Context>, coupon: Id) -> Reply {
    let Some(live) = Live::of(&cx.backend.partition) else { return read::not_live() };
    let info = match known(&cx, &coupon, async || cx.backend.reads.coupon_info(&live, &coupon).await).await {
        Ok(Some(info)) => info,
        Ok(None) => return Reply::Nil,
        Err(error) => return read::failed(&error),
    };
    let time = |ms: Option<i64>| ms.map_or(Reply::Nil, Reply::Integer);
    Reply::map([
        ("coupon", Reply::bulk(coupon.bytes().clone())),
        ("total", Reply::Integer(info.total)),
        ("issued", Reply::Integer(info.issued)),
        ("used", Reply::Integer(info.used)),
        ("remaining", Reply::Integer((info.total - info.issued).max(0))),
        ("peruser", Reply::Integer(info.per_user)),
        ("start", time(info.start_ms)),
        ("end", time(info.end_ms)),
        ("state", Reply::text(state(&info))),
        ("lock", Reply::text(keys::coupon_lock(&coupon))),
        ("position", Reply::text(info.position.to_string())),
        ("applied", Reply::text(cx.backend.partition.applied.borrow().to_string())),
    ])
}

/// What COUPON.ISSUE would come to for a new user.
fn state(info: &CouponInfo) -> &'static str {
    if info.deleted {
        "deleted"
    } else if info.start_ms.is_some_and(|start| info.now_ms < start) {
        "notstarted"
    } else if info.end_ms.is_some_and(|end| info.now_ms >= end) {
        "ended"
    } else if info.issued >= info.total {
        "soldout"
    } else {
        "open"
    }
}
