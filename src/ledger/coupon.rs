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

/// One coupon of a user.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct HeldRow {
    #[sqlx(rename = "user_id")]
    pub user: String,
    pub serial: i64,
    pub state: String,
    pub issued_at_ms: i64,
    #[sqlx(rename = "order_id")]
    pub order: Option<String>,
}

/// Who has a coupon, those of one user together and by serial; `None` where more than `most` are out.
pub async fn held(connection: &mut PgConnection, coupon: &str, most: usize) -> Result<Option<Vec<HeldRow>>, Error> {
    let rows: Vec<HeldRow> = sqlx::query_as(
        "SELECT user_id, serial, state, (extract(epoch FROM issued_at) * 1000)::bigint AS issued_at_ms, order_id FROM holdfast.coupon_issue \
         WHERE coupon_id = $1 AND state <> 'revoked' ORDER BY user_id, serial LIMIT $2",
    )
    .bind(coupon)
    .bind(i64::try_from(most + 1).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await?;
    Ok((rows.len() <= most).then_some(rows))
}

/// Reads one coupon; `None` where there is none.
pub async fn load(connection: &mut PgConnection, coupon: &str) -> Result<Option<CouponRow>, Error> {
    let row = sqlx::query_as(
        "SELECT coupon_id, total, issued, used, per_user, start_ms, end_ms, last_serial, state FROM holdfast.coupon WHERE coupon_id = $1",
    );
    Ok(row.bind(coupon).fetch_optional(connection).await?)
}
