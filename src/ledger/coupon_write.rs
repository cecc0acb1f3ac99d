//! The statements of a batch's transaction that are about coupons, see [`write`](super::write).

use std::collections::BTreeMap;

use sqlx::{Connection, PgConnection};
use tracing::warn;

use super::changes::{Changes, CouponLine, Issue};
use super::write::Places;
use super::{Error, partition};
use crate::domain::change::{Effect, Operation};
use crate::domain::coupon::{CouponChange, CouponStep, Stepped};

/// Writes the rows of the ledger, and moves nothing.
pub(super) async fn ledger(connection: &mut PgConnection, partition: u32, lines: &[CouponLine<'_>]) -> Result<(), Error> {
    let places = Places::of(lines.iter().map(|line| line.place));
    let stepped = lines.iter().map(|line| if let CouponChange::Step(stepped) = line.change { Some(stepped) } else { None });
    let moved = |at: usize| lines.iter().map(|line| line.change.moves()[at]).collect::<Vec<_>>();
    let terms: Vec<[Option<i64>; 4]> = lines
        .iter()
        .map(|line| match line.change {
            CouponChange::Create(terms) => [Some(terms.total), Some(terms.per_user), terms.start_ms, terms.end_ms],
            CouponChange::Alter { terms, .. } => [terms.total, None, terms.start_ms, terms.end_ms],
            CouponChange::Delete | CouponChange::Step(_) | CouponChange::Mend { .. } => [None; 4],
        })
        .collect();
    let term = |i: usize| terms.iter().map(|terms| terms.get(i).copied().flatten()).collect::<Vec<_>>();
    sqlx::query(
        "INSERT INTO holdfast.coupon_ledger (partition, epoch, n, op, k, coupon_id, kind, user_id, serial, remaining_after, request_id, \
         request_digest, at, origin_epoch, origin_n, issued_delta, used_delta, total_delta, order_id, total, per_user, start_ms, end_ms, token) \
         SELECT $1, l.epoch, l.n, l.op, l.k, l.coupon, l.kind, l.user_id, l.serial, l.remaining, l.request, l.digest, \
         timestamptz 'epoch' + l.at_ms * interval '1 millisecond', l.origin_epoch, l.origin_n, l.issued, l.used, l.moved, l.order_id, \
         l.total, l.per_user, l.start_ms, l.end_ms, l.token \
         FROM (SELECT unnest($2::bigint[]) AS epoch, unnest($3::bigint[]) AS n, unnest($4::text[]) AS op, unnest($5::int[]) AS k, \
         unnest($6::text[]) AS coupon, unnest($7::text[]) AS kind, unnest($8::text[]) AS user_id, unnest($9::bigint[]) AS serial, \
         unnest($10::bigint[]) AS remaining, unnest($11::text[]) AS request, unnest($12::text[]) AS digest, unnest($13::bigint[]) AS \
         at_ms, unnest($14::bigint[]) AS origin_epoch, unnest($15::bigint[]) AS origin_n, unnest($16::bigint[]) AS issued, \
         unnest($17::bigint[]) AS used, unnest($18::bigint[]) AS moved, unnest($19::text[]) AS order_id, unnest($20::bigint[]) AS \
         total, unnest($21::bigint[]) AS per_user, unnest($22::bigint[]) AS start_ms, unnest($23::bigint[]) AS end_ms, \
         unnest($24::bigint[]) AS token) AS l",
    )
    .bind(partition::id(partition))
    .bind(places.epoch)
    .bind(places.n)
    .bind(places.op)
    .bind(places.k)
    .bind(lines.iter().map(|line| line.coupon).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.change.kind()).collect::<Vec<_>>())
    .bind(stepped.clone().map(|one| one.map(|one| one.user.as_str())).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.change.told_serial()).collect::<Vec<_>>())
    .bind(lines.iter().map(|line| line.change.remaining()).collect::<Vec<_>>())
    .bind(places.request)
    .bind(places.digest)
    .bind(places.at_ms)
    .bind(places.origin_epoch)
    .bind(places.origin_n)
    .bind(moved(1))
    .bind(moved(2))
    .bind(lines.iter().map(|line| line.total_delta).collect::<Vec<_>>())
    .bind(stepped.clone().map(|one: Option<&Stepped>| one.and_then(|one| one.order.as_deref())).collect::<Vec<_>>())
    .bind(term(0))
    .bind(term(1))
    .bind(term(2))
    .bind(term(3))
    .bind(stepped.map(|one| one.and_then(|one| one.token)).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes everything but the ledger. Errors with [`Error::Data`] where Postgres does not have what moves as it has to be.
pub(super) async fn moves(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    create(connection, changes).await?;
    move_coupons(connection, changes).await?;
    issue(connection, changes).await?;
    step(connection, changes).await
}

/// Keeps the serials of these issues, which are owed or passed over, from being given out again. Of anything else nothing happens.
pub(super) async fn keep_serials<'a>(connection: &mut PgConnection, operations: impl Iterator<Item = &'a Operation>) -> Result<(), Error> {
    let mut highest: BTreeMap<&str, i64> = BTreeMap::new();
    for operation in operations {
        if let Effect::Coupon { coupon, change: CouponChange::Step(Stepped { step: CouponStep::Issue, serial, .. }) } = &operation.effect {
            highest.entry(coupon).and_modify(|known| *known = (*known).max(*serial)).or_insert(*serial);
        }
    }
    keep_highest(connection, highest).await
}

