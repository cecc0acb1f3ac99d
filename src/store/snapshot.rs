//! What the reconciler reads of Redis: some products at one moment, and which products there are; [`coupons`] likewise.

pub mod coupons;

use super::pack::Pack;
use super::words::Words;
use super::{Connection, Error, keys, script};
use crate::domain::quantity::TOTAL_MAX;
use crate::domain::{Id, InboxMark};

/// Some products at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// n of the newest change then.
    pub n: u64,
    /// Up to where Redis had the inbox then.
    pub mark: InboxMark,
    /// In the order asked for.
    pub products: Vec<Seen>,
}

/// One product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub units: Units,
    /// Why it waits for a person.
    pub frozen: Option<String>,
    /// The units that orders hold; `None` where that is no number.
    pub held: Option<i64>,
}

/// What a product's key holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Units {
    Absent,
    Available(i64),
    /// Something that is no number of units; the text is for people.
    Corrupt(String),
}

/// What became of [`take`] and [`coupons::take`].
#[derive(Debug, PartialEq, Eq)]
pub enum Taken<S> {
    Snapshot(S),
    /// This Redis is not live under that epoch and run id; the script's word for it.
    Refused(String),
}

/// Reads the products if Redis is live under `epoch` and the run id of this connection's process.
pub async fn take(connection: &mut Connection, epoch: u64, products: &[Id]) -> Result<Taken<Snapshot>, Error> {
    let mut names = Pack::default();
    names.array(products.len());
    let mut all_keys = vec![keys::META.to_owned(), keys::FROZEN.to_owned(), keys::HELD.to_owned()];
    for product in products {
        names.text(product.as_str());
        all_keys.push(keys::product(product));
    }
    let all_keys: Vec<&str> = all_keys.iter().map(String::as_str).collect();
    let (epoch, run_id, names) = (epoch.to_string(), connection.run_id().to_owned(), names.into_bytes());
    let mut words = Words::new(connection.run(&script::SNAPSHOT, &all_keys, &[epoch.as_bytes(), run_id.as_bytes(), &names]).await?)?;
    let word = words.text()?;
    if word != "ok" {
        return Ok(Taken::Refused(word));
    }
    let n = u64::try_from(words.integer()?).unwrap_or(0);
    let mark = words.text()?;
    let mark = InboxMark::parse(&mark).ok_or_else(|| Error::Unexpected(format!("{mark:?} where a mark of the inbox belongs")))?;
    let products = products
        .iter()
        .map(|_| Ok(Seen { units: units(words.maybe_text()?), frozen: words.maybe_text()?, held: held(words.maybe_text()?) }));
    Ok(Taken::Snapshot(Snapshot { n, mark, products: products.collect::<Result<_, Error>>()? }))
}

fn held(value: Option<String>) -> Option<i64> {
    value.map_or(Some(0), |text| text.parse().ok())
}

fn units(value: Option<String>) -> Units {
    let Some(text) = value else { return Units::Absent };
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse().ok().filter(|number| digits && *number <= TOTAL_MAX) {
        Some(number) => Units::Available(number),
        None => Units::Corrupt(text.strip_prefix('!').map_or_else(|| format!("{text:?}"), |kind| format!("a {kind}"))),
    }
}

/// Goes on with a scan over the products of Redis, `count` keys further. Returns where the next call goes on, `0` at the end, and the
/// products; keys that no client could name are left out.
pub async fn scan(connection: &mut Connection, cursor: &str, count: usize) -> Result<(String, Vec<String>), Error> {
    scan_behind(connection, keys::PRODUCT_PREFIX, cursor, count).await
}

/// The same for what stands behind `prefix`.
async fn scan_behind(connection: &mut Connection, prefix: &str, cursor: &str, count: usize) -> Result<(String, Vec<String>), Error> {
    let mut scan = redis::cmd("SCAN");
    scan.arg(cursor).arg("MATCH").arg(format!("{prefix}*")).arg("COUNT").arg(count);
    let mut words = Words::new(connection.send(&scan).await?)?;
    let cursor = words.text()?;
    let found: Vec<Vec<u8>> = redis::from_redis_value(words.raw()?).map_err(redis::RedisError::from)?;
    let named = |key: Vec<u8>| {
        let id = key.strip_prefix(prefix.as_bytes()).filter(|id| Id::is_valid(id))?;
        std::str::from_utf8(id).ok().map(str::to_owned)
    };
    Ok((cursor, found.into_iter().filter_map(named).collect()))
}

/// Writes a value over whatever Redis has: what no reconciler may do. The tests must find out that this build does.
#[cfg(feature = "sabotage")]
pub async fn overwrite(connection: &mut Connection, product: &Id, value: i64) -> Result<(), Error> {
    connection.send(redis::cmd("SET").arg(keys::product(product)).arg(value)).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Position;
    use crate::ledger::testing::RedisServer;
    use crate::store::meta::{self, Look};

    #[test]
    fn only_a_plain_decimal_below_the_largest_total_is_a_number_of_units() {
        let read = |text: &str| units(Some(text.to_owned()));
        assert_eq!(units(None), Units::Absent);
        assert_eq!(read("0"), Units::Available(0));
        assert_eq!(read("9007199254740991"), Units::Available(TOTAL_MAX));
        for corrupt in ["", "+5", "-1", "1e3", "9007199254740992", "99999999999999999999999999", "x"] {
            assert_eq!(read(corrupt), Units::Corrupt(format!("{corrupt:?}")));
        }
        assert_eq!(read("!hash"), Units::Corrupt("a hash".into()));
    }

    #[tokio::test]
    async fn products_are_read_at_one_moment_and_only_under_the_right_epoch() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        let products = ["a", "b", "c", "d"].map(Id::from);
        assert_eq!(take(&mut connection, 1, &products).await.unwrap(), Taken::Refused("nometa".into()));
        meta::attach(&mut connection, None, 1).await.unwrap();
        assert_eq!(take(&mut connection, 2, &products).await.unwrap(), Taken::Refused("epoch".into()));
        for command in ["SET stock:product:a 7", "SET stock:product:b x", "HSET stock:product:c f 1", "HSET stock:frozen d why"] {
            let mut words = command.split(' ');
            connection.send(redis::cmd(words.next().unwrap()).arg(words.collect::<Vec<_>>())).await.unwrap();
        }
        let Taken::Snapshot(snapshot) = take(&mut connection, 1, &products).await.unwrap() else { panic!() };
        let seen = |units, frozen: Option<&str>| Seen { units, frozen: frozen.map(str::to_owned), held: Some(0) };
        let expected = [
            seen(Units::Available(7), None),
            seen(Units::Corrupt("\"x\"".into()), None),
            seen(Units::Corrupt("a hash".into()), None),
            seen(Units::Absent, Some("why")),
        ];
        assert_eq!(snapshot, Snapshot { n: 0, mark: InboxMark::default(), products: expected.to_vec() });
        let meta = Look::at(&mut connection, Position::default()).await.unwrap().meta.unwrap();
        assert!(meta.live);
        let (cursor, mut found) = scan(&mut connection, "0", 100).await.unwrap();
        found.sort();
        assert_eq!((cursor.as_str(), found.join(" ")), ("0", "a b c".to_owned()));
    }
}
