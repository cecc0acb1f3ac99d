//! Applies outbox entries to Postgres, once.

use std::collections::HashMap;

use sqlx::{Connection, PgConnection};

use super::changes::{Changes, Created, Known};
use super::partition::{self, PartitionRow};
use super::{Error, dead_letter, inbox, to_bigint, write};
use crate::domain::change::{Effect, Entry, StockKind};
use crate::domain::{InboxMark, Position};
use crate::sabotage::breaks;

/// How far a partition is after a call of [`apply`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Everything up to here is in Postgres.
    pub position: Position,
    /// The op of the entry there.
    pub last_op: String,
    /// How many operations this call added; 0 where Postgres had them all.
    pub operations: u64,
}

/// Applies a run of outbox entries, in the order of the stream, in one transaction: the ledger rows, the stock and the coupons, and the
/// position. Entries that Postgres has already are passed over, so that a call whose outcome is not known is simply repeated.
///
/// Errors with [`Error::Broken`] where the entries do not continue what Postgres has, with [`Error::Data`] where Postgres refuses one of
/// them for its values: then nothing of this call has happened, and a part of the run may still be applied on its own. After
/// [`Error::Connection`] the outcome is not known and the connection is of no use.
pub async fn apply(connection: &mut PgConnection, partition: u32, entries: &[Entry]) -> Result<Applied, Error> {
    let mut transaction = connection.begin().await?;
    match apply_in(&mut transaction, partition, entries).await {
        Ok(applied) if applied.operations > 0 => {
            transaction.commit().await?;
            Ok(applied)
        }
        result => {
            transaction.rollback().await?;
            result
        }
    }
}

async fn apply_in(connection: &mut PgConnection, partition: u32, entries: &[Entry]) -> Result<Applied, Error> {
    let Some(row) = partition::lock(connection, partition).await? else {
        return Err(Error::Broken(format!("holdfast.partition has no row for partition {partition}: it was emptied while Holdfast ran")));
    };
    let new = continuation(&row, entries).map_err(Error::Broken)?;
    let Some(last) = new.last() else {
        return Ok(Applied { position: row.applied, last_op: row.last_op, operations: 0 });
    };
    check_epochs(connection, partition, &row, new).await?;
    let mark = partition::mark(connection, partition).await?;
    let created = what_is_created(connection, mark, new).await?;
    let changes = Changes::gather(new, &created)?;
    write::changes(connection, partition, &changes).await?;
    dead_letter::balance_ended(connection, new.iter().flat_map(|entry| &entry.operations)).await?;
    advance(connection, partition, &row, new, changes.mark).await?;
    Ok(Applied { position: last.last, last_op: last.op.clone(), operations: last.last.n - row.applied.n })
}

/// Checks that no entry lies beyond where its epoch ended: Redis has lost it, and has gone on without it.
pub(super) async fn check_epochs(connection: &mut PgConnection, partition: u32, row: &PartitionRow, new: &[Entry]) -> Result<(), Error> {
    for of_one in new.chunk_by(|a, b| a.last.epoch == b.last.epoch) {
        let Some(last) = of_one.last().map(|entry| entry.last).filter(|last| last.epoch < row.epoch) else { continue };
        let newest = partition::newest_of_epoch(connection, partition, last.epoch).await?;
        if let Some(newest) = newest.filter(|newest| last.n > *newest) {
            return Err(Error::Broken(format!(
                "entry {last} lies beyond n {newest}, after which a later epoch goes on: Redis has lost it"
            )));
        }
    }
    Ok(())
}

/// Moves the partition's row to the end of these entries, and writes where the epochs have ended that they went beyond.
pub(super) async fn advance(
    connection: &mut PgConnection,
    partition: u32,
    row: &PartitionRow,
    new: &[Entry],
    mark: Option<InboxMark>,
) -> Result<(), Error> {
    let (mut reached, mut op) = (row.applied, row.last_op.as_str());
    for entry in new {
        if entry.last.epoch > reached.epoch {
            end_epochs(connection, partition, reached, entry.last.epoch).await?;
        }
        (reached, op) = (entry.last, &entry.op);
    }
    partition::advance(connection, partition, reached, op, mark).await
}

