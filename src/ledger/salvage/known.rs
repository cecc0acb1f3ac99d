//! Which of the changes that were answered have had their effect: see [`salvage`](super).

use std::collections::{BTreeSet, HashMap, HashSet};

use sqlx::{Connection, PgConnection};

use super::{Answered, Error, Name, coupon_write, partition, to_bigint, write};
use crate::domain::RequestId;
use crate::sabotage::breaks;

/// By how much the clocks of two Redis hosts may differ, in ms.
const CLOCKS_DIFFER_MS: i64 = 60_000;

/// What looks at all that was handed over has as long.
const FOR_A_MINUTE: &str = "SET LOCAL statement_timeout = '60s'";

/// Which of them have had their effect: they are in the ledger, or what was done instead is, or stands in front of them here. That is what was
/// handed over and taken up, be it that it is owed, and what their client did again under the same REQUEST in a Redis that did not know of
/// it: under another epoch, and within `window_ms`, for which an id is remembered. Where that had another serial the last answer counts, as
/// its client and whoever came in between go by that.
pub async fn known(connection: &mut PgConnection, partition: u32, window_ms: i64, answered: &[Answered]) -> Result<HashSet<Name>, Error> {
    let within_ms = window_ms.saturating_add(CLOCKS_DIFFER_MS);
    let mut known = in_ledger(connection, answered).await?;
    let instead: Vec<(&Answered, Name)> = answered.iter().filter_map(|one| Some((one, stands_for(one)?))).collect();
    let there = are_in_ledger(connection, &instead.iter().map(|(_, name)| name).collect::<Vec<_>>()).await?;
    known.extend(instead.into_iter().filter(|(_, name)| there.contains(name)).map(|(one, _)| one.name()));
    known.extend(taken_up(connection, &left(answered, &known)).await?);
    known.extend(by_requests(connection, partition, within_ms, &left(answered, &known)).await?);
    let repeated = repeated(answered, &known, within_ms);
    known.extend(repeated);
    Ok(known)
}

fn left<'a>(answered: &'a [Answered], known: &HashSet<Name>) -> Vec<&'a Answered> {
    answered.iter().filter(|one| !known.contains(&one.name())).collect()
}

/// Settles, of all that was handed over, what gives way to another serial under the same REQUEST: the two may be far from each other. Their serials
/// are to be kept: by [`keep_serials`], once the coupons are there; with `only_kept` only those count that Postgres keeps already. Where all is of one epoch, as mostly, none of it is read.
pub async fn pass_over_repeated(connection: &mut PgConnection, partition: u32, window_ms: i64, only_kept: bool) -> Result<(), Error> {
    let mut transaction = connection.begin().await?;
    sqlx::query(FOR_A_MINUTE).execute(&mut *transaction).await?;
    // How many there are of what is read out of lines no planner knows, and each with each is too many.
    sqlx::query("SET LOCAL enable_nestloop = off").execute(&mut *transaction).await?;
    let repeated: Vec<(String, i32)> = sqlx::query_as(
        "WITH a AS MATERIALIZED (SELECT op, k, origin_epoch, at_ms, split_part(line, ' ', 3) AS request, split_part(line, ' ', 4) AS digest, \
         substring(line FROM ' serial=([0-9]+) ') AS serial FROM holdfast.salvage \
         WHERE partition = $1 AND NOT done AND split_part(line, ' ', 2) LIKE 'coupon.%' AND split_part(line, ' ', 3) LIKE 'request=%' \
         AND (SELECT min(origin_epoch) < max(origin_epoch) FROM holdfast.salvage WHERE partition = $1 AND NOT done)) \
         SELECT a.op, a.k FROM a WHERE EXISTS (SELECT 1 FROM a AS later \
         WHERE later.request = a.request AND later.digest = a.digest AND later.origin_epoch > a.origin_epoch \
         AND later.serial <> a.serial AND abs(later.at_ms - a.at_ms) <= $2) \
         AND NOT EXISTS (SELECT 1 FROM a AS instead WHERE instead.request = 'request=hf-' || a.op || '-' || a.k)",
    )
    .bind(partition::id(partition))
    .bind(window_ms.saturating_add(CLOCKS_DIFFER_MS))
    .fetch_all(&mut *transaction)
    .await?;
    sqlx::query("SET LOCAL enable_nestloop = on").execute(&mut *transaction).await?;
    let (ops, places): (Vec<String>, Vec<i32>) = repeated.into_iter().unzip();
    sqlx::query(
        "UPDATE holdfast.salvage s SET done = true FROM unnest($1::text[], $2::int[]) AS a (op, k) WHERE s.op = a.op AND s.k = a.k \
         AND (NOT $3 OR EXISTS (SELECT 1 FROM holdfast.coupon c WHERE c.coupon_id = substring(s.line FROM ' coupon=([^ ]+) ') \
         AND c.last_serial >= substring(s.line FROM ' serial=([0-9]+) ')::bigint)) \
         AND NOT EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.op = a.op AND l.k = a.k) \
         AND NOT EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.request_id = 'hf-' || a.op || '-' || a.k AND l.request_id LIKE 'hf-%')",
    )
    .bind(ops)
    .bind(places)
    .bind(only_kept)
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(())
}

