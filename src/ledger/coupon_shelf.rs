//! What Postgres has of the coupons that are being saved, as far as it has been worked through: see [`salvage`](super::salvage).

use std::collections::{BTreeSet, HashMap, HashSet};

use sqlx::PgConnection;

use super::salvage::Answered;
use super::{Error, coupon};
use crate::domain::Position;
use crate::domain::change::Effect;
use crate::domain::coupon::{CouponChange, CouponStep, Stepped};

/// See the module.
pub(super) struct CouponShelf {
    coupons: HashMap<String, Terms>,
    /// By coupon and serial: the user, and the state; `parked` where Postgres refused the issue.
    issues: HashMap<(String, i64), (String, &'static str)>,
    /// How many of a coupon a user has.
    held: HashMap<(String, String), i64>,
    /// Where redemptions are taken back of what has been redeemed since.
    overtaken: HashSet<Position>,
}

#[derive(Clone, Copy)]
struct Terms {
    total: i64,
    issued: i64,
    per_user: i64,
    deleted: bool,
}

impl CouponShelf {
    /// Reads what these are about, and locks the coupons.
    pub async fn load(connection: &mut PgConnection, partition: u32, answered: &[&Answered]) -> Result<Self, Error> {
        let coupons: BTreeSet<&str> = answered.iter().filter_map(|one| one.operation.coupon()).collect();
        let coupons: Vec<&str> = coupons.into_iter().collect();
        let terms: Vec<(String, i64, i64, i64, bool)> = sqlx::query_as(
            "SELECT coupon_id, total, issued, per_user, state = 'deleted' FROM holdfast.coupon WHERE coupon_id = ANY($1) ORDER BY coupon_id FOR UPDATE",
        )
        .bind(&coupons)
        .fetch_all(&mut *connection)
        .await?;
        let serials: Vec<i64> = answered.iter().filter_map(|one| one.operation.serial()).collect();
        let issues: Vec<(String, i64, String, String)> = sqlx::query_as(
            "SELECT coupon_id, serial, user_id, state FROM holdfast.coupon_issue WHERE coupon_id = ANY($1) AND serial = ANY($2) \
             UNION ALL SELECT l.coupon_id, l.serial, coalesce(l.user_id, ''), 'parked' \
             FROM holdfast.coupon_ledger l WHERE l.coupon_id = ANY($1) AND l.serial = ANY($2) AND l.kind = 'issue' \
             AND NOT EXISTS (SELECT 1 FROM holdfast.coupon_issue i WHERE i.coupon_id = l.coupon_id AND i.serial = l.serial)",
        )
        .bind(&coupons)
        .bind(serials)
        .fetch_all(&mut *connection)
        .await?;
        let users: BTreeSet<&str> = answered.iter().filter_map(|one| issued_to(one)).collect();
        let held: Vec<(String, String, i64)> = sqlx::query_as(
            "SELECT coupon_id, user_id, count(*) FROM holdfast.coupon_issue \
             WHERE coupon_id = ANY($1) AND user_id = ANY($2) AND state <> 'revoked' GROUP BY coupon_id, user_id",
        )
        .bind(&coupons)
        .bind(users.into_iter().collect::<Vec<_>>())
        .fetch_all(&mut *connection)
        .await?;
        let taken_back: Vec<(&str, i64, Position)> = answered.iter().filter_map(|one| taken_back(one)).collect();
        let overtaken = coupon::redeemed_since(connection, partition, &taken_back).await?;
        let state = |state: &str| ["issued", "used", "parked"].into_iter().find(|known| *known == state).unwrap_or("revoked");
        Ok(Self {
            overtaken,
            coupons: terms
                .into_iter()
                .map(|(coupon, total, issued, per_user, deleted)| (coupon, Terms { total, issued, per_user, deleted }))
                .collect(),
            held: held.into_iter().map(|(coupon, user, count)| ((coupon, user), count)).collect(),
            issues: issues.into_iter().map(|(coupon, serial, user, held)| ((coupon, serial), (user, state(&held)))).collect(),
        })
    }

    /// Makes a change here that was answered at `origin`. Returns by how much the total moves; errors with why Postgres cannot make it.
    pub fn take(&mut self, coupon: &str, change: &CouponChange, origin: Position) -> Result<i64, String> {
        if let CouponChange::Create(terms) = change {
            if self.coupons.contains_key(coupon) {
                return Err(format!("coupon '{coupon}' exists already"));
            }
            self.coupons.insert(coupon.to_owned(), Terms { total: terms.total, issued: 0, per_user: terms.per_user, deleted: false });
            return Ok(terms.total);
        }
        let Some(found) = self.coupons.get_mut(coupon).filter(|found| !found.deleted) else {
            return Err(format!("there is no coupon '{coupon}'"));
        };
        match change {
            // What brings the two sides together is done anew.
            CouponChange::Create(_) | CouponChange::Mend { .. } => {}
            CouponChange::Delete => found.deleted = true,
            CouponChange::Alter { terms, .. } => {
                let total = terms.total.unwrap_or(found.total);
                if total < found.issued {
                    return Err(format!("{} of coupon '{coupon}' are issued already", found.issued));
                }
                let by = total - found.total;
                found.total = total;
                return Ok(by);
            }
            CouponChange::Step(Stepped { step, user, serial, .. }) => {
                if *step == CouponStep::Unuse && self.overtaken.contains(&origin) {
                    return Err(format!("serial {serial} of coupon '{coupon}' has been redeemed since"));
                }
                let issue = self.issues.get(&(coupon.to_owned(), *serial));
                let held = self.held.entry((coupon.to_owned(), user.clone())).or_default();
                match (step.from(), issue) {
                    (None, Some(_)) => return Err(format!("serial {serial} of coupon '{coupon}' was issued to somebody else")),
                    (None, None) if found.issued >= found.total => return Err(format!("coupon '{coupon}' is sold out")),
                    (None, None) if *held >= found.per_user => {
                        return Err(format!("'{user}' has as many of coupon '{coupon}' as a user may have"));
                    }
                    (None, None) => {}
                    (Some(from), Some((holder, state))) if holder == user && *state == from => {}
                    (Some(_), Some((holder, state))) => {
                        return Err(format!("serial {serial} of coupon '{coupon}' is '{holder}'s, and {state}"));
                    }
                    (Some(_), None) => return Err(format!("serial {serial} of coupon '{coupon}' was not issued")),
                }
                found.issued += step.issued();
                *held += step.issued();
                self.issues.insert((coupon.to_owned(), *serial), (user.clone(), step.to()));
            }
        }
        Ok(0)
    }
}

/// Whom a coupon is issued to.
fn issued_to(answered: &Answered) -> Option<&str> {
    match &answered.operation.effect {
        Effect::Coupon { change: CouponChange::Step(Stepped { step: CouponStep::Issue | CouponStep::Revoke, user, .. }), .. } => Some(user),
        _ => None,
    }
}

/// Of what takes a redemption back: the coupon, the serial, and where.
fn taken_back(answered: &Answered) -> Option<(&str, i64, Position)> {
    match &answered.operation.effect {
        Effect::Coupon { coupon, change: CouponChange::Step(Stepped { step: CouponStep::Unuse, serial, .. }) } => {
            Some((coupon, *serial, answered.origin))
        }
        _ => None,
    }
}
