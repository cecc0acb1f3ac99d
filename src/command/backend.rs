//! What the handlers of one thread sell with: the lanes to Redis, the reads, the replies that wait for Postgres.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_local};
use tokio_util::sync::CancellationToken;

use super::ack::AckQueue;
use super::coupon::CouponWaiter;
use super::first_use::FirstUse;
use super::stock::StockWaiter;
use crate::limits;
use crate::resp::Pipeline;
use crate::session::Session;
use crate::store::Partition;
use crate::store::coupon::{Coupon, CouponDesk};
use crate::store::lane::{Family as _, Lane};
use crate::store::lock::Locks;
#[cfg(test)]
use crate::store::lock::Settings;
use crate::store::partition::ServerChange;
use crate::store::reads::Reads;
use crate::store::stock::Stock;

/// See the module.
pub struct Backend {
    pub partition: Arc<Partition>,
    pub stock: Rc<Lane<Stock, StockWaiter>>,
    /// Takes some of the clients where the first lane has more than Redis does at once: while the one's batch is at Redis, this thread works on
    /// the other's.
    pub beside: Rc<Lane<Stock, StockWaiter>>,
    pub coupon: Rc<Lane<Coupon, CouponWaiter>>,
    pub acks: Rc<AckQueue>,
    pub reads: Reads,
    pub first_use: FirstUse,
    /// The same of coupons.
    pub first_coupons: FirstUse,
    pub locks: Locks,
    /// How long an operation may take, from the arrival of its command.
    pub within: Duration,
    /// How long its reply may take.
    pub reply_within: Duration,
    /// How long a client is not read that was refused for want of time.
    pub rest: Duration,
}

impl Backend {
    /// Connects to nothing yet; `instance` is this process's own name, `window` how long a REQUEST id is remembered, `reply_within` the time
    /// a command may take, `thread` the number of the thread whose it is, `locks` those of all threads.
    pub fn new(
        partition: Arc<Partition>,
        redis_url: &str,
        instance: &str,
        window: Duration,
        reply_within: Duration,
        thread: usize,
        locks: Locks,
    ) -> Self {
        let within = limits::operation_within(reply_within);
        let name = |lane, number| if number == 0 { format!("{instance}:{lane}") } else { format!("{instance}:{lane}.{number}") };
        let behind = thread + usize::try_from(limits::THREADS_MAX).unwrap_or(usize::MAX);
        let window_ms = i64::try_from(window.as_millis()).unwrap_or(i64::MAX);
        let desk = CouponDesk::new(locks.clone(), within);
        Self {
            stock: Lane::new(Arc::clone(&partition), redis_url, name(Stock::LANE, thread), window_ms, within, ()),
            beside: Lane::new(Arc::clone(&partition), redis_url, name(Stock::LANE, behind), window_ms, within, ()),
            coupon: Lane::new(Arc::clone(&partition), redis_url, name(Coupon::LANE, thread), window_ms, within, desk),
            acks: AckQueue::new(Arc::clone(&partition), redis_url),
            reads: Reads::new(redis_url, within),
            first_use: FirstUse::default(),
            first_coupons: FirstUse::default(),
            locks,
            within,
            reply_within,
            rest: (reply_within / limits::REFUSED_REST_PART).min(limits::REFUSED_REST_MAX),
            partition,
        }
    }

    /// One that never gets anywhere: for tests of what needs no Redis.
    #[cfg(test)]
    pub fn unconnected() -> Self {
        Self::new(
            Arc::new(Partition::new(0, 1 << 20).0),
            "redis://127.0.0.1:1",
            "test",
            Duration::from_secs(600),
            Duration::from_millis(100),
            0,
            Locks::new(Settings {
                redis_url: "redis://127.0.0.1:1".to_owned(),
                instance: "test".to_owned(),
                session_lease: Duration::from_secs(10),
                max_hold: Duration::from_secs(3600),
                max_turn: Duration::from_millis(20),
                coupon_lease: None,
            })
            .0,
        )
    }

    /// How many operations have gone to Redis from this thread.
    pub fn served(&self) -> u64 {
        self.stock.served() + self.beside.served() + self.coupon.served()
    }

    /// The lane for what a client sends now, whose replies are in `pipeline`: the same one for as long as it waits for any, so that what it sends
    /// is decided in its order.
    pub fn stock_for(&self, session: &mut Session, pipeline: &Pipeline) -> &Rc<Lane<Stock, StockWaiter>> {
        // What is in doubt may still be executed: what its client sends now comes behind it.
        if pipeline.in_flight() == 0 && !self.stock_lane(session.is_beside).is_in_doubt() {
            session.is_beside = self.is_shared() && self.beside.queued() < self.stock.queued();
        }
        self.stock_lane(session.is_beside)
    }

    /// The lane of those who are led through the second one, or of the others.
    pub fn stock_lane(&self, is_beside: bool) -> &Rc<Lane<Stock, StockWaiter>> {
        if is_beside { &self.beside } else { &self.stock }
    }

    /// Whether the second lane takes some of the clients.
    fn is_shared(&self) -> bool {
        self.stock.keys_ahead() >= limits::BESIDE_FROM_KEYS && self.beside.is_open()
    }

