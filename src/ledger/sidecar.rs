//! The sidecars that run.

use std::time::Duration;

use sqlx::PgConnection;

use super::Error;
use crate::limits::{SIDECAR_KEEP, SIDECAR_LEASE};

fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Says that this sidecar runs. Returns the `window_ms` of another one that runs with a different one, which must not be.
pub async fn renew(connection: &mut PgConnection, id: &str, window_ms: i64) -> Result<Option<i64>, Error> {
    let other = sqlx::query_scalar(
        "WITH me AS (INSERT INTO holdfast.sidecar (id, lease_until, window_ms) VALUES ($1, now() + $3 * interval '1 millisecond', $2) \
         ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until) \
         SELECT window_ms FROM holdfast.sidecar WHERE id <> $1 AND lease_until > now() AND window_ms <> $2 ORDER BY started_at LIMIT 1",
    );
    Ok(other.bind(id).bind(window_ms).bind(ms(SIDECAR_LEASE)).fetch_optional(connection).await?)
}

/// This sidecar stops.
pub async fn leave(connection: &mut PgConnection, id: &str) -> Result<(), Error> {
    sqlx::query("UPDATE holdfast.sidecar SET lease_until = now() WHERE id = $1").bind(id).execute(connection).await?;
    Ok(())
}

/// Which of these sidecars have not been heard of for so long that nothing of theirs is on its way any more.
pub async fn gone(connection: &mut PgConnection, ids: &[String]) -> Result<Vec<String>, Error> {
    let gone = sqlx::query_scalar(
        "SELECT i FROM unnest($1::text[]) AS a (i) WHERE NOT EXISTS \
         (SELECT 1 FROM holdfast.sidecar s WHERE s.id = i AND s.lease_until > now() - $2 * interval '1 millisecond')",
    );
    Ok(gone.bind(ids).bind(ms(SIDECAR_KEEP)).fetch_all(connection).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::{database, execute};

    #[tokio::test]
    async fn a_sidecar_runs_until_its_lease_has_passed() {
        let mut database = database().await;
        let connection = &mut database.connection;
        assert_eq!(renew(connection, "a", 600_000).await.unwrap(), None);
        assert_eq!(renew(connection, "a", 600_000).await.unwrap(), None);
        assert_eq!(renew(connection, "b", 60_000).await.unwrap(), Some(600_000), "they would forget each other's REQUESTs");
        let ids = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        assert_eq!(gone(connection, &ids).await.unwrap(), ["c"]);
        leave(connection, "a").await.unwrap();
        assert_eq!(renew(connection, "b", 60_000).await.unwrap(), None);
        assert_eq!(gone(connection, &ids).await.unwrap(), ["c"], "something of it may be on its way");
        execute(connection, "UPDATE holdfast.sidecar SET lease_until = now() - interval '11 minutes' WHERE id = 'a'").await;
        assert_eq!(gone(connection, &ids).await.unwrap(), ["a", "c"]);
    }
}
