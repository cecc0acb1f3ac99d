//! What a coupon goes through: its terms, the steps of one that a user has, and how a change of it is written in the outbox.
//!
//! ```text
//! 0 coupon.create coupon=c total=10 peruser=1 end=1700000000000 |
//! 1 coupon.alter coupon=c total=20 end=0 remaining=19 by=10 |
//! 2 coupon.issue coupon=c user=u-7 token=4294967297 serial=12 remaining=7 |
//! 3 coupon.use coupon=c user=u-7 order=o-1 serial=12 remaining=7 |
//! 4 coupon.unuse coupon=c user=u-7 serial=12 remaining=7 |
//! 5 coupon.revoke coupon=c user=u-7 serial=12 remaining=8 |
//! 6 coupon.delete coupon=c |
//! 7 coupon.correct coupon=c total=0 issued=-1 used=0 serial=0 remaining=9 |
//! 8 coupon.adopt coupon=c total=5 issued=0 used=0 serial=0 remaining=14 |
//! ```

use super::Side;
use super::change::Named;

/// The numbers of a coupon, or by how much they move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub total: i64,
    /// How many are out.
    pub issued: i64,
    /// How many of them were redeemed.
    pub used: i64,
    /// The highest serial ever issued.
    pub serial: i64,
}

impl Counts {
    /// Each with its name in the outbox.
    pub const fn named(&self) -> [(&'static str, i64); 4] {
        [("total", self.total), ("issued", self.issued), ("used", self.used), ("serial", self.serial)]
    }

    /// Each number by what `of` makes of it and of that of `other`.
    pub fn with(self, other: Self, of: fn(i64, i64) -> i64) -> Self {
        Self {
            total: of(self.total, other.total),
            issued: of(self.issued, other.issued),
            used: of(self.used, other.used),
            serial: of(self.serial, other.serial),
        }
    }

    /// Whether a coupon may have these numbers.
    pub const fn are_possible(&self) -> bool {
        0 <= self.used && self.used <= self.issued && self.issued <= self.total && self.issued <= self.serial
    }
}

/// The terms of a coupon as COUPON.CREATE set them. Times in Unix ms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CouponTerms {
    pub total: i64,
    pub per_user: i64,
    pub start_ms: Option<i64>,
    pub end_ms: Option<i64>,
}

/// What COUPON.ALTER changes of them; `None` leaves it as it is, a time of 0 takes the bound away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewTerms {
    pub total: Option<i64>,
    pub start_ms: Option<i64>,
    pub end_ms: Option<i64>,
}

impl NewTerms {
    /// The names and values that are given, as the outbox has them.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, i64)> {
        let named = [("total", self.total), ("start", self.start_ms), ("end", self.end_ms)];
        named.into_iter().filter_map(|(name, value)| Some((name, value?)))
    }
}

/// What happens to one coupon of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CouponStep {
    /// COUPON.ISSUE: it is theirs.
    Issue,
    /// COUPON.USE: it is redeemed.
    Use,
    /// COUPON.UNUSE: it was not redeemed after all.
    Unuse,
    /// COUPON.REVOKE: it is nobody's any more.
    Revoke,
}

impl CouponStep {
    pub const ALL: [Self; 4] = [Self::Issue, Self::Use, Self::Unuse, Self::Revoke];

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.as_str() == text)
    }

    /// Its name in the outbox, behind `coupon.`, and in the ledger.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Issue => "issue",
            Self::Use => "use",
            Self::Unuse => "unuse",
            Self::Revoke => "revoke",
        }
    }

    /// The state that it begins in; `None` where there is none yet.
    pub const fn from(self) -> Option<&'static str> {
        match self {
            Self::Issue => None,
            Self::Use | Self::Revoke => Some("issued"),
            Self::Unuse => Some("used"),
        }
    }

    /// The state that it leads to.
    pub const fn to(self) -> &'static str {
        match self {
            Self::Issue | Self::Unuse => "issued",
            Self::Use => "used",
            Self::Revoke => "revoked",
        }
    }

    /// By how much the number of those that are out moves.
    pub const fn issued(self) -> i64 {
        match self {
            Self::Issue => 1,
            Self::Use | Self::Unuse => 0,
            Self::Revoke => -1,
        }
    }

    /// By how much the number of those that were redeemed moves.
    pub const fn used(self) -> i64 {
        match self {
            Self::Use => 1,
            Self::Unuse => -1,
            Self::Issue | Self::Revoke => 0,
        }
    }

    /// The word that its reply begins with.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Issue | Self::Unuse => "ISSUED",
            Self::Use => "USED",
            Self::Revoke => "REVOKED",
        }
    }

    /// Whether its reply says how many are left.
    pub const fn says_remaining(self) -> bool {
        matches!(self, Self::Issue | Self::Revoke)
    }
}

