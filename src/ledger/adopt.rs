//! Gives Postgres what Redis holds, after Postgres was restored from a backup: a person has said that Redis is right.

use std::collections::{HashMap, HashSet};

use sqlx::{Connection, PgConnection, Postgres, Transaction};

use super::changes::{Changes, Created};
use super::{Error, apply, dead_letter, from_bigint, order, partition, to_bigint, write};
use crate::domain::change::Entry;
use crate::domain::{Order, OrderState, Position};

/// A product as Redis has it.
#[derive(Clone, Debug)]
pub struct Product {
    pub product: String,
    pub available: i64,
    pub held: i64,
    pub low: Option<i64>,
    pub frozen: Option<String>,
    pub deleted: bool,
}

/// A coupon as Redis has it. Times in Unix ms, 0 for none.
#[derive(Clone, Debug)]
pub struct Coupon {
    pub coupon: String,
    pub total: i64,
    pub issued: i64,
    pub used: i64,
    pub serial: i64,
    pub per_user: i64,
    pub start_ms: i64,
    pub end_ms: i64,
    pub deleted: bool,
}

/// A coupon that a user has.
#[derive(Clone, Debug)]
pub struct Issued {
    pub user: String,
    pub serial: i64,
    /// `issued` or `used`.
    pub state: String,
    pub issued_at_ms: i64,
    pub order: Option<String>,
}

/// One transaction that takes over what Redis holds: all of it or nothing.
pub struct Adoption<'c> {
    transaction: Transaction<'c, Postgres>,
    partition: u32,
    epoch: u64,
    applied: Position,
    n: u64,
    /// The orders that Redis holds units for.
    held: Vec<String>,
    /// What is owed to coupons: total, issued, used.
    owed: HashMap<String, [i64; 3]>,
}

/// Finds out, before anything is given up, whether Postgres takes the rows of orders that lie among the dead letters. Errors with why not.
pub async fn rehearse(connection: &mut PgConnection) -> Result<(), Error> {
    let mut transaction = connection.begin().await?;
    order::write_begun(&mut transaction).await?;
    Ok(transaction.rollback().await?)
}

impl<'c> Adoption<'c> {
    /// Begins, under `epoch`, which must be the partition's. `n` is the newest change of Redis. Whatever other programs changed in Postgres
    /// and Redis has not been told is given up; so is what was owed or handed over when the backup was made. Nobody changes the stock meanwhile.
    pub async fn begin(connection: &'c mut PgConnection, partition: u32, epoch: u64, n: u64) -> Result<Self, Error> {
        let mut transaction = connection.begin().await?;
        let Some(row) = partition::lock(&mut transaction, partition).await?.filter(|row| row.epoch == epoch) else {
            return Err(Error::Broken(format!("partition {partition} is no longer under epoch {epoch}: another process took it")));
        };
        sqlx::raw_sql(
            "SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL statement_timeout = '60s'; \
             LOCK TABLE holdfast.stock IN SHARE ROW EXCLUSIVE MODE",
        )
        .execute(&mut *transaction)
        .await?;
        order::write_begun(&mut transaction).await?;
        sqlx::raw_sql(
            "DELETE FROM holdfast.inbox; DELETE FROM holdfast.dead_letter WHERE in_redis; UPDATE holdfast.salvage SET done = true WHERE NOT done",
        )
        .execute(&mut *transaction)
        .await?;
        let owed = dead_letter::owed_by_coupons(&mut transaction).await?;
        Ok(Self { transaction, partition, epoch, applied: row.applied, n: n.max(row.applied.n), held: Vec::new(), owed })
    }

    /// Adds to the ledger what it lacks of these entries, at their own places; the stock comes from Redis as it is.
    pub async fn history(&mut self, entries: &[Entry]) -> Result<(), Error> {
        let ops: Vec<&str> = entries.iter().map(|entry| entry.op.as_str()).collect();
        let known: Vec<String> = sqlx::query_scalar(
            "SELECT o FROM unnest($1::text[]) AS a (o) WHERE EXISTS (SELECT 1 FROM holdfast.stock_ledger l WHERE l.op = o) \
             OR EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.op = o)",
        )
        .bind(ops)
        .fetch_all(&mut *self.transaction)
        .await?;
        let known: HashSet<String> = known.into_iter().collect();
        let new = entries.iter().filter(|entry| !known.contains(&entry.op) && entry.last > self.applied);
        let changes = Changes::gather(new, &Created::default())?;
        write::ledgers(&mut self.transaction, self.partition, &changes).await?;
        write::orders(&mut self.transaction, self.partition, &changes).await
    }

