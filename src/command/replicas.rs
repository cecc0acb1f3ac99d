//! Replies that wait until a replica has a change: one WAIT at a time for all of them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::ack::pending;
use crate::domain::Position;
use crate::limits;
use crate::resp::{Reply, Ticket};
use crate::store::Error;
use crate::store::replica::{Replicas, Replicated};

struct Waiting {
    ticket: Ticket,
    reply: Reply,
    until: Instant,
}

/// The replies that wait, by position. Each connection's bound on commands in flight bounds it too.
pub struct ReplicaQueue {
    redis_url: String,
    waiting: RefCell<BTreeMap<(Position, u64), Waiting>>,
    arrivals: Cell<u64>,
    more: Notify,
}

impl ReplicaQueue {
    pub fn new(redis_url: &str) -> Self {
        Self { redis_url: redis_url.to_owned(), waiting: RefCell::default(), arrivals: Cell::new(0), more: Notify::new() }
    }

    /// Sends `reply` once a replica has `position`, or `-PENDING` at the end of `timeout`, also where there is no replica: one that is
    /// just connecting again has that time.
    pub fn wait(&self, position: Position, timeout: Duration, ticket: Ticket, reply: Reply) {
        self.arrivals.set(self.arrivals.get() + 1);
        let key = (position, self.arrivals.get());
        self.waiting.borrow_mut().insert(key, Waiting { ticket, reply, until: Instant::now() + timeout });
        self.more.notify_one();
    }

    /// Asks for whoever waits, until `cancel` and nobody waits.
    pub async fn drive(&self, cancel: CancellationToken) {
        let mut replicas = None;
        loop {
            if self.waiting.borrow().is_empty() {
                tokio::select! {
                    () = self.more.notified() => continue,
                    () = cancel.cancelled() => return,
                }
            }
            match self.while_expiring(self.ask(&mut replicas)).await {
                Ok(replicated) if replicated.confirmed => self.confirm(replicated.position),
                Ok(_) => self.while_expiring(tokio::time::sleep(limits::RECONNECT_MIN)).await,
                Err(_) => {
                    replicas = None;
                    self.while_expiring(tokio::time::sleep(limits::RECONNECT_MIN)).await;
                }
            }
        }
    }

    async fn ask(&self, replicas: &mut Option<Replicas>) -> Result<Replicated, Error> {
        let replicas = match replicas {
            Some(replicas) => replicas,
            none => none.insert(Replicas::open(&self.redis_url).await?),
        };
        replicas.wait(limits::REPLICA_WAIT).await
    }

    /// Runs `future`; meanwhile answers who has waited long enough.
    async fn while_expiring<T>(&self, future: impl Future<Output = T>) -> T {
        tokio::pin!(future);
        loop {
            let until = self.waiting.borrow().values().map(|waiting| waiting.until).min();
            tokio::select! {
                done = &mut future => return done,
                () = tokio::time::sleep_until(until.unwrap_or_else(Instant::now).into()), if until.is_some() => self.expire(),
                () = self.more.notified() => {}
            }
        }
    }

    fn expire(&self) {
        let now = Instant::now();
        let mut late = Vec::new();
        {
            let mut waiting = self.waiting.borrow_mut();
            let due: Vec<_> = waiting.iter().filter(|(_, waiting)| waiting.until <= now).map(|(key, _)| *key).collect();
            late.extend(due.into_iter().filter_map(|key| Some((key.0, waiting.remove(&key)?))));
        }
        for (position, waiting) in late {
            waiting.ticket.complete(pending(position, "a replica"));
        }
    }

    /// A replica has everything of that epoch up to there.
    fn confirm(&self, position: Position) {
        let confirmed = {
            let mut waiting = self.waiting.borrow_mut();
            let mut confirmed = waiting.split_off(&(Position::new(position.epoch, 0), 0));
            let mut later = confirmed.split_off(&(position, u64::MAX));
            waiting.append(&mut later);
            confirmed
        };
        for waiting in confirmed.into_values() {
            waiting.ticket.complete(waiting.reply);
        }
    }
}
