//! Reads coupons.

use sqlx::PgConnection;

use super::Error;

/// A coupon as far as the outbox has been applied. Times in Unix ms.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct CouponRow {
    #[sqlx(rename = "coupon_id")]
    pub coupon: String,
    pub total: i64,
    /// How many are out.
    pub issued: i64,
    /// How many of them were redeemed.
    pub used: i64,
    pub per_user: i64,
    pub start_ms: Option<i64>,
    pub end_ms: Option<i64>,
    /// The highest serial ever issued.
    pub last_serial: i64,
    pub state: String,
}

/// Reads one coupon; `None` where there is none.
pub async fn load(connection: &mut PgConnection, coupon: &str) -> Result<Option<CouponRow>, Error> {
    let row = sqlx::query_as(
        "SELECT coupon_id, total, issued, used, per_user, start_ms, end_ms, last_serial, state FROM holdfast.coupon WHERE coupon_id = $1",
    );
    Ok(row.bind(coupon).fetch_optional(connection).await?)
}