    /// Takes over products. What the ledger does not explain is a row of its own, of kind `adopt`.
    pub async fn products(&mut self, products: &[Product]) -> Result<(), Error> {
        let taken: i64 = sqlx::query_scalar(
            "WITH r AS (SELECT * FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], $9::bool[]) \
               AS r (product, available, held, low, frozen, deleted)), \
             put AS (INSERT INTO holdfast.stock (product_id, available, held, low, frozen, deleted_at) \
               SELECT product, available, held, low, frozen, CASE WHEN deleted THEN now() END FROM r \
               ON CONFLICT (product_id) DO UPDATE SET available = excluded.available, held = excluded.held, low = excluded.low, \
               frozen = excluded.frozen, \
               deleted_at = CASE WHEN excluded.deleted_at IS NOT NULL THEN coalesce(stock.deleted_at, excluded.deleted_at) END), \
             gap AS (SELECT r.product, r.available, \
               r.available - coalesce(l.units, 0) - coalesce(o.available, 0) + coalesce(d.units, 0) AS delta, \
               r.held - coalesce(l.held, 0) - coalesce(o.held, 0) AS held FROM r \
               LEFT JOIN LATERAL (SELECT sum(l.pg_delta) AS units, sum(l.held_delta) AS held FROM holdfast.stock_ledger l \
               WHERE l.product_id = r.product) l ON true \
               LEFT JOIN holdfast.outside o ON o.kind = 'product' AND o.id = r.product \
               LEFT JOIN LATERAL (SELECT sum(d.delta) AS units FROM holdfast.dead_letter d WHERE d.product_id = r.product \
               AND EXISTS (SELECT 1 FROM holdfast.stock_ledger k WHERE k.op = d.op AND k.k = d.k AND k.i = d.i)) d ON true), \
             told AS (INSERT INTO holdfast.stock_ledger (partition, epoch, n, i, op, k, product_id, kind, redis_delta, pg_delta, \
               available_after, at, held_delta) \
               SELECT $1, $7, $8 + row_number() OVER (ORDER BY product), 0, 'rebuild:' || $7, \
               ($8 + row_number() OVER (ORDER BY product)) % 2147483647, product, 'adopt', 0, delta, available, now(), held \
               FROM gap WHERE delta <> 0 OR held <> 0 RETURNING 1) \
             SELECT count(*) FROM told",
        )
        .bind(partition::id(self.partition))
        .bind(products.iter().map(|product| product.product.as_str()).collect::<Vec<_>>())
        .bind(products.iter().map(|product| product.available).collect::<Vec<_>>())
        .bind(products.iter().map(|product| product.held).collect::<Vec<_>>())
        .bind(products.iter().map(|product| product.low).collect::<Vec<_>>())
        .bind(products.iter().map(|product| product.frozen.as_deref()).collect::<Vec<_>>())
        .bind(to_bigint(self.epoch))
        .bind(to_bigint(self.n))
        .bind(products.iter().map(|product| product.deleted).collect::<Vec<_>>())
        .fetch_one(&mut *self.transaction)
        .await?;
        self.n += from_bigint(taken);
        Ok(())
    }

    /// Takes over orders, by id. The ledger needs no row for them: what they hold is part of the products.
    pub async fn orders(&mut self, orders: &[(String, Order)]) -> Result<(), Error> {
        order::adopt(&mut self.transaction, self.partition, self.epoch, orders).await?;
        self.held.extend(orders.iter().filter(|(_, order)| order.state == OrderState::Held).map(|(id, _)| id.clone()));
        Ok(())
    }

