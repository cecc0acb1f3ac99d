//! Reads what became of a product.

use sqlx::PgConnection;

use super::{Error, from_bigint, partition, to_bigint};
use crate::domain::Position;
use crate::domain::history::PastChange;

/// The changes of a product, the newest first, at most `count`; only those before a position, where one is given.
pub async fn of_product(
    connection: &mut PgConnection,
    partition: u32,
    product: &str,
    before: Option<Position>,
    count: i64,
) -> Result<Vec<PastChange>, Error> {
    type Columns = (i64, i64, String, i64, i64, i64, Option<String>, Option<String>, i64, i32);
    let rows: Vec<Columns> = sqlx::query_as(
        "SELECT epoch, n, kind, redis_delta, available_after, held_delta, order_id, request_id, (extract(epoch FROM at) * 1000)::bigint, \
         operations \
         FROM holdfast.stock_ledger WHERE product_id = $1 AND partition = $2 AND ($3::bigint IS NULL OR (epoch, n) < ($3, $4)) \
         ORDER BY epoch DESC, n DESC LIMIT $5",
    )
    .bind(product)
    .bind(partition::id(partition))
    .bind(before.map(|before| to_bigint(before.epoch)))
    .bind(before.map(|before| to_bigint(before.n)))
    .bind(count)
    .fetch_all(connection)
    .await?;
    let change = |(epoch, n, kind, delta, available, held_delta, order, request, at_ms, operations)| PastChange {
        position: Position::new(from_bigint(epoch), from_bigint(n)),
        kind,
        delta,
        available,
        held_delta,
        order,
        request,
        at_ms,
        operations: i64::from(operations),
    };
    Ok(rows.into_iter().map(change).collect())
}
