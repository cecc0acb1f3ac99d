//! The same for coupons: how many there are, are out, were redeemed, and how many users have any.
//!
//! A number that differs moves by the difference. Who has a coupon is in the ledger, coupon by coupon, and no number of Redis can tell it anew:
//! where users differ, or too much does, the coupon is frozen, and sells again once both sides agree.

use std::time::Instant;

use tracing::{info, warn};
use uuid::Uuid;

use super::Settings;
use super::examine::{Examiner, Scope, Skipped, tell};
use crate::domain::coupon::Counts;
use crate::domain::{Drift, Id, InboxMark, Measure, Remedy, Side};
use crate::ledger;
use crate::ledger::coupon::Expected;
use crate::ledger::stock::At;
use crate::limits;
use crate::sabotage::breaks;
use crate::store::coupon::{Action, CouponOp, CouponOutcome, Part, Upkeep};
use crate::store::partition::{LoadRequest, Wanted};
use crate::store::snapshot::Taken;
use crate::store::snapshot::coupons::{self, Held, Seen};

/// One coupon that differs, or that is frozen and does not.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    what: What,
    expected: Expected,
    /// Why it is frozen already.
    frozen: Option<String>,
}

/// How it differs.
#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    /// Redis has these numbers, which are others than expected, and so many users who have any.
    Counts(Counts, i64),
    /// So many users have any, which cannot be.
    Users(i64),
    /// Redis does not have it.
    Absent,
    /// Only Redis has it, with these numbers.
    Stray(Counts),
    /// Redis has something else there; says what. The script refuses it by itself.
    Corrupt(String),
    /// It does not differ any more.
    Agrees,
}

/// Compares what Redis had with what it should have had; `None` where there is nothing to be done.
fn judge(seen: Seen, expected: Expected) -> Option<Finding> {
    if breaks("blind-coupons") {
        return None;
    }
    let (what, frozen) = match (seen, expected.counts) {
        (Seen::Absent, Some(_)) if !expected.unsettled => (What::Absent, None),
        (Seen::Absent, _) => return None,
        (Seen::Corrupt(text), _) => (What::Corrupt(text), None),
        // Of a deleted one only its id is of use.
        (Seen::There(Held { is_deleted: true, .. }), _) => return None,
        (Seen::There(Held { counts, frozen, .. }), None) if !expected.unsettled => (What::Stray(counts), frozen),
        (Seen::There(_), None) => return None,
        (Seen::There(held), Some(_)) if expected.unsettled && held.frozen.is_none() => return None,
        (Seen::There(Held { counts, users, frozen, .. }), Some(right)) => {
            let what = match frozen {
                _ if counts != right => What::Counts(counts, users),
                _ if !may_have(users, right.issued, expected.per_user) => What::Users(users),
                Some(_) => What::Agrees,
                None => return None,
            };
            (what, frozen)
        }
    };
    Some(Finding { what, expected, frozen })
}

/// Whether so many users may have what is out: each at least one, and no more than is permitted.
fn may_have(users: i64, issued: i64, per_user: i64) -> bool {
    users <= issued && issued <= users.saturating_mul(per_user)
}

impl Finding {
    fn right(&self) -> Counts {
        self.expected.counts.unwrap_or_default()
    }

    /// By how much Redis has more than it should.
    fn difference(&self) -> Counts {
        match self.what {
            What::Counts(counts, _) | What::Stray(counts) => counts.with(self.right(), i64::saturating_sub),
            _ => Counts::default(),
        }
    }

    /// Whether the second comparison shows the same as the first.
    fn is_again(&self, first: &Self) -> bool {
        let alike = match (&self.what, &first.what) {
            (What::Counts(..), What::Counts(..)) => self.difference() == first.difference(),
            (What::Users(users), What::Users(before)) => {
                self.right().issued.saturating_sub(*users) == first.right().issued.saturating_sub(*before) || self.expected.per_user > 1
            }
            (here, before) => std::mem::discriminant(here) == std::mem::discriminant(before),
        };
        alike && self.expected.coupon == first.expected.coupon
    }

    /// As it is written down: one for each number that differs.
    fn reported(&self, remedy: Remedy) -> Vec<Drift> {
        let Expected { coupon, counts, in_flight, .. } = &self.expected;
        let drift = |measure, redis, postgres, in_flight| Drift { product: coupon.clone(), measure, redis, postgres, in_flight, remedy };
        let right = self.right();
        match self.what {
            What::Counts(seen, _) => {
                let all = [
                    (Measure::Total, seen.total, right.total, in_flight.total),
                    (Measure::Issued, seen.issued, right.issued, in_flight.issued),
                    (Measure::Used, seen.used, right.used, in_flight.used),
                    (Measure::Serial, seen.serial, right.serial, in_flight.serial),
                ];
                let differing = all.into_iter().filter(|(_, seen, right, _)| seen != right);
                differing.map(|(measure, seen, right, in_flight)| drift(measure, Some(seen), Some(right), in_flight)).collect()
            }
            What::Users(users) => vec![drift(Measure::Users, Some(users), Some(right.issued), 0)],
            What::Absent | What::Corrupt(_) => vec![drift(Measure::Total, None, counts.map(|counts| counts.total), in_flight.total)],
            What::Stray(seen) => vec![drift(Measure::Total, Some(seen.total), None, 0)],
            What::Agrees => Vec::new(),
        }
    }

