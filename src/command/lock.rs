//! LOCK: the same lock for every language.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use metrics::counter;
use tokio::task::spawn_local;

use super::change::outcome;
use super::spec::{self, BLOCKING, FAST, LOCK_NAME, READONLY, Spec, TOKEN, WRITE};
use super::{Call, Context, Step};
use crate::domain::LockName;
use crate::limits;
use crate::resp::{Pipeline, Protocol, Reply};
use crate::session::client::Client;
use crate::store::lock::{Answer, Ask, Grant, Locks, Refusal};

pub static ACQUIRE: Spec = Spec::new("LOCK.ACQUIRE", "Acquires a lock, and waits for it where asked to.")
    .family("lock")
    .args(&[
        LOCK_NAME,
        spec::integer("lease", limits::LOCK_LEASE_MIN_MS, limits::LOCK_LEASE_MAX_MS, "ms").token("LEASE"),
        spec::integer("wait", 0, limits::LOCK_WAIT_MAX_MS, "ms").token("WAIT"),
        spec::id("owner", "owner id").token("OWNER"),
        spec::flag("session", "SESSION").excludes(&["lease", "owner"]),
    ])
    .flags(WRITE | BLOCKING)
    .reply("`ACQUIRED, token, lease_ms` / `HELD, remaining_ms`")
    .example("LOCK.ACQUIRE invoice-7 LEASE 10000 WAIT 2000")
    .run(acquire);

pub static RELEASE: Spec = Spec::new("LOCK.RELEASE", "Releases a lock.")
    .family("lock")
    .args(&[LOCK_NAME, TOKEN])
    .flags(WRITE | FAST)
    .reply("`RELEASED` / `LOST`")
    .example("LOCK.RELEASE invoice-7 4294967297")
    .run(|call| {
        with_token(call, async |locks, name, token, within| {
            let released = locks.release(name, token, within).await?;
            Ok(if released { outcome("RELEASED", []) } else { fenced() })
        })
    });

pub static EXTEND: Spec = Spec::new("LOCK.EXTEND", "Sets how long a lock lasts from now on.")
    .family("lock")
    .args(&[LOCK_NAME, TOKEN, spec::integer("ms", limits::LOCK_LEASE_MIN_MS, limits::LOCK_LEASE_MAX_MS, "ms")])
    .flags(WRITE | FAST)
    .reply("`EXTENDED, lease_ms` / `LOST`")
    .example("LOCK.EXTEND invoice-7 4294967297 10000")
    .run(|call| {
        let ms = call.args.integer("ms");
        with_token(call, async move |locks, name, token, within| {
            let extended = locks.extend(&name, token, duration(ms), within).await?;
            Ok(extended.map_or_else(fenced, |lease| outcome("EXTENDED", [Reply::Integer(millis(lease))])))
        })
    });

pub static CHECK: Spec = Spec::new("LOCK.CHECK", "Says whether a lock is still held under a token.")
    .family("lock")
    .args(&[LOCK_NAME, TOKEN])
    .flags(READONLY | FAST)
    .reply("`VALID, remaining_ms` / `LOST`")
    .example("LOCK.CHECK invoice-7 4294967297")
    .run(|call| {
        with_token(call, async |locks, name, token, within| {
            let remaining = locks.check(&name, token, within).await?;
            Ok(remaining.map_or_else(fenced, |ms| outcome("VALID", [Reply::Integer(ms)])))
        })
    });

pub static INFO: Spec = Spec::new("LOCK.INFO", "Returns who holds a lock, and how many of this sidecar's clients wait for it.")
    .family("lock")
    .args(&[LOCK_NAME])
    .flags(READONLY | FAST)
    .reply("map `name owner token remaining_ms waiters`, or nil")
    .example("LOCK.INFO invoice-7")
    .run(|call| {
        with_locks(call, async |locks, name, within| {
            let Some(info) = locks.info(&name, within).await? else { return Ok(Reply::Nil) };
            Ok(Reply::map([
                ("name", Reply::bulk(name.id().bytes().clone())),
                ("owner", Reply::text(info.owner)),
                ("token", info.token.map_or(Reply::Nil, Reply::text)),
                ("remaining_ms", Reply::Integer(info.remaining_ms)),
                ("waiters", Reply::Integer(i64::try_from(info.waiters).unwrap_or(i64::MAX))),
            ]))
        })
    });

