//! Compares Redis with Postgres before anything is sold: at start, whenever a script's guard does not match, and every few seconds.
//! Decides whether the partition is live, and under which epoch.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::ledger;
use crate::ledger::partition::PartitionRow;
use crate::limits;
use crate::store::meta::{self, Meta};
use crate::store::partition::{EndedEpoch, State, Trouble};
use crate::store::stream::OutboxReader;
use crate::store::{Connection, Partition};

/// See the module.
pub struct Verifier {
    partition: Arc<Partition>,
    redis_url: String,
    postgres_url: String,
    /// The epoch and run id that both sides agreed on last.
    verified: Option<(u64, String)>,
}

/// What was found, and what follows from it.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    /// Both agree, under this epoch, on this Redis process.
    Live { epoch: u64 },
    /// Everything Postgres has is here and chained: open it under the next epoch.
    NextEpoch,
    /// A person has to decide, or Redis has to be filled from Postgres. Says what was found and what to do.
    Closed(String),
}

/// What of the stream the decision needs.
#[derive(Debug, Default)]
struct Stream {
    /// The op of the newest entry and its n.
    tail: Option<(u64, String)>,
    /// The op of the entry at the applied position.
    at_applied: Option<String>,
    /// The op that the oldest entry names as the one before it.
    oldest_prev: Option<String>,
}

/// What a look at both sides came to.
enum Look {
    Found(Finding),
    /// Another sidecar was faster: look again.
    Moved,
}

impl Verifier {
    pub fn new(partition: Arc<Partition>, redis_url: &str, postgres_url: &str) -> Self {
        Self { partition, redis_url: redis_url.to_owned(), postgres_url: postgres_url.to_owned(), verified: None }
    }

    /// Verifies until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut troubled = String::new();
        loop {
            let trouble = match tokio::time::timeout(limits::VERIFY_WITHIN, self.verify()).await {
                Ok(Ok(())) => String::new(),
                Ok(Err(trouble)) => trouble,
                Err(_) => "Redis or Postgres does not answer".to_owned(),
            };
            if trouble != troubled {
                match trouble.as_str() {
                    "" => info!(state = ?*self.partition.state.borrow(), "verified"),
                    _ => warn!(trouble, "cannot verify yet, trying on"),
                }
                troubled = trouble;
            }
            let pause = if troubled.is_empty() { limits::VERIFY_EVERY } else { limits::VERIFY_AGAIN_AFTER };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.partition.verify.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
            // Many may ask at once, and a guard that keeps refusing may not turn this into a busy loop.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn verify(&mut self) -> Result<(), String> {
        let mut redis = Connection::open(&self.redis_url).await.map_err(|error| self.starting(error.to_string()))?;
        let found = Meta::read(&mut redis).await.map_err(|error| self.starting(error.to_string()))?;
        let mut postgres = match ledger::connect(&self.postgres_url).await {
            Ok(postgres) => postgres,
            Err(error) => return self.without_postgres(&redis, found.as_ref(), &error.to_string()),
        };
        loop {
            match self.look(&mut redis, &mut postgres).await? {
                Look::Moved => {}
                Look::Found(Finding::Live { epoch }) => {
                    self.verified = Some((epoch, redis.run_id().to_owned()));
                    self.set(State::Live { epoch, run_id: redis.run_id().to_owned() });
                    return Ok(());
                }
                Look::Found(Finding::NextEpoch) => return Err("the epoch was not taken".to_owned()),
                Look::Found(Finding::Closed(why)) => {
                    self.set(State::Loading(why.clone()));
                    return Err(why);
                }
            }
        }
    }

    /// Before the first time, the reason is what a client is told; later the state stays, and the lanes see for themselves.
    fn starting(&self, why: String) -> String {
        self.partition.state.send_if_modified(|state| match state {
            State::Loading(reason) if *reason != why => {
                *reason = format!("waiting: {why}");
                true
            }
            _ => false,
        });
        why
    }

    fn set(&self, next: State) {
        self.partition.state.send_if_modified(|state| {
            let changed = *state != next;
            if changed {
                *state = next;
            }
            changed
        });
    }

