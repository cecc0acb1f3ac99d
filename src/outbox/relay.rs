//! Carries the outbox of one partition from Redis to Postgres, exactly once.
//!
//! Each pass of the loop does the next thing that is due: connect, prove that the outbox continues what Postgres has, read, apply one
//! transaction, trim. Whatever fails, the next pass begins with what is then due; nothing read is given up before Postgres has it, and
//! that it is applied once is up to the row that [`apply`] locks. While Postgres works on a transaction, the next batch is read and decoded;
//! it stands behind the one at hand, and whatever gives that up gives up both. Several relays on one partition are in each other's way, but do no harm.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{counter, gauge, histogram};
use tokio_util::sync::CancellationToken;

use super::proof::continues;
use super::retry::Trouble;
use super::slice::Batch;
use super::trim::Marks;
use crate::domain::Position;
use crate::domain::change::Entry;
use crate::ledger::{self, Applied, PgConnection};
use crate::limits::{
    LEDGER_PING_EVERY, LEDGER_SILENCE_MAX, LEDGER_TRANSACTION_MAX, OUTBOX_TRIM_EVERY, RELAY_BLOCK, RELAY_BROKEN_RETRY, RELAY_CHANGES_GOAL,
    RELAY_CHANGES_MAX, RELAY_READ_BYTES_GOAL, RELAY_READ_ENTRIES_MAX, RELAY_REFUSED_RETRY, RELAY_TRANSIENT_TRIES,
};
use crate::store::partition::{State, Trouble as Obstacle};
use crate::store::stream::OutboxReader;
use crate::store::{self, Partition};

/// Carries one partition's changes.
pub struct Relay {
    /// What it shares with the other parts: it waits for `state`, and sets `applied`, `relay_trouble` and whether the ledger is up.
    pub partition: Arc<Partition>,
    pub redis_url: String,
    pub postgres_url: String,
    /// For how long after it was told to stop it goes on with what the outbox still holds.
    pub drain: Duration,
}

impl Relay {
    /// Carries until `cancel`, then what the outbox still holds, as far as the time for draining goes. Reconnects and retries by itself;
    /// what it cannot get over stands in `relay_trouble`.
    pub async fn run(self, cancel: CancellationToken) {
        let mut carrier = Carrier::new(self);
        let mut state = carrier.relay.partition.state.subscribe();
        while !cancel.is_cancelled() {
            let wait = match carrier.step().await {
                Next::Now => continue,
                Next::After(wait) => wait,
            };
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
                _ = state.changed() => {}
            }
        }
        carrier.drain().await;
    }
}

/// When the next pass is due.
enum Next {
    Now,
    After(Duration),
}

struct Carrier {
    relay: Relay,
    id: u32,
    label: String,
    ledger: Option<PgConnection>,
    /// When Postgres answered last.
    answered: Instant,
    reader: Option<OutboxReader>,
    /// Up to where the outbox has been read; `None` until it is proved that the outbox continues what Postgres has.
    cursor: Option<Position>,
    batch: Batch,
    /// What was read behind `batch` while Postgres was at work; `cursor` is at its end.
    ahead: Batch,
    /// Whether more may have arrived since `batch` was read ahead, and it has room.
    top_up: bool,
    /// How many changes a transaction may have: fewer after one that took too long.
    changes_max: usize,
    /// How many entries the next read asks for.
    entries_max: usize,
    marks: Marks,
    trimmed: Instant,
    postgres: Trouble,
    redis: Trouble,
    transaction: Trouble,
    stuck: Trouble,
}

impl Carrier {
    fn new(relay: Relay) -> Self {
        Self {
            id: relay.partition.id,
            label: relay.partition.id.to_string(),
            marks: Marks::new(relay.partition.bound.kept_bytes_max()),
            relay,
            ledger: None,
            answered: Instant::now(),
            reader: None,
            cursor: None,
            batch: Batch::default(),
            ahead: Batch::default(),
            top_up: false,
            changes_max: RELAY_CHANGES_MAX,
            entries_max: RELAY_READ_ENTRIES_MAX,
            trimmed: Instant::now(),
            postgres: Trouble::new("postgres"),
            redis: Trouble::new("reading the outbox"),
            transaction: Trouble::new("a transaction of the relay"),
            stuck: Trouble::new("the relay"),
        }
    }

