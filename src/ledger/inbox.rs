//! What other programs changed in `holdfast.stock`, on its way to Redis.

use std::time::Duration;

use sqlx::PgConnection;
use sqlx::postgres::PgListener;

use super::{Error, from_bigint, partition, to_bigint};
use crate::domain::InboxMark;
use crate::limits;

/// What the trigger notifies.
const CHANNEL: &str = "holdfast_inbox";

/// With the partition's number, the advisory lock of the sidecar that carries the inbox.
const LOCK: i32 = 0x696e_626f;

/// A row of `holdfast.inbox`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboxRow {
    pub mark: InboxMark,
    pub product: String,
    /// `move`, `create` or `delete`.
    pub kind: String,
    /// By how much its available units moved.
    pub delta: i64,
}

/// What stands behind a mark.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// In the order in which they are to be taken.
    pub rows: Vec<InboxRow>,
    /// Whether there are more that must wait, since a transaction that began earlier still runs and may add rows before them.
    pub blocked: bool,
    /// How long the oldest of all of them has been waiting.
    pub age: Duration,
}

/// Reads what stands behind `mark`. (In ORDER BY a bare `xid` would be the text that is returned.)
pub async fn after(connection: &mut PgConnection, mark: InboxMark) -> Result<Waiting, Error> {
    type Columns = (String, i64, String, String, i64, bool, f64);
    let found: Vec<Columns> = sqlx::query_as(
        "SELECT xid::text, id, product_id, kind, delta, xid < pg_snapshot_xmin(pg_current_snapshot()), \
         extract(epoch FROM clock_timestamp() - at)::double precision \
         FROM holdfast.inbox i WHERE (xid, id) > ($1::text::xid8, $2) ORDER BY i.xid, i.id LIMIT $3",
    )
    .bind(mark.xid.to_string())
    .bind(to_bigint(mark.id))
    .bind(i64::try_from(limits::INBOX_ROWS_MAX).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await?;
    let age = found.iter().map(|row| row.6).fold(0.0, f64::max);
    let blocked = found.iter().any(|row| !row.5);
    let rows = found.into_iter().take_while(|row| row.5).map(|(xid, id, product, kind, delta, ..)| InboxRow {
        mark: place(&xid, id),
        product,
        kind,
        delta,
    });
    Ok(Waiting { rows: rows.collect(), blocked, age: Duration::from_secs_f64(age.max(0.0)) })
}

/// Reads the rows of these products behind `mark`, in their order, whatever still runs.
pub(super) async fn of_products(connection: &mut PgConnection, mark: InboxMark, products: &[&str]) -> Result<Vec<InboxRow>, Error> {
    let found: Vec<(String, i64, String, String, i64)> = sqlx::query_as(
        "SELECT xid::text, id, product_id, kind, delta FROM holdfast.inbox i \
         WHERE product_id = ANY($1) AND (xid, id) > ($2::text::xid8, $3) ORDER BY i.xid, i.id",
    )
    .bind(products)
    .bind(mark.xid.to_string())
    .bind(to_bigint(mark.id))
    .fetch_all(connection)
    .await?;
    let row = |(xid, id, product, kind, delta): (String, _, _, _, _)| InboxRow { mark: place(&xid, id), product, kind, delta };
    Ok(found.into_iter().map(row).collect())
}

fn place(xid: &str, id: i64) -> InboxMark {
    InboxMark { xid: xid.parse().unwrap_or_default(), id: from_bigint(id) }
}

/// Whether this session carries the inbox: of all that ask, one does, until its connection ends. It saves work and is no safeguard.
pub async fn carries(connection: &mut PgConnection, partition: u32) -> Result<bool, Error> {
    let got = sqlx::query_scalar("SELECT pg_try_advisory_lock($1, $2)").bind(LOCK).bind(partition::id(partition));
    Ok(got.fetch_one(connection).await?)
}

/// Removes rows that Postgres knows Redis to have had for a while, a bounded number. Returns how many.
pub async fn prune(connection: &mut PgConnection, partition: u32) -> Result<u64, Error> {
    let pruned = sqlx::query(
        "DELETE FROM holdfast.inbox WHERE (xid, id) IN (SELECT i.xid, i.id FROM holdfast.inbox i, holdfast.partition p \
         WHERE p.id = $1 AND (i.xid, i.id) <= (p.inbox_xid::text::xid8, p.inbox_id) AND i.at < now() - $2 * interval '1 second' \
         ORDER BY i.xid, i.id LIMIT $3)",
    )
    .bind(partition::id(partition))
    .bind(limits::INBOX_KEEP.as_secs_f64())
    .bind(i64::try_from(limits::INBOX_PRUNE_ROWS).unwrap_or(i64::MAX))
    .execute(connection)
    .await?;
    Ok(pruned.rows_affected())
}

/// Moves a product by `delta` in Redis, as if another program had changed it. In the caller's transaction.
pub(super) async fn put(connection: &mut PgConnection, product: &str, delta: i64) -> Result<(), Error> {
    sqlx::query("SELECT holdfast.to_inbox($1, 'move', $2)").bind(product).bind(delta).execute(connection).await?;
    Ok(())
}

/// Tells Redis that a product exists, as if another program had created it. In the caller's transaction.
pub(super) async fn put_creation(connection: &mut PgConnection, product: &str) -> Result<(), Error> {
    sqlx::query("SELECT holdfast.to_inbox($1, 'create', 0)").bind(product).execute(connection).await?;
    Ok(())
}

/// Hears when there is something new. What was notified while it was not connected is not heard.
pub struct Listener(PgListener);

impl Listener {
    /// Connects and listens.
    pub async fn open(url: &str) -> Result<Self, Error> {
        let opening = async {
            let mut listener = PgListener::connect(url).await?;
            listener.listen(CHANNEL).await?;
            Ok::<_, sqlx::Error>(listener)
        };
        match tokio::time::timeout(limits::LEDGER_CONNECT_TIMEOUT, opening).await {
            Ok(listener) => Ok(Self(listener?)),
            Err(_) => Err(Error::Connection(format!("no answer within {} s", limits::LEDGER_CONNECT_TIMEOUT.as_secs()))),
        }
    }

    /// Waits until something is notified. After an error a new one is to be opened.
    pub async fn heard(&mut self) -> Result<(), Error> {
        match self.0.try_recv().await? {
            Some(_) => Ok(()),
            None => Err(Error::Connection("closed".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::{database, execute, number_of};

    fn mark(xid: u64, id: u64) -> InboxMark {
        InboxMark { xid, id }
    }

    #[tokio::test]
    async fn rows_are_read_in_order_from_the_mark_on_and_removed_when_they_are_old() {
        let mut database = database().await;
        // In this order as numbers, and in another one as texts.
        execute(
            &mut database.connection,
            "INSERT INTO holdfast.inbox (xid, product_id, kind, delta, at) VALUES ('100', 'a', 'move', 3, now() - interval '2 hours'), \
             ('99', 'a', 'create', 2, now() - interval '2 hours'), ('9', 'a', 'move', 1, now())",
        )
        .await;
        let waiting = after(&mut database.connection, mark(0, 0)).await.unwrap();
        let marks: Vec<_> = waiting.rows.iter().map(|row| (row.mark, row.kind.as_str(), row.delta)).collect();
        assert_eq!(marks, [(mark(9, 3), "move", 1), (mark(99, 2), "create", 2), (mark(100, 1), "move", 3)]);
        assert!(!waiting.blocked && waiting.age > Duration::from_secs(7_000));
        assert_eq!(after(&mut database.connection, mark(9, 3)).await.unwrap().rows, waiting.rows[1..]);
        let ahead = of_products(&mut database.connection, mark(9, 3), &["a"]).await.unwrap();
        assert_eq!(ahead, waiting.rows[1..]);
        assert_eq!(number_of(&mut database.connection, "SELECT holdfast.inbox_ahead('a', 0, 0)").await, 3, "what came before is in it");
        execute(&mut database.connection, "UPDATE holdfast.partition SET inbox_xid = 99, inbox_id = 2").await;
        assert_eq!(prune(&mut database.connection, 0).await.unwrap(), 1, "one is young, one is not taken yet");
        let mut other = crate::ledger::connect(&database.url).await.unwrap();
        assert!(carries(&mut database.connection, 0).await.unwrap() && !carries(&mut other, 0).await.unwrap());
    }
}