    /// Takes over a coupon and who has it; what Redis no longer knows was revoked. What the ledger does not explain is a row of its own, of
    /// kind `adopt`.
    pub async fn coupon(&mut self, coupon: &Coupon, issued: &[Issued]) -> Result<(), Error> {
        sqlx::query(
            "INSERT INTO holdfast.coupon (coupon_id, total, issued, used, per_user, start_ms, end_ms, last_serial, state) \
             VALUES ($1, $2, $3, $4, $5, nullif($6, 0), nullif($7, 0), $8, CASE WHEN $9 THEN 'deleted' ELSE 'active' END) \
             ON CONFLICT (coupon_id) DO UPDATE SET total = excluded.total, issued = excluded.issued, used = excluded.used, \
             per_user = excluded.per_user, start_ms = excluded.start_ms, end_ms = excluded.end_ms, state = excluded.state, \
             last_serial = greatest(coupon.last_serial, excluded.last_serial)",
        )
        .bind(&coupon.coupon)
        .bind(coupon.total)
        .bind(coupon.issued)
        .bind(coupon.used)
        .bind(coupon.per_user)
        .bind(coupon.start_ms)
        .bind(coupon.end_ms)
        .bind(coupon.serial)
        .bind(coupon.deleted)
        .execute(&mut *self.transaction)
        .await?;
        // Of a deleted one Redis knows only that its id is taken.
        if !coupon.deleted {
            self.issued(&coupon.coupon, issued).await?;
        }
        let [total, issued_owed, used] = self.owed.get(&coupon.coupon).copied().unwrap_or_default();
        let explained: i64 = sqlx::query_scalar(
            "WITH gap AS (SELECT c.total, c.issued, c.total - coalesce(l.total, 0) - coalesce(o.total, 0) + $5 AS total_gap, \
               c.issued - coalesce(l.issued, 0) - coalesce(o.issued, 0) + $6 AS issued_gap, \
               c.used - coalesce(l.used, 0) - coalesce(o.used, 0) + $7 AS used_gap FROM holdfast.coupon c \
               LEFT JOIN (SELECT sum(total_delta) AS total, sum(issued_delta) AS issued, sum(used_delta) AS used \
               FROM holdfast.coupon_ledger WHERE coupon_id = $2) l ON true \
               LEFT JOIN holdfast.outside o ON o.kind = 'coupon' AND o.id = c.coupon_id WHERE c.coupon_id = $2), \
             told AS (INSERT INTO holdfast.coupon_ledger (partition, epoch, n, op, k, coupon_id, kind, remaining_after, at, issued_delta, \
               used_delta, total_delta) \
               SELECT $1, $3, $4, 'rebuild:' || $3, $4 % 2147483647, $2, 'adopt', greatest(total - issued, 0), now(), issued_gap, used_gap, \
               total_gap FROM gap WHERE total_gap <> 0 OR issued_gap <> 0 OR used_gap <> 0 RETURNING 1) SELECT count(*) FROM told",
        )
        .bind(partition::id(self.partition))
        .bind(&coupon.coupon)
        .bind(to_bigint(self.epoch))
        .bind(to_bigint(self.n + 1))
        .bind(total)
        .bind(issued_owed)
        .bind(used)
        .fetch_one(&mut *self.transaction)
        .await?;
        self.n += from_bigint(explained);
        Ok(())
    }

    async fn issued(&mut self, coupon: &str, issued: &[Issued]) -> Result<(), Error> {
        for issued in issued.chunks(crate::limits::REFILL_PAGE) {
            sqlx::query(
                "INSERT INTO holdfast.coupon_issue (coupon_id, user_id, serial, state, issued_at, used_at, order_id) \
                 SELECT $1, i.user_id, i.serial, i.state, timestamptz 'epoch' + i.at_ms * interval '1 millisecond', \
                 CASE WHEN i.state = 'used' THEN now() END, i.order_id \
                 FROM unnest($2::text[], $3::bigint[], $4::text[], $5::bigint[], $6::text[]) AS i (user_id, serial, state, at_ms, order_id) \
                 ON CONFLICT (coupon_id, serial) DO UPDATE SET user_id = excluded.user_id, state = excluded.state, \
                 used_at = CASE WHEN excluded.state = 'used' THEN coalesce(coupon_issue.used_at, now()) END, revoked_at = NULL, \
                 order_id = excluded.order_id",
            )
            .bind(coupon)
            .bind(issued.iter().map(|one| one.user.as_str()).collect::<Vec<_>>())
            .bind(issued.iter().map(|one| one.serial).collect::<Vec<_>>())
            .bind(issued.iter().map(|one| one.state.as_str()).collect::<Vec<_>>())
            .bind(issued.iter().map(|one| one.issued_at_ms).collect::<Vec<_>>())
            .bind(issued.iter().map(|one| one.order.as_deref()).collect::<Vec<_>>())
            .execute(&mut *self.transaction)
            .await?;
        }
        sqlx::query(
            "UPDATE holdfast.coupon_issue SET state = 'revoked', revoked_at = now(), used_at = NULL, order_id = NULL \
             WHERE coupon_id = $1 AND state <> 'revoked' AND serial <> ALL($2)",
        )
        .bind(coupon)
        .bind(issued.iter().map(|one| one.serial).collect::<Vec<_>>())
        .execute(&mut *self.transaction)
        .await?;
        Ok(())
    }

    /// Ends it: Postgres has everything; no other order holds anything any more. Returns the position, and the op there, under which Redis is to be opened.
    pub async fn end(mut self) -> Result<(Position, String), Error> {
        let (applied, last_op) = (Position::new(self.epoch, self.n), format!("rebuild:{}", self.epoch));
        order::expire_all_but(&mut self.transaction, self.partition, self.epoch, &self.held).await?;
        apply::end_epochs(&mut self.transaction, self.partition, Position::new(0, self.n), self.epoch).await?;
        partition::advance(&mut self.transaction, self.partition, applied, &last_op, Some(crate::domain::InboxMark::default())).await?;
        sqlx::query("UPDATE holdfast.partition SET owner = NULL, lease_until = NULL WHERE id = $1")
            .bind(partition::id(self.partition))
            .execute(&mut *self.transaction)
            .await?;
        self.transaction.commit().await?;
        Ok((applied, last_op))
    }
}
