//! A difference between Redis and Postgres that nothing on its way explains.

/// What was done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Remedy {
    /// Reported only.
    None,
    /// The side that is wrong was moved by the difference.
    Corrected,
    /// It takes no changes until a person has looked.
    Frozen,
    /// Redis did not have it and was given it.
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

/// Which number of a product or of a coupon differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// A product's units.
    Available,
    Held,
    /// How many of a coupon there are.
    Total,
    /// How many of them are out.
    Issued,
    /// How many were redeemed.
    Used,
    /// The highest serial ever issued.
    Serial,
    /// How many users have any.
    Users,
}

impl Measure {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::Held => "held",
            Self::Total => "total",
            Self::Issued => "issued",
            Self::Used => "used",
            Self::Serial => "serial",
            Self::Users => "users",
        }
    }
}

/// One product or coupon that differs, as both sides were at one position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// The product's id, or the coupon's: the measure says which.
    pub product: String,
    pub measure: Measure,
    /// What Redis had; `None` where it had no such thing, or something that is no number.
    pub redis: Option<i64>,
    /// What Redis should have had, by Postgres; `None` where Postgres has no such thing.
    pub postgres: Option<i64>,
    /// The part of `postgres` that its own row did not show: what came after the position, and what is owed.
    pub in_flight: i64,
    pub remedy: Remedy,
}

impl Drift {
    /// By how much Redis has more than it should.
    pub fn units(&self) -> i64 {
        self.redis.unwrap_or(0).saturating_sub(self.postgres.unwrap_or(0))
    }
}