    /// Postgres is away: a sidecar that was live goes on where nothing in Redis has changed.
    fn without_postgres(&self, redis: &Connection, found: Option<&Meta>, error: &str) -> Result<(), String> {
        if let (Some(meta), Some((epoch, run_id))) = (found, &self.verified)
            && meta.live
            && meta.epoch == *epoch
            && meta.run_id == *run_id
            && run_id == redis.run_id()
            && meta.n >= self.partition.head_n()
        {
            self.set(State::Live { epoch: *epoch, run_id: run_id.clone() });
            return Ok(());
        }
        Err(self.starting(error.to_owned()))
    }

    async fn look(&self, redis: &mut Connection, postgres: &mut ledger::PgConnection) -> Result<Look, String> {
        let text = |error: &dyn std::fmt::Display| self.starting(error.to_string());
        let row = ledger::partition::load(postgres, self.partition.id).await.map_err(|error| text(&error))?;
        let meta = Meta::read(redis).await.map_err(|error| text(&error))?;
        let mut reader = OutboxReader::over(redis.clone());
        let stream = self.stream(&mut reader, &row).await.map_err(|error| text(&error))?;
        self.partition.set_applied(row.applied);
        self.note_ended_epochs(postgres).await.map_err(|error| text(&error))?;
        let trouble = self.partition.relay_trouble.borrow().clone();
        let finding = match trouble {
            Some(Trouble::Broken(found)) => Finding::Closed(found),
            _ => decide(&row, meta.as_ref(), &stream, redis.run_id(), self.partition.head_n()),
        };
        if finding != Finding::NextEpoch {
            return Ok(Look::Found(finding));
        }
        let taken =
            ledger::partition::take_epoch(postgres, self.partition.id, row.epoch, redis.run_id()).await.map_err(|error| text(&error))?;
        let Some(epoch) = taken else { return Ok(Look::Moved) };
        let attached = meta::attach(redis, meta.as_ref(), epoch).await.map_err(|error| text(&error))?;
        if attached {
            info!(epoch, run_id = redis.run_id(), n = meta.map_or(0, |meta| meta.n), "opened under a new epoch");
        }
        Ok(Look::Moved)
    }

    async fn note_ended_epochs(&self, postgres: &mut ledger::PgConnection) -> Result<(), ledger::Error> {
        let epochs = ledger::partition::epochs(postgres, self.partition.id).await?;
        let ended = epochs.into_iter().filter_map(|row| Some(EndedEpoch { epoch: row.epoch, last_n: row.last_n? }));
        self.partition.ended.send_replace(ended.collect());
        Ok(())
    }

    async fn stream(&self, reader: &mut OutboxReader, row: &PartitionRow) -> Result<Stream, crate::store::Error> {
        let tail = reader.newest().await?.map(|entry| (entry.last.n, entry.op));
        let at_applied = reader.entry_at(row.applied).await?.map(|entry| entry.op);
        let oldest_prev = reader.oldest().await?.map(|entry| entry.prev);
        Ok(Stream { tail, at_applied, oldest_prev })
    }
}

