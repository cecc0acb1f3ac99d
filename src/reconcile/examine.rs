//! One comparison of some products at one position, and the repair of what differs.
//!
//! A script reads the products together with n of the newest change, X, and with the mark of the inbox. Once Postgres has everything up
//! to X, one statement works out what Redis had to have at X ([`ledger::stock::expected`]). So nothing has to stand still, and what is on
//! its way is no difference. What shows twice is real.

use std::sync::Arc;
use std::time::Instant;

use tokio::time::error::Elapsed;
use tracing::{debug, warn};
use uuid::Uuid;

use super::Settings;
use super::judge::{Finding, judge};
use super::walk::within;
use crate::domain::{Drift, Id, Remedy};
use crate::ledger::stock::At;
use crate::ledger::{self, PgConnection};
use crate::limits;
use crate::store::partition::State;
use crate::store::snapshot::{self, Taken, Units};
use crate::store::stock::StockOutcome;
use crate::store::{Connection, Partition};

/// Which differences count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Of products that Redis has.
    Present,
    /// Products that Redis does not have.
    Absent,
    All,
}

/// Whether anything may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Repair,
    DryRun,
}

/// Why products could not be compared now; nothing was changed by that comparison. The text is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped(pub String);

impl Skipped {
    /// `word`: what the script that reads found.
    pub(super) fn not_as_verified(word: &str) -> Self {
        Self(format!("Redis is not as it was verified ({word})"))
    }
}

