//! What ended sidecars and past windows left behind in Redis.

use std::collections::BTreeMap;

use super::pack::Pack;
use super::requests;
use super::{Connection, Error, keys, script};
use crate::limits::{REFILL_KEYS, SWEEP_NOTED, SWEEP_STRETCHES};

/// The lanes that meta knows, as `<instance>:<lane>`, each with what it says of its last batch.
pub async fn lanes(connection: &mut Connection) -> Result<BTreeMap<String, String>, Error> {
    let answer = connection.send(redis::cmd("HGETALL").arg(keys::META)).await?;
    let fields: BTreeMap<String, String> = redis::from_redis_value(answer).map_err(redis::RedisError::from)?;
    Ok(fields.into_iter().filter(|(field, _)| field.contains(':')).collect())
}

/// Removes lanes that still are as they were. Returns how many there were.
pub async fn remove_lanes(connection: &mut Connection, lanes: &BTreeMap<String, String>) -> Result<u64, Error> {
    remove(connection, keys::META, lanes).await
}

async fn remove(connection: &mut Connection, key: &str, as_they_were: &BTreeMap<String, String>) -> Result<u64, Error> {
    let mut fields = Pack::default();
    fields.array(as_they_were.len());
    for (field, value) in as_they_were {
        fields.array(2).text(field).text(value);
    }
    let answer = connection.run(&script::SWEEP, &[key], &[&fields.into_bytes()]).await?;
    Ok(redis::from_redis_value(answer).map_err(redis::RedisError::from)?)
}

/// Some of the products that a hash notes ([`keys::DELETED`], [`keys::UNFROZEN`]), from `cursor` on, each with n of that change. Returns where to
/// go on, `0` at the end.
pub async fn noted(connection: &mut Connection, hash: &str, cursor: &str) -> Result<(String, BTreeMap<String, String>), Error> {
    let answer = connection.send(redis::cmd("HSCAN").arg(hash).arg(cursor).arg("COUNT").arg(SWEEP_NOTED)).await?;
    Ok(redis::from_redis_value(answer).map_err(redis::RedisError::from)?)
}

/// Forgets those that still are noted so. Returns how many there were.
pub async fn forget(connection: &mut Connection, hash: &str, products: &BTreeMap<String, String>) -> Result<u64, Error> {
    remove(connection, hash, products).await
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
