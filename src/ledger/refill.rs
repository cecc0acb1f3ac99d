//! Reads everything that Redis has to be given after it lost its data: all at one moment, page by page.

use std::collections::HashMap;
use std::marker::PhantomData;

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, FromRow, PgConnection, Postgres, Transaction};

use super::order::{self, OrderRow};
use super::{Error, from_bigint, partition};
use crate::domain::{InboxMark, Position};
use crate::limits::REFILL_PAGE;

/// A product as Redis has to have it.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct Product {
    #[sqlx(rename = "product_id")]
    pub product: String,
    pub available: i64,
    pub held: i64,
    pub low: Option<i64>,
    pub frozen: Option<String>,
}

/// A coupon's terms and how far it is. Times in Unix ms, 0 for none.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct Coupon {
    #[sqlx(rename = "coupon_id")]
    pub coupon: String,
    pub total: i64,
    pub issued: i64,
    pub used: i64,
    pub per_user: i64,
    pub start_ms: i64,
    pub end_ms: i64,
    pub last_serial: i64,
    pub deleted: bool,
}

/// One coupon of a user.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct Issued {
    #[sqlx(rename = "coupon_id")]
    pub coupon: String,
    #[sqlx(rename = "user_id")]
    pub user: String,
    pub serial: i64,
    pub state: String,
    pub issued_at_ms: i64,
    #[sqlx(rename = "order_id")]
    pub order: Option<String>,
}

/// One product's part of a REQUEST that may be repeated, or a coupon's.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct Request {
    /// In its escaped form.
    #[sqlx(rename = "request_id")]
    pub id: String,
    #[sqlx(rename = "request_digest")]
    pub digest: String,
    pub kind: String,
    one: Option<i64>,
    two: Option<i64>,
    epoch: i64,
    n: i64,
    pub at_ms: i64,
}

impl Request {
    /// The position that was answered.
    pub fn position(&self) -> Position {
        Position::new(from_bigint(self.epoch), from_bigint(self.n))
    }

    /// What was answered besides the outcome word: the available units, or serial and remaining.
    pub fn numbers(&self) -> Vec<i64> {
        [self.one, self.two].into_iter().flatten().collect()
    }
}

/// One moment of Postgres.
pub struct Snapshot<'c> {
    transaction: Transaction<'c, Postgres>,
    /// By how much what Redis has to have differs from `available`.
    differences: HashMap<String, i64>,
    /// Up to where of the inbox it counts.
    pub mark: InboxMark,
    /// What has been applied, and the op of the entry there.
    pub applied: Position,
    pub last_op: String,
}

/// What is read page by page.
pub struct Pages<T> {
    cursor: &'static str,
    rows: PhantomData<T>,
}

impl<'c> Snapshot<'c> {
    /// Takes the moment.
    pub async fn take(connection: &'c mut PgConnection, partition: u32) -> Result<Self, Error> {
        let mut transaction = connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        // A page takes long to reach Redis; the transaction is not idle because it is forgotten.
        let row: (i64, i64, i64, i64, String, String, String) = sqlx::query_as(
            "SELECT inbox_xid, inbox_id, applied_epoch, applied_n, last_op, \
             set_config('idle_in_transaction_session_timeout', '60s', true), set_config('statement_timeout', '0', true) \
             FROM holdfast.partition WHERE id = $1",
        )
        .bind(partition::id(partition))
        .fetch_one(&mut *transaction)
        .await?;
        let (xid, id, applied_epoch, applied_n, last_op, ..) = row;
        let differences: Vec<(String, i64)> = sqlx::query_as(
            "SELECT product_id, sum(delta)::bigint FROM ( \
             SELECT product_id, delta FROM holdfast.dead_letter WHERE in_redis AND product_id IS NOT NULL \
             UNION ALL SELECT i.product_id, -holdfast.inbox_ahead(i.product_id, $1, $2) \
             FROM (SELECT DISTINCT product_id FROM holdfast.inbox WHERE (xid, id) > ($1::text::xid8, $2)) i) d GROUP BY product_id",
        )
        .bind(xid)
        .bind(id)
        .fetch_all(&mut *transaction)
        .await?;
        Ok(Self {
            transaction,
            differences: differences.into_iter().collect(),
            mark: InboxMark { xid: from_bigint(xid), id: from_bigint(id) },
            applied: Position::new(from_bigint(applied_epoch), from_bigint(applied_n)),
            last_op,
        })
    }

    async fn open<T>(&mut self, cursor: &'static str, query: &str) -> Result<Pages<T>, Error> {
        let declare = format!("DECLARE {cursor} NO SCROLL CURSOR FOR {query}");
        sqlx::raw_sql(AssertSqlSafe(declare)).execute(&mut *self.transaction).await?;
        Ok(Pages { cursor, rows: PhantomData })
    }