    /// Does what is due next.
    async fn step(&mut self) -> Next {
        gauge!("holdfast_relay_lag_changes", "partition" => self.label.clone()).set(self.relay.partition.lag() as f64);
        if let Err(wait) = self.reach_ledger().await {
            return Next::After(wait);
        }
        let live = self.live_run_id();
        if live.is_none() {
            self.start_over();
            if self.relay.partition.relay_trouble.borrow().is_none() {
                return Next::After(LEDGER_PING_EVERY);
            }
        }
        if let Err(wait) = self.reach_outbox(live.as_deref()).await {
            return Next::After(wait);
        }
        let Some(cursor) = self.cursor else {
            return self.prove(live.is_some()).await;
        };
        self.trim().await;
        if self.batch.is_empty() {
            return self.read(cursor, RELAY_BLOCK).await;
        }
        if std::mem::take(&mut self.top_up) {
            return self.read(cursor, Duration::ZERO).await;
        }
        self.carry().await
    }

    /// Goes on while there is something in the outbox, time, and nothing in the way.
    async fn drain(mut self) {
        let deadline = Instant::now() + self.relay.drain;
        loop {
            let reading = self.batch.is_empty();
            let Some(cursor) = self.cursor.filter(|_| self.ledger.is_some() && self.reader.is_some()) else {
                tracing::info!(partition = self.id, "relay stopped; what the outbox still holds is carried after the next start");
                return;
            };
            if Instant::now() >= deadline {
                let left = self.relay.partition.lag();
                tracing::info!(
                    partition = self.id,
                    left,
                    "relay stopped before the outbox was empty; the rest is carried after the next start"
                );
                return;
            }
            let next = if reading { self.read(cursor, Duration::ZERO).await } else { self.carry().await };
            match next {
                Next::Now if reading && self.batch.is_empty() => {
                    tracing::info!(partition = self.id, applied = %cursor, "relay stopped; postgres has everything the outbox held");
                    return;
                }
                Next::Now => {}
                Next::After(_) if self.relay.partition.relay_trouble.borrow().is_some() => {
                    tracing::warn!(
                        partition = self.id,
                        "relay stopped at a change it could not carry; it tries again after the next start"
                    );
                    return;
                }
                Next::After(wait) => tokio::time::sleep(wait.min(deadline.saturating_duration_since(Instant::now()))).await,
            }
        }
    }

    /// The Redis process that was verified; `None` while the partition is not live.
    fn live_run_id(&self) -> Option<String> {
        match &*self.relay.partition.state.borrow() {
            State::Live { run_id, .. } => Some(run_id.clone()),
            State::Loading(_) | State::Rebuilding(_) => None,
        }
    }

    /// Forgets what was read: the outbox may have been replaced meanwhile.
    fn start_over(&mut self) {
        self.cursor = None;
        self.batch = Batch::default();
        self.ahead = Batch::default();
        self.top_up = false;
    }

    /// Makes sure that Postgres is there, asking it where it has said nothing for a while. Errors with how long to wait.
    async fn reach_ledger(&mut self) -> Result<(), Duration> {
        if let Some(connection) = &mut self.ledger {
            if self.answered.elapsed() < LEDGER_PING_EVERY {
                return Ok(());
            }
            match ledger::ping(connection).await {
                Ok(()) => {
                    self.ledger_answered();
                    return Ok(());
                }
                Err(error) => return Err(self.lose_ledger(&error)),
            }
        }
        match ledger::connect(&self.relay.postgres_url).await {
            Ok(connection) => {
                self.ledger = Some(connection);
                self.postgres.over(self.id);
                self.ledger_answered();
                Ok(())
            }
            Err(error) => {
                if matches!(error, ledger::Error::Unfit(_)) {
                    self.say(Some(Obstacle::Held(error.to_string())));
                }
                Err(self.lose_ledger(&error))
            }
        }
    }

    fn ledger_answered(&mut self) {
        self.answered = Instant::now();
        self.relay.partition.set_ledger_up(true);
    }

    /// Gives up the connection to Postgres, and with it what was read: which of it was committed, the row tells.
    fn lose_ledger(&mut self, error: &ledger::Error) -> Duration {
        self.ledger = None;
        self.start_over();
        self.relay.partition.set_ledger_up(false);
        self.postgres.failed(self.id, error)
    }

