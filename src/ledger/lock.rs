//! What keeps the fencing tokens of locks growing, whatever becomes of Redis.

use sqlx::PgConnection;

use super::{Error, from_bigint, to_bigint};
use crate::domain::lock::Epoch;

/// Agrees on the epoch under which a node gives out tokens. `kept` is what that node holds, if it is known to have every token that was given
/// under it; then it stays, unless Postgres has another. Else it is raised above all that was ever used and above `seen`, the highest that the
/// node shows.
pub async fn agree(connection: &mut PgConnection, kept: Option<u64>, seen: u64) -> Result<Epoch, Error> {
    let raised: Option<(i64, String)> = sqlx::query_as(
        "UPDATE holdfast.lock SET epoch = greatest(epoch, $2) + 1 WHERE epoch IS DISTINCT FROM $1 RETURNING epoch, installation::text",
    )
    .bind(kept.map(to_bigint))
    .bind(to_bigint(seen))
    .fetch_optional(&mut *connection)
    .await?;
    let (number, installation) = match raised {
        Some(raised) => raised,
        None => sqlx::query_as("SELECT epoch, installation::text FROM holdfast.lock").fetch_one(connection).await?,
    };
    Ok(Epoch { number: from_bigint(number), installation })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::database;

    #[tokio::test]
    async fn an_epoch_stays_only_for_a_node_that_holds_it() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let first = agree(connection, None, 0).await.unwrap();
        assert_eq!(first.number, 1);
        assert_eq!(agree(connection, Some(1), 1).await.unwrap(), first);
        assert_eq!(agree(connection, None, 0).await.unwrap().number, 2, "a node that was emptied");
        assert_eq!(agree(connection, Some(1), 1).await.unwrap().number, 3, "a node of before");
        let higher = agree(connection, Some(9), 9).await.unwrap();
        assert_eq!((higher.number, &higher.installation), (10, &first.installation), "a Postgres of before");
    }
}
