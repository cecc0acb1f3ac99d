//! HOLDFAST: the server itself.

use std::rc::Rc;
use std::time::Duration;

use super::spec::{self, BLOCKING, FAST, LOADING, READONLY, Spec};
use super::{Context, Step, change};
use crate::domain::Position;
use crate::limits;
use crate::resp::Reply;
use crate::sabotage::breaks;
use crate::store::partition::{EndedEpoch, Partition, State};

pub static AWAIT: Spec = Spec::new("HOLDFAST.AWAIT", "Waits until Postgres has a position.")
    .family("holdfast")
    .args(&[spec::text("position", 64), spec::integer("timeout_ms", 1, limits::TIMEOUT_MS_MAX, "ms").optional()])
    .flags(READONLY | BLOCKING)
    .reply("`APPLIED, position` / `PENDING, applied` / `LOST, position`")
    .example("HOLDFAST.AWAIT 1-1 100")
    .run(|call| {
        let Some(position) = Position::parse(call.args.text("position")) else {
            return Step::Reply(Reply::error("ERR invalid position: '<epoch>-<n>', as a change's reply gives it"));
        };
        let asked = call.args.maybe_integer("timeout_ms").and_then(|ms| u64::try_from(ms).ok()).map(Duration::from_millis);
        let cx = Rc::clone(call.cx);
        Step::Wait(Box::pin(wait(cx, position, asked.unwrap_or(limits::ACK_POSTGRES_WITHIN))))
    });

pub static STATUS: Spec = Spec::new("HOLDFAST.STATUS", "Returns how this server stands with Redis and Postgres.")
    .family("holdfast")
    .flags(READONLY | FAST | LOADING)
    .reply("map `version ready redis postgres partitions`; of each partition a map `partition epoch position applied lag relay state dead_letters`")
    .run(|call| Step::Reply(status(call.cx)));

/// Postgres has the position.
pub const APPLIED: &str = "APPLIED";

/// What becomes of a position: [`APPLIED`], or `LOST` where its epoch ended without it. Waits until that is known; `None` where it never will be.
pub async fn fate(partition: &Partition, position: Position) -> Option<&'static str> {
    let reached = *partition.applied.subscribe().wait_for(|applied| *applied >= position).await.ok()?;
    if reached.epoch == position.epoch || breaks("await-epochs") {
        return Some(APPLIED);
    }
    // Postgres is beyond that epoch: where it ended says whether it ever had this position.
    let mut ended = partition.ended.subscribe();
    let settled = |ended: &EndedEpoch| ended.epoch == position.epoch && (ended.has(position.n) || ended.has_lost(position.n));
    let of_it = |ended: &Vec<EndedEpoch>| ended.iter().any(settled);
    partition.verify.notify_one();
    let ended = ended.wait_for(of_it).await.ok()?;
    let ended = ended.iter().find(|ended| ended.epoch == position.epoch)?;
    Some(if ended.has(position.n) { APPLIED } else { "LOST" })
}

async fn wait(cx: Rc<Context>, position: Position, timeout: Duration) -> Reply {
    let partition = &cx.backend.partition;
    match tokio::time::timeout(timeout, fate(partition, position)).await {
        Ok(Some(word)) => change::outcome(word, [Reply::text(position.to_string())]),
        _ => change::outcome("PENDING", [Reply::text(partition.applied.borrow().to_string())]),
    }
}

fn status(cx: &Context) -> Reply {
    let partition = &cx.backend.partition;
    let (state, epoch) = match &*partition.state.borrow() {
        State::Live { epoch, .. } => ("live".to_owned(), *epoch),
        State::Loading(why) => (format!("loading: {why}"), 0),
        State::Rebuilding(how_far) => (format!("rebuilding: {how_far}"), 0),
    };
    let applied = *partition.applied.borrow();
    let epoch = if epoch == 0 { applied.epoch } else { epoch };
    let trouble = partition.trouble_text();
    let up = |up: bool| Reply::text(if up { "up" } else { "down" });
    let integer = |number: u64| Reply::Integer(i64::try_from(number).unwrap_or(i64::MAX));
    Reply::map([
        ("version", Reply::text(env!("CARGO_PKG_VERSION"))),
        ("ready", Reply::Integer(i64::from(partition.live_epoch().is_some() && partition.redis_up()))),
        ("redis", up(partition.redis_up())),
        ("postgres", up(partition.ledger_up())),
        (
            "partitions",
            Reply::Array(vec![Reply::map([
                ("partition", integer(u64::from(partition.id))),
                ("epoch", integer(epoch)),
                ("position", Reply::text(partition.head().to_string())),
                ("applied", Reply::text(applied.to_string())),
                ("lag", integer(partition.lag())),
                ("relay", Reply::text(if trouble.is_empty() { "this sidecar".to_owned() } else { trouble })),
                ("state", Reply::text(state)),
                ("dead_letters", integer(partition.dead_letters())),
            ])]),
        ),
    ])
}
