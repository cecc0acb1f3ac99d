//! What the reading commands share.

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
        other => format!("TRYAGAIN {other}"),
    })
}