/// Writes where the epochs from that of `reached` up to, not including, `next` have ended.
pub(super) async fn end_epochs(connection: &mut PgConnection, partition: u32, reached: Position, next: u64) -> Result<(), Error> {
    sqlx::query("UPDATE holdfast.partition_epoch SET last_n = $2 WHERE partition = $1 AND epoch >= $3 AND epoch < $4 AND last_n IS NULL")
        .bind(partition::id(partition))
        .bind(to_bigint(reached.n))
        .bind(to_bigint(reached.epoch))
        .bind(to_bigint(next))
        .execute(connection)
        .await?;
    Ok(())
}

/// What Postgres has of the products that are set in these entries. Their rows stay locked, so that no other program changes them meanwhile;
/// where Redis did not have the product they are made, if there are none. `mark`: up to where Redis has the inbox before these entries.
pub(super) async fn what_is_created(connection: &mut PgConnection, mark: InboxMark, entries: &[Entry]) -> Result<Created, Error> {
    let operations = entries.iter().flat_map(|entry| &entry.operations);
    let (mut products, mut new): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    for operation in operations {
        if let Effect::Stock { kind: StockKind::Set, items, detail } = &operation.effect {
            products.extend(items.iter().map(|item| item.product.as_str()));
            new.extend(items.iter().filter(|_| detail.created).map(|item| item.product.as_str()));
        }
    }
    if products.is_empty() {
        return Ok(Created { mark, ..Created::default() });
    }
    new.sort_unstable();
    sqlx::query("INSERT INTO holdfast.stock (product_id, available) SELECT p, 0 FROM unnest($1::text[]) AS p ON CONFLICT DO NOTHING")
        .bind(new)
        .execute(&mut *connection)
        .await?;
    sqlx::query("SELECT FROM holdfast.stock WHERE product_id = ANY($1) ORDER BY product_id FOR UPDATE")
        .bind(&products)
        .execute(&mut *connection)
        .await?;
    let units: Vec<(String, i64)> = sqlx::query_as(
        "SELECT s.product_id, (s.available + coalesce((SELECT sum(d.delta) FROM holdfast.dead_letter d \
         WHERE d.product_id = s.product_id AND d.in_redis), 0))::bigint FROM holdfast.stock s WHERE s.product_id = ANY($1)",
    )
    .bind(&products)
    .fetch_all(&mut *connection)
    .await?;
    let mut known: HashMap<String, Known> = products.iter().map(|product| ((*product).to_owned(), Known::default())).collect();
    for (product, units) in units {
        known.entry(product).or_default().units = units;
    }
    for row in inbox::of_products(connection, mark, &products).await? {
        let moves = (row.kind == "move").then_some(row.delta);
        known.entry(row.product).or_default().ahead.push((row.mark, moves));
    }
    Ok(Created { products: known, mark })
}

/// The entries that Postgres does not have yet, which is a tail of the run; checked that they continue, without a gap and in the same
/// history, what Postgres has. Errors with what was found instead.
pub fn continuation<'a>(row: &PartitionRow, entries: &'a [Entry]) -> Result<&'a [Entry], String> {
    let known = entries.iter().take_while(|entry| entry.last <= row.applied).count();
    let (known, new) = entries.split_at(known);
    if breaks("no-chain") {
        return Ok(new);
    }
    if let Some(entry) = known.last().filter(|entry| entry.last == row.applied && entry.op != row.last_op) {
        return Err(format!(
            "fork: at {} the outbox has batch {}, but Postgres applied {} there; Redis holds another history",
            row.applied, entry.op, row.last_op
        ));
    }
    let (mut at, mut op) = (row.applied, row.last_op.as_str());
    for entry in new {
        check_next(row, at, op, entry)?;
        (at, op) = (entry.last, &entry.op);
    }
    Ok(new)
}

