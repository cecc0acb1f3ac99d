//! Tries the write scripts on keys of their own, so that a Redis that misses a command, a function or a right is found before the first sale.
//!
//! The keys are named like those in use, with an ending that no id can have: what may touch the ones may touch the others.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::coupon::{self, Coupon, CouponOp};
use super::lane::{Encoded, Family};
use super::requests::Request;
use super::stock::{Action, Items, Stock, StockOp, Upkeep};
use super::words::Words;
use super::{Connection, Error, keys};
use crate::domain::change::StockKind;
use crate::domain::coupon::{CouponStep, CouponTerms};
use crate::domain::{Grain, Id, RequestId};

/// How long a batch may take, in ms.
const WITHIN_MS: i64 = 10_000;

/// How long what a trial left behind stays, in ms: longer than one takes.
const LEFT_FOR_MS: i64 = 600_000;

/// Runs each write script. Errors with [`Error::Unfit`] and what was refused where this Redis
/// cannot run them; nothing is left behind, or for ten minutes where this is broken off.
pub async fn run(connection: &mut Connection) -> Result<(), Error> {
    // Each under a name of its own: what was broken off may have left something.
    let ending = format!(" trial {}", Uuid::new_v4().simple());
    let mut trial = Trial { connection, ending, used: BTreeSet::new(), counter: 0, n: 0 };
    let tried = trial.all().await;
    let cleaned = trial.clean().await;
    match tried.and(cleaned) {
        // Full, read-only, loading: that passes, and each batch is refused for it as long as it lasts.
        Err(error) if error.is_before_any_write() && error.code() != "NOPERM" => Ok(()),
        Err(Error::Refused(error)) => Err(Error::Unfit(format!(
            "this Redis, or what the user of redis.url may do there, does not permit what Holdfast changes it with: {error}"
        ))),
        other => other,
    }
}

struct Trial<'a> {
    connection: &'a mut Connection,
    /// What the keys end with.
    ending: String,
    used: BTreeSet<String>,
    counter: u64,
    /// n of the newest change.
    n: usize,
}

