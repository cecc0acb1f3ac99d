//! Removes what nobody asks for any more: from Redis the lanes of sidecars that have ended, past windows of REQUEST ids and deletions of long ago,
//! from Postgres what is old and settled.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::ledger;
use crate::limits::{DELETED_KEPT, SWEEP_DELETED_GOES, SWEEP_EVERY};
use crate::store::partition::State;
use crate::store::{Connection, Partition, keys, sweep};

/// The cursor at which a walk through deletions begins, and that it ends with.
const FIRST: &str = "0";

/// See the module. Any number of sidecars may do it.
pub struct Sweeper {
    pub partition: Arc<Partition>,
    pub redis_url: String,
    pub postgres_url: String,
    /// How long a REQUEST id is remembered.
    pub window_ms: i64,
}

impl Sweeper {
    /// Sweeps now and then until `cancel`.
    pub async fn run(self, cancel: CancellationToken) {
        let (mut before, mut applied) = (BTreeMap::new(), 0);
        let (mut deletions_from, mut unfrozen_from) = (FIRST.to_owned(), FIRST.to_owned());
        while cancel.run_until_cancelled(tokio::time::sleep(SWEEP_EVERY)).await.is_some() {
            if !matches!(*self.partition.state.borrow(), State::Live { .. }) {
                continue;
            }
            let sweeping = async {
                let swept = self.sweep(&mut before).await?;
                // What Postgres had at the sweep before is known to whoever asks it now.
                let known = std::mem::replace(&mut applied, self.partition.applied.borrow().n);
                let deletions = self.forget_deleted(known, &mut deletions_from, SWEEP_DELETED_GOES).await?;
                self.forget_unfrozen(known, &mut unfrozen_from).await?;
                Ok::<_, String>((swept, deletions))
            };
            match tokio::time::timeout(SWEEP_EVERY, sweeping).await {
                Ok(Ok(((lanes, buckets), deletions))) => debug!(partition = self.partition.id, lanes, buckets, deletions, "swept"),
                Ok(Err(error)) => warn!(partition = self.partition.id, error, "could not sweep, trying again in a minute"),
                Err(_) => warn!(partition = self.partition.id, "sweeping took too long, trying again"),
            }
        }
    }

    /// Has Redis forget the deletions up to n that are as long ago in Postgres as they need to be known: of those that a number of goes come
    /// by, from `cursor` on, which is where the next sweep goes on.
    async fn forget_deleted(&self, n: u64, cursor: &mut String, goes: usize) -> Result<u64, String> {
        let mut redis = Connection::open(&self.redis_url).await.map_err(|error| error.to_string())?;
        let mut postgres = ledger::connect(&self.postgres_url).await.map_err(|error| error.to_string())?;
        let mut forgotten = 0;
        for _ in 0..goes {
            let (next, mut deleted) = sweep::noted(&mut redis, keys::DELETED, cursor).await.map_err(|error| error.to_string())?;
            deleted.retain(|_, at| at.parse().is_ok_and(|at: u64| at <= n));
            let products: Vec<String> = deleted.keys().cloned().collect();
            let gone = ledger::stock::gone_for(&mut postgres, &products, DELETED_KEPT).await.map_err(|error| error.to_string())?;
            let gone: BTreeSet<String> = gone.into_iter().collect();
            deleted.retain(|product, _| gone.contains(product));
            if !deleted.is_empty() {
                forgotten += sweep::forget(&mut redis, keys::DELETED, &deleted).await.map_err(|error| error.to_string())?;
            }
            *cursor = next;
            if cursor == FIRST {
                break;
            }
        }
        Ok(forgotten)
    }

