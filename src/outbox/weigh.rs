//! Looks every few seconds how much of Redis's memory the outbox takes, on a connection of its own: the relay has other things to do, or
//! waits for Postgres, just when it matters.

use std::sync::Arc;

use metrics::gauge;
use tokio_util::sync::CancellationToken;

use crate::limits::OUTBOX_WEIGH_EVERY;
use crate::store::Partition;
use crate::store::stream::OutboxReader;

/// Looks until `cancel`. While Redis cannot be asked, the last answer stands.
pub async fn weigh(partition: Arc<Partition>, redis_url: String, cancel: CancellationToken) {
    let mut reader = None;
    let label = partition.id.to_string();
    while cancel.run_until_cancelled(tokio::time::sleep(OUTBOX_WEIGH_EVERY)).await.is_some() {
        if reader.is_none() {
            reader = OutboxReader::open(&redis_url).await.ok();
        }
        let Some(open) = &mut reader else { continue };
        // Redis judges by the oldest entries. Before anybody is refused for it, all are looked at.
        let weighed = match open.memory().await {
            Ok(bytes) if partition.bound.is_half(bytes) => open.exact_memory().await,
            other => other,
        };
        match weighed {
            Ok(bytes) => {
                partition.bound.note_bytes(bytes);
                gauge!("holdfast_outbox_bytes", "partition" => label.clone()).set(bytes as f64);
            }
            Err(_) => reader = None,
        }
        let full = partition.bound.refusal().is_some();
        gauge!("holdfast_outbox_full", "partition" => label.clone()).set(f64::from(u8::from(full)));
    }
}
