//! Fills Redis anew from Postgres, after it lost its data or holds another history than Postgres.
//!
//! One sidecar does it, the one that takes the next epoch. It fences Redis, so that nothing is decided meanwhile; saves into Postgres what
//! was answered and has not got there: what still stands in the outbox and what this process kept copies of; removes what is ours from
//! Redis; fills in what Postgres has at one moment; and opens it. What fails is begun anew by whoever verifies next.

use std::fmt::Display;
use std::time::{Duration, Instant};

use metrics::counter;
use tracing::{info, warn};

use super::handover;
use crate::domain::change::{Effect, Entry};
use crate::domain::coupon::CouponStep;
use crate::domain::{Id, Position, RequestId};
use crate::ledger::order::OrderRow;
use crate::ledger::refill::Snapshot;
use crate::ledger::salvage::{self, Answered, Saved, Without};
use crate::ledger::{self, PartitionRow, PgConnection};
use crate::limits::{
    HANDOVER_MAX, HANDOVER_WITHIN, REBUILD_LEASE, REBUILD_READ_ENTRIES, REBUILD_SORT, SALVAGE_CHANGES_MAX, SIDECAR_RENEW_EVERY,
};
use crate::store::coupon;
use crate::store::meta::{self, Meta};
use crate::store::partition::State;
use crate::store::stream::OutboxReader;
use crate::store::{self, Connection, Partition, refill};

/// What a rebuild works with.
pub struct Rebuild<'a> {
    pub partition: &'a Partition,
    pub redis_url: &'a str,
    pub postgres_url: &'a str,
    pub redis: &'a mut Connection,
    pub postgres: &'a mut PgConnection,
    /// This process.
    pub owner: &'a str,
    /// How long a REQUEST id is remembered.
    pub window_ms: i64,
}

/// What may take no longer than the right to rebuild lasts: a step that hangs is given up.
async fn step<T, E: Display>(doing: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    match tokio::time::timeout(REBUILD_LEASE, doing).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("Redis or Postgres does not answer".to_owned()),
    }
}

/// A step that Postgres may have to sort for first.
async fn slow_step<T, E: Display>(doing: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    match tokio::time::timeout(REBUILD_SORT, doing).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("Postgres does not answer".to_owned()),
    }
}

/// Waits until every other sidecar that runs has handed over what it answered before `epoch`, a minute at most, and holds the epoch meanwhile.
/// Errors where it was lost.
pub(super) async fn wait_for_others(postgres: &mut PgConnection, partition: u32, owner: &str, epoch: u64) -> Result<(), String> {
    let until = Instant::now() + HANDOVER_WITHIN;
    while !step(ledger::sidecar::have_all_handed_over(postgres, owner, epoch)).await? {
        if Instant::now() >= until {
            warn!(partition, "a sidecar that runs has not handed over what it answered: it does so later");
            break;
        }
        if !step(ledger::partition::renew_rebuild(postgres, partition, epoch, owner)).await? {
            return Err("another sidecar has taken the partition over".to_owned());
        }
        tokio::time::sleep(SIDECAR_RENEW_EVERY / 10).await;
    }
    Ok(())
}

/// Renews the right to fill Redis until it is lost. Returns why.
async fn until_lost(postgres: &mut PgConnection, partition: u32, epoch: u64, owner: &str) -> String {
    let mut lasts_until = Instant::now() + REBUILD_LEASE;
    loop {
        let asked = Instant::now();
        match tokio::time::timeout(REBUILD_LEASE, ledger::partition::renew_rebuild(postgres, partition, epoch, owner)).await {
            Ok(Ok(true)) => {
                lasts_until = asked + REBUILD_LEASE;
                tokio::time::sleep(REBUILD_LEASE / 4).await;
            }
            Ok(Ok(false)) => return "another sidecar has taken the rebuild over".to_owned(),
            // What is being saved locks the partition's row.
            Ok(Err(error)) if error.is_lock_timeout() && Instant::now() < lasts_until => {}
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return "Postgres does not answer".to_owned(),
        }
    }
}

/// Whether the outbox continues what Postgres has. A rebuild that was broken off may have moved Postgres past entries that it had not saved.
async fn is_chained(reader: &mut OutboxReader, row: &PartitionRow) -> Result<bool, store::Error> {
    if let Some(there) = reader.entry_at(row.applied).await? {
        return Ok(there.op == row.last_op);
    }
    let oldest = reader.read_after(Position::default(), 1, Duration::ZERO).await?.entries.pop();
    Ok(oldest.is_none_or(|oldest| oldest.last > row.applied))
}