    /// Makes sure that the outbox can be read, while live from the Redis process that was verified. Errors with how long to wait.
    async fn reach_outbox(&mut self, live: Option<&str>) -> Result<(), Duration> {
        if self.reader.is_none() {
            match OutboxReader::open(&self.relay.redis_url).await {
                Ok(reader) => self.reader = Some(reader),
                Err(error) => return Err(self.lose_outbox(&error)),
            }
        }
        match &self.reader {
            Some(reader) if live.is_none_or(|run_id| reader.run_id() == run_id) => Ok(()),
            _ => {
                self.relay.partition.verify.notify_one();
                Err(self.lose_outbox(&"this is another redis process than the one that was verified"))
            }
        }
    }

    fn lose_outbox(&mut self, error: &impl std::fmt::Display) -> Duration {
        self.reader = None;
        self.start_over();
        self.redis.failed(self.id, error)
    }

    /// What to do about an error of Redis: a broken connection is replaced. What cannot be read a newer version may have written, which carries
    /// it; until then it waits, and sales go on.
    fn outbox_failed(&mut self, error: store::Error) -> Next {
        if let store::Error::Connection(_) = error {
            return Next::After(self.lose_outbox(&error));
        }
        self.stuck.failed(self.id, &error);
        self.say(Some(Obstacle::Held(error.to_string())));
        self.start_over();
        Next::After(RELAY_BROKEN_RETRY)
    }

    /// Says what is in the way, asks the verifier to look if it does not already, and begins again after a while.
    fn stop_for(&mut self, found: String, wait: Duration) -> Next {
        self.stuck.failed(self.id, &found);
        self.say(Some(Obstacle::Broken(found)));
        if self.live_run_id().is_some() {
            self.relay.partition.verify.notify_one();
        }
        self.start_over();
        Next::After(wait)
    }

    fn say(&self, trouble: Option<Obstacle>) {
        self.relay.partition.relay_trouble.send_if_modified(|said| {
            let new = *said != trouble;
            *said = trouble;
            new
        });
    }

    /// Shows that the outbox continues what Postgres has, and takes up the reading there. While the partition is not live it only finds out
    /// whether what was in the way still is.
    async fn prove(&mut self, live: bool) -> Next {
        let (Some(connection), Some(reader)) = (&mut self.ledger, &mut self.reader) else { return Next::Now };
        let row = match ledger::partition::load(connection, self.id).await {
            Ok(row) => row,
            Err(error) => return self.ledger_failed(error),
        };
        let found = async {
            let there = reader.entry_at(row.applied).await?;
            let after = reader.read_after(row.applied, 1, Duration::ZERO).await?.entries.pop();
            let last = if there.is_none() && after.is_none() { reader.last().await? } else { None };
            let kept = if self.marks.is_empty() { reader.memory().await.unwrap_or_default() } else { 0 };
            Ok((there, after, last, kept))
        };
        let (there, after, last, kept) = match found.await {
            Ok(found) => found,
            Err(error) => return self.outbox_failed(error),
        };
        self.redis.over(self.id);
        if let Err(broken) = continues(&row, there, after.clone(), last) {
            return self.stop_for(broken, RELAY_BROKEN_RETRY);
        }
        if !live || after.is_none() {
            self.unstuck();
        }
        if !live {
            return Next::After(RELAY_BROKEN_RETRY);
        }
        tracing::info!(partition = self.id, applied = %row.applied, "relay carries on");
        self.marks.retain_applied(row.applied);
        if self.marks.is_empty() {
            self.marks.push(row.applied, kept, Instant::now());
        }
        self.cursor = Some(row.applied);
        self.relay.partition.set_applied(row.applied);
        Next::Now
    }

    fn unstuck(&mut self) {
        self.stuck.over(self.id);
        self.say(None);
    }

    /// Reads a batch, or more of the one at hand: what is there, up to about as much as one transaction should have.
    async fn read(&mut self, cursor: Position, block: Duration) -> Next {
        let Some(reader) = &mut self.reader else { return Next::Now };
        match gather(reader, &self.relay.partition, cursor, self.entries_max, self.batch.changes(), block).await {
            Ok(found) => {
                self.entries_max = found.entries_max;
                self.cursor = Some(found.end);
                self.batch.extend(found.entries, found.bytes);
                Next::Now
            }
            // What came before is as good as ever; the next read meets the error again.
            Err(_) if !self.batch.is_empty() => Next::Now,
            Err(error) => self.outbox_failed(error),
        }
    }

