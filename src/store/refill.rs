//! Empties Redis of what is ours and fills it anew. Only behind [`meta::fence`](super::meta::fence): no script writes meanwhile.

use std::collections::BTreeMap;

use redis::Value;

use super::pack::Pack;
use super::words::Words;
use super::{Connection, Error, coupon, keys, requests, script};
use crate::domain::{Id, Order, OrderState, Position, RequestId};
use crate::limits::{ORDER_KEPT_MS, REFILL_KEYS};

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
    pub deleted: bool,
}

/// What a user has of a coupon, by serial.
pub struct Held {
    pub coupon: Id,
    pub user: Id,
    pub coupons: Vec<coupon::Held>,
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

/// What is to be removed and set in one go, under an epoch.
struct Work {
    epoch: u64,
    keys: Vec<String>,
    commands: Vec<(&'static str, Vec<usize>, Vec<String>)>,
}

impl Work {
    fn new(epoch: u64) -> Self {
        Self { epoch, keys: vec![keys::META.to_owned()], commands: Vec::new() }
    }

    fn add(&mut self, name: &'static str, keys: Vec<String>, words: Vec<String>) {
        let places = (0..keys.len()).map(|i| self.keys.len() + i + 1).collect();
        self.keys.extend(keys);
        self.commands.push((name, places, words));
    }

    /// Adds HSET, if there are any fields.
    fn hash(&mut self, key: &str, fields: impl Iterator<Item = (String, String)>) {
        let words: Vec<String> = fields.flat_map(|(field, value)| [field, value]).collect();
        if !words.is_empty() {
            self.add("HSET", vec![key.to_owned()], words);
        }
    }

