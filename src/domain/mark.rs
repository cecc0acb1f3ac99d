//! Up to where Redis has what other programs changed in Postgres.

use std::fmt;

/// The place of a row of `holdfast.inbox`: rows are taken in the order of the transaction that wrote them, then of their id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InboxMark {
    /// The transaction, as Postgres's 64-bit number that never wraps (xid8).
    pub xid: u64,
    pub id: u64,
}

impl InboxMark {
    /// Parses `<xid>:<id>`.
    pub fn parse(text: &str) -> Option<Self> {
        let (xid, id) = text.split_once(':')?;
        Some(Self { xid: xid.parse().ok()?, id: id.parse().ok()? })
    }
}

impl fmt::Display for InboxMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.xid, self.id)
    }
}
