//! Changes that Redis made and Postgres refuses for their data: their rows are in the ledger, their units are owed.
//!
//! What Redis holds is, at every moment, what Postgres has and what is owed to it. So a change that is parked, retried or dropped moves
//! both in one transaction, and nothing that compares the two sees a difference.

use std::collections::{BTreeMap, HashMap};

use sqlx::{Connection, PgConnection};

use super::apply::{Applied, advance, check_epochs, continuation, what_is_created};
use super::changes::{Changes, Created};
use super::partition::{self, id};
use super::{Error, coupon_write, from_bigint, inbox, outside, salvage, to_bigint, write};
use crate::domain::change::{Effect, Entry, Item, Operation};
use crate::domain::coupon::CouponChange;
use crate::domain::{DeadLetter, InboxMark, OrderChange, Position, Settled};
use crate::limits;

/// Why a product is frozen that has a dead letter.
pub const FROZEN: &str = "Postgres refused a change of it: see HOLDFAST.DEADLETTER LIST, then STOCK.UNFREEZE";

/// Applies one entry of which Postgres refuses something: what works is applied, operation by operation where it must be, and the rest is
/// parked, all in one transaction. Returns how many lines were parked, too.
///
/// Of an operation over several products only the lines that Postgres refuses are parked: it was decided as a whole in Redis, and its other
/// products are as sold as before. Their product is frozen; a coupon is not.
///
/// Errors as [`apply`](super::apply) does; with [`Error::Data`] only where not even the ledger takes a row.
pub async fn apply_parking(connection: &mut PgConnection, partition: u32, entry: &Entry) -> Result<(Applied, usize), Error> {
    let mut transaction = connection.begin().await?;
    match park_in(&mut transaction, partition, entry).await {
        Ok(done) => {
            transaction.commit().await?;
            Ok(done)
        }
        Err(error) => {
            transaction.rollback().await?;
            Err(error)
        }
    }
}

async fn park_in(connection: &mut PgConnection, partition: u32, entry: &Entry) -> Result<(Applied, usize), Error> {
    let Some(row) = partition::lock(connection, partition).await? else {
        return Err(Error::Broken(format!("holdfast.partition has no row for partition {partition}: it was emptied while Holdfast ran")));
    };
    if continuation(&row, std::slice::from_ref(entry)).map_err(Error::Broken)?.is_empty() {
        return Ok((Applied { position: row.applied, last_op: row.last_op, operations: 0 }, 0));
    }
    check_epochs(connection, partition, &row, std::slice::from_ref(entry)).await?;
    let mut mark = partition::mark(connection, partition).await?;
    let mut parked = 0;
    // From the front, since what an operation comes to depends on those before it.
    let mut parts = vec![(0, entry.operations.len())];
    while let Some((from, to)) = parts.pop() {
        let part = part_of(entry, from, to);
        let mut savepoint = connection.begin().await?;
        match apply_part(&mut savepoint, partition, mark, &part).await {
            Ok(reached) => {
                savepoint.commit().await?;
                mark = reached;
            }
            Err(Error::Data(_)) if to - from > 1 => {
                savepoint.rollback().await?;
                let middle = from.midpoint(to);
                parts.extend([(middle, to), (from, middle)]);
            }
            Err(Error::Data(reason)) => {
                savepoint.rollback().await?;
                parked += park(connection, partition, mark, &part, &reason).await?;
                mark = mark.max(mark_of(&part));
            }
            Err(error) => return Err(error),
        }
    }
    advance(connection, partition, &row, std::slice::from_ref(entry), Some(mark)).await?;
    let operations = entry.operations.iter().map(Operation::count).sum();
    Ok((Applied { position: entry.last, last_op: entry.op.clone(), operations }, parked))
}

/// The lines from `from` up to, not including, `to`, as an entry of their own.
fn part_of(entry: &Entry, from: usize, to: usize) -> Entry {
    let count = |operations: &[Operation]| operations.iter().map(Operation::count).sum::<u64>();
    let first_n = entry.first_n + count(&entry.operations[..from]);
    let operations = entry.operations[from..to].to_vec();
    let last = Position::new(entry.last.epoch, first_n + count(&operations) - 1);
    Entry { last, first_n, operations, ..entry.clone() }
}

fn mark_of(part: &Entry) -> InboxMark {
    let marks = part.operations.iter().map(|operation| match &operation.effect {
        Effect::Stock { detail, .. } => detail.mark.unwrap_or_default(),
        _ => InboxMark::default(),
    });
    marks.max().unwrap_or_default()
}

async fn apply_part(connection: &mut PgConnection, partition: u32, mark: InboxMark, part: &Entry) -> Result<InboxMark, Error> {
    let created = what_is_created(connection, mark, std::slice::from_ref(part)).await?;
    let changes = Changes::gather([part], &created)?;
    write::changes(connection, partition, &changes).await?;
    balance_ended(connection, part.operations.iter()).await?;
    Ok(changes.mark.map_or(mark, |reached| reached.max(mark)))
}

/// Writes the ledger's rows of one operation, applies those of its lines that Postgres takes, and parks the others.
async fn park(connection: &mut PgConnection, partition: u32, mark: InboxMark, part: &Entry, reason: &str) -> Result<usize, Error> {
    let created = what_is_created(connection, mark, std::slice::from_ref(part)).await?;
    let changes = Changes::gather([part], &created)?;
    write::ledgers(connection, partition, &changes).await?;
    let Some(operation) = part.operations.first() else { return Ok(0) };
    let Effect::Stock { items, .. } = &operation.effect else {
        insert(connection, partition, part, operation, &Letter { i: 0, product: None, delta: 0, reason }).await?;
        coupon_write::keep_serials(connection, std::iter::once(operation)).await?;
        return Ok(1);
    };
    // An order is what it is, also where its units are owed.
    let mut savepoint = connection.begin().await?;
    let mut of_orders = 0;
    match write::orders(&mut savepoint, partition, &changes).await {
        Ok(()) => savepoint.commit().await?,
        Err(Error::Data(reason)) => {
            savepoint.rollback().await?;
            insert(connection, partition, part, operation, &Letter { i: 0, product: None, delta: 0, reason: &reason }).await?;
            of_orders = 1;
        }
        Err(error) => return Err(error),
    }
    let mut refused = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let Some(reason) = move_alone(connection, &line_of(part, i, item), &created).await? else { continue };
        refused.push((i, item.product.as_str(), reason));
        // What is held moves all the same.
        if let Some(more) = move_alone(connection, &line_of(part, i, &Item { delta: 0, ..item.clone() }), &created).await? {
            tracing::warn!(product = item.product, error = more, "postgres does not take what is held of a product either");
        }
    }
    let mut frozen = BTreeMap::new();
    for (i, product, reason) in &refused {
        let delta = changes.stock_lines.iter().find(|line| line.i == *i).map_or(0, |line| line.pg_delta);
        insert(connection, partition, part, operation, &Letter { i: *i, product: Some(product), delta, reason }).await?;
        frozen.insert(*product, Some(FROZEN));
    }
    for balanced in try_to_balance(connection, std::iter::once(operation)).await? {
        frozen.remove(balanced.as_str());
    }
    write::try_to_freeze(connection, frozen).await?;
    Ok(refused.len() + of_orders)
}

