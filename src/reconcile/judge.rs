//! What a difference is, and what to do about it. Pure.

use super::Settings;
use crate::domain::{Drift, Id, Measure, Remedy, Side};
use crate::ledger::stock::{At, Expected};
use crate::store::partition::Found;
use crate::store::snapshot::{Seen, Units};
use crate::store::stock::{StockOp, Upkeep};

/// One product that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub what: What,
    pub expected: Expected,
    /// Why it waits for a person already.
    pub frozen: Option<String>,
}

/// How it differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Redis has so many units, which is another number than expected.
    Units(i64),
    /// Redis has as many units as expected, and says that orders hold so many, which is another number than expected.
    Held(i64),
    /// Redis does not have the product.
    Absent,
    /// Only Redis has the product, with so many units.
    Stray(i64),
    /// Redis has something that is no number of units; says what.
    Corrupt(String),
}

/// Compares what Redis had with what it should have had; `None` where that is the same, or where it is not known whether the product
/// existed there.
pub(super) fn judge(seen: Seen, expected: Expected) -> Option<Finding> {
    let what = match (seen.units, expected.units) {
        (Units::Available(units), Some(right)) if units != right => What::Units(units),
        (Units::Absent, Some(_)) if !expected.unsettled => What::Absent,
        (Units::Available(units), None) if !expected.unsettled => What::Stray(units),
        (Units::Corrupt(text), _) => What::Corrupt(text),
        (Units::Available(_), Some(_)) if seen.held != Some(expected.held) => What::Held(seen.held.unwrap_or(0)),
        _ => return None,
    };
    Some(Finding { what, expected, frozen: seen.frozen })
}

impl Finding {
    /// By how many units Redis has more than it should.
    fn drift(&self) -> i64 {
        self.reported(Remedy::None).units()
    }

    /// Whether the second comparison shows the same as the first: then it was no accident of the moment.
    pub fn is_again(&self, first: &Self) -> bool {
        let alike = match (&self.what, &first.what) {
            (What::Units(_), What::Units(_)) | (What::Held(_), What::Held(_)) => self.drift() == first.drift(),
            (What::Absent, What::Absent) | (What::Stray(_), What::Stray(_)) | (What::Corrupt(_), What::Corrupt(_)) => true,
            _ => false,
        };
        alike && self.expected.product == first.expected.product
    }

    /// As it is written down and answered.
    pub fn reported(&self, remedy: Remedy) -> Drift {
        let redis = match self.what {
            What::Units(units) | What::Stray(units) | What::Held(units) => Some(units),
            What::Absent | What::Corrupt(_) => None,
        };
        let Expected { product, units, in_flight, held, .. } = self.expected.clone();
        if matches!(self.what, What::Held(_)) {
            return Drift { product, measure: Measure::Held, redis, postgres: Some(held), in_flight: 0, remedy };
        }
        Drift { product, measure: Measure::Available, redis, postgres: units, in_flight, remedy }
    }

    /// What was found, in words that a client is told when it asks for the frozen product.
    fn reason(&self, auto_limit: i64) -> String {
        let right = self.expected.units.unwrap_or(0);
        match &self.what {
            What::Units(units) if right < 0 => format!("Redis has {units} units, and Postgres says that {} too many are gone", -right),
            What::Units(units) => {
                format!("Redis has {units} units and Postgres says {right}: that is more than reconcile.auto_limit {auto_limit} apart")
            }
            What::Stray(units) => format!("Redis has {units} units, and Postgres does not know the product"),
            What::Corrupt(text) => format!("Redis holds {text}, which is no number of units; Postgres says {right}"),
            What::Held(held) => format!("in Redis orders hold {held} units, and in Postgres {}", self.expected.held),
            What::Absent => "Redis does not have it".into(),
        }
    }

    /// The change that mends it, compared at `at` in this `round`, and what that does. `None` where there is nothing to do but to
    /// report it.
    pub fn repair(&self, at: At, round: &str, settings: &Settings) -> Option<(StockOp, Remedy)> {
        let product = Id::from(self.expected.product.as_str());
        let right = self.expected.units.unwrap_or(0);
        if self.what == What::Absent {
            let Expected { low, frozen, .. } = self.expected.clone();
            let found = Found { available: right.max(0), mark: at.mark, n: at.n, low, frozen };
            return Some((StockOp::init(product, found), Remedy::Initialised));
        }
        if self.frozen.is_some() {
            return None;
        }
        let drift = self.drift();
        if matches!(self.what, What::Held(_)) {
            // Nothing is sold by it: whatever Redis says, the orders in Postgres are what they are.
            let upkeep = Upkeep::Hold { n: at.n, round: round.to_owned(), units: -drift };
            return Some((StockOp::upkeep(product, 0, upkeep), Remedy::Corrected));
        }
        let small = matches!(self.what, What::Units(_)) && drift.unsigned_abs() <= settings.auto_limit.unsigned_abs();
        let stored = right.saturating_sub(self.expected.in_flight);
        let round = round.to_owned();
        Some(match settings.prefer {
            Side::Postgres if small && right >= 0 => {
                let reason = format!("{} by the reconciler, and Redis had fewer units than that", correction(-drift));
                (StockOp::upkeep(product, -drift, Upkeep::Correct { n: at.n, round, reason }), Remedy::Corrected)
            }
            Side::Redis if small && stored.saturating_add(drift) >= 0 => {
                (StockOp::upkeep(product, 0, Upkeep::Adopt { n: at.n, round, pg: drift }), Remedy::Corrected)
            }
            _ => (StockOp::upkeep(product, 0, Upkeep::Freeze { n: at.n, reason: self.reason(settings.auto_limit) }), Remedy::Frozen),
        })
    }
}

