//! Reads products.

use std::time::Duration;

use sqlx::PgConnection;

use super::{Error, from_bigint, partition, to_bigint};
use crate::domain::{InboxMark, Position};

/// A product as far as the outbox has been applied.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct StockRow {
    #[sqlx(rename = "product_id")]
    pub product: String,
    /// Units that may be sold.
    pub available: i64,
    /// Units that orders hold.
    pub held: i64,
    /// Threshold of the low-stock event.
    pub low: Option<i64>,
    /// Why a person has to look at it.
    pub frozen: Option<String>,
}

/// Reads the products that exist, in no particular order; those that are unknown or deleted are left out.
pub async fn load(connection: &mut PgConnection, products: &[String]) -> Result<Vec<StockRow>, Error> {
    let rows = sqlx::query_as(
        "SELECT product_id, available, held, low, frozen FROM holdfast.stock WHERE product_id = ANY($1) AND deleted_at IS NULL",
    );
    Ok(rows.bind(products).fetch_all(connection).await?)
}

/// A place in a partition's history: what Redis had there is worked out of what Postgres has later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The epoch that it was read under.
    pub epoch: u64,
    /// n of the newest change there.
    pub n: u64,
    /// Up to where Redis had the inbox there.
    pub mark: InboxMark,
}

/// What Postgres says of one product at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub product: String,
    /// The units that Redis has to have there; `None` where Postgres has no such product now.
    pub units: Option<i64>,
    /// The part of them that `holdfast.stock` itself does not show.
    pub in_flight: i64,
    /// Whether it was set or deleted after the place: then whether it existed there is not known.
    pub unsettled: bool,
    pub low: Option<i64>,
    pub frozen: Option<String>,
    /// The units that orders have to hold there.
    pub held: i64,
}

/// The one formula, for some products, all in one snapshot:
///
/// what Redis had = available + parked - moved after - not told
///
/// - parked: dead letters that Redis has moved by and available has not. Their rows in the ledger say pg_delta as if it had.
/// - moved after: pg_delta of the changes behind the place. Redis had not made them yet.
/// - not told: inbox rows behind the mark. Other programs have moved available by them, and Redis had not been told yet.
///
/// Likewise what was held = held - held_delta of the changes behind the place.
///
/// A place that is not given is up to where the outbox has been applied.
const EXPECTED: &str = "WITH at AS (SELECT p.id, p.epoch AS now_epoch, p.applied_n, coalesce($3, p.epoch) AS epoch, coalesce($4, p.applied_n) AS n, \
     coalesce($5, p.inbox_xid) AS xid, coalesce($6, p.inbox_id) AS inbox_id FROM holdfast.partition p WHERE p.id = $1) \
     SELECT at.now_epoch, at.applied_n, at.n, at.xid, at.inbox_id, q.product, s.deleted_at IS NULL AND s.product_id IS NOT NULL, \
     coalesce(s.available, 0), parked.units, after.units, untold.units, after.life OR untold.life, s.low, s.frozen, \
     coalesce(s.held, 0) - after.held \
     FROM at CROSS JOIN unnest($2::text[]) WITH ORDINALITY AS q (product, place) \
     LEFT JOIN holdfast.stock s ON s.product_id = q.product \
     CROSS JOIN LATERAL (SELECT coalesce(sum(d.delta), 0)::bigint AS units FROM holdfast.dead_letter d \
     WHERE d.product_id = q.product AND d.in_redis AND d.partition = at.id) AS parked \
     CROSS JOIN LATERAL (SELECT coalesce(sum(l.pg_delta), 0)::bigint AS units, coalesce(sum(l.held_delta), 0)::bigint AS held, \
     coalesce(bool_or(l.kind IN ('set', 'delete')), false) AS life \
     FROM holdfast.stock_ledger l \
     WHERE l.product_id = q.product AND l.partition = at.id AND (l.epoch, l.n) > (at.epoch, at.n)) AS after \
     CROSS JOIN LATERAL (SELECT holdfast.inbox_ahead(q.product, at.xid, at.inbox_id) AS units, \
     coalesce(bool_or(i.kind IN ('create', 'delete')), false) AS life FROM holdfast.inbox i \
     WHERE i.product_id = q.product AND (i.xid, i.id) > (at.xid::text::xid8, at.inbox_id)) AS untold \
     ORDER BY q.place";

