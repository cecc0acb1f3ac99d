//! Orders: written with the changes that made them, and read when Redis no longer has them.

use std::collections::HashMap;

use sqlx::PgConnection;

use super::changes::Place;
use super::{Error, from_bigint, partition, to_bigint};
use crate::domain::change::{Item, StockKind};
use crate::domain::{Order, OrderChange, OrderState, Position};
use crate::limits::ORDER_KEPT_MS;

/// An order as the changes of a run leave it.
#[derive(Clone, Debug)]
pub(super) struct OrderMove<'a> {
    order: &'a str,
    /// Where it began; `None` of one that began before the run.
    start: Option<(u64, u64)>,
    state: OrderState,
    /// `None` leaves it as it is.
    expires_ms: Option<i64>,
    items: &'a [Item],
    units: &'a [i64],
    created_ms: i64,
    changed: Position,
    changed_ms: i64,
    /// Where it stands in the ledger.
    place: (u64, u64),
}

/// The orders of a run, in the order in which they were first mentioned.
#[derive(Default)]
pub(super) struct Orders<'a> {
    moves: Vec<OrderMove<'a>>,
    latest: HashMap<&'a str, usize>,
}

impl<'a> Orders<'a> {
    pub(super) fn is_empty(&self) -> bool {
        self.moves.is_empty()
    }

    /// Takes in what a change did to an order.
    pub(super) fn add(&mut self, place: Place<'_>, kind: StockKind, items: &'a [Item], change: &'a OrderChange) {
        let Some(state) = OrderState::after(kind) else { return };
        let changed = place.origin.unwrap_or(Position::new(place.epoch, place.n));
        let known = self.latest.get(change.order.as_str()).and_then(|latest| self.moves.get_mut(*latest));
        if let Some(known) = known.filter(|_| change.from.is_some()) {
            known.state = state;
            known.expires_ms = change.expires_ms.or(known.expires_ms);
            (known.changed, known.changed_ms) = (changed, place.at_ms);
            return;
        }
        self.latest.insert(&change.order, self.moves.len());
        self.moves.push(OrderMove {
            order: &change.order,
            start: change.from.is_none().then_some((place.epoch, place.n)),
            state,
            expires_ms: change.expires_ms,
            items,
            units: &change.units,
            created_ms: place.at_ms,
            changed,
            changed_ms: place.at_ms,
            place: (place.epoch, place.n),
        });
    }
}

/// Writes them. One that changed and is not here is written as if it began with that change.
pub(super) async fn write(connection: &mut PgConnection, partition: u32, orders: &Orders<'_>) -> Result<(), Error> {
    let (begun, moved): (Vec<&OrderMove<'_>>, Vec<&OrderMove<'_>>) = orders.moves.iter().partition(|order| order.start.is_some());
    if !moved.is_empty() {
        let missing = update(connection, &moved).await?;
        insert(connection, partition, &moved.into_iter().filter(|order| missing.contains(&order.order.to_owned())).collect::<Vec<_>>())
            .await?;
    }
    insert(connection, partition, &begun).await
}

