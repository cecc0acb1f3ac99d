//! Reads coupons.

use std::collections::HashSet;

use sqlx::PgConnection;

use super::{Error, from_bigint, partition, to_bigint};
use crate::domain::Position;
use crate::domain::change::{Effect, Operation};
use crate::domain::coupon::{Counts, CouponChange};

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
    /// The highest serial that was ever given out, also by an issue that is parked or owed.
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

/// Whether a serial of a coupon was ever given to anybody, also by an issue that Postgres refused: that has only its row in the ledger.
pub async fn is_issued(connection: &mut PgConnection, coupon: &str, serial: i64) -> Result<bool, Error> {
    let issued = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM holdfast.coupon_issue WHERE coupon_id = $1 AND serial = $2) \
         OR EXISTS (SELECT 1 FROM holdfast.coupon_ledger WHERE coupon_id = $1 AND serial = $2 AND kind = 'issue')",
    );
    Ok(issued.bind(coupon).bind(serial).fetch_one(connection).await?)
}

/// What Postgres says of one coupon at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub coupon: String,
    /// The numbers that Redis has to have there; `None` where Postgres has no such coupon now, or it is deleted.
    pub counts: Option<Counts>,
    /// The part of them that `holdfast.coupon` itself does not show.
    pub in_flight: Counts,
    /// How many one user may have.
    pub per_user: i64,
    /// Whether it was created or deleted after the place: then whether it existed there is not known.
    pub unsettled: bool,
}

/// What [`stock::expected`](super::stock::expected) does for products: what Redis had = what there is + parked - moved after. Other programs
/// tell Redis nothing of coupons, so there is no inbox. Before the first issue behind the place the serial was one less than that issue's.
const EXPECTED: &str = "WITH at AS (SELECT p.id, p.epoch, p.applied_n FROM holdfast.partition p WHERE p.id = $1) \
     SELECT at.epoch, at.applied_n, q.coupon, c.coupon_id IS NOT NULL AND c.state <> 'deleted', coalesce(c.total, 0), coalesce(c.issued, 0), \
     coalesce(c.used, 0), coalesce(c.last_serial, 0), coalesce(c.per_user, 1), after.total, after.issued, after.used, after.serial, after.first, \
     after.life, parked.lines \
     FROM at CROSS JOIN unnest($2::text[]) WITH ORDINALITY AS q (coupon, place) \
     LEFT JOIN holdfast.coupon c ON c.coupon_id = q.coupon \
     CROSS JOIN LATERAL (SELECT coalesce(sum(l.total_delta), 0)::bigint AS total, coalesce(sum(l.issued_delta), 0)::bigint AS issued, \
     coalesce(sum(l.used_delta), 0)::bigint AS used, coalesce(sum(l.serial) FILTER (WHERE l.kind = 'adopt'), 0)::bigint AS serial, \
     min(l.serial) FILTER (WHERE l.kind = 'issue') AS first, coalesce(bool_or(l.kind IN ('create', 'delete')), false) AS life \
     FROM holdfast.coupon_ledger l WHERE l.coupon_id = q.coupon AND l.partition = at.id AND (l.epoch, l.n) > ($3, $4)) AS after \
     CROSS JOIN LATERAL (SELECT coalesce(array_agg(d.line), '{}') AS lines FROM holdfast.dead_letter d WHERE d.partition = at.id \
     AND d.in_redis AND d.product_id IS NULL AND position(' coupon=' || q.coupon || ' ' IN d.line) > 0) AS parked \
     ORDER BY q.place";

#[derive(sqlx::FromRow)]
struct ExpectedRow(i64, i64, String, bool, i64, i64, i64, i64, i64, i64, i64, i64, i64, Option<i64>, bool, Vec<String>);

impl ExpectedRow {
    fn expected(self) -> Expected {
        let Self(
            _,
            _,
            coupon,
            exists,
            total,
            issued,
            used,
            serial,
            per_user,
            total_after,
            issued_after,
            used_after,
            adopted,
            first,
            mut unsettled,
            parked,
        ) = self;
        let stored = Counts { total, issued, used, serial };
        let after = Counts { total: total_after, issued: issued_after, used: used_after, serial: adopted };
        let mut counts = stored.with(after, i64::saturating_sub);
        for line in &parked {
            let Ok(Operation { effect: Effect::Coupon { change, .. }, .. }) = Operation::decode(line) else { continue };
            // Only Redis has it until that is settled.
            unsettled |= matches!(change, CouponChange::Create(_));
            let [total, issued, used] = change.moves();
            let serial = change.serial().map_or(0, |serial| serial.saturating_sub(counts.serial).max(0));
            counts = counts.with(Counts { total, issued, used, serial }, i64::saturating_add);
        }
        counts.serial = first.map_or(counts.serial, |first| counts.serial.min(first - 1));
        let in_flight = counts.with(stored, i64::saturating_sub);
        Expected { coupon, counts: exists.then_some(counts), in_flight, per_user, unsettled }
    }
}