#[derive(sqlx::FromRow)]
struct ExpectedRow(i64, i64, i64, i64, i64, String, bool, i64, i64, i64, i64, bool, Option<i64>, Option<String>, i64);

/// Works out what Redis had of the products at a place, in the order asked for. `None` where that cannot be said: the epoch is over, or
/// Postgres does not have everything up to there. Without a place: up to where the outbox has been applied, which is returned.
///
/// The rows of the inbox behind the mark must still be there, and so must the rows of the ledger.
pub async fn expected(
    connection: &mut PgConnection,
    partition: u32,
    products: &[String],
    at: Option<At>,
) -> Result<Option<(At, Vec<Expected>)>, Error> {
    let rows: Vec<ExpectedRow> = sqlx::query_as(EXPECTED)
        .bind(partition::id(partition))
        .bind(products)
        .bind(at.map(|at| to_bigint(at.epoch)))
        .bind(at.map(|at| to_bigint(at.n)))
        .bind(at.map(|at| to_bigint(at.mark.xid)))
        .bind(at.map(|at| to_bigint(at.mark.id)))
        .fetch_all(connection)
        .await?;
    let Some(&ExpectedRow(epoch, applied_n, n, xid, id, ..)) = rows.first() else { return Ok(None) };
    let place = At { epoch: from_bigint(epoch), n: from_bigint(n), mark: InboxMark { xid: from_bigint(xid), id: from_bigint(id) } };
    if at.is_some_and(|at| at.epoch != place.epoch || at.n > from_bigint(applied_n)) {
        return Ok(None);
    }
    let expected = |row: ExpectedRow| {
        let ExpectedRow(.., product, exists, available, parked, after, untold, unsettled, low, frozen, held) = row;
        let in_flight = parked.saturating_sub(after).saturating_sub(untold);
        let units = exists.then(|| available.saturating_add(in_flight));
        Expected { product, units, in_flight, unsettled, low, frozen, held }
    };
    Ok(Some((place, rows.into_iter().map(expected).collect())))
}

/// The products that exist behind `after`, in the order of their ids, at most `limit`.
pub async fn page(connection: &mut PgConnection, after: &str, limit: usize) -> Result<Vec<String>, Error> {
    let products = sqlx::query_scalar(
        "SELECT product_id FROM holdfast.stock WHERE product_id > $1 AND deleted_at IS NULL ORDER BY product_id LIMIT $2",
    );
    Ok(products.bind(after).bind(i64::try_from(limit).unwrap_or(i64::MAX)).fetch_all(connection).await?)
}

/// The products that changed after a position, by the newest `limit` rows of the ledger at most.
pub async fn changed(connection: &mut PgConnection, partition: u32, after: Position, limit: i64) -> Result<Vec<String>, Error> {
    let products = sqlx::query_scalar(
        "SELECT DISTINCT l.product_id FROM (SELECT product_id FROM holdfast.stock_ledger WHERE partition = $1 AND (epoch, n) > ($2, $3) \
         ORDER BY epoch DESC, n DESC LIMIT $4) AS l",
    );
    let products = products.bind(partition::id(partition)).bind(to_bigint(after.epoch)).bind(to_bigint(after.n)).bind(limit);
    Ok(products.fetch_all(connection).await?)
}

/// Those of the products that have not been here for so long. One without a row went no earlier than its newest row in the ledger.
pub async fn gone_for(connection: &mut PgConnection, products: &[String], long: Duration) -> Result<Vec<String>, Error> {
    let gone = sqlx::query_scalar(
        "SELECT p FROM unnest($1::text[]) AS p LEFT JOIN holdfast.stock s ON s.product_id = p \
         CROSS JOIN (SELECT now() - $2 * interval '1 second' AS before) AS long \
         WHERE s.deleted_at < long.before OR (s.product_id IS NULL AND coalesce((SELECT l.at FROM holdfast.stock_ledger l \
         WHERE l.product_id = p ORDER BY l.epoch DESC, l.n DESC LIMIT 1) < long.before, true))",
    );
    Ok(gone.bind(products).bind(long.as_secs_f64()).fetch_all(connection).await?)
}

