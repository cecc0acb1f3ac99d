//! Changes that Redis made and Postgres refuses.

use super::Position;

/// One that waits for a person: a row of `holdfast.dead_letter`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    pub id: i64,
    pub position: Position,
    /// `None` for a change of a coupon.
    pub product: Option<String>,
    /// As the outbox calls it.
    pub kind: String,
    /// By how much the available units should have moved and did not.
    pub delta: i64,
    pub reason: String,
    /// When it was parked, in Unix ms.
    pub at_ms: i64,
}

/// What became of a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    Done,
    /// Postgres refuses it still, or it must not be given up: why.
    Failed(String),
    /// There is none with this id.
    Unknown,
}
