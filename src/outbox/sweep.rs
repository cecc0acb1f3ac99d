//! Removes what nobody asks for any more: from Redis the lanes of sidecars that have ended and past windows of REQUEST ids, from Postgres
//! what is old and settled.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::ledger;
use crate::limits::SWEEP_EVERY;
use crate::store::partition::State;
use crate::store::{Connection, Partition, sweep};

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
        let mut before = BTreeMap::new();
        while cancel.run_until_cancelled(tokio::time::sleep(SWEEP_EVERY)).await.is_some() {
            if !matches!(*self.partition.state.borrow(), State::Live { .. }) {
                continue;
            }
            match tokio::time::timeout(SWEEP_EVERY, self.sweep(&mut before)).await {
                Ok(Ok((lanes, buckets))) => debug!(partition = self.partition.id, lanes, buckets, "swept"),
                Ok(Err(error)) => warn!(partition = self.partition.id, error, "could not sweep, trying again in a minute"),
                Err(_) => warn!(partition = self.partition.id, "sweeping took too long, trying again"),
            }
        }
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
}
