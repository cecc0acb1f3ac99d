//! COUPON: first come, first served.

use std::rc::Rc;

use super::args::Ack;
use super::change::{self, ACK_POSTGRES, ACK_REDIS, Confirmation, accepted, failed, outcome};
use super::spec::{self, ACK, COUPON, FAST, READONLY, REQUEST, Spec, TIMEOUT, USER, WRITE};
use super::{Call, Context, Step, doubt, read};
use crate::domain::Id;
use crate::domain::change::CouponTerms;
use crate::domain::quantity::QUANTITY_MAX;
use crate::limits;
use crate::resp::{Reply, Ticket};
use crate::store::coupon::{Action, Coupon, CouponOp, CouponOutcome};
use crate::store::keys;
use crate::store::lane::{Failure, Waiter};
use crate::store::reads::CouponInfo;

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

pub static ISSUE: Spec = Spec::new("COUPON.ISSUE", "Issues a coupon to a user, first come, first served.")
    .family("coupon")
    .args(&[COUPON, USER, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .reply("`ISSUED, serial, remaining, position` / `ALREADY, serial` / `SOLDOUT` / `NOTSTARTED, start` / `ENDED, end`")
    .example("COUPON.ISSUE spring user-7")
    .run(|call| {
        let action = Action::Issue { user: call.args.id("user") };
        submit(call, action, ACK_REDIS)
    });

pub static GET: Spec = Spec::new("COUPON.GET", "Returns the coupons that a user holds.")
    .family("coupon")
    .args(&[COUPON, USER])
    .flags(READONLY | FAST)
    .reply("array of maps `serial state issued_at_ms order`")
    .example("COUPON.GET spring user-7")
    .run(|call| {
        let (coupon, user) = (call.args.id("coupon"), call.args.id("user"));
        read::from_redis(call, |cx| held(cx, coupon, user))
    });

pub static INFO: Spec = Spec::new("COUPON.INFO", "Returns what is known of a coupon.")
    .family("coupon")
    .args(&[COUPON])
    .flags(READONLY | FAST)
    .reply("map `coupon total issued used remaining peruser start end state lock position applied`, or nil")
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
        return Step::Reply(Reply::error("ERR invalid end: it must be after the start"));
    }
    submit(call, Action::Create(terms), ACK_POSTGRES)
}

fn submit(call: &mut Call<'_>, action: Action, default: Ack) -> Step {
    let confirmation = match Confirmation::of(call, default) {
        Ok(confirmation) => confirmation,
        Err(reply) => return Step::Reply(reply),
    };
    let op = CouponOp { coupon: call.args.id("coupon"), action, request: change::request(&call.args) };
    let ticket = call.ticket_with(confirmation.waits_for_postgres());
    let waiter = CouponWaiter { cx: Rc::clone(call.cx), ticket, confirmation };
    doubt::submit(call, &call.cx.backend.coupon, op, confirmation.waits_for_postgres(), waiter);
    Step::Later
}

/// A client that waits for a COUPON operation.
pub struct CouponWaiter {
    cx: Rc<Context>,
    ticket: Ticket,
    confirmation: Confirmation,
}

impl Waiter<Coupon> for CouponWaiter {
    fn done(self, op: &CouponOp, result: Result<CouponOutcome, Failure>) {
        let outcome = match result {
            Err(failure) => Err(failed(failure)),
            Ok(CouponOutcome::Created { position }) => Ok((position, accepted("OK", &[], position))),
            Ok(CouponOutcome::Issued { serial, remaining, position }) => Ok((position, accepted("ISSUED", &[serial, remaining], position))),
            Ok(CouponOutcome::Remembered(remembered)) => change::replay(op.request.as_ref(), &remembered),
            Ok(CouponOutcome::Exists) => Err(outcome("EXISTS", [])),
            Ok(CouponOutcome::Already { serial }) => Err(outcome("ALREADY", [Reply::Integer(serial)])),
            Ok(CouponOutcome::SoldOut) => Err(outcome("SOLDOUT", [])),
            Ok(CouponOutcome::NotStarted { start_ms }) => Err(outcome("NOTSTARTED", [Reply::Integer(start_ms)])),
            Ok(CouponOutcome::Ended { end_ms }) => Err(outcome("ENDED", [Reply::Integer(end_ms)])),
            Ok(CouponOutcome::Absent) => Err(Reply::error(format!("NOTFOUND no coupon '{}'", op.coupon))),
            Ok(CouponOutcome::Corrupt) => Err(Reply::error(format!(
                "FROZEN a key of coupon '{}' holds something that does not belong there: repair it in Redis",
                op.coupon
            ))),
        };
        match outcome {
            Ok((position, reply)) => self.confirmation.confirm(&self.cx.backend.acks, position, self.ticket, reply),
            Err(reply) => self.ticket.complete(reply),
        }
    }
}

async fn held(cx: Rc<Context>, coupon: Id, user: Id) -> Reply {
    match cx.backend.reads.coupon_held(&coupon, &user).await {
        Err(error) => read::failed(&error),
        Ok(held) => Reply::Array(
            held.into_iter()
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
    let info = match cx.backend.reads.coupon_info(&coupon).await {
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
        ("remaining", Reply::Integer(info.total - info.issued)),
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
    if info.start_ms.is_some_and(|start| info.now_ms < start) {
        "notstarted"
    } else if info.end_ms.is_some_and(|end| info.now_ms >= end) {
        "ended"
    } else if info.issued >= info.total {
        "soldout"
    } else {
        "open"
    }
}
