//! Empties Redis of what is ours and fills it anew. Only behind [`meta::fence`](super::meta::fence): no script writes meanwhile.

use std::collections::HashMap;

use redis::Cmd;

use super::coupon;
use super::requests;
use super::words::Words;
use super::{Connection, Error, keys};
use crate::domain::{Id, Position, RequestId};
use crate::limits::REFILL_KEYS;

/// A product as Redis has to have it.
pub struct Product {
    pub product: Id,
    pub available: i64,
    pub held: i64,
    pub low: Option<i64>,
    pub frozen: Option<String>,
}

/// A coupon's terms and how far it is. Times in Unix ms, 0 for none.
pub struct Coupon {
    pub coupon: Id,
    pub total: i64,
    pub issued: i64,
    pub used: i64,
    pub serial: i64,
    pub per_user: i64,
    pub start_ms: i64,
    pub end_ms: i64,
}

/// What a user has of a coupon: serial, state, when it was issued in Unix ms; by serial.
pub struct Held {
    pub coupon: Id,
    pub user: Id,
    pub coupons: Vec<(i64, String, i64)>,
}

/// A REQUEST that may be repeated, and its reply.
pub struct Request {
    pub id: RequestId,
    pub digest: String,
    pub word: &'static str,
    pub integers: Vec<i64>,
    pub position: Position,
    pub at_ms: i64,
}

/// Removes every key that is ours, but for meta, the locks of coupons and what belongs to locks. Returns how many there were.
pub async fn clear(connection: &mut Connection) -> Result<u64, Error> {
    let fixed = [keys::OUTBOX, keys::HELD, keys::FROZEN, keys::LOW, keys::DELETED];
    let mut removed = unlink(connection, &fixed.map(String::from)).await?;
    let ours = |key: &String| keys::REBUILT_PREFIXES.iter().any(|prefix| key.starts_with(prefix));
    let mut cursor = "0".to_owned();
    loop {
        let mut words = Words::new(connection.send(redis::cmd("SCAN").arg(&cursor).arg("COUNT").arg(REFILL_KEYS)).await?)?;
        cursor = words.text()?;
        // Other programs' keys may be any bytes.
        let found: Vec<Vec<u8>> = redis::from_redis_value(words.raw()?).map_err(redis::RedisError::from)?;
        let found: Vec<String> = found.into_iter().filter_map(|key| String::from_utf8(key).ok()).filter(ours).collect();
        removed += unlink(connection, &found).await?;
        if cursor == "0" {
            return Ok(removed);
        }
    }
}

/// Keeps the outbox under another name, which is returned. There may be none.
pub async fn set_outbox_aside(connection: &mut Connection, epoch: u64) -> Result<String, Error> {
    let name = format!("{}:unreadable:{epoch}", keys::OUTBOX);
    match connection.send(redis::cmd("RENAME").arg(keys::OUTBOX).arg(&name)).await {
        Err(Error::Refused(_)) | Ok(_) => Ok(name),
        Err(error) => Err(error),
    }
}

/// Removes the outbox: Postgres has all of it.
pub async fn remove_outbox(connection: &mut Connection) -> Result<(), Error> {
    unlink(connection, &[keys::OUTBOX.to_owned()]).await.map(drop)
}

async fn unlink(connection: &mut Connection, keys: &[String]) -> Result<u64, Error> {
    let mut removed = 0;
    for keys in keys.chunks(REFILL_KEYS) {
        let answer = connection.send(redis::cmd("UNLINK").arg(keys)).await?;
        removed += redis::from_redis_value::<u64>(answer).map_err(redis::RedisError::from)?;
    }
    Ok(removed)
}

/// Sets products.
pub async fn products(connection: &mut Connection, products: &[Product]) -> Result<(), Error> {
    for products in products.chunks(REFILL_KEYS) {
        let mut set = redis::cmd("MSET");
        for product in products {
            set.arg(keys::product(&product.product)).arg(product.available);
        }
        connection.send(&set).await?;
        let held = products.iter().filter(|product| product.held > 0).map(|product| (product, product.held.to_string()));
        hash(connection, keys::HELD, held).await?;
        let low = products.iter().filter_map(|product| Some((product, product.low?.to_string())));
        hash(connection, keys::LOW, low).await?;
        let frozen = products.iter().filter_map(|product| Some((product, product.frozen.clone()?)));
        hash(connection, keys::FROZEN, frozen).await?;
    }
    Ok(())
}

async fn hash(connection: &mut Connection, key: &str, fields: impl Iterator<Item = (&Product, String)>) -> Result<(), Error> {
    let mut command = redis::cmd("HSET");
    command.arg(key);
    let mut any = false;
    for (product, value) in fields {
        any = true;
        command.arg(product.product.as_bytes()).arg(value);
    }
    if any { connection.send(&command).await.map(drop) } else { Ok(()) }
}

/// Notes that these were deleted, by the change `n`.
pub async fn deleted(connection: &mut Connection, products: &[String], n: u64) -> Result<(), Error> {
    for products in products.chunks(REFILL_KEYS) {
        let mut command = redis::cmd("HSET");
        command.arg(keys::DELETED);
        for product in products {
            command.arg(product).arg(n);
        }
        connection.send(&command).await?;
    }
    Ok(())
}

/// Sets the terms of coupons.
pub async fn coupons(connection: &mut Connection, coupons: &[Coupon]) -> Result<(), Error> {
    for coupon in coupons {
        let mut command = redis::cmd("HSET");
        command.arg(keys::coupon_info(&coupon.coupon));
        for (field, value) in [
            ("total", coupon.total),
            ("issued", coupon.issued),
            ("serial", coupon.serial),
            ("used", coupon.used),
            ("peruser", coupon.per_user),
            ("start", coupon.start_ms),
            ("end", coupon.end_ms),
        ] {
            command.arg(field).arg(value);
        }
        connection.send(&command).await?;
    }
    Ok(())
}

/// Sets what users have.
pub async fn held(connection: &mut Connection, held: &[Held]) -> Result<(), Error> {
    for same in held.chunk_by(|a, b| a.coupon == b.coupon) {
        for users in same.chunks(REFILL_KEYS) {
            let mut command = redis::cmd("HSET");
            command.arg(keys::coupon_users(&users[0].coupon));
            for held in users {
                command.arg(held.user.as_bytes()).arg(coupon::field(&held.coupons));
            }
            connection.send(&command).await?;
        }
    }
    Ok(())
}

/// Remembers REQUESTs, in the windows in which they came.
pub async fn requests(connection: &mut Connection, requests: &[Request], window_ms: i64) -> Result<(), Error> {
    let mut buckets: HashMap<String, Cmd> = HashMap::new();
    for request in requests {
        let key = requests::bucket(&request.id, request.at_ms.div_euclid(window_ms));
        let reply = requests::reply(request.word, &request.integers, request.position);
        let command = buckets.entry(key).or_insert_with_key(|key| {
            let mut command = redis::cmd("HSET");
            command.arg(key);
            command
        });
        command.arg(request.id.escaped()).arg(format!("{} {reply}", request.digest));
    }
    for (key, command) in buckets {
        connection.send(&command).await?;
        connection.send(redis::cmd("PEXPIRE").arg(&key).arg(requests::expiry_ms(window_ms)).arg("NX")).await?;
    }
    Ok(())
}