/// One coupon of a user, and what happened to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stepped {
    pub step: CouponStep,
    pub user: String,
    pub serial: i64,
    /// What it was redeemed for.
    pub order: Option<String>,
    /// The fencing token under which it was issued, where the coupon's lock was held for it.
    pub token: Option<i64>,
    /// How many can still be issued afterwards.
    pub remaining: i64,
}

/// What an accepted operation did to a coupon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CouponChange {
    Create(CouponTerms),
    Alter {
        terms: NewTerms,
        /// How many can still be issued afterwards.
        remaining: i64,
        /// By how much the total moved; `None` where that is not known.
        by: Option<i64>,
    },
    /// Nothing is issued any more, and its id stays taken.
    Delete,
    Step(Stepped),
    /// The reconciler moved one side to what the other says.
    Mend {
        /// The side that moved.
        moved: Side,
        by: Counts,
        /// How many can still be issued afterwards.
        remaining: i64,
    },
}

impl CouponChange {
    /// Its name in the outbox, behind `coupon.`, and in the ledger.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Alter { .. } => "alter",
            Self::Delete => "delete",
            Self::Step(stepped) => stepped.step.as_str(),
            Self::Mend { moved: Side::Redis, .. } => "correct",
            Self::Mend { moved: Side::Postgres, .. } => "adopt",
        }
    }

    /// Whether Postgres moves as Redis does: what a client asked for. Everything else brings the two together.
    pub const fn moves_both(&self) -> bool {
        !matches!(self, Self::Mend { .. })
    }

    /// The serial that it is about.
    pub fn serial(&self) -> Option<i64> {
        if let Self::Step(stepped) = self { Some(stepped.serial) } else { None }
    }

    /// What its row in the ledger says of serials: which it is about, or by how much the highest moves in Postgres.
    pub fn told_serial(&self) -> Option<i64> {
        match self {
            Self::Mend { moved: Side::Postgres, by, .. } => Some(by.serial),
            _ => self.serial(),
        }
    }

    /// How many can still be issued afterwards.
    pub const fn remaining(&self) -> i64 {
        match self {
            Self::Create(terms) => terms.total,
            Self::Alter { remaining, .. } | Self::Mend { remaining, .. } => *remaining,
            Self::Delete => 0,
            Self::Step(stepped) => stepped.remaining,
        }
    }

    /// By how much it moves the total, what is issued and what is used in Postgres.
    pub fn moves(&self) -> [i64; 3] {
        match self {
            Self::Create(terms) => [terms.total, 0, 0],
            Self::Alter { by, .. } => [by.unwrap_or(0), 0, 0],
            Self::Delete | Self::Mend { moved: Side::Redis, .. } => [0; 3],
            Self::Mend { moved: Side::Postgres, by, .. } => [by.total, by.issued, by.used],
            Self::Step(stepped) => [0, stepped.step.issued(), stepped.step.used()],
        }
    }

    /// Reads what stands in the outbox behind `coupon.<kind>`.
    pub(super) fn decode(kind: &str, named: &Named<'_>) -> Option<Self> {
        Some(match kind {
            "create" => Self::Create(CouponTerms {
                total: named.number("total")?,
                per_user: named.number("peruser")?,
                start_ms: named.number("start"),
                end_ms: named.number("end"),
            }),
            "alter" => Self::Alter {
                terms: NewTerms { total: named.number("total"), start_ms: named.number("start"), end_ms: named.number("end") },
                remaining: named.number("remaining")?,
                by: named.number("by"),
            },
            "delete" => Self::Delete,
            "correct" | "adopt" => Self::Mend {
                moved: if kind == "correct" { Side::Redis } else { Side::Postgres },
                by: Counts {
                    total: named.number("total")?,
                    issued: named.number("issued")?,
                    used: named.number("used")?,
                    serial: named.number("serial")?,
                },
                remaining: named.number("remaining")?,
            },
            _ => Self::Step(Stepped {
                step: CouponStep::parse(kind)?,
                user: named.text("user")?,
                serial: named.number("serial")?,
                order: named.text("order"),
                token: named.number("token"),
                remaining: named.number("remaining")?,
            }),
        })
    }
}