/// One product's part of the operation that is all of `part`.
fn line_of(part: &Entry, i: usize, item: &Item) -> Entry {
    let mut alone = part.clone();
    for operation in &mut alone.operations {
        if let Effect::Stock { items, detail, .. } = &mut operation.effect {
            *items = vec![item.clone()];
            if let Some(order) = &mut detail.order {
                order.units = order.units.get(i).copied().into_iter().collect();
            }
        }
    }
    alone
}

/// Moves what it moves. Returns why Postgres refuses that for its data.
async fn move_alone(connection: &mut PgConnection, alone: &Entry, created: &Created) -> Result<Option<String>, Error> {
    let mut savepoint = connection.begin().await?;
    match write::moves(&mut savepoint, &Changes::gather([alone], created)?).await {
        Ok(()) => {
            savepoint.commit().await?;
            Ok(None)
        }
        Err(Error::Data(reason)) => {
            savepoint.rollback().await?;
            Ok(Some(reason))
        }
        Err(error) => Err(error),
    }
}

struct Letter<'a> {
    i: usize,
    product: Option<&'a str>,
    delta: i64,
    reason: &'a str,
}

async fn insert(
    connection: &mut PgConnection,
    partition: u32,
    part: &Entry,
    operation: &Operation,
    letter: &Letter<'_>,
) -> Result<(), Error> {
    let line = operation.to_string();
    sqlx::query(
        "INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, product_id, kind, delta, in_redis, reason, line) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, true, $10, $11)",
    )
    .bind(id(partition))
    .bind(to_bigint(part.last.epoch))
    .bind(to_bigint(part.first_n))
    .bind(i32::try_from(letter.i).unwrap_or(i32::MAX))
    .bind(&part.op)
    .bind(i32::try_from(operation.k).unwrap_or(i32::MAX))
    .bind(letter.product)
    .bind(line.split(' ').nth(1).unwrap_or_default())
    .bind(letter.delta)
    .bind(letter.reason)
    .bind(&line)
    .execute(connection)
    .await?;
    Ok(())
}