    /// Applies the next slice of the batch. While Postgres works on the last one, what comes behind it is read.
    async fn carry(&mut self) -> Next {
        let slice = self.batch.slice(self.changes_max);
        let Some(connection) = self.ledger.take() else { return Next::Now };
        let (partition, id) = (&*self.relay.partition, self.id);
        let end = self.cursor.filter(|end| slice.last().is_some_and(|entry| entry.last == *end));
        let reading = async {
            let (reader, end) = (self.reader.as_mut()?, end?);
            // The next read meets an error again.
            gather(reader, partition, end, self.entries_max, 0, Duration::ZERO).await.ok()
        };
        let carrying = async {
            let began = Instant::now();
            let (connection, result) = match transact(connection, partition, slice, Refused::EndsIt).await {
                (Some(connection), Err(ledger::Error::Data(reason))) if slice.len() == 1 => {
                    tracing::warn!(partition = id, entry = %slice[0].last, reason, "postgres refuses a change: parked as a dead letter");
                    transact(connection, partition, slice, Refused::IsParked).await
                }
                other => other,
            };
            // Whoever waits for it does not wait for the read as well.
            if let Ok((applied, _)) = &result {
                partition.set_applied(applied.position);
            }
            (connection, result, began.elapsed().as_secs_f64())
        };
        let ((connection, result, seconds), found) = tokio::join!(carrying, reading);
        self.ledger = connection;
        if let Some(found) = found {
            self.entries_max = found.entries_max;
            self.cursor = Some(found.end);
            self.ahead.extend(found.entries, found.bytes);
        }
        match result {
            Ok((applied, parked)) => {
                if parked > 0 {
                    self.relay.partition.parked.notify_one();
                }
                self.carried(&applied, seconds);
                Next::Now
            }
            Err(error) => self.ledger_failed(error),
        }
    }

    fn carried(&mut self, applied: &Applied, seconds: f64) {
        self.ledger_answered();
        self.transaction.over(self.id);
        self.unstuck();
        counter!("holdfast_relay_applied_changes_total", "partition" => self.label.clone()).increment(applied.operations);
        histogram!("holdfast_relay_batch_changes", "partition" => self.label.clone()).record(applied.operations as f64);
        histogram!("holdfast_relay_transaction_seconds", "partition" => self.label.clone()).record(seconds);
        self.changes_max = (self.changes_max * 2).min(RELAY_CHANGES_MAX);
        if let Some((position, bytes)) = self.batch.advance() {
            self.marks.push(position, bytes as u64, Instant::now());
            self.batch = std::mem::take(&mut self.ahead);
            self.top_up = !self.batch.is_empty() && self.batch.changes() < RELAY_CHANGES_GOAL;
        }
    }

    /// What to do about an error of Postgres.
    fn ledger_failed(&mut self, error: ledger::Error) -> Next {
        use ledger::Error;
        match error {
            // Half of the slice may be all right: what stands before the cause is applied, until the cause stands alone.
            Error::Broken(_) | Error::Data(_) if self.batch.narrow() => return Next::Now,
            _ => counter!("holdfast_relay_retries_total", "partition" => self.label.clone()).increment(1),
        }
        match error {
            Error::Connection(_) => Next::After(self.lose_ledger(&error)),
            Error::Transient { .. } => {
                self.ledger_answered();
                let wait = self.transaction.failed(self.id, &error);
                if error.is_statement_timeout() {
                    self.changes_max = (self.changes_max / 2).max(1);
                }
                if self.transaction.failures().is_multiple_of(RELAY_TRANSIENT_TRIES) {
                    self.ledger = None;
                }
                Next::After(wait)
            }
            Error::Broken(found) => self.stop_for(found, RELAY_BROKEN_RETRY),
            Error::Data(_) | Error::Unfit(_) => {
                self.ledger_answered();
                self.stuck.failed(self.id, &error);
                self.say(Some(Obstacle::Held(error.to_string())));
                Next::After(RELAY_REFUSED_RETRY)
            }
        }
    }