/// Returns those that are not here. Nor is one behind whose last row another of its id was begun, which that row refused.
async fn update(connection: &mut PgConnection, moved: &[&OrderMove<'_>]) -> Result<Vec<String>, Error> {
    let updated: Vec<String> = sqlx::query_scalar(
        "UPDATE holdfast.stock_order AS o SET state = m.state, expires_ms = coalesce(m.expires_ms, o.expires_ms), \
         changed_epoch = m.epoch, changed_n = m.n, changed_at = timestamptz 'epoch' + m.at_ms * interval '1 millisecond' \
         FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[]) \
         AS m (order_id, state, expires_ms, epoch, n, at_ms, place_epoch, place_n) CROSS JOIN LATERAL (SELECT l.epoch, l.n FROM holdfast.stock_order l \
         WHERE l.order_id = m.order_id ORDER BY l.epoch DESC, l.n DESC LIMIT 1) AS last \
         WHERE o.order_id = m.order_id AND o.epoch = last.epoch AND o.n = last.n AND NOT EXISTS (SELECT 1 FROM holdfast.stock_ledger b \
         WHERE b.order_id = m.order_id AND (b.epoch, b.n) > (o.epoch, o.n) AND (b.epoch, b.n) < (m.place_epoch, m.place_n) \
         AND b.epoch >= coalesce(o.adopted_epoch, 0) AND (b.kind IN ('reserve', 'sell') OR b.kind = 'cancel' AND b.product_id = '')) RETURNING o.order_id",
    )
    .bind(moved.iter().map(|order| order.order).collect::<Vec<_>>())
    .bind(moved.iter().map(|order| order.state.as_str()).collect::<Vec<_>>())
    .bind(moved.iter().map(|order| order.expires_ms).collect::<Vec<_>>())
    .bind(moved.iter().map(|order| to_bigint(order.changed.epoch)).collect::<Vec<_>>())
    .bind(moved.iter().map(|order| to_bigint(order.changed.n)).collect::<Vec<_>>())
    .bind(moved.iter().map(|order| order.changed_ms).collect::<Vec<_>>())
    .bind(moved.iter().map(|order| to_bigint(order.place.0)).collect::<Vec<_>>())
    .bind(moved.iter().map(|order| to_bigint(order.place.1)).collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    if updated.len() == moved.len() {
        return Ok(Vec::new());
    }
    Ok(moved.iter().map(|order| order.order.to_owned()).filter(|order| !updated.contains(order)).collect())
}

async fn insert(connection: &mut PgConnection, partition: u32, begun: &[&OrderMove<'_>]) -> Result<(), Error> {
    if begun.is_empty() {
        return Ok(());
    }
    let products = |order: &OrderMove<'_>| order.items.iter().map(|item| item.product.as_str()).collect::<Vec<_>>().join(" ");
    let units = |order: &OrderMove<'_>| order.units.iter().map(i64::to_string).collect::<Vec<_>>().join(" ");
    sqlx::query(
        "INSERT INTO holdfast.stock_order (order_id, epoch, n, partition, state, expires_ms, products, units, changed_epoch, changed_n, \
         created_at, changed_at) SELECT m.order_id, m.epoch, m.n, $1, m.state, m.expires_ms, string_to_array(m.products, ' '), \
         string_to_array(m.units, ' ')::bigint[], m.changed_epoch, m.changed_n, timestamptz 'epoch' + m.created_ms * interval '1 millisecond', \
         timestamptz 'epoch' + m.changed_ms * interval '1 millisecond' \
         FROM (SELECT unnest($2::text[]) AS order_id, unnest($3::bigint[]) AS epoch, unnest($4::bigint[]) AS n, unnest($5::text[]) AS \
         state, unnest($6::bigint[]) AS expires_ms, unnest($7::text[]) AS products, unnest($8::text[]) AS units, unnest($9::bigint[]) \
         AS changed_epoch, unnest($10::bigint[]) AS changed_n, unnest($11::bigint[]) AS created_ms, unnest($12::bigint[]) AS \
         changed_ms) AS m",
    )
    .bind(partition::id(partition))
    .bind(begun.iter().map(|order| order.order).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| to_bigint(order.place.0)).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| to_bigint(order.place.1)).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| order.state.as_str()).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| order.expires_ms).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| products(order)).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| units(order)).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| to_bigint(order.changed.epoch)).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| to_bigint(order.changed.n)).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| order.created_ms).collect::<Vec<_>>())
    .bind(begun.iter().map(|order| order.changed_ms).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes the rows of orders whose beginnings are among the dead letters, as they stand: those are given up.
pub(super) async fn write_begun(connection: &mut PgConnection) -> Result<(), Error> {
    let query = format!(
        "INSERT INTO holdfast.stock_order (order_id, epoch, n, partition, products, units, created_at, state, expires_ms, changed_epoch, \
         changed_n, changed_at) SELECT o.order_id, o.epoch, o.n, o.partition, o.products, o.units, o.changed_at, {STATE}, \
         coalesce(said.expires_ms, o.expires_ms), coalesce(said.epoch, o.changed_epoch), coalesce(said.n, o.changed_n), {CHANGED_AT} \
         FROM ({BEGUN}) AS o {SINCE}"
    );
    sqlx::query(sqlx::AssertSqlSafe(query)).execute(connection).await?;
    Ok(())
}

/// Makes the last row of each order say what Redis says, under `epoch`; an order that is not here begins with the position of its last change.
pub(super) async fn adopt(connection: &mut PgConnection, partition: u32, epoch: u64, orders: &[(String, Order)]) -> Result<(), Error> {
    let joined = |of: fn(&(String, i64)) -> String| {
        orders.iter().map(|(_, order)| order.items.iter().map(of).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    sqlx::query(
        "WITH r AS (SELECT r.order_id, state, nullif(expires_ms, 0) AS expires_ms, string_to_array(products, ' ') AS products, \
           string_to_array(units, ' ')::bigint[] AS units, r.epoch, r.n, last.epoch AS last_epoch, last.n AS last_n \
           FROM unnest($2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[], $7::bigint[], $8::bigint[]) \
           AS r (order_id, state, expires_ms, products, units, epoch, n) LEFT JOIN LATERAL (SELECT l.epoch, l.n FROM holdfast.stock_order l \
           WHERE l.order_id = r.order_id ORDER BY l.epoch DESC, l.n DESC LIMIT 1) AS last ON true), \
         known AS (UPDATE holdfast.stock_order AS o SET state = r.state, expires_ms = r.expires_ms, products = r.products, units = r.units, \
           changed_epoch = r.epoch, changed_n = r.n, adopted_epoch = $9, \
           changed_at = CASE WHEN (o.changed_epoch, o.changed_n) = (r.epoch, r.n) THEN o.changed_at ELSE now() END \
           FROM r WHERE o.order_id = r.order_id AND o.epoch = r.last_epoch AND o.n = r.last_n) \
         INSERT INTO holdfast.stock_order (order_id, epoch, n, partition, state, expires_ms, products, units, changed_epoch, changed_n, \
           created_at, changed_at, adopted_epoch) SELECT order_id, epoch, n, $1, state, expires_ms, products, units, epoch, n, now(), now(), $9 \
           FROM r WHERE last_n IS NULL",
    )
    .bind(partition::id(partition))
    .bind(orders.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>())
    .bind(orders.iter().map(|(_, order)| order.state.as_str()).collect::<Vec<_>>())
    .bind(orders.iter().map(|(_, order)| order.expires_ms).collect::<Vec<_>>())
    .bind(joined(|(product, _)| product.clone()))
    .bind(joined(|(_, units)| units.to_string()))
    .bind(orders.iter().map(|(_, order)| to_bigint(order.position.epoch)).collect::<Vec<_>>())
    .bind(orders.iter().map(|(_, order)| to_bigint(order.position.n)).collect::<Vec<_>>())
    .bind(to_bigint(epoch))
    .execute(connection)
    .await?;
    Ok(())
}

/// Orders that hold units here and not in Redis are over, under `epoch`: whoever has the units now, Redis says.
pub(super) async fn expire_all_but(connection: &mut PgConnection, partition: u32, epoch: u64, held: &[String]) -> Result<(), Error> {
    let as_it_stands = as_it_stands();
    let query = format!(
        "UPDATE holdfast.stock_order SET state = 'expired', changed_at = now(), adopted_epoch = $3 WHERE (order_id, epoch, n) IN (SELECT \
         o.order_id, o.epoch, o.n {as_it_stands} AND o.state = 'held' AND {STATE} = 'held' AND o.partition = $1 \
         AND NOT EXISTS (SELECT 1 FROM unnest($2::text[]) AS k (id) WHERE k.id = o.order_id))"
    );
    let expiring = sqlx::query(sqlx::AssertSqlSafe(query)).bind(partition::id(partition)).bind(held).bind(to_bigint(epoch));
    expiring.execute(connection).await?;
    Ok(())
}

/// An order as Postgres has it.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct OrderRow {
    #[sqlx(rename = "order_id")]
    pub order: String,
    state: String,
    expires_ms: i64,
    products: Vec<String>,
    units: Vec<i64>,
    changed_epoch: i64,
    changed_n: i64,
    /// When it became what it is, by Redis's clock, in Unix ms.
    pub changed_at_ms: i64,
}

impl OrderRow {
    /// The order. Errors with [`Error::Unfit`] where somebody has written an unknown state.
    pub fn order(&self) -> Result<Order, Error> {
        let state = OrderState::parse(&self.state).ok_or_else(|| Error::Unfit(format!("holdfast.stock_order: state {:?}", self.state)))?;
        let items = self.products.iter().cloned().zip(self.units.iter().copied()).collect();
        let position = Position::new(from_bigint(self.changed_epoch), from_bigint(self.changed_n));
        Ok(Order { state, expires_ms: self.expires_ms, items, position })
    }
}

/// Whether Redis had forgotten an order at `at_ms` that became this at `changed_ms` (both Unix ms by Redis's clock): then its id may have begun
/// another one.
pub fn is_forgotten(state: OrderState, changed_ms: i64, at_ms: i64) -> bool {
    state != OrderState::Held && changed_ms < at_ms.saturating_sub(ORDER_KEPT_MS)
}

/// What an order is, of rows from [`as_it_stands`].
pub(super) const STATE: &str =
    "CASE said.kind WHEN 'confirm' THEN 'confirmed' WHEN 'cancel' THEN 'cancelled' WHEN 'expire' THEN 'expired' ELSE o.state END";

/// Until when it is held, of rows from [`as_it_stands`].
const EXPIRES_MS: &str = "coalesce(said.expires_ms, o.expires_ms, 0)";

/// When it became that, of rows from [`as_it_stands`].
pub(super) const CHANGED_AT: &str = "coalesce(said.at, o.changed_at)";

/// What stands for the row of an order whose beginning is among the dead letters: what the ledger says of that. Columns as in
/// `holdfast.stock_order`; a cancellation of an order that was not there begins one, too, without products.
const BEGUN: &str = "SELECT b.order_id, b.epoch, b.n, b.partition, CASE b.kind WHEN 'reserve' THEN 'held' WHEN 'sell' THEN 'confirmed' \
     ELSE 'cancelled' END AS state, max(b.expires_ms) AS expires_ms, \
     coalesce(array_agg(b.product_id ORDER BY b.i) FILTER (WHERE b.product_id <> ''), '{}') AS products, \
     coalesce(array_agg(-b.redis_delta ORDER BY b.i) FILTER (WHERE b.product_id <> ''), '{}') AS units, \
     coalesce(b.origin_epoch, b.epoch) AS changed_epoch, coalesce(b.origin_n, b.n) AS changed_n, max(b.at) AS changed_at, \
     NULL::bigint AS adopted_epoch FROM holdfast.dead_letter d JOIN holdfast.stock_ledger b ON b.order_id COLLATE \"default\" = \
     substring(d.line FROM ' order=([^ ]+) ') AND b.partition = d.partition AND b.epoch = d.epoch AND b.n = d.n AND b.op = d.op AND b.k = d.k \
     WHERE d.product_id IS NULL AND (b.kind IN ('reserve', 'sell') OR b.kind = 'cancel' AND b.product_id = '') \
     GROUP BY b.order_id, b.epoch, b.n, b.partition, b.kind, b.origin_epoch, b.origin_n";

/// Each order's last row, `o`, with what the ledger has `said` of the order since: a row that has refused a change, which then lies among the
/// dead letters, is not what the order is. For one whose beginning lies there, the ledger stands ([`BEGUN`]). What a rebuild took over from Redis
/// counts from then on. Left out is a row behind which an order of the same id was begun. To be followed by conditions on `o`.
pub(super) fn as_it_stands() -> String {
    format!(
        "FROM (SELECT order_id, epoch, n, partition, state, expires_ms, products, units, changed_epoch, changed_n, changed_at, adopted_epoch \
         FROM holdfast.stock_order UNION ALL {BEGUN}) AS o {SINCE}"
    )
}

const SINCE: &str = "LEFT JOIN LATERAL (SELECT l.kind, l.expires_ms, l.at, coalesce(l.origin_epoch, l.epoch) AS epoch, \
     coalesce(l.origin_n, l.n) AS n FROM holdfast.stock_ledger l \
     WHERE l.order_id = o.order_id AND (l.epoch, l.n) >= (o.epoch, o.n) AND l.epoch >= coalesce(o.adopted_epoch, 0) \
     ORDER BY l.epoch DESC, l.n DESC LIMIT 1) AS said ON (said.epoch, said.n) > (o.changed_epoch, o.changed_n) \
     WHERE NOT EXISTS (SELECT 1 FROM holdfast.stock_order later WHERE later.order_id = o.order_id AND (later.epoch, later.n) > (o.epoch, o.n)) \
     AND NOT EXISTS (SELECT 1 FROM holdfast.stock_ledger begun WHERE begun.order_id = o.order_id AND (begun.epoch, begun.n) > (o.epoch, o.n) \
     AND begun.epoch >= coalesce(o.adopted_epoch, 0) AND (begun.kind IN ('reserve', 'sell') OR begun.kind = 'cancel' AND begun.product_id = ''))";

/// The columns of an [`OrderRow`], of rows from [`as_it_stands`].
pub(super) fn columns() -> String {
    format!(
        "o.order_id, {STATE} AS state, {EXPIRES_MS} AS expires_ms, o.products, o.units, coalesce(said.epoch, o.changed_epoch) AS changed_epoch, \
         coalesce(said.n, o.changed_n) AS changed_n, (extract(epoch FROM {CHANGED_AT}) * 1000)::bigint AS changed_at_ms"
    )
}

/// Reads orders as they stand, in no particular order; those that are unknown are left out.
pub async fn load(connection: &mut PgConnection, orders: &[String]) -> Result<Vec<OrderRow>, Error> {
    let query = format!("SELECT {} {} AND o.order_id = ANY($1)", columns(), as_it_stands());
    Ok(sqlx::query_as(sqlx::AssertSqlSafe(query)).bind(orders).fetch_all(connection).await?)
}

/// The orders that are held here although their time passed before `before_ms` (Unix ms), the oldest first, at most `limit` behind the first
/// `offset`: Redis has lost sight of them.
pub async fn overdue(
    connection: &mut PgConnection,
    partition: u32,
    before_ms: i64,
    offset: i64,
    limit: i64,
) -> Result<Vec<OrderRow>, Error> {
    let query = format!(
        "SELECT {} {} AND o.state = 'held' AND {STATE} = 'held' AND o.expires_ms < $2 AND {EXPIRES_MS} < $2 \
         AND o.partition = $1 ORDER BY o.expires_ms, o.order_id OFFSET $3 LIMIT $4",
        columns(),
        as_it_stands()
    );
    let rows = sqlx::query_as(sqlx::AssertSqlSafe(query)).bind(partition::id(partition)).bind(before_ms).bind(offset).bind(limit);
    Ok(rows.fetch_all(connection).await?)
}