    /// What was found, in words that a client is told when it asks for the frozen coupon.
    fn reason(&self) -> String {
        let numbers = |counts: Counts| {
            let Counts { total, issued, used, serial } = counts;
            format!("{issued} of {total} issued, {used} used, last serial {serial}")
        };
        let right = self.right();
        match &self.what {
            What::Counts(seen, _) => {
                format!("this coupon waits for a person: Redis has {}, and by Postgres it is {}", numbers(*seen), numbers(right))
            }
            What::Users(users) => format!(
                "this coupon waits for a person: in Redis {users} users have the {} that are issued, of which each may have {}",
                right.issued, self.expected.per_user
            ),
            What::Stray(_) => "this coupon waits for a person: Postgres does not know it".into(),
            What::Absent | What::Corrupt(_) | What::Agrees => "this coupon waits for a person".into(),
        }
    }

    /// The change that mends it, compared at `n` in this `round`, and what that does. `None` where there is nothing to do but to report it.
    fn repair(&self, n: u64, round: &str, settings: &Settings) -> Option<(Upkeep, Remedy)> {
        match (&self.what, &self.frozen) {
            (What::Agrees, _) => return Some((Upkeep::Thaw, Remedy::None)),
            (What::Absent | What::Corrupt(_), _) | (_, Some(_)) => return None,
            _ => {}
        }
        let (difference, right) = (self.difference(), self.right());
        let stored = right.with(self.expected.in_flight, i64::saturating_sub);
        let is_small = difference.named().iter().all(|(_, by)| by.unsigned_abs() <= settings.auto_limit.unsigned_abs());
        let (moved, by, after) = match settings.prefer {
            Side::Postgres => (Side::Redis, Counts::default().with(difference, i64::saturating_sub), right),
            Side::Redis => (Side::Postgres, difference, stored.with(difference, i64::saturating_add)),
        };
        let users_fit = match self.what {
            What::Counts(seen, users) => {
                let issued = if moved == Side::Redis { right.issued } else { seen.issued };
                may_have(users, issued, self.expected.per_user)
            }
            _ => false,
        };
        // A serial that was given out is not given out again, so none goes back.
        if users_fit && is_small && by.serial >= 0 && after.are_possible() {
            return Some((Upkeep::Mend { moved, by, n, round: round.to_owned() }, Remedy::Corrected));
        }
        Some(self.freeze())
    }

    fn freeze(&self) -> (Upkeep, Remedy) {
        (Upkeep::Freeze { reason: self.reason() }, Remedy::Frozen)
    }
}

impl Examiner {
    /// Compares the coupons, at most [`limits::RECONCILE_COUPONS`], and repairs what differs. Ends comparing by `deadline`. Returns what
    /// differed and what was done about it.
    pub(super) async fn examine_coupons(&mut self, coupons: &[String], scope: Scope, deadline: Instant) -> Result<Vec<Drift>, Skipped> {
        let mut done = Vec::new();
        let (_, mut suspects) = self.compare_coupons(coupons, scope, deadline).await?;
        for _ in 0..limits::RECONCILE_TRIES {
            if suspects.is_empty() {
                break;
            }
            let coupons: Vec<String> = suspects.iter().map(|finding| finding.expected.coupon.clone()).collect();
            let (at, found) = match self.compare_coupons(&coupons, scope, deadline).await {
                Ok(compared) => compared,
                Err(skipped) if done.is_empty() => return Err(skipped),
                Err(_) => break,
            };
            let (real, other) = found.into_iter().partition(|finding| suspects.iter().any(|first| finding.is_again(first)));
            suspects = other;
            let real: Vec<Finding> = real;
            let round = Uuid::new_v4().simple().to_string();
            let mut drifts = Vec::new();
            for finding in real {
                match self.repair_coupon(&finding, at, &round).await {
                    Some(reported) => drifts.extend(reported),
                    None => suspects.push(finding),
                }
            }
            self.record(at, &drifts).await;
            done.append(&mut drifts);
        }
        Ok(done)
    }

