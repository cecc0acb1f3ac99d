//! Finds changes in the ledgers by the batch that carried them.

use sqlx::PgConnection;

use super::{Error, from_bigint, write};
use crate::domain::change::{Detail, Effect, Item, Operation, Recorded, Remembered, StockKind};
use crate::domain::coupon::{CouponChange, CouponStep, CouponTerms, NewTerms, Stepped};
use crate::domain::request::Sent;
use crate::domain::{OrderChange, OrderState, Position};

/// Where a row of either ledger stands: epoch, n, origin's epoch, origin's n, REQUEST id, its fingerprint.
type Place = (i64, i64, Option<i64>, Option<i64>, Option<String>, Option<String>);

/// What became of an operation: itself, by op and k, or what was done under the REQUEST id that stands for it. `None` where the ledgers have
/// neither.
pub async fn find(connection: &mut PgConnection, sent: &Sent) -> Result<Option<Recorded>, Error> {
    let found = match stock(connection, sent).await? {
        None => coupon(connection, sent).await?,
        found => found,
    };
    Ok(found.map(|((epoch, n, origin_epoch, origin_n, request, digest), effect)| {
        let position = Position::new(from_bigint(origin_epoch.unwrap_or(epoch)), from_bigint(origin_n.unwrap_or(n)));
        let remembered = request.zip(digest).map(|(request, digest)| Remembered { request, digest });
        Recorded { position, operation: Operation { k: sent.k, remembered, effect } }
    }))
}

async fn stock(connection: &mut PgConnection, sent: &Sent) -> Result<Option<(Place, Effect)>, Error> {
    #[derive(sqlx::FromRow)]
    struct Row {
        #[sqlx(flatten)]
        place: Place,
        kind: String,
        product_id: String,
        redis_delta: i64,
        available_after: i64,
        held_delta: i64,
        order_id: Option<String>,
        expires_ms: Option<i64>,
    }
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT epoch, n, origin_epoch, origin_n, request_id, request_digest, kind, product_id, redis_delta, available_after, \
         held_delta, order_id, expires_ms \
         FROM holdfast.stock_ledger WHERE (op = $1 AND k = $2) OR (request_id = $3 AND request_id LIKE 'hf-%') ORDER BY epoch, n, i",
    )
    .bind(sent.op())
    .bind(write::small(sent.k))
    .bind(sent.id())
    .fetch_all(connection)
    .await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let kind = StockKind::parse(&first.kind).ok_or_else(|| Error::Unfit(format!("holdfast.stock_ledger: kind {:?}", first.kind)))?;
    let (place, order_id, expires_ms) = (first.place.clone(), first.order_id.clone(), first.expires_ms);
    let of_it: Vec<Row> = rows.into_iter().filter(|row| (row.place.0, row.place.1) == (place.0, place.1)).collect();
    let order = order_id.map(|order| {
        let is_of_nothing = of_it.iter().all(|row| row.product_id.is_empty());
        let from = match kind {
            StockKind::Reserve | StockKind::Sell => None,
            StockKind::Cancel if is_of_nothing => None,
            StockKind::Cancel if of_it.iter().all(|row| row.held_delta == 0) => Some(OrderState::Confirmed),
            _ => Some(OrderState::Held),
        };
        // An extension's row does not say how many units it was of.
        let units = of_it.iter().filter(|row| !row.product_id.is_empty()).map(|row| row.redis_delta.abs().max(row.held_delta.abs()));
        Box::new(OrderChange { order, expires_ms, from, units: units.collect() })
    });
    let of_it = of_it.into_iter().filter(|row| !row.product_id.is_empty());
    let items = of_it.map(|row| Item { product: row.product_id, delta: row.redis_delta, available: row.available_after }).collect();
    Ok(Some((place, Effect::Stock { kind, items, detail: Detail { order, ..Detail::default() } })))
}

async fn coupon(connection: &mut PgConnection, sent: &Sent) -> Result<Option<(Place, Effect)>, Error> {
    #[derive(sqlx::FromRow)]
    struct Row {
        #[sqlx(flatten)]
        place: Place,
        coupon_id: String,
        kind: String,
        user_id: Option<String>,
        serial: Option<i64>,
        order_id: Option<String>,
        remaining_after: i64,
        total_delta: i64,
        total: Option<i64>,
        per_user: Option<i64>,
        start_ms: Option<i64>,
        end_ms: Option<i64>,
    }
    let row: Option<Row> = sqlx::query_as(
        "SELECT epoch, n, origin_epoch, origin_n, request_id, request_digest, coupon_id, kind, user_id, serial, order_id, remaining_after, \
         total_delta, total, per_user, start_ms, end_ms FROM holdfast.coupon_ledger \
         WHERE (op = $1 AND k = $2) OR (request_id = $3 AND request_id LIKE 'hf-%') ORDER BY epoch, n LIMIT 1",
    )
    .bind(sent.op())
    .bind(write::small(sent.k))
    .bind(sent.id())
    .fetch_optional(connection)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let (total, remaining) = (row.total, row.remaining_after);
    let change = match (row.kind.as_str(), CouponStep::parse(&row.kind), row.user_id, row.serial) {
        ("create", ..) => CouponChange::Create(CouponTerms {
            total: total.unwrap_or(remaining),
            per_user: row.per_user.unwrap_or(1),
            start_ms: row.start_ms,
            end_ms: row.end_ms,
        }),
        ("alter", ..) => {
            let terms = NewTerms { total, start_ms: row.start_ms, end_ms: row.end_ms };
            CouponChange::Alter { terms, remaining, by: Some(row.total_delta) }
        }
        ("delete", ..) => CouponChange::Delete,
        (_, Some(step), Some(user), Some(serial)) => CouponChange::Step(Stepped { step, user, serial, order: row.order_id, remaining }),
        _ => return Err(Error::Unfit(format!("holdfast.coupon_ledger: kind {:?}", row.kind))),
    };
    Ok(Some((row.place, Effect::Coupon { coupon: row.coupon_id, change })))
}
