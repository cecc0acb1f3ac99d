//! The statements of a batch's transaction. Each is sent only where it has rows, and takes them as arrays, so that it is one prepared
//! statement whatever their number. Long lists of arrays are unnested in the SELECT list: in FROM each would be written to a table of its own
//! first, which costs a third of the whole.

use std::collections::BTreeMap;

use sqlx::{Connection, PgConnection};

use super::changes::{Changes, Lifecycle, Place, StockLine};
use super::{Error, coupon_write, inbox, order, partition, to_bigint};
use crate::domain::Runs;

/// Writes everything; the caller holds the partition's row and commits. Errors with [`Error::Data`] where Postgres does not know a
/// product or a coupon that moved.
pub(super) async fn changes(connection: &mut PgConnection, partition: u32, changes: &Changes<'_>) -> Result<(), Error> {
    ledgers(connection, partition, changes).await?;
    orders(connection, partition, changes).await?;
    moves(connection, changes).await
}

/// Writes what became of orders.
pub(super) async fn orders(connection: &mut PgConnection, partition: u32, changes: &Changes<'_>) -> Result<(), Error> {
    if changes.orders.is_empty() { Ok(()) } else { order::write(connection, partition, &changes.orders).await }
}

/// Moves the products and the coupons.
pub(super) async fn moves(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    if !changes.stock_lines.is_empty() {
        create_products(connection, changes).await?;
        move_products(connection, changes).await?;
        shape_products(connection, changes).await?;
        freeze_products(connection, &changes.frozen).await?;
        for product in &changes.revived {
            inbox::put_creation(connection, product).await?;
        }
    }
    if !changes.coupon_lines.is_empty() {
        coupon_write::moves(connection, changes).await?;
    }
    Ok(())
}

/// Writes the rows of the ledgers, and moves nothing.
pub(super) async fn ledgers(connection: &mut PgConnection, partition: u32, changes: &Changes<'_>) -> Result<(), Error> {
    if !changes.stock_lines.is_empty() {
        stock_ledger(connection, partition, &changes.stock_lines).await?;
    }
    if !changes.coupon_lines.is_empty() {
        coupon_write::ledger(connection, partition, &changes.coupon_lines).await?;
    }
    Ok(())
}

/// The columns that both ledgers have.
pub(super) struct Places<'a> {
    pub epoch: Vec<i64>,
    pub n: Vec<i64>,
    pub op: Vec<&'a str>,
    pub k: Vec<i32>,
    pub request: Vec<Option<&'a str>>,
    pub digest: Vec<Option<&'a str>>,
    pub at_ms: Vec<i64>,
    pub origin_epoch: Vec<Option<i64>>,
    pub origin_n: Vec<Option<i64>>,
}

impl<'a> Places<'a> {
    pub fn of(places: impl Iterator<Item = Place<'a>> + Clone) -> Self {
        Self {
            epoch: places.clone().map(|place| to_bigint(place.epoch)).collect(),
            n: places.clone().map(|place| to_bigint(place.n)).collect(),
            op: places.clone().map(|place| place.op).collect(),
            k: places.clone().map(|place| small(place.k)).collect(),
            request: places.clone().map(|place| place.request).collect(),
            digest: places.clone().map(|place| place.digest).collect(),
            at_ms: places.clone().map(|place| place.at_ms).collect(),
            origin_epoch: places.clone().map(|place| place.origin.map(|origin| to_bigint(origin.epoch))).collect(),
            origin_n: places.map(|place| place.origin.map(|origin| to_bigint(origin.n))).collect(),
        }
    }
}

/// A place in a batch, of which there are some hundreds.
pub(super) fn small(number: impl TryInto<i32>) -> i32 {
    number.try_into().unwrap_or(i32::MAX)
}

/// Reads the column `runs` of `stock_ledger`.
pub(super) fn runs(text: &str) -> Result<Runs, Error> {
    Runs::parse(text).ok_or_else(|| Error::Unfit(format!("holdfast.stock_ledger: runs {text:?}")))
}

async fn stock_ledger(connection: &mut PgConnection, partition: u32, lines: &[StockLine<'_>]) -> Result<(), Error> {
    let places = Places::of(lines.iter().map(|line| line.place));
    sqlx::query(
        "INSERT INTO holdfast.stock_ledger (partition, epoch, n, i, op, k, product_id, kind, redis_delta, pg_delta, available_after, \
         request_id, request_digest, at, origin_epoch, origin_n, held_delta, order_id, expires_ms, \
         operations, runs) \
         SELECT $1, l.epoch, l.n, l.i, l.op, l.k, l.product, l.kind, l.redis_delta, l.pg_delta, l.available, l.request, l.digest, \
         timestamptz 'epoch' + l.at_ms * interval '1 millisecond', l.origin_epoch, l.origin_n, coalesce(l.held, 0), l.order_id, l.expires_ms, \
         l.operations, l.runs \
         FROM (SELECT unnest($2::bigint[]) AS epoch, unnest($3::bigint[]) AS n, unnest($4::int[]) AS i, unnest($5::text[]) AS op, \
         unnest($6::int[]) AS k, unnest($7::text[]) AS product, unnest($8::text[]) AS kind, unnest($9::bigint[]) AS redis_delta, \
         unnest($10::bigint[]) AS pg_delta, unnest($11::bigint[]) AS available, unnest($12::text[]) AS request, unnest($13::text[]) AS \
         digest, unnest($14::bigint[]) AS at_ms, unnest($15::bigint[]) AS origin_epoch, unnest($16::bigint[]) AS origin_n, \
         unnest($17::bigint[]) AS held, unnest($18::text[]) AS order_id, unnest($19::bigint[]) AS expires_ms, unnest($20::int[]) AS \
         operations, unnest($21::text[]) AS runs) AS l",
    )
    .bind(partition::id(partition))
    .bind(places.epoch)
    .bind(places.n)
    .bind(lines.iter().map(|line| small(line.i)).collect::<Vec<_>>())
    .bind(places.op)
    .bind(places.k)
    .bind(lines.iter().map(|line| line.item.product.as_str()).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.kind.as_str()).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.item.delta).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.pg_delta).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.item.available).collect::<Vec<_>>())
    .bind(places.request)
    .bind(places.digest)
    .bind(places.at_ms)
    .bind(places.origin_epoch)
    .bind(places.origin_n)
    .bind(lines.iter().map(|line| line.order.map(|_| line.held_delta())).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.order.map(|order| order.order.as_str())).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.order.and_then(|order| order.expires_ms)).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| small(line.runs.map_or(1, Runs::count))).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.runs.map(ToString::to_string)).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// A product that was set gets a row with nothing in it where it has none; what it holds comes as its move. (Inserting the move itself
