//! Agrees with Postgres under which epoch locks' tokens go on, for a Redis that may not have all that were given out.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::retry::Trouble;
use crate::domain::lock::Epoch;
use crate::ledger;
use crate::limits::LOCK_EPOCH_WITHIN;
use crate::store::Partition;
use crate::store::lock::link::EpochRequest;

/// See the module.
pub struct LockEpochs {
    pub partition: Arc<Partition>,
    pub postgres_url: String,
    pub requests: mpsc::Receiver<EpochRequest>,
}

impl LockEpochs {
    /// Answers until `cancel`. What Postgres cannot say is left unanswered, and asked again.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut trouble = Trouble::new("agreeing on the epoch of locks");
        loop {
            let request = tokio::select! {
                () = cancel.cancelled() => return,
                request = self.requests.recv() => request,
            };
            let Some(EpochRequest { kept, seen, answer }) = request else { return };
            if answer.is_closed() {
                continue;
            }
            match tokio::time::timeout(LOCK_EPOCH_WITHIN, self.agree(kept, seen)).await {
                Ok(Ok(epoch)) => {
                    trouble.over(self.partition.id);
                    // Whoever has given up asks again.
                    _ = answer.send(epoch);
                }
                Ok(Err(error)) => _ = trouble.failed(self.partition.id, &error),
                Err(_) => _ = trouble.failed(self.partition.id, &"no answer"),
            }
        }
    }

    async fn agree(&self, kept: Option<u64>, seen: u64) -> Result<Epoch, ledger::Error> {
        let mut connection = ledger::connect(&self.postgres_url).await?;
        ledger::lock::agree(&mut connection, kept, seen).await
    }
}