impl Trial<'_> {
    fn key(&mut self, key: &str) -> String {
        let key = format!("{key}{}", self.ending);
        self.used.insert(key.clone());
        key
    }

    async fn all(&mut self) -> Result<(), Error> {
        let (meta, run_id) = (self.key(keys::META), self.connection.run_id().to_owned());
        let fields = ["epoch", "1", "run", &run_id, "state", "live", "n", "0", "last", "-"];
        self.connection.send(redis::cmd("HSET").arg(&meta).arg(&fields)).await?;
        let (a, b) = (Id::from("a"), Id::from("b"));
        let of = |kind, items: &[(&Id, i64)]| {
            let items: Items = items.iter().map(|(product, units)| ((*product).clone(), *units)).collect();
            StockOp::new(Action::Change(kind), items)
        };
        let of_order = |kind, ttl_ms, items: &[(&Id, i64)]| {
            let items: Items = items.iter().map(|(product, units)| ((*product).clone(), *units)).collect();
            StockOp::of_order(Action::Change(kind), Id::from("o"), ttl_ms, items)
        };
        let request = |id| Request::new(RequestId::of_escaped(id), "d".to_owned());
        let set = StockOp { low: Some(1), request: Some(Box::new(request("r"))), ..of(StockKind::Set, &[(&a, 9)]) };
        self.batch::<Stock>(&[set, of(StockKind::Set, &[(&b, 9)])]).await?;
        self.batch::<Stock>(&[
            of(StockKind::Decr, &[(&b, 1)]),
            of_order(StockKind::Reserve, 1_000, &[(&a, 1)]),
            of_order(StockKind::Extend, 1_000, &[]),
            StockOp::upkeep(a.clone(), 0, Upkeep::Freeze { n: 0, reason: "r".to_owned() }),
        ])
        .await?;
        let confirm = of_order(StockKind::Confirm, 0, &[]);
        self.batch::<Stock>(&[confirm, StockOp::upkeep(a, 0, Upkeep::Unfreeze), of(StockKind::Delete, &[(&b, 0)])]).await?;
        let coupon = |action| CouponOp::new(Id::from("c"), action, None);
        let terms = CouponTerms { total: 2, per_user: 1, start_ms: None, end_ms: None };
        let create = CouponOp { is_nowhere: true, request: Some(request("s")), ..coupon(coupon::Action::Create(terms)) };
        let step = |step| coupon(coupon::Action::step(step, Id::from("u")));
        let steps = [CouponStep::Issue, CouponStep::Revoke].map(step);
        let delete = coupon(coupon::Action::Delete);
        self.batch::<Coupon>(&[&[create][..], &steps, &[delete]].concat()).await
    }

    /// Has a script decide a batch, all of which it has to accept.
    async fn batch<F: Family>(&mut self, ops: &[F::Op]) -> Result<(), Error> {
        const WINDOW_MS: i64 = 600_000;
        let now_ms = self.connection.time_ms().await?;
        let generation = now_ms.div_euclid(WINDOW_MS);
        let Encoded { keys, batch, .. } = F::encode(ops.iter(), generation, Grain::Operation);
        let keys: Vec<String> = [keys::META, keys::OUTBOX].into_iter().chain(keys.iter()).map(|key| self.key(key)).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        self.counter += 1;
        let (counter, deadline) = (self.counter.to_string(), (now_ms + WITHIN_MS).to_string());
        let (window, generation, run_id) = (WINDOW_MS.to_string(), generation.to_string(), self.connection.run_id().to_owned());
        let words = ["1", &run_id, "0", &deadline, "trial", &counter, "0", &window, &generation];
        let args: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).chain([batch.as_slice()]).collect();
        let word = Words::new(self.connection.run(F::SCRIPT, &keys, &args).await?)?.text()?;
        for key in &self.used {
            self.connection.send(redis::cmd("PEXPIRE").arg(key).arg(LEFT_FOR_MS)).await?;
        }
        let meta = self.key(keys::META);
        let n = Words::new(self.connection.send(redis::cmd("HMGET").arg(meta).arg("n")).await?)?.text()?;
        self.n += ops.len();
        if word != "ok" || n != self.n.to_string() {
            return Err(Error::Unfit(format!("the script {} does not work on this Redis: it said {word}", F::SCRIPT.name)));
        }
        Ok(())
    }

    async fn clean(&mut self) -> Result<(), Error> {
        let mut cleaned = Ok(());
        // One by one: it may have no right to some of them.
        for key in &self.used {
            let unlinked = self.connection.send(redis::cmd("UNLINK").arg(key)).await.map(drop);
            cleaned = cleaned.and(unlinked);
        }
        cleaned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::RedisServer;
    use crate::store::stream::testing::send;
    use crate::store::survey::Walk;

    #[tokio::test]
    async fn a_redis_that_misses_a_right_is_found_and_nothing_is_left_behind() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        run(&mut connection).await.unwrap();
        for (missing, again) in [("-xadd", "+xadd"), ("-zadd", "+zadd"), ("-hdel", "+hdel"), ("-evalsha", "+evalsha")] {
            send(&mut connection, &["ACL", "SETUSER", "default", missing]).await;
            let why = run(&mut connection).await.unwrap_err().to_string();
            assert!(why.contains("does not permit what Holdfast changes it with: "), "{missing}: {why}");
            send(&mut connection, &["ACL", "SETUSER", "default", again]).await;
        }
        for pattern in ["stock:*", "coupon:*"] {
            send(&mut connection, &["ACL", "SETUSER", "default", "resetkeys", "~holdfast:*", &format!("~{pattern}")]).await;
            assert!(matches!(run(&mut connection).await, Err(Error::Unfit(_))), "only {pattern}");
        }
        send(&mut connection, &["ACL", "SETUSER", "default", "allkeys"]).await;
        run(&mut connection).await.unwrap();
        let left = connection.send(&redis::cmd("DBSIZE")).await.unwrap();
        assert_eq!(left, redis::Value::Int(0));
    }

    #[tokio::test]
    async fn what_a_trial_that_was_broken_off_left_goes_by_itself_and_is_nothing_of_ours() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        let mut trial = Trial { connection: &mut connection, ending: " trial x".to_owned(), used: BTreeSet::new(), counter: 0, n: 0 };
        trial.all().await.unwrap();
        let immortal =
            "local n = 0 for _, key in ipairs(redis.call('KEYS', '*')) do if redis.call('PTTL', key) < 0 then n = n + 1 end end return n";
        let left = connection.send(redis::cmd("EVAL").arg(immortal).arg(0)).await.unwrap();
        assert_eq!(left, redis::Value::Int(0));
        let left = connection.send(&redis::cmd("DBSIZE")).await.unwrap();
        assert!(matches!(left, redis::Value::Int(5..)), "{left:?}");
        let mut walk = Walk::new();
        while let Some(page) = walk.next(&mut connection).await.unwrap() {
            assert!(page.products.is_empty() && page.coupons.is_empty() && page.orders.is_empty(), "it would be adopted");
        }
        run(&mut connection).await.unwrap();
    }
}
