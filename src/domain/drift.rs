//! A difference between Redis and Postgres that nothing on its way explains.

/// What was done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Remedy {
    /// Reported only.
    None,
    /// The side that is wrong was moved by the difference.
    Corrected,
    /// The product takes no changes until a person has looked.
    Frozen,
    /// Redis did not have the product and was given it.
    Initialised,
}

impl Remedy {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Corrected => "corrected",
            Self::Frozen => "frozen",
            Self::Initialised => "initialised",
        }
    }
}

/// Which of a product's numbers differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    Available,
    Held,
}

impl Measure {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::Held => "held",
        }
    }
}

/// One product that differs, as both sides were at one position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    pub product: String,
    pub measure: Measure,
    /// What Redis had; `None` where it had no such product, or something that is no number of units.
    pub redis: Option<i64>,
    /// What Redis should have had, by Postgres; `None` where Postgres has no such product.
    pub postgres: Option<i64>,
    /// The part of `postgres` that `holdfast.stock` itself did not show: what came after the position, and what is owed.
    pub in_flight: i64,
    pub remedy: Remedy,
}

impl Drift {
    /// By how many units Redis has more than it should.
    pub fn units(&self) -> i64 {
        self.redis.unwrap_or(0).saturating_sub(self.postgres.unwrap_or(0))
    }
}