/// Those of the products that do not exist here.
pub async fn unknown(connection: &mut PgConnection, products: &[String]) -> Result<Vec<String>, Error> {
    let unknown = sqlx::query_scalar(
        "SELECT p FROM unnest($1::text[]) AS p \
         WHERE NOT EXISTS (SELECT 1 FROM holdfast.stock s WHERE s.product_id = p AND s.deleted_at IS NULL)",
    );
    Ok(unknown.bind(products).fetch_all(connection).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::{database, execute};

    #[tokio::test]
    async fn what_redis_had_is_worked_out_from_what_came_later() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(
            connection,
            "SET holdfast.writer = 'holdfast';
             UPDATE holdfast.partition SET applied_epoch = 1, applied_n = 12, inbox_xid = 7, inbox_id = 3;
             INSERT INTO holdfast.stock (product_id, available, low, frozen, deleted_at)
             VALUES ('a', 100, 5, 'why', NULL), ('b', 10, NULL, NULL, NULL), ('gone', 0, NULL, NULL, now());
             INSERT INTO holdfast.stock_ledger (partition, epoch, n, i, op, k, product_id, kind, redis_delta, pg_delta, available_after, at)
             VALUES (0, 1, 9, 0, 'x', 0, 'a', 'decr', -1, -1, 0, now()), (0, 1, 11, 0, 'x', 1, 'a', 'decr', -20, -20, 0, now()),
             (0, 1, 11, 2, 'x', 1, 'a', 'decr', -400, -400, 0, now()),
             (0, 1, 11, 1, 'x', 1, 'b', 'set', 3, 3, 0, now()), (0, 1, 12, 0, 'x', 2, 'a', 'init', 9, 0, 0, now());
             INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, product_id, kind, delta, in_redis, reason, line)
             VALUES (0, 1, 8, 0, 'x', 3, 'a', 'decr', -4, true, '', ''), (0, 1, 11, 2, 'x', 4, 'a', 'decr', -400, true, '', ''),
             (0, 1, 7, 0, 'x', 5, 'a', 'decr', -4000, false, '', '');
             INSERT INTO holdfast.inbox (xid, product_id, kind, delta)
             VALUES ('6', 'a', 'move', 1000), ('8', 'a', 'move', 50), ('9', 'gone', 'delete', -2);",
        )
        .await;
        let products = ["a", "b", "gone", "nowhere"].map(str::to_owned);
        let at = At { epoch: 1, n: 10, mark: InboxMark { xid: 7, id: 3 } };
        let (place, rows) = expected(connection, 0, &products, Some(at)).await.unwrap().unwrap();
        let row = |product: &str, units, in_flight, unsettled| Expected {
            product: product.into(),
            units,
            in_flight,
            unsettled,
            low: None,
            frozen: None,
            held: 0,
        };
        let a = Expected { low: Some(5), frozen: Some("why".into()), ..row("a", Some(100 - 4 + 20 - 50), -34, false) };
        assert_eq!(place, at);
        assert_eq!(rows, [a, row("b", Some(7), -3, true), row("gone", None, 0, true), row("nowhere", None, 0, false)]);

        let (place, rows) = expected(connection, 0, &products[..1], None).await.unwrap().unwrap();
        assert_eq!(place, At { epoch: 1, n: 12, mark: at.mark });
        assert_eq!(rows[0].units, Some(100 - 404 - 50));
        assert_eq!(expected(connection, 0, &products, Some(At { n: 13, ..at })).await.unwrap(), None, "not applied yet");
        assert_eq!(expected(connection, 0, &products, Some(At { epoch: 2, ..at })).await.unwrap(), None, "another epoch");

        assert_eq!(page(connection, "", 1).await.unwrap(), ["a"]);
        assert_eq!(page(connection, "a", 9).await.unwrap(), ["b"]);
        assert_eq!(unknown(connection, &products).await.unwrap(), ["gone", "nowhere"]);
        let mut changed = changed(connection, 0, Position::new(1, 10), 100).await.unwrap();
        changed.sort();
        assert_eq!(changed, ["a", "b"]);
    }
}