/// The lock that a session holds, or waits for. Dropped with the session, it is released.
type Slot = Rc<RefCell<Option<Grant>>>;

fn acquire(call: &mut Call<'_>) -> Step {
    let name = match name(call) {
        // It is kept for as long as is waited, or as the session lasts.
        Ok(name) => name.detached(),
        Err(reply) => return Step::Reply(reply),
    };
    let args = &call.args;
    let wait = args.maybe_integer("wait").filter(|wait| *wait > 0);
    let session = args.has("session");
    let ask = Ask {
        name: name.clone(),
        lease: duration(args.maybe_integer("lease").unwrap_or(limits::LOCK_LEASE_DEFAULT_MS)),
        owner: args.maybe_id("owner").map(|owner| owner.detached()),
        session,
        patient: wait.is_some(),
        of_the_server: false,
    };
    let until = call.arrived + wait.map_or(call.cx.backend.within, duration);
    let locks = call.cx.backend.locks.clone();
    let slot = session.then(|| keep_slot(call));
    Step::Wait(Box::pin(async move {
        match locks.acquire(ask).answer(until).await {
            Answer::Held(ms) => outcome("HELD", [Reply::Integer(ms)]),
            Answer::Refused(refusal) => refused(&name, refusal),
            Answer::Got(grant) => {
                let reply = outcome("ACQUIRED", [Reply::text(grant.token.to_string()), Reply::Integer(grant.lease_ms)]);
                match slot {
                    None => grant.take(),
                    Some(slot) => slot.hold(grant),
                }
                reply
            }
        }
    }))
}

/// Where a session's lock goes once it is won.
struct Kept {
    slot: Slot,
    client: std::sync::Arc<Client>,
    pipeline: Rc<Pipeline>,
}

/// Makes room in the session for one more lock, and forgets those that it no longer holds.
fn keep_slot(call: &mut Call<'_>) -> Kept {
    call.session.retain(|slot: &Slot| slot.borrow().as_ref().is_some_and(Grant::lasts));
    let slot = Slot::default();
    call.session.keep(Rc::clone(&slot));
    Kept { slot, client: call.session.client.clone(), pipeline: Rc::clone(call.pipeline()) }
}

impl Kept {
    /// Holds the lock while the session lasts, and tells it when the lock is lost.
    fn hold(self, mut grant: Grant) {
        let Self { slot, client, pipeline } = self;
        if let Some(lost) = grant.lost.take() {
            let message = [Reply::word("lock-lost"), Reply::bulk(grant.name.id().bytes().clone()), Reply::text(grant.token.to_string())];
            spawn_local(async move {
                // An error says that it was released. RESP2 has no place for a message: there RELEASE, EXTEND and CHECK tell.
                if lost.await.is_ok() && client.profile().protocol == Protocol::Resp3 {
                    pipeline.push_message(Reply::Push(message.into()));
                }
            });
        }
        *slot.borrow_mut() = Some(grant);
    }
}

/// The lock's name, or the reply where it is the name of something else.
fn name(call: &Call<'_>) -> Result<LockName, Reply> {
    LockName::parse(call.args.shared("name")).ok_or_else(|| {
        Reply::error(
            "ERR invalid lock name: what begins with stock:, coupon:, holdfast: or redisson_ is data, except coupon:issue:<coupon>",
        )
    })
}

