//! Reads for people and dashboards, over a connection of their own: a long answer never stands in front of a sale's.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Mutex;

use super::coupon::Held;
use super::metered::Budget;
use super::partition::State;
use super::script;
use super::words::Words;
use super::{Connection, Error, Partition, keys};
use crate::domain::{Id, Position};
use crate::limits::REFILL_KEYS;
use crate::resp::Reply;

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
    pub deleted: bool,
    pub position: Position,
    /// Redis's clock.
    pub now_ms: i64,
}

/// One step of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// Where the next step goes on; `0` at the end.
    pub cursor: String,
    pub found: Vec<(String, i64)>,
}

/// The Redis that a read may trust: what was verified last.
#[derive(Clone)]
pub struct Live {
    partition: Arc<Partition>,
    epoch: u64,
    run_id: String,
}

impl Live {
    /// `None` while the partition is not live.
    pub fn of(partition: &Arc<Partition>) -> Option<Self> {
        match &*partition.state.borrow() {
            State::Live { epoch, run_id } => Some(Self { partition: Arc::clone(partition), epoch: *epoch, run_id: run_id.clone() }),
            State::Loading(_) | State::Rebuilding(_) => None,
        }
    }

    /// Something is absent from Redis, where n is the newest change: Postgres has to have that before it can say more.
    fn missed(&self, n: i64) {
        self.partition.saw_n(self.epoch, u64::try_from(n).unwrap_or(0));
    }
}

/// An answer of Redis as it is passed on.
fn reply(value: redis::Value) -> Reply {
    use redis::Value;
    let all = |values: Vec<Value>| values.into_iter().map(reply).collect();
    match value {
        Value::Nil => Reply::Nil,
        Value::Int(integer) => Reply::Integer(integer),
        Value::BulkString(bytes) => Reply::bulk(bytes),
        Value::SimpleString(text) => Reply::Simple(text.into()),
        Value::Okay => Reply::ok(),
        Value::Double(value) => Reply::Double(value),
        Value::Boolean(value) => Reply::Bool(value),
        Value::Array(values) => Reply::Array(all(values)),
        Value::Set(values) => Reply::Set(all(values)),
        Value::Map(pairs) => Reply::Map(pairs.into_iter().map(|(name, value)| (reply(name), reply(value))).collect()),
        Value::ServerError(error) => foreign(error.code(), error.details().unwrap_or_default()),
        other => Reply::error(format!("ERR an answer of Redis that is not passed on: {other:?}")),
    }
}

/// An error of the backing Redis as it is passed on. Clients act on error words, and what Redis says of itself is not said of this server: so
/// only those of a command's arguments stay as they are.
fn foreign(word: &str, text: &str) -> Reply {
    Reply::error(match word {
        "ERR" | "WRONGTYPE" => format!("{word} {text}"),
        "LOADING" | "BUSY" | "MASTERDOWN" | "CLUSTERDOWN" | "TRYAGAIN" => format!("TRYAGAIN Redis says: {word} {text}"),
        _ => format!("ERR Redis says: {word} {text}"),
    })
}

fn timed_out() -> Error {
    Error::Connection(std::io::Error::from(std::io::ErrorKind::TimedOut).into())
}

/// What bounds the answers of commands that are passed on.
struct Meter {
    /// Of the newest connection: one that was given up may still be read.
    budget: RefCell<Arc<Budget>>,
    bytes_max: usize,
    /// One at a time, so that it is known whose bytes come.
    turn: Mutex<()>,
}

/// See the module.
pub struct Reads {
    redis_url: String,
    within: Duration,
    connection: RefCell<Option<Connection>>,
    meter: Option<Meter>,
}

impl Reads {
    /// Each read ends after `within`.
    pub fn new(redis_url: &str, within: Duration) -> Self {
        Self { redis_url: redis_url.to_owned(), within, connection: RefCell::default(), meter: None }
    }