impl From<crate::store::Error> for Skipped {
    fn from(error: crate::store::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<ledger::Error> for Skipped {
    fn from(error: ledger::Error) -> Self {
        Self(error.to_string())
    }
}

/// What compares: it has connections of its own, so that nothing stands before a sale.
pub struct Examiner {
    pub(super) partition: Arc<Partition>,
    redis_url: String,
    postgres_url: String,
    pub(super) settings: Settings,
    redis: Option<Connection>,
    postgres: Option<PgConnection>,
    /// Whether `postgres` has the lock of the one who reconciles on a schedule.
    locked: bool,
}

impl Examiner {
    /// Connects when it is first used.
    pub fn new(partition: Arc<Partition>, redis_url: &str, postgres_url: &str, settings: Settings) -> Self {
        let (redis_url, postgres_url) = (redis_url.to_owned(), postgres_url.to_owned());
        Self { partition, redis_url, postgres_url, settings, redis: None, postgres: None, locked: false }
    }

    /// What is wrong on purpose with `naive-sync`: writes over Redis whatever Postgres has at present.
    #[cfg(feature = "sabotage")]
    async fn overwrite(&mut self, products: &[String]) -> Result<Vec<Drift>, Skipped> {
        let rows = ledger::stock::load(self.postgres().await?, products).await?;
        metrics::counter!("holdfast_reconcile_products_total").increment(rows.len() as u64);
        for row in rows {
            snapshot::overwrite(self.redis().await?, &Id::from(row.product.as_str()), row.available).await?;
        }
        Ok(Vec::new())
    }

    /// Compares the products, at most [`limits::RECONCILE_PRODUCTS`], and repairs what differs. Ends by `deadline`. Returns what differed
    /// and what was done about it; what somebody else mended meanwhile is left out.
    pub async fn examine(&mut self, products: &[String], scope: Scope, mode: Mode, deadline: Instant) -> Result<Vec<Drift>, Skipped> {
        #[cfg(feature = "sabotage")]
        if crate::sabotage::breaks("naive-sync") {
            return self.overwrite(products).await;
        }
        let mut done = Vec::new();
        let (_, mut suspects) = self.compare(products, scope, deadline).await?;
        for _ in 0..limits::RECONCILE_TRIES {
            if suspects.is_empty() {
                break;
            }
            let products: Vec<String> = suspects.iter().map(|finding| finding.expected.product.clone()).collect();
            let (at, found) = match self.compare(&products, scope, deadline).await {
                Ok(compared) => compared,
                Err(skipped) if done.is_empty() => return Err(skipped),
                Err(_) => break,
            };
            let (real, other) = found.into_iter().partition(|finding| suspects.iter().any(|first| finding.is_again(first)));
            suspects = other;
            if mode == Mode::DryRun {
                done.extend(real.iter().map(|finding: &Finding| finding.reported(Remedy::None)));
            } else {
                self.repair(at, real, &mut done, &mut suspects).await;
            }
        }
        Ok(done)
    }

    /// Repairs what was compared at `at`; adds what was done to `done`, and to `suspects` what has to be compared once more.
    async fn repair(&mut self, at: At, real: Vec<Finding>, done: &mut Vec<Drift>, suspects: &mut Vec<Finding>) {
        // One id a comparison: the script refuses it where another comparison has corrected anything since.
        let round = Uuid::new_v4().simple().to_string();
        let (mut drifts, mut waiting) = (Vec::new(), Vec::new());
        for finding in real {
            match finding.repair(at, &round, &self.settings) {
                Some((op, remedy)) => waiting.push((finding, op, remedy)),
                None => drifts.push(finding.reported(Remedy::None)),
            }
        }
        while !waiting.is_empty() {
            let later = waiting.split_off(waiting.len().min(limits::RECONCILE_CHANGES_AT_ONCE));
            let ops = waiting.iter().map(|(_, op, _)| op.clone()).collect();
            let outcomes = self.partition.change_all(ops).await;
            for ((finding, _, remedy), outcome) in waiting.into_iter().zip(outcomes) {
                let product = &finding.expected.product;
                match outcome {
                    Ok(StockOutcome::Done { position, .. }) => {
                        let drift = finding.reported(remedy);
                        tell(&drift, at, &position);
                        drifts.push(drift);
                    }
                    Ok(StockOutcome::Moved | StockOutcome::Corrupt { .. }) => suspects.push(finding),
                    // Somebody else has loaded, deleted or frozen it meanwhile.
                    Ok(StockOutcome::Absent { .. } | StockOutcome::Frozen { .. }) => {}
                    // Whatever became of it shows in the next comparison.
                    other => {
                        warn!(product, outcome = ?other, "a difference could not be corrected, trying again later");
                        done.push(finding.reported(Remedy::None));
                    }
                }
            }
            waiting = later;
        }
        self.record(at, &drifts).await;
        done.append(&mut drifts);
    }

    /// Writes down what was found.
    pub(super) async fn record(&mut self, at: At, drifts: &[Drift]) {
        let recording = within(Box::pin(async {
            let partition = self.partition.id;
            Ok(ledger::drift::record(self.postgres().await?, partition, at, drifts).await?)
        }));
        if let Err(Skipped(error)) = recording.await {
            warn!(error, "cannot write down in holdfast.drift what was found; what was done about it stands above");
            self.disconnect();
        }
    }

    async fn compare(&mut self, products: &[String], scope: Scope, deadline: Instant) -> Result<(At, Vec<Finding>), Skipped> {
        let compared = tokio::time::timeout_at(deadline.into(), Box::pin(self.compare_now(products, scope))).await;
        self.in_time(compared)
    }

    /// What came of a comparison that had its time; where nothing did, new connections are made for the next.
    pub(super) fn in_time<T>(&mut self, compared: Result<Result<T, Skipped>, Elapsed>) -> Result<T, Skipped> {
        let compared = compared.unwrap_or_else(|_| Err(Skipped("Redis or Postgres was too slow, or Postgres too far behind".into())));
        if compared.is_err() {
            // What is under way on them is not known.
            self.disconnect();
        }
        compared
    }

    async fn compare_now(&mut self, products: &[String], scope: Scope) -> Result<(At, Vec<Finding>), Skipped> {
        let (epoch, redis) = self.live_redis().await?;
        let ids: Vec<Id> = products.iter().map(|product| Id::from(product.as_str())).collect();
        let snapshot = match snapshot::take(redis, epoch, &ids).await? {
            Taken::Snapshot(snapshot) => snapshot,
            Taken::Refused(word) => return Err(Skipped::not_as_verified(&word)),
        };
        let at = At { epoch, n: snapshot.n, mark: snapshot.mark };
        let counts = |units: &Units| scope == Scope::All || (*units == Units::Absent) == (scope == Scope::Absent);
        let seen: Vec<_> = products.iter().cloned().zip(snapshot.products).filter(|(_, seen)| counts(&seen.units)).collect();
        if seen.is_empty() {
            return Ok((at, Vec::new()));
        }
        // The sender lives as long as the partition, so this ends only when it is so.
        _ = self.partition.applied.subscribe().wait_for(|applied| applied.n >= at.n).await;
        let names: Vec<String> = seen.iter().map(|(product, _)| product.clone()).collect();
        let id = self.partition.id;
        let Some((_, expected)) = ledger::stock::expected(self.postgres().await?, id, &names, Some(at)).await? else {
            return Err(Skipped("the epoch has ended".into()));
        };
        metrics::counter!("holdfast_reconcile_products_total").increment(names.len() as u64);
        let findings: Vec<_> = seen.into_iter().zip(expected).filter_map(|((_, seen), expected)| judge(seen, expected)).collect();
        debug!(n = at.n, products = names.len(), differ = findings.len(), "compared");
        Ok((at, findings))
    }

    /// The epoch that the partition is live under, and the connection to that Redis.
    pub(super) async fn live_redis(&mut self) -> Result<(u64, &mut Connection), Skipped> {
        let State::Live { epoch, run_id } = self.partition.state.borrow().clone() else {
            return Err(Skipped("the partition is not live".into()));
        };
        let redis = self.redis().await?;
        if redis.run_id() != run_id {
            return Err(Skipped("Redis was restarted and is being compared with Postgres".into()));
        }
        Ok((epoch, redis))
    }

    /// The connection to Redis.
    pub(super) async fn redis(&mut self) -> Result<&mut Connection, Skipped> {
        match &mut self.redis {
            Some(redis) => Ok(redis),
            none => Ok(none.insert(Connection::open(&self.redis_url).await?)),
        }
    }

    /// The connection to Postgres.
    pub(super) async fn postgres(&mut self) -> Result<&mut PgConnection, Skipped> {
        match &mut self.postgres {
            Some(postgres) => Ok(postgres),
            none => Ok(none.insert(ledger::connect(&self.postgres_url).await?)),
        }
    }

    /// Gives both connections up, and the lock with them.
    pub(super) fn disconnect(&mut self) {
        (self.redis, self.postgres, self.locked) = (None, None, false);
    }

    /// Whether this is the one of several sidecars that reconciles on a schedule: it stays so while its connection to Postgres lives.
    pub(super) async fn is_the_one(&mut self) -> Result<bool, Skipped> {
        if !self.locked {
            let partition = self.partition.id;
            self.locked = ledger::drift::try_lock(self.postgres().await?, partition).await?;
        }
        Ok(self.locked)
    }
}

pub(super) fn tell(drift: &Drift, at: At, position: &impl std::fmt::Display) {
    let Drift { product, measure, redis, postgres, in_flight, remedy } = drift;
    let (action, measure) = (remedy.as_str(), measure.as_str());
    metrics::counter!("holdfast_reconcile_drift_total", "action" => action).increment(1);
    if *remedy == Remedy::Initialised {
        return debug!(id = product, measure, ?postgres, n = at.n, %position, "redis did not have something and was given it");
    }
    warn!(product, measure, ?redis, ?postgres, in_flight, drift = drift.units(), n = at.n, %position, action, "redis and postgres differed");
}
