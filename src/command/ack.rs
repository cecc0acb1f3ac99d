//! Replies that wait until Postgres has a change.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::replicas::ReplicaQueue;
use crate::domain::Position;
use crate::resp::{Reply, Ticket};
use crate::store::Partition;

struct Waiting {
    ticket: Ticket,
    reply: Reply,
    until: Instant,
}

/// The replies that wait, by position. Each connection's bound on commands in flight bounds it too.
pub struct AckQueue {
    partition: Arc<Partition>,
    waiting: RefCell<BTreeMap<(Position, u64), Waiting>>,
    arrivals: Cell<u64>,
    sooner: Notify,
    next_until: Cell<Option<Instant>>,
    /// The replies that wait for a replica instead.
    pub replicas: ReplicaQueue,
}

impl AckQueue {
    pub fn new(partition: Arc<Partition>, redis_url: &str) -> Rc<Self> {
        Rc::new(Self {
            partition,
            waiting: RefCell::default(),
            arrivals: Cell::new(0),
            sooner: Notify::new(),
            next_until: Cell::new(None),
            replicas: ReplicaQueue::new(redis_url),
        })
    }

    /// Sends `reply` once Postgres has `position`, or `-PENDING` at the end of `timeout`.
    pub fn wait(&self, position: Position, timeout: Duration, ticket: Ticket, reply: Reply) {
        if self.is_applied(position, *self.partition.applied.borrow()) {
            return ticket.complete(reply);
        }
        let until = Instant::now() + timeout;
        self.arrivals.set(self.arrivals.get() + 1);
        self.waiting.borrow_mut().insert((position, self.arrivals.get()), Waiting { ticket, reply, until });
        if self.next_until.get().is_none_or(|next| until < next) {
            self.next_until.set(Some(until));
            self.sooner.notify_one();
        }
    }

    /// Answers what Postgres has confirmed and what has waited long enough, until `cancel` and nobody waits.
    pub async fn drive(self: Rc<Self>, cancel: CancellationToken) {
        let mut applied = self.partition.applied.subscribe();
        let mut ended = self.partition.ended.subscribe();
        loop {
            let idle = self.waiting.borrow().is_empty();
            if cancel.is_cancelled() && idle {
                return;
            }
            let until = self.next_until.get().unwrap_or_else(|| Instant::now() + Duration::from_secs(60));
            tokio::select! {
                changed = applied.changed() => if changed.is_err() { return },
                changed = ended.changed() => if changed.is_err() { return },
                () = self.sooner.notified() => {}
                () = tokio::time::sleep_until(until.into()) => {}
                () = cancel.cancelled(), if idle => {}
            }
            let position = *applied.borrow_and_update();
            self.answer(position);
        }
    }

    fn is_applied(&self, position: Position, applied: Position) -> bool {
        let ended = self.partition.ended.borrow();
        let ended_with_it = || ended.iter().any(|end| end.epoch == position.epoch && end.has(position.n));
        position <= applied && (position.epoch == applied.epoch || ended_with_it())
    }

    fn is_lost(&self, position: Position) -> bool {
        self.partition.ended.borrow().iter().any(|end| end.epoch == position.epoch && end.has_lost(position.n))
    }

    fn answer(&self, applied: Position) {
        let mut waiting = self.waiting.borrow_mut();
        let later = waiting.split_off(&(applied, u64::MAX));
        let mut confirmed = std::mem::replace(&mut *waiting, later);
        // Postgres may be beyond an epoch that ended without a position: where it ended decides, once that is known.
        let unsure: Vec<_> = confirmed.keys().filter(|(position, _)| !self.is_applied(*position, applied)).copied().collect();
        let mut lost = Vec::new();
        for key in unsure {
            let Some(unsure) = confirmed.remove(&key) else { continue };
            if self.is_lost(key.0) {
                lost.push((key.0, unsure));
            } else {
                waiting.insert(key, unsure);
                self.partition.verify.notify_one();
            }
        }
        let now = Instant::now();
        let mut late = Vec::new();
        if self.next_until.get().is_some_and(|until| until <= now) {
            let due: Vec<_> = waiting.iter().filter(|(_, waiting)| waiting.until <= now).map(|(key, _)| *key).collect();
            late.extend(due.into_iter().filter_map(|key| Some((key.0, waiting.remove(&key)?))));
        }
        self.next_until.set(waiting.values().map(|waiting| waiting.until).min());
        drop(waiting);
        for waiting in confirmed.into_values() {
            waiting.ticket.complete(waiting.reply);
        }
        for (position, waiting) in late {
            waiting.ticket.complete(pending(position, "Postgres"));
        }
        for (position, waiting) in lost {
            waiting.ticket.complete(Reply::error(format!(
                "PENDING {position} was lost with Redis's data before Postgres had it: HOLDFAST.AWAIT says so, too; read what there is, and ask again"
            )));
        }
    }
}

/// The error for a change that is done in Redis and not confirmed further; `whom` it waited for.
pub fn pending(position: Position, whom: &str) -> Reply {
    Reply::error(format!(
        "PENDING {position} done in Redis, and not confirmed by {whom} in time: wait for Postgres with HOLDFAST.AWAIT {position}"
    ))
}
