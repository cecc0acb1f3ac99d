//! Keeps what the reconciler found, and which of several sidecars reconciles.

use sqlx::PgConnection;

use super::stock::At;
use super::{Error, partition, to_bigint};
use crate::domain::{Drift, Remedy};

/// The first key of the advisory lock; the second is the partition.
const LOCK: i32 = 0x484f_4c44;

/// Takes the lock of the one who reconciles a partition, for as long as this connection lives. `false` where another session has it.
pub async fn try_lock(connection: &mut PgConnection, partition: u32) -> Result<bool, Error> {
    let locked = sqlx::query_scalar("SELECT pg_try_advisory_lock($1, $2)").bind(LOCK).bind(partition::id(partition));
    Ok(locked.fetch_one(connection).await?)
}

/// Writes down what was found at a place. What was only reported is written down once, and again when it has become another difference.
pub async fn record(connection: &mut PgConnection, partition: u32, at: At, drifts: &[Drift]) -> Result<(), Error> {
    if drifts.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO holdfast.drift (partition, epoch, n, product_id, redis, postgres, in_flight, drift, action, measure) \
         SELECT $1, $2, $3, f.product, f.redis, f.postgres, f.in_flight, f.drift, f.action, f.measure \
         FROM unnest($4::text[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[], $9::text[], $10::text[]) \
         AS f (product, redis, postgres, in_flight, drift, action, measure) \
         WHERE f.action <> $11 OR f.drift IS DISTINCT FROM \
         (SELECT d.drift FROM holdfast.drift d WHERE d.product_id = f.product AND d.measure = f.measure ORDER BY d.at DESC, d.id DESC LIMIT 1)",
    )
    .bind(partition::id(partition))
    .bind(to_bigint(at.epoch))
    .bind(to_bigint(at.n))
    .bind(drifts.iter().map(|drift| drift.product.as_str()).collect::<Vec<_>>())
    .bind(drifts.iter().map(|drift| drift.redis).collect::<Vec<_>>())
    .bind(drifts.iter().map(|drift| drift.postgres).collect::<Vec<_>>())
    .bind(drifts.iter().map(|drift| drift.in_flight).collect::<Vec<_>>())
    .bind(drifts.iter().map(Drift::units).collect::<Vec<_>>())
    .bind(drifts.iter().map(|drift| drift.remedy.as_str()).collect::<Vec<_>>())
    .bind(drifts.iter().map(|drift| drift.measure.as_str()).collect::<Vec<_>>())
    .bind(Remedy::None.as_str())
    .execute(connection)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{InboxMark, Measure};
    use crate::ledger::connect;
    use crate::ledger::testing::{database, rows};

    #[tokio::test]
    async fn what_is_only_reported_is_written_down_once() {
        let mut database = database().await;
        let at = At { epoch: 1, n: 5, mark: InboxMark::default() };
        let found = |redis, remedy| Drift {
            product: "a".into(),
            measure: Measure::Available,
            redis: Some(redis),
            postgres: Some(7),
            in_flight: 0,
            remedy,
        };
        for drift in [found(9, Remedy::Frozen), found(9, Remedy::None), found(9, Remedy::None), found(8, Remedy::None)] {
            record(&mut database.connection, 0, at, &[drift]).await.unwrap();
        }
        let rows: Vec<(i64, String)> = rows(&mut database.connection, "SELECT drift, action FROM holdfast.drift ORDER BY id").await;
        assert_eq!(rows, [(2, "frozen".into()), (1, "none".into())]);
    }

    #[tokio::test]
    async fn one_session_has_the_lock_while_it_lives() {
        let mut database = database().await;
        let mut other = connect(&database.url).await.unwrap();
        assert!(try_lock(&mut database.connection, 0).await.unwrap());
        assert!(!try_lock(&mut other, 0).await.unwrap());
        assert!(try_lock(&mut other, 1).await.unwrap(), "another partition");
    }
}