    /// Whether what clients ask for of products is refused, in whatever lane.
    pub fn is_stock_crowded(&self) -> bool {
        self.stock.is_crowded() && (self.beside.is_crowded() || !self.is_shared())
    }

    /// Starts what works on this thread, and returns the lanes as a future that is to be polled in front of the thread's tasks: as one of them
    /// a lane would wait for its turn behind all the connections that have something to read. After `cancel` they finish what waits; the
    /// future ends when they have.
    pub fn drive(&self, changes: Option<mpsc::Receiver<ServerChange>>, cancel: &CancellationToken) -> impl Future<Output = ()> + use<> {
        if let Some(changes) = changes {
            let again_within = self.within.min(limits::HANDOVER_REPLY_WITHIN);
            let taking_in = take_in(changes, Rc::clone(&self.stock), Rc::clone(&self.coupon), again_within);
            spawn_local(cancel.clone().run_until_cancelled_owned(taking_in));
        }
        let tasks: Vec<JoinHandle<()>> = vec![
            spawn_local(Rc::clone(&self.acks).drive(cancel.clone())),
            spawn_local({
                let (acks, cancel) = (Rc::clone(&self.acks), cancel.clone());
                async move { acks.replicas.drive(cancel).await }
            }),
        ];
        let (stock, beside) = (Rc::clone(&self.stock).drive(cancel.clone()), Rc::clone(&self.beside).drive(cancel.clone()));
        let coupon = Rc::clone(&self.coupon).drive(cancel.clone());
        async {
            tokio::join!(stock, beside, coupon);
            for task in tasks {
                // A panic has been reported where it happened.
                _ = task.await;
            }
        }
    }
}

/// Submits what the server itself asks for. What is done again to a coupon that is locked waits no longer than `again_within`.
async fn take_in(
    mut changes: mpsc::Receiver<ServerChange>,
    stock: Rc<Lane<Stock, StockWaiter>>,
    coupon: Rc<Lane<Coupon, CouponWaiter>>,
    again_within: Duration,
) {
    while let Some(change) = changes.recv().await {
        match change {
            ServerChange::Stock { op, answer } => stock.submit(op, Instant::now(), StockWaiter::Server(answer)),
            ServerChange::Coupon { op, answer } if op.again.is_some() => {
                coupon.submit_until(op, Instant::now() + again_within, CouponWaiter::Server(answer));
            }
            ServerChange::Coupon { op, answer } => coupon.submit(op, Instant::now(), CouponWaiter::Server(answer)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Id;
    use crate::domain::change::StockKind;
    use crate::resp::Reply;
    use crate::store::stock::{Action, StockOp};

    fn wait_in(lane: &Lane<Stock, StockWaiter>, operations: usize) {
        for _ in 0..operations {
            let op = StockOp::new(Action::Change(StockKind::Decr), vec![(Id::from("a"), 1)]);
            lane.submit(op, Instant::now(), StockWaiter::Server(tokio::sync::oneshot::channel().0));
        }
    }

    #[test]
    fn who_waits_for_nothing_goes_where_less_waits_and_everybody_else_stays() {
        let (backend, pipeline) = (Backend::unconnected(), Pipeline::new(Rc::default()));
        let mut session = crate::session::client::tests::session();
        let is_beside = |session: &mut Session| Rc::ptr_eq(backend.stock_for(session, &pipeline), &backend.beside);
        backend.stock.pretend(100, 100, false);
        wait_in(&backend.stock, limits::BESIDE_FROM_KEYS);
        assert!(!is_beside(&mut session), "nothing goes through a lane that is closed");
        backend.beside.pretend(0, 1, false);
        let ticket = pipeline.ticket();
        assert!(!is_beside(&mut session), "it waits for something");
        ticket.complete(Reply::Nil);
        pipeline.pop_ready().unwrap();
        backend.stock.pretend(1, 100, false);
        assert!(!is_beside(&mut session), "all that waits is of one product");
        backend.stock.pretend(100, 100, true);
        assert!(!is_beside(&mut session), "what it was told to be in doubt may still be executed there");
        backend.stock.pretend(100, 100, false);
        assert!(is_beside(&mut session));
        wait_in(&backend.beside, limits::BESIDE_FROM_KEYS);
        let ticket = pipeline.ticket();
        assert!(is_beside(&mut session), "it waits for something");
        ticket.complete(Reply::Nil);
        pipeline.pop_ready().unwrap();
        backend.beside.pretend(0, 1, true);
        assert!(is_beside(&mut session), "something is in doubt here");
        backend.beside.pretend(0, 1, false);
        assert!(!is_beside(&mut session), "as much waits in both");
    }

    #[test]
    fn products_are_crowded_where_no_lane_takes_more() {
        let backend = Backend::unconnected();
        backend.stock.pretend(0, 1, false);
        backend.beside.pretend(0, 1, false);
        wait_in(&backend.stock, limits::LANE_QUEUE_MAX);
        assert!(backend.is_stock_crowded(), "of one product nothing goes through the second one");
        backend.stock.pretend(1, 1, false);
        assert!(!backend.is_stock_crowded());
        wait_in(&backend.beside, limits::LANE_QUEUE_MAX);
        assert!(backend.is_stock_crowded());
    }
}
