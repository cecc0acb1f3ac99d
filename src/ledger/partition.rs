//! The row that says who may write to a partition and how far it has been applied.

use sqlx::PgConnection;

use super::{Error, from_bigint, to_bigint};
use crate::domain::{InboxMark, Position};
use crate::limits::REBUILD_LEASE;

/// The op that stands for "none yet", in the first entry's `prev` and in a new row.
pub const NO_OP: &str = "-";

/// A row of `holdfast.partition`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionRow {
    /// Who may write: changes under a later epoch do not exist.
    pub epoch: u64,
    /// Everything up to here is in Postgres.
    pub applied: Position,
    /// The op of the entry that was applied last; [`NO_OP`] before the first.
    pub last_op: String,
    /// The sidecar that fills Redis, or was when it died.
    pub owner: Option<String>,
}

type Columns = (i64, i64, i64, String, Option<String>);

impl PartitionRow {
    fn from_columns((epoch, applied_epoch, applied_n, last_op, owner): Columns) -> Self {
        Self { epoch: from_bigint(epoch), applied: Position::new(from_bigint(applied_epoch), from_bigint(applied_n)), last_op, owner }
    }
}

/// Reads a partition's row. A partition that was never seen gets one: epoch 0, nothing applied.
pub async fn load(connection: &mut PgConnection, partition: u32) -> Result<PartitionRow, Error> {
    loop {
        let row = sqlx::query_as("SELECT epoch, applied_epoch, applied_n, last_op, owner FROM holdfast.partition WHERE id = $1")
            .bind(id(partition))
            .fetch_optional(&mut *connection)
            .await?;
        if let Some(columns) = row {
            return Ok(PartitionRow::from_columns(columns));
        }
        sqlx::query(
            "INSERT INTO holdfast.partition (id, epoch, applied_epoch, applied_n, last_op) VALUES ($1, 0, 0, 0, $2) ON CONFLICT DO NOTHING",
        )
        .bind(id(partition))
        .bind(NO_OP)
        .execute(&mut *connection)
        .await?;
    }
}

/// Moves a partition's row to what the transaction has applied; `mark` where the inbox has come further, too.
pub(super) async fn advance(
    connection: &mut PgConnection,
    partition: u32,
    applied: Position,
    last_op: &str,
    mark: Option<InboxMark>,
) -> Result<(), Error> {
    sqlx::query(
        "UPDATE holdfast.partition SET applied_epoch = $2, applied_n = $3, last_op = $4, inbox_xid = coalesce($5, inbox_xid), \
         inbox_id = coalesce($6, inbox_id) WHERE id = $1",
    )
    .bind(id(partition))
    .bind(to_bigint(applied.epoch))
    .bind(to_bigint(applied.n))
    .bind(last_op)
    .bind(mark.map(|mark| to_bigint(mark.xid)))
    .bind(mark.map(|mark| to_bigint(mark.id)))
    .execute(connection)
    .await?;
    Ok(())
}

/// Reads and locks a partition's row until the transaction ends, in which what Holdfast itself writes is no news to the inbox. `None` where
/// there is no such row.
pub(super) async fn lock(connection: &mut PgConnection, partition: u32) -> Result<Option<PartitionRow>, Error> {
    let row: Option<Columns> = sqlx::query_as(
        "SELECT epoch, applied_epoch, applied_n, last_op, nullif(set_config('holdfast.writer', 'holdfast', true), 'holdfast') \
         FROM holdfast.partition WHERE id = $1 FOR UPDATE",
    )
    .bind(id(partition))
    .fetch_optional(connection)
    .await?;
    Ok(row.map(PartitionRow::from_columns))
}

/// Up to where Redis has the inbox, as far as the outbox has been applied.
pub(super) async fn mark(connection: &mut PgConnection, partition: u32) -> Result<InboxMark, Error> {
    let mark = sqlx::query_as("SELECT inbox_xid, inbox_id FROM holdfast.partition WHERE id = $1").bind(id(partition));
    let (xid, id): (i64, i64) = mark.fetch_one(connection).await?;
    Ok(InboxMark { xid: from_bigint(xid), id: from_bigint(id) })
}

/// Takes the epoch after that of `seen` for the Redis process `run_id`, whose newest change is `n`, and returns it; `None` where somebody else
/// was faster and the row is no longer as seen, or fills Redis. Of several that try, one succeeds.
pub async fn take_epoch(
    connection: &mut PgConnection,
    partition: u32,
    seen: &PartitionRow,
    run_id: &str,
    n: u64,
) -> Result<Option<u64>, Error> {
    take(connection, partition, seen, seen.epoch + 1, run_id, None, Some(n)).await
}

/// Takes the epoch `to` as [`take_epoch`] does, to fill Redis under it: for [`REBUILD_LEASE`] nobody but `owner` may take another.
pub async fn take_epoch_to_rebuild(
    connection: &mut PgConnection,
    partition: u32,
    seen: &PartitionRow,
    to: u64,
    run_id: &str,
    owner: &str,
) -> Result<Option<u64>, Error> {
    take(connection, partition, seen, to, run_id, Some(owner), None).await
}