/// and adding on conflict would trip over CHECK: Postgres checks the row it would insert first, and a move may be negative.)
async fn create_products(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    let products: Vec<_> = changes.stock.iter().filter(|(_, moved)| moved.created).map(|(product, _)| *product).collect();
    if !products.is_empty() {
        sqlx::query("INSERT INTO holdfast.stock (product_id, available) SELECT p, 0 FROM unnest($1::text[]) AS p ON CONFLICT DO NOTHING")
            .bind(products)
            .execute(connection)
            .await?;
    }
    Ok(())
}

async fn move_products(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    let products: Vec<_> = changes.stock.keys().copied().collect();
    if products.is_empty() {
        return Ok(());
    }
    let moved = sqlx::query(
        "UPDATE holdfast.stock AS s SET available = s.available + m.delta, held = greatest(s.held + m.held, 0) \
         FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS m (product, delta, held) WHERE s.product_id = m.product",
    )
    .bind(&products)
    .bind(changes.stock.values().map(|moved| moved.delta).collect::<Vec<_>>())
    .bind(changes.stock.values().map(|moved| moved.held).collect::<Vec<_>>())
    .execute(&mut *connection)
    .await?
    .rows_affected();
    if moved == products.len() as u64 {
        return Ok(());
    }
    let unknown = sqlx::query_scalar(
        "SELECT p FROM unnest($1::text[]) AS p WHERE NOT EXISTS (SELECT 1 FROM holdfast.stock s WHERE s.product_id = p) ORDER BY p LIMIT 5",
    );
    let unknown: Vec<String> = unknown.bind(products).fetch_all(connection).await?;
    Err(Error::Data(format!("Redis sold products that holdfast.stock does not have: {}", unknown.join(", "))))
}

/// Existence and threshold, of the few products that were set or deleted.
async fn shape_products(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    let shaped = changes.stock.iter().filter(|(_, moved)| moved.lifecycle.is_some());
    let products: Vec<_> = shaped.clone().map(|(product, _)| *product).collect();
    if products.is_empty() {
        return Ok(());
    }
    let deleted = |lifecycle| if let Some(Lifecycle::Deleted(at_ms)) = lifecycle { Some(at_ms) } else { None };
    sqlx::query(
        "UPDATE holdfast.stock AS s SET deleted_at = timestamptz 'epoch' + m.deleted_ms * interval '1 millisecond', \
         low = CASE WHEN m.new_low THEN m.low ELSE s.low END \
         FROM unnest($1::text[], $2::bigint[], $3::bool[], $4::bigint[]) AS m (product, deleted_ms, new_low, low) \
         WHERE s.product_id = m.product",
    )
    .bind(products)
    .bind(shaped.clone().map(|(_, moved)| deleted(moved.lifecycle)).collect::<Vec<_>>())
    .bind(shaped.clone().map(|(_, moved)| moved.low.is_some()).collect::<Vec<_>>())
    .bind(shaped.map(|(_, moved)| moved.low.flatten()).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes why products are frozen, or that they no longer are.
pub(super) async fn freeze_products(connection: &mut PgConnection, frozen: &BTreeMap<&str, Option<&str>>) -> Result<(), Error> {
    if !frozen.is_empty() {
        sqlx::query(
            "UPDATE holdfast.stock AS s SET frozen = m.reason FROM unnest($1::text[], $2::text[]) AS m (product, reason) \
             WHERE s.product_id = m.product",
        )
        .bind(frozen.keys().copied().collect::<Vec<_>>())
        .bind(frozen.values().copied().collect::<Vec<_>>())
        .execute(connection)
        .await?;
    }
    Ok(())
}

/// The same where a row may be such that no update of it is taken at all: the others are frozen.
pub(super) async fn try_to_freeze(connection: &mut PgConnection, frozen: BTreeMap<&str, Option<&str>>) -> Result<(), Error> {
    let mut tries = vec![frozen];
    while let Some(some) = tries.pop() {
        let mut savepoint = connection.begin().await?;
        match freeze_products(&mut savepoint, &some).await {
            Ok(()) => savepoint.commit().await?,
            Err(Error::Data(_)) if some.len() > 1 => {
                savepoint.rollback().await?;
                tries.extend(some.into_iter().map(|one| BTreeMap::from([one])));
            }
            Err(Error::Data(error)) => {
                savepoint.rollback().await?;
                let product = some.keys().next();
                tracing::warn!(product, error, "postgres takes no update of this product, not even that it is frozen: it goes on selling");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
