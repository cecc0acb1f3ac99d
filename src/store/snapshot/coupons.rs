//! What the reconciler reads of coupons.

use super::{Taken, scan_behind};
use crate::domain::Id;
use crate::domain::coupon::Counts;
use crate::store::words::Words;
use crate::store::{Connection, Error, keys, script};

/// Some coupons at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// n of the newest change then.
    pub n: u64,
    /// In the order asked for.
    pub coupons: Vec<Seen>,
}

/// One coupon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Absent,
    There(Held),
    /// Something that is no coupon; the text is for people.
    Corrupt(String),
}

/// What Redis has of a coupon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub counts: Counts,
    /// How many users have any.
    pub users: i64,
    pub is_deleted: bool,
    /// Why nothing of it changes.
    pub frozen: Option<String>,
}

/// Reads the coupons if Redis is live under `epoch` and the run id of this connection's process.
pub async fn take(connection: &mut Connection, epoch: u64, coupons: &[Id]) -> Result<Taken<Snapshot>, Error> {
    let of_one = |coupon| [keys::coupon_info(coupon), keys::coupon_users(coupon)];
    let all_keys: Vec<String> = std::iter::once(keys::META.to_owned()).chain(coupons.iter().flat_map(of_one)).collect();
    let all_keys: Vec<&str> = all_keys.iter().map(String::as_str).collect();
    let (epoch, run_id) = (epoch.to_string(), connection.run_id().to_owned());
    let mut words = Words::new(connection.run(&script::COUPON_SNAPSHOT, &all_keys, &[epoch.as_bytes(), run_id.as_bytes()]).await?)?;
    let word = words.text()?;
    if word != "ok" {
        return Ok(Taken::Refused(word));
    }
    let n = u64::try_from(words.integer()?).unwrap_or(0);
    let coupons = coupons.iter().map(|_| seen(&mut words)).collect::<Result<_, Error>>()?;
    Ok(Taken::Snapshot(Snapshot { n, coupons }))
}

fn seen(words: &mut Words) -> Result<Seen, Error> {
    let Some(total) = words.maybe_text()? else { return Ok(Seen::Absent) };
    if let Some(kind) = total.strip_prefix('!') {
        return Ok(Seen::Corrupt(format!("a {kind}")));
    }
    let others = [words.maybe_text()?, words.maybe_text()?, words.maybe_text()?];
    let (state, frozen, users) = (words.maybe_text()?, words.maybe_text()?, words.integer()?);
    let number = |text: Option<&String>| text.and_then(|text| text.parse().ok()).filter(|number: &i64| *number >= 0);
    let [issued, used, serial] = others.each_ref().map(|text| number(text.as_ref()));
    let (Some(total), Some(issued), Some(used), Some(serial)) = (number(Some(&total)), issued, used, serial) else {
        return Ok(Seen::Corrupt("something that is no number".into()));
    };
    let counts = Counts { total, issued, used, serial };
    Ok(Seen::There(Held { counts, users, is_deleted: state.as_deref() == Some("deleted"), frozen }))
}

/// [`scan`](super::scan) over the coupons.
pub async fn scan(connection: &mut Connection, cursor: &str, count: usize) -> Result<(String, Vec<String>), Error> {
    scan_behind(connection, keys::COUPON_INFO_PREFIX, cursor, count).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::RedisServer;
    use crate::store::meta;
    use crate::store::stream::testing::send;

    #[tokio::test]
    async fn coupons_are_read_at_one_moment_with_how_many_have_them() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        let coupons = ["a", "b", "c", "d"].map(Id::from);
        assert_eq!(take(&mut connection, 1, &coupons).await.unwrap(), Taken::Refused("nometa".into()));
        meta::attach(&mut connection, None, 1).await.unwrap();
        let terms = ["total", "9", "issued", "3", "used", "1", "serial", "4"];
        for coupon in ["a", "b", "c"] {
            send(&mut connection, &[&["HSET", &format!("coupon:info:{coupon}")], &terms[..]].concat()).await;
        }
        send(&mut connection, &["HSET", "coupon:info:a", "frozen", "why", "state", "deleted"]).await;
        send(&mut connection, &["HSET", "coupon:users:a", "u", "1 issued 7 -", "v", "2 issued 7 -"]).await;
        send(&mut connection, &["HSET", "coupon:info:b", "used", "-1"]).await;
        send(&mut connection, &["SET", "coupon:users:c", "x"]).await;
        let Taken::Snapshot(snapshot) = take(&mut connection, 1, &coupons).await.unwrap() else { panic!() };
        let counts = Counts { total: 9, issued: 3, used: 1, serial: 4 };
        let a = Held { counts, users: 2, is_deleted: true, frozen: Some("why".into()) };
        let corrupt = |text: &str| Seen::Corrupt(text.into());
        assert_eq!(snapshot.coupons, [Seen::There(a), corrupt("something that is no number"), corrupt("a string"), Seen::Absent]);
        let (_, mut found) = scan(&mut connection, "0", 100).await.unwrap();
        found.sort();
        assert_eq!(found, ["a", "b", "c"]);
    }
}
