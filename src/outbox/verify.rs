//! Compares Redis with Postgres before anything is sold: at start, whenever a script's guard does not match, and every few seconds.
//! Decides whether the partition is live, and under which epoch.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::ledger;
use crate::ledger::partition::{NO_OP, PartitionRow};
use crate::limits;
use crate::store::meta::{self, Look};
use crate::store::partition::{EndedEpoch, State, Trouble};
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

/// What a comparison came to.
enum Compared {
    Found(Finding),
    /// The epoch has moved, by us or by another sidecar: compare again.
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
        let mut postgres = match ledger::connect(&self.postgres_url).await {
            Ok(postgres) => postgres,
            Err(error) => return self.without_postgres(&mut redis, &error.to_string()).await,
        };
        let mut closed_before = false;
        loop {
            match self.compare(&mut redis, &mut postgres).await? {
                Compared::Moved => {}
                Compared::Found(Finding::Live { epoch }) => {
                    self.verified = Some((epoch, redis.run_id().to_owned()));
                    self.set(State::Live { epoch, run_id: redis.run_id().to_owned() });
                    return Ok(());
                }
                Compared::Found(Finding::NextEpoch) => return Err("the epoch was not taken".to_owned()),
                // Both sides cannot be read at one moment, and another sidecar may be at it: what shows twice is real.
                Compared::Found(Finding::Closed(_)) if !closed_before => closed_before = true,
                Compared::Found(Finding::Closed(why)) => {
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
    async fn without_postgres(&self, redis: &mut Connection, error: &str) -> Result<(), String> {
        let (seen, applied) = (self.partition.head(), *self.partition.applied.borrow());
        let found = Look::at(redis, applied).await.map_err(|error| self.starting(error.to_string()))?;
        if let (Some(meta), Some((epoch, run_id))) = (&found.meta, &self.verified)
            && meta.live
            && meta.epoch == *epoch
            && meta.run_id == *run_id
            && run_id == redis.run_id()
            && meta.n >= seen.n
        {
            self.set(State::Live { epoch: *epoch, run_id: run_id.clone() });
            return Ok(());
        }
        Err(self.starting(error.to_owned()))
    }

    async fn compare(&self, redis: &mut Connection, postgres: &mut ledger::PgConnection) -> Result<Compared, String> {
        let text = |error: &dyn std::fmt::Display| self.starting(error.to_string());
        let row = ledger::partition::load(postgres, self.partition.id).await.map_err(|error| text(&error))?;
        // Before Redis is asked: what is sold from now on is no loss.
        let seen = self.partition.head();
        let look = Look::at(redis, row.applied).await.map_err(|error| text(&error))?;
        self.partition.set_applied(row.applied);
        if let Some(newest) = &look.newest {
            self.partition.saw(newest.last);
        }
        self.note_ended_epochs(postgres).await.map_err(|error| text(&error))?;
        let trouble = self.partition.relay_trouble.borrow().clone();
        let finding = match trouble {
            Some(Trouble::Broken(found)) => Finding::Closed(found),
            _ => decide(&row, &look, redis.run_id(), seen.n),
        };
        if finding != Finding::NextEpoch {
            return Ok(Compared::Found(finding));
        }
        let taken =
            ledger::partition::take_epoch(postgres, self.partition.id, row.epoch, redis.run_id()).await.map_err(|error| text(&error))?;
        let Some(epoch) = taken else { return Ok(Compared::Moved) };
        let attached = meta::attach(redis, look.meta.as_ref(), epoch).await.map_err(|error| text(&error))?;
        if attached {
            info!(epoch, run_id = redis.run_id(), n = look.meta.map_or(0, |meta| meta.n), "opened under a new epoch");
        }
        Ok(Compared::Moved)
    }

    async fn note_ended_epochs(&self, postgres: &mut ledger::PgConnection) -> Result<(), ledger::Error> {
        let epochs = ledger::partition::epochs(postgres, self.partition.id).await?;
        let ended = epochs.into_iter().filter_map(|row| Some(EndedEpoch { epoch: row.epoch, last_n: row.last_n? }));
        self.partition.ended.send_replace(ended.collect());
        Ok(())
    }
}

/// The table of design 8 as far as it needs no rebuild; the first that fits counts. `seen` is n of the newest change this
/// sidecar knows of.
fn decide(row: &PartitionRow, look: &Look, run_id: &str, seen: u64) -> Finding {
    let Some(meta) = &look.meta else {
        // Nothing was ever applied, and nothing has been seen: an installation that begins.
        if row.applied.n == 0 && seen == 0 && look.newest.is_none() {
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
    let tail_fits = match &look.newest {
        Some(newest) => newest.last.n == meta.n && newest.op == meta.last,
        // Cut to the end, by hand: nothing is lost if Postgres has all of it.
        None => meta.n == 0 || (meta.n == row.applied.n && meta.last == row.last_op),
    };
    let chained = if row.applied.n == 0 {
        look.oldest.as_ref().is_none_or(|oldest| oldest.prev == NO_OP)
    } else {
        look.newest.is_none() || look.at_applied.as_ref().is_some_and(|entry| entry.op == row.last_op)
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
    use crate::domain::change::Entry;
    use crate::store::meta::Meta;

    fn row(epoch: u64, n: u64) -> PartitionRow {
        PartitionRow { epoch, applied: Position::new(epoch, n), last_op: if n == 0 { "-".into() } else { format!("op{n}") } }
    }

    fn entry(n: u64, op: &str, prev: &str) -> Entry {
        Entry { last: Position::new(1, n), first_n: n, prev: prev.into(), op: op.into(), at_ms: 0, operations: Vec::new() }
    }

    /// A Redis at n, with the outbox from behind the applied position's entry on.
    fn look(epoch: u64, run_id: &str, applied: u64, n: u64) -> Look {
        let meta = Meta { epoch, run_id: run_id.into(), live: true, n, last: format!("op{n}") };
        let newest = entry(n, &format!("op{n}"), "op0");
        Look {
            meta: Some(meta),
            newest: Some(newest),
            at_applied: Some(entry(applied, &format!("op{applied}"), "op0")),
            oldest: Some(entry(1, "op1", "-")),
        }
    }

    fn is_closed(finding: &Finding) -> bool {
        matches!(finding, Finding::Closed(_))
    }

    #[test]
    fn a_fresh_installation_opens_under_the_first_epoch() {
        assert_eq!(decide(&row(0, 0), &Look::default(), "r", 0), Finding::NextEpoch);
    }

    #[test]
    fn the_same_process_and_epoch_is_live_at_once() {
        assert_eq!(decide(&row(3, 5), &look(3, "r", 5, 9), "r", 9), Finding::Live { epoch: 3 });
    }

    #[test]
    fn another_process_with_everything_in_it_gets_the_next_epoch() {
        assert_eq!(decide(&row(3, 5), &look(3, "old", 5, 9), "new", 9), Finding::NextEpoch);
        assert_eq!(decide(&row(4, 5), &look(3, "old", 5, 9), "old", 9), Finding::NextEpoch, "an attach was interrupted");
    }

    #[test]
    fn nothing_is_sold_on_an_empty_older_cut_or_foreign_redis() {
        assert!(is_closed(&decide(&row(3, 5), &Look::default(), "r", 0)), "emptied");
        assert!(is_closed(&decide(&row(3, 5), &look(3, "r", 4, 4), "r", 0)), "below what Postgres has");
        assert!(is_closed(&decide(&row(3, 5), &look(3, "r", 5, 7), "r", 8)), "below what this sidecar saw");
        assert!(is_closed(&decide(&row(2, 5), &look(3, "r", 5, 9), "r", 0)), "Postgres is older");
        let cut = Look { at_applied: None, ..look(3, "r", 5, 9) };
        assert!(is_closed(&decide(&row(3, 5), &cut, "r", 0)), "trimmed beyond what was applied");
        let fork = Look { at_applied: Some(entry(5, "other", "-")), ..look(3, "r", 5, 9) };
        assert!(is_closed(&decide(&row(3, 5), &fork, "r", 0)), "another history");
        let end = Look { newest: Some(entry(8, "op8", "-")), ..look(3, "r", 5, 9) };
        assert!(is_closed(&decide(&row(3, 5), &end, "r", 0)), "the stream's end is not meta's");
        let gone = Look { newest: None, at_applied: None, oldest: None, ..look(3, "r", 5, 9) };
        assert!(is_closed(&decide(&row(3, 5), &gone, "r", 0)), "the stream is gone, with changes in it");
        assert_eq!(decide(&row(3, 9), &gone, "r", 0), Finding::Live { epoch: 3 }, "the stream is gone, and Postgres has all of it");
    }
}