/// The oldest dead letters, at most `count`.
pub async fn list(connection: &mut PgConnection, partition: u32, count: usize) -> Result<Vec<DeadLetter>, Error> {
    type Columns = (i64, i64, i64, Option<String>, String, i64, String, i64);
    let rows: Vec<Columns> = sqlx::query_as(
        "SELECT id, epoch, n, product_id, kind, delta, reason, (extract(epoch FROM at) * 1000)::bigint \
         FROM holdfast.dead_letter WHERE partition = $1 ORDER BY id LIMIT $2",
    )
    .bind(id(partition))
    .bind(i64::try_from(count).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await?;
    let letter = |(id, epoch, n, product, kind, delta, reason, at_ms)| DeadLetter {
        id,
        position: Position::new(from_bigint(epoch), from_bigint(n)),
        product,
        kind,
        delta,
        reason,
        at_ms,
    };
    Ok(rows.into_iter().map(letter).collect())
}

/// By how much those of each coupon would still move what its rows in the ledger say has moved: total, issued, used.
pub(super) async fn owed_by_coupons(connection: &mut PgConnection) -> Result<HashMap<String, [i64; 3]>, Error> {
    let mut owed: HashMap<String, [i64; 3]> = HashMap::new();
    let letters: Vec<String> = sqlx::query_scalar(
        "SELECT d.line FROM holdfast.dead_letter d WHERE d.kind LIKE 'coupon.%' \
         AND EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.op = d.op AND l.k = d.k)",
    )
    .fetch_all(connection)
    .await?;
    for line in letters {
        let operation = Operation::decode(&line).map_err(|error| Error::Unfit(format!("holdfast.dead_letter: {error}")))?;
        let Effect::Coupon { coupon, change } = operation.effect else { continue };
        let sums = owed.entry(coupon).or_default();
        sums.iter_mut().zip(change.moves()).for_each(|(sum, by)| *sum += by);
    }
    Ok(owed)
}

/// Redis is filled anew, without what those of coupons say: they have no units that it could be given.
pub(super) async fn coupons_left_redis(connection: &mut PgConnection, partition: u32) -> Result<(), Error> {
    sqlx::query("UPDATE holdfast.dead_letter SET in_redis = false WHERE partition = $1 AND in_redis AND kind LIKE 'coupon.%'")
        .bind(id(partition))
        .execute(connection)
        .await?;
    Ok(())
}

/// How many there are.
pub async fn count(connection: &mut PgConnection, partition: u32) -> Result<u64, Error> {
    let count = sqlx::query_scalar("SELECT count(*) FROM holdfast.dead_letter WHERE partition = $1").bind(id(partition));
    Ok(from_bigint(count.fetch_one(connection).await?))
}

/// A product that is frozen for a dead letter.
#[derive(Debug, sqlx::FromRow)]
pub struct Frozen {
    pub product: String,
    /// The newest of its dead letters.
    pub letter: i64,
    n: i64,
}

impl Frozen {
    /// Up to where the outbox had been applied by then.
    pub fn n(&self) -> u64 {
        from_bigint(self.n)
    }
}

/// The products of dead letters behind `after` that no person has unfrozen since, in the order of their newest, a bounded number.
pub async fn frozen(connection: &mut PgConnection, partition: u32, after: i64) -> Result<Vec<Frozen>, Error> {
    let frozen = sqlx::query_as(
        "SELECT d.product_id AS product, max(d.id) AS letter, p.applied_n AS n FROM holdfast.dead_letter d \
         JOIN holdfast.partition p ON p.id = d.partition LEFT JOIN holdfast.stock s USING (product_id) \
         WHERE d.partition = $1 AND d.id > $2 AND d.product_id IS NOT NULL AND (s.product_id IS NULL OR s.frozen IS NOT NULL) \
         GROUP BY d.product_id, p.applied_n ORDER BY letter LIMIT $3",
    );
    let limit = i64::try_from(limits::DEAD_LETTERS_FROZEN_AT_ONCE).unwrap_or(i64::MAX);
    Ok(frozen.bind(id(partition)).bind(after).bind(limit).fetch_all(connection).await?)
}

/// Applies a dead letter after all, and removes it. One that Redis has moved by moves Postgres alone. Of the others what is of an order or a
/// coupon, and of which nothing is written, is handed over, to be made in Redis as a whole; a coupon's of which something is answers that it has
/// to be done anew; the rest moves Postgres as another program would, so that Redis follows through the inbox.
pub async fn retry(connection: &mut PgConnection, letter: i64) -> Result<Settled, Error> {
    let mut transaction = connection.begin().await?;
    match retry_in(&mut transaction, letter).await {
        Ok(Settled::Done) => {
            transaction.commit().await?;
            Ok(Settled::Done)
        }
        Err(Error::Data(reason)) => {
            transaction.rollback().await?;
            Ok(Settled::Failed(reason))
        }
        other => {
            transaction.rollback().await?;
            other
        }
    }
}

async fn retry_in(connection: &mut PgConnection, letter: i64) -> Result<Settled, Error> {
    hold_partition(connection, letter).await?;
    type Columns = (i64, i64, i32, String, i32, Option<String>, i64, bool, String, i64, i32);
    let found: Option<Columns> = sqlx::query_as(
        "DELETE FROM holdfast.dead_letter WHERE id = $1 RETURNING epoch, n, i, op, k, product_id, delta, in_redis, line, \
         (extract(epoch FROM coalesce((SELECT max(l.at) FROM holdfast.stock_ledger l WHERE l.op = dead_letter.op AND l.k = dead_letter.k), at)) \
         * 1000)::bigint, partition",
    )
    .bind(letter)
    .fetch_optional(&mut *connection)
    .await?;
    let Some((epoch, n, i, op, k, product, delta, in_redis, line, at_ms, partition)) = found else { return Ok(Settled::Unknown) };
    let decoded = Operation::decode(&line);
    if !in_redis && decoded.as_ref().is_ok_and(is_made_in_redis) {
        // It comes here from there.
        if salvage::is_undone(connection, &op, k).await? {
            let frozen = sqlx::query_scalar(
                "SELECT product_id FROM holdfast.stock WHERE product_id = ANY($1) AND frozen IS NOT NULL AND deleted_at IS NULL LIMIT 1",
            )
            .bind(decoded.iter().flat_map(Operation::products).collect::<Vec<_>>());
            let frozen: Option<String> = frozen.fetch_optional(&mut *connection).await?;
            if let Some(product) = frozen {
                return Ok(Settled::Failed(format!(
                    "product '{product}' is frozen: STOCK.UNFREEZE it, see to it that it has the units, and try again"
                )));
            }
            remove_rest(connection, &op, k).await?;
            salvage::hand_over_again(connection, &op, k).await?;
            return Ok(Settled::Done);
        }
        if decoded.as_ref().is_ok_and(|operation| operation.coupon().is_some()) {
            return Ok(Settled::Failed("Redis no longer has it: drop it, and do it anew".into()));
        }
    }
    if let (Some(product), false) = (&product, in_redis) {
        let moved = sqlx::query("UPDATE holdfast.stock SET available = available + $2 WHERE product_id = $1 AND deleted_at IS NULL");
        if moved.bind(product).bind(delta).execute(&mut *connection).await?.rows_affected() == 0 {
            return Ok(Settled::Failed(format!("holdfast.stock has no product {product}")));
        }
        outside::product_given_up(connection, product, delta, false, (&op, k, i)).await?;
        return Ok(Settled::Done);
    }
    sqlx::query("SELECT set_config('holdfast.writer', 'holdfast', true)").execute(&mut *connection).await?;
    let mut operation = decoded.map_err(|malformed| Error::Data(malformed.to_string()))?;
    let last = Position::new(from_bigint(epoch), from_bigint(n));
    if let (None, Some(change)) = (&product, operation.order()) {
        // The order's own row, unless the order has gone on.
        let has_gone_on =
            "SELECT EXISTS (SELECT 1 FROM holdfast.stock_order WHERE order_id = $1 AND (changed_epoch, changed_n) >= ($2, $3))";
        let has_gone_on = sqlx::query_scalar(has_gone_on).bind(&change.order).bind(epoch).bind(n);
        if !has_gone_on.fetch_one(&mut *connection).await? {
            let entry = Entry { last, first_n: last.n, prev: partition::NO_OP.into(), op, at_ms, operations: vec![operation] };
            let changes = Changes::gather([&entry], &Created::default())?;
            write::orders(connection, u32::try_from(partition).unwrap_or_default(), &changes).await?;
        }
        return Ok(Settled::Done);
    }
    if let Effect::Stock { items, detail, .. } = &mut operation.effect {
        // Only its own line, by what is owed; what the creation of a product would come to is in that already.
        let at = usize::try_from(i).unwrap_or_default();
        *items = items.get(at).cloned().into_iter().collect();
        items.iter_mut().for_each(|item| item.delta = delta);
        detail.created = false;
        detail.pg = Some(delta);
        // What is held has moved already.
        detail.order = None;
    }
    if let Effect::Coupon { change: CouponChange::Step(stepped), .. } = &mut operation.effect {
        // A person says that it is to be: under whose token it came does not matter any more.
        stepped.token = None;
    }
    let entry = Entry { last, first_n: last.n, prev: partition::NO_OP.into(), op, at_ms, operations: vec![operation] };
    write::moves(connection, &Changes::gather([&entry], &Created::default())?).await?;
    if let [Operation { effect: Effect::Coupon { coupon, change: CouponChange::Create(_) }, .. }] = entry.operations.as_slice() {
        coupon_write::keep_serials_of(connection, coupon).await?;
    }
    Ok(Settled::Done)
}

/// What ends an order gives back what it took. Where Postgres never gave that, since it is parked, the two balance: the parked part is removed,
/// with what was given back. `ended`: what was done in this transaction, which has the partition's row. Returns the products of what was removed.
/// Errors with [`Error::Data`] where Postgres takes not even that.
pub(super) async fn balance_ended<'a>(
    connection: &mut PgConnection,
    ended: impl Iterator<Item = &'a Operation>,
) -> Result<Vec<String>, Error> {
    let orders: Vec<&str> = ended.filter_map(Operation::ended_order).collect();
    if orders.is_empty() {
        return Ok(Vec::new());
    }
    let balanced = sqlx::query_scalar(
        "WITH letters AS (SELECT id, kind, product_id, epoch, n, substring(line FROM ' order=([^ ]+) ') AS of \
           FROM holdfast.dead_letter WHERE in_redis AND product_id IS NOT NULL AND kind IN ('reserve', 'sell', 'cancel', 'expire') \
           AND substring(line FROM ' order=([^ ]+) ') = ANY($1)), \
         begun AS (SELECT * FROM letters l WHERE kind IN ('reserve', 'sell') AND NOT EXISTS (SELECT 1 FROM holdfast.stock_ledger later \
           WHERE later.order_id = l.of AND (later.epoch, later.n) > (l.epoch, l.n) AND later.kind IN ('reserve', 'sell'))), \
         ended AS (SELECT l.* FROM letters l JOIN begun b ON l.of = b.of AND l.product_id = b.product_id AND (l.epoch, l.n) > (b.epoch, b.n) \
           WHERE l.kind IN ('cancel', 'expire')), \
         gone AS (DELETE FROM holdfast.dead_letter d USING (SELECT id FROM begun UNION SELECT id FROM ended) AS a WHERE d.id = a.id \
           RETURNING d.product_id, d.delta), \
         sums AS (SELECT product_id, sum(delta)::bigint AS delta FROM gone GROUP BY product_id), \
         moved AS (UPDATE holdfast.stock s SET available = s.available + m.delta FROM sums m \
           WHERE s.product_id = m.product_id AND m.delta <> 0 RETURNING s.product_id), \
         given_up AS (INSERT INTO holdfast.outside AS o (kind, id, available) SELECT 'product', m.product_id, -m.delta FROM sums m \
           WHERE m.delta <> 0 AND NOT EXISTS (SELECT 1 FROM moved WHERE moved.product_id = m.product_id) \
           ON CONFLICT (kind, id) DO UPDATE SET available = o.available + excluded.available) \
         SELECT product_id FROM sums",
    );
    Ok(balanced.bind(orders).fetch_all(connection).await?)
}