/// The same of the highest serials of these coupons.
pub(super) async fn keep_highest(connection: &mut PgConnection, highest: BTreeMap<&str, i64>) -> Result<(), Error> {
    if highest.is_empty() {
        return Ok(());
    }
    let (coupons, serials): (Vec<&str>, Vec<i64>) = highest.into_iter().unzip();
    if keep(connection, &coupons, &serials).await?.is_none() {
        return Ok(());
    }
    // A coupon's row may be such that no update of it is taken at all.
    for (coupon, serial) in coupons.into_iter().zip(serials) {
        if let Some(error) = keep(connection, &[coupon], &[serial]).await? {
            warn!(coupon, serial, error, "postgres does not take the highest serial of a coupon: this one may be given out again");
        }
    }
    Ok(())
}

/// Returns why Postgres refuses one of them for its data; then none is kept.
async fn keep(connection: &mut PgConnection, coupons: &[&str], serials: &[i64]) -> Result<Option<String>, Error> {
    let mut savepoint = connection.begin().await?;
    let keep = sqlx::query(
        "UPDATE holdfast.coupon c SET last_serial = m.serial FROM unnest($1::text[], $2::bigint[]) AS m (coupon, serial) \
         WHERE c.coupon_id = m.coupon AND c.last_serial < m.serial",
    );
    match keep.bind(coupons).bind(serials).execute(&mut *savepoint).await.map_err(Error::from) {
        Ok(_) => savepoint.commit().await.map(|()| None).map_err(Error::from),
        Err(Error::Data(error)) => savepoint.rollback().await.map(|()| Some(error)).map_err(Error::from),
        Err(error) => Err(error),
    }
}

/// The same of all that were issued of a coupon before Postgres had it.
pub(super) async fn keep_serials_of(connection: &mut PgConnection, coupon: &str) -> Result<(), Error> {
    let keep = sqlx::query(
        "UPDATE holdfast.coupon c SET last_serial = l.serial \
         FROM (SELECT max(serial) AS serial FROM holdfast.coupon_ledger WHERE coupon_id = $1 AND kind = 'issue') AS l \
         WHERE c.coupon_id = $1 AND c.last_serial < l.serial",
    );
    keep.bind(coupon).execute(connection).await?;
    Ok(())
}