fn correction(units: i64) -> String {
    format!("corrected by {units}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::InboxMark;

    fn expected(units: Option<i64>) -> Expected {
        Expected { product: "a".into(), units, in_flight: 0, unsettled: false, low: Some(3), frozen: None, held: 4 }
    }

    fn seen(units: Units) -> Seen {
        Seen { units, frozen: None, held: Some(4) }
    }

    fn found(redis: i64, right: i64) -> Finding {
        judge(seen(Units::Available(redis)), expected(Some(right))).unwrap()
    }

    fn repaired(finding: &Finding, prefer: Side) -> Option<(Upkeep, i64, Remedy)> {
        let every = Duration::from_secs(60);
        let settings = Settings { sync_every: every, initialise_every: every, prefer, auto_limit: 10 };
        let (op, remedy) = finding.repair(At { epoch: 1, n: 5, mark: InboxMark::default() }, "r", &settings)?;
        Some((*op.upkeep.unwrap(), op.items[0].1, remedy))
    }

    fn freezes(finding: &Finding, prefer: Side) -> bool {
        matches!(repaired(finding, prefer), Some((Upkeep::Freeze { n: 5, .. }, 0, Remedy::Frozen)))
    }

    #[test]
    fn what_may_have_been_created_or_deleted_meanwhile_is_no_difference() {
        let unsettled = |units| Expected { unsettled: true, ..expected(units) };
        assert_eq!(judge(seen(Units::Available(7)), expected(Some(7))), None);
        assert_eq!(judge(seen(Units::Absent), expected(None)), None);
        assert_eq!(judge(seen(Units::Absent), unsettled(Some(7))), None);
        assert_eq!(judge(seen(Units::Available(7)), unsettled(None)), None);
        assert!(judge(seen(Units::Available(8)), unsettled(Some(7))).is_some(), "the sums are known all the same");
    }

    #[test]
    fn a_difference_is_real_when_it_shows_again() {
        assert!(found(9, 7).is_again(&found(5, 3)), "sold meanwhile, on both sides");
        assert!(!found(9, 7).is_again(&found(8, 7)));
        let absent = judge(seen(Units::Absent), expected(Some(7))).unwrap();
        assert!(!found(9, 7).is_again(&absent) && absent.is_again(&absent));
    }

    #[test]
    fn the_side_that_is_not_preferred_moves_by_the_difference() {
        assert!(matches!(repaired(&found(9, 7), Side::Postgres), Some((Upkeep::Correct { n: 5, .. }, -2, Remedy::Corrected))));
        assert!(matches!(repaired(&found(9, 7), Side::Redis), Some((Upkeep::Adopt { n: 5, pg: 2, .. }, 0, Remedy::Corrected))));
        assert!(freezes(&found(18, 7), Side::Postgres), "more than the limit");
        assert!(freezes(&found(1, -2), Side::Postgres), "Redis would go below 0");
        let in_flight = Expected { in_flight: 6, ..expected(Some(7)) };
        let owed = judge(seen(Units::Available(5)), in_flight).unwrap();
        assert!(freezes(&owed, Side::Redis), "Postgres has 1 and would go below 0");
    }

    #[test]
    fn what_orders_hold_follows_postgres_whichever_side_is_preferred() {
        let held = |held| judge(Seen { held, ..seen(Units::Available(7)) }, expected(Some(7)));
        assert_eq!(held(Some(4)), None);
        for (redis, by) in [(Some(9), -5), (None, 4), (Some(0), 4)] {
            for prefer in [Side::Postgres, Side::Redis] {
                let hold = Upkeep::Hold { n: 5, round: "r".into(), units: by };
                assert_eq!(repaired(&held(redis).unwrap(), prefer), Some((hold, 0, Remedy::Corrected)));
            }
        }
        assert!(matches!(judge(Seen { held: Some(9), ..seen(Units::Available(8)) }, expected(Some(7))).unwrap().what, What::Units(8)));
    }

    #[test]
    fn what_no_difference_mends_is_frozen_once() {
        for units in [Units::Available(3), Units::Corrupt("a hash".into())] {
            let finding = judge(seen(units), expected(None)).unwrap();
            assert!(freezes(&finding, Side::Postgres) && freezes(&finding, Side::Redis));
            assert_eq!(repaired(&Finding { frozen: Some("why".into()), ..finding }, Side::Postgres), None);
        }
    }

    #[test]
    fn what_redis_lacks_is_given_to_it_even_if_it_is_frozen() {
        let absent = judge(Seen { units: Units::Absent, frozen: Some("why".into()), held: Some(0) }, expected(Some(-4))).unwrap();
        let init = Upkeep::Init { mark: InboxMark::default(), n: 5, low: Some(3), frozen: None };
        assert_eq!(repaired(&absent, Side::Postgres), Some((init, 0, Remedy::Initialised)));
    }
}