/// Keeps every serial that was handed over from being given out again, also what was passed over: their users were told of them.
pub async fn keep_serials(connection: &mut PgConnection, partition: u32) -> Result<(), Error> {
    let mut transaction = connection.begin().await?;
    sqlx::query(FOR_A_MINUTE).execute(&mut *transaction).await?;
    // Nobody else has coupons locked.
    partition::lock(&mut transaction, partition).await?;
    let highest: Vec<(String, i64)> = sqlx::query_as(
        "SELECT a.coupon, max(a.serial) FROM (SELECT substring(line FROM ' coupon=([^ ]+) ') AS coupon, \
         substring(line FROM ' serial=([0-9]+) ')::bigint AS serial FROM holdfast.salvage \
         WHERE partition = $1 AND split_part(line, ' ', 2) = 'coupon.issue') AS a \
         JOIN holdfast.coupon c ON c.coupon_id = a.coupon AND c.last_serial < a.serial GROUP BY a.coupon",
    )
    .bind(partition::id(partition))
    .fetch_all(&mut *transaction)
    .await?;
    coupon_write::keep_highest(&mut transaction, highest.iter().map(|(coupon, serial)| (coupon.as_str(), *serial)).collect()).await?;
    transaction.commit().await?;
    Ok(())
}

/// The highest serial of a coupon among the issues that were handed over.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct HighestSerial {
    pub coupon: String,
    pub serial: i64,
    /// Whether Postgres has the coupon.
    pub is_there: bool,
}

/// Those of all coupons of which an issue waits.
pub async fn highest_serials(connection: &mut PgConnection, partition: u32) -> Result<Vec<HighestSerial>, Error> {
    let highest = sqlx::query_as(
        "SELECT a.coupon, a.serial, c.coupon_id IS NOT NULL AS is_there FROM \
         (SELECT substring(line FROM ' coupon=([^ ]+) ') AS coupon, max(substring(line FROM ' serial=([0-9]+) ')::bigint) AS serial \
         FROM holdfast.salvage WHERE partition = $1 AND split_part(line, ' ', 2) = 'coupon.issue' GROUP BY 1 HAVING bool_or(NOT done)) AS a \
         LEFT JOIN holdfast.coupon c ON c.coupon_id = a.coupon ORDER BY a.coupon",
    );
    Ok(highest.bind(partition::id(partition)).fetch_all(connection).await?)
}

/// Keeps these, which Redis gives out none of any more, from being given out again by Postgres either.
pub async fn keep_these(connection: &mut PgConnection, partition: u32, highest: &[HighestSerial]) -> Result<(), Error> {
    let mut transaction = connection.begin().await?;
    // Nobody else has coupons locked.
    partition::lock(&mut transaction, partition).await?;
    coupon_write::keep_highest(&mut transaction, highest.iter().map(|of| (of.coupon.as_str(), of.serial)).collect()).await?;
    transaction.commit().await?;
    Ok(())
}

/// What a change that was taken up does again.
fn stands_for(answered: &Answered) -> Option<Name> {
    let sent = RequestId::of_escaped(&answered.operation.remembered.as_ref()?.request).sent()?;
    Some((sent.op(), sent.k))
}

