//! HOLDFAST.DEADLETTER: changes that Postgres refused, for a person to settle.

use std::rc::Rc;

use tokio::sync::oneshot;

use super::spec::{self, ADMIN, READONLY, SHOWS, Spec, WRITE};
use super::{Call, Context, Step, change, describe};
use crate::domain::{DeadLetter, Settled};
use crate::limits;
use crate::resp::Reply;
use crate::store::partition::LetterRequest;

const ID: spec::Arg = spec::integer("id", 1, i64::MAX, "");
/// Why nothing was even asked.
const BUSY: &str = "TRYAGAIN too many ask about dead letters; nothing was changed";

pub static DEADLETTER: Spec = Spec::new("HOLDFAST.DEADLETTER", "Lists and settles changes that Postgres refused.")
    .family("holdfast")
    .flags(ADMIN)
    .reply("see the subcommands")
    .example("HOLDFAST.DEADLETTER LIST")
    .subcommands(&[&LIST, &RETRY, &DROP, &HELP]);

static LIST: Spec = sub("HOLDFAST.DEADLETTER|LIST", "Returns the oldest dead letters.")
    .args(&[spec::integer("count", 1, limits::DEAD_LETTERS_LISTED_MAX, "").token("COUNT")])
    .flags(ADMIN | READONLY | SHOWS)
    .complexity("O(N) in the number of dead letters returned")
    .reply("array of maps `id position product kind delta reason at_ms`")
    .example("HOLDFAST.DEADLETTER LIST COUNT 10")
    .run(|call| {
        let count = call.args.maybe_integer("count").and_then(|count| usize::try_from(count).ok()).unwrap_or(limits::DEAD_LETTERS_LISTED);
        let cx = Rc::clone(call.cx);
        Step::Wait(Box::pin(async move {
            match ask(&cx, |answer| LetterRequest::List { count, answer }).await {
                Ok(Some(letters)) => Reply::Array(letters.into_iter().map(shown).collect()),
                Ok(None) => Reply::error("TRYAGAIN Postgres cannot be asked now"),
                Err(reply) => reply,
            }
        }))
    });

static RETRY: Spec = sub("HOLDFAST.DEADLETTER|RETRY", "Applies a dead letter after all, and removes it.")
    .args(&[ID])
    .flags(ADMIN | WRITE)
    .reply("`OK` / `FAILED, reason` / `NOTFOUND`")
    .example("HOLDFAST.DEADLETTER RETRY 1")
    .run(|call| settle(call, |id, answer| LetterRequest::Retry { id, answer }));

static DROP: Spec = sub("HOLDFAST.DEADLETTER|DROP", "Gives a dead letter up; Redis gets its units back.")
    .args(&[ID])
    .flags(ADMIN | WRITE)
    .reply("`OK` / `FAILED, reason` / `NOTFOUND`")
    .example("HOLDFAST.DEADLETTER DROP 1")
    .run(|call| settle(call, |id, answer| LetterRequest::Drop { id, answer }));

static HELP: Spec = sub("HOLDFAST.DEADLETTER|HELP", "Lists the subcommands.")
    .reply("array of text")
    .example("HOLDFAST.DEADLETTER HELP")
    .run(|_| Step::Reply(describe::help(&DEADLETTER)));

const fn sub(name: &'static str, summary: &'static str) -> Spec {
    Spec::new(name, summary).family("holdfast").flags(ADMIN)
}

fn settle(call: &Call<'_>, request: fn(i64, oneshot::Sender<Settled>) -> LetterRequest) -> Step {
    let (cx, id) = (Rc::clone(call.cx), call.args.integer("id"));
    Step::Wait(Box::pin(async move {
        match ask(&cx, |answer| request(id, answer)).await {
            Ok(Some(Settled::Done)) => change::outcome("OK", []),
            Ok(Some(Settled::Failed(reason))) => change::outcome("FAILED", [Reply::text(reason)]),
            Ok(Some(Settled::Unknown)) => change::outcome("NOTFOUND", []),
            Ok(None) => Reply::error(format!("INDOUBT {id} Postgres has not answered: see HOLDFAST.DEADLETTER LIST, and ask again")),
            Err(reply) => reply,
        }
    }))
}

/// Asks the clerk. `None` where it has no answer in time.
async fn ask<T>(cx: &Context, request: impl FnOnce(oneshot::Sender<T>) -> LetterRequest) -> Result<Option<T>, Reply> {
    let partition = &cx.backend.partition;
    if !partition.ledger_up() {
        return Err(Reply::error("TRYAGAIN Postgres cannot be reached; nothing was changed"));
    }
    let (answer, answered) = oneshot::channel();
    partition.letters.try_send(request(answer)).map_err(|_| Reply::error(BUSY))?;
    Ok(tokio::time::timeout(limits::ACK_POSTGRES_WITHIN, answered).await.ok().and_then(Result::ok))
}

fn shown(letter: DeadLetter) -> Reply {
    Reply::map([
        ("id", Reply::Integer(letter.id)),
        ("position", Reply::text(letter.position.to_string())),
        ("product", letter.product.map_or(Reply::Nil, Reply::text)),
        ("kind", Reply::text(letter.kind)),
        ("delta", Reply::Integer(letter.delta)),
        ("reason", Reply::text(letter.reason)),
        ("at_ms", Reply::Integer(letter.at_ms)),
    ])
}
