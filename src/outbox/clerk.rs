//! Looks after dead letters: counts them, freezes their products in Redis, and answers what people ask about them.

use std::sync::Arc;

use metrics::gauge;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::retry::Trouble;
use crate::domain::Id;
use crate::ledger::{self, Error, PgConnection, dead_letter};
use crate::limits::{DEAD_LETTERS_EVERY, LEDGER_TRANSACTION_MAX};
use crate::store::Partition;
use crate::store::partition::LetterRequest;
use crate::store::stock::{StockOp, StockOutcome, Upkeep};

/// See the module.
pub struct Clerk {
    partition: Arc<Partition>,
    postgres_url: String,
    requests: mpsc::Receiver<LetterRequest>,
    connection: Option<PgConnection>,
    /// Up to which dead letter every product is frozen in Redis, or was unfrozen by a person. From the first on after a start.
    frozen_up_to: i64,
    trouble: Trouble,
}

impl Clerk {
    pub fn new(partition: Arc<Partition>, postgres_url: &str, requests: mpsc::Receiver<LetterRequest>) -> Self {
        let trouble = Trouble::new("looking after dead letters");
        Self { partition, postgres_url: postgres_url.to_owned(), requests, connection: None, frozen_up_to: 0, trouble }
    }

    /// Works until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        loop {
            let request = tokio::select! {
                () = cancel.cancelled() => return,
                request = self.requests.recv() => request,
                () = self.partition.parked.notified() => None,
                () = tokio::time::sleep(DEAD_LETTERS_EVERY) => None,
            };
            let worked = match request {
                Some(request) => self.with_ledger(async |connection, partition| answer(connection, partition.id, request).await).await,
                None => Ok(()),
            };
            let looked = match worked {
                Ok(()) => self.look().await,
                error => error,
            };
            match looked {
                Ok(()) => self.trouble.over(self.partition.id),
                Err(error) => _ = self.trouble.failed(self.partition.id, &error),
            }
        }
    }

    /// Works on Postgres. A connection that did not answer is given up with what was under way on it.
    async fn with_ledger<T>(&mut self, work: impl AsyncFnOnce(&mut PgConnection, &Partition) -> Result<T, Error>) -> Result<T, Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => ledger::connect(&self.postgres_url).await?,
        };
        let result = tokio::time::timeout(LEDGER_TRANSACTION_MAX, work(&mut connection, &self.partition)).await;
        let result = result.unwrap_or_else(|_| Err(Error::Connection("no answer".into())));
        if !matches!(result, Err(Error::Connection(_))) {
            self.connection = Some(connection);
        }
        result
    }

    /// Counts, and freezes in Redis what is not frozen there yet.
    async fn look(&mut self) -> Result<(), Error> {
        let after = self.frozen_up_to;
        let (count, frozen) = self
            .with_ledger(async |connection, partition| {
                let count = dead_letter::count(connection, partition.id).await?;
                Ok((count, dead_letter::frozen(connection, partition.id, after).await?))
            })
            .await?;
        self.partition.set_dead_letters(count);
        gauge!("holdfast_dead_letters", "partition" => self.partition.id.to_string()).set(count as f64);
        for frozen in frozen {
            let freeze = Upkeep::Freeze { n: frozen.n(), reason: dead_letter::FROZEN.to_owned() };
            let freeze = StockOp::upkeep(Id::from(frozen.product.as_str()), 0, freeze);
            match self.partition.change(freeze).await {
                Ok(
                    StockOutcome::Done { .. }
                    | StockOutcome::Frozen { .. }
                    | StockOutcome::Absent { .. }
                    | StockOutcome::Corrupt { .. }
                    // A person has unfrozen it since.
                    | StockOutcome::Moved,
                ) => self.frozen_up_to = frozen.letter,
                // It is found again.
                _ => break,
            }
        }
        Ok(())
    }
}

async fn answer(connection: &mut PgConnection, partition: u32, request: LetterRequest) -> Result<(), Error> {
    // Whoever has given up does not hear it.
    match request {
        LetterRequest::List { count, answer } => _ = answer.send(dead_letter::list(connection, partition, count).await?),
        LetterRequest::Retry { id, answer } => _ = answer.send(dead_letter::retry(connection, id).await?),
        LetterRequest::Drop { id, answer } => _ = answer.send(dead_letter::discard(connection, id).await?),
    }
    Ok(())
}
