//! Expires orders whose time has passed, by Redis's clock: their units come back through the write script, like any change.
//!
//! One sidecar does it at a time, by a lease in Redis; that an order expires once is the script's doing. What Redis has lost sight of, which
//! can happen to an order that was saved late out of a Redis that lost its data, is found in Postgres.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::counter;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::retry::Trouble;
use crate::domain::change::StockKind;
use crate::domain::{Id, OrderState};
use crate::ledger::{self, order};
use crate::limits::{
    EXPIRE_AT_ONCE, EXPIRE_EVERY, LEDGER_SILENCE_MAX, OUTBOX_ANSWER_TIMEOUT, OVERDUE_AFTER_MS, OVERDUE_EVERY, STUCK_FOR_MS,
};
use crate::store::expiry::{self, Due};
use crate::store::partition::State;
use crate::store::stock::{Action, Items, Looked, StockOp, StockOutcome};
use crate::store::{Connection, Partition};

/// Orders with what Postgres has of them.
type Overdue = Vec<(Id, Looked)>;

/// What became of orders that were due.
struct Swept {
    /// How many have expired.
    expired: usize,
    /// Those that do not, each with until when it is held, if that is why.
    not: Vec<(Id, Option<i64>)>,
}

/// See the module.
pub struct Expirer {
    partition: Arc<Partition>,
    redis_url: String,
    postgres_url: String,
    instance: String,
    redis: Option<Connection>,
    /// When it was last looked in Postgres.
    looked: Option<Instant>,
    /// How many of the oldest there could not expire: it is looked behind them.
    passed_over: usize,
    /// Looks there. Nothing that is due waits for it.
    looking: Option<AbortOnDropHandle<Result<Option<Overdue>, String>>>,
    trouble: Trouble,
    trouble_looking: Trouble,
}

impl Expirer {
    pub fn new(partition: Arc<Partition>, redis_url: &str, postgres_url: &str, instance: &str) -> Self {
        Self {
            partition,
            redis_url: redis_url.to_owned(),
            postgres_url: postgres_url.to_owned(),
            instance: instance.to_owned(),
            redis: None,
            looked: None,
            passed_over: 0,
            looking: None,
            trouble: Trouble::new("expiring orders"),
            trouble_looking: Trouble::new("looking for orders that were held for too long"),
        }
    }

    /// Works until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut pause = EXPIRE_EVERY;
        while cancel.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
            let run_id = match &*self.partition.state.borrow() {
                State::Live { run_id, .. } => run_id.clone(),
                State::Loading(_) | State::Rebuilding(_) => continue,
            };
            pause = match self.round(&run_id).await {
                Ok(more) => {
                    self.trouble.over(self.partition.id);
                    if more { Duration::ZERO } else { EXPIRE_EVERY }
                }
                Err(why) => {
                    self.redis = None;
                    self.trouble.failed(self.partition.id, &why).max(EXPIRE_EVERY)
                }
            };
        }
    }

    /// Expires some. Returns whether there may be more that are due.
    async fn round(&mut self, run_id: &str) -> Result<bool, String> {
        let redis = match &mut self.redis {
            Some(redis) if redis.run_id() == run_id => redis,
            other => other.insert(Connection::open(&self.redis_url).await.map_err(|error| error.to_string())?),
        };
        let asking = tokio::time::timeout(OUTBOX_ANSWER_TIMEOUT, expiry::due(redis, &self.instance, EXPIRE_AT_ONCE));
        let due = asking.await.map_err(|_| "Redis does not answer".to_owned())?.map_err(|error| error.to_string())?;
        let Some(Due { now_ms, orders }) = due else { return Ok(false) };
        let orders: Vec<_> = orders.into_iter().map(|order| (order, Looked::NotYet)).collect();
        let is_full = orders.len() == EXPIRE_AT_ONCE;
        let Swept { expired, not } = self.expire(orders).await;
        let has_advanced = expired > 0 || !not.is_empty();
        let not: Vec<_> = not.into_iter().map(|(order, until)| (order, until.unwrap_or(now_ms + STUCK_FOR_MS))).collect();
        if let (Some(redis), false) = (&mut self.redis, not.is_empty()) {
            let postponing = tokio::time::timeout(OUTBOX_ANSWER_TIMEOUT, expiry::postpone(redis, &self.instance, &not));
            postponing.await.map_err(|_| "Redis does not answer".to_owned())?.map_err(|error| error.to_string())?;
        }
        self.expire_overdue().await;
        if self.looking.is_none() && self.partition.ledger_up() && self.looked.is_none_or(|looked| looked.elapsed() >= OVERDUE_EVERY) {
            self.looked = Some(Instant::now());
            let overdue = overdue(Arc::clone(&self.partition), self.postgres_url.clone(), now_ms, self.passed_over);
            self.looking = Some(AbortOnDropHandle::new(tokio::spawn(overdue)));
        }
        Ok(is_full && has_advanced)
    }

    async fn expire(&mut self, orders: Vec<(Id, Looked)>) -> Swept {
        let op = |(order, looked): &(Id, Looked)| {
            let mut op = StockOp::of_order(Action::Change(StockKind::Expire), order.clone(), 0, Items::new());
            if let Some(of) = &mut op.order {
                of.looked = looked.clone();
            }
            op
        };
        let outcomes = self.partition.change_all(orders.iter().map(op).collect()).await;
        let (mut expired, mut not, mut broken) = (0, Vec::new(), None);
        for ((order, looked), outcome) in orders.into_iter().zip(outcomes) {
            match outcome {
                Ok(StockOutcome::Told { .. }) => expired += 1,
                Ok(StockOutcome::Stuck { key }) => {
                    broken.get_or_insert((order.clone(), key));
                    not.push((order, None));
                }
                // The list is what is wrong: nothing is known of an order that stands there, or it is held for longer, or not at all.
                Ok(StockOutcome::Unknown) if looked == Looked::NotYet => not.push((order, None)),
                Ok(StockOutcome::Stands(stands)) => {
                    not.push((order, (stands.state == OrderState::Held).then_some(stands.expires_ms)));
                }
                // It is found again.
                Ok(_) | Err(_) => {}
            }
        }
        if let Some((order, key)) = broken {
            let orders = not.len();
            warn!(partition = self.partition.id, orders, %order, key, "orders cannot expire: their keys hold what does not belong there");
        }
        counter!("holdfast_orders_expired_total", "partition" => self.partition.id.to_string()).increment(expired as u64);
        Swept { expired, not }
    }

    /// Expires what has been found in Postgres, if it has been looked there.
    async fn expire_overdue(&mut self) {
        let Some(looking) = self.looking.take_if(|looking| looking.is_finished()) else { return };
        // Another sidecar may have expired since what was found before it had the right to, and Redis may have forgotten that by now.
        if self.looked.is_none_or(|looked| looked.elapsed() >= OVERDUE_EVERY) {
            return;
        }
        match looking.await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(None) => {}
            Ok(Some(orders)) => {
                self.trouble_looking.over(self.partition.id);
                let found = orders.len();
                if found == 0 {
                    self.passed_over = 0;
                } else {
                    let Swept { expired, not } = self.expire(orders).await;
                    self.passed_over = if found == EXPIRE_AT_ONCE { self.passed_over + not.len() } else { 0 };
                    warn!(partition = self.partition.id, found, expired, "orders were held in postgres long after their time");
                }
            }
            Err(why) => _ = self.trouble_looking.failed(self.partition.id, &why),
        }
    }
}