    /// Returns what is to be reported; `None` where it has to be compared once more.
    async fn repair_coupon(&mut self, finding: &Finding, at: At, round: &str) -> Option<Vec<Drift>> {
        let id = Id::from(finding.expected.coupon.as_str());
        if finding.what == What::Absent {
            return Some(self.initialise_coupon(finding, id, at).await);
        }
        let Some((mut upkeep, mut remedy)) = finding.repair(at.n, round, &self.settings) else {
            return Some(finding.reported(Remedy::None));
        };
        if let Upkeep::Mend { moved: Side::Postgres, by, .. } = &upkeep
            && (by.issued, by.used) != (0, 0)
        {
            match self.missing_in_counts(&id).await {
                Ok(missing) if missing == (by.issued, by.used) => {}
                Ok(_) => (upkeep, remedy) = finding.freeze(),
                Err(Skipped(error)) => {
                    warn!(coupon = %id, error, "a difference could not be corrected, trying again later");
                    self.disconnect();
                    return Some(finding.reported(Remedy::None));
                }
            }
        }
        let is_over = upkeep == Upkeep::Thaw;
        match self.partition.change_coupon(CouponOp::new(id.clone(), Action::Upkeep(upkeep), None)).await {
            Ok(CouponOutcome::Done { position, .. }) => {
                let reported = finding.reported(remedy);
                reported.iter().for_each(|drift| tell(drift, at, &position));
                Some(reported)
            }
            Ok(CouponOutcome::Loaded) if is_over => {
                info!(coupon = %id, "redis and postgres agree again, and the coupon is no longer frozen");
                Some(Vec::new())
            }
            Ok(CouponOutcome::Loaded) => {
                let reported = finding.reported(remedy);
                reported.iter().for_each(|drift| tell(drift, at, &at.n));
                Some(reported)
            }
            Ok(CouponOutcome::Moved) => None,
            // Somebody else has deleted or frozen it meanwhile, or whatever became of it shows in the next comparison.
            other => {
                warn!(coupon = %id, outcome = ?other, "a difference could not be corrected, trying again later");
                Some(finding.reported(Remedy::None))
            }
        }
    }

    /// By how many more are issued and used than the coupon's own numbers in Postgres say.
    async fn missing_in_counts(&mut self, coupon: &Id) -> Result<(i64, i64), Skipped> {
        let counting = async { Ok(ledger::coupon::missing_in_counts(self.postgres().await?, coupon.as_str()).await?) };
        let counted = tokio::time::timeout(limits::RECONCILE_WITHIN, counting).await;
        counted.unwrap_or_else(|_| Err(Skipped("Postgres was too slow".into())))
    }

    /// Gives Redis what Postgres has. Returns what is to be reported.
    async fn initialise_coupon(&self, finding: &Finding, id: Id, at: At) -> Vec<Drift> {
        let not_given = || finding.reported(Remedy::None);
        let (answer, answered) = tokio::sync::oneshot::channel();
        let request = LoadRequest { absent_at: at.n, wanted: Wanted::Coupon(id.clone(), answer) };
        if self.partition.loads.send(request).await.is_err() {
            return not_given();
        }
        let Ok(Ok(Some(found))) = tokio::time::timeout(limits::RECONCILE_WITHIN, answered).await else { return not_given() };
        // Whose users are too many for one script is loaded on its first use: that it is not here is as it should be.
        if found.more {
            return Vec::new();
        }
        match self.partition.change_coupon(CouponOp::new(id, Action::Init(Box::new(found), Part::Whole), None)).await {
            Ok(CouponOutcome::Loaded) => {
                let reported = finding.reported(Remedy::Initialised);
                reported.iter().for_each(|drift| tell(drift, at, &at.n));
                reported
            }
            _ => not_given(),
        }
    }

    async fn compare_coupons(&mut self, coupons: &[String], scope: Scope, deadline: Instant) -> Result<(At, Vec<Finding>), Skipped> {
        let compared = tokio::time::timeout_at(deadline.into(), Box::pin(self.compare_coupons_now(coupons, scope))).await;
        self.in_time(compared)
    }

