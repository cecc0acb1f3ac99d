//! Walks over all products and coupons: those that Postgres has, in the order of their ids, and those that only Redis has.

use std::time::Instant;

use super::examine::{Examiner, Mode, Scope, Skipped};
use crate::domain::{Drift, Position, Remedy};
use crate::ledger;
use crate::limits;
use crate::store::snapshot;
use crate::store::snapshot::coupons;

/// What a walk has come to so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// How many products were compared.
    pub products: usize,
    /// How many coupons.
    pub coupons: usize,
    /// How many differences were repaired.
    pub repaired: usize,
    /// How many wait for a person.
    pub frozen: usize,
    /// What differed, where it is kept.
    pub drifts: Option<Vec<Drift>>,
}

impl Tally {
    fn add(&mut self, mut found: Vec<Drift>) {
        let count = |remedies: &[Remedy]| found.iter().filter(|drift| remedies.contains(&drift.remedy)).count();
        self.repaired += count(&[Remedy::Corrected, Remedy::Initialised]);
        self.frozen += count(&[Remedy::None, Remedy::Frozen]);
        if let Some(drifts) = &mut self.drifts {
            drifts.append(&mut found);
        }
    }

    /// Whether no more fit into one answer.
    fn is_full(&self) -> bool {
        self.drifts.as_ref().is_some_and(|drifts| drifts.len() >= limits::SYNC_DRIFTS_MAX)
    }
}

/// What is walked over.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Product,
    Coupon,
}

/// Where the walks over all products stand.
pub(super) struct Walk {
    pub mode: Mode,
    /// When to stop at the latest.
    pub until: Option<Instant>,
    pub tally: Tally,
}

impl Walk {
    /// Compares these products.
    pub async fn over(&mut self, examiner: &mut Examiner, products: &[String], scope: Scope) -> Result<(), Skipped> {
        for products in products.chunks(limits::RECONCILE_PRODUCTS) {
            let deadline = Instant::now() + limits::RECONCILE_WITHIN;
            let deadline = self.until.map_or(deadline, |until| until.min(deadline));
            let found = examiner.examine(products, scope, self.mode, deadline).await?;
            self.tally.products += products.len();
            self.tally.add(found);
            tokio::time::sleep(limits::RECONCILE_PAUSE).await;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.tally.is_full() || self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// Compares what changed after `since`, and returns up to where that is.
    pub async fn over_changed(&mut self, examiner: &mut Examiner, since: Position) -> Result<Position, Skipped> {
        let partition = examiner.partition.id;
        let applied = *examiner.partition.applied.borrow();
        let changed = within(Box::pin(async {
            Ok(ledger::stock::changed(examiner.postgres().await?, partition, since, limits::RECONCILE_CHANGES_MAX).await?)
        }));
        let changed = changed.await?;
        self.over(examiner, &changed, Scope::Present).await?;
        Ok(applied)
    }

    /// Compares the products of Postgres behind `after`, `count` of them, and moves `after` along: to nothing at the end of all.
    pub async fn over_postgres(&mut self, examiner: &mut Examiner, after: &mut String, count: usize, scope: Scope) -> Result<(), Skipped> {
        let mut left = count;
        while left > 0 && !self.is_over() {
            let limit = left.min(limits::RECONCILE_PRODUCTS);
            let page = within(Box::pin(async { Ok(ledger::stock::page(examiner.postgres().await?, after, limit).await?) })).await?;
            self.over(examiner, &page, scope).await?;
            left -= page.len();
            match page.last() {
                Some(last) if page.len() == limit => after.clone_from(last),
                _ => {
                    after.clear();
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Compares those that Redis has and Postgres does not, from `cursor` on, and moves it along: to `0` at the end of all.
    pub async fn over_strays(&mut self, examiner: &mut Examiner, kind: Kind, cursor: &mut String) -> Result<(), Skipped> {
        for _ in 0..limits::RECONCILE_SCANS {
            if self.is_over() {
                break;
            }
            let scanning = async {
                let (redis, count) = (examiner.redis().await?, limits::RECONCILE_SCAN_COUNT);
                Ok(match kind {
                    Kind::Product => snapshot::scan(redis, cursor, count).await?,
                    Kind::Coupon => coupons::scan(redis, cursor, count).await?,
                })
            };
            let (next, found) = within(Box::pin(scanning)).await?;
            if !found.is_empty() {
                let asking = async {
                    let postgres = examiner.postgres().await?;
                    Ok(match kind {
                        Kind::Product => ledger::stock::unknown(postgres, &found).await?,
                        Kind::Coupon => ledger::coupon::unknown(postgres, &found).await?,
                    })
                };
                let unknown = within(Box::pin(asking)).await?;
                match kind {
                    Kind::Product => self.over(examiner, &unknown, Scope::Present).await?,
                    Kind::Coupon => self.over_coupons(examiner, &unknown, Scope::Present).await?,
                }
            }
            *cursor = next;
            if cursor == "0" {
                break;
            }
        }
        Ok(())
    }
}

/// The same of coupons.
impl Walk {
    async fn over_coupons(&mut self, examiner: &mut Examiner, coupons: &[String], scope: Scope) -> Result<(), Skipped> {
        for coupons in coupons.chunks(limits::RECONCILE_COUPONS) {
            let found = examiner.examine_coupons(coupons, scope, Instant::now() + limits::RECONCILE_WITHIN).await?;
            self.tally.coupons += coupons.len();
            self.tally.add(found);
            tokio::time::sleep(limits::RECONCILE_PAUSE).await;
        }
        Ok(())
    }

    /// Compares what changed after `since`.
    pub async fn over_changed_coupons(&mut self, examiner: &mut Examiner, since: Position) -> Result<(), Skipped> {
        let partition = examiner.partition.id;
        let changed = within(Box::pin(async {
            Ok(ledger::coupon::changed(examiner.postgres().await?, partition, since, limits::RECONCILE_CHANGES_MAX).await?)
        }));
        let changed = changed.await?;
        self.over_coupons(examiner, &changed, Scope::Present).await
    }

    /// Compares the next of all coupons of Postgres, and moves `after` along: to nothing at the end of all.
    pub async fn over_postgres_coupons(&mut self, examiner: &mut Examiner, after: &mut String, scope: Scope) -> Result<(), Skipped> {
        let limit = limits::RECONCILE_ROUND_COUPONS;
        let page = within(Box::pin(async { Ok(ledger::coupon::page(examiner.postgres().await?, after, limit).await?) })).await?;
        self.over_coupons(examiner, &page, scope).await?;
        match page.last() {
            Some(last) if page.len() == limit => after.clone_from(last),
            _ => after.clear(),
        }
        Ok(())
    }
}

/// Gives up on what does not answer.
pub(super) async fn within<T>(asking: impl Future<Output = Result<T, Skipped>>) -> Result<T, Skipped> {
    let answered = tokio::time::timeout(limits::RECONCILE_WITHIN, asking).await;
    answered.unwrap_or_else(|_| Err(Skipped("Redis or Postgres does not answer".into())))
}