/// Those that come to the same as one in front of them; where that had another serial, as one behind them, unless the one in front is `known`.
fn repeated(answered: &[Answered], known: &HashSet<Name>, within_ms: i64) -> HashSet<Name> {
    let (mut here, mut done_again, mut requests, mut repeated) = (HashSet::new(), HashSet::new(), HashMap::new(), HashSet::new());
    for one in answered {
        let (name, instead) = (one.name(), stands_for(one));
        let remembered = one.operation.remembered.as_ref().map(|of| (of.request.as_str(), of.digest.as_str()));
        let before: Option<&Answered> = remembered.and_then(|remembered| requests.get(&remembered).copied());
        let has_other_serial = |before: &Answered| before.operation.serial() != one.operation.serial();
        let is_asked_again = before.is_some_and(|before| {
            // What was done again by the server's own name stands, and then both do.
            let stand_both = has_other_serial(before) && done_again.contains(&before.name());
            before.origin.epoch != one.origin.epoch && before.at_ms.saturating_sub(one.at_ms).saturating_abs() <= within_ms && !stand_both
        });
        let is_instead = instead.as_ref().is_some_and(|instead| here.contains(instead) || done_again.contains(instead));
        done_again.extend(instead);
        let gives_way = before.filter(|before| is_asked_again && has_other_serial(before) && !known.contains(&before.name()));
        if (is_asked_again && gives_way.is_none()) || is_instead || done_again.contains(&name) {
            repeated.insert(name);
            continue;
        }
        repeated.extend(gives_way.map(Answered::name));
        here.insert(name);
        requests.extend(remembered.map(|remembered| (remembered, one)));
    }
    repeated
}

/// Those that were handed over and are settled, or were done again under the server's own name.
async fn taken_up(connection: &mut PgConnection, answered: &[&Answered]) -> Result<Vec<Name>, Error> {
    if answered.is_empty() {
        return Ok(Vec::new());
    }
    let taken_up: Vec<(String, i32)> = sqlx::query_as(
        "SELECT a.op, a.k FROM unnest($1::text[], $2::int[]) AS a (op, k) \
         WHERE EXISTS (SELECT 1 FROM holdfast.salvage s WHERE s.op = a.op AND s.k = a.k AND s.done) \
         OR EXISTS (SELECT 1 FROM holdfast.stock_ledger l WHERE l.request_id = 'hf-' || a.op || '-' || a.k AND l.request_id LIKE 'hf-%') \
         OR EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.request_id = 'hf-' || a.op || '-' || a.k AND l.request_id LIKE 'hf-%')",
    )
    .bind(answered.iter().map(|one| one.op.as_str()).collect::<Vec<_>>())
    .bind(answered.iter().map(|one| write::small(one.operation.k)).collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    Ok(taken_up.into_iter().filter_map(name).collect())
}

/// Those that carried a REQUEST which was executed under another epoch as well, within so many ms. Most of a ledger's REQUESTs are of the very
/// epoch that was lost: they are read by the epochs, which it has indexes on. What was saved at its own place under an earlier epoch is not
/// looked for: the Redis that came after it was filled with its REQUESTs.
async fn by_requests(connection: &mut PgConnection, partition: u32, within_ms: i64, answered: &[&Answered]) -> Result<Vec<Name>, Error> {
    let with: Vec<_> = answered.iter().filter_map(|one| Some((*one, one.operation.remembered.as_ref()?))).collect();
    let times = || with.iter().map(|(one, _)| one.at_ms);
    let epochs = || with.iter().map(|(one, _)| to_bigint(one.origin.epoch));
    let (Some(first_ms), Some(last_ms)) = (times().min(), times().max()) else { return Ok(Vec::new()) };
    let rows: Vec<(String, i32)> = sqlx::query_as(
        "SELECT a.op, a.k FROM unnest($1::text[], $2::int[], $3::text[], $4::text[], $5::bigint[], $6::bigint[]) \
         AS a (op, k, request, digest, epoch, at_ms) JOIN (\
         SELECT request_id, request_digest, coalesce(origin_epoch, epoch) AS epoch, at FROM holdfast.stock_ledger \
         WHERE partition = $7 AND (epoch > $11 OR origin_epoch < $12) AND request_id IS NOT NULL AND request_id = ANY($3) \
         AND at BETWEEN timestamptz 'epoch' + $8::bigint * interval '1 millisecond' \
         AND timestamptz 'epoch' + $9::bigint * interval '1 millisecond' UNION ALL \
         SELECT request_id, request_digest, coalesce(origin_epoch, epoch), at FROM holdfast.coupon_ledger \
         WHERE partition = $7 AND (epoch > $11 OR origin_epoch < $12) AND request_id IS NOT NULL AND request_id = ANY($3) \
         AND at BETWEEN timestamptz 'epoch' + $8::bigint * interval '1 millisecond' \
         AND timestamptz 'epoch' + $9::bigint * interval '1 millisecond') AS l \
         ON l.request_id = a.request AND l.request_digest = a.digest AND l.epoch <> a.epoch \
         AND abs(extract(epoch FROM l.at) * 1000 - a.at_ms) <= $10::bigint",
    )
    .bind(with.iter().map(|(one, _)| one.op.as_str()).collect::<Vec<_>>())
    .bind(with.iter().map(|(one, _)| write::small(one.operation.k)).collect::<Vec<_>>())
    .bind(with.iter().map(|(_, remembered)| remembered.request.as_str()).collect::<Vec<_>>())
    .bind(with.iter().map(|(_, remembered)| remembered.digest.as_str()).collect::<Vec<_>>())
    .bind(epochs().collect::<Vec<_>>())
    .bind(with.iter().map(|(one, _)| one.at_ms).collect::<Vec<_>>())
    .bind(partition::id(partition))
    .bind(first_ms.saturating_sub(within_ms))
    .bind(last_ms.saturating_add(within_ms))
    .bind(within_ms)
    .bind(epochs().min())
    .bind(epochs().max())
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().filter_map(name).collect())
}

