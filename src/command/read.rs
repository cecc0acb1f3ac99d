//! What the reading commands share.

use std::rc::Rc;

use super::args::Args;
use super::{Call, Context, Step, change};
use crate::resp::Reply;
use crate::store;
use crate::store::reads::Scanned;

/// What a step of a scan was asked for.
pub struct Scan {
    pub cursor: String,
    pub pattern: String,
    pub count: i64,
}

impl Scan {
    /// From `cursor`, `pattern` (else all) and `count` (else 10).
    pub fn of(args: &Args) -> Self {
        let text = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
        Self {
            cursor: text(args.text("cursor")),
            pattern: args.maybe_text("pattern").map_or_else(|| "*".to_owned(), text),
            count: args.maybe_integer("count").unwrap_or(10),
        }
    }
}

/// `cursor, [id, number, ...]`.
pub fn scanned(scanned: Scanned) -> Reply {
    let found = scanned.found.into_iter().flat_map(|(id, number)| [Reply::text(id), Reply::Integer(number)]);
    Reply::Array(vec![Reply::text(scanned.cursor), Reply::Array(found.collect())])
}

/// The error reply of a read that did not work.
pub fn failed(error: &store::Error) -> Reply {
    Reply::error(match error {
        store::Error::Connection(_) => "TRYAGAIN Redis cannot be reached".to_owned(),
        store::Error::Unexpected(what) => format!("FROZEN a key in Redis holds what does not belong there, repair it: {what}"),
        other => format!("TRYAGAIN {other}"),
    })
}

/// The error reply of a read while the partition is being verified.
pub fn not_live() -> Reply {
    Reply::error("TRYAGAIN Redis is being compared with Postgres")
}

/// Reads from Redis, alone on the connection. Refused while the partition is not live: what Redis has then may be empty or old.
pub fn from_redis<F: Future<Output = Reply> + 'static>(call: &Call<'_>, read: impl FnOnce(Rc<Context>) -> F) -> Step {
    match call.cx.backend.stock.closed() {
        Some(failure) => Step::Reply(change::failed(call.cx, failure)),
        None => {
            let deadline = call.arrived + call.cx.backend.within;
            let reading = read(Rc::clone(call.cx));
            Step::Wait(Box::pin(async move {
                let late = || Reply::error("TRYAGAIN Redis does not answer");
                tokio::time::timeout_at(deadline.into(), reading).await.unwrap_or_else(|_| late())
            }))
        }
    }
}
