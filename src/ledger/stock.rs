//! Reads products.

use sqlx::PgConnection;

use super::{Error, from_bigint, partition};
use crate::domain::InboxMark;

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

/// What Redis has to hold of a product once it has every change that Postgres has, and the inbox up to `mark`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub product: String,
    pub available: i64,
    pub mark: InboxMark,
}

/// Reads that for the products that exist, in no particular order. It is what Postgres has, with what is owed to it and Redis has given
/// already, without what other programs changed and Redis has not been told.
pub async fn expected(connection: &mut PgConnection, partition: u32, products: &[String]) -> Result<Vec<Expected>, Error> {
    let rows: Vec<(String, i64, i64, i64)> = sqlx::query_as(
        "SELECT s.product_id, (s.available \
         + coalesce((SELECT sum(d.delta) FROM holdfast.dead_letter d WHERE d.product_id = s.product_id AND d.in_redis), 0) \
         - coalesce((SELECT sum(i.delta) FROM holdfast.inbox i WHERE i.product_id = s.product_id \
         AND (i.xid, i.id) > (p.inbox_xid::text::xid8, p.inbox_id)), 0))::bigint, p.inbox_xid, p.inbox_id \
         FROM holdfast.stock s, holdfast.partition p WHERE p.id = $1 AND s.product_id = ANY($2) AND s.deleted_at IS NULL",
    )
    .bind(partition::id(partition))
    .bind(products)
    .fetch_all(connection)
    .await?;
    let row = |(product, available, xid, id): (String, i64, i64, i64)| Expected {
        product,
        available: available.max(0),
        mark: InboxMark { xid: from_bigint(xid), id: from_bigint(id) },
    };
    Ok(rows.into_iter().map(row).collect())
}
