//! What the ledger tells of a product.

use super::Position;

/// One change of a product, or several that one row of the ledger stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastChange {
    /// Where it stands in the ledger.
    pub position: Position,
    /// As the outbox calls it.
    pub kind: String,
    /// By how much the available units moved in Redis.
    pub delta: i64,
    /// The available units right after it.
    pub available: i64,
    /// By how much the held units moved.
    pub held_delta: i64,
    pub order: Option<String>,
    /// The REQUEST id that it carried, in its escaped form.
    pub request: Option<String>,
    /// When, by Redis's clock, in Unix ms.
    pub at_ms: i64,
    /// How many operations it is, whose positions follow each other from there.
    pub operations: i64,
}
