//! Finds in Postgres the products that Redis does not have, when they are first used.
//!
//! A product that Redis does not have cannot change meanwhile. So what Postgres has of it, once Postgres has every change up to where it
//! was missed, is what Redis has to be given; the script gives it only if it is still absent, and was not deleted since.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::ledger::{self, PgConnection};
use crate::limits;
use crate::store::Partition;
use crate::store::partition::{Found, LoadRequest};

/// See the module.
pub struct Loader {
    partition: Arc<Partition>,
    postgres_url: String,
    requests: mpsc::Receiver<LoadRequest>,
    connection: Option<PgConnection>,
}

impl Loader {
    pub fn new(partition: Arc<Partition>, postgres_url: &str, requests: mpsc::Receiver<LoadRequest>) -> Self {
        Self { partition, postgres_url: postgres_url.to_owned(), requests, connection: None }
    }

    /// Answers until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut batch = Vec::new();
        // Whoever asks first has no time to wait for a connection.
        self.connection = ledger::connect(&self.postgres_url).await.ok();
        while cancel.run_until_cancelled(self.requests.recv_many(&mut batch, limits::LOAD_BATCH_MAX)).await.is_some_and(|count| count > 0) {
            // Who asked has given up by the end of this time.
            let applied = tokio::time::timeout(limits::LOAD_WITHIN, self.wait_until_applied(&batch)).await;
            if applied.is_ok()
                && let Err(error) = self.answer(&mut batch).await
            {
                warn!(%error, "cannot look up products in postgres");
                self.connection = None;
            }
            batch.clear();
        }
    }

    async fn wait_until_applied(&self, batch: &[LoadRequest]) {
        let absent_at = batch.iter().map(|request| request.absent_at).max().unwrap_or(0);
        // The sender lives as long as the partition, so this ends only when it is so.
        _ = self.partition.applied.subscribe().wait_for(|applied| applied.n >= absent_at).await;
    }

    async fn answer(&mut self, batch: &mut Vec<LoadRequest>) -> Result<(), ledger::Error> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(ledger::connect(&self.postgres_url).await?),
        };
        let products: Vec<String> = batch.iter().map(|request| request.product.to_string()).collect();
        let Some((at, rows)) = ledger::stock::expected(connection, self.partition.id, &products, None).await? else { return Ok(()) };
        for (request, row) in batch.drain(..).zip(rows) {
            let found = |units: i64| Found { available: units.max(0), mark: at.mark, n: at.n, low: row.low, frozen: row.frozen };
            // Whoever has given up does not hear it.
            _ = request.answer.send(row.units.map(found));
        }
        Ok(())
    }
}
