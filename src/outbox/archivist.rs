//! Finds in the ledger what became of operations whose answers got lost.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::domain::change::Recorded;
use crate::domain::request::Sent;
use crate::ledger::{self, Error, PgConnection, archive};
use crate::limits;
use crate::store::Partition;
use crate::store::partition::Inquiry;

/// See the module.
pub struct Archivist {
    partition: Arc<Partition>,
    postgres_url: String,
    inquiries: mpsc::Receiver<Inquiry>,
    connection: Option<PgConnection>,
}

impl Archivist {
    pub fn new(partition: Arc<Partition>, postgres_url: &str, inquiries: mpsc::Receiver<Inquiry>) -> Self {
        Self { partition, postgres_url: postgres_url.to_owned(), inquiries, connection: None }
    }

    /// Answers until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        // Whoever asks first has no time to wait for a connection.
        self.connection = ledger::connect(&self.postgres_url).await.ok();
        while let Some(Some(inquiry)) = cancel.run_until_cancelled(self.inquiries.recv()).await {
            if inquiry.answer.is_closed() {
                continue;
            }
            match tokio::time::timeout(limits::LOAD_WITHIN, self.find(&inquiry.sent)).await {
                // Whoever has given up does not hear it.
                Ok(Ok(found)) => _ = inquiry.answer.send(found),
                Ok(Err(error)) => warn!(partition = self.partition.id, %error, "cannot look up in the ledger what became of an operation"),
                Err(_) => warn!(partition = self.partition.id, "postgres does not say in time what became of an operation"),
            }
        }
    }

    /// A connection that did not answer is given up.
    async fn find(&mut self, sent: &Sent) -> Result<Option<Recorded>, Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => ledger::connect(&self.postgres_url).await?,
        };
        let found = archive::find(&mut connection, sent).await?;
        self.connection = Some(connection);
        Ok(found)
    }
}