/// Works out what Redis had of the coupons at `n` of `epoch`, in the order asked for. `None` where that cannot be said: the epoch is over, or
/// Postgres does not have everything up to there. The rows of the ledger behind it must still be there.
pub async fn expected(
    connection: &mut PgConnection,
    partition: u32,
    coupons: &[String],
    epoch: u64,
    n: u64,
) -> Result<Option<Vec<Expected>>, Error> {
    let rows: Vec<ExpectedRow> = sqlx::query_as(EXPECTED)
        .bind(partition::id(partition))
        .bind(coupons)
        .bind(to_bigint(epoch))
        .bind(to_bigint(n))
        .fetch_all(connection)
        .await?;
    let is_known = rows.first().is_some_and(|row| from_bigint(row.0) == epoch && from_bigint(row.1) >= n);
    Ok(is_known.then(|| rows.into_iter().map(ExpectedRow::expected).collect()))
}

/// The order that a serial of a coupon was redeemed for, if it had one; `None` where it is not redeemed.
pub async fn used_for(connection: &mut PgConnection, coupon: &str, serial: i64) -> Result<Option<Option<String>>, Error> {
    let order = sqlx::query_scalar("SELECT order_id FROM holdfast.coupon_issue WHERE coupon_id = $1 AND serial = $2 AND state = 'used'");
    Ok(order.bind(coupon).bind(serial).fetch_optional(connection).await?)
}

