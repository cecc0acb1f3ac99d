//! Tells whoever listens what is sold out, back or low, as the outbox says: at most once, and only while somebody listens.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::domain::Position;
use crate::domain::change::Operation;
use crate::domain::event::{self, Event};
use crate::limits::{EVENTS_BLOCK, EVENTS_LOOK_EVERY, EVENTS_READ_ENTRIES, OUTBOX_ANSWER_TIMEOUT};
use crate::store::partition::State;
use crate::store::stream::OutboxReader;
use crate::store::{Connection, Error, Partition, low};

/// See the module.
pub struct Herald<L, P> {
    pub partition: Arc<Partition>,
    pub redis_url: String,
    /// Whether anybody listens.
    pub listens: L,
    pub publish: P,
}

impl<L: Fn() -> bool, P: Fn(Event)> Herald<L, P> {
    /// Tells until `cancel`. What happens while nobody listens, or while Redis is away, is told to nobody.
    pub async fn run(self, cancel: CancellationToken) {
        while cancel.run_until_cancelled(tokio::time::sleep(EVENTS_LOOK_EVERY)).await.is_some() {
            let is_live = matches!(*self.partition.state.borrow(), State::Live { .. });
            if !is_live || !(self.listens)() {
                continue;
            }
            if let Some(Err(error)) = cancel.run_until_cancelled(self.tell()).await {
                debug!(partition = self.partition.id, %error, "events are lost: the outbox cannot be followed");
            }
        }
    }

    /// Follows the outbox from its end for as long as anybody listens.
    async fn tell(&self) -> Result<(), Error> {
        let mut reader = OutboxReader::open(&self.redis_url).await?;
        let mut redis = Connection::open(&self.redis_url).await?;
        let mut at = reader.last().await?.unwrap_or_default();
        while (self.listens)() {
            let entries = reader.read_after(at, EVENTS_READ_ENTRIES, EVENTS_BLOCK).await?.entries;
            let Some(last) = entries.last() else { continue };
            at = last.last;
            // One by one: what a line sums up may have sold a product out and brought it back.
            let numbered: Vec<(Position, Operation)> = entries
                .iter()
                .flat_map(|entry| entry.each().map(|(n, operation)| (Position::new(entry.last.epoch, n), operation)))
                .collect();
            let mut products: Vec<&str> = numbered.iter().flat_map(|(_, operation)| event::may_be_low(operation)).collect();
            products.sort_unstable();
            products.dedup();
            let asking = tokio::time::timeout(OUTBOX_ANSWER_TIMEOUT, low::thresholds(&mut redis, &products)).await;
            let thresholds: HashMap<&str, i64> = match asking {
                Ok(thresholds) => products.iter().copied().zip(thresholds?).filter_map(|(product, low)| Some((product, low?))).collect(),
                Err(_) => return Ok(()),
            };
            for (position, operation) in &numbered {
                event::of_operation(operation, *position, |product| thresholds.get(product).copied()).into_iter().for_each(&self.publish);
            }
        }
        Ok(())
    }
}
