//! Reconciles when a client asks: STOCK.SYNC.

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::examine::{Examiner, Mode, Scope, Skipped};
use super::walk::{Kind, Tally, Walk};
use crate::domain::Drift;
use crate::limits;
use crate::store::partition::SyncRequest;

/// See the module.
pub struct Requests {
    examiner: Examiner,
    receiver: mpsc::Receiver<SyncRequest>,
    /// Where a request for everything goes on that the last one had no time for; empty where it had.
    reached: String,
}

impl Requests {
    pub fn new(examiner: Examiner, receiver: mpsc::Receiver<SyncRequest>) -> Self {
        Self { examiner, receiver, reached: String::new() }
    }

    /// Answers until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        while let Some(Some(request)) = cancel.run_until_cancelled(self.receiver.recv()).await {
            if request.answer.is_closed() {
                continue;
            }
            let Some(result) = cancel.run_until_cancelled(self.sync(&request)).await else { return };
            // Whoever has given up does not hear it.
            _ = request.answer.send(result.map_err(|Skipped(why)| why));
        }
    }

    /// Compares what was asked for, as far as the time goes.
    async fn sync(&mut self, request: &SyncRequest) -> Result<Vec<Drift>, Skipped> {
        let mode = if request.dry_run { Mode::DryRun } else { Mode::Repair };
        let mut walk = Walk { mode, until: Some(request.deadline), tally: Tally { drifts: Some(Vec::new()), ..Tally::default() } };
        let walked = match request.products.as_slice() {
            [] => self.everything(&mut walk).await,
            products => {
                let mut products: Vec<String> = products.iter().map(ToString::to_string).collect();
                products.sort_unstable();
                products.dedup();
                walk.over(&mut self.examiner, &products, Scope::All).await
            }
        };
        let drifts = walk.tally.drifts.unwrap_or_default();
        match walked {
            Err(skipped) if drifts.is_empty() => Err(skipped),
            // What was found and done before is worth more than an error.
            _ => Ok(drifts),
        }
    }

    async fn everything(&mut self, walk: &mut Walk) -> Result<(), Skipped> {
        walk.over_postgres(&mut self.examiner, &mut self.reached, limits::INITIALISE_ROUND_PRODUCTS, Scope::All).await?;
        if self.reached.is_empty() {
            walk.over_strays(&mut self.examiner, Kind::Product, &mut "0".to_owned()).await?;
        }
        Ok(())
    }
}