async fn take(
    connection: &mut PgConnection,
    partition: u32,
    seen: &PartitionRow,
    to: u64,
    run_id: &str,
    owner: Option<&str>,
    after_n: Option<u64>,
) -> Result<Option<u64>, Error> {
    let epoch: Option<i64> = sqlx::query_scalar(
        "WITH taken AS (UPDATE holdfast.partition SET epoch = $3, owner = $5, \
         lease_until = CASE WHEN $5::text IS NULL THEN NULL ELSE now() + $6 * interval '1 millisecond' END \
         WHERE id = $1 AND epoch = $2 AND owner IS NOT DISTINCT FROM $7 \
         AND (lease_until IS NULL OR lease_until < now() OR owner = $5) RETURNING id, epoch), \
         numbered AS (INSERT INTO holdfast.partition_epoch (partition, epoch, run_id, after_n) \
         SELECT id, e, $4, CASE WHEN e = epoch THEN $8 END FROM taken, generate_series($2 + 1, epoch) AS e) \
         SELECT epoch FROM taken",
    )
    .bind(id(partition))
    .bind(to_bigint(seen.epoch))
    .bind(to_bigint(to))
    .bind(run_id)
    .bind(owner)
    .bind(lease_ms())
    .bind(&seen.owner)
    .bind(after_n.map(to_bigint))
    .fetch_optional(connection)
    .await?;
    Ok(epoch.map(from_bigint))
}

fn lease_ms() -> i64 {
    i64::try_from(REBUILD_LEASE.as_millis()).unwrap_or(i64::MAX)
}

/// Goes on holding the right to fill Redis. `false` where it was lost.
pub async fn renew_rebuild(connection: &mut PgConnection, partition: u32, epoch: u64, owner: &str) -> Result<bool, Error> {
    let renewed = sqlx::query(
        "UPDATE holdfast.partition SET lease_until = now() + $4 * interval '1 millisecond' WHERE id = $1 AND epoch = $2 AND owner = $3",
    )
    .bind(id(partition))
    .bind(to_bigint(epoch))
    .bind(owner)
    .bind(lease_ms())
    .execute(connection)
    .await?;
    Ok(renewed.rows_affected() == 1)
}

/// Redis has been filled under `epoch`, and may be opened. `false` where the right to fill it was lost.
pub async fn finish_rebuild(connection: &mut PgConnection, partition: u32, epoch: u64, owner: &str) -> Result<bool, Error> {
    let finished =
        sqlx::query("UPDATE holdfast.partition SET owner = NULL, lease_until = NULL WHERE id = $1 AND epoch = $2 AND owner = $3")
            .bind(id(partition))
            .bind(to_bigint(epoch))
            .bind(owner)
            .execute(connection)
            .await?;
    Ok(finished.rows_affected() == 1)
}

/// Lets go of an epoch that was taken to fill Redis, where that turned out not to be needed: Redis goes on under it after `n`. `false` where
/// it was lost.
pub async fn let_go(connection: &mut PgConnection, partition: u32, epoch: u64, owner: &str, n: u64) -> Result<bool, Error> {
    let gone = sqlx::query(
        "WITH gone AS (UPDATE holdfast.partition SET owner = NULL, lease_until = NULL WHERE id = $1 AND epoch = $2 AND owner = $3 RETURNING id) \
         UPDATE holdfast.partition_epoch e SET after_n = $4 FROM gone WHERE e.partition = gone.id AND e.epoch = $2",
    )
    .bind(id(partition))
    .bind(to_bigint(epoch))
    .bind(owner)
    .bind(to_bigint(n))
    .execute(connection)
    .await?;
    Ok(gone.rows_affected() == 1)
}

/// The newest n that an entry of `epoch` may have: where the epochs behind it began.
pub(super) async fn newest_of_epoch(connection: &mut PgConnection, partition: u32, epoch: u64) -> Result<Option<u64>, Error> {
    let newest: Option<i64> = sqlx::query_scalar("SELECT min(after_n) FROM holdfast.partition_epoch WHERE partition = $1 AND epoch > $2")
        .bind(id(partition))
        .bind(to_bigint(epoch))
        .fetch_one(connection)
        .await?;
    Ok(newest.map(from_bigint))
}

/// Whether the partition's place in the inbox was made by another Postgres: transactions here have lower numbers than it.
pub async fn is_mark_of_another_server(connection: &mut PgConnection, partition: u32) -> Result<bool, Error> {
    let is = sqlx::query_scalar(
        "SELECT coalesce(bool_or(inbox_xid >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint), false) \
         FROM holdfast.partition WHERE id = $1",
    );
    Ok(is.bind(id(partition)).fetch_one(connection).await?)
}

/// What other programs changed counts as told: Redis is about to be filled with it.
pub(super) async fn give_up_inbox(connection: &mut PgConnection, partition: u32) -> Result<(), Error> {
    sqlx::query("WITH inbox AS (DELETE FROM holdfast.inbox) UPDATE holdfast.partition SET inbox_xid = 0, inbox_id = 0 WHERE id = $1")
        .bind(id(partition))
        .execute(connection)
        .await?;
    Ok(())
}

/// A row of `holdfast.partition_epoch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpochRow {
    pub epoch: u64,
    /// The Redis process it was taken for.
    pub run_id: String,
    /// n of the last change applied under it; `None` while it goes on.
    pub last_n: Option<u64>,
}

/// Reads every epoch of a partition, oldest first.
pub async fn epochs(connection: &mut PgConnection, partition: u32) -> Result<Vec<EpochRow>, Error> {
    let rows: Vec<(i64, String, Option<i64>)> =
        sqlx::query_as("SELECT epoch, run_id, last_n FROM holdfast.partition_epoch WHERE partition = $1 ORDER BY epoch")
            .bind(id(partition))
            .fetch_all(connection)
            .await?;
    let row = |(epoch, run_id, last_n): (i64, String, Option<i64>)| EpochRow {
        epoch: from_bigint(epoch),
        run_id,
        last_n: last_n.map(from_bigint),
    };
    Ok(rows.into_iter().map(row).collect())
}

/// A partition's number as Postgres stores it: at most a few thousand.
pub(super) fn id(partition: u32) -> i32 {
    i32::try_from(partition).unwrap_or(i32::MAX)
}