    /// One for [`Reads::pass`], of whose answers at most `bytes_max` are read.
    pub fn passing(redis_url: &str, within: Duration, bytes_max: usize) -> Self {
        let meter = Meter { budget: Budget::new(bytes_max).into(), bytes_max, turn: Mutex::default() };
        Self { meter: Some(meter), ..Self::new(redis_url, within) }
    }

    async fn open(&self) -> Result<Connection, Error> {
        let Some(Meter { budget, bytes_max, .. }) = &self.meter else { return Connection::open(&self.redis_url).await };
        let fresh = Budget::new(*bytes_max);
        *budget.borrow_mut() = Arc::clone(&fresh);
        Connection::open_metered(&self.redis_url, &fresh).await
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
            let mut connection = self.open().await?;
            let result = read(&mut connection).await;
            *self.connection.borrow_mut() = Some(connection);
            result
        };
        match tokio::time::timeout(self.within, reading).await {
            Ok(result) => result,
            Err(_) => {
                self.connection.borrow_mut().take();
                Err(timed_out())
            }
        }
    }

    /// Sends a command that changes nothing, as a client sent it, and returns Redis's answer, be it an error. What is too long is given up as it
    /// comes, and the connection with it.
    pub async fn pass(&self, words: &[Bytes]) -> Result<Reply, Error> {
        let Some(Meter { budget, bytes_max, turn }) = &self.meter else {
            return Err(Error::Unfit("this does not pass commands on".into()));
        };
        let _turn = tokio::time::timeout(self.within, turn.lock()).await.map_err(|_| timed_out())?;
        self.with(async |connection| {
            let mut command = redis::Cmd::new();
            words.iter().for_each(|word| _ = command.arg(&word[..]));
            // Whoever gives up before the answer is there leaves nothing behind that somebody else would get.
            self.connection.take();
            let budget = Arc::clone(&budget.borrow());
            budget.grant(*bytes_max);
            let answer = connection.send(&command).await;
            if let Ok(_) | Err(Error::Refused(_)) = &answer {
                *self.connection.borrow_mut() = Some(connection.clone());
            }
            match answer {
                Ok(value) => Ok(reply(value)),
                Err(Error::Refused(error)) => Ok(foreign(error.code().unwrap_or("ERR"), error.detail().unwrap_or_default())),
                Err(_) if budget.is_spent() => {
                    Ok(Reply::error(format!("ERR the reply has more than {bytes_max} bytes: ask for less, or ask Redis itself")))
                }
                Err(error) => Err(error),
            }
        })
        .await
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

    /// A coupon as Redis has it; `None` where it has none. Errors with [`Error::Unfit`] where this Redis is not the one that was verified.
    pub async fn coupon_info(&self, live: &Live, coupon: &Id) -> Result<Option<CouponInfo>, Error> {
        let key = keys::coupon_info(coupon);
        self.with(async |connection| {
            let epoch = live.epoch.to_string();
            let args = [epoch.as_bytes(), live.run_id.as_bytes()];
            let mut words = trusted(connection.run(&script::COUPON_INFO, &[keys::META, &key], &args).await?)?;
            let Some(total) = words.maybe_integer()? else {
                live.missed(words.integer()?);
                return Ok(None);
            };
            let (issued, used, per_user) = (words.integer()?, words.integer()?, words.integer()?);
            let time = |ms: Option<i64>| ms.filter(|ms| *ms > 0);
            let (start_ms, end_ms) = (time(words.maybe_integer()?), time(words.maybe_integer()?));
            let deleted = words.maybe_text()?.is_some_and(|state| state == "deleted");
            let position = position(&mut words)?;
            Ok(Some(CouponInfo { total, issued, used, per_user, start_ms, end_ms, deleted, position, now_ms: words.integer()? }))
        })
        .await
    }

    /// The coupons that a user holds, by serial; `None` where Redis does not have the coupon. Errors as [`Reads::coupon_info`].
    pub async fn coupon_held(&self, live: &Live, coupon: &Id, user: &Id) -> Result<Option<Vec<Held>>, Error> {
        let (info, users) = (keys::coupon_info(coupon), keys::coupon_users(coupon));
        self.with(async |connection| {
            let epoch = live.epoch.to_string();
            let args = [epoch.as_bytes(), live.run_id.as_bytes(), user.as_bytes()];
            let mut words = trusted(connection.run(&script::COUPON_HELD, &[keys::META, &info, &users], &args).await?)?;
            let exists = words.integer()? > 0;
            let text = words.maybe_text()?;
            if !exists {
                live.missed(words.integer()?);
            }
            let held = text.iter().flat_map(|text| text.lines()).map(Held::parse).collect::<Result<_, _>>()?;
            Ok(exists.then_some(held))
        })
        .await
    }

    /// Goes on with a scan over the products whose id matches the glob.
    pub async fn scan_products(&self, cursor: &str, pattern: &str, count: i64) -> Result<Scanned, Error> {
        self.with(async |connection| {
            let (cursor, found) = scan(connection, cursor, keys::PRODUCT_PREFIX, pattern, count, "string").await?;
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

    /// Goes on with a scan over the coupons whose id matches the glob, with how many can still be issued of each. Those that were deleted are
    /// left out.
    pub async fn scan_coupons(&self, cursor: &str, pattern: &str, count: i64) -> Result<Scanned, Error> {
        self.with(async |connection| {
            let (cursor, found) = scan(connection, cursor, keys::COUPON_INFO_PREFIX, pattern, count, "hash").await?;
            let mut pairs = Vec::with_capacity(found.len());
            for found in found.chunks(REFILL_KEYS) {
                let keys: Vec<&str> = found.iter().map(String::as_str).collect();
                let mut remaining = Words::new(connection.run(&script::COUPON_TERMS, &keys, &[]).await?)?;
                for key in found {
                    let coupon = key.strip_prefix(keys::COUPON_INFO_PREFIX).unwrap_or_default().to_owned();
                    pairs.extend(remaining.maybe_integer()?.map(|remaining| (coupon, remaining)));
                }
            }
            Ok(Scanned { cursor, found: pairs })
        })
        .await
    }
}

/// One step of a scan over the keys of one type behind `prefix`: where the next one goes on, and the keys that an id makes.
async fn scan(
    connection: &mut Connection,
    cursor: &str,
    prefix: &str,
    pattern: &str,
    count: i64,
    kind: &str,
) -> Result<(String, Vec<String>), Error> {
    let mut scan = redis::cmd("SCAN");
    scan.arg(cursor).arg("MATCH").arg(format!("{prefix}{pattern}")).arg("COUNT").arg(count).arg("TYPE").arg(kind);
    let mut words = Words::new(connection.send(&scan).await?)?;
    let cursor = words.text()?;
    let found: Vec<Vec<u8>> = redis::from_redis_value(words.raw()?).map_err(redis::RedisError::from)?;
    let is_of_an_id = |key: &String| key.strip_prefix(prefix).is_some_and(|id| Id::is_valid(id.as_bytes()));
    Ok((cursor, found.into_iter().filter_map(|key| String::from_utf8(key).ok()).filter(is_of_an_id).collect()))
}

/// The answer of a script that says first whether this Redis is the one that was verified.
fn trusted(answer: redis::Value) -> Result<Words, Error> {
    let mut words = Words::new(answer)?;
    match words.text()?.as_str() {
        "ok" => Ok(words),
        word => Err(Error::Unfit(format!("Redis is not as it was verified ({word}), and is being compared with Postgres"))),
    }
}

/// The newest change's position; `0-0` before the first.
fn position(words: &mut Words) -> Result<Position, Error> {
    let Some(text) = words.maybe_text()? else { return Ok(Position::default()) };
    Position::parse(text.as_bytes()).ok_or_else(|| Error::Unexpected(format!("{text:?} where a position belongs")))
}
