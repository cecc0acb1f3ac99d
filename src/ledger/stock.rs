//! Reads products.

use sqlx::PgConnection;

use super::Error;

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
