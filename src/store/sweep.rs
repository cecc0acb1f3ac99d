//! What ended sidecars and past windows left behind in Redis.

use super::pack::Pack;
use super::requests;
use super::{Connection, Error, keys, script};
use crate::limits::{REFILL_KEYS, SWEEP_STRETCHES};

/// The lanes that meta knows, as `<instance>:<lane>`.
pub async fn lanes(connection: &mut Connection) -> Result<Vec<String>, Error> {
    let answer = connection.send(redis::cmd("HKEYS").arg(keys::META)).await?;
    let fields: Vec<String> = redis::from_redis_value(answer).map_err(redis::RedisError::from)?;
    Ok(fields.into_iter().filter(|field| field.contains(':')).collect())
}

/// Removes lanes whose sidecars have ended. Returns how many there were.
pub async fn remove_lanes(connection: &mut Connection, lanes: &[String]) -> Result<u64, Error> {
    let mut fields = Pack::default();
    fields.array(lanes.len());
    for lane in lanes {
        fields.text(lane);
    }
    let answer = connection.run(&script::SWEEP, &[keys::META], &[&fields.into_bytes()]).await?;
    Ok(redis::from_redis_value(answer).map_err(redis::RedisError::from)?)
}

/// Removes the buckets of REQUEST ids that nobody can ask for any more. Returns how many there were.
pub async fn remove_buckets(connection: &mut Connection, window_ms: i64) -> Result<u64, Error> {
    let past = requests::past_buckets(connection.time_ms().await?, window_ms, SWEEP_STRETCHES);
    let mut removed = 0;
    for keys in past.chunks(REFILL_KEYS) {
        let answer = connection.send(redis::cmd("UNLINK").arg(keys)).await?;
        removed += redis::from_redis_value::<u64>(answer).map_err(redis::RedisError::from)?;
    }
    Ok(removed)
}