    async fn compare_coupons_now(&mut self, coupons: &[String], scope: Scope) -> Result<(At, Vec<Finding>), Skipped> {
        let (epoch, redis) = self.live_redis().await?;
        let ids: Vec<Id> = coupons.iter().map(|coupon| Id::from(coupon.as_str())).collect();
        let snapshot = match coupons::take(redis, epoch, &ids).await? {
            Taken::Snapshot(snapshot) => snapshot,
            Taken::Refused(word) => return Err(Skipped::not_as_verified(&word)),
        };
        let at = At { epoch, n: snapshot.n, mark: InboxMark::default() };
        let counts = |seen: &Seen| scope == Scope::All || (*seen == Seen::Absent) == (scope == Scope::Absent);
        let seen: Vec<_> = coupons.iter().cloned().zip(snapshot.coupons).filter(|(_, seen)| counts(seen)).collect();
        if seen.is_empty() {
            return Ok((at, Vec::new()));
        }
        // The sender lives as long as the partition, so this ends only when it is so.
        _ = self.partition.applied.subscribe().wait_for(|applied| applied.n >= at.n).await;
        let names: Vec<String> = seen.iter().map(|(coupon, _)| coupon.clone()).collect();
        let id = self.partition.id;
        let Some(expected) = ledger::coupon::expected(self.postgres().await?, id, &names, epoch, at.n).await? else {
            return Err(Skipped("the epoch has ended".into()));
        };
        metrics::counter!("holdfast_reconcile_coupons_total").increment(names.len() as u64);
        let findings = seen.into_iter().zip(expected).filter_map(|((_, seen), expected)| judge(seen, expected)).collect();
        Ok((at, findings))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const RIGHT: Counts = Counts { total: 20, issued: 7, used: 2, serial: 9 };

    fn expected(per_user: i64) -> Expected {
        Expected { coupon: "c".into(), counts: Some(RIGHT), in_flight: Counts::default(), per_user, unsettled: false }
    }

    fn seen(counts: Counts, users: i64) -> Seen {
        Seen::There(Held { counts, users, is_deleted: false, frozen: None })
    }

    fn repaired(seen: Seen, prefer: Side) -> Option<(Upkeep, Remedy)> {
        let every = Duration::from_secs(60);
        let settings = Settings { sync_every: every, initialise_every: every, prefer, auto_limit: 10 };
        judge(seen, expected(1)).unwrap().repair(5, "r", &settings)
    }

    fn mended(moved: Side, by: Counts) -> Option<(Upkeep, Remedy)> {
        Some((Upkeep::Mend { moved, by, n: 5, round: "r".into() }, Remedy::Corrected))
    }

    #[test]
    fn what_is_as_it_should_be_or_not_known_is_no_difference() {
        assert_eq!(judge(seen(RIGHT, 7), expected(1)), None);
        assert_eq!(judge(seen(RIGHT, 4), expected(2)), None);
        let other = Counts { issued: 8, ..RIGHT };
        assert_eq!(judge(seen(other, 8), Expected { unsettled: true, ..expected(1) }), None);
        assert_eq!(judge(Seen::Absent, Expected { counts: None, ..expected(1) }), None);
        assert_eq!(judge(seen(other, 8), Expected { counts: None, unsettled: true, ..expected(1) }), None);
    }

    #[test]
    fn the_side_that_is_not_preferred_moves_by_the_difference() {
        let lost = Counts { issued: 5, serial: 8, ..RIGHT };
        let by = Counts { total: 0, issued: 2, used: 0, serial: 1 };
        assert_eq!(repaired(seen(lost, 7), Side::Postgres), mended(Side::Redis, by));
        let more = Counts { total: 25, used: 1, ..RIGHT };
        let by = Counts { total: 5, used: -1, ..Counts::default() };
        assert_eq!(repaired(seen(more, 7), Side::Redis), mended(Side::Postgres, by));
    }

    #[test]
    fn what_no_difference_mends_is_frozen_until_it_agrees() {
        let freezes = |seen: Seen, prefer| matches!(repaired(seen, prefer), Some((Upkeep::Freeze { .. }, Remedy::Frozen)));
        assert!(freezes(seen(Counts { total: 31, ..RIGHT }, 7), Side::Postgres), "more than the limit");
        assert!(freezes(seen(Counts { serial: 10, ..RIGHT }, 7), Side::Postgres), "a serial would go back");
        assert!(freezes(seen(Counts { serial: 8, ..RIGHT }, 7), Side::Redis), "a serial would go back");
        assert!(freezes(seen(Counts { used: 8, ..RIGHT }, 7), Side::Redis), "more used than issued");
        let lost = Counts { issued: 5, ..RIGHT };
        assert!(freezes(seen(lost, 5), Side::Postgres) && freezes(seen(lost, 7), Side::Redis), "users who do not fit afterwards either");
        assert!(freezes(seen(RIGHT, 6), Side::Postgres) && freezes(seen(RIGHT, 8), Side::Redis), "users");
        let frozen = |counts, users| Seen::There(Held { counts, users, is_deleted: false, frozen: Some("why".into()) });
        assert_eq!(repaired(frozen(RIGHT, 6), Side::Postgres), None, "only reported");
        assert_eq!(repaired(frozen(RIGHT, 7), Side::Postgres), Some((Upkeep::Thaw, Remedy::None)));
        assert_eq!(repaired(Seen::Corrupt("a string".into()), Side::Postgres), None);
    }
}