/// Where, of these changes of a coupon's serial, each with the position at which it was answered, the serial has been redeemed since, and that
/// not taken back. A redemption that does again one that was handed over has that one's place.
pub(super) async fn redeemed_since(
    connection: &mut PgConnection,
    partition: u32,
    changes: &[(&str, i64, Position)],
) -> Result<HashSet<Position>, Error> {
    if changes.is_empty() {
        return Ok(HashSet::new());
    }
    let since: Vec<(i64, i64)> = sqlx::query_as(
        "SELECT DISTINCT c.epoch, c.n FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[]) AS c (coupon, serial, epoch, n) \
         JOIN holdfast.coupon_ledger l ON l.partition = $1 AND l.coupon_id = c.coupon AND l.serial = c.serial AND l.kind = 'use' \
         AND (l.epoch, l.n) > (c.epoch, c.n) AND (coalesce(l.origin_epoch, l.epoch), coalesce(l.origin_n, l.n)) > (c.epoch, c.n) \
         WHERE NOT EXISTS (SELECT 1 FROM holdfast.salvage s WHERE l.request_id IS NOT NULL AND s.partition = $1 \
         AND (s.origin_epoch, s.origin_n) < (c.epoch, c.n) \
         AND (l.request_id = 'hf-' || s.op || '-' || s.k OR position(' request=' || l.request_id || ' ' IN s.line) > 0)) \
         AND NOT EXISTS (SELECT 1 FROM holdfast.coupon_ledger b WHERE b.partition = $1 AND b.coupon_id = c.coupon AND b.serial = c.serial \
         AND b.kind = 'unuse' AND (b.epoch, b.n) > (c.epoch, c.n) AND (coalesce(b.origin_epoch, b.epoch), coalesce(b.origin_n, b.n)) \
         > (coalesce(l.origin_epoch, l.epoch), coalesce(l.origin_n, l.n)))",
    )
    .bind(partition::id(partition))
    .bind(changes.iter().map(|(coupon, ..)| *coupon).collect::<Vec<_>>())
    .bind(changes.iter().map(|(_, serial, _)| *serial).collect::<Vec<_>>())
    .bind(changes.iter().map(|(.., at)| to_bigint(at.epoch)).collect::<Vec<_>>())
    .bind(changes.iter().map(|(.., at)| to_bigint(at.n)).collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    Ok(since.into_iter().map(|(epoch, n)| Position::new(from_bigint(epoch), from_bigint(n))).collect())
}

/// The order, if it had one, that a serial of a coupon is redeemed for, where a change that was answered at `origin` may have seen that
/// redemption. `None` where the serial is not redeemed, or has been since.
pub async fn redeemed_before(
    connection: &mut PgConnection,
    partition: u32,
    coupon: &str,
    serial: i64,
    origin: Position,
) -> Result<Option<Option<String>>, Error> {
    let since = redeemed_since(connection, partition, &[(coupon, serial, origin)]).await?;
    if since.is_empty() { used_for(connection, coupon, serial).await } else { Ok(None) }
}

/// By how many more of a coupon are issued and used, counted user by user, than its own numbers say. Looks at all who ever had it.
pub async fn missing_in_counts(connection: &mut PgConnection, coupon: &str) -> Result<(i64, i64), Error> {
    let missing = sqlx::query_as(
        "SELECT i.issued - coalesce(c.issued, 0), i.used - coalesce(c.used, 0) \
         FROM (SELECT count(*) FILTER (WHERE state <> 'revoked') AS issued, count(*) FILTER (WHERE state = 'used') AS used \
         FROM holdfast.coupon_issue WHERE coupon_id = $1) AS i LEFT JOIN holdfast.coupon c ON c.coupon_id = $1",
    );
    Ok(missing.bind(coupon).fetch_one(connection).await?)
}

/// The coupons behind `after` that are not deleted, in the order of their ids, at most `limit`.
pub async fn page(connection: &mut PgConnection, after: &str, limit: usize) -> Result<Vec<String>, Error> {
    let coupons =
        sqlx::query_scalar("SELECT coupon_id FROM holdfast.coupon WHERE coupon_id > $1 AND state <> 'deleted' ORDER BY coupon_id LIMIT $2");
    Ok(coupons.bind(after).bind(i64::try_from(limit).unwrap_or(i64::MAX)).fetch_all(connection).await?)
}

/// The coupons that changed after a position, by the newest `limit` rows of the ledger at most.
pub async fn changed(connection: &mut PgConnection, partition: u32, after: Position, limit: i64) -> Result<Vec<String>, Error> {
    let coupons = sqlx::query_scalar(
        "SELECT DISTINCT l.coupon_id FROM (SELECT coupon_id FROM holdfast.coupon_ledger WHERE partition = $1 AND (epoch, n) > ($2, $3) \
         ORDER BY epoch DESC, n DESC LIMIT $4) AS l",
    );
    let coupons = coupons.bind(partition::id(partition)).bind(to_bigint(after.epoch)).bind(to_bigint(after.n)).bind(limit);
    Ok(coupons.fetch_all(connection).await?)
}

/// Those of the coupons that do not exist here, or are deleted.
pub async fn unknown(connection: &mut PgConnection, coupons: &[String]) -> Result<Vec<String>, Error> {
    let unknown = sqlx::query_scalar(
        "SELECT q FROM unnest($1::text[]) AS q \
         WHERE NOT EXISTS (SELECT 1 FROM holdfast.coupon c WHERE c.coupon_id = q AND c.state <> 'deleted')",
    );
    Ok(unknown.bind(coupons).fetch_all(connection).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::{database, execute};

    #[tokio::test]
    async fn what_redis_had_is_worked_out_from_what_came_later() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(
            connection,
            "SET holdfast.writer = 'holdfast';
             UPDATE holdfast.partition SET applied_epoch = 1, applied_n = 13;
             INSERT INTO holdfast.coupon (coupon_id, total, issued, used, per_user, last_serial, state)
             VALUES ('a', 20, 7, 2, 1, 9, 'active'), ('b', 5, 0, 0, 2, 0, 'active'), ('gone', 5, 1, 0, 1, 1, 'deleted');
             INSERT INTO holdfast.coupon_ledger (partition, epoch, n, op, k, coupon_id, kind, serial, remaining_after, issued_delta, used_delta,
             total_delta, at) VALUES (0, 1, 10, 'x', 0, 'a', 'issue', 7, 0, 1, 0, 0, now()), (0, 1, 11, 'x', 1, 'a', 'issue', 8, 0, 1, 0, 0, now()),
             (0, 1, 12, 'x', 2, 'a', 'alter', NULL, 0, 0, 0, 10, now()), (0, 1, 13, 'x', 3, 'b', 'create', NULL, 5, 0, 0, 5, now());
             INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, kind, delta, in_redis, reason, line)
             VALUES (0, 1, 8, 0, 'x', 4, 'coupon.issue', 0, true, '', '4 coupon.issue coupon=a user=u serial=6 remaining=0 |'),
             (0, 1, 8, 0, 'x', 5, 'coupon.issue', 0, false, '', '5 coupon.issue coupon=a user=w serial=5 remaining=0 |'),
             (0, 1, 8, 0, 'x', 6, 'coupon.issue', 0, true, '', '6 coupon.issue coupon=ab user=v serial=5 remaining=0 |'),
             (0, 1, 8, 0, 'x', 7, 'coupon.create', 0, true, '', '7 coupon.create coupon=parked total=5 peruser=1 |')",
        )
        .await;
        let coupons = ["a", "b", "gone", "nowhere"].map(str::to_owned);
        let rows = expected(connection, 0, &coupons, 1, 10).await.unwrap().unwrap();
        let row =
            |coupon: &str, counts, in_flight, unsettled| Expected { coupon: coupon.into(), counts, in_flight, per_user: 1, unsettled };
        let a = Counts { total: 10, issued: 7, used: 2, serial: 7 };
        let (none, b) = (Counts::default(), Counts { total: -5, ..Counts::default() });
        let in_flight = Counts { total: -10, issued: 0, used: 0, serial: -2 };
        assert_eq!(rows[0], row("a", Some(a), in_flight, false));
        assert_eq!(rows[1], Expected { per_user: 2, ..row("b", Some(none), b, true) });
        assert_eq!(rows[2..], [row("gone", None, none, false), row("nowhere", None, none, false)]);
        let parked = expected(connection, 0, &["parked".to_owned()], 1, 10).await.unwrap().unwrap();
        assert_eq!((parked[0].counts, parked[0].unsettled), (None, true), "only Redis has it, and that is known");
        assert_eq!(expected(connection, 0, &coupons, 1, 14).await.unwrap(), None, "not applied yet");
        assert_eq!(expected(connection, 0, &coupons, 2, 10).await.unwrap(), None, "another epoch");
        assert_eq!(page(connection, "", 9).await.unwrap(), ["a", "b"]);
        assert_eq!(page(connection, "a", 1).await.unwrap(), ["b"]);
        assert_eq!(unknown(connection, &coupons).await.unwrap(), ["gone", "nowhere"]);
        let mut changed = changed(connection, 0, Position::new(1, 11), 100).await.unwrap();
        changed.sort();
        assert_eq!(changed, ["a", "b"]);
    }

    #[tokio::test]
    async fn which_redemption_a_late_change_has_seen_is_told_by_its_place_or_by_what_was_handed_over() {
        let mut database = database().await;
        let connection = &mut database.connection;
        // The clock of the Redis in which they were redeemed since is behind.
        execute(
            connection,
            "INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at, used_at, order_id)
             SELECT 'c', n, 'u', 'used', now(), timestamptz 'epoch', nullif('o-' || n, 'o-2') FROM generate_series(1, 7) AS n;
             INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at) VALUES ('c', 8, 'u', 'issued', now());
             INSERT INTO holdfast.coupon_ledger (partition, epoch, n, op, k, coupon_id, kind, user_id, serial, remaining_after, request_id, at,
             origin_epoch, origin_n)
             SELECT 0, 2, n, 'j:coupon:1', n, 'c', kind, 'u', serial, 0, request, timestamptz 'epoch', 1, origin FROM (VALUES
             (20, 'use', 1, NULL, 7), (21, 'use', 2, NULL, 6), (22, 'use', 3, 'hf-i:coupon:1-0', NULL), (23, 'use', 4, 'r', NULL),
             (24, 'use', 5, 'hf-i:coupon:2-0', NULL), (25, 'use', 6, 'ours', NULL),
             (26, 'use', 7, NULL, NULL), (27, 'unuse', 7, NULL, NULL), (28, 'use', 7, 'hf-i:coupon:1-2', NULL), (29, 'use', 8, NULL, NULL))
             AS l (n, kind, serial, request, origin);
             UPDATE holdfast.coupon_ledger SET origin_epoch = NULL WHERE origin_n IS NULL;
             INSERT INTO holdfast.salvage (partition, op, k, origin_epoch, origin_n, line, at_ms, done) VALUES
             (0, 'i:coupon:1', 0, 1, 4, '0 coupon.use coupon=c user=u order=o-3 serial=3 remaining=0 |', 0, true),
             (0, 'i:coupon:1', 1, 1, 5, '1 coupon.use request=r digest=d coupon=c user=u order=o-4 serial=4 remaining=0 |', 0, true),
             (0, 'i:coupon:1', 2, 1, 6, '2 coupon.use coupon=c user=u order=o-7 serial=7 remaining=0 |', 0, true),
             (0, 'i:coupon:2', 0, 1, 9, '0 coupon.use coupon=c user=u order=o-5 serial=5 remaining=0 |', 0, true)",
        )
        .await;
        let mut found = Vec::new();
        for serial in 1..=9 {
            found.push(redeemed_before(connection, 0, "c", serial, Position::new(1, 8)).await.unwrap());
        }
        let order = |order: &str| Some(Some(order.to_owned()));
        assert_eq!(found, [order("o-1"), Some(None), order("o-3"), order("o-4"), None, None, order("o-7"), None, None]);
    }
}