impl Rebuild<'_> {
    /// Does it; `why` is what was found. `adopt_inbox`: what other programs changed in Postgres counts as told to Redis. Errors with what went
    /// wrong, for the log: then the partition stays closed.
    pub async fn run(mut self, row: &PartitionRow, meta: Option<&Meta>, why: &str, adopt_inbox: bool) -> Result<(), String> {
        let (id, owner) = (self.partition.id, self.owner);
        let Some(epoch) = self.take(row, meta).await? else {
            let wait = "another sidecar is filling Redis from Postgres";
            self.partition.state.send_replace(State::Rebuilding(wait.to_owned()));
            return Err(wait.to_owned());
        };
        warn!(partition = id, epoch, why, "filling redis from postgres");
        // Signs of life go over a connection of their own, beside the work.
        let mut lease = step(ledger::connect(self.postgres_url)).await?;
        tokio::select! {
            done = self.work(epoch, meta, adopt_inbox) => done,
            lost = until_lost(&mut lease, id, epoch, owner) => Err(lost),
        }
    }

    /// Takes the next epoch, or goes on under the one that this process took for a rebuild that failed.
    async fn take(&mut self, row: &PartitionRow, meta: Option<&Meta>) -> Result<Option<u64>, String> {
        let not_opened = meta.is_none_or(|meta| meta.epoch < row.epoch || (meta.epoch == row.epoch && !meta.live));
        if row.owner.as_deref() == Some(self.owner) && not_opened {
            let renewed = ledger::partition::renew_rebuild(self.postgres, self.partition.id, row.epoch, self.owner);
            return Ok(step(renewed).await?.then_some(row.epoch));
        }
        let to = meta.map_or(0, |meta| meta.epoch).max(row.epoch) + 1;
        let run_id = self.redis.run_id().to_owned();
        step(ledger::partition::take_epoch_to_rebuild(self.postgres, self.partition.id, row, to, &run_id, self.owner)).await
    }

    async fn work(&mut self, epoch: u64, meta: Option<&Meta>, adopt_inbox: bool) -> Result<(), String> {
        let (id, began) = (self.partition.id, Instant::now());
        self.say("saving what was answered");
        if !step(meta::fence(self.redis, epoch)).await? {
            return Err("another sidecar was faster".to_owned());
        }
        let newest = meta.map_or(0, |meta| meta.n).max(self.partition.head().n);
        let mut saved = self.salvage_outbox(epoch).await?;
        self.salvage_copies(epoch, &mut saved).await?;
        step(salvage::seal(self.postgres, id, epoch, adopt_inbox)).await?;
        counter!("holdfast_salvaged_total", "what" => "saved").increment(saved.saved as u64);
        counter!("holdfast_salvaged_total", "what" => "owed").increment(saved.owed as u64);
        self.say("removing what is there");
        let removed = refill::clear(self.redis, epoch).await.map_err(|error| error.to_string())?;
        let (products, coupons, requests) = self.fill(epoch).await?;
        counter!("holdfast_rebuilds_total").increment(1);
        let applied = *self.partition.applied.borrow();
        let lost = newest.saturating_sub(applied.n);
        if lost > 0 {
            warn!(partition = id, lost, "so many changes were only in what redis lost");
        }
        if saved.owed > 0 {
            warn!(partition = id, owed = saved.owed, "more was sold than there is now: see holdfast.dead_letter");
        }
        info!(
            partition = id,
            epoch,
            %applied,
            saved = saved.saved,
            owed = saved.owed,
            removed,
            products,
            coupons,
            requests,
            ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            "redis is filled and open"
        );
        Ok(())
    }

    fn say(&self, how_far: &str) {
        self.partition.state.send_replace(State::Rebuilding(format!("filling Redis from Postgres: {how_far}")));
    }

    /// Brings to Postgres what the outbox still holds: what continues Postgres at its own place, the rest by name at a new one; what else is of
    /// coupons waits for the copies.
    async fn salvage_outbox(&mut self, epoch: u64) -> Result<Saved, String> {
        let id = self.partition.id;
        let mut saved = Saved::default();
        let mut reader = step(OutboxReader::open(self.redis_url)).await?;
        if reader.run_id() != self.redis.run_id() {
            return Err("Redis was restarted meanwhile".to_owned());
        }
        let row = step(ledger::partition::load(self.postgres, id)).await?;
        let mut chained = match is_chained(&mut reader, &row).await {
            Ok(chained) => chained,
            Err(error) if error.is_about_what_is_there() => return self.set_aside(epoch, &error).await.map(|()| saved),
            Err(error) => return Err(error.to_string()),
        };
        let mut after = if chained { row.applied } else { Position::default() };
        loop {
            let entries = match reader.read_after(after, REBUILD_READ_ENTRIES, Duration::ZERO).await {
                Ok(read) => read.entries,
                Err(error) if error.is_about_what_is_there() => return self.set_aside(epoch, &error).await.map(|()| saved),
                Err(error) => return Err(error.to_string()),
            };
            let Some(last) = entries.last() else { return Ok(saved) };
            after = last.last;
            if chained {
                match ledger::apply(self.postgres, id, &entries).await {
                    Ok(applied) => saved.saved += usize::try_from(applied.operations).unwrap_or(usize::MAX),
                    Err(ledger::Error::Broken(_) | ledger::Error::Data(_)) => chained = false,
                    Err(error) => return Err(error.to_string()),
                }
            }
            if !chained {
                let (coupons, stock): (Vec<_>, Vec<_>) =
                    entries.iter().flat_map(answered).partition(|one| one.operation.coupon().is_some());
                self.save(epoch, &stock, &mut saved).await?;
                // The last serial under a REQUEST counts, which may be in a copy: they are saved together.
                step(handover::hand_over_these(self.partition, self.postgres, &coupons)).await?;
            }
        }
    }

    /// What cannot be read is kept for a person, under another name.
    async fn set_aside(&mut self, epoch: u64, error: &store::Error) -> Result<(), String> {
        let name = step(refill::set_outbox_aside(self.redis, epoch)).await?;
        warn!(partition = self.partition.id, %error, name, "the outbox cannot be read to its end: it is kept under another name");
        Ok(())
    }

    async fn save(&mut self, epoch: u64, answered: &[Answered], saved: &mut Saved) -> Result<(), String> {
        for answered in answered.chunks(SALVAGE_CHANGES_MAX) {
            let more = step(salvage::save(self.postgres, self.partition.id, epoch, self.window_ms, answered)).await?;
            saved.saved += more.saved;
            saved.owed += more.owed;
            saved.known += more.known;
        }
        Ok(())
    }

    /// Saves what this sidecar and the others that run have answered, in the order in which it took effect: waits until each of the others has
    /// handed its copies over, or its lease has passed, and does so itself.
    async fn salvage_copies(&mut self, epoch: u64, saved: &mut Saved) -> Result<(), String> {
        self.say("waiting for what other sidecars have answered");
        wait_for_others(self.postgres, self.partition.id, self.owner, epoch).await?;
        let ops = self.partition.copies.ops();
        handover::hand_over_all(self.partition, self.postgres, epoch).await.map_err(|error| error.to_string())?;
        slow_step(salvage::pass_over_repeated(self.postgres, self.partition.id, self.window_ms, false)).await?;
        loop {
            let handed = step(salvage::handed_over(self.postgres, self.partition.id, Without::These(&[]), HANDOVER_MAX)).await?;
            if handed.is_empty() {
                break;
            }
            self.save(epoch, &handed, saved).await?;
            step(salvage::settled(self.postgres, &handed)).await?;
        }
        slow_step(salvage::keep_serials(self.postgres, self.partition.id)).await?;
        let old = ops.into_iter().filter(|(_, position)| position.epoch < epoch).map(|(op, _)| op);
        self.partition.copies.forget_ops(&old.collect());
        Ok(())
    }

    /// Fills in what Postgres has, and opens. Returns how many products, coupons and REQUESTs there were.
    async fn fill(&mut self, epoch: u64) -> Result<(usize, usize, usize), String> {
        let id = self.partition.id;
        // A UUIDv7 may be a minute ahead of its time, and is asked for that much longer.
        let since_ms = step(self.redis.time_ms()).await? - self.window_ms - 60_000;
        let (partition, owner) = (self.partition, self.owner);
        let mut snapshot = step(Snapshot::take(self.postgres, id)).await?;
        let (mut products, mut coupons, mut requests) = (0, 0, 0);

        let pages = step(snapshot.products()).await?;
        loop {
            let rows = slow_step(snapshot.next(&pages)).await?;
            if rows.is_empty() {
                break;
            }
            products += rows.len();
            let rows: Vec<_> = rows
                .into_iter()
                .map(|row| refill::Product {
                    available: snapshot.expected(&row),
                    product: Id::from(row.product.as_str()),
                    held: row.held,
                    low: row.low,
                    frozen: row.frozen,
                })
                .collect();
            step(refill::products(self.redis, epoch, &rows)).await?;
            partition.state.send_replace(State::Rebuilding(format!("filling Redis from Postgres: {products} products")));
        }
        let deleted = step(snapshot.deleted()).await?;
        step(refill::deleted(self.redis, epoch, &deleted, snapshot.applied.n)).await?;

        let held = step(snapshot.held_of_deleted()).await?;
        step(refill::units_held(self.redis, epoch, &held)).await?;

        let pages = step(snapshot.orders()).await?;
        loop {
            let rows: Vec<OrderRow> = slow_step(snapshot.next(&pages)).await?;
            if rows.is_empty() {
                break;
            }
            let order = |row: OrderRow| Ok((Id::from(row.order.as_str()), row.order()?, row.changed_at_ms));
            let rows = rows.into_iter().map(order).collect::<Result<Vec<_>, ledger::Error>>().map_err(|error| error.to_string())?;
            step(refill::orders(self.redis, epoch, &rows)).await?;
        }

        let pages = step(snapshot.coupons()).await?;
        loop {
            let rows = slow_step(snapshot.next(&pages)).await?;
            if rows.is_empty() {
                break;
            }
            coupons += rows.len();
            let rows: Vec<_> = rows
                .into_iter()
                .map(|row| refill::Coupon {
                    coupon: Id::from(row.coupon.as_str()),
                    total: row.total,
                    issued: row.issued,
                    used: row.used,
                    serial: row.last_serial,
                    per_user: row.per_user,
                    start_ms: row.start_ms,
                    end_ms: row.end_ms,
                    deleted: row.deleted,
                })
                .collect();
            step(refill::coupons(self.redis, epoch, &rows)).await?;
        }

        let pages = step(snapshot.issued()).await?;
        let mut open: Vec<refill::Held> = Vec::new();
        loop {
            let rows = slow_step(snapshot.next(&pages)).await?;
            let ended = rows.is_empty();
            for row in rows {
                let one = coupon::Held { serial: row.serial, state: row.state, issued_at_ms: row.issued_at_ms, order: row.order };
                match open.last_mut().filter(|held| held.coupon.as_str() == row.coupon && held.user.as_str() == row.user) {
                    Some(held) => held.coupons.push(one),
                    None => open.push(refill::Held {
                        coupon: Id::from(row.coupon.as_str()),
                        user: Id::from(row.user.as_str()),
                        coupons: vec![one],
                    }),
                }
            }
            // The last user's coupons may go on with the next page.
            let whole = if ended { open.len() } else { open.len().saturating_sub(1) };
            step(refill::held(self.redis, epoch, &open[..whole])).await?;
            open.drain(..whole);
            if ended {
                break;
            }
        }

        let pages = step(snapshot.requests(since_ms)).await?;
        let mut open: Vec<refill::Request> = Vec::new();
        loop {
            let rows = slow_step(snapshot.next(&pages)).await?;
            let ended = rows.is_empty();
            for row in rows {
                let row: ledger::refill::Request = row;
                match open.last_mut().filter(|last| last.position == row.position()) {
                    Some(last) => last.integers.extend(row.numbers()),
                    None => open.push(request(&row)),
                }
            }
            // The last one's products may go on with the next page.
            let whole = if ended { open.len() } else { open.len().saturating_sub(1) };
            requests += whole;
            step(refill::requests(self.redis, epoch, &open[..whole], self.window_ms)).await?;
            open.drain(..whole);
            if ended {
                break;
            }
        }

        let (applied, last_op, mark) = (snapshot.applied, snapshot.last_op.clone(), snapshot.mark);
        step(snapshot.end()).await?;
        if !step(ledger::partition::finish_rebuild(self.postgres, id, epoch, owner)).await? {
            return Err("another sidecar has taken the rebuild over".to_owned());
        }
        partition.set_applied(applied);
        partition.see_anew(applied);
        partition.relay_trouble.send_replace(None);
        if !step(meta::open(self.redis, epoch, applied, &last_op, mark)).await? {
            return Err("another sidecar was faster".to_owned());
        }
        Ok((products, coupons, requests))
    }
}

