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

/// A row of `stock_ledger`.
#[derive(sqlx::FromRow)]
struct StockRow {
    #[sqlx(flatten)]
    place: Place,
    kind: String,
    product_id: String,
    redis_delta: i64,
    available_after: i64,
    held_delta: i64,
    order_id: Option<String>,
    expires_ms: Option<i64>,
    runs: Option<String>,
}

impl StockRow {
    fn kind(&self) -> Result<StockKind, Error> {
        StockKind::parse(&self.kind).ok_or_else(|| Error::Unfit(format!("holdfast.stock_ledger: kind {:?}", self.kind)))
    }

    fn item(&self) -> Item {
        Item { product: self.product_id.clone(), delta: self.redis_delta, available: self.available_after }
    }

    /// The operation at place `k` among those that it stands for, with its place in the ledger.
    fn at(&self, k: u32) -> Result<Option<(Place, Effect)>, Error> {
        let Some(runs) = self.runs.as_deref().map(write::runs).transpose()? else { return Ok(None) };
        let detail = Detail { runs: Some(Box::new(runs)), ..Detail::default() };
        let line = Operation { k, remembered: None, effect: Effect::Stock { kind: self.kind()?, items: vec![self.item()], detail } };
        let found = (self.place.1..).zip(line.each()).find(|(_, operation)| operation.k == k);
        Ok(found.map(|(n, operation)| {
            let mut place = self.place.clone();
            place.1 = n;
            (place, operation.effect)
        }))
    }
}

async fn stock(connection: &mut PgConnection, sent: &Sent) -> Result<Option<(Place, Effect)>, Error> {
    let rows: Vec<StockRow> = sqlx::query_as(
        "SELECT epoch, n, origin_epoch, origin_n, request_id, request_digest, kind, product_id, redis_delta, available_after, \
         held_delta, order_id, expires_ms, runs \
         FROM holdfast.stock_ledger WHERE (op = $1 AND (k = $2 OR runs IS NOT NULL)) OR (request_id = $3 AND request_id LIKE 'hf-%') \
         ORDER BY epoch, n, i",
    )
    .bind(sent.op())
    .bind(write::small(sent.k))
    .bind(sent.id())
    .fetch_all(connection)
    .await?;
    for row in &rows {
        if let Some(found) = row.at(sent.k)? {
            return Ok(Some(found));
        }
    }
    let rows: Vec<&StockRow> = rows.iter().filter(|row| row.runs.is_none()).collect();
    let Some(first) = rows.first() else { return Ok(None) };
    let kind = first.kind()?;
    let of_it: Vec<&StockRow> = rows.iter().filter(|row| (row.place.0, row.place.1) == (first.place.0, first.place.1)).copied().collect();
    let order = first.order_id.clone().map(|order| {
        let is_of_nothing = of_it.iter().all(|row| row.product_id.is_empty());
        let from = match kind {
            StockKind::Reserve | StockKind::Sell => None,
            StockKind::Cancel if is_of_nothing => None,
            StockKind::Cancel if of_it.iter().all(|row| row.held_delta == 0) => Some(OrderState::Confirmed),
            _ => Some(OrderState::Held),
        };
        // An extension's row does not say how many units it was of.
        let units = of_it.iter().filter(|row| !row.product_id.is_empty()).map(|row| row.redis_delta.abs().max(row.held_delta.abs()));
        Box::new(OrderChange { order, expires_ms: first.expires_ms, from, units: units.collect() })
    });
    let items = of_it.iter().filter(|row| !row.product_id.is_empty()).map(|row| row.item()).collect();
    Ok(Some((first.place.clone(), Effect::Stock { kind, items, detail: Detail { order, ..Detail::default() } })))
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
        (_, Some(step), Some(user), Some(serial)) => {
            CouponChange::Step(Stepped { step, user, serial, order: row.order_id, token: None, remaining })
        }
        _ => return Err(Error::Unfit(format!("holdfast.coupon_ledger: kind {:?}", row.kind))),
    };
    Ok(Some((row.place, Effect::Coupon { coupon: row.coupon_id, change })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::change::Entry;
    use crate::ledger::apply;
    use crate::ledger::testing::database;

    #[tokio::test]
    async fn an_operation_is_found_in_a_row_with_others() {
        let mut database = database().await;
        let lines = ["0 set | a 10 10", "1 mixed runs=1:-3,3-4:1 | a -1 9", "2 set | b 5 5", "5 decr request=r digest=d | a -2 7"];
        let operations: Vec<Operation> = lines.iter().map(|line| Operation::decode(line).unwrap()).collect();
        let lane = format!("{}:stock", "0123456789abcdef".repeat(2));
        let op = format!("{lane}:4");
        let entry = Entry { last: Position::new(1, 6), first_n: 1, prev: "-".into(), op, at_ms: 7, operations };
        apply(&mut database.connection, 0, &[entry]).await.unwrap();
        let mut found = async |counter, k| {
            let sent = Sent { lane: lane.clone(), counter, k };
            let found = find(&mut database.connection, &sent).await.unwrap();
            found.map(|found| format!("{} {}", found.position, found.operation))
        };
        assert_eq!(found(4, 1).await.as_deref(), Some("1-2 1 decr | a -3 7"));
        assert_eq!(found(4, 3).await.as_deref(), Some("1-3 3 incr | a 1 8"));
        assert_eq!(found(4, 4).await.as_deref(), Some("1-4 4 incr | a 1 9"));
        assert_eq!(found(4, 2).await.as_deref(), Some("1-5 2 set | b 5 5"));
        assert_eq!(found(4, 5).await.as_deref(), Some("1-6 5 decr request=r digest=d | a -2 7"));
        assert_eq!(found(4, 6).await, None);
        assert_eq!(found(5, 1).await, None);
    }
}