/// Asks about one lock, alone on the connection.
fn with_locks(call: &Call<'_>, ask: impl AsyncFnOnce(Locks, LockName, Duration) -> Result<Reply, Refusal> + 'static) -> Step {
    let name = match name(call) {
        Ok(name) => name,
        Err(reply) => return Step::Reply(reply),
    };
    let cx: Rc<Context> = Rc::clone(call.cx);
    let until = call.arrived + cx.backend.within;
    Step::Wait(Box::pin(async move {
        let within = until.saturating_duration_since(Instant::now());
        ask(cx.backend.locks.clone(), name.clone(), within).await.unwrap_or_else(|refusal| refused(&name, refusal))
    }))
}

/// The same for what is held under a token.
fn with_token(call: &Call<'_>, ask: impl AsyncFnOnce(Locks, LockName, u64, Duration) -> Result<Reply, Refusal> + 'static) -> Step {
    let token = u64::try_from(call.args.integer("token")).unwrap_or_default();
    with_locks(call, async move |locks, name, within| ask(locks, name, token, within).await)
}

fn duration(ms: i64) -> Duration {
    Duration::from_millis(ms.unsigned_abs())
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// What a holder is told whose token is no longer the lock's.
fn fenced() -> Reply {
    counter!("holdfast_lock_fenced_total").increment(1);
    outcome("LOST", [])
}

fn refused(name: &LockName, refusal: Refusal) -> Reply {
    Reply::error(match refusal {
        Refusal::TryAgain(why) | Refusal::Failed(why) => format!("TRYAGAIN {why}"),
        Refusal::Loading(why) => format!("LOADING {why}"),
        Refusal::InDoubt => {
            format!("INDOUBT {name} it is not known yet whether it was done: LOCK.CHECK tells whether the lock is still held")
        }
        Refusal::NoCoupon => format!("TRYAGAIN there is no coupon to issue under the lock '{name}'"),
        Refusal::NotALock(kind) => format!("ERR invalid lock name: '{name}' is a {kind} on the backing Redis, and no lock"),
    })
}

#[cfg(test)]
mod tests {
    use crate::command::After;
    use crate::command::tests::{Wire, answers};
    use crate::resp::Request;

    #[test]
    fn who_waits_for_a_lock_does_not_keep_what_was_read_with_its_request() {
        for words in [vec!["LOCK.ACQUIRE", "a-lock", "WAIT", "1000", "OWNER", "somebody"], vec!["LOCK.ACQUIRE", "a-lock", "SESSION"]] {
            let request: Request = words.iter().collect();
            let after = Wire::new().begin(request.clone());
            assert!(matches!(after, After::Wait(_)));
            assert!(request.shares_memory_with_none());
        }
    }

    #[test]
    fn what_is_no_lock_is_refused_by_name() {
        let reserved =
            "-ERR invalid lock name: what begins with stock:, coupon:, holdfast: or redisson_ is data, except coupon:issue:<coupon>\r\n";
        answers(&[
            ("LOCK.ACQUIRE stock:product:1", reserved),
            ("LOCK.RELEASE coupon:info:c 1", reserved),
            ("LOCK.CHECK coupon:issue: 1", reserved),
            ("LOCK.INFO redisson_lock_token:x", reserved),
            ("LOCK.ACQUIRE a LEASE 999", "-ERR invalid lease: a whole number from 1000 to 3600000 ms\r\n"),
            ("LOCK.ACQUIRE a WAIT 600001", "-ERR invalid wait: a whole number from 0 to 600000 ms\r\n"),
            ("LOCK.ACQUIRE a SESSION LEASE 5000", "-ERR syntax error\r\n"),
            ("LOCK.ACQUIRE a SESSION OWNER o", "-ERR syntax error\r\n"),
            ("LOCK.RELEASE a x", "-ERR invalid token: a whole number from 1 to 9007199254740991\r\n"),
            ("LOCK.EXTEND a 1 0", "-ERR invalid ms: a whole number from 1000 to 3600000 ms\r\n"),
        ]);
    }
}
