//! Compares Redis with Postgres before anything is sold: at start, whenever a script's guard does not match, and every few seconds.
//! Decides whether the partition is live, and under which epoch.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::handover;
use super::proof::continues;
use super::rebuild::{self, Rebuild};
use crate::domain::Position;
use crate::ledger;
use crate::ledger::partition::{EpochRow, NO_OP, PartitionRow};
use crate::ledger::salvage::{Origins, Without};
use crate::limits;
use crate::store::meta::{self, Look, Meta};
use crate::store::partition::{EndedEpoch, State, Trouble};
use crate::store::stream::OutboxReader;
use crate::store::{self, Connection, Partition, trial};

/// See the module.
pub struct Verifier {
    partition: Arc<Partition>,
    redis_url: String,
    postgres_url: String,
    /// This process, among the sidecars.
    instance: String,
    /// How long a REQUEST id is remembered.
    window_ms: i64,
    /// The Redis process on which the scripts were tried.
    tried: Option<String>,
    /// The epoch and run id that both sides agreed on last.
    verified: Option<(u64, String)>,
    /// The epoch under which it was found that Redis lost what another sidecar answered.
    missed: Option<u64>,
    /// The epochs as they were published last, and the version of what else was; `None` where that may have changed since.
    epochs: Option<(Vec<EpochRow>, (i64, i64))>,
}

/// What was found, and what follows from it.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    /// Both agree, under this epoch, on this Redis process.
    Live { epoch: u64 },
    /// Everything Postgres has is here and chained: open it under the next epoch.
    NextEpoch,
    /// Redis has lost something or holds another history: fill it from Postgres. Says what was found.
    Rebuild(String),
    /// A person has to decide. Says what was found and what to do.
    Closed(String),
}

/// Both sides, looked at one after the other.
struct Sight {
    row: PartitionRow,
    /// The newest change that this sidecar knew of before Redis was asked: what is sold from then on is no loss.
    seen: Position,
    look: Look,
}

/// What a look at both sides came to.
enum Verified {
    /// The state says it.
    Settled,
    /// Redis has to be filled.
    Rebuild { row: PartitionRow, meta: Option<Meta>, why: String },
}

impl Verifier {
    pub fn new(partition: Arc<Partition>, redis_url: &str, postgres_url: &str, instance: &str, window: Duration) -> Self {
        Self {
            partition,
            redis_url: redis_url.to_owned(),
            postgres_url: postgres_url.to_owned(),
            instance: instance.to_owned(),
            window_ms: i64::try_from(window.as_millis()).unwrap_or(i64::MAX),
            tried: None,
            verified: None,
            missed: None,
            epochs: None,
        }
    }

