//! Removes from Postgres what nobody asks for any more. The ledgers stay for ever.

use sqlx::PgConnection;

use super::Error;

/// Removes sidecars and settled hand-overs of more than a day ago, and differences of more than a month ago.
pub async fn prune(connection: &mut PgConnection) -> Result<(), Error> {
    for old in [
        "DELETE FROM holdfast.sidecar WHERE lease_until < now() - interval '1 day'",
        "DELETE FROM holdfast.salvage WHERE done AND at_ms < extract(epoch FROM now() - interval '1 day') * 1000",
        "DELETE FROM holdfast.drift WHERE at < now() - interval '30 days'",
    ] {
        sqlx::query(old).execute(&mut *connection).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::{database, execute, number_of};

    #[tokio::test]
    async fn only_what_is_old_and_settled_goes() {
        let mut database = database().await;
        let connection = &mut database.connection;
        execute(
            connection,
            "INSERT INTO holdfast.sidecar (id, lease_until, window_ms) VALUES ('old', now() - interval '2 days', 1), ('new', now(), 1);
             INSERT INTO holdfast.salvage (partition, op, k, origin_epoch, origin_n, line, at_ms, done)
             VALUES (0, 'a', 0, 1, 1, '', 0, true), (0, 'b', 0, 1, 2, '', 0, false), (0, 'c', 0, 1, 3, '', extract(epoch FROM now()) * 1000, true);
             INSERT INTO holdfast.drift (at, partition, epoch, n, product_id, in_flight, drift, action)
             VALUES (now() - interval '31 days', 0, 1, 1, 'a', 0, 1, 'none'), (now(), 0, 1, 1, 'a', 0, 1, 'none')",
        )
        .await;
        prune(connection).await.unwrap();
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.sidecar").await, 1);
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.salvage").await, 2);
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.drift").await, 1);
    }
}
