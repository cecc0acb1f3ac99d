//! Works out of the ledgers what there has to be, and compares it with what there is: all at one moment, page by page.
//!
//! A product has as many units as its ledger rows moved, without those that are owed (dead letters), and with what moved it beside the
//! ledgers, which `holdfast.outside` adds up. A coupon likewise. Kinds of changes make no difference. What is held, and what is issued, also
//! stands in rows of its own, those of the orders and of the users: they have to come to the same.

use std::collections::HashMap;

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, FromRow, PgConnection, Postgres, Row as _, Transaction};

use super::order::{STATE, as_it_stands};
use super::{Error, dead_letter};
use crate::limits::REFILL_PAGE;

/// One number of a product or a coupon: what there is, and what the ledger makes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Number {
    pub name: &'static str,
    pub found: i64,
    pub explained: i64,
}

/// A product or a coupon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// `product` or `coupon`.
    pub what: &'static str,
    pub id: String,
    pub numbers: Vec<Number>,
}

impl Account {
    /// Whether the ledger explains every number.
    pub fn adds_up(&self) -> bool {
        self.numbers.iter().all(|number| number.found == number.explained)
    }
}

impl std::fmt::Display for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}:", self.what, self.id)?;
        for Number { name, found, explained } in &self.numbers {
            match found == explained {
                true => write!(f, " {name} {found}")?,
                false => write!(f, " {name} {found}, but {explained} by the ledger")?,
            }
        }
        Ok(())
    }
}

/// The units that are owed of each product: dead letters whose rows in the ledger say that Postgres has moved by them.
const PARKED: &str = "SELECT d.product_id, sum(d.delta) AS units FROM holdfast.dead_letter d WHERE d.product_id IS NOT NULL AND (d.in_redis \
     OR EXISTS (SELECT 1 FROM holdfast.stock_ledger k WHERE k.op = d.op AND k.k = d.k AND k.i = d.i)) GROUP BY d.product_id";

/// The units that orders hold of each product.
fn of_orders() -> String {
    format!(
        "SELECT p.product_id, sum(p.units) AS units FROM (SELECT o.products, o.units {} AND o.state = 'held' AND {STATE} = 'held') q \
         CROSS JOIN LATERAL unnest(q.products, q.units) AS p (product_id, units) GROUP BY p.product_id",
        as_it_stands()
    )
}

/// One audit: a moment of Postgres.
pub struct Audit<'c> {
    transaction: Transaction<'c, Postgres>,
    /// By how much dead letters would still move coupons: total, issued, used.
    owed: HashMap<String, [i64; 3]>,
}