    /// Removes from the outbox what nobody asks for any more.
    async fn trim(&mut self) {
        if self.trimmed.elapsed() < OUTBOX_TRIM_EVERY {
            return;
        }
        self.trimmed = Instant::now();
        let Some(reader) = &mut self.reader else { return };
        let Some(min) = self.marks.cut(Instant::now()) else { return };
        match reader.trim(min).await {
            Ok(removed) => tracing::debug!(partition = self.id, %min, removed, "outbox trimmed"),
            Err(error) => tracing::warn!(partition = self.id, %error, "trimming the outbox failed; a later cut takes this one's part"),
        }
    }
}

/// What was read of the outbox in a row.
struct Found {
    entries: Vec<Entry>,
    bytes: usize,
    /// The position of the last of them; where the read began, if there are none.
    end: Position,
    /// How many entries the next read should ask for.
    entries_max: usize,
}

/// Reads what stands behind `after`, until there is nothing more or a batch that has `had` changes already is full. Waits up to `block`
/// for the first entry.
async fn gather(
    reader: &mut OutboxReader,
    partition: &Partition,
    after: Position,
    entries_max: usize,
    had: usize,
    mut block: Duration,
) -> Result<Found, store::Error> {
    let mut found = Found { entries: Vec::new(), bytes: 0, end: after, entries_max };
    let mut changes = 0;
    while had + changes < RELAY_CHANGES_GOAL && found.bytes < RELAY_READ_BYTES_GOAL {
        let read = match reader.read_after(found.end, entries_max, block).await {
            Ok(read) => read,
            // What came before is as good as ever; the next read meets the error again.
            Err(_) if !found.entries.is_empty() => break,
            Err(error) => return Err(error),
        };
        let full = read.entries.len() == entries_max;
        found.bytes += read.bytes;
        changes += read.entries.iter().map(|entry| entry.operations.len()).sum::<usize>();
        found.end = read.entries.last().map_or(found.end, |entry| entry.last);
        found.entries.extend(read.entries);
        if !full {
            break;
        }
        block = Duration::ZERO;
    }
    if let Some(each) = changes.checked_div(found.entries.len()) {
        found.entries_max = RELAY_CHANGES_GOAL.div_ceil(each.max(1)).clamp(1, RELAY_READ_ENTRIES_MAX);
    }
    if found.end > after {
        partition.saw(found.end);
    }
    Ok(found)
}

/// What becomes of a change that Postgres refuses for its data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refused {
    /// Nothing of the slice happens.
    EndsIt,
    /// It becomes a dead letter, and the rest of the slice, which is one entry then, is applied.
    IsParked,
}

/// Applies a slice, and says how many lines of it were parked. The connection comes back unless it can no longer be used: a transaction that is given up is given up together with
/// its connection.
async fn transact(
    mut connection: PgConnection,
    partition: &Partition,
    slice: &[Entry],
    refused: Refused,
) -> (Option<PgConnection>, Result<(Applied, usize), ledger::Error>) {
    let result = {
        let mut applying = std::pin::pin!(async {
            match (slice, refused) {
                ([entry], Refused::IsParked) => ledger::apply_parking(&mut connection, partition.id, entry).await,
                _ => ledger::apply(&mut connection, partition.id, slice).await.map(|applied| (applied, 0)),
            }
        });
        match tokio::time::timeout(LEDGER_SILENCE_MAX, &mut applying).await {
            Ok(result) => Some(result),
            Err(_) => {
                partition.set_ledger_up(false);
                tokio::time::timeout(LEDGER_TRANSACTION_MAX, &mut applying).await.ok()
            }
        }
    };
    match result {
        Some(Err(error @ ledger::Error::Connection(_))) => (None, Err(error)),
        Some(Err(error)) => {
            if error.is_lock_timeout() {
                let blockers = ledger::blockers(&mut connection).await.unwrap_or_default().join(", ");
                tracing::warn!(partition = partition.id, blockers, "postgres: another session held a lock for more than a second");
            }
            (Some(connection), Err(error))
        }
        Some(Ok(applied)) => (Some(connection), Ok(applied)),
        None => (None, Err(ledger::Error::Connection(format!("no answer to a transaction within {} s", LEDGER_TRANSACTION_MAX.as_secs())))),
    }
}

#[cfg(test)]
mod tests;
