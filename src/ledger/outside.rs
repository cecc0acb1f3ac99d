//! What moves beside the ledgers: `holdfast.outside`. Triggers add what other programs change; here stands what a dead letter leaves.

use sqlx::PgConnection;

use super::Error;
use crate::domain::change::{Effect, Operation};

/// Notes that what a dead letter of a product owes will never come, at least not as its row in the ledger says. One without a row there
/// needs no note: `in_redis` always has one, another is looked for by its `op`, `k` and `i`.
pub(super) async fn product_given_up(
    connection: &mut PgConnection,
    product: &str,
    delta: i64,
    in_redis: bool,
    (op, k, i): (&str, i32, i32),
) -> Result<(), Error> {
    sqlx::query(
        "INSERT INTO holdfast.outside AS o (kind, id, available) SELECT 'product', $1, -$2 \
         WHERE $3 OR EXISTS (SELECT 1 FROM holdfast.stock_ledger l WHERE l.op = $4 AND l.k = $5 AND l.i = $6) \
         ON CONFLICT (kind, id) DO UPDATE SET available = o.available + excluded.available",
    )
    .bind(product)
    .bind(delta)
    .bind(in_redis)
    .bind(op)
    .bind(k)
    .bind(i)
    .execute(connection)
    .await?;
    Ok(())
}

/// The same of a coupon's change, which stands in the ledger by `op` and `k`.
pub(super) async fn coupon_given_up(connection: &mut PgConnection, line: &str, op: &str, k: i32) -> Result<(), Error> {
    let Ok(Operation { effect: Effect::Coupon { coupon, change }, .. }) = Operation::decode(line) else { return Ok(()) };
    let [total, issued, used] = change.moves();
    sqlx::query(
        "INSERT INTO holdfast.outside AS o (kind, id, total, issued, used) SELECT 'coupon', $1, -$2, -$3, -$4 \
         WHERE EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.op = $5 AND l.k = $6) \
         ON CONFLICT (kind, id) DO UPDATE SET total = o.total + excluded.total, issued = o.issued + excluded.issued, \
         used = o.used + excluded.used",
    )
    .bind(coupon)
    .bind(total)
    .bind(issued)
    .bind(used)
    .bind(op)
    .bind(k)
    .execute(connection)
    .await?;
    Ok(())
}