    /// The next rows; empty at the end.
    pub async fn next<T: for<'r> FromRow<'r, PgRow> + Send + Unpin>(&mut self, pages: &Pages<T>) -> Result<Vec<T>, Error> {
        let fetch = format!("FETCH {REFILL_PAGE} FROM {}", pages.cursor);
        Ok(sqlx::query_as(AssertSqlSafe(fetch)).persistent(false).fetch_all(&mut *self.transaction).await?)
    }

    /// Every product that exists.
    pub async fn products(&mut self) -> Result<Pages<Product>, Error> {
        self.open("products", "SELECT product_id, available, held, low, frozen FROM holdfast.stock WHERE deleted_at IS NULL").await
    }

    /// What Redis has to have of a product: what is owed to Postgres has been given, and what other programs changed comes by the inbox.
    pub fn expected(&self, product: &Product) -> i64 {
        (product.available + self.differences.get(&product.product).copied().unwrap_or_default()).max(0)
    }

    /// The products that were deleted lately.
    pub async fn deleted(&mut self) -> Result<Vec<String>, Error> {
        let recently = "SELECT product_id FROM holdfast.stock WHERE deleted_at > now() - interval '1 hour'";
        Ok(sqlx::query_scalar(recently).fetch_all(&mut *self.transaction).await?)
    }

    /// What orders hold of products that were deleted: it stays owed.
    pub async fn held_of_deleted(&mut self) -> Result<Vec<(String, i64)>, Error> {
        let held = "SELECT product_id, held FROM holdfast.stock WHERE deleted_at IS NOT NULL AND held > 0";
        Ok(sqlx::query_as(held).fetch_all(&mut *self.transaction).await?)
    }

    /// Every order that is held or has become what it is lately, as it stands.
    pub async fn orders(&mut self) -> Result<Pages<OrderRow>, Error> {
        let query = format!(
            "SELECT {} {} AND (o.state = 'held' OR o.changed_at > now() - interval '24 hours') \
             AND ({} = 'held' OR {} > now() - interval '24 hours')",
            order::columns(),
            order::as_it_stands(),
            order::STATE,
            order::CHANGED_AT
        );
        self.open("orders", &query).await
    }

    /// Every coupon, also those that were deleted: their ids stay taken.
    pub async fn coupons(&mut self) -> Result<Pages<Coupon>, Error> {
        self.open(
            "coupons",
            "SELECT coupon_id, total, issued, used, per_user, coalesce(start_ms, 0) AS start_ms, coalesce(end_ms, 0) AS end_ms, last_serial, \
             state = 'deleted' AS deleted FROM holdfast.coupon",
        )
        .await
    }

    /// Every coupon that somebody has, those of one user and coupon together and by serial.
    pub async fn issued(&mut self) -> Result<Pages<Issued>, Error> {
        self.open(
            "issued",
            "SELECT i.coupon_id, i.user_id, i.serial, i.state, (extract(epoch FROM i.issued_at) * 1000)::bigint AS issued_at_ms, i.order_id \
             FROM holdfast.coupon_issue i JOIN holdfast.coupon c ON c.coupon_id = i.coupon_id AND c.state <> 'deleted' \
             WHERE i.state <> 'revoked' ORDER BY i.coupon_id, i.user_id, i.serial",
        )
        .await
    }

    /// The REQUESTs since `since_ms` (Unix ms, Redis's clock), with what was answered: one row a product, those of one REQUEST together.
    pub async fn requests(&mut self, since_ms: i64) -> Result<Pages<Request>, Error> {
        let since = format!("at > timestamptz 'epoch' + {since_ms} * interval '1 millisecond' AND request_id IS NOT NULL");
        let place = "coalesce(origin_epoch, epoch) AS epoch, coalesce(origin_n, n) AS n, (extract(epoch FROM at) * 1000)::bigint AS at_ms";
        self.open(
            "requests",
            &format!(
                "(SELECT request_id, request_digest, kind, CASE WHEN kind IN ('reserve', 'extend') THEN CASE WHEN i = 0 THEN expires_ms END \
                 WHEN kind NOT IN ('delete', 'confirm', 'cancel', 'unfreeze') THEN available_after END AS one, NULL::bigint AS two, \
                 {place} FROM holdfast.stock_ledger WHERE {since} ORDER BY at, stock_ledger.epoch, stock_ledger.n, i) \
                 UNION ALL (SELECT request_id, request_digest, 'coupon.' || kind, serial, CASE WHEN kind IN ('issue', 'revoke') THEN remaining_after END, \
                 {place} FROM holdfast.coupon_ledger WHERE {since})"
            ),
        )
        .await
    }

    /// Ends it.
    pub async fn end(self) -> Result<(), Error> {
        Ok(self.transaction.rollback().await?)
    }
}