    /// Has Redis forget which products were unfrozen up to n, some a sweep: who looks in Postgres sees it there.
    async fn forget_unfrozen(&self, n: u64, cursor: &mut String) -> Result<u64, String> {
        let mut redis = Connection::open(&self.redis_url).await.map_err(|error| error.to_string())?;
        let (next, mut unfrozen) = sweep::noted(&mut redis, keys::UNFROZEN, cursor).await.map_err(|error| error.to_string())?;
        unfrozen.retain(|_, at| at.parse().is_ok_and(|at: u64| at <= n));
        *cursor = next;
        if unfrozen.is_empty() {
            return Ok(0);
        }
        sweep::forget(&mut redis, keys::UNFROZEN, &unfrozen).await.map_err(|error| error.to_string())
    }

    /// `before`: the lanes as the sweep before saw them. One that has moved since is alive, although Postgres has not heard of it.
    async fn sweep(&self, before: &mut BTreeMap<String, String>) -> Result<(u64, u64), String> {
        let mut redis = Connection::open(&self.redis_url).await.map_err(|error| error.to_string())?;
        let buckets = sweep::remove_buckets(&mut redis, self.window_ms).await.map_err(|error| error.to_string())?;
        let mut postgres = ledger::connect(&self.postgres_url).await.map_err(|error| error.to_string())?;
        ledger::prune(&mut postgres).await.map_err(|error| error.to_string())?;
        let lanes = sweep::lanes(&mut redis).await.map_err(|error| error.to_string())?;
        let instance = |lane: &String| lane.split(':').next().unwrap_or_default().to_owned();
        let instances: Vec<String> = lanes.keys().map(instance).collect();
        let gone = ledger::sidecar::gone(&mut postgres, &instances).await.map_err(|error| error.to_string())?;
        let mut ended = std::mem::replace(before, lanes);
        ended.retain(|lane, value| before.get(lane) == Some(value) && gone.contains(&instance(lane)));
        if ended.is_empty() {
            return Ok((0, buckets));
        }
        let removed = sweep::remove_lanes(&mut redis, &ended).await.map_err(|error| error.to_string())?;
        Ok((removed, buckets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::{RedisServer, database, execute};
    use crate::limits::SWEEP_NOTED;
    use crate::store::stream::testing::send;

    #[tokio::test]
    async fn lanes_of_ended_sidecars_and_past_windows_go_and_nothing_else() {
        let (server, mut database) = (RedisServer::start(), database().await);
        let mut redis = Connection::open(&server.url()).await.unwrap();
        send(&mut redis, &["HSET", "holdfast:meta", "epoch", "1", "dead:stock", "7:1-5", "alive:stock", "3:1-4"]).await;
        send(&mut redis, &["HSET", "holdfast:request:m1.5", "a", "b"]).await;
        let minute = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() / 60;
        for ago in [12, 9] {
            send(&mut redis, &["HSET", &format!("holdfast:request:m{}.5", minute - ago), "a", "b"]).await;
        }
        ledger::sidecar::renew(&mut database.connection, "dead", 600_000).await.unwrap();
        ledger::sidecar::renew(&mut database.connection, "alive", 600_000).await.unwrap();
        execute(&mut database.connection, "UPDATE holdfast.sidecar SET lease_until = now() - interval '1 hour' WHERE id = 'dead'").await;
        let partition = Arc::new(Partition::new(0, 1 << 20).0);
        let sweeper = Sweeper { partition, redis_url: server.url(), postgres_url: database.url.clone(), window_ms: 600_000 };
        let mut before = BTreeMap::new();
        assert_eq!(sweeper.sweep(&mut before).await.unwrap(), (0, 1), "whether a lane moves is not known yet");
        send(&mut redis, &["HSET", "holdfast:meta", "dead:stock", "8:1-5"]).await;
        assert_eq!(sweeper.sweep(&mut before).await.unwrap(), (0, 0), "it moves");
        assert_eq!(sweeper.sweep(&mut before).await.unwrap(), (1, 0));
        assert_eq!(sweep::lanes(&mut redis).await.unwrap().into_keys().collect::<Vec<_>>(), ["alive:stock"]);
    }
    #[tokio::test]
    async fn a_deletion_is_forgotten_once_it_is_long_ago_in_postgres_too() {
        let (server, mut database) = (RedisServer::start(), database().await);
        let mut redis = Connection::open(&server.url()).await.unwrap();
        send(&mut redis, &["HSET", "stock:deleted", "old", "4", "lately", "5", "never", "6", "again", "9", "new", "12"]).await;
        send(&mut redis, &["HSET", "stock:deleted", "removed", "7", "removed-lately", "8"]).await;
        execute(
            &mut database.connection,
            "INSERT INTO holdfast.stock (product_id, available, deleted_at) VALUES ('old', 0, now() - interval '25 hours'), \
             ('lately', 0, now() - interval '23 hours'), ('again', 7, NULL), ('new', 0, now() - interval '25 hours'); \
             INSERT INTO holdfast.stock_ledger (partition, epoch, n, i, op, k, product_id, kind, redis_delta, pg_delta, available_after, at) \
             VALUES (0, 1, 7, 0, 'x', 0, 'removed', 'inbox', 0, 0, 0, now() - interval '25 hours'), \
             (0, 1, 2, 0, 'x', 1, 'removed-lately', 'set', 5, 5, 5, now() - interval '25 hours'), \
             (0, 1, 8, 0, 'x', 2, 'removed-lately', 'inbox', -5, 0, 0, now() - interval '23 hours')",
        )
        .await;
        let partition = Arc::new(Partition::new(0, 1 << 20).0);
        let sweeper = Sweeper { partition, redis_url: server.url(), postgres_url: database.url.clone(), window_ms: 600_000 };
        let mut cursor = FIRST.to_owned();
        assert_eq!(sweeper.forget_deleted(0, &mut cursor, 1).await.unwrap(), 0, "Postgres may not have them yet");
        assert_eq!(sweeper.forget_deleted(9, &mut cursor, 1).await.unwrap(), 3);
        let (_, left) = sweep::noted(&mut redis, keys::DELETED, "0").await.unwrap();
        assert_eq!(left.into_keys().collect::<Vec<_>>(), ["again", "lately", "new", "removed-lately"]);

        send(&mut redis, &["HSET", "stock:unfrozen", "a", "4", "b", "5"]).await;
        let mut cursor = FIRST.to_owned();
        assert_eq!(sweeper.forget_unfrozen(4, &mut cursor).await.unwrap(), 1);
        let (_, left) = sweep::noted(&mut redis, keys::UNFROZEN, "0").await.unwrap();
        assert_eq!(left.into_keys().collect::<Vec<_>>(), ["b"], "Postgres may not know that");
    }

    #[tokio::test]
    async fn each_sweep_goes_on_where_the_last_one_ended() {
        let (server, mut database) = (RedisServer::start(), database().await);
        let mut redis = Connection::open(&server.url()).await.unwrap();
        let fill = "for i = 1, 6000 do redis.call('HSET', KEYS[1], 'p' .. i, 1) end";
        send(&mut redis, &["EVAL", fill, "1", "stock:deleted"]).await;
        execute(
            &mut database.connection,
            "INSERT INTO holdfast.stock (product_id, available, deleted_at) \
             SELECT 'p' || i, 0, now() - CASE i % 2 WHEN 0 THEN interval '25 hours' ELSE interval '1 hour' END FROM generate_series(1, 6000) i",
        )
        .await;
        let partition = Arc::new(Partition::new(0, 1 << 20).0);
        let sweeper = Sweeper { partition, redis_url: server.url(), postgres_url: database.url.clone(), window_ms: 600_000 };
        let (mut cursor, mut forgotten) = (FIRST.to_owned(), Vec::new());
        for _ in 0..6000 / SWEEP_NOTED * 2 {
            forgotten.push(sweeper.forget_deleted(1, &mut cursor, 1).await.unwrap());
            if cursor == FIRST {
                break;
            }
        }
        assert!(forgotten.len() > 3, "one sweep comes by all of them: {forgotten:?}");
        assert_eq!(forgotten.iter().sum::<u64>(), 3000, "{forgotten:?}");
    }
}
