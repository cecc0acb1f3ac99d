//! What the reading commands share.

use std::rc::Rc;

use super::{Call, Context, Step, change};
use crate::resp::Reply;
use crate::store;
use crate::store::reads::Scanned;

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

/// Reads from Redis, alone on the connection. Refused while the partition is not live: what Redis has then may be empty or old.
pub fn from_redis<F: Future<Output = Reply> + 'static>(call: &Call<'_>, read: impl FnOnce(Rc<Context>) -> F) -> Step {
    match call.cx.backend.stock.closed() {
        Some(failure) => Step::Reply(change::failed(failure)),
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