impl std::fmt::Display for CouponChange {
    /// Writes what [`CouponChange::decode`] reads, each name behind a blank.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Create(terms) => {
                write!(f, " total={} peruser={}", terms.total, terms.per_user)?;
                terms.start_ms.map_or(Ok(()), |start| write!(f, " start={start}"))?;
                terms.end_ms.map_or(Ok(()), |end| write!(f, " end={end}"))
            }
            Self::Alter { terms, remaining, by } => {
                terms.named().try_for_each(|(name, value)| write!(f, " {name}={value}"))?;
                write!(f, " remaining={remaining}")?;
                by.map_or(Ok(()), |by| write!(f, " by={by}"))
            }
            Self::Delete => Ok(()),
            Self::Mend { by, remaining, .. } => {
                by.named().into_iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))?;
                write!(f, " remaining={remaining}")
            }
            Self::Step(Stepped { user, serial, order, token, remaining, .. }) => {
                write!(f, " user={user}")?;
                order.as_ref().map_or(Ok(()), |order| write!(f, " order={order}"))?;
                token.map_or(Ok(()), |token| write!(f, " token={token}"))?;
                write!(f, " serial={serial} remaining={remaining}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::change::{Effect, Operation};

    #[test]
    fn every_line_is_written_as_it_was_read() {
        for line in [
            "6 coupon.create coupon=c total=10 peruser=1 end=7 |",
            "7 coupon.issue request=r digest=d coupon=c user=u=7 serial=12 remaining=988 |",
            "0 coupon.use coupon=c user=u order=o=1 serial=3 remaining=7 |",
            "0 coupon.issue coupon=c user=u token=4294967297 serial=4 remaining=6 |",
            "1 coupon.use coupon=c user=- serial=3 remaining=7 |",
            "2 coupon.unuse coupon=| user=u serial=3 remaining=7 |",
            "3 coupon.revoke coupon=c user=u serial=3 remaining=8 |",
            "4 coupon.alter coupon=c total=20 start=5 end=0 remaining=11 by=10 |",
            "5 coupon.alter coupon=c end=9 remaining=1 |",
            "6 coupon.delete request=r digest=d coupon=c |",
            "7 coupon.correct coupon=c total=0 issued=-1 used=0 serial=2 remaining=9 |",
            "8 coupon.adopt coupon=c total=5 issued=0 used=0 serial=0 remaining=14 |",
        ] {
            assert_eq!(Operation::decode(line).unwrap().to_string(), line);
        }
    }

    #[test]
    fn what_is_incomplete_is_refused() {
        for line in ["0 coupon.use coupon=c user=u serial=1 |", "0 coupon.lend coupon=c user=u serial=1 remaining=1 |", "0 coupon.delete |"]
        {
            assert!(Operation::decode(line).is_err(), "{line}");
        }
    }

    #[test]
    fn steps_lead_from_one_state_to_the_next() {
        for step in CouponStep::ALL {
            let line = format!("0 coupon.{} coupon=c user=u serial=1 remaining=1 |", step.as_str());
            let Effect::Coupon { change, .. } = Operation::decode(&line).unwrap().effect else { panic!() };
            assert_eq!((change.kind(), change.serial()), (step.as_str(), Some(1)));
            assert_eq!(step.from().is_none(), step == CouponStep::Issue);
        }
        assert_eq!(CouponStep::Unuse.to(), CouponStep::Use.from().unwrap());
    }
}
