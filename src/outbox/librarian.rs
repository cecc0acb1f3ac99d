//! Reads in Postgres what commands ask for and Redis does not have: orders that are long over, and the history of products.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::domain::Order;
use crate::ledger::{self, Error, PgConnection, history, order};
use crate::limits;
use crate::store::Partition;
use crate::store::partition::Lookup;

/// See the module.
pub struct Librarian {
    partition: Arc<Partition>,
    postgres_url: String,
    lookups: mpsc::Receiver<Lookup>,
    connection: Option<PgConnection>,
}

impl Librarian {
    pub fn new(partition: Arc<Partition>, postgres_url: &str, lookups: mpsc::Receiver<Lookup>) -> Self {
        Self { partition, postgres_url: postgres_url.to_owned(), lookups, connection: None }
    }

    /// Answers until `cancel`. Whoever was not answered hears that as Postgres not being able to say.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut batch = Vec::new();
        // Whoever asks first has no time to wait for a connection.
        self.connection = ledger::connect(&self.postgres_url).await.ok();
        while cancel.run_until_cancelled(self.lookups.recv_many(&mut batch, limits::LOAD_BATCH_MAX)).await.is_some_and(|count| count > 0) {
            if let Err(error) = self.answer(&mut batch).await {
                warn!(partition = self.partition.id, %error, "cannot look up in postgres what a command asks for");
            }
            batch.clear();
        }
    }

    async fn answer(&mut self, batch: &mut Vec<Lookup>) -> Result<(), Error> {
        let (mut orders, mut histories) = (Vec::new(), Vec::new());
        for lookup in batch.drain(..) {
            match lookup {
                Lookup::History { .. } => histories.push(lookup),
                Lookup::Order { order, absent_at, answer } => orders.push((order.to_string(), absent_at, answer)),
            }
        }
        // Those of orders have the time of a command only.
        let answered = self.answer_orders(orders).await;
        for lookup in histories {
            if let Lookup::History { product, before, count, answer } = lookup
                && !answer.is_closed()
            {
                let read = self.within(limits::SYNC_WITHIN, async |connection, partition| {
                    history::of_product(connection, partition, product.as_str(), before, count).await
                });
                match read.await {
                    // Whoever has given up does not hear it.
                    Ok(history) => _ = answer.send(history),
                    Err(error) => warn!(partition = self.partition.id, %error, %product, "cannot read the history of a product"),
                }
            }
        }
        answered
    }

    async fn answer_orders(&mut self, orders: Vec<(String, u64, oneshot::Sender<Option<Order>>)>) -> Result<(), Error> {
        let Some(absent_at) = orders.iter().map(|(_, absent_at, _)| *absent_at).max() else { return Ok(()) };
        // An order that Redis does not have cannot change meanwhile: what Postgres has of it then is what it is.
        let applied = async { self.partition.applied.subscribe().wait_for(|applied| applied.n >= absent_at).await.is_ok() };
        if !tokio::time::timeout(limits::LOAD_WITHIN, applied).await.unwrap_or(false) {
            return Ok(());
        }
        let ids: Vec<String> = orders.iter().map(|(order, ..)| order.clone()).collect();
        let rows = self.within(limits::LOAD_WITHIN, async |connection, _| order::load(connection, &ids).await).await?;
        let read = |row: order::OrderRow| Ok((row.order.clone(), row.order()?));
        let found = rows.into_iter().map(read).collect::<Result<HashMap<String, Order>, Error>>()?;
        for (order, _, answer) in orders {
            _ = answer.send(found.get(&order).cloned());
        }
        Ok(())
    }

    /// Works on Postgres. A connection that did not answer is given up with what was under way on it.
    async fn within<T>(&mut self, time: Duration, work: impl AsyncFnOnce(&mut PgConnection, u32) -> Result<T, Error>) -> Result<T, Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => ledger::connect(&self.postgres_url).await?,
        };
        let result = tokio::time::timeout(time, work(&mut connection, self.partition.id)).await;
        let result = result.unwrap_or_else(|_| Err(Error::Connection("no answer".into())));
        if !matches!(result, Err(Error::Connection(_))) {
            self.connection = Some(connection);
        }
        result
    }
}
