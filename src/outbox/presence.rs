//! Says in Postgres that this sidecar runs, and hands over what it has answered as soon as another one fills Redis.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::handover;
use crate::ledger::{self, PgConnection};
use crate::limits::{HANDOVER_WITHIN, LEDGER_SILENCE_MAX, SIDECAR_RENEW_EVERY};
use crate::store::Partition;

/// See the module.
pub struct Presence {
    pub partition: Arc<Partition>,
    pub postgres_url: String,
    /// This process.
    pub instance: String,
    /// How long a REQUEST id is remembered, in ms.
    pub window_ms: i64,
}

impl Presence {
    /// Goes on until `cancel`. Without Postgres the lease passes, and nobody waits for this sidecar any more.
    pub async fn run(self, cancel: CancellationToken) {
        let mut connection = None;
        let mut handed = 0;
        loop {
            let told = match tokio::time::timeout(HANDOVER_WITHIN, self.once(&mut connection, &mut handed)).await {
                Ok(told) => told.map_err(|error| error.to_string()),
                Err(_) => Err("no answer".to_owned()),
            };
            if let Err(error) = told {
                debug!(error, "postgres was not told that this sidecar runs");
                connection = None;
            }
            if cancel.run_until_cancelled(tokio::time::sleep(SIDECAR_RENEW_EVERY)).await.is_none() {
                return;
            }
        }
    }

    async fn once(&self, connection: &mut Option<PgConnection>, handed: &mut u64) -> Result<(), ledger::Error> {
        let connection = match connection {
            Some(connection) => connection,
            none => none.insert(ledger::connect(&self.postgres_url).await?),
        };
        let looking = async {
            ledger::sidecar::renew(connection, &self.instance, self.window_ms).await?;
            ledger::partition::load(connection, self.partition.id).await
        };
        let silence = || ledger::Error::Connection("no answer".to_owned());
        let row = tokio::time::timeout(LEDGER_SILENCE_MAX, looking).await.map_err(|_| silence())??;
        let of_another = row.owner.as_ref().is_some_and(|owner| *owner != self.instance);
        if of_another && row.epoch > *handed {
            handover::hand_over_all(&self.partition, connection, row.epoch).await?;
            ledger::sidecar::handed_over(connection, &self.instance, row.epoch).await?;
            *handed = row.epoch;
        }
        Ok(())
    }
}