    /// Does it. Returns how many keys were removed. Errors with [`Error::Unfit`] where Redis is no longer being filled under the epoch.
    async fn run(self, connection: &mut Connection) -> Result<u64, Error> {
        if self.commands.is_empty() {
            return Ok(0);
        }
        let mut commands = Pack::default();
        commands.array(self.commands.len());
        for (name, places, words) in &self.commands {
            commands.array(3).text(name).array(places.len());
            for place in places {
                commands.count(*place);
            }
            commands.array(words.len());
            for word in words {
                commands.text(word);
            }
        }
        let keys: Vec<&str> = self.keys.iter().map(String::as_str).collect();
        let answer = connection.run(&script::REFILL, &keys, &[self.epoch.to_string().as_bytes(), &commands.into_bytes()]).await?;
        match answer {
            Value::Int(removed) => Ok(u64::try_from(removed).unwrap_or_default()),
            _ => Err(Error::Unfit("another sidecar has taken the rebuild over".into())),
        }
    }
}

/// Removes every key that is ours, but for meta, the locks of coupons and what belongs to locks. Returns how many there were.
pub async fn clear(connection: &mut Connection, epoch: u64) -> Result<u64, Error> {
    let fixed = [keys::OUTBOX, keys::HELD, keys::EXPIRY, keys::FROZEN, keys::LOW, keys::DELETED, keys::UNFROZEN];
    let mut removed = unlink(connection, epoch, fixed.map(String::from).to_vec()).await?;
    let ours = |key: &String| keys::REBUILT_PREFIXES.iter().any(|prefix| key.starts_with(prefix));
    let mut cursor = "0".to_owned();
    loop {
        let mut words = Words::new(connection.send(redis::cmd("SCAN").arg(&cursor).arg("COUNT").arg(REFILL_KEYS)).await?)?;
        cursor = words.text()?;
        // Other programs' keys may be any bytes.
        let found: Vec<Vec<u8>> = redis::from_redis_value(words.raw()?).map_err(redis::RedisError::from)?;
        let found: Vec<String> = found.into_iter().filter_map(|key| String::from_utf8(key).ok()).filter(ours).collect();
        removed += unlink(connection, epoch, found).await?;
        if cursor == "0" {
            return Ok(removed);
        }
    }
}

async fn unlink(connection: &mut Connection, epoch: u64, keys: Vec<String>) -> Result<u64, Error> {
    let mut work = Work::new(epoch);
    if !keys.is_empty() {
        work.add("UNLINK", keys, Vec::new());
    }
    work.run(connection).await
}

/// Keeps the outbox under another name, which is returned. There may be none.
pub async fn set_outbox_aside(connection: &mut Connection, epoch: u64) -> Result<String, Error> {
    let name = format!("{}:unreadable:{epoch}", keys::OUTBOX);
    let mut work = Work::new(epoch);
    work.add("RENAME", vec![keys::OUTBOX.to_owned(), name.clone()], Vec::new());
    work.run(connection).await?;
    Ok(name)
}

/// Sets products.
pub async fn products(connection: &mut Connection, epoch: u64, products: &[Product]) -> Result<(), Error> {
    for products in products.chunks(REFILL_KEYS) {
        let mut work = Work::new(epoch);
        for product in products {
            work.add("SET", vec![keys::product(&product.product)], vec![product.available.to_string()]);
        }
        let held = products.iter().filter(|product| product.held > 0);
        work.hash(keys::HELD, held.map(|product| (product.product.to_string(), product.held.to_string())));
        let low = products.iter().filter_map(|product| Some((product.product.to_string(), product.low?.to_string())));
        work.hash(keys::LOW, low);
        let frozen = products.iter().filter_map(|product| Some((product.product.to_string(), product.frozen.clone()?)));
        work.hash(keys::FROZEN, frozen);
        work.run(connection).await?;
    }
    Ok(())
}

/// Sets what is held of products.
pub async fn units_held(connection: &mut Connection, epoch: u64, held: &[(String, i64)]) -> Result<(), Error> {
    for held in held.chunks(REFILL_KEYS) {
        let mut work = Work::new(epoch);
        work.hash(keys::HELD, held.iter().map(|(product, units)| (product.clone(), units.to_string())));
        work.run(connection).await?;
    }
    Ok(())
}

/// Sets orders, each with when it became what it is, in Unix ms: what is over goes as long after that as if it had happened here.
pub async fn orders(connection: &mut Connection, epoch: u64, orders: &[(Id, Order, i64)]) -> Result<(), Error> {
    for orders in orders.chunks(REFILL_KEYS) {
        let mut work = Work::new(epoch);
        for (id, order, changed_ms) in orders {
            let key = keys::order(id);
            let fields = [
                ("state", order.state.as_str().to_owned()),
                ("expires", order.expires_ms.to_string()),
                ("items", order.items_text()),
                ("position", order.position.to_string()),
            ];
            work.hash(&key, fields.into_iter().map(|(field, value)| (field.to_owned(), value)));
            if order.state == OrderState::Held {
                work.add("ZADD", vec![keys::EXPIRY.to_owned()], vec![order.expires_ms.to_string(), id.to_string()]);
            } else {
                work.add("PEXPIREAT", vec![key], vec![(changed_ms + ORDER_KEPT_MS).to_string()]);
            }
        }
        work.run(connection).await?;
    }
    Ok(())
}

/// Notes that these were deleted, by the change `n`.
pub async fn deleted(connection: &mut Connection, epoch: u64, products: &[String], n: u64) -> Result<(), Error> {
    for products in products.chunks(REFILL_KEYS) {
        let mut work = Work::new(epoch);
        work.hash(keys::DELETED, products.iter().map(|product| (product.clone(), n.to_string())));
        work.run(connection).await?;
    }
    Ok(())
}

/// Sets the terms of coupons.
pub async fn coupons(connection: &mut Connection, epoch: u64, coupons: &[Coupon]) -> Result<(), Error> {
    for coupons in coupons.chunks(REFILL_KEYS) {
        let mut work = Work::new(epoch);
        for coupon in coupons {
            let fields = [
                ("total", coupon.total),
                ("issued", coupon.issued),
                ("serial", coupon.serial),
                ("used", coupon.used),
                ("peruser", coupon.per_user),
                ("start", coupon.start_ms),
                ("end", coupon.end_ms),
            ];
            let fields = fields.into_iter().map(|(field, value)| (field.to_owned(), value.to_string()));
            let fields = fields.chain(coupon.deleted.then(|| ("state".to_owned(), "deleted".to_owned())));
            work.hash(&keys::coupon_info(&coupon.coupon), fields);
        }
        work.run(connection).await?;
    }
    Ok(())
}

/// Sets what users have.
pub async fn held(connection: &mut Connection, epoch: u64, held: &[Held]) -> Result<(), Error> {
    for held in held.chunks(REFILL_KEYS) {
        let mut work = Work::new(epoch);
        for same in held.chunk_by(|a, b| a.coupon == b.coupon) {
            let fields = same.iter().map(|held| (held.user.to_string(), coupon::field(&held.coupons)));
            work.hash(&keys::coupon_users(&same[0].coupon), fields);
        }
        work.run(connection).await?;
    }
    Ok(())
}

/// Remembers REQUESTs, in the windows in which they came.
pub async fn requests(connection: &mut Connection, epoch: u64, requests: &[Request], window_ms: i64) -> Result<(), Error> {
    for requests in requests.chunks(REFILL_KEYS) {
        let mut buckets: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
        for request in requests {
            let key = requests::bucket(&request.id, request.at_ms.div_euclid(window_ms));
            let reply = requests::reply(request.word, &request.integers, request.position);
            buckets.entry(key).or_default().push((request.id.escaped(), format!("{} {reply}", request.digest)));
        }
        let mut work = Work::new(epoch);
        for (key, fields) in buckets {
            work.hash(&key, fields.into_iter());
            work.add("PEXPIRE", vec![key], vec![requests::expiry_ms(window_ms).to_string(), "NX".to_owned()]);
        }
        work.run(connection).await?;
    }
    Ok(())
}
