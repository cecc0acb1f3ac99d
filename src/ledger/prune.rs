//! Removes from Postgres what nobody asks for any more. The ledgers stay for ever.

use sqlx::PgConnection;

use super::Error;

/// Removes sidecars and settled hand-overs of more than a day ago, and differences of more than a month ago. What was handed over and is owed
/// stays as long as its dead letter, which may be retried.
pub async fn prune(connection: &mut PgConnection) -> Result<(), Error> {
    for old in [
        "DELETE FROM holdfast.sidecar WHERE lease_until < now() - interval '1 day'",
        "DELETE FROM holdfast.salvage s WHERE done AND at_ms < extract(epoch FROM now() - interval '1 day') * 1000 \
         AND NOT EXISTS (SELECT 1 FROM holdfast.dead_letter d WHERE d.op = s.op AND d.k = s.k)",
        "DELETE FROM holdfast.drift WHERE at < now() - interval '30 days'",
    ] {
        sqlx::query(old).execute(&mut *connection).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::{database, execute, number_of, rows};

    #[tokio::test]
    async fn only_what_is_old_and_settled_goes() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(
            connection,
            "INSERT INTO holdfast.sidecar (id, lease_until, window_ms) VALUES ('old', now() - interval '2 days', 1), ('new', now(), 1);
             INSERT INTO holdfast.salvage (partition, op, k, origin_epoch, origin_n, line, at_ms, done)
             VALUES (0, 'a', 0, 1, 1, '', 0, true), (0, 'b', 0, 1, 2, '', 0, false), (0, 'c', 0, 1, 3, '', extract(epoch FROM now()) * 1000, true),
             (0, 'd', 0, 1, 4, '', 0, true), (0, 'd', 1, 1, 5, '', 0, true);
             INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, kind, delta, in_redis, reason, line)
             VALUES (0, 1, 5, 0, 'd', 1, 'coupon.issue', 0, false, 'r', '');
             INSERT INTO holdfast.drift (at, partition, epoch, n, product_id, in_flight, drift, action)
             VALUES (now() - interval '31 days', 0, 1, 1, 'a', 0, 1, 'none'), (now(), 0, 1, 1, 'a', 0, 1, 'none')",
        )
        .await;
        prune(connection).await.unwrap();
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.sidecar").await, 1);
        let left: Vec<(String, i32)> = rows(connection, "SELECT op, k FROM holdfast.salvage ORDER BY op").await;
        assert_eq!(left, [("b".into(), 0), ("c".into(), 0), ("d".into(), 1)]);
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.drift").await, 1);
    }
}
