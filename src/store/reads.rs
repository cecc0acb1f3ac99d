//! Reads for people and dashboards, over a connection of their own: what they cost never stands in front of a sale.

use std::cell::RefCell;
use std::time::Duration;

use super::script;
use super::words::Words;
use super::{Connection, Error, keys};
use crate::domain::{Id, Position};

/// What STOCK.INFO shows, at one position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StockInfo {
    /// `None` where Redis has no such product.
    pub available: Option<i64>,
    pub held: i64,
    pub low: Option<i64>,
    pub frozen: Option<String>,
    pub position: Position,
    /// How long the oldest change that Postgres does not have has been waiting.
    pub lag_ms: i64,
}

/// What COUPON.INFO shows, at one position. Times in Unix ms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CouponInfo {
    pub total: i64,
    pub issued: i64,
    pub used: i64,
    pub per_user: i64,
    pub start_ms: Option<i64>,
    pub end_ms: Option<i64>,
    pub position: Position,
    /// Redis's clock.
    pub now_ms: i64,
}

/// One coupon of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub serial: i64,
    pub state: String,
    pub issued_at_ms: i64,
    pub order: Option<String>,
}

/// One step of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// Where the next step goes on; `0` at the end.
    pub cursor: String,
    pub found: Vec<(String, i64)>,
}

/// See the module.
pub struct Reads {
    redis_url: String,
    within: Duration,
    connection: RefCell<Option<Connection>>,
}

impl Reads {
    /// Each read ends after `within`.
    pub fn new(redis_url: &str, within: Duration) -> Self {
        Self { redis_url: redis_url.to_owned(), within, connection: RefCell::default() }
    }

    pub(super) async fn with<T>(&self, read: impl AsyncFn(&mut Connection) -> Result<T, Error>) -> Result<T, Error> {
        let reading = async {
            let open = self.connection.borrow().clone();
            if let Some(mut connection) = open {
                match read(&mut connection).await {
                    // It may have been dead for long: a read can be repeated.
                    Err(Error::Connection(_)) => self.connection.borrow_mut().take(),
                    result => return result,
                };
            }
            let mut connection = Connection::open(&self.redis_url).await?;
            let result = read(&mut connection).await;
            *self.connection.borrow_mut() = Some(connection);
            result
        };
        match tokio::time::timeout(self.within, reading).await {
            Ok(result) => result,
            Err(_) => {
                self.connection.borrow_mut().take();
                Err(Error::Connection(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
            }
        }
    }

    /// A product as Redis has it; `applied` is the newest position that Postgres has.
    pub async fn stock_info(&self, product: &Id, applied: Position) -> Result<StockInfo, Error> {
        let (key, applied) = (keys::product(product), applied.to_string());
        self.with(async |connection| {
            let keys = [keys::META, keys::OUTBOX, keys::HELD, keys::FROZEN, keys::LOW, &key];
            let answer = connection.run(&script::STOCK_INFO, &keys, &[product.as_bytes(), applied.as_bytes()]).await?;
            let mut words = Words::new(answer)?;
            let (available, held, low) = (words.maybe_integer()?, words.maybe_integer()?.unwrap_or(0), words.maybe_integer()?);
            let frozen = words.maybe_text()?;
            Ok(StockInfo { available, held, low, frozen, position: position(&mut words)?, lag_ms: words.integer()? })
        })
        .await
    }

    /// A coupon as Redis has it; `None` where it has none.
    pub async fn coupon_info(&self, coupon: &Id) -> Result<Option<CouponInfo>, Error> {
        let key = keys::coupon_info(coupon);
        self.with(async |connection| {
            let mut words = Words::new(connection.run(&script::COUPON_INFO, &[keys::META, &key], &[]).await?)?;
            let Some(total) = words.maybe_integer()? else { return Ok(None) };
            let (issued, used, per_user) = (words.integer()?, words.integer()?, words.integer()?);
            let time = |ms: Option<i64>| ms.filter(|ms| *ms > 0);
            let (start_ms, end_ms) = (time(words.maybe_integer()?), time(words.maybe_integer()?));
            let position = position(&mut words)?;
            Ok(Some(CouponInfo { total, issued, used, per_user, start_ms, end_ms, position, now_ms: words.integer()? }))
        })
        .await
    }

    /// The coupons a user holds, oldest first.
    pub async fn coupon_held(&self, coupon: &Id, user: &Id) -> Result<Vec<Held>, Error> {
        let key = keys::coupon_users(coupon);
        self.with(async |connection| {
            let answer = connection.send(redis::cmd("HGET").arg(&key).arg(user.as_bytes())).await?;
            let text = Words::new(redis::Value::Array(vec![answer]))?.maybe_text()?;
            text.iter().flat_map(|text| text.lines()).map(held).collect()
        })
        .await
    }

    /// Goes on with a scan over the products whose id matches the glob.
    pub async fn scan_products(&self, cursor: &str, pattern: &str, count: i64) -> Result<Scanned, Error> {
        let pattern = format!("{}{pattern}", keys::PRODUCT_PREFIX);
        self.with(async |connection| {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(count).arg("TYPE").arg("string");
            let mut words = Words::new(connection.send(&scan).await?)?;
            let cursor = words.text()?;
            let found: Vec<String> = redis::from_redis_value(words.raw()?).map_err(redis::RedisError::from)?;
            if found.is_empty() {
                return Ok(Scanned { cursor, found: Vec::new() });
            }
            let mut values = Words::new(connection.send(redis::cmd("MGET").arg(&found)).await?)?;
            let mut pairs = Vec::with_capacity(found.len());
            for key in found {
                // A product may be gone, or hold something else, by the time it is read.
                let available = values.maybe_text()?.and_then(|text| text.parse().ok());
                let product = key.strip_prefix(keys::PRODUCT_PREFIX).unwrap_or_default().to_owned();
                pairs.extend(available.map(|available| (product, available)));
            }
            Ok(Scanned { cursor, found: pairs })
        })
        .await
    }
}

/// The newest change's position; `0-0` before the first.
fn position(words: &mut Words) -> Result<Position, Error> {
    let Some(text) = words.maybe_text()? else { return Ok(Position::default()) };
    Position::parse(text.as_bytes()).ok_or_else(|| Error::Unexpected(format!("{text:?} where a position belongs")))
}

/// Reads one line of a user's field: serial, state, issued at, order (`-`: none).
pub(super) fn held(line: &str) -> Result<Held, Error> {
    let mut words = line.split(' ');
    let read = || {
        let (serial, state, issued_at_ms) = (words.next()?.parse().ok()?, words.next()?.to_owned(), words.next()?.parse().ok()?);
        let order = words.next()?;
        Some(Held { serial, state, issued_at_ms, order: (order != "-").then(|| order.to_owned()) })
    };
    let mut read = read;
    read().ok_or_else(|| Error::Unexpected(format!("a coupon of a user reads {line:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_coupon_is_read_from_its_line() {
        let expected = Held { serial: 12, state: "issued".into(), issued_at_ms: 7, order: None };
        assert_eq!(held("12 issued 7 -").unwrap(), expected);
        assert!(held("12 issued").is_err());
    }
}