/// Which of them are in the ledger, in rows of their own or in one that stands for several.
pub async fn in_ledger(connection: &mut PgConnection, answered: &[Answered]) -> Result<HashSet<Name>, Error> {
    let names: Vec<Name> = answered.iter().map(Answered::name).collect();
    are_in_ledger(connection, &names.iter().collect::<Vec<_>>()).await
}

/// The same by their names; perhaps more of the same batches.
async fn are_in_ledger(connection: &mut PgConnection, names: &[&Name]) -> Result<HashSet<Name>, Error> {
    if names.is_empty() {
        return Ok(HashSet::new());
    }
    let rows: Vec<(String, i32)> = sqlx::query_as(
        "SELECT a.op, a.k FROM unnest($1::text[], $2::int[]) AS a (op, k) \
         WHERE EXISTS (SELECT 1 FROM holdfast.stock_ledger l WHERE l.op = a.op AND l.k = a.k) \
         OR EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.op = a.op AND l.k = a.k)",
    )
    .bind(names.iter().map(|(op, _)| op.as_str()).collect::<Vec<_>>())
    .bind(names.iter().map(|(_, k)| write::small(*k)).collect::<Vec<_>>())
    .fetch_all(&mut *connection)
    .await?;
    let mut known: HashSet<Name> = rows.into_iter().filter_map(name).collect();
    let ops: BTreeSet<&str> = names.iter().map(|(op, _)| op.as_str()).collect();
    let summed: Vec<(String, String)> =
        sqlx::query_as("SELECT op, runs FROM holdfast.stock_ledger WHERE op = ANY($1) AND runs IS NOT NULL")
            .bind(ops.into_iter().collect::<Vec<_>>())
            .fetch_all(connection)
            .await?;
    if breaks("blind-runs") {
        return Ok(known);
    }
    for (op, runs) in summed {
        known.extend(write::runs(&runs)?.each().map(|(k, _)| (op.clone(), k)));
    }
    Ok(known)
}