    /// Verifies until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut troubled = String::new();
        loop {
            let trouble = match cancel.run_until_cancelled(self.once()).await {
                None => return self.leave().await,
                Some(Ok(())) => String::new(),
                Some(Err(trouble)) => trouble,
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
                () = cancel.cancelled() => return self.leave().await,
                () = self.partition.verify.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
            // Many may ask at once, and a guard that keeps refusing may not turn this into a busy loop.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Says that this sidecar no longer runs, if Postgres is there to hear it: else its lease passes.
    async fn leave(&self) {
        let leaving = async {
            let mut postgres = ledger::connect(&self.postgres_url).await?;
            ledger::sidecar::leave(&mut postgres, &self.instance).await
        };
        if let Err(error) = leaving.await {
            info!(%error, "postgres was not told that this sidecar stops");
        }
    }

    async fn once(&mut self) -> Result<(), String> {
        loop {
            let verified = match tokio::time::timeout(limits::VERIFY_WITHIN, self.verify()).await {
                Ok(verified) => verified?,
                Err(_) => return Err("Redis or Postgres does not answer".to_owned()),
            };
            let Verified::Rebuild { row, meta, why } = verified else { return Ok(()) };
            let mut redis = Connection::open(&self.redis_url).await.map_err(|error| self.starting(&error))?;
            let mut postgres = ledger::connect(&self.postgres_url).await.map_err(|error| self.starting(&error))?;
            let rebuild = Rebuild {
                partition: &self.partition,
                redis_url: &self.redis_url,
                postgres_url: &self.postgres_url,
                redis: &mut redis,
                postgres: &mut postgres,
                owner: &self.instance,
                window_ms: self.window_ms,
            };
            // Opened, but sold on only once both sides have been compared.
            Box::pin(rebuild.run(&row, meta.as_ref(), &why, false)).await?;
        }
    }

    async fn verify(&mut self) -> Result<Verified, String> {
        let mut redis = Connection::open(&self.redis_url).await.map_err(|error| self.starting(&error))?;
        let mut postgres = match ledger::connect(&self.postgres_url).await {
            Ok(postgres) => postgres,
            Err(error) => return self.without_postgres(&mut redis, &error.to_string()).await,
        };
        if self.tried.as_deref() != Some(redis.run_id()) {
            trial::run(&mut redis).await.map_err(|error| self.starting(&error))?;
            self.tried = Some(redis.run_id().to_owned());
        }
        let mut found_before = false;
        loop {
            let sight = self.look(&mut redis, &mut postgres).await?;
            match self.compare(&mut redis, &mut postgres, &sight).await? {
                Finding::NextEpoch => self.next_epoch(&mut redis, &mut postgres, &sight).await?,
                Finding::Live { epoch } => {
                    self.go_live(&mut redis, &mut postgres, epoch, &sight.look).await?;
                    return Ok(Verified::Settled);
                }
                // Both sides cannot be read at one moment, and another sidecar may be at it: what shows twice is real.
                Finding::Closed(_) | Finding::Rebuild(_) if !found_before => found_before = true,
                Finding::Rebuild(why) => {
                    self.set(State::Rebuilding(why.clone()));
                    return Ok(Verified::Rebuild { row: sight.row, meta: sight.look.meta, why });
                }
                Finding::Closed(why) => {
                    self.set(State::Loading(why.clone()));
                    return Err(why);
                }
            }
        }
    }

    async fn look(&mut self, redis: &mut Connection, postgres: &mut ledger::PgConnection) -> Result<Sight, String> {
        let other = ledger::sidecar::renew(postgres, &self.instance, self.window_ms).await.map_err(|error| self.starting(&error))?;
        if let Some(other) = other.filter(|_| self.verified.is_none()) {
            return Err(self.starting(&format!(
                "this sidecar has idempotency.window_ms {}, and one that runs already {other}: give all of them the same",
                self.window_ms
            )));
        }
        let id = self.partition.id;
        let foreign = match self.verified {
            None => ledger::partition::is_mark_of_another_server(postgres, id).await.map_err(|error| self.starting(&error))?,
            Some(_) => false,
        };
        if foreign {
            return Err(self.starting(
                &"this Postgres was restored on another server, where transactions have other numbers: say which side is right with \
                  holdfast rebuild --from postgres or --from redis",
            ));
        }
        let row = ledger::partition::load(postgres, id).await.map_err(|error| self.starting(&error))?;
        let seen = self.partition.head();
        let look = match Look::at(redis, row.applied).await {
            Ok(look) => look,
            Err(error) if error.is_about_what_is_there() => {
                let why = format!(
                    "holdfast:meta or holdfast:outbox holds what does not belong there: {error}; a newer Holdfast may have written it, else say which \
                     side is right with holdfast rebuild --from postgres"
                );
                self.set(State::Loading(why.clone()));
                return Err(why);
            }
            Err(error) => return Err(self.starting(&error)),
        };
        self.note_epochs(postgres, &row).await.map_err(|error| self.starting(&error))?;
        self.partition.set_applied(row.applied);
        Ok(Sight { row, seen, look })
    }

    async fn compare(&mut self, redis: &mut Connection, postgres: &mut ledger::PgConnection, sight: &Sight) -> Result<Finding, String> {
        let Sight { row, seen, look } = sight;
        let finding = match decide(row, look, redis.run_id(), *seen) {
            Finding::Closed(why) => return Ok(Finding::Closed(why)),
            finding => finding,
        };
        let trouble = self.partition.relay_trouble.borrow().clone();
        if let Some(Trouble::Broken(_)) = trouble {
            // The relay may have met what a rebuild has put right since.
            match self.proof(row).await.map_err(|error| self.starting(&error))? {
                Ok(()) => _ = self.partition.relay_trouble.send_replace(None),
                Err(found) => return Ok(Finding::Rebuild(found)),
            }
        }
        if finding == Finding::NextEpoch && self.missed == Some(row.epoch) && row.owner.as_deref() == Some(&self.instance) {
            return Ok(Finding::Rebuild("changes that other sidecars answered are neither in Redis nor in Postgres".to_owned()));
        }
        if finding == Finding::NextEpoch && self.misses_copies(postgres, row).await.map_err(|error| self.starting(&error))? {
            return Ok(Finding::Rebuild("changes that were answered are neither in Redis nor in Postgres".to_owned()));
        }
        Ok(finding)
    }

    /// Whether the outbox continues what Postgres has, or what was found instead.
    async fn proof(&self, row: &PartitionRow) -> Result<Result<(), String>, store::Error> {
        let mut reader = OutboxReader::open(&self.redis_url).await?;
        let there = reader.entry_at(row.applied).await?;
        let after = reader.read_after(row.applied, 1, Duration::ZERO).await?.entries.pop();
        let last = if there.is_none() && after.is_none() { reader.last().await? } else { None };
        Ok(continues(row, there, after, last))
    }

    /// Whether anything that this process answered stands neither in the outbox nor in the ledger.
    async fn misses_copies(&self, postgres: &mut ledger::PgConnection, row: &PartitionRow) -> Result<bool, String> {
        let copied = self.partition.copies.ops().into_iter().map(|(op, _)| op).collect();
        self.misses(postgres, row, copied).await
    }

    /// Whether any of these batches stands neither in the outbox nor in the ledger.
    async fn misses(&self, postgres: &mut ledger::PgConnection, row: &PartitionRow, ops: BTreeSet<String>) -> Result<bool, String> {
        if ops.is_empty() {
            return Ok(false);
        }
        let mut reader = OutboxReader::open(&self.redis_url).await.map_err(|error| error.to_string())?;
        let (mut after, mut there) = (row.applied, HashSet::new());
        loop {
            let read = reader.read_after(after, limits::RELAY_READ_ENTRIES_MAX, Duration::ZERO).await.map_err(|error| error.to_string())?;
            let Some(last) = read.entries.last() else { break };
            after = last.last;
            there.extend(read.entries.into_iter().map(|entry| entry.op));
        }
        let absent: Vec<String> = ops.into_iter().filter(|op| !there.contains(op)).collect();
        let known = ledger::salvage::known_ops(postgres, &absent).await.map_err(|error| error.to_string())?;
        Ok(known < absent.len())
    }

    /// Takes the next epoch and opens Redis under it. Other sidecars that run may have answered what this Redis lost: then they are waited for
    /// first, and if anything is missing, Redis is filled under that epoch instead.
    async fn next_epoch(&mut self, redis: &mut Connection, postgres: &mut ledger::PgConnection, sight: &Sight) -> Result<(), String> {
        let (id, row) = (self.partition.id, &sight.row);
        let n = sight.look.meta.as_ref().map_or(0, |meta| meta.n);
        let taken = if row.owner.as_deref() == Some(&self.instance) {
            // Taken before, and the others were not done in time: under another epoch they would begin anew.
            let renewed = ledger::partition::renew_rebuild(postgres, id, row.epoch, &self.instance).await;
            renewed.map(|renewed| renewed.then_some(row.epoch))
        } else {
            // With nobody to wait for, no epoch is held by anyone.
            let alone = ledger::sidecar::have_all_handed_over(postgres, &self.instance, row.epoch + 1).await;
            match alone.map_err(|error| self.starting(&error))? {
                true => ledger::partition::take_epoch(postgres, id, row, redis.run_id(), n).await,
                false => ledger::partition::take_epoch_to_rebuild(postgres, id, row, row.epoch + 1, redis.run_id(), &self.instance).await,
            }
        };
        let Some(epoch) = taken.map_err(|error| self.starting(&error))? else {
            // Another sidecar took it, or is filling Redis.
            tokio::time::sleep(Duration::from_millis(20)).await;
            return Ok(());
        };
        if !self.have_others_lost_nothing(postgres, row, epoch, n).await? {
            // The row is ours: the next look finds that Redis has to be filled.
            return Ok(());
        }
        if meta::attach(redis, sight.look.meta.as_ref(), epoch).await.map_err(|error| self.starting(&error))? {
            info!(epoch, run_id = redis.run_id(), n, "opened under a new epoch");
        }
        Ok(())
    }

    /// Waits for the sidecars that run. Whether all that they have answered stands in the outbox or in the ledger; if so, the epoch is nobody's
    /// any more.
    async fn have_others_lost_nothing(
        &mut self,
        postgres: &mut ledger::PgConnection,
        row: &PartitionRow,
        epoch: u64,
        n: u64,
    ) -> Result<bool, String> {
        let owned = ledger::partition::load(postgres, self.partition.id).await.map_err(|error| self.starting(&error))?;
        if owned.owner.as_deref() != Some(&self.instance) {
            return Ok(true);
        }
        rebuild::wait_for_others(postgres, self.partition.id, &self.instance, epoch).await?;
        let handed = ledger::salvage::handed_over(postgres, self.partition.id, Without::These(&[]), i64::MAX).await;
        let handed = handed.map_err(|error| self.starting(&error))?;
        let mut known = HashSet::new();
        for handed in handed.chunks(limits::SALVAGE_CHANGES_MAX) {
            let of_these = ledger::salvage::known(postgres, self.partition.id, self.window_ms, handed).await;
            known.extend(of_these.map_err(|error| self.starting(&error))?);
        }
        let left = handed.into_iter().filter(|one| !known.contains(&one.name()));
        if self.misses(postgres, row, left.map(|one| one.op).collect()).await? {
            self.partition.verify.notify_one();
            self.missed = Some(epoch);
            return Ok(false);
        }
        let let_go = ledger::partition::let_go(postgres, self.partition.id, epoch, &self.instance, n).await;
        let_go.map_err(|error| self.starting(&error))
    }

    /// Both sides agree. What this process answered under an earlier epoch, and neither side has, is handed over first.
    async fn go_live(
        &mut self,
        redis: &mut Connection,
        postgres: &mut ledger::PgConnection,
        epoch: u64,
        look: &Look,
    ) -> Result<(), String> {
        let ended = self.partition.ended.borrow().clone();
        handover::hand_over(&self.partition, postgres, epoch, &ended).await.map_err(|error| self.starting(&error))?;
        let head = self.partition.head();
        if head.epoch < epoch && head.n > look.meta.as_ref().map_or(0, |meta| meta.n) {
            self.partition.see_anew(look.newest.as_ref().map_or(*self.partition.applied.borrow(), |newest| newest.last));
        }
        if let Some(newest) = &look.newest {
            self.partition.saw(newest.last);
        }
        self.verified = Some((epoch, redis.run_id().to_owned()));
        self.set(State::Live { epoch, run_id: redis.run_id().to_owned() });
        handover::take_up(&self.partition, redis, postgres, self.window_ms).await
    }

    /// Before the first time, the reason is what a client is told; later the state stays, and the lanes see for themselves.
    fn starting(&self, error: &impl Display) -> String {
        let why = error.to_string();
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
    async fn without_postgres(&self, redis: &mut Connection, error: &str) -> Result<Verified, String> {
        let (seen, applied) = (self.partition.head(), *self.partition.applied.borrow());
        let found = Look::at(redis, applied).await.map_err(|error| self.starting(&error))?;
        if let (Some(meta), Some((epoch, run_id))) = (&found.meta, &self.verified)
            && meta.live
            && meta.epoch == *epoch
            && meta.run_id == *run_id
            && run_id == redis.run_id()
            && meta.n >= seen.n
        {
            self.set(State::Live { epoch: *epoch, run_id: run_id.clone() });
            return Ok(Verified::Settled);
        }
        Err(self.starting(&error))
    }

    async fn note_epochs(&mut self, postgres: &mut ledger::PgConnection, row: &PartitionRow) -> Result<(), ledger::Error> {
        let epochs = ledger::partition::epochs(postgres, self.partition.id).await?;
        let version = ledger::salvage::origins_version(postgres, self.partition.id).await?;
        let known = self.epochs.as_ref().is_some_and(|known| *known == (epochs.clone(), version));
        if known {
            return Ok(());
        }
        let mut origins = ledger::salvage::origins(postgres, self.partition.id).await?;
        let ended = |origins: &Origins| -> Vec<EndedEpoch> {
            let of = |epochs: &HashMap<u64, Vec<u64>>, epoch| epochs.get(&epoch).cloned().unwrap_or_default();
            let ended = epochs.iter().filter_map(|row| {
                let (saved, waiting) = (of(&origins.saved, row.epoch), of(&origins.waiting, row.epoch));
                Some(EndedEpoch { epoch: row.epoch, last_n: row.last_n?, saved, waiting })
            });
            ended.collect()
        };
        // What this process has answered itself is handed over before anything is said to be lost.
        if handover::hand_over(&self.partition, postgres, row.epoch, &ended(&origins)).await? {
            origins = ledger::salvage::origins(postgres, self.partition.id).await?;
        }
        self.partition.set_ended(ended(&origins));
        // While somebody fills Redis more may be saved at any time.
        self.epochs = row.owner.is_none().then_some((epochs, version));
        Ok(())
    }
}

/// The table of design 8; the first row that fits counts. `seen` is the newest change this sidecar knows of.
fn decide(row: &PartitionRow, look: &Look, run_id: &str, seen: Position) -> Finding {
    let Some(meta) = &look.meta else {
        // Nothing was ever applied, and nothing has been seen: an installation that begins.
        if row.applied.n == 0 && seen.n == 0 && look.newest.is_none() {
            return Finding::NextEpoch;
        }
        return Finding::Rebuild(format!("this Redis is empty, but Postgres has changes up to {}", row.applied));
    };
    if meta.epoch > row.epoch {
        return Finding::Closed(format!(
            "Redis is at epoch {} and Postgres at {}: Postgres was restored from a backup, or is another one; give postgres.url the right one, \
             or say which side is right with holdfast rebuild --from redis or --from postgres",
            meta.epoch, row.epoch
        ));
    }
    if meta.adopted {
        return Finding::Closed(
            "holdfast rebuild --from redis is at work, or was broken off: run it again, or say that Postgres is right with --from postgres"
                .to_owned(),
        );
    }
    if let Some(oldest) = look.oldest.as_ref().filter(|oldest| oldest.first_n > row.applied.n + 1) {
        return Finding::Closed(format!(
            "the outbox in Redis begins at n {}, but Postgres has changes only up to {}: Postgres was restored from a backup, or the outbox was cut; \
             say which side is right with holdfast rebuild --from redis or --from postgres",
            oldest.first_n, row.applied
        ));
    }
    // What was seen under an earlier epoch may have been lost and counted anew under this one.
    let newest = if seen.epoch >= meta.epoch { seen.n.max(row.applied.n) } else { row.applied.n };
    if meta.n < newest {
        return Finding::Rebuild(format!("Redis is at {} and has lost changes up to {newest}", meta.n));
    }
    let tail_fits = match &look.newest {
        Some(newest) => newest.last.n == meta.n && newest.op == meta.last,
        // Cut to the end, by hand, or filled anew: nothing is lost if Postgres has all of it.
        None => meta.n == 0 || (meta.n == row.applied.n && meta.last == row.last_op),
    };
    let continued = |entry: &crate::domain::change::Entry| entry.first_n == row.applied.n + 1 && entry.prev == row.last_op;
    let chained = match &look.at_applied {
        Some(entry) => entry.op == row.last_op,
        None if row.applied.n == 0 => look.oldest.as_ref().is_none_or(|oldest| oldest.prev == NO_OP),
        None => look.oldest.as_ref().is_none_or(continued),
    };
    if !tail_fits || !chained {
        return Finding::Rebuild(format!("the outbox in Redis does not continue what Postgres has at {}", row.applied));
    }
    if !meta.live {
        return Finding::Rebuild("filling Redis was broken off".to_owned());
    }
    if meta.epoch == row.epoch && meta.run_id == run_id {
        return Finding::Live { epoch: meta.epoch };
    }
    Finding::NextEpoch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::change::Entry;
    use crate::store::meta::Meta;

    fn row(epoch: u64, n: u64) -> PartitionRow {
        let last_op = if n == 0 { "-".into() } else { format!("op{n}") };
        PartitionRow { epoch, applied: Position::new(epoch, n), last_op, owner: None }
    }

    fn entry(n: u64, op: &str, prev: &str) -> Entry {
        Entry { last: Position::new(1, n), first_n: n, prev: prev.into(), op: op.into(), at_ms: 0, operations: Vec::new() }
    }

    /// A Redis at n, with the outbox from behind the applied position's entry on.
    fn look(epoch: u64, run_id: &str, applied: u64, n: u64) -> Look {
        let meta = Meta { epoch, run_id: run_id.into(), live: true, adopted: false, n, last: format!("op{n}") };
        let newest = entry(n, &format!("op{n}"), "op0");
        Look {
            meta: Some(meta),
            newest: Some(newest),
            at_applied: Some(entry(applied, &format!("op{applied}"), "op0")),
            oldest: Some(entry(1, "op1", "-")),
        }
    }

    fn is_rebuild(finding: &Finding) -> bool {
        matches!(finding, Finding::Rebuild(_))
    }

    #[test]
    fn a_fresh_installation_opens_under_the_first_epoch() {
        assert_eq!(decide(&row(0, 0), &Look::default(), "r", Position::new(3, 0)), Finding::NextEpoch);
    }

    #[test]
    fn the_same_process_and_epoch_is_live_at_once() {
        assert_eq!(decide(&row(3, 5), &look(3, "r", 5, 9), "r", Position::new(3, 9)), Finding::Live { epoch: 3 });
    }

    #[test]
    fn another_process_with_everything_in_it_gets_the_next_epoch() {
        assert_eq!(decide(&row(3, 5), &look(3, "old", 5, 9), "new", Position::new(3, 9)), Finding::NextEpoch);
        assert_eq!(decide(&row(4, 5), &look(3, "old", 5, 9), "old", Position::new(3, 9)), Finding::NextEpoch, "an attach was interrupted");
    }

    #[test]
    fn what_was_seen_under_an_earlier_epoch_is_no_measure_of_a_later_one() {
        assert_eq!(decide(&row(3, 5), &look(3, "r", 5, 9), "r", Position::new(2, 50)), Finding::Live { epoch: 3 });
    }

    #[test]
    fn what_was_filled_anew_is_live_before_and_after_its_first_sale() {
        let filled = Look { newest: None, at_applied: None, oldest: None, ..look(3, "r", 5, 5) };
        assert_eq!(decide(&row(3, 5), &filled, "r", Position::new(3, 5)), Finding::Live { epoch: 3 });
        let sold = entry(6, "op6", "op5");
        let sold = Look { newest: Some(sold.clone()), at_applied: None, oldest: Some(sold), ..look(3, "r", 5, 6) };
        assert_eq!(decide(&row(3, 5), &sold, "r", Position::new(3, 6)), Finding::Live { epoch: 3 });
        let mut broken_off = filled;
        broken_off.meta.as_mut().unwrap().live = false;
        assert!(is_rebuild(&decide(&row(3, 5), &broken_off, "r", Position::new(3, 5))));
    }

    #[test]
    fn nothing_is_sold_on_an_empty_older_cut_or_foreign_redis() {
        assert!(is_rebuild(&decide(&row(3, 5), &Look::default(), "r", Position::new(3, 0))), "emptied");
        assert!(is_rebuild(&decide(&row(3, 5), &look(3, "r", 4, 4), "r", Position::new(3, 0))), "below what Postgres has");
        assert!(is_rebuild(&decide(&row(3, 5), &look(3, "r", 5, 7), "r", Position::new(3, 8))), "below what this sidecar saw");
        assert!(matches!(decide(&row(2, 5), &look(3, "r", 5, 9), "r", Position::new(3, 0)), Finding::Closed(_)), "Postgres is older");
        let behind = Look { oldest: Some(entry(8, "op8", "op7")), ..look(3, "r", 5, 9) };
        assert!(matches!(decide(&row(3, 5), &behind, "r", Position::new(3, 0)), Finding::Closed(_)), "Postgres is older, or it was cut");
        let cut = Look { at_applied: None, ..look(3, "r", 5, 9) };
        assert!(is_rebuild(&decide(&row(3, 5), &cut, "r", Position::new(3, 0))), "trimmed beyond what was applied");
        let fork = Look { at_applied: Some(entry(5, "other", "-")), ..look(3, "r", 5, 9) };
        assert!(is_rebuild(&decide(&row(3, 5), &fork, "r", Position::new(3, 0))), "another history");
        let end = Look { newest: Some(entry(8, "op8", "-")), ..look(3, "r", 5, 9) };
        assert!(is_rebuild(&decide(&row(3, 5), &end, "r", Position::new(3, 0))), "the stream's end is not meta's");
        let gone = Look { newest: None, at_applied: None, oldest: None, ..look(3, "r", 5, 9) };
        assert!(is_rebuild(&decide(&row(3, 5), &gone, "r", Position::new(3, 0))), "the stream is gone, with changes in it");
        assert_eq!(
            decide(&row(3, 9), &gone, "r", Position::new(3, 0)),
            Finding::Live { epoch: 3 },
            "the stream is gone, and Postgres has all of it"
        );
    }
}
