//! Reconciles on a schedule: products that changed, a stretch of all products, and those that only one side has; then the coupons likewise.
//!
//! One of several sidecars does it. Two at once would do no harm, since a correction is refused where another one came between; they
//! would only work twice.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant, SystemTime};

use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::Settings;
use super::examine::{Examiner, Mode, Scope, Skipped};
use super::walk::{Kind, Tally, Walk, within};
use crate::domain::Position;
use crate::limits;

/// See the module.
pub struct Scheduler {
    examiner: Examiner,
    settings: Settings,
    products: Reached,
    coupons: Reached,
    /// Up to where changes have been looked at.
    seen: Position,
}

/// Where the passes over everything go on.
struct Reached {
    /// Over what Postgres has.
    synced_to: String,
    initialised_to: String,
    /// Over Redis's keys.
    scanned_to: String,
}

impl Default for Reached {
    fn default() -> Self {
        Self { synced_to: String::new(), initialised_to: String::new(), scanned_to: "0".to_owned() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// Compares what both have, and looks for what only Redis has.
    Sync,
    /// Gives Redis what only Postgres has.
    Initialise,
}

impl Round {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Initialise => "initialise",
        }
    }
}

impl Scheduler {
    pub fn new(examiner: Examiner, settings: Settings) -> Self {
        Self { examiner, settings, products: Reached::default(), coupons: Reached::default(), seen: Position::default() }
    }

    /// Reconciles until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut skipped = String::new();
        let mut sync_at = Instant::now() + jittered(self.settings.sync_every);
        let mut initialise_at = Instant::now() + jittered(self.settings.initialise_every);
        loop {
            let (round, at, every) = match sync_at <= initialise_at {
                true => (Round::Sync, &mut sync_at, self.settings.sync_every),
                false => (Round::Initialise, &mut initialise_at, self.settings.initialise_every),
            };
            let turn = async {
                tokio::time::sleep_until((*at).into()).await;
                self.turn(round, &mut skipped).await;
            };
            if cancel.run_until_cancelled(turn).await.is_none() {
                return;
            }
            *at = Instant::now() + jittered(every);
        }
    }

    /// One round, and what is said of it.
    async fn turn(&mut self, round: Round, skipped: &mut String) {
        let (began, name) = (Instant::now(), round.as_str());
        let done = self.reconcile(round).await;
        let result = match &done {
            Ok(Some(_)) => "done",
            Ok(None) => "elsewhere",
            Err(_) => "skipped",
        };
        metrics::counter!("holdfast_reconcile_rounds_total", "round" => name, "result" => result).increment(1);
        match done {
            Ok(None) => {}
            Ok(Some(Tally { products, coupons, repaired, frozen, .. })) => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                metrics::gauge!("holdfast_reconcile_last_round_timestamp_seconds", "round" => name).set(now.as_secs_f64());
                metrics::histogram!("holdfast_reconcile_round_seconds", "round" => name).record(began.elapsed());
                match repaired + frozen {
                    0 => debug!(round = name, products, coupons, "reconciled: nothing differs"),
                    _ => info!(round = name, products, coupons, repaired, frozen, "reconciled"),
                }
                skipped.clear();
            }
            Err(Skipped(why)) => {
                // Another sidecar may be better off.
                self.examiner.disconnect();
                if why != *skipped {
                    warn!(round = name, why, "cannot reconcile now, trying on");
                    *skipped = why;
                }
            }
        }
    }

    /// `None` where another sidecar does it.
    async fn reconcile(&mut self, round: Round) -> Result<Option<Tally>, Skipped> {
        if !within(Box::pin(self.examiner.is_the_one())).await? {
            return Ok(None);
        }
        let mut walk = Walk { mode: Mode::Repair, until: None, tally: Tally::default() };
        let examiner = &mut self.examiner;
        if round == Round::Initialise {
            walk.over_postgres(examiner, &mut self.products.initialised_to, limits::INITIALISE_ROUND_PRODUCTS, Scope::Absent).await?;
            walk.over_postgres_coupons(examiner, &mut self.coupons.initialised_to, Scope::Absent).await?;
        } else {
            let since = self.seen;
            let seen = walk.over_changed(examiner, since).await?;
            walk.over_postgres(examiner, &mut self.products.synced_to, limits::RECONCILE_ROUND_PRODUCTS, Scope::Present).await?;
            walk.over_strays(examiner, Kind::Product, &mut self.products.scanned_to).await?;
            walk.over_changed_coupons(examiner, since).await?;
            walk.over_postgres_coupons(examiner, &mut self.coupons.synced_to, Scope::Present).await?;
            walk.over_strays(examiner, Kind::Coupon, &mut self.coupons.scanned_to).await?;
            self.seen = seen;
        }
        Ok(Some(walk.tally))
    }
}

/// About the interval, a tenth more or less by chance: sidecars that started together shall not stay together.
fn jittered(every: Duration) -> Duration {
    let chance = RandomState::new().hash_one(0_u8) % 200;
    every * (900 + u32::try_from(chance).unwrap_or_default()) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_come_about_as_often_as_they_shall() {
        for _ in 0..100 {
            let wait = jittered(Duration::from_secs(60));
            assert!((Duration::from_secs(54)..Duration::from_secs(66)).contains(&wait), "{wait:?}");
        }
    }
}