fn name((op, k): (String, i32)) -> Option<Name> {
    Some((op, u32::try_from(k).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Position;
    use crate::domain::change::{Entry, Operation};
    use crate::ledger::apply;
    use crate::ledger::salvage::tests::{WINDOW_MS, answered};
    use crate::ledger::salvage::{self, Saved, Without, hand_over, handed_over, is_anything_handed_over, save};
    use crate::ledger::testing::{database, execute, number_of, rows};

    #[tokio::test]
    async fn what_is_in_a_row_with_others_is_known() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let entry = |prev: &str, op: &str, first_n, lines: &[&str]| {
            let operations: Vec<Operation> = lines.iter().map(|line| Operation::decode(line).unwrap()).collect();
            let last = Position::new(1, first_n + operations.iter().map(Operation::count).sum::<u64>() - 1);
            Entry { last, first_n, prev: prev.into(), op: op.into(), at_ms: 7, operations }
        };
        let entries = [
            entry("-", "i:stock:1", 1, &["0 set | a 10 10"]),
            entry("i:stock:1", "i:stock:2", 2, &["1 mixed runs=1:-3,3-4:1 | a -1 9", "2 decr request=r digest=d | a -2 7"]),
        ];
        apply::apply(connection, 0, &entries).await.unwrap();
        let of_batch = |op: &str, k: u32| answered(op, u64::from(k) + 1, &format!("{k} decr | a -1 0"));
        let all: Vec<Answered> = (0..6).map(|k| of_batch("i:stock:2", k)).chain([of_batch("i:stock:3", 1)]).collect();
        let known: BTreeSet<(String, u32)> = in_ledger(connection, &all).await.unwrap().into_iter().collect();
        assert_eq!(known, (1..5).map(|k| ("i:stock:2".to_owned(), k)).collect());
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &all).await.unwrap(), Saved { saved: 3, owed: 0, known: 4 });
        assert_eq!(number_of(connection, "SELECT available FROM holdfast.stock").await, 4);
    }

    #[tokio::test]
    async fn what_was_taken_up_or_done_again_by_its_client_is_not_saved_again() {
        let mut database = database().await;
        let connection = &mut database.connection;
        save(connection, 0, 1, WINDOW_MS, &[answered("i:stock:1", 1, "0 set | a 100 100"), answered("i:stock:1", 2, "1 set | b 100 100")])
            .await
            .unwrap();
        execute(
            connection,
            "INSERT INTO holdfast.stock_ledger (partition, epoch, n, i, op, k, product_id, kind, redis_delta, pg_delta, available_after,
             request_id, request_digest, at) VALUES
             (0, 2, 40, 0, 'j:stock:1', 0, 'a', 'decr', -3, -3, 97, 'hf-i:stock:2-0', 'handed-over', to_timestamp(1700000000)),
             (0, 2, 41, 0, 'j:stock:1', 1, 'a', 'decr', -4, -4, 93, 'r', 'd', to_timestamp(1700000000)),
             (0, 2, 42, 0, 'j:stock:1', 2, 'a', 'decr', -5, -5, 88, 'r-other', 'other', to_timestamp(1700000000)),
             (0, 2, 45, 0, 'j:stock:1', 3, 'a', 'decr', -5, -5, 77, 'r-old', 'd', to_timestamp(1700000000 + 661)),
             (0, 1, 3, 0, 'j:stock:0', 0, 'a', 'decr', -6, -6, 82, 'r-before', 'd', to_timestamp(1700000000));
             INSERT INTO holdfast.coupon_ledger (partition, epoch, n, op, k, coupon_id, kind, serial, remaining_after, request_id, request_digest, at)
             VALUES (0, 2, 43, 'j:coupon:1', 0, 'c', 'issue', 1, 0, 'hf-i:coupon:2-0', 'handed-over', to_timestamp(1700000000)),
             (0, 2, 44, 'j:coupon:1', 1, 'c', 'issue', 2, 0, 'r-c', 'd', to_timestamp(1700000000))",
        )
        .await;
        let all = [
            answered("i:stock:2", 5, "0 decr | a -3 97"),
            answered("i:stock:2", 6, "1 decr request=r digest=d | a -4 93"),
            answered("i:coupon:2", 7, "0 coupon.issue coupon=c user=u serial=1 remaining=0 |"),
            answered("i:coupon:2", 8, "1 coupon.issue request=r-c digest=d coupon=c user=v serial=2 remaining=0 |"),
            answered("i:stock:2", 9, "2 reserve order=o expires=9 | a -1 92"),
            answered("i:stock:2", 10, "3 decr request=r-other digest=d | b -1 99"),
            answered("i:stock:2", 11, "4 decr request=r-before digest=d | b -1 98"),
            answered("i:stock:2", 12, "5 decr | b -1 97"),
            answered("i:stock:2", 13, "6 decr request=r-old digest=d | b -1 96"),
        ];
        hand_over(connection, 0, &all[..5]).await.unwrap();
        salvage::taken_up(connection, 0, &all[4], Some("too few")).await.unwrap();
        execute(connection, "UPDATE holdfast.partition SET epoch = 3, applied_epoch = 2, applied_n = 45").await;
        assert_eq!(save(connection, 0, 3, WINDOW_MS, &all).await.unwrap(), Saved { saved: 4, owed: 0, known: 5 });
        assert!(!is_anything_handed_over(connection).await.unwrap());
        let stock: Vec<(String, i64)> = rows(connection, "SELECT product_id, available FROM holdfast.stock ORDER BY product_id").await;
        assert_eq!(stock, [("a".into(), 100), ("b".into(), 96)]);
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.dead_letter").await, 1);
    }

    #[tokio::test]
    async fn what_was_done_twice_is_saved_once_whichever_is_saved_first() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let first =
            [answered("i:stock:1", 1, "0 set | a 100 100"), answered("i:coupon:1", 2, "0 coupon.create coupon=c total=9 peruser=1 |")];
        save(connection, 0, 1, WINDOW_MS, &first).await.unwrap();
        execute(connection, "UPDATE holdfast.partition SET epoch = 3").await;
        let sent = |counter: u64| format!("0123456789abcdef0123456789abcdef:stock:{counter}");
        let later = |n: u64, line: &str| Answered { origin: Position::new(2, n), ..answered("j:stock:1", n, line) };
        let up = |n: u64, counter: u64| later(n, &format!("{n} decr request=hf-{}-0 digest=handed-over | a -7 0", sent(counter)));
        let done_once = Saved { saved: 4, owed: 0, known: 3 };
        let all = [
            answered("i:stock:2", 20, "0 decr request=r digest=d | a -3 97"),
            answered(&sent(7), 21, "0 decr | a -7 90"),
            answered("i:coupon:2", 22, "0 coupon.issue request=r-c digest=d coupon=c user=u serial=1 remaining=8 |"),
            later(40, "40 decr request=r digest=d | a -3 97"),
            up(41, 7),
            later(42, "42 coupon.issue coupon=c user=x serial=1 remaining=8 |"),
            later(48, "48 coupon.issue request=r-c digest=d coupon=c user=u serial=2 remaining=7 |"),
        ];
        assert_eq!(save(connection, 0, 3, WINDOW_MS, &all).await.unwrap(), done_once, "in one piece");
        let issued: Vec<(i64, String)> = rows(connection, "SELECT serial, user_id FROM holdfast.coupon_issue ORDER BY serial").await;
        assert_eq!(issued, [(1, "x".into()), (2, "u".into())], "as both were told last");
        let of_y = [
            answered("i:coupon:2", 27, "1 coupon.issue request=r-y digest=d coupon=c user=y serial=9 remaining=8 |"),
            later(49, "49 coupon.issue request=r-y digest=d coupon=c user=y serial=3 remaining=6 |"),
        ];
        assert_eq!(save(connection, 0, 3, WINDOW_MS, &of_y).await.unwrap(), Saved { saved: 1, owed: 0, known: 1 });
        assert_eq!(number_of(connection, "SELECT last_serial FROM holdfast.coupon").await, 9, "what was answered once is nobody else's");
        let nothing = Saved { saved: 0, owed: 0, known: 2 };
        let saved = Saved { saved: 2, owed: 0, known: 0 };
        let of_clients = [later(43, "43 decr request=s digest=d | a -3 87"), up(44, 8)];
        assert_eq!(save(connection, 0, 3, WINDOW_MS, &of_clients).await.unwrap(), saved);
        let lost = [answered("i:stock:2", 23, "1 decr request=s digest=d | a -3 87"), answered(&sent(8), 24, "0 decr | a -7 80")];
        assert_eq!(save(connection, 0, 3, WINDOW_MS, &lost).await.unwrap(), nothing, "what was done again was saved by this very rebuild");
        let lost = [answered(&sent(9), 25, "0 decr | a -7 73"), answered("i:stock:2", 26, "2 decr request=t digest=d | a -3 70")];
        assert_eq!(save(connection, 0, 3, WINDOW_MS, &lost).await.unwrap(), saved);
        let again = [up(45, 9), later(46, "46 decr request=t digest=d | a -3 67")];
        assert_eq!(save(connection, 0, 3, WINDOW_MS, &again).await.unwrap(), nothing, "the other way round");
        assert_eq!(number_of(connection, "SELECT available FROM holdfast.stock").await, 100 - 3 * (3 + 7));
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.coupon_issue").await, 3);
        let much_later =
            Answered { at_ms: 1_700_000_000_000 + WINDOW_MS + CLOCKS_DIFFER_MS + 1, ..later(47, "47 decr request=t digest=d | a -3 64") };
        let once = Saved { saved: 1, owed: 0, known: 0 };
        assert_eq!(save(connection, 0, 3, WINDOW_MS, &[much_later]).await.unwrap(), once, "it had been forgotten, and was another");
    }

    #[tokio::test]
    async fn what_was_done_to_a_coupon_again_goes_with_its_issue() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(connection, "UPDATE holdfast.partition SET epoch = 3").await;
        for (coupon, serial, is_far) in [("same", 6, false), ("other", 7, false), ("far-same", 6, true), ("far-other", 7, true)] {
            let step = |epoch: u64, n: u64, step: &str, serial: i64| Answered {
                origin: Position::new(epoch, n),
                ..answered(
                    &format!("{coupon}:coupon:{epoch}"),
                    n,
                    &format!("{n} coupon.{step} request={coupon}-{step} digest=d coupon={coupon} user=u serial={serial} remaining=8 |"),
                )
            };
            let create = answered(coupon, 1, &format!("0 coupon.create coupon={coupon} total=9 peruser=1 |"));
            let mut all = vec![create, step(1, 6, "issue", 6), step(1, 7, "use", 6)];
            if serial != 6 {
                let quick = format!("5 coupon.issue coupon={coupon} user=quick serial=6 remaining=8 |");
                all.push(Answered { origin: Position::new(2, 5), ..answered(&format!("{coupon}:coupon:2"), 5, &quick) });
            }
            all.extend([step(2, 6, "issue", serial), step(2, 7, "use", serial)]);
            if !is_far {
                let done_once = Saved { saved: all.len() - 2, owed: 0, known: 2 };
                assert_eq!(save(connection, 0, 3, WINDOW_MS, &all).await.unwrap(), done_once, "{coupon}");
                continue;
            }
            hand_over(connection, 0, &all).await.unwrap();
            pass_over_repeated(connection, 0, WINDOW_MS, false).await.unwrap();
            for one in handed_over(connection, 0, Without::These(&[]), 9).await.unwrap() {
                assert_eq!(save(connection, 0, 3, WINDOW_MS, std::slice::from_ref(&one)).await.unwrap().owed, 0, "{coupon}");
                salvage::settled(connection, &[one]).await.unwrap();
            }
        }
        let issues = "SELECT coupon_id, string_agg(concat_ws(' ', serial, user_id, state), ', ' ORDER BY serial) \
                      FROM holdfast.coupon_issue GROUP BY coupon_id ORDER BY coupon_id COLLATE \"C\"";
        let (same, other) = ("6 u used", "6 quick issued, 7 u used");
        let expected = [("far-other", other), ("far-same", same), ("other", other), ("same", same)];
        assert_eq!(rows::<(String, String)>(connection, issues).await, expected.map(|(of, all)| (of.to_owned(), all.to_owned())));
    }

    #[tokio::test]
    async fn what_gives_way_is_told_by_any_answer_behind_it_and_its_serial_is_kept_once_its_coupon_is_there() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(connection, "UPDATE holdfast.partition SET epoch = 4").await;
        let later = |epoch: u64, after_ms: i64, n: u64, line: &str| {
            let one = answered(&format!("i:coupon:{epoch}"), n, &format!("{n} coupon.{line} |"));
            Answered { origin: Position::new(epoch, n), at_ms: one.at_ms + after_ms, ..one }
        };
        let issue = |serial: i64| format!("issue request=r digest=d coupon=c user=u serial={serial} remaining=1");
        let all = [
            later(1, 0, 1, "create coupon=c total=9 peruser=9"),
            later(1, 0, 9, &issue(9)),
            later(2, WINDOW_MS / 2, 1, &issue(7)),
            // Farther from the first than an id is remembered, and not from the second.
            later(3, WINDOW_MS + CLOCKS_DIFFER_MS + 1, 1, &issue(6)),
        ];
        hand_over(connection, 0, &all).await.unwrap();
        pass_over_repeated(connection, 0, WINDOW_MS, false).await.unwrap();
        let left = handed_over(connection, 0, Without::These(&[]), 9).await.unwrap();
        assert_eq!(left.iter().map(|one| one.operation.serial()).collect::<Vec<_>>(), [None, Some(6)]);
        salvage::keep_serials(connection, 0).await.unwrap();
        let saved = save(connection, 0, 4, WINDOW_MS, &left).await.unwrap();
        assert_eq!((saved.saved, saved.owed), (2, 0));
        let last = "SELECT last_serial FROM holdfast.coupon";
        assert_eq!(number_of(connection, last).await, 6);
        salvage::keep_serials(connection, 0).await.unwrap();
        assert_eq!(number_of(connection, last).await, 9);
    }

    #[tokio::test]
    async fn what_was_done_again_by_the_servers_own_name_gives_way_to_nothing() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(connection, "UPDATE holdfast.partition SET epoch = 4").await;
        let issue = |epoch: u64, op: &str, request: &str, serial: i64| {
            let line = format!("1 coupon.issue request={request} digest=d coupon=c user=u serial={serial} remaining=1 |");
            Answered { origin: Position::new(epoch, 2), ..answered(op, 2, &line) }
        };
        let (first, again) = (issue(1, "a:coupon:1", "r", 6), issue(3, "b:coupon:1", "r", 7));
        let instead = issue(2, "c:coupon:1", "hf-a:coupon:1-1", 6);
        hand_over(connection, 0, &[first, instead, again]).await.unwrap();
        pass_over_repeated(connection, 0, WINDOW_MS, false).await.unwrap();
        assert_eq!(handed_over(connection, 0, Without::These(&[]), 9).await.unwrap().len(), 3);
        // Nor within a piece of what is saved.
        let sent = "0123456789abcdef0123456789abcdef:coupon:1";
        let create = answered("a:coupon:0", 1, "0 coupon.create coupon=c total=9 peruser=9 |");
        let all = [create, issue(1, sent, "s", 6), issue(2, "d:coupon:1", &format!("hf-{sent}-1"), 6), issue(3, "e:coupon:1", "s", 7)];
        assert_eq!(save(connection, 0, 4, WINDOW_MS, &all).await.unwrap(), Saved { saved: 3, owed: 0, known: 1 });
        assert_eq!(rows::<(i64,)>(connection, "SELECT serial FROM holdfast.coupon_issue ORDER BY 1").await, [(6,), (7,)]);
    }

    #[tokio::test]
    async fn the_requests_of_the_epoch_that_was_lost_are_not_read_again() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(
            connection,
            "INSERT INTO holdfast.stock_ledger (partition, epoch, n, i, op, k, product_id, kind, redis_delta, pg_delta, available_after,
             request_id, request_digest, at) SELECT 0, 1, n, 0, 'i:stock:' || n, 0, 'a', 'decr', 0, 0, 0, 'r-' || n, 'd',
             to_timestamp(1700000000) FROM generate_series(1, 20000) AS n;
             INSERT INTO holdfast.coupon_ledger (partition, epoch, n, op, k, coupon_id, kind, remaining_after, request_id, request_digest, at)
             SELECT 0, 1, 20000 + n, 'i:coupon:' || n, 0, 'c', 'issue', 0, 'r-' || n, 'd', to_timestamp(1700000000)
             FROM generate_series(1, 20000) AS n;
             UPDATE holdfast.stock_ledger SET epoch = 3, origin_epoch = 1, origin_n = n WHERE n = 7;
             UPDATE holdfast.stock_ledger SET epoch = 3, origin_epoch = 2, origin_n = n WHERE n = 8;
             UPDATE holdfast.coupon_ledger SET epoch = 3 WHERE op = 'i:coupon:9';
             ANALYZE holdfast.stock_ledger, holdfast.coupon_ledger",
        )
        .await;
        execute(connection, "BEGIN").await;
        let read = "SELECT sum(seq_tup_read + idx_tup_fetch)::bigint FROM pg_stat_xact_user_tables WHERE relname LIKE '%_ledger'";
        let read_before = number_of(connection, read).await;
        let lost: Vec<Answered> =
            (1..=1000).map(|n| answered("j:stock:1", 50_000 + n, &format!("{n} decr request=r-{n} digest=d | a -1 0"))).collect();
        let done_again = by_requests(connection, 0, WINDOW_MS, &lost.iter().collect::<Vec<_>>()).await.unwrap();
        assert_eq!(done_again.iter().map(|(_, k)| *k).collect::<BTreeSet<_>>(), BTreeSet::from([8, 9]));
        let of_next = Answered { origin: Position::new(2, 1), ..answered("j:stock:2", 1, "7 decr request=r-7 digest=d | a -1 0") };
        assert_eq!(by_requests(connection, 0, WINDOW_MS, &[&of_next]).await.unwrap(), [("j:stock:2".to_owned(), 7)]);
        let rows_read = number_of(connection, read).await - read_before;
        assert!(rows_read < 100, "{rows_read}");
    }
}