async fn create(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    if changes.created.is_empty() {
        return Ok(());
    }
    let created = &changes.created;
    sqlx::query(
        "INSERT INTO holdfast.coupon (coupon_id, total, per_user, start_ms, end_ms) \
         SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[])",
    )
    .bind(created.iter().map(|(coupon, _)| *coupon).collect::<Vec<_>>())
    .bind(created.iter().map(|(_, terms)| terms.total).collect::<Vec<_>>())
    .bind(created.iter().map(|(_, terms)| terms.per_user).collect::<Vec<_>>())
    .bind(created.iter().map(|(_, terms)| terms.start_ms).collect::<Vec<_>>())
    .bind(created.iter().map(|(_, terms)| terms.end_ms).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

async fn move_coupons(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    let coupons: Vec<_> = changes.coupons.keys().copied().collect();
    if coupons.is_empty() {
        return Ok(());
    }
    if let Some((coupon, _)) = changes.coupons.iter().find(|(_, moved)| moved.is_overtaken) {
        return Err(Error::Data(format!("coupon '{coupon}' was issued under a fencing token that is older than one before it")));
    }
    let moved = || changes.coupons.values();
    let token = |which: fn((i64, i64)) -> i64| moved().map(|moved| moved.tokens.map(which)).collect::<Vec<_>>();
    let rows = sqlx::query(
        "UPDATE holdfast.coupon AS c SET issued = c.issued + m.issued, used = c.used + m.used, \
         last_serial = greatest(c.last_serial + m.serial_by, m.last_serial), total = coalesce(m.total, c.total) + m.total_by, \
         start_ms = nullif(coalesce(m.start_ms, c.start_ms), 0), end_ms = nullif(coalesce(m.end_ms, c.end_ms), 0), \
         state = CASE WHEN m.deleted THEN 'deleted' ELSE c.state END, last_token = greatest(c.last_token, m.highest) \
         FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bool[], \
         $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[]) \
         AS m (coupon, issued, used, last_serial, total, start_ms, end_ms, deleted, lowest, highest, total_by, serial_by) \
         WHERE c.coupon_id = m.coupon AND (m.lowest IS NULL OR m.lowest >= c.last_token)",
    )
    .bind(&coupons)
    .bind(moved().map(|moved| moved.issued).collect::<Vec<_>>())
    .bind(moved().map(|moved| moved.used).collect::<Vec<_>>())
    .bind(moved().map(|moved| moved.last_serial).collect::<Vec<_>>())
    .bind(moved().map(|moved| moved.terms.total).collect::<Vec<_>>())
    .bind(moved().map(|moved| moved.terms.start_ms).collect::<Vec<_>>())
    .bind(moved().map(|moved| moved.terms.end_ms).collect::<Vec<_>>())
    .bind(moved().map(|moved| moved.deleted).collect::<Vec<_>>())
    .bind(token(|(lowest, _)| lowest))
    .bind(token(|(_, highest)| highest))
    .bind(moved().map(|moved| moved.total_by).collect::<Vec<_>>())
    .bind(moved().map(|moved| moved.serial_by).collect::<Vec<_>>())
    .execute(&mut *connection)
    .await?
    .rows_affected();
    if rows == coupons.len() as u64 {
        return Ok(());
    }
    let unknown = sqlx::query_scalar(
        "SELECT c FROM unnest($1::text[]) AS c WHERE NOT EXISTS (SELECT 1 FROM holdfast.coupon k WHERE k.coupon_id = c) ORDER BY c LIMIT 5",
    );
    let unknown: Vec<String> = unknown.bind(coupons).fetch_all(connection).await?;
    if unknown.is_empty() {
        let of = changes.coupons.iter().filter(|(_, moved)| moved.tokens.is_some()).take(5).map(|(coupon, _)| *coupon).collect::<Vec<_>>();
        return Err(Error::Data(format!("issued under a fencing token that is older than the newest: of one of {}", of.join(", "))));
    }
    Err(Error::Data(format!("Redis has coupons that holdfast.coupon does not have: {}", unknown.join(", "))))
}

/// What is written of some rows of `coupon_issue`. A state has its time, and only what is redeemed has an order.
struct Rows<'a> {
    coupon: Vec<&'a str>,
    serial: Vec<i64>,
    user: Vec<&'a str>,
    state: Vec<&'static str>,
    at_ms: Vec<i64>,
    order: Vec<Option<&'a str>>,
}

impl<'a> Rows<'a> {
    fn of(issues: &[(&(&'a str, i64), &Issue<'a>)]) -> Self {
        Self {
            coupon: issues.iter().map(|((coupon, _), _)| *coupon).collect(),
            serial: issues.iter().map(|((_, serial), _)| *serial).collect(),
            user: issues.iter().map(|(_, issue)| issue.user).collect(),
            state: issues.iter().map(|(_, issue)| issue.last.to()).collect(),
            at_ms: issues.iter().map(|(_, issue)| issue.at_ms).collect(),
            order: issues.iter().map(|(_, issue)| issue.order).collect(),
        }
    }
}

/// Those that were issued within the run, as they are at its end.
async fn issue(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    let issued: Vec<_> = changes.issues.iter().filter(|(_, issue)| issue.issued_ms.is_some()).collect();
    if issued.is_empty() {
        return Ok(());
    }
    let rows = Rows::of(&issued);
    sqlx::query(
        "INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at, used_at, revoked_at, order_id) \
         SELECT i.coupon, i.serial, i.user_id, i.state, timestamptz 'epoch' + i.issued_ms * interval '1 millisecond', \
         CASE WHEN i.state = 'used' THEN timestamptz 'epoch' + i.at_ms * interval '1 millisecond' END, \
         CASE WHEN i.state = 'revoked' THEN timestamptz 'epoch' + i.at_ms * interval '1 millisecond' END, \
         CASE WHEN i.state = 'used' THEN i.order_id END \
         FROM (SELECT unnest($1::text[]) AS coupon, unnest($2::bigint[]) AS serial, unnest($3::text[]) AS user_id, unnest($4::text[]) \
         AS state, unnest($5::bigint[]) AS at_ms, unnest($6::text[]) AS order_id, unnest($7::bigint[]) AS issued_ms) AS i",
    )
    .bind(rows.coupon)
    .bind(rows.serial)
    .bind(rows.user)
    .bind(rows.state)
    .bind(rows.at_ms)
    .bind(rows.order)
    .bind(issued.iter().map(|(_, issue)| issue.issued_ms).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Those that were issued before: they have to be in the state that their first step begins in.
async fn step(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), Error> {
    let stepped: Vec<_> = changes.issues.iter().filter(|(_, issue)| issue.issued_ms.is_none()).collect();
    if stepped.is_empty() {
        return Ok(());
    }
    let rows = Rows::of(&stepped);
    let moved = sqlx::query(
        "UPDATE holdfast.coupon_issue AS i SET state = m.state, \
         used_at = CASE WHEN m.state = 'used' THEN timestamptz 'epoch' + m.at_ms * interval '1 millisecond' END, \
         revoked_at = CASE WHEN m.state = 'revoked' THEN timestamptz 'epoch' + m.at_ms * interval '1 millisecond' END, \
         order_id = CASE WHEN m.state = 'used' THEN m.order_id END \
         FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[]) \
         AS m (coupon, serial, user_id, state, at_ms, order_id, state_before) \
         WHERE i.coupon_id = m.coupon AND i.serial = m.serial AND i.user_id = m.user_id AND i.state = m.state_before",
    )
    .bind(rows.coupon)
    .bind(rows.serial)
    .bind(rows.user)
    .bind(rows.state)
    .bind(rows.at_ms)
    .bind(rows.order)
    .bind(stepped.iter().map(|(_, issue)| issue.first.from()).collect::<Vec<_>>())
    .execute(connection)
    .await?
    .rows_affected();
    if moved == stepped.len() as u64 {
        return Ok(());
    }
    let names: Vec<_> = stepped.iter().take(5).map(|((coupon, serial), _)| format!("{coupon} {serial}")).collect();
    Err(Error::Data(format!("holdfast.coupon_issue does not have one of these in the state that Redis had it in: {}", names.join(", "))))
}