/// The same, where anything else is done all the same: where Postgres takes not even that, what is parked stays.
pub(super) async fn try_to_balance<'a>(
    connection: &mut PgConnection,
    ended: impl Iterator<Item = &'a Operation>,
) -> Result<Vec<String>, Error> {
    let mut savepoint = connection.begin().await?;
    match balance_ended(&mut savepoint, ended).await {
        Ok(balanced) => {
            savepoint.commit().await?;
            Ok(balanced)
        }
        Err(Error::Data(reason)) => {
            savepoint.rollback().await?;
            tracing::warn!(
                error = reason,
                "an order has given back what postgres never gave, and still refuses to give: see HOLDFAST.DEADLETTER LIST"
            );
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Locks the partition's row, so that nothing is applied or saved meanwhile. Without saying that this is Holdfast: what is moved for another program
/// is to be heard of.
async fn hold_partition(connection: &mut PgConnection, letter: i64) -> Result<(), Error> {
    let of = "SELECT FROM holdfast.partition WHERE id = (SELECT partition FROM holdfast.dead_letter WHERE id = $1) FOR UPDATE";
    sqlx::query(of).bind(letter).execute(connection).await?;
    Ok(())
}

/// Whether it can only be made as a whole, in Redis: what is of an order or a coupon.
fn is_made_in_redis(operation: &Operation) -> bool {
    operation.order().is_some() || operation.coupon().is_some()
}

/// Removes what else is left of a change of which nothing is written: it is made, or given up, as a whole.
async fn remove_rest(connection: &mut PgConnection, op: &str, k: i32) -> Result<(), Error> {
    let rest = sqlx::query("DELETE FROM holdfast.dead_letter WHERE op = $1 AND k = $2 AND NOT in_redis");
    rest.bind(op).bind(k).execute(connection).await?;
    Ok(())
}

/// Gives a dead letter up, and removes it. Where Redis has moved by it, Redis gets the units back through the inbox. Not what an order begins with:
/// its end gives them back.
pub async fn discard(connection: &mut PgConnection, letter: i64) -> Result<Settled, Error> {
    let mut transaction = connection.begin().await?;
    match discard_in(&mut transaction, letter).await {
        Ok(Settled::Done) => {
            transaction.commit().await?;
            Ok(Settled::Done)
        }
        other => {
            transaction.rollback().await?;
            other
        }
    }
}

async fn discard_in(connection: &mut PgConnection, letter: i64) -> Result<Settled, Error> {
    hold_partition(connection, letter).await?;
    type Columns = (Option<String>, i64, bool, String, i32, i32, String);
    let found: Option<Columns> =
        sqlx::query_as("DELETE FROM holdfast.dead_letter WHERE id = $1 RETURNING product_id, delta, in_redis, op, k, i, line")
            .bind(letter)
            .fetch_optional(&mut *connection)
            .await?;
    let Some((product, delta, in_redis, op, k, i, line)) = found else { return Ok(Settled::Unknown) };
    let decoded = Operation::decode(&line).ok();
    let begun = decoded.as_ref().and_then(Operation::order).filter(|change| in_redis && change.from.is_none());
    if let Some(OrderChange { order, .. }) = begun {
        // Redis would get the units now, and has got them, or gets them once more, by its end.
        let why = if product.is_some() {
            "has taken these units: RETRY it, or STOCK.CANCEL the order, which settles this, too"
        } else {
            "is known by this alone: RETRY it, which also settles what is over"
        };
        return Ok(Settled::Failed(format!("order '{order}' {why}")));
    }
    if !in_redis && decoded.as_ref().is_some_and(is_made_in_redis) && salvage::is_undone(connection, &op, k).await? {
        remove_rest(connection, &op, k).await?;
    }
    let Some(product) = product else {
        outside::coupon_given_up(connection, &line, &op, k).await?;
        return Ok(Settled::Done);
    };
    outside::product_given_up(connection, &product, delta, in_redis, (&op, k, i)).await?;
    if in_redis && delta != 0 {
        inbox::put(connection, &product, -delta).await?;
    }
    Ok(Settled::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::coupon::Counts;
    use crate::domain::{Order, OrderState};
    use crate::ledger::adopt::{self, Adoption};
    use crate::ledger::refill::Snapshot;
    use crate::ledger::testing::{Database, database, execute, number_of, rows};
    use crate::ledger::{apply, coupon, order};

    /// The entry after `n` changes in `entries` batches.
    fn entry(n: u64, entries: u64, lines: &[&str]) -> Entry {
        let operations: Vec<_> = lines.iter().map(|line| Operation::decode(line).unwrap()).collect();
        let prev = if entries == 0 { partition::NO_OP.into() } else { format!("i:stock:{entries}") };
        let last = Position::new(1, n + operations.iter().map(Operation::count).sum::<u64>());
        Entry { last, first_n: n + 1, prev, op: format!("i:stock:{}", entries + 1), at_ms: 1_700_000_000_000, operations }
    }

    async fn stock(database: &mut Database) -> Vec<(String, i64, bool)> {
        rows(&mut database.connection, "SELECT product_id, available, frozen IS NOT NULL FROM holdfast.stock ORDER BY product_id").await
    }

    async fn owed(database: &mut Database) -> Vec<(i64, i32, Option<String>, i64)> {
        rows(&mut database.connection, "SELECT n, i, product_id, delta FROM holdfast.dead_letter ORDER BY id").await
    }

    #[tokio::test]
    async fn what_postgres_refuses_is_parked_and_the_rest_applied() {
        let mut database = database().await;
        let first = entry(0, 0, &["0 set | a 10 10", "1 set | b 10 10"]);
        apply(&mut database.connection, 0, &[first]).await.unwrap();
        let poisoned = entry(
            2,
            1,
            &[
                "0 decr | a -1 9",
                "1 decr | a -50 0 b -2 8",
                "2 decr | ghost -3 7",
                "3 coupon.issue coupon=ghost user=u serial=1 remaining=0 |",
                "4 inbox inbox=7:7 | b 0 8",
                "5 decr | b -1 7",
            ],
        );
        let (applied, parked) = apply_parking(&mut database.connection, 0, &poisoned).await.unwrap();
        assert_eq!((applied.position, applied.operations, parked), (Position::new(1, 8), 6, 3));
        assert_eq!(stock(&mut database).await, [("a".into(), 9, true), ("b".into(), 7, false)]);
        assert_eq!(owed(&mut database).await, [(4, 0, Some("a".into()), -50), (5, 0, Some("ghost".into()), -3), (6, 0, None, 0)]);
        assert_eq!(number_of(&mut database.connection, "SELECT count(*) FROM holdfast.stock_ledger").await, 8);
        assert_eq!(number_of(&mut database.connection, "SELECT inbox_xid FROM holdfast.partition").await, 7);
        let again = apply_parking(&mut database.connection, 0, &poisoned).await.unwrap();
        assert_eq!((again.0.operations, again.1), (0, 0), "once");
        let next = entry(8, 2, &["0 decr | b -1 6"]);
        assert_eq!(apply(&mut database.connection, 0, &[next]).await.unwrap().operations, 1);
        let frozen = frozen(&mut database.connection, 0, 0).await.unwrap();
        assert_eq!(frozen.iter().map(|frozen| frozen.product.as_str()).collect::<Vec<_>>(), ["a", "ghost"]);
        assert_eq!(count(&mut database.connection, 0).await.unwrap(), 3);
    }

    #[tokio::test]
    async fn an_orders_own_row_is_written_by_a_retry_unless_the_order_has_gone_on() {
        let mut database = database().await;
        let connection = &mut database.connection;
        apply(connection, 0, &[entry(0, 0, &["0 set | a 10 10"])]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state <> 'held')").await;
        let begun = entry(1, 1, &["0 reserve order=o expires=9 | a -1 9", "1 reserve order=gone expires=9 | a -2 7"]);
        assert_eq!(apply_parking(connection, 0, &begun).await.unwrap().1, 2);
        apply(connection, 0, &[entry(3, 2, &["0 cancel order=gone from=held units=2 | a 2 9"])]).await.unwrap();
        let letters: Vec<(i64,)> = rows(connection, "SELECT id FROM holdfast.dead_letter ORDER BY id").await;
        let refused = retry(connection, letters[0].0).await.unwrap();
        assert!(matches!(&refused, Settled::Failed(why) if why.contains("none")), "{refused:?}");
        execute(connection, "ALTER TABLE holdfast.stock_order DROP CONSTRAINT none").await;
        for letter in letters {
            assert_eq!(retry(connection, letter.0).await.unwrap(), Settled::Done);
        }
        let orders = "SELECT order_id, state, units[1] FROM holdfast.stock_order ORDER BY order_id";
        let expected = [("gone".to_owned(), "cancelled".to_owned(), 2), ("o".to_owned(), "held".to_owned(), 1)];
        assert_eq!(rows::<(String, String, i64)>(connection, orders).await, expected);
        assert_eq!(number_of(connection, "SELECT available * 100 + held FROM holdfast.stock").await, 901);
    }

    /// Order, state and until when it is held of each order.
    fn as_read(orders: Vec<order::OrderRow>) -> Vec<(String, OrderState, i64)> {
        let mut orders: Vec<_> = orders.into_iter().map(|row| (row.order.clone(), row.order().unwrap())).collect();
        orders.sort_by(|a, b| a.0.cmp(&b.0));
        orders.into_iter().map(|(id, order)| (id, order.state, order.expires_ms)).collect()
    }

    #[tokio::test]
    async fn an_order_whose_row_has_refused_a_change_is_what_the_ledger_says() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let reserved = "0 reserve order=sold expires=9 | a -1 9, 1 reserve order=back expires=9 | a -1 8, 2 reserve order=later expires=9 | a -1 7, \
                        3 reserve order=again expires=9 | a -1 6";
        apply(connection, 0, &[entry(0, 0, &["0 set | a 10 10"]), entry(1, 1, &reserved.split(", ").collect::<Vec<_>>())]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state = 'held' AND expires_ms = 9)").await;
        let refused = [
            "0 reserve order=both expires=9 | a -1 5",
            "1 confirm order=sold from=held units=1 | a 0 5",
            "2 cancel order=back from=held units=1 | a 1 6",
            "3 extend order=later expires=99 from=held units=1 | a 0 6",
            "4 confirm order=both from=held units=1 | a 0 6",
            "5 confirm order=again from=held units=1 | a 0 6",
            "6 reserve order=again expires=99 | a -1 5",
        ];
        execute(connection, "ALTER TABLE holdfast.stock_order ADD CONSTRAINT no_both CHECK (order_id <> 'both')").await;
        assert_eq!(apply_parking(connection, 0, &entry(5, 2, &refused)).await.unwrap().1, 7);
        let ids = ["sold", "back", "later", "both", "again"].map(str::to_owned);
        let stand = |order: &str, state, expires_ms| (order.to_owned(), state, expires_ms);
        let [back, later, sold] = [("back", OrderState::Cancelled, 9), ("later", OrderState::Held, 99), ("sold", OrderState::Confirmed, 9)]
            .map(|(order, state, expires_ms)| stand(order, state, expires_ms));
        let [again, both] = [stand("again", OrderState::Held, 99), stand("both", OrderState::Confirmed, 9)];
        let all = [again.clone(), back, both.clone(), later.clone(), sold];
        assert_eq!(as_read(order::load(connection, &ids).await.unwrap()), all);
        assert_eq!(order::overdue(connection, 0, 99, 0, 10).await.unwrap(), [], "nothing is given back twice");
        let held = [again, later];
        assert_eq!(as_read(order::overdue(connection, 0, 100, 0, 10).await.unwrap()), held);
        let [first, second] = [0, 1].map(|offset| (offset, 1));
        let mut one_by_one = order::overdue(connection, 0, 100, first.0, first.1).await.unwrap();
        one_by_one.extend(order::overdue(connection, 0, 100, second.0, second.1).await.unwrap());
        assert_eq!(as_read(one_by_one), held);
        let mut snapshot = Snapshot::take(connection, 0).await.unwrap();
        let pages = snapshot.orders().await.unwrap();
        // What ended years ago Redis has forgotten.
        assert_eq!(as_read(snapshot.next(&pages).await.unwrap()), held);
        drop(snapshot);

        // What is retried first is its beginning: it is not held again.
        execute(connection, "ALTER TABLE holdfast.stock_order DROP CONSTRAINT none, DROP CONSTRAINT no_both").await;
        let letters: Vec<(i64,)> =
            rows(connection, "SELECT id FROM holdfast.dead_letter WHERE line LIKE '%order=both %' ORDER BY id").await;
        for letter in letters {
            assert_eq!(retry(connection, letter.0).await.unwrap(), Settled::Done);
            assert_eq!(order::overdue(connection, 0, 99, 0, 10).await.unwrap(), []);
            assert_eq!(as_read(order::load(connection, &ids[3..4]).await.unwrap()), std::slice::from_ref(&both));
        }
        // Of an id that is another order by now, the first's row stays as it is, and is nobody's.
        let letters: Vec<(i64,)> =
            rows(connection, "SELECT id FROM holdfast.dead_letter WHERE line LIKE '%order=again %' ORDER BY id DESC").await;
        for letter in letters {
            assert_eq!(retry(connection, letter.0).await.unwrap(), Settled::Done);
        }
        assert_eq!(as_read(order::load(connection, &ids[4..]).await.unwrap()), [stand("again", OrderState::Held, 99)]);
        assert_eq!(order::overdue(connection, 0, 99, 0, 10).await.unwrap(), []);
    }

    #[tokio::test]
    async fn an_order_whose_beginning_was_refused_is_not_the_one_before_it() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let ids = ["x", "y"].map(str::to_owned);
        let lines = ["0 set | a 10 10", "1 set | b 10 10", "2 reserve order=x expires=9 | a -1 9", "3 reserve order=y expires=9 | a -1 8"];
        apply(connection, 0, &[entry(0, 0, &lines)]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state = 'held' AND products <> '{b}')").await;
        // The rows of the first stay held.
        let again = [
            "0 expire order=x from=held units=1 | a 1 9",
            "1 expire order=y from=held units=1 | a 1 10",
            "2 reserve order=x expires=99 | b -1 9",
            "3 sell order=y | b -2 7",
            "4 extend order=x expires=199 from=held units=1 | b 0 7",
        ];
        assert_eq!(apply_parking(connection, 0, &entry(4, 1, &again)).await.unwrap().1, 5);
        let stand = |order: &str, state, expires_ms| (order.to_owned(), state, expires_ms);
        let (x, y) = (stand("x", OrderState::Held, 199), stand("y", OrderState::Confirmed, 0));
        let now = [x.clone(), y.clone()];
        let read = order::load(connection, &ids).await.unwrap();
        for (row, units) in read.iter().map(|row| (row, if row.order == "x" { 1 } else { 2 })) {
            assert_eq!(row.order().unwrap().items, [("b".to_owned(), units)]);
        }
        assert_eq!(as_read(read), now);
        assert_eq!(as_read(order::overdue(connection, 0, 200, 0, 10).await.unwrap()), std::slice::from_ref(&x));
        assert_eq!(order::overdue(connection, 0, 199, 0, 10).await.unwrap(), []);
        let mut snapshot = Snapshot::take(connection, 0).await.unwrap();
        let pages = snapshot.orders().await.unwrap();
        assert_eq!(as_read(snapshot.next(&pages).await.unwrap()), std::slice::from_ref(&x));
        drop(snapshot);
        // What it is known by is not given up.
        let letters: Vec<(i64,)> = rows(connection, "SELECT id FROM holdfast.dead_letter ORDER BY id").await;
        for begun in &letters[2..4] {
            let refused = discard(connection, begun.0).await.unwrap();
            assert!(matches!(&refused, Settled::Failed(why) if why.contains("RETRY")), "{refused:?}");
        }

        execute(connection, "ALTER TABLE holdfast.stock_order DROP CONSTRAINT none").await;
        // What comes behind it begins a row of its own.
        apply(connection, 0, &[entry(9, 2, &["0 cancel order=y from=confirmed units=2 | b 2 9"])]).await.unwrap();
        let now = [x, stand("y", OrderState::Cancelled, 0)];
        assert_eq!(as_read(order::load(connection, &ids).await.unwrap()), now);
        for letter in letters {
            assert_eq!(retry(connection, letter.0).await.unwrap(), Settled::Done);
            assert_eq!(as_read(order::load(connection, &ids).await.unwrap()), now);
        }
        let first = "SELECT string_agg(state, ' ' ORDER BY order_id) FROM holdfast.stock_order WHERE products = '{a}'";
        // Whose last is nobody's any more stays as it is.
        assert_eq!(rows::<(String,)>(connection, first).await, [("expired held".to_owned(),)]);
    }

    #[tokio::test]
    async fn an_order_that_was_cancelled_before_it_came_stays_so_though_its_row_was_refused() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(connection, "ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state <> 'cancelled')").await;
        assert_eq!(apply_parking(connection, 0, &entry(0, 0, &["0 cancel order=x |"])).await.unwrap().1, 1);
        let read = order::load(connection, &["x".to_owned()]).await.unwrap();
        assert!(read[0].order().unwrap().items.is_empty());
        assert_eq!(as_read(read), [("x".to_owned(), OrderState::Cancelled, 0)]);
        let letter = number_of(connection, "SELECT id FROM holdfast.dead_letter").await;
        assert!(matches!(discard(connection, letter).await.unwrap(), Settled::Failed(_)));
        execute(connection, "ALTER TABLE holdfast.stock_order DROP CONSTRAINT none").await;
        assert_eq!(retry(connection, letter).await.unwrap(), Settled::Done);
        let read = order::load(connection, &["x".to_owned()]).await.unwrap();
        assert_eq!(as_read(read), [("x".to_owned(), OrderState::Cancelled, 0)]);
    }

    #[tokio::test]
    async fn what_an_order_took_is_balanced_by_its_end_though_neither_has_a_row() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let first = ["0 set | a 10 10", "1 reserve order=x expires=9 | a -1 9", "2 expire order=x from=held units=1 | a 1 10"];
        apply(connection, 0, &[entry(0, 0, &first)]).await.unwrap();
        let refuse = "ALTER TABLE holdfast.stock ADD CONSTRAINT ten CHECK (available >= 10); \
                      ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state <> 'held')";
        execute(connection, refuse).await;
        assert_eq!(apply_parking(connection, 0, &entry(3, 1, &["0 reserve order=x expires=99 | a -3 7"])).await.unwrap().1, 2);
        apply_parking(connection, 0, &entry(4, 2, &["0 cancel order=x from=held units=3 | a 3 10"])).await.unwrap();
        let left = "SELECT coalesce(product_id, '') FROM holdfast.dead_letter";
        assert_eq!(rows::<(String,)>(connection, left).await, [(String::new(),)]);
        assert_eq!(number_of(connection, "SELECT available * 100 + held FROM holdfast.stock").await, 1_000);
    }

    #[tokio::test]
    async fn what_is_taken_over_from_redis_counts_whatever_the_ledger_said_before() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let lines = [
            "0 set | a 10 10",
            "1 reserve order=held expires=9 | a -1 9",
            "2 reserve order=sold expires=9 | a -1 8",
            "3 reserve order=gone expires=9 | a -1 7",
        ];
        apply(connection, 0, &[entry(0, 0, &lines)]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state <> 'confirmed')").await;
        let sold = [
            "0 confirm order=held from=held units=1 | a 0 7",
            "1 confirm order=sold from=held units=1 | a 0 7",
            "2 sell order=forgotten | a -1 6",
            "3 sell order=known | a -2 4",
        ];
        assert_eq!(apply_parking(connection, 0, &entry(4, 1, &sold)).await.unwrap().1, 4);
        let refused = adopt::rehearse(connection).await;
        assert!(matches!(&refused, Err(Error::Data(why)) if why.contains("none")), "{refused:?}");
        execute(connection, "ALTER TABLE holdfast.stock_order DROP CONSTRAINT none; UPDATE holdfast.partition SET epoch = 2").await;
        adopt::rehearse(connection).await.unwrap();
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.stock_order").await, 3);
        // Redis has lost that the first is sold, and has forgotten what was over.
        let mut adoption = Adoption::begin(connection, 0, 2, 8).await.unwrap();
        let order =
            |state, expires_ms, units, n| Order { state, expires_ms, items: vec![("a".to_owned(), units)], position: Position::new(1, n) };
        let [held, known] = [order(OrderState::Held, 9, 1, 2), order(OrderState::Confirmed, 0, 2, 8)];
        adoption.orders(&[("held".to_owned(), held), ("known".to_owned(), known)]).await.unwrap();
        adoption.end().await.unwrap();
        let stand = |(order, state, expires_ms): (&str, _, _)| (order.to_owned(), state, expires_ms);
        let ids = ["held", "sold", "gone", "forgotten", "known"].map(str::to_owned);
        use OrderState::{Confirmed, Expired, Held};
        let expected =
            [("forgotten", Confirmed, 0), ("gone", Expired, 9), ("held", Held, 9), ("known", Confirmed, 0), ("sold", Confirmed, 9)];
        assert_eq!(as_read(order::load(connection, &ids).await.unwrap()), expected.map(stand));
        assert_eq!(as_read(order::overdue(connection, 0, 100, 0, 10).await.unwrap()), [stand(expected[2])]);
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.stock_order").await, 5);
        assert_eq!(count(connection, 0).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_sums_up_several_is_parked_and_retried_as_one() {
        let mut database = database().await;
        apply(&mut database.connection, 0, &[entry(0, 0, &["0 set | a 10 10", "1 set | b 10 10"])]).await.unwrap();
        let poisoned = entry(2, 1, &["0 mixed runs=0:2,2:-4 | b -2 8", "1 decr runs=1:-50,3:-20 | a -70 0", "4 decr | b -1 7"]);
        let (applied, parked) = apply_parking(&mut database.connection, 0, &poisoned).await.unwrap();
        assert_eq!((applied.position, applied.operations, parked), (Position::new(1, 7), 5, 1));
        assert_eq!(owed(&mut database).await, [(5, 0, Some("a".into()), -70)]);
        assert_eq!(stock(&mut database).await, [("a".into(), 10, true), ("b".into(), 7, false)]);
        assert_eq!(number_of(&mut database.connection, "SELECT sum(operations) FROM holdfast.stock_ledger WHERE n > 2").await, 5);
        execute(&mut database.connection, "SET holdfast.writer = 'holdfast'; UPDATE holdfast.stock SET available = 80").await;
        let letters = list(&mut database.connection, 0, 10).await.unwrap();
        assert_eq!(retry(&mut database.connection, letters[0].id).await.unwrap(), Settled::Done);
        assert_eq!(stock(&mut database).await[0].1, 10);
    }

    #[tokio::test]
    async fn the_serial_of_an_issue_that_is_parked_is_not_given_out_again() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let first = entry(0, 0, &["0 coupon.create coupon=c total=9 peruser=1 |", "1 coupon.issue coupon=c user=u serial=1 remaining=8 |"]);
        apply(connection, 0, &[first]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.coupon_issue ADD CONSTRAINT no_v CHECK (user_id <> 'v')").await;
        let poisoned = entry(2, 1, &["0 coupon.issue coupon=c user=v serial=2 remaining=7 |"]);
        assert_eq!(apply_parking(connection, 0, &poisoned).await.unwrap().1, 1);
        let row = coupon::load(connection, "c").await.unwrap().unwrap();
        assert_eq!((row.issued, row.last_serial), (1, 2));
        for (n, issued) in [(2, 1), (3, 2)] {
            let expected = coupon::expected(connection, 0, &["c".to_owned()], 1, n).await.unwrap().unwrap();
            assert_eq!(expected[0].counts.unwrap(), Counts { total: 9, issued, used: 0, serial: issued }, "what Redis had at {n}");
        }
        execute(connection, "ALTER TABLE holdfast.coupon ADD CONSTRAINT no_more CHECK (last_serial < 3)").await;
        let refused = entry(3, 2, &["0 coupon.issue coupon=c user=v serial=3 remaining=6 |"]);
        assert_eq!(apply_parking(connection, 0, &refused).await.unwrap().1, 1, "though not even the serial is kept");
        execute(connection, "ALTER TABLE holdfast.coupon_issue DROP CONSTRAINT no_v").await;
        let letters = list(connection, 0, 10).await.unwrap();
        assert_eq!(retry(connection, letters[0].id).await.unwrap(), Settled::Done);
        let row = coupon::load(connection, "c").await.unwrap().unwrap();
        assert_eq!((row.issued, row.last_serial), (2, 2));
    }

    #[tokio::test]
    async fn a_creation_that_is_retried_keeps_the_serials_that_were_parked_behind_it() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(connection, "ALTER TABLE holdfast.coupon ADD CONSTRAINT none CHECK (coupon_id NOT IN ('c', 'd'))").await;
        let poisoned = entry(
            0,
            0,
            &[
                "0 coupon.create coupon=c total=9 peruser=1 |",
                "1 coupon.issue coupon=c user=u serial=1 remaining=8 |",
                "2 coupon.issue coupon=c user=v serial=2 remaining=7 |",
                "3 coupon.create coupon=d total=9 peruser=1 |",
            ],
        );
        assert_eq!(apply_parking(connection, 0, &poisoned).await.unwrap().1, 4);
        execute(connection, "ALTER TABLE holdfast.coupon DROP CONSTRAINT none").await;
        for letter in list(connection, 0, 10).await.unwrap().iter().filter(|letter| letter.kind == "coupon.create") {
            assert_eq!(retry(connection, letter.id).await.unwrap(), Settled::Done);
        }
        let serials: Vec<(String, i64, i64)> =
            rows(connection, "SELECT coupon_id, issued, last_serial FROM holdfast.coupon ORDER BY coupon_id").await;
        assert_eq!(serials, [("c".into(), 0, 2), ("d".into(), 0, 0)]);
        let expected = coupon::expected(connection, 0, &["c".to_owned()], 1, 4).await.unwrap().unwrap();
        assert_eq!(expected[0].counts.unwrap(), Counts { total: 9, issued: 2, used: 0, serial: 2 }, "as Redis has it");
    }

    #[tokio::test]
    async fn what_an_order_gives_back_that_postgres_never_gave_balances() {
        let mut database = database().await;
        let connection = &mut database.connection;
        apply(connection, 0, &[entry(0, 0, &["0 set | a 10 10", "1 set | b 10 10"])]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.stock ADD CONSTRAINT low CHECK (available > 8)").await;
        let begun = entry(
            2,
            1,
            &[
                "0 reserve order=o expires=9 | a -3 7 b -1 9",
                "1 sell order=p | a -4 3",
                "2 reserve order=ghost expires=9 | ghost -2 0",
                "3 reserve order=kept expires=9 | a -5 0",
            ],
        );
        assert_eq!(apply_parking(connection, 0, &begun).await.unwrap().1, 4);
        let letters = list(connection, 0, 10).await.unwrap();
        for letter in &letters {
            let held = discard(connection, letter.id).await.unwrap();
            assert!(matches!(&held, Settled::Failed(why) if why.contains("STOCK.CANCEL")), "{held:?}");
        }
        let ended = entry(
            6,
            2,
            &[
                "0 expire order=o from=held units=3,1 | a 3 10 b 1 10",
                "1 cancel order=p from=confirmed units=4 | a 4 10",
                "2 cancel order=ghost from=held units=2 | ghost 2 2",
                "3 confirm order=kept from=held units=5 | a 0 0",
            ],
        );
        assert!(matches!(apply(connection, 0, std::slice::from_ref(&ended)).await, Err(Error::Data(_))), "there is no ghost");
        apply_parking(connection, 0, &ended).await.unwrap();
        assert_eq!(owed(&mut database).await, [(6, 0, Some("a".into()), -5)], "what is not over is owed");
        assert_eq!(stock(&mut database).await, [("a".into(), 10, true), ("b".into(), 10, false)]);
        let connection = &mut database.connection;
        assert_eq!(number_of(connection, "SELECT sum(held)::bigint FROM holdfast.stock").await, 0);
        let explained = "SELECT available - sum(pg_delta)::bigint FROM holdfast.stock_ledger l JOIN holdfast.stock s USING (product_id) \
                         WHERE product_id = 'a' GROUP BY available";
        assert_eq!(number_of(connection, explained).await, 5, "what is owed");
        // The same without a dead letter of its end.
        apply(connection, 0, &[entry(10, 3, &["0 cancel order=kept from=confirmed units=5 | a 5 10"])]).await.unwrap();
        assert_eq!(stock(&mut database).await[0].1, 10);
        assert!(owed(&mut database).await.is_empty());
    }

    #[tokio::test]
    async fn an_order_that_ends_when_its_product_is_gone_leaves_nothing_owed() {
        let mut database = database().await;
        let connection = &mut database.connection;
        apply(connection, 0, &[entry(0, 0, &["0 set | a 10 10"])]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.stock ADD CONSTRAINT low CHECK (available > 8)").await;
        assert_eq!(apply_parking(connection, 0, &entry(1, 1, &["0 sell order=o | a -3 7"])).await.unwrap().1, 1);
        execute(connection, "DELETE FROM holdfast.stock").await;
        apply(connection, 0, &[entry(2, 2, &["0 cancel order=o from=confirmed units=3 | a 0 0"])]).await.unwrap();
        assert!(owed(&mut database).await.is_empty());
        let connection = &mut database.connection;
        let left =
            "SELECT (SELECT sum(pg_delta) FROM holdfast.stock_ledger)::bigint + (SELECT available FROM holdfast.outside WHERE id = 'a')";
        assert_eq!(number_of(connection, left).await, 0, "the ledger explains that nothing is there");
    }

    #[tokio::test]
    async fn no_dead_letter_is_settled_while_anything_is_applied() {
        let mut database = database().await;
        let connection = &mut database.connection;
        apply(connection, 0, &[entry(0, 0, &["0 set | a 10 10"])]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.stock ADD CONSTRAINT low CHECK (available > 8)").await;
        assert_eq!(apply_parking(connection, 0, &entry(1, 1, &["0 decr | a -3 7"])).await.unwrap().1, 1);
        let letter = list(connection, 0, 1).await.unwrap()[0].id;
        let mut applying = crate::ledger::connect(&database.url).await.unwrap();
        execute(&mut applying, "BEGIN; SELECT FROM holdfast.partition FOR UPDATE").await;
        let connection = &mut database.connection;
        execute(connection, "SET lock_timeout = '200ms'").await;
        let waited = |result: Result<Settled, Error>| result.is_err_and(|error| error.to_string().contains("lock timeout"));
        assert!(waited(retry(connection, letter).await) && waited(discard(connection, letter).await));
        execute(&mut applying, "ROLLBACK").await;
        assert_eq!(discard(connection, letter).await.unwrap(), Settled::Done);
    }

    #[tokio::test]
    async fn an_order_that_ends_leaves_what_another_of_its_id_owes() {
        let mut database = database().await;
        let connection = &mut database.connection;
        apply(connection, 0, &[entry(0, 0, &["0 set | a 10 10"])]).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.stock ADD CONSTRAINT low CHECK (available > 8)").await;
        assert_eq!(apply_parking(connection, 0, &entry(1, 1, &["0 reserve order=o expires=9 | a -3 7"])).await.unwrap().1, 1);
        execute(connection, "UPDATE holdfast.stock_order SET state = 'cancelled'").await;
        let again = entry(2, 2, &["0 reserve order=o expires=9 | a -1 6", "1 cancel order=o from=held units=1 | a 1 7"]);
        apply(connection, 0, &[again]).await.unwrap();
        assert_eq!(owed(&mut database).await, [(2, 0, Some("a".into()), -3)]);
        assert_eq!(stock(&mut database).await[0].1, 10);
    }

    #[tokio::test]
    async fn a_dead_letter_is_retried_or_given_up_once() {
        let mut database = database().await;
        apply(&mut database.connection, 0, &[entry(0, 0, &["0 set | a 10 10"])]).await.unwrap();
        let poisoned = entry(1, 1, &["0 decr | a -50 0", "1 decr | a -20 0", "2 set low=4 | new 7 7"]);
        execute(&mut database.connection, "ALTER TABLE holdfast.stock ADD CONSTRAINT no_new CHECK (product_id <> 'new')").await;
        assert_eq!(apply_parking(&mut database.connection, 0, &poisoned).await.unwrap().1, 3);
        let letters = list(&mut database.connection, 0, 10).await.unwrap();
        let kinds: Vec<_> = letters.iter().map(|letter| (letter.position, letter.kind.as_str(), letter.delta)).collect();
        assert_eq!(kinds, [(Position::new(1, 2), "decr", -50), (Position::new(1, 3), "decr", -20), (Position::new(1, 4), "set", 7)]);
        let failed = retry(&mut database.connection, letters[0].id).await.unwrap();
        assert!(matches!(&failed, Settled::Failed(reason) if reason.contains("stock_available_check")), "{failed:?}");
        assert_eq!(count(&mut database.connection, 0).await.unwrap(), 3);
        execute(
            &mut database.connection,
            "SET holdfast.writer = 'holdfast'; UPDATE holdfast.stock SET available = 60; RESET holdfast.writer; \
             ALTER TABLE holdfast.stock DROP CONSTRAINT no_new",
        )
        .await;
        assert_eq!(retry(&mut database.connection, letters[0].id).await.unwrap(), Settled::Done);
        assert_eq!(retry(&mut database.connection, letters[0].id).await.unwrap(), Settled::Unknown);
        assert_eq!(retry(&mut database.connection, letters[2].id).await.unwrap(), Settled::Done, "the product is made");
        assert_eq!(stock(&mut database).await, [("a".into(), 10, true), ("new".into(), 7, false)]);
        assert_eq!(number_of(&mut database.connection, "SELECT count(*) FROM holdfast.inbox").await, 0, "Redis has moved already");
        assert_eq!(discard(&mut database.connection, letters[1].id).await.unwrap(), Settled::Done);
        assert_eq!(discard(&mut database.connection, letters[1].id).await.unwrap(), Settled::Unknown);
        let inbox: Vec<(String, String, i64)> = rows(&mut database.connection, "SELECT product_id, kind, delta FROM holdfast.inbox").await;
        assert_eq!(inbox, [("a".into(), "move".into(), 20)]);
        // What Redis has not moved by moves Postgres as another program would, and Redis follows.
        execute(
            &mut database.connection,
            "INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, product_id, kind, delta, in_redis, reason, line) \
             VALUES (0, 1, 9, 0, 'x', 0, 'a', 'decr', -4, false, 'r', '0 decr | a -4 0'), (0, 1, 9, 0, 'x', 0, 'a', 'decr', -4, false, 'r', '')",
        )
        .await;
        let letters = list(&mut database.connection, 0, 10).await.unwrap();
        assert_eq!(retry(&mut database.connection, letters[0].id).await.unwrap(), Settled::Done);
        assert_eq!(discard(&mut database.connection, letters[1].id).await.unwrap(), Settled::Done);
        assert_eq!(number_of(&mut database.connection, "SELECT available FROM holdfast.stock WHERE product_id = 'a'").await, 6);
        assert_eq!(number_of(&mut database.connection, "SELECT sum(delta)::bigint FROM holdfast.inbox").await, 16);
    }
}