/// What is read page by page.
pub struct Pages(&'static str);

impl<'c> Audit<'c> {
    /// Takes the moment.
    pub async fn take(connection: &'c mut PgConnection) -> Result<Self, Error> {
        let mut transaction = connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        sqlx::raw_sql("SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = '10min'")
            .execute(&mut *transaction)
            .await?;
        let owed = dead_letter::owed_by_coupons(&mut transaction).await?;
        Ok(Self { transaction, owed })
    }

    async fn open(&mut self, cursor: &'static str, query: &str) -> Result<Pages, Error> {
        sqlx::raw_sql(AssertSqlSafe(format!("DECLARE {cursor} NO SCROLL CURSOR FOR {query}"))).execute(&mut *self.transaction).await?;
        Ok(Pages(cursor))
    }

    async fn fetch(&mut self, pages: &Pages) -> Result<Vec<PgRow>, Error> {
        let fetch = format!("FETCH {REFILL_PAGE} FROM {}", pages.0);
        Ok(sqlx::query(AssertSqlSafe(fetch)).persistent(false).fetch_all(&mut *self.transaction).await?)
    }

    /// Every product that there is, or that the ledger or an order knows.
    pub async fn products(&mut self) -> Result<Pages, Error> {
        let of_orders = of_orders();
        let query = format!(
            "SELECT product_id, coalesce(s.available, 0), \
             (coalesce(l.available, 0) + coalesce(o.available, 0) - coalesce(d.units, 0))::bigint, coalesce(s.held, 0), \
             coalesce(l.held, 0)::bigint, coalesce(o.held, 0), coalesce(q.units, 0)::bigint \
             FROM holdfast.stock s FULL JOIN (SELECT product_id, sum(pg_delta) AS available, sum(held_delta) AS held \
             FROM holdfast.stock_ledger WHERE product_id <> '' GROUP BY product_id) l USING (product_id) \
             FULL JOIN ({of_orders}) q USING (product_id) \
             LEFT JOIN holdfast.outside o ON o.kind = 'product' AND o.id = product_id \
             LEFT JOIN ({PARKED}) d USING (product_id)"
        );
        self.open("audited_products", &query).await
    }

    /// The next products; empty at the end.
    pub async fn next_products(&mut self, pages: &Pages) -> Result<Vec<Account>, Error> {
        let rows = self.fetch(pages).await?;
        let account = |row: PgRow| {
            type Columns = (String, i64, i64, i64, i64, i64, i64);
            let (id, available, by_ledger, held, moved, outside, of_orders): Columns = FromRow::from_row(&row)?;
            let held_by_ledger = moved + outside;
            // Who changes what is held by hand, or removes the product, leaves the orders as they are.
            let of_orders_explained = if of_orders == moved { of_orders } else { held_by_ledger };
            let numbers = vec![
                Number { name: "available", found: available, explained: by_ledger },
                Number { name: "held", found: held, explained: held_by_ledger },
                Number { name: "held by orders", found: of_orders, explained: of_orders_explained },
            ];
            Ok(Account { what: "product", id, numbers })
        };
        rows.into_iter().map(account).collect()
    }

    /// Every coupon that there is or that the ledger knows.
    pub async fn coupons(&mut self) -> Result<Pages, Error> {
        self.open(
            "audited_coupons",
            "SELECT coalesce(c.coupon_id, l.coupon_id), coalesce(c.total, 0), (coalesce(l.total, 0) + coalesce(o.total, 0))::bigint, \
             coalesce(c.issued, 0), (coalesce(l.issued, 0) + coalesce(o.issued, 0))::bigint, coalesce(c.used, 0), \
             (coalesce(l.used, 0) + coalesce(o.used, 0))::bigint, coalesce(i.issued, 0), coalesce(i.used, 0) \
             FROM holdfast.coupon c FULL JOIN (SELECT coupon_id, sum(total_delta) AS total, sum(issued_delta) AS issued, \
             sum(used_delta) AS used FROM holdfast.coupon_ledger GROUP BY coupon_id) l USING (coupon_id) \
             LEFT JOIN holdfast.outside o ON o.kind = 'coupon' AND o.id = coalesce(c.coupon_id, l.coupon_id) \
             LEFT JOIN (SELECT coupon_id, count(*) FILTER (WHERE state <> 'revoked') AS issued, count(*) FILTER (WHERE state = 'used') AS used \
             FROM holdfast.coupon_issue GROUP BY coupon_id) i ON i.coupon_id = coalesce(c.coupon_id, l.coupon_id)",
        )
        .await
    }

    /// The next coupons; empty at the end. How many a coupon has out is counted in its rows, too.
    pub async fn next_coupons(&mut self, pages: &Pages) -> Result<Vec<Account>, Error> {
        let rows = self.fetch(pages).await?;
        let account = |row: PgRow| {
            let id: String = row.try_get(0)?;
            let [total, issued, used] = self.owed.get(&id).copied().unwrap_or_default();
            let number = |name, found, explained, owed: i64| {
                Ok::<_, sqlx::Error>(Number { name, found: row.try_get(found)?, explained: row.try_get::<i64, _>(explained)? - owed })
            };
            let numbers = vec![
                number("total", 1, 2, total)?,
                number("issued", 3, 4, issued)?,
                number("used", 5, 6, used)?,
                number("issued to users", 7, 3, 0)?,
                number("used by users", 8, 5, 0)?,
            ];
            Ok(Account { what: "coupon", id, numbers })
        };
        rows.into_iter().map(account).collect()
    }

    /// Ends it.
    pub async fn end(self) -> Result<(), Error> {
        Ok(self.transaction.rollback().await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::change::{Entry, Operation};
    use crate::domain::{Position, Settled};
    use crate::ledger::adopt::{Adoption, Coupon, Issued};
    use crate::ledger::dead_letter::apply_parking;
    use crate::ledger::salvage::{self, Answered};
    use crate::ledger::testing::{database, execute, number_of};
    use crate::ledger::{apply, partition};

    async fn differing(connection: &mut PgConnection) -> Vec<String> {
        let mut audit = Audit::take(connection).await.unwrap();
        let (mut all, pages) = (Vec::new(), audit.products().await.unwrap());
        loop {
            let page = audit.next_products(&pages).await.unwrap();
            if page.is_empty() {
                break;
            }
            all.extend(page);
        }
        let pages = audit.coupons().await.unwrap();
        all.extend(audit.next_coupons(&pages).await.unwrap());
        audit.end().await.unwrap();
        all.iter().filter(|account| !account.adds_up()).map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn what_other_programs_change_is_explained_and_what_nobody_wrote_down_is_not() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(
            connection,
            "INSERT INTO holdfast.stock (product_id, available) VALUES ('a', 5), ('b', 7), ('c', 1); \
             UPDATE holdfast.stock SET available = 3 WHERE product_id = 'b'; DELETE FROM holdfast.stock WHERE product_id = 'c'; \
             INSERT INTO holdfast.coupon (coupon_id, total, per_user) VALUES ('x', 9, 1); UPDATE holdfast.coupon SET total = 4",
        )
        .await;
        assert!(differing(connection).await.is_empty());
        execute(
            connection,
            "SET holdfast.writer = 'holdfast'; UPDATE holdfast.stock SET available = 6, held = 1 WHERE product_id = 'a'; \
             UPDATE holdfast.coupon SET issued = 1, last_serial = 1; RESET holdfast.writer",
        )
        .await;
        assert_eq!(
            differing(connection).await,
            [
                "product a: available 6, but 5 by the ledger held 1, but 0 by the ledger held by orders 0",
                "coupon x: total 4 issued 1, but 0 by the ledger used 0 issued to users 0, but 1 by the ledger used by users 0",
            ]
        );
    }

    /// The entry after `n` changes, each in a batch of its own.
    fn entry(n: u64, line: &str) -> Entry {
        let prev = if n == 0 { partition::NO_OP.to_owned() } else { format!("i:stock:{n}") };
        let op = format!("i:stock:{}", n + 1);
        Entry { last: Position::new(1, n + 1), first_n: n + 1, prev, op, at_ms: 7, operations: vec![Operation::decode(line).unwrap()] }
    }

    #[tokio::test]
    async fn what_orders_hold_is_counted_in_them_and_no_false_alarm_is_given_of_what_is_owed_or_gone() {
        let mut database = database().await;
        let connection = &mut database.connection;
        for (n, line) in (0..).zip(["set | a 10 10", "reserve order=o expires=9 | a -3 7", "cancel order=o from=held units=3 | a 3 10"]) {
            apply(connection, 0, &[entry(n, &format!("0 {line}"))]).await.unwrap();
        }
        // The id is used again.
        apply(connection, 0, &[entry(3, "0 reserve order=o expires=9 | a -2 8")]).await.unwrap();
        assert_eq!(differing(connection).await, [""; 0]);
        let is_named = ["product a: available 8 held 2 held by orders 5, but 2 by the ledger"];
        execute(connection, "UPDATE holdfast.stock_order SET units = '{5}' WHERE n = 4").await;
        assert_eq!(differing(connection).await, is_named);
        execute(connection, "UPDATE holdfast.stock_order SET units = '{2}' WHERE n = 4; UPDATE holdfast.stock_order SET state = 'held'")
            .await;
        assert_eq!(differing(connection).await, [""; 0], "only the last of an id is the order");
        execute(connection, "INSERT INTO holdfast.stock_order SELECT 'made up', 1, 9, 0, 'held', 9, '{ghost}', '{3}', 1, 9, now(), now()")
            .await;
        assert_eq!(differing(connection).await, ["product ghost: available 0 held 0 held by orders 3, but 0 by the ledger"]);
        execute(connection, "DELETE FROM holdfast.stock_order WHERE order_id = 'made up'").await;
        // Postgres takes the units and not the order.
        execute(connection, "ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (order_id <> 'refused')").await;
        assert_eq!(apply_parking(connection, 0, &entry(4, "0 reserve order=refused expires=9 | a -1 7")).await.unwrap().1, 1);
        assert_eq!(number_of(connection, "SELECT held FROM holdfast.stock").await, 3);
        assert_eq!(differing(connection).await, [""; 0], "it is owed");
        let letter = number_of(connection, "SELECT id FROM holdfast.dead_letter").await;
        assert!(matches!(dead_letter::discard(connection, letter).await.unwrap(), Settled::Failed(_)), "the order is known by it");
        execute(connection, "DELETE FROM holdfast.dead_letter").await;
        assert_eq!(differing(connection).await, ["product a: available 7 held 3 held by orders 2, but 3 by the ledger"], "nobody knows it");
        execute(connection, "ALTER TABLE holdfast.stock_order DROP CONSTRAINT none").await;
        apply(connection, 0, &[entry(5, "0 cancel order=refused from=held units=1 | a 1 8")]).await.unwrap();
        assert_eq!(differing(connection).await, [""; 0]);
        // What another program does to the product does nothing to its orders.
        execute(connection, "UPDATE holdfast.stock SET held = 7").await;
        assert_eq!(differing(connection).await, [""; 0]);
        execute(connection, "DELETE FROM holdfast.stock").await;
        assert_eq!(differing(connection).await, [""; 0]);
        execute(connection, "UPDATE holdfast.stock_order SET state = 'expired'").await;
        assert_eq!(differing(connection).await, [""; 0], "and nothing is held of what is gone");
    }

    #[tokio::test]
    async fn what_is_owed_to_a_coupon_is_no_gap_when_redis_is_taken_over() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let answered = |n, line: &str| Answered {
            op: "i:coupon:1".into(),
            origin: Position::new(1, n),
            at_ms: 7,
            operation: Operation::decode(line).unwrap(),
        };
        let lines = [
            answered(1, "0 coupon.create coupon=c total=1 peruser=1 |"),
            answered(2, "1 coupon.issue coupon=c user=u serial=1 remaining=0 |"),
            answered(3, "2 coupon.issue coupon=c user=v serial=2 remaining=0 |"),
        ];
        assert_eq!(salvage::save(connection, 0, 1, 600_000, &lines).await.unwrap().owed, 1);
        assert!(differing(connection).await.is_empty());
        let mut adoption = Adoption::begin(connection, 0, 1, 9).await.unwrap();
        let coupon =
            Coupon { coupon: "c".into(), total: 5, issued: 1, used: 0, serial: 1, per_user: 1, start_ms: 0, end_ms: 0, deleted: false };
        let issued = Issued { user: "u".into(), serial: 1, state: "issued".into(), issued_at_ms: 7, order: None };
        adoption.coupon(&coupon, &[issued]).await.unwrap();
        adoption.end().await.unwrap();
        assert_eq!(differing(connection).await, [""; 0]);
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.dead_letter").await, 1, "it is still owed");
        assert_eq!(number_of(connection, "SELECT sum(issued_delta)::bigint FROM holdfast.coupon_ledger WHERE kind = 'adopt'").await, 0);
    }
    #[tokio::test]
    async fn the_migration_adds_up_what_moved_coupons_before_anybody_did() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(
            connection,
            "SET holdfast.writer = 'holdfast'; \
             INSERT INTO holdfast.coupon (coupon_id, total, issued, used, per_user, last_serial) VALUES ('c', 9, 1, 0, 1, 1); \
             INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at) VALUES ('c', 1, 'u', 'issued', now()); \
             INSERT INTO holdfast.coupon_ledger (partition, epoch, n, op, k, coupon_id, kind, serial, remaining_after, issued_delta, at) \
             VALUES (0, 1, 1, 'i', 0, 'c', 'issue', 1, 0, 1, now()), (0, 1, 2, 'i', 1, 'c', 'issue', 2, 0, 1, now()); \
             INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, kind, delta, in_redis, reason, line) \
             VALUES (0, 1, 2, 0, 'i', 1, 'coupon.issue', 0, true, '', '1 coupon.issue coupon=c user=v serial=2 remaining=0 |'); \
             RESET holdfast.writer",
        )
        .await;
        assert_eq!(differing(connection).await.len(), 1, "its total was given to it by nobody");
        let (_, sum) = include_str!("../../migrations/0009_coupon_reconciliation.sql").split_once("LOCK TABLE").unwrap();
        for _ in 0..2 {
            sqlx::raw_sql(AssertSqlSafe(format!("BEGIN; LOCK TABLE{sum}; COMMIT"))).execute(&mut *connection).await.unwrap();
            assert_eq!(differing(connection).await, [""; 0]);
        }
        assert_eq!(number_of(connection, "SELECT total FROM holdfast.outside WHERE kind = 'coupon' AND issued = 0").await, 9);
    }
}
