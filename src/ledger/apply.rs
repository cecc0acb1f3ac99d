//! Applies outbox entries to Postgres, once.

use sqlx::{Connection, PgConnection};

use super::changes::Changes;
use super::partition::{self, PartitionRow};
use super::{Error, to_bigint, write};
use crate::domain::Position;
use crate::domain::change::Entry;

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
    write::changes(connection, partition, &Changes::gather(new)?).await?;
    let mut reached = row.applied;
    for entry in new {
        if entry.last.epoch > reached.epoch {
            end_epochs(connection, partition, reached, entry.last.epoch).await?;
        }
        reached = entry.last;
    }
    sqlx::query("UPDATE holdfast.partition SET applied_epoch = $2, applied_n = $3, last_op = $4 WHERE id = $1")
        .bind(partition::id(partition))
        .bind(to_bigint(last.last.epoch))
        .bind(to_bigint(last.last.n))
        .bind(&last.op)
        .execute(connection)
        .await?;
    Ok(Applied { position: last.last, last_op: last.op.clone(), operations: last.last.n - row.applied.n })
}

/// Writes where the epochs from that of `reached` up to, not including, `next` have ended.
async fn end_epochs(connection: &mut PgConnection, partition: u32, reached: Position, next: u64) -> Result<(), Error> {
    sqlx::query(
        "UPDATE holdfast.partition_epoch SET last_n = $2 WHERE partition = $1 AND epoch >= $3 AND epoch < $4 AND last_n IS NULL",
    )
    .bind(partition::id(partition))
    .bind(to_bigint(reached.n))
    .bind(to_bigint(reached.epoch))
    .bind(to_bigint(next))
    .execute(connection)
    .await?;
    Ok(())
}

/// The entries that Postgres does not have yet, which is a tail of the run; checked that they continue, without a gap and in the same
/// history, what Postgres has. Errors with what was found instead.
pub fn continuation<'a>(row: &PartitionRow, entries: &'a [Entry]) -> Result<&'a [Entry], String> {
    let known = entries.iter().take_while(|entry| entry.last <= row.applied).count();
    let (known, new) = entries.split_at(known);
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
        return Err(format!("gap: after {at} the outbox goes on with n {first_n} (entry {last}); {} changes are missing", first_n - at.n - 1));
    }
    if first_n <= at.n {
        return Err(format!("fork: entry {last} starts again at n {first_n}, but everything up to {at} came before it"));
    }
    if entry.prev != op {
        return Err(format!("fork: entry {last} follows batch {}, but batch {op} stands at {at}", entry.prev));
    }
    Ok(())
}