/// The changes of an entry that clients asked for. What the server did by itself brought Redis and Postgres together, and is done anew.
fn answered(entry: &Entry) -> impl Iterator<Item = Answered> {
    let of_a_client = |effect: &Effect| match effect {
        Effect::Stock { kind, .. } => kind.moves_both(),
        Effect::Coupon { change, .. } => change.moves_both(),
    };
    entry.each().filter(move |(_, operation)| of_a_client(&operation.effect)).map(|(n, operation)| Answered {
        op: entry.op.clone(),
        origin: Position::new(entry.last.epoch, n),
        at_ms: entry.at_ms,
        operation,
    })
}

impl From<store::copies::Salvaged> for Answered {
    fn from(copy: store::copies::Salvaged) -> Self {
        Self { op: copy.op, origin: copy.origin, at_ms: copy.at_ms, operation: copy.operation }
    }
}

fn request(row: &ledger::refill::Request) -> refill::Request {
    let step = row.kind.strip_prefix("coupon.").and_then(CouponStep::parse);
    let word = match row.kind.as_str() {
        "reserve" | "extend" => "HELD",
        "confirm" => "CONFIRMED",
        "cancel" => "CANCELLED",
        _ => step.map_or("OK", CouponStep::word),
    };
    refill::Request {
        id: RequestId::of_escaped(&row.id),
        digest: row.digest.clone(),
        word,
        integers: row.numbers(),
        position: row.position(),
        at_ms: row.at_ms,
    }
}