fn check_next(row: &PartitionRow, at: Position, op: &str, entry: &Entry) -> Result<(), String> {
    let (last, first_n) = (entry.last, entry.first_n);
    if last.epoch > row.epoch {
        return Err(format!(
            "the outbox has {last}, but Postgres knows no epoch after {}: was Postgres restored from a backup?",
            row.epoch
        ));
    }
    if last <= at {
        return Err(format!("fork: the outbox goes back from {at} to {last}"));
    }
    if first_n > at.n + 1 {
        return Err(format!(
            "gap: after {at} the outbox goes on with n {first_n} (entry {last}); {} changes are missing",
            first_n - at.n - 1
        ));
    }
    if first_n <= at.n {
        return Err(format!("fork: entry {last} starts again at n {first_n}, but everything up to {at} came before it"));
    }
    if entry.prev != op {
        return Err(format!("fork: entry {last} follows batch {}, but batch {op} stands at {at}", entry.prev));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::change::Operation;
    use crate::ledger::dead_letter::apply_parking;
    use crate::ledger::testing::{Database, database, number_of, rows};
    use crate::ledger::{coupon, stock};

    /// An outbox: each entry continues the one before it.
    struct Outbox {
        epoch: u64,
        n: u64,
        prev: String,
        counter: u64,
    }

    impl Outbox {
        fn new() -> Self {
            Self { epoch: 1, n: 0, prev: "-".into(), counter: 0 }
        }

        fn entry(&mut self, lines: &[&str]) -> Entry {
            self.counter += 1;
            let operations: Vec<_> = lines.iter().map(|line| Operation::decode(line).unwrap()).collect();
            let op = format!("instance:stock:{}", self.counter);
            let prev = std::mem::replace(&mut self.prev, op.clone());
            let first_n = self.n + 1;
            self.n += operations.iter().map(Operation::count).sum::<u64>();
            Entry { last: Position::new(self.epoch, self.n), first_n, prev, op, at_ms: 1_700_000_000_123, operations }
        }
    }

    async fn apply_all(database: &mut Database, entries: &[Entry]) -> Result<Applied, Error> {
        apply(&mut database.connection, 0, entries).await
    }

    async fn available(database: &mut Database, product: &str) -> Option<i64> {
        stock::load(&mut database.connection, &[product.to_owned()]).await.unwrap().first().map(|row| row.available)
    }

    #[tokio::test]
    async fn what_is_applied_twice_happens_once() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        let entries =
            [outbox.entry(&["0 set low=3 | a 10 10"]), outbox.entry(&["0 decr request=r%20 digest=9f | a -3 7 a -1 6", "4 incr | a 5 11"])];
        let first = apply_all(&mut database, &entries).await.unwrap();
        assert_eq!(first, Applied { position: Position::new(1, 3), last_op: "instance:stock:2".into(), operations: 3 });
        let again = apply_all(&mut database, &entries).await.unwrap();
        assert_eq!(again, Applied { operations: 0, ..first.clone() });
        let more = outbox.entry(&["0 decr | a -1 10"]);
        let overlapping = [entries[1].clone(), more];
        assert_eq!(apply_all(&mut database, &overlapping).await.unwrap().operations, 1);
        assert_eq!(available(&mut database, "a").await, Some(10));
        type Line = (i64, i64, i32, String, i32, String, i64, i64, i64, Option<String>, Option<String>, String);
        let lines: Vec<Line> = rows(
            &mut database.connection,
            "SELECT epoch, n, i, op, k, kind, redis_delta, pg_delta, available_after, request_id, request_digest, \
             to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') FROM holdfast.stock_ledger ORDER BY epoch, n, i",
        )
        .await;
        assert_eq!(lines.len(), 5);
        let request = (Some("r%20".to_owned()), Some("9f".to_owned()));
        let op = "instance:stock:2".to_owned();
        assert_eq!(lines[2], (1, 2, 1, op, 0, "decr".into(), -1, -1, 6, request.0, request.1, "2023-11-14 22:13:20.123000".into()));
        let row = partition::load(&mut database.connection, 0).await.unwrap();
        assert_eq!(row, PartitionRow { epoch: 1, applied: Position::new(1, 4), last_op: "instance:stock:3".into(), owner: None });
    }

    #[tokio::test]
    async fn what_sums_up_several_is_one_row_and_moves_by_all_of_them() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        let entries = [
            outbox.entry(&["0 set | a 10 10", "1 set | b 10 10"]),
            outbox.entry(&["0 mixed runs=0:-3,2-3:-1,6:2 | a -3 7", "1 decr | b -1 9", "4 decr request=r digest=d | b -2 7"]),
            outbox.entry(&["0 incr runs=0-1:1 | b 2 9"]),
        ];
        assert_eq!(apply_all(&mut database, &entries).await.unwrap().operations, 10);
        type Line = (i64, i32, String, i64, i64, i32, Option<String>);
        let lines: Vec<Line> = rows(
            &mut database.connection,
            "SELECT n, k, kind, pg_delta, available_after, operations, runs FROM holdfast.stock_ledger WHERE n > 2 ORDER BY n",
        )
        .await;
        let line = |n, k, kind: &str, delta, after, operations, runs: Option<&str>| {
            (n, k, kind.to_owned(), delta, after, operations, runs.map(str::to_owned))
        };
        assert_eq!(
            lines,
            [
                line(3, 0, "mixed", -3, 7, 4, Some("0:-3,2-3:-1,6:2")),
                line(7, 1, "decr", -1, 9, 1, None),
                line(8, 4, "decr", -2, 7, 1, None),
                line(9, 0, "incr", 2, 9, 2, Some("0-1:1")),
            ]
        );
        assert_eq!((available(&mut database, "a").await, available(&mut database, "b").await), (Some(7), Some(9)));
    }

    #[tokio::test]
    async fn a_gap_and_a_fork_are_refused_and_change_nothing() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        let entries: Vec<_> = (0..4).map(|_| outbox.entry(&["0 set | a 1 1"])).collect();
        let broken = |result: Result<Applied, Error>, what: &str| match result {
            Err(Error::Broken(found)) => assert!(found.contains(what), "{found}"),
            other => panic!("{other:?}"),
        };
        broken(apply_all(&mut database, &entries[1..]).await, "gap: after 0-0 the outbox goes on with n 2");
        apply_all(&mut database, &entries[..2]).await.unwrap();
        broken(apply_all(&mut database, &entries[3..]).await, "gap: after 1-2");
        broken(apply_all(&mut database, &[entries[2].clone(), entries[2].clone()]).await, "goes back");
        let other = Entry { prev: "other:stock:1".into(), ..entries[2].clone() };
        broken(apply_all(&mut database, &[other]).await, "follows batch other:stock:1");
        let other = Entry { op: "other:stock:9".into(), ..entries[1].clone() };
        broken(apply_all(&mut database, &[other, entries[2].clone()]).await, "another history");
        let other = Entry { first_n: 2, ..entries[2].clone() };
        broken(apply_all(&mut database, &[other]).await, "starts again at n 2");
        let other = Entry { last: Position::new(2, 3), ..entries[2].clone() };
        broken(apply_all(&mut database, &[other]).await, "restored from a backup");
        broken(apply(&mut database.connection, 7, &entries).await, "no row for partition 7");
        assert_eq!(number_of(&mut database.connection, "SELECT count(*) FROM holdfast.stock_ledger").await, 2);
        assert_eq!(apply_all(&mut database, &entries).await.unwrap().operations, 2);
    }

    #[tokio::test]
    async fn the_order_within_a_batch_decides_what_a_product_is() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        let entry = outbox.entry(&[
            "0 set low=2 | a 10 10",
            "1 decr | a -4 6",
            "2 delete | a -6 0",
            "3 set low=1 | b 5 5",
            "4 delete | b -5 0",
            "5 set | b 7 7",
            "6 set low=9 | c 3 3",
        ]);
        apply_all(&mut database, &[entry]).await.unwrap();
        assert_eq!(available(&mut database, "a").await, None);
        assert_eq!(available(&mut database, "b").await, Some(7));
        let state = "SELECT product_id, available, low, deleted_at IS NOT NULL FROM holdfast.stock ORDER BY product_id";
        let stocks: Vec<(String, i64, Option<i64>, bool)> = rows(&mut database.connection, state).await;
        assert_eq!(stocks, [("a".into(), 0, None, true), ("b".into(), 7, None, false), ("c".into(), 3, Some(9), false)]);
        // A later batch: lowered in one step although the row is there, brought back, given to Redis.
        let entries = [outbox.entry(&["0 set | c -2 1", "1 init | b 7 7"]), outbox.entry(&["0 set | a 4 4", "1 decr | a -1 3 b -7 0"])];
        apply_all(&mut database, &entries).await.unwrap();
        let stocks: Vec<(String, i64, Option<i64>, bool)> = rows(&mut database.connection, state).await;
        assert_eq!(stocks, [("a".into(), 3, None, false), ("b".into(), 0, None, false), ("c".into(), 1, Some(9), false)]);
    }

    #[tokio::test]
    async fn what_postgres_cannot_hold_is_refused_and_named() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        apply_all(&mut database, &[outbox.entry(&["0 set | a 1 1"])]).await.unwrap();
        let (n, prev) = (outbox.n, outbox.prev.clone());
        for (line, what) in [
            ("0 decr | a -2 0", "stock_available_check"),
            ("0 decr | ghost -1 0", "does not have: ghost"),
            ("0 coupon.issue coupon=ghost user=u serial=1 remaining=0 |", "does not have: ghost"),
        ] {
            (outbox.n, outbox.prev) = (n, prev.clone());
            match apply_all(&mut database, &[outbox.entry(&[line])]).await {
                Err(Error::Data(message)) => assert!(message.contains(what), "{message}"),
                other => panic!("{other:?}"),
            }
        }
        (outbox.n, outbox.prev) = (n, prev);
        assert_eq!(number_of(&mut database.connection, "SELECT count(*) FROM holdfast.coupon_issue").await, 0);
        apply_all(&mut database, &[outbox.entry(&["0 decr | a -1 0"])]).await.unwrap();
        assert_eq!(available(&mut database, "a").await, Some(0), "the connection still serves");
    }

    #[tokio::test]
    async fn what_is_issued_under_an_older_token_than_the_newest_is_refused_and_parked() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        // Redis refuses these itself; Postgres, where it did not.
        let issue = |user: &str, token: i64, serial: i64| {
            format!("0 coupon.issue coupon=c user={user} token={token} serial={serial} remaining=1 |")
        };
        let entries = [
            outbox.entry(&["0 coupon.create coupon=c total=9 peruser=1 |"]),
            outbox.entry(&[&issue("u", 7, 1)]),
            outbox.entry(&[&issue("v", 9, 2)]),
            outbox.entry(&[&issue("w", 9, 3)]),
        ];
        apply_all(&mut database, &entries).await.unwrap();
        let late = outbox.entry(&[&issue("x", 8, 4)]);
        let refused = apply_all(&mut database, std::slice::from_ref(&late)).await.unwrap_err();
        assert!(matches!(&refused, Error::Data(why) if why.contains("fencing token")), "{refused}");
        let (_, parked) = apply_parking(&mut database.connection, 0, &late).await.unwrap();
        assert_eq!(parked, 1);
        let newer = outbox.entry(&[&issue("y", 10, 5)]);
        let (newer_and_overtaken, elided) =
            (outbox.entry(&[&issue("z", 9, 6)]), outbox.entry(&["0 coupon.issue coupon=c user=e serial=7 remaining=1 |"]));
        let refused = apply_all(&mut database, &[newer.clone(), newer_and_overtaken.clone()]).await.unwrap_err();
        assert!(matches!(&refused, Error::Data(why) if why.contains("older than one before it")), "{refused}");
        apply_all(&mut database, &[newer]).await.unwrap();
        apply_parking(&mut database.connection, 0, &newer_and_overtaken).await.unwrap();
        apply_all(&mut database, &[elided]).await.unwrap();
        let issued: Vec<(String,)> = rows(&mut database.connection, "SELECT user_id FROM holdfast.coupon_issue ORDER BY serial").await;
        assert_eq!(issued, ["u", "v", "w", "y", "e"].map(|user| (user.to_owned(),)));
        let coupon: Vec<(i64, i64)> = rows(&mut database.connection, "SELECT last_token, issued FROM holdfast.coupon").await;
        assert_eq!(coupon, [(10, 5)]);
    }

    #[tokio::test]
    async fn a_coupon_is_created_and_issued_no_more_often_than_it_has() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        let entries = [
            outbox.entry(&["0 coupon.create coupon=c total=3 peruser=2 end=99 |", "1 coupon.issue coupon=c user=u serial=1 remaining=2 |"]),
            outbox.entry(&["0 coupon.issue request=r digest=d coupon=c user=v serial=2 remaining=1 |", "1 set | a 1 1"]),
        ];
        apply_all(&mut database, &entries).await.unwrap();
        let row = coupon::load(&mut database.connection, "c").await.unwrap().unwrap();
        assert_eq!((row.total, row.per_user, row.start_ms, row.end_ms), (3, 2, None, Some(99)));
        assert_eq!((row.issued, row.used, row.last_serial, row.state.as_str()), (2, 0, 2, "active"));
        let issues: Vec<(String, i64, String, String)> =
            rows(&mut database.connection, "SELECT coupon_id, serial, user_id, state FROM holdfast.coupon_issue ORDER BY serial").await;
        assert_eq!(issues, [("c".into(), 1, "u".into(), "issued".into()), ("c".into(), 2, "v".into(), "issued".into())]);
        type Line = (i64, String, Option<String>, Option<i64>, i64, Option<String>);
        let ledger: Vec<Line> = rows(
            &mut database.connection,
            "SELECT n, kind, user_id, serial, remaining_after, request_id FROM holdfast.coupon_ledger ORDER BY n",
        )
        .await;
        assert_eq!(ledger[0], (1, "create".into(), None, None, 3, None));
        assert_eq!(ledger[2], (3, "issue".into(), Some("v".into()), Some(2), 1, Some("r".into())));
        let twice = outbox.entry(&["0 coupon.issue coupon=c user=w serial=2 remaining=0 |"]);
        assert!(matches!(apply_all(&mut database, &[twice]).await, Err(Error::Data(_))), "a serial is issued once");
        assert_eq!(coupon::load(&mut database.connection, "none").await.unwrap(), None);
    }

    #[tokio::test]
    async fn crossing_into_an_epoch_writes_where_the_one_before_ended() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        for (epoch, n) in [(1, 2), (2, 2), (3, 3)] {
            let row = partition::load(&mut database.connection, 0).await.unwrap();
            assert_eq!(partition::take_epoch(&mut database.connection, 0, &row, "run-x", n).await.unwrap(), Some(epoch + 1));
            assert_eq!(partition::take_epoch(&mut database.connection, 0, &row, "run-y", n).await.unwrap(), None, "taken already");
        }
        let first = outbox.entry(&["0 set | a 1 1", "1 incr | a 1 2"]);
        outbox.epoch = 3;
        let second = outbox.entry(&["0 incr | a 1 3"]);
        outbox.epoch = 4;
        let third = outbox.entry(&["0 incr | a 1 4"]);
        apply_all(&mut database, &[first, second, third]).await.unwrap();
        let epochs = partition::epochs(&mut database.connection, 0).await.unwrap();
        let ends: Vec<_> = epochs.iter().map(|row| (row.epoch, row.run_id.as_str(), row.last_n)).collect();
        assert_eq!(ends, [(1, "run-1", Some(2)), (2, "run-x", Some(2)), (3, "run-x", Some(3)), (4, "run-x", None)]);
    }

    #[tokio::test]
    async fn what_redis_lost_before_a_later_epoch_is_not_applied_after_it() {
        let (mut database, mut outbox) = (database().await, Outbox::new());
        let kept = outbox.entry(&["0 set | a 9 9"]);
        let lost = outbox.entry(&["0 decr | a -1 8"]);
        let row = partition::load(&mut database.connection, 0).await.unwrap();
        partition::take_epoch(&mut database.connection, 0, &row, "run-2", 1).await.unwrap().unwrap();
        match apply_all(&mut database, &[kept.clone(), lost.clone()]).await {
            Err(Error::Broken(found)) => assert!(found.contains("entry 1-2 lies beyond n 1"), "{found}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(apply_all(&mut database, &[kept]).await.unwrap().operations, 1);
        // Filled anew, and nothing was saved: what a relay still holds is passed over.
        let row = partition::load(&mut database.connection, 0).await.unwrap();
        let taken = partition::take_epoch_to_rebuild(&mut database.connection, 0, &row, 5, "run-2", "me").await.unwrap();
        assert_eq!(taken, Some(5));
        assert_eq!(partition::take_epoch(&mut database.connection, 0, &row, "run-3", 1).await.unwrap(), None, "somebody fills redis");
        crate::ledger::salvage::seal(&mut database.connection, 0, 5, false).await.unwrap();
        assert_eq!(apply_all(&mut database, &[lost]).await.unwrap().operations, 0);
        assert!(partition::finish_rebuild(&mut database.connection, 0, 5, "me").await.unwrap());
        let epochs = partition::epochs(&mut database.connection, 0).await.unwrap();
        let ends: Vec<_> = epochs.iter().map(|row| (row.epoch, row.last_n)).collect();
        assert_eq!(ends, [(1, Some(1)), (2, Some(1)), (3, Some(1)), (4, Some(1)), (5, None)]);
    }
}