/// The table of design 8 as far as it needs no rebuild; the first that fits counts. `seen` is n of the newest change this
/// sidecar knows of.
fn decide(row: &PartitionRow, meta: Option<&Meta>, stream: &Stream, run_id: &str, seen: u64) -> Finding {
    let Some(meta) = meta else {
        // Nothing was ever applied, and nothing has been seen: an installation that begins.
        if row.applied.n == 0 && seen == 0 && stream.tail.is_none() {
            return Finding::NextEpoch;
        }
        return Finding::Closed(format!(
            "this Redis is empty, but Postgres has changes up to {}: give Redis its data back, or point redis.url at the right one",
            row.applied
        ));
    };
    if meta.epoch > row.epoch {
        return Finding::Closed(format!(
            "Redis is at epoch {} and Postgres at {}: Postgres was restored from a backup or is another one; point postgres.url at the right one",
            meta.epoch, row.epoch
        ));
    }
    let newest = seen.max(row.applied.n);
    if meta.n < newest {
        return Finding::Closed(format!(
            "Redis is at {} and has lost changes up to {newest}: it was restored from an older copy; give it its newest data back",
            meta.n
        ));
    }
    let tail_fits = match &stream.tail {
        Some((n, op)) => *n == meta.n && *op == meta.last,
        None => meta.n == 0,
    };
    let chained = if row.applied.n == 0 {
        stream.oldest_prev.as_deref().is_none_or(|prev| prev == "-")
    } else {
        stream.at_applied.as_deref() == Some(row.last_op.as_str())
    };
    if !tail_fits || !chained {
        return Finding::Closed(format!(
            "the outbox in Redis does not continue what Postgres has at {}: it was cut, or belongs to another history; give Redis its own data back",
            row.applied
        ));
    }
    if meta.live && meta.epoch == row.epoch && meta.run_id == run_id {
        return Finding::Live { epoch: meta.epoch };
    }
    Finding::NextEpoch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Position;

    fn row(epoch: u64, n: u64) -> PartitionRow {
        PartitionRow { epoch, applied: Position::new(epoch, n), last_op: if n == 0 { "-".into() } else { format!("op{n}") } }
    }

    fn meta(epoch: u64, run_id: &str, n: u64) -> Meta {
        Meta { epoch, run_id: run_id.into(), live: true, n, last: if n == 0 { "-".into() } else { format!("op{n}") } }
    }

    fn stream(applied: u64, n: u64) -> Stream {
        Stream { tail: Some((n, format!("op{n}"))), at_applied: Some(format!("op{applied}")), oldest_prev: Some("op0".into()) }
    }

    fn is_closed(finding: &Finding) -> bool {
        matches!(finding, Finding::Closed(_))
    }

    #[test]
    fn a_fresh_installation_opens_under_the_first_epoch() {
        assert_eq!(decide(&row(0, 0), None, &Stream::default(), "r", 0), Finding::NextEpoch);
    }

    #[test]
    fn the_same_process_and_epoch_is_live_at_once() {
        assert_eq!(decide(&row(3, 5), Some(&meta(3, "r", 9)), &stream(5, 9), "r", 9), Finding::Live { epoch: 3 });
    }

    #[test]
    fn another_process_with_everything_in_it_gets_the_next_epoch() {
        assert_eq!(decide(&row(3, 5), Some(&meta(3, "old", 9)), &stream(5, 9), "new", 9), Finding::NextEpoch);
        assert_eq!(decide(&row(4, 5), Some(&meta(3, "old", 9)), &stream(5, 9), "old", 9), Finding::NextEpoch, "an attach was interrupted");
    }

    #[test]
    fn nothing_is_sold_on_an_empty_older_cut_or_foreign_redis() {
        assert!(is_closed(&decide(&row(3, 5), None, &Stream::default(), "r", 0)), "emptied");
        assert!(is_closed(&decide(&row(3, 5), Some(&meta(3, "r", 4)), &stream(4, 4), "r", 0)), "below what Postgres has");
        assert!(is_closed(&decide(&row(3, 5), Some(&meta(3, "r", 7)), &stream(5, 7), "r", 8)), "below what this sidecar saw");
        assert!(is_closed(&decide(&row(2, 5), Some(&meta(3, "r", 9)), &stream(5, 9), "r", 0)), "Postgres is older");
        let cut = Stream { at_applied: None, ..stream(5, 9) };
        assert!(is_closed(&decide(&row(3, 5), Some(&meta(3, "r", 9)), &cut, "r", 0)), "trimmed beyond what was applied");
        let fork = Stream { at_applied: Some("other".into()), ..stream(5, 9) };
        assert!(is_closed(&decide(&row(3, 5), Some(&meta(3, "r", 9)), &fork, "r", 0)), "another history");
        assert!(is_closed(&decide(&row(3, 5), Some(&meta(3, "r", 9)), &stream(5, 8), "r", 0)), "the stream's end is not meta's");
    }
}