/// What Postgres holds long after its time; `None` where it does not hear of everything in time: what became of an order may be forgotten in Redis
/// before Postgres knows.
async fn overdue(partition: Arc<Partition>, postgres_url: String, now_ms: i64, behind: usize) -> Result<Option<Overdue>, String> {
    if !partition.has_reached_postgres().await {
        return Ok(None);
    }
    let [behind, limit] = [behind, EXPIRE_AT_ONCE].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
    let reading = async {
        let mut postgres = ledger::connect(&postgres_url).await?;
        order::overdue(&mut postgres, partition.id, now_ms - OVERDUE_AFTER_MS, behind, limit).await
    };
    let rows = tokio::time::timeout(LEDGER_SILENCE_MAX, reading).await.map_err(|_| "Postgres does not answer".to_owned())?;
    let rows = rows.map_err(|error| error.to_string())?;
    let order = |row: order::OrderRow| Ok((Id::from(row.order.as_str()), Looked::Found(row.order()?)));
    rows.into_iter().map(order).collect::<Result<_, ledger::Error>>().map(Some).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Order, OrderState, Position};

    #[tokio::test]
    async fn what_was_found_long_ago_expires_nothing() {
        let (partition, receivers) = Partition::new(0, 1 << 20);
        let mut changes = receivers.changes;
        let mut expirer = Expirer::new(Arc::new(partition), "redis://127.0.0.1:1", "postgres://127.0.0.1:1", "i");
        let items = vec![("a".to_owned(), 1)];
        let order = Order { state: OrderState::Held, expires_ms: 1, items, position: Position::new(1, 1) };
        let now = Instant::now();
        for (looked, is_expired) in [(now, true), (now.checked_sub(OVERDUE_EVERY).unwrap(), false)] {
            let found = vec![(Id::from("o"), Looked::Found(order.clone()))];
            let looking = tokio::spawn(async { Ok(Some(found)) });
            while !looking.is_finished() {
                tokio::task::yield_now().await;
            }
            (expirer.looked, expirer.looking) = (Some(looked), Some(AbortOnDropHandle::new(looking)));
            // Nobody carries it out.
            let asked =
                async { tokio::time::timeout(Duration::from_millis(200), changes.recv()).await.is_ok_and(|change| change.is_some()) };
            let (asked, ()) = tokio::join!(asked, expirer.expire_overdue());
            assert_eq!(asked, is_expired);
            assert!(expirer.looking.is_none());
        }
    }
}
