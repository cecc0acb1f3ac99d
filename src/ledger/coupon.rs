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

/// The first who have a coupon behind the user `behind`, in the order of users, all of one together and by serial: at most `most` rows, and
/// whether there are more. None at all where one user has more.
pub async fn held(connection: &mut PgConnection, coupon: &str, behind: &str, most: usize) -> Result<(Vec<HeldRow>, bool), Error> {
    let mut rows: Vec<HeldRow> = sqlx::query_as(
        "SELECT user_id, serial, state, (extract(epoch FROM issued_at) * 1000)::bigint AS issued_at_ms, order_id FROM holdfast.coupon_issue \
         WHERE coupon_id = $1 AND user_id > $2 AND state <> 'revoked' ORDER BY user_id, serial LIMIT $3",
    )
    .bind(coupon)
    .bind(behind)
    .bind(i64::try_from(most + 1).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await?;
    let cut = rows.get(most).map(|row| row.user.clone());
    if let Some(user) = &cut {
        rows.retain(|row| row.user != *user);
    }
    Ok((rows, cut.is_some()))
}

/// Reads one coupon; `None` where there is none.
pub async fn load(connection: &mut PgConnection, coupon: &str) -> Result<Option<CouponRow>, Error> {
    let row = sqlx::query_as(
        "SELECT coupon_id, total, issued, used, per_user, start_ms, end_ms, last_serial, state FROM holdfast.coupon WHERE coupon_id = $1",
    );
    Ok(row.bind(coupon).fetch_optional(connection).await?)
}
