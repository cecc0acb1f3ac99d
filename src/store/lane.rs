//! The combiner: operations gather while a batch is at Redis, and go as the next one when it returns.
//!
//! A lane numbers its batches and has one under way. There is no timer and no added wait when idle; under load one script call
//! serves everybody who waits. A lane lives on one thread, with the connections it serves.
//!
//! Every operation ends within its deadline in one of four ways: decided; surely not executed ([`Failure::Loading`],
//! [`Failure::TryAgain`], [`Failure::Crowded`]); or not known ([`Failure::InDoubt`]). A batch whose answer was lost with its connection is sent again
//! under the same counter, which the guard runs at most once.

mod batch;
mod pace;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::batch::Sent;
use self::pace::Pace;
use super::clock::Clock;
use super::copies::{CopiedBatch, Note};
use super::key_list::KeyList;
use super::partition::State;
use super::requests::{Remembered, Request};
use super::script::Script;
use super::sold_out::SoldOut;
use super::words::Words;
use super::{Connection, Error, Partition};
use crate::domain::change::Operation;
use crate::domain::request;
use crate::domain::{Grain, Position};
use crate::limits;

/// Why an operation was not decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Not executed: starting or rebuilding.
    Loading(String),
    /// Not executed: overloaded, Redis away, or being verified.
    TryAgain(String),
    /// Not executed: more operations wait than are served in time.
    Crowded,
    /// Sent, and no answer in time: the id to ask with.
    InDoubt(String),
}

/// What the script said of one operation.
pub enum Verdict<O> {
    Decided(O),
    /// Not executed, worth another try within the deadline; the reason goes to the client if there is none.
    Again(String),
    /// The same, and so is all that is behind it in its batch: that goes with the next one.
    Later(String),
    /// The same, and what its client asks for behind it comes behind it again.
    SentBack(String),
    /// The same, for what it was admitted by is lost.
    Lost(String),
}

/// The positions of a batch's accepted operations, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Positions {
    epoch: u64,
    before: u64,
    n: u64,
}

impl Positions {
    /// Those behind `position`.
    pub(super) fn after(position: Position) -> Self {
        Self { epoch: position.epoch, before: position.n, n: position.n }
    }

    /// The position of the newest accepted operation, if there is any.
    fn newest(&self) -> Option<Position> {
        (self.n > self.before).then(|| Position::new(self.epoch, self.n))
    }

    /// Passes over some, which others take.
    pub fn skip(&mut self, count: u64) {
        self.n += count;
    }

    /// The position of the one that has so many of them in front of it.
    pub fn behind(&self, count: u64) -> Position {
        Position::new(self.epoch, self.n + count + 1)
    }

    /// The position of the next accepted operation.
    pub fn take(&mut self) -> Position {
        self.n += 1;
        Position::new(self.epoch, self.n)
    }
}

/// A batch as the script takes it.
pub struct Encoded<P> {
    /// KEYS behind `holdfast:meta` and `holdfast:outbox`.
    pub keys: KeyList,
    /// The operations in msgpack.
    pub batch: Vec<u8>,
    /// What its answer is read by.
    pub plan: P,
}

/// What says which operations of a family may go to Redis now.
pub trait Desk<Op>: 'static {
    /// Lets an operation go with the next batch, or says why it has to wait. Where one has to, the desk rings when that may have changed.
    fn admit(&self, op: &mut Op) -> Result<(), Rc<str>>;
    /// What had to wait is asked about again, in the order in which it came.
    fn again(&self);
    /// How soon what has to wait is asked about again where the desk does not ring before.
    fn retry_after(&self) -> Duration {
        limits::LOCKED_RETRY_AFTER
    }
    /// The script did not take an operation; why. It waits, and so has to what comes behind it.
    fn sent_back(&self, op: &Op, why: &Rc<str>);
    /// What an operation was admitted by is lost.
    fn lost(&self, op: &Op);
    /// The batch under way is over.
    fn returned(&self);
    /// What it rings.
    fn bell(&self) -> Rc<Bell>;
}

/// Where every operation may go at any time.
impl<Op> Desk<Op> for () {
    fn admit(&self, _: &mut Op) -> Result<(), Rc<str>> {
        Ok(())
    }

    fn again(&self) {}

    fn sent_back(&self, _: &Op, _: &Rc<str>) {}

    fn lost(&self, _: &Op) {}

    fn returned(&self) {}

    fn bell(&self) -> Rc<Bell> {
        Rc::default()
    }
}

/// Makes a lane look at what waits, and at what is parked.
#[derive(Default)]
pub struct Bell {
    work: Notify,
    /// When what is parked is asked about again.
    again_at: Cell<Option<Instant>>,
    /// Not before that, unless something has changed.
    not_before: Cell<Option<Instant>>,
}

impl Bell {
    /// What is parked may go now.
    pub fn ring(&self) {
        self.not_before.set(None);
        self.ring_by(Instant::now());
        self.work.notify_one();
    }

    /// What is parked is asked about again at this time, if not before.
    fn ring_by(&self, at: Instant) {
        let at = self.not_before.get().map_or(at, |earliest| earliest.max(at));
        let earliest = self.again_at.get().map_or(at, |known| known.min(at));
        self.again_at.set(Some(earliest));
    }

    /// What is parked is not asked about before this time, unless something has changed until then.
    fn rest_until(&self, at: Instant) {
        self.not_before.set(Some(at));
    }

    /// Whether what is parked is to be asked about again; says so once.
    fn has_rung(&self, now: Instant) -> bool {
        let rung = self.again_at.get().is_some_and(|at| at <= now);
        if rung {
            self.again_at.set(None);
        }
        rung
    }
}

/// One family of operations: what goes into its script and how to read what comes out.
pub trait Family: 'static {
    /// The lane's name in op ids.
    const LANE: &'static str;
    const SCRIPT: &'static Script;
    /// Keys that every batch names, whatever is in it.
    const FIXED_KEYS: usize;
    type Op: 'static;
    type Outcome: 'static;
    /// What the answer to a batch is read by.
    type Plan: 'static;
    /// What says which operations may go.
    type Desk: Desk<Self::Op>;

    /// Whether it may change anything: what only reads is never in doubt.
    fn changes(op: &Self::Op) -> bool;
    fn request(op: &Self::Op) -> Option<&Request>;
    /// Has the script look up the operation's REQUEST by itself from now on.
    fn leave_alone(_: &mut Self::Op) {}
    /// Whether a client asked for it. What the server itself asks for goes on while the outbox or the copies are full.
    fn is_of_a_client(_: &Self::Op) -> bool {
        true
    }
    /// Whether of some operations anything is.
    const FOREKNOWS: bool = false;
    /// What is known of an operation that was asked for at `asked` without asking Redis.
    fn foreknown(_: &SoldOut, _: &Self::Op, _asked: Instant) -> Option<Self::Outcome> {
        None
    }
    /// Whether it may turn what is foreknown of any operation: then what comes after it goes to Redis until it is over.
    fn may_turn_all(_: &Self::Op) -> bool {
        false
    }
    /// Called with every operation that goes to Redis; it is over by `deadline`.
    fn goes(_: &SoldOut, _: &Self::Op, _deadline: Instant) {}
    /// What Redis, which was asked at `asked`, said of an operation.
    fn learn(_: &SoldOut, _: &Self::Op, _: &Self::Outcome, _asked: Instant) {}
    /// How many keys it may add to a batch, and about how many bytes.
    fn weight(op: &Self::Op) -> (usize, usize);
    /// `grain`: what a line stands for of what carries no REQUEST.
    fn encode<'a>(ops: impl Iterator<Item = &'a Self::Op> + Clone, generation: i64, grain: Grain) -> Encoded<Self::Plan>;
    /// Reads what became of each operation, in their order; `positions` begins in front of the first that was accepted.
    fn read<'a>(
        plan: &Self::Plan,
        ops: impl Iterator<Item = &'a Self::Op> + Clone,
        words: &mut Words,
        positions: &mut Positions,
    ) -> Result<Vec<Verdict<Self::Outcome>>, Error>;
    /// What a copy of the operation has to know of its outcome; `None` where Postgres has nothing to be told of it that it could lose.
    fn note(op: &Self::Op, outcome: &Self::Outcome) -> Option<Note>;
    /// Keeps a copy of the operation at place `k` in that of its batch, in memory of its own.
    fn keep(batch: &mut CopiedBatch, k: u32, op: &Self::Op, note: Note);
    /// The outcome of an operation that was accepted by a batch whose answer got lost, from its line in the outbox.
    fn replayed(op: &Self::Op, line: &Operation, position: Position) -> Option<Self::Outcome>;
    /// Whether a change in the ledger is what the operation asks for, as far as the ledger says.
    fn is_same(op: &Self::Op, line: &Operation) -> bool;
    /// The outcome that a memory of its REQUEST is.
    fn remembered(remembered: Remembered) -> Self::Outcome;
}

/// Who waits for an operation.
pub trait Waiter<F: Family>: 'static {
    fn done(self, op: &F::Op, result: Result<F::Outcome, Failure>);

    /// Whether an operation that is about to go to Redis has to come behind another one of its client, which is not in the lane now: then it is
    /// given back, with [`Self::take_back`].
    fn comes_behind(&self, _op: &F::Op) -> bool {
        false
    }

    /// Takes back what was submitted and did not go to Redis; it may be submitted again.
    fn take_back(self, op: F::Op)
    where
        Self: Sized,
    {
        self.done(&op, Err(Failure::TryAgain("it comes behind something that is not done yet; nothing was changed".into())));
    }
}

/// An operation on its way. Once its client has been answered it has no waiter any more, but its part of the script's answer still
/// has to be read.
struct Queued<F: Family, W> {
    op: F::Op,
    waiter: Option<W>,
    deadline: Instant,
    /// Which in the order in which they came.
    number: u64,
    /// Why it was not decided when it was last tried.
    again: Option<Rc<str>>,
    /// Counted, for as long as it is on its way, where [`Family::may_turn_all`].
    _turning: Option<Turning>,
}

/// One that is counted until it is dropped.
struct Turning(Rc<Cell<usize>>);

impl Turning {
    fn count(counted: &Rc<Cell<usize>>) -> Self {
        counted.set(counted.get() + 1);
        Self(Rc::clone(counted))
    }
}

impl Drop for Turning {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

impl<F: Family, W: Waiter<F>> Queued<F, W> {
    fn finish(&mut self, result: Result<F::Outcome, Failure>) {
        if let Some(waiter) = self.waiter.take() {
            waiter.done(&self.op, result);
        }
    }

    /// Whether it has to come behind another one, and is to be taken back.
    fn comes_behind(&self) -> bool {
        self.waiter.as_ref().is_some_and(|waiter| waiter.comes_behind(&self.op))
    }

    fn take_back(self) {
        if let Some(waiter) = self.waiter {
            waiter.take_back(self.op);
        }
    }

    /// What it is served by: the time it has left, then who came first.
    fn place(&self) -> (Instant, u64) {
        (self.deadline, self.number)
    }

    /// Why it was not done: what it was parked for, else `otherwise`.
    fn why_not(&mut self, otherwise: &str) -> String {
        self.again.take().as_deref().unwrap_or(otherwise).to_owned()
    }

    fn is_due(&self, now: Instant) -> bool {
        self.waiter.is_some() && self.deadline <= now
    }
}

/// Whether anybody still waits for the batch.
fn waits<F: Family, W>(sent: Option<&Sent<F, W>>) -> bool {
    sent.is_some_and(|sent| sent.operations.iter().any(|queued| queued.waiter.is_some()))
}

/// How a lane stands with Redis.
#[derive(Clone, Debug)]
enum Gate {
    Open,
    Closed(Failure),
}

/// See the module.
pub struct Lane<F: Family, W: Waiter<F>> {
    partition: Arc<Partition>,
    redis_url: String,
    /// `<instance>:<lane>`, the lane's field in meta.
    name: String,
    window_ms: i64,
    within: Duration,
    queue: RefCell<VecDeque<Queued<F, W>>>,
    /// The memory of a batch that is over.
    spare: Cell<VecDeque<Queued<F, W>>>,
    /// What has to wait, by its [`Queued::place`]. It goes in front of the queue, and does not count as part of it.
    parked: RefCell<VecDeque<Queued<F, W>>>,
    /// Whether not all that is parked was asked about yet, for want of room in a batch.
    more_to_ask: Cell<bool>,
    /// How many operations have come.
    arrivals: Cell<u64>,
    desk: F::Desk,
    bell: Rc<Bell>,
    gate: RefCell<Gate>,
    counter: Cell<u64>,
    clock: Cell<Clock>,
    was_live: Cell<bool>,
    /// How many operations are on their way that [`Family::may_turn_all`].
    turning: Rc<Cell<usize>>,
    batch_operations: metrics::Histogram,
    script_seconds: metrics::Histogram,
    /// What large batches take, one after the other: what waits longer than that permits is refused as it comes.
    pace: Pace,
    /// The keys and the operations of the last batch that was not a small one.
    keys: Cell<(usize, usize)>,
    /// Whether an operation of the batch under way has ended in doubt: it may still be executed.
    in_doubt: Cell<bool>,
}

impl<F: Family, W: Waiter<F>> Lane<F, W> {
    /// `name`: `<instance>:<lane>`, a fresh one a process start. Each operation is done `within` that time of its arrival.
    pub fn new(partition: Arc<Partition>, redis_url: &str, name: String, window_ms: i64, within: Duration, desk: F::Desk) -> Rc<Self> {
        Rc::new(Self {
            bell: desk.bell(),
            desk,
            partition,
            redis_url: redis_url.to_owned(),
            name,
            window_ms,
            within,
            queue: RefCell::default(),
            spare: Cell::default(),
            parked: RefCell::default(),
            more_to_ask: Cell::new(false),
            arrivals: Cell::new(0),
            gate: RefCell::new(Gate::Closed(Failure::Loading("starting: waiting for Redis and Postgres, see /readyz".into()))),
            counter: Cell::new(0),
            clock: Cell::new(Clock::heard(0)),
            was_live: Cell::new(false),
            turning: Rc::default(),
            batch_operations: metrics::histogram!("holdfast_batch_operations", "lane" => F::LANE),
            script_seconds: metrics::histogram!("holdfast_script_seconds", "lane" => F::LANE),
            pace: Pace::new(within),
            keys: Cell::new((0, 1)),
            in_doubt: Cell::new(false),
        })
    }

    /// Takes an operation in; it is done within the lane's time of `arrived`.
    pub fn submit(&self, op: F::Op, arrived: Instant, waiter: W) {
        self.submit_between(op, arrived, arrived + self.within, waiter);
    }

    /// Takes an operation in; it is done by `deadline`.
    pub fn submit_until(&self, op: F::Op, deadline: Instant, waiter: W) {
        self.submit_between(op, Instant::now(), deadline, waiter);
    }

    fn submit_between(&self, op: F::Op, asked: Instant, deadline: Instant, waiter: W) {
        if let Some(failure) = self.closed() {
            return waiter.done(&op, Err(failure));
        }
        if let Some(outcome) = self.foreknown(&op, asked) {
            return waiter.done(&op, Ok(outcome));
        }
        if F::changes(&op) && F::is_of_a_client(&op) {
            if let Some(why) = self.partition.bound.refusal() {
                return waiter.done(&op, Err(Failure::TryAgain(format!("{why}; nothing was changed"))));
            }
            if self.partition.copies.is_full() {
                return waiter.done(&op, Err(Failure::TryAgain("overloaded: Postgres is too far behind; nothing was changed".into())));
            }
        }
        let queue_max = if F::is_of_a_client(&op) { self.pace.queue_max() } else { limits::LANE_QUEUE_MAX };
        if self.queue.borrow().len() >= queue_max {
            return waiter.done(&op, Err(Failure::Crowded));
        }
        let mut queue = self.queue.borrow_mut();
        F::goes(&self.partition.sold_out, &op, deadline);
        let turning = F::may_turn_all(&op).then(|| Turning::count(&self.turning));
        let number = self.arrivals.get() + 1;
        self.arrivals.set(number);
        let queued = Queued { op, waiter: Some(waiter), deadline, number, again: None, _turning: turning };
        // By deadline, so that what is at the front ends first. Only what is tried again does not belong at the back.
        match queue.iter().rposition(|before| before.deadline <= deadline).map_or(0, |before| before + 1) {
            back if back == queue.len() => queue.push_back(queued),
            at => queue.insert(at, queued),
        }
        if queue.len() == 1 {
            self.bell.work.notify_one();
        }
    }

    /// What is known of an operation that was asked for at `asked` without asking Redis.
    pub fn foreknown(&self, op: &F::Op, asked: Instant) -> Option<F::Outcome> {
        if !F::FOREKNOWS || self.turning.get() > 0 || !self.is_open() {
            return None;
        }
        F::foreknown(&self.partition.sold_out, op, asked)
    }

    /// Whether what a client asks for now is refused, whatever it is: more waits than is served in time. Where notes of sold-out products may
    /// answer it without Redis it is not. What is parked keeps nothing else from being served.
    pub fn is_crowded(&self) -> bool {
        let may_be_foreknown = F::FOREKNOWS && !self.partition.sold_out.refuses_nobody();
        self.queue.borrow().len() >= self.pace.queue_max() && !may_be_foreknown && self.is_open()
    }

    /// How many operations have gone to Redis.
    pub fn served(&self) -> u64 {
        self.pace.served()
    }

    /// Why nothing is done now; `None` while the lane is open.
    pub fn closed(&self) -> Option<Failure> {
        match &*self.gate.borrow() {
            Gate::Open => None,
            Gate::Closed(failure) => Some(failure.clone()),
        }
    }

    /// The current generation of REQUEST ids, judged from here.
    pub fn generation(&self) -> i64 {
        self.clock.get().at(Instant::now()).div_euclid(self.window_ms)
    }

    /// As if Redis had been reached, the last batch had been of so many keys and operations, and another one had ended in doubt or not.
    #[cfg(test)]
    pub fn pretend(&self, keys: usize, operations: usize, in_doubt: bool) {
        *self.gate.borrow_mut() = Gate::Open;
        self.keys.set((keys, operations));
        self.in_doubt.set(in_doubt);
    }

    /// Whether operations are taken in.
    pub fn is_open(&self) -> bool {
        matches!(*self.gate.borrow(), Gate::Open)
    }

    /// Whether what was answered `INDOUBT` here may still be executed.
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt.get()
    }

    /// About how many keys Redis has to touch for what waits to be sent: 0 until a batch has told it.
    pub fn keys_ahead(&self) -> usize {
        let (keys, operations) = self.keys.get();
        self.queue.borrow().len() * keys / operations
    }

    /// How many operations wait to be sent, those that are parked among them.
    pub fn queued(&self) -> usize {
        self.queue.borrow().len() + self.parked.borrow().len()
    }

    /// Serves the lane until `cancel`, and then until nothing waits any more.
    pub async fn drive(self: Rc<Self>, cancel: CancellationToken) {
        let mut unanswered = None;
        let mut pause = Duration::ZERO;
        while !(cancel.is_cancelled() && self.queued() == 0 && !waits(unanswered.as_ref())) {
            match self.connect(pause, &mut unanswered).await {
                Ok(mut connection) => {
                    pause = Duration::ZERO;
                    self.partition.set_redis_up(true);
                    if let Err(error) = self.serve(&mut connection, &mut unanswered, &cancel).await {
                        warn!(lane = F::LANE, error = %error, "lost the connection to redis, connecting again");
                        self.partition.verify.notify_one();
                    }
                }
                Err(error) => {
                    if pause.is_zero() {
                        warn!(lane = F::LANE, error = %error, "cannot reach redis, trying on");
                    }
                    self.partition.set_redis_up(false);
                    self.close(self.away());
                    pause = (pause * 2).clamp(limits::RECONNECT_MIN, limits::RECONNECT_MAX);
                }
            }
        }
        self.close(Failure::Loading("shutting down".into()));
    }

    fn away(&self) -> Failure {
        if self.was_live.get() {
            Failure::TryAgain("Redis cannot be reached; nothing was changed".into())
        } else {
            Failure::Loading("starting: Redis cannot be reached yet".into())
        }
    }

    fn close(&self, failure: Failure) {
        *self.gate.borrow_mut() = Gate::Closed(failure.clone());
        self.partition.sold_out.clear();
        let waiting: Vec<_> = self.queue.take().into_iter().chain(self.parked.take()).collect();
        for mut queued in waiting {
            queued.finish(Err(failure.clone()));
        }
    }

    async fn connect(&self, pause: Duration, unanswered: &mut Option<Sent<F, W>>) -> Result<Connection, Error> {
        let connecting = async {
            tokio::time::sleep(pause).await;
            let mut connection = Connection::open_driven(&self.redis_url).await?;
            self.clock.set(Clock::heard(connection.time_ms().await?));
            Ok(connection)
        };
        self.while_expiring(connecting, unanswered).await
    }

    /// Runs `future`; meanwhile ends what reaches its deadline, in the queue and in the batch under way.
    async fn while_expiring<T>(&self, future: impl Future<Output = T>, sent: &mut Option<Sent<F, W>>) -> T {
        tokio::pin!(future);
        loop {
            let deadline = self.next_deadline(sent.as_ref());
            tokio::select! {
                biased;
                done = &mut future => return done,
                () = tokio::time::sleep_until(deadline.into()) => self.expire(sent.as_mut()),
            }
        }
    }

    fn next_deadline(&self, sent: Option<&Sent<F, W>>) -> Instant {
        let queued = self.queue.borrow().front().map(|queued| queued.deadline);
        let parked = self.parked.borrow().front().map(|queued| queued.deadline);
        let sent =
            sent.and_then(|sent| sent.operations.iter().filter(|queued| queued.waiter.is_some()).map(|queued| queued.deadline).min());
        let all = [queued, parked, sent];
        all.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + self.within)
    }

    fn expire(&self, sent: Option<&mut Sent<F, W>>) {
        let now = Instant::now();
        let mut late = Vec::new();
        {
            let mut queue = self.queue.borrow_mut();
            while queue.front().is_some_and(|queued| queued.is_due(now)) {
                late.extend(queue.pop_front());
            }
            let mut parked = self.parked.borrow_mut();
            let due = parked.partition_point(|queued| queued.deadline <= now);
            late.extend(parked.drain(..due));
        }
        for mut queued in late {
            let reason = queued.why_not(self.too_late());
            metrics::counter!("holdfast_expired_total", "lane" => F::LANE).increment(1);
            queued.finish(Err(Failure::TryAgain(reason)));
        }
        if let Some(sent) = sent {
            // One script call has what the queue leaves of an operation's time; what had waited for longer says little about Redis.
            let lost = self.doubt(sent, |queued| queued.is_due(now));
            self.in_doubt.set(self.in_doubt.get() || lost);
            let enough = if lost { self.within / limits::QUEUE_PART } else { self.within };
            if now.saturating_duration_since(sent.since) >= enough {
                self.partition.set_redis_up(false);
            }
        }
    }

    /// Ends what is too late to be sent: it would end in doubt. What the server itself asks for may: it is asked for again anyway.
    fn drop_late(&self) {
        let now = Instant::now();
        let (in_time, in_time_for_us) = (now + self.pace.sent_within(), now + limits::SEND_WITHIN);
        let late: Vec<_> = {
            let mut queue = self.queue.borrow_mut();
            let count = queue.iter().take_while(|queued| queued.deadline <= in_time).count();
            let is_late = |queued: &Queued<F, W>| F::is_of_a_client(&queued.op) || queued.deadline <= in_time_for_us;
            let (late, stay): (Vec<_>, Vec<_>) = queue.drain(..count).partition(is_late);
            stay.into_iter().rev().for_each(|queued| queue.push_front(queued));
            late
        };
        for mut queued in late {
            metrics::counter!("holdfast_expired_total", "lane" => F::LANE).increment(1);
            let reason = queued.why_not(self.too_late());
            queued.finish(Err(Failure::TryAgain(reason)));
        }
    }

    fn too_late(&self) -> &'static str {
        match self.partition.redis_up() {
            true => "overloaded: Redis did not get to it in time; nothing was changed",
            false => "Redis does not answer; nothing was changed",
        }
    }

    /// Tells the clients of these operations that it is not known whether they were executed. Returns whether there were any.
    fn doubt(&self, sent: &mut Sent<F, W>, which: impl Fn(&Queued<F, W>) -> bool) -> bool {
        let mut any = false;
        for (k, queued) in (0..).zip(&mut sent.operations).filter(|(_, queued)| queued.waiter.is_some() && which(queued)) {
            any = true;
            if !F::changes(&queued.op) {
                queued.finish(Err(Failure::TryAgain("Redis does not answer".into())));
                continue;
            }
            metrics::counter!("holdfast_indoubt_total", "lane" => F::LANE).increment(1);
            let id = match F::request(&queued.op) {
                Some(request) => String::from_utf8_lossy(request.id.as_bytes()).into_owned(),
                None => request::Sent { lane: self.name.clone(), counter: sent.counter, k }.id(),
            };
            queued.finish(Err(Failure::InDoubt(id)));
        }
        any
    }

    /// Serves over one connection until it breaks.
    async fn serve(
        &self,
        connection: &mut Connection,
        unanswered: &mut Option<Sent<F, W>>,
        cancel: &CancellationToken,
    ) -> Result<(), Error> {
        let mut state = self.partition.state.subscribe();
        loop {
            let current = state.borrow_and_update().clone();
            let epoch = match current {
                State::Live { epoch, run_id } if run_id == connection.run_id() => epoch,
                State::Live { .. } => {
                    self.partition.verify.notify_one();
                    self.close(Failure::TryAgain("Redis was restarted and is being compared with Postgres; nothing was changed".into()));
                    self.idle(connection, &mut state, unanswered).await?;
                    if cancel.is_cancelled() {
                        return Ok(());
                    }
                    continue;
                }
                State::Loading(_) | State::Rebuilding(_) => {
                    self.close(match current {
                        State::Loading(reason) if self.was_live.get() => Failure::TryAgain(format!("being verified: {reason}")),
                        State::Loading(reason) | State::Rebuilding(reason) => Failure::Loading(reason),
                        State::Live { .. } => continue,
                    });
                    self.idle(connection, &mut state, unanswered).await?;
                    if cancel.is_cancelled() {
                        return Ok(());
                    }
                    continue;
                }
            };
            if !self.was_live.replace(true) {
                info!(lane = F::LANE, epoch, "selling");
            }
            *self.gate.borrow_mut() = Gate::Open;
            if let Some(sent) = unanswered.take() {
                self.resend(connection, sent, unanswered).await?;
                continue;
            }
            let Some(sent) = self.next_batch(epoch, connection.run_id()) else {
                if cancel.is_cancelled() && self.queued() == 0 {
                    return Ok(());
                }
                let again_at = self.bell.again_at.get().filter(|_| !self.parked.borrow().is_empty());
                let something = async {
                    tokio::select! {
                        () = self.bell.work.notified() => Ok(()),
                        () = tokio::time::sleep_until(again_at.unwrap_or_else(Instant::now).into()), if again_at.is_some() => Ok(()),
                        _ = state.changed() => Ok(()),
                        () = cancel.cancelled(), if !cancel.is_cancelled() => Ok(()),
                        () = tokio::time::sleep(limits::HEARTBEAT_EVERY) => self.heartbeat(connection).await,
                    }
                };
                self.while_expiring(something, unanswered).await?;
                continue;
            };
            // Where it was full by keys or bytes, that many more are a batch, too.
            let enough = if self.queued() > 0 { sent.operations.len() } else { limits::BATCH_OPERATIONS_MAX };
            self.send(connection, sent, false, unanswered).await?;
            self.gather(enough).await;
        }
    }

    /// Lets those who were answered ask for more, before the next batch goes: one turn of the thread writes their replies, and what comes of them is
    /// read in the next. Not where `enough` wait.
    async fn gather(&self, enough: usize) {
        for _ in 0..limits::GATHER_TURNS {
            if self.queue.borrow().len() >= enough {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    async fn idle(
        &self,
        connection: &mut Connection,
        state: &mut tokio::sync::watch::Receiver<State>,
        unanswered: &mut Option<Sent<F, W>>,
    ) -> Result<(), Error> {
        let changed = async {
            tokio::select! {
                _ = state.changed() => Ok(()),
                () = tokio::time::sleep(limits::HEARTBEAT_EVERY) => self.heartbeat(connection).await,
            }
        };
        self.while_expiring(changed, unanswered).await
    }

    /// Notices a broken connection while nothing is sent over it.
    async fn heartbeat(&self, connection: &mut Connection) -> Result<(), Error> {
        let asking = connection.time_ms();
        tokio::pin!(asking);
        let time_ms = match tokio::time::timeout(limits::HEARTBEAT_WITHIN, &mut asking).await {
            Ok(time_ms) => time_ms,
            Err(_) => {
                self.partition.set_redis_up(false);
                asking.await
            }
        };
        self.clock.set(Clock::heard(time_ms?));
        self.partition.set_redis_up(true);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Id;
    use crate::domain::change::StockKind;
    use crate::domain::coupon::CouponStep;
    use crate::store::copies::CopiedBatch;
    use crate::store::coupon::{self, Coupon, CouponDesk, CouponOp, CouponOutcome};
    use crate::store::lock::{self, Locks};
    use crate::store::stock::{Action, Stock, StockOp, StockOutcome, Upkeep};

    #[derive(Clone, Default)]
    struct Told(Rc<RefCell<Vec<Result<StockOutcome, Failure>>>>);

    impl Waiter<Stock> for Told {
        fn done(self, _: &StockOp, result: Result<StockOutcome, Failure>) {
            self.0.borrow_mut().push(result);
        }
    }

    struct Untold;

    impl Waiter<Coupon> for Untold {
        fn done(self, op: &CouponOp, result: Result<CouponOutcome, Failure>) {
            panic!("{op:?}: {result:?}");
        }
    }

    #[test]
    fn a_full_queue_is_a_crowd_unless_a_note_may_answer_without_it() {
        let decr = || StockOp::new(Action::Change(StockKind::Decr), vec![(Id::from("a"), 1)]);
        let partition = Arc::new(Partition::new(0, 1 << 20).0.refusing_for(Duration::from_millis(50)));
        let within = Duration::from_secs(60);
        let lane = Lane::<Stock, Told>::new(Arc::clone(&partition), "redis://127.0.0.1:1", "i:stock".into(), 600_000, within, ());
        *lane.gate.borrow_mut() = Gate::Open;
        let told = Told::default();
        for _ in 0..lane.pace.queue_max() {
            assert!(!lane.is_crowded());
            lane.submit(decr(), Instant::now(), told.clone());
        }
        assert!(lane.is_crowded() && told.0.borrow().is_empty());
        lane.submit(decr(), Instant::now(), told.clone());
        assert_eq!(*told.0.borrow(), [Err(Failure::Crowded)]);
        partition.sold_out.had(&Id::from("b"), 0, Instant::now());
        assert!(!lane.is_crowded());
        partition.sold_out.clear();
        *lane.gate.borrow_mut() = Gate::Closed(Failure::Loading("closed".into()));
        assert!(!lane.is_crowded(), "that is said instead");
    }

    #[test]
    fn what_is_parked_is_bounded_by_itself_and_keeps_nothing_else_out() {
        let decr = || StockOp::new(Action::Change(StockKind::Decr), vec![(Id::from("a"), 1)]);
        let partition = Arc::new(Partition::new(0, 1 << 20).0);
        let lane = Lane::<Stock, Told>::new(partition, "redis://127.0.0.1:1", "i:stock".into(), 600_000, Duration::from_secs(60), ());
        *lane.gate.borrow_mut() = Gate::Open;
        let told = Told::default();
        let park = |count: usize| {
            for _ in 0..count {
                lane.submit(decr(), Instant::now(), told.clone());
                let mut queued = lane.queue.borrow_mut().pop_front().unwrap();
                queued.again = Some("somebody holds it".into());
                lane.park(queued, limits::LOCKED_RETRY_AFTER);
            }
        };
        park(limits::LANE_QUEUE_MAX);
        assert!(told.0.borrow().is_empty() && !lane.is_crowded());
        park(1);
        assert_eq!(*told.0.borrow(), [Err(Failure::TryAgain("somebody holds it".into()))]);
        lane.submit(decr(), Instant::now(), told.clone());
        assert_eq!((lane.queue.borrow().len(), told.0.borrow().len()), (1, 1));
    }

    #[test]
    fn redis_is_down_once_a_script_call_has_had_its_time_whoever_waits_for_it() {
        let within = Duration::from_secs(60);
        let partition = Arc::new(Partition::new(0, 1 << 20).0);
        let lane = Lane::<Stock, Told>::new(Arc::clone(&partition), "redis://127.0.0.1:1", "i:stock".into(), 600_000, within, ());
        *lane.gate.borrow_mut() = Gate::Open;
        partition.set_redis_up(true);
        let told = Told::default();
        lane.submit(StockOp::new(Action::Change(StockKind::Decr), vec![(Id::from("a"), 1)]), Instant::now(), told.clone());
        let mut sent = lane.next_batch(1, "run").unwrap();
        sent.operations[0].deadline = Instant::now();
        lane.expire(Some(&mut sent));
        assert!(matches!(told.0.borrow()[..], [Err(Failure::InDoubt(_))]));
        assert!(partition.redis_up(), "it had waited for long before it was sent");
        sent.since -= within;
        lane.expire(Some(&mut sent));
        assert!(!partition.redis_up(), "nobody waits for it any more, and it is not answered");
        partition.set_redis_up(true);
        lane.submit(StockOp::new(Action::Change(StockKind::Decr), vec![(Id::from("a"), 1)]), Instant::now(), told.clone());
        let mut sent = lane.next_batch(1, "run").unwrap();
        sent.operations[0].deadline = Instant::now();
        sent.since -= within / limits::QUEUE_PART;
        lane.expire(Some(&mut sent));
        assert!(!partition.redis_up(), "an operation's time ended while it was under way for long enough");
        assert!(lane.is_in_doubt());
        let op = format!("i:stock:{}", sent.counter);
        let answer = ["ok".to_owned(), op.clone()].map(|word| redis::Value::BulkString(word.into_bytes()));
        lane.answered(sent, false, &op, redis::Value::Array(answer.into_iter().chain([redis::Value::Int(5)]).collect())).unwrap_err();
        assert!(partition.redis_up(), "it has answered, whatever that is");
    }

    #[test]
    fn of_the_issues_that_wait_for_an_elided_lock_one_tries_and_nothing_else_waits_for_them() {
        let settings = lock::Settings {
            redis_url: "redis://127.0.0.1:1".into(),
            instance: "i".into(),
            session_lease: Duration::from_secs(10),
            max_hold: Duration::from_secs(60),
            max_turn: Duration::ZERO,
            coupon_lease: None,
        };
        let within = Duration::from_secs(60);
        let desk = CouponDesk::new(Locks::new(settings).0, within);
        let partition = Arc::new(Partition::new(0, 1 << 20).0);
        let lane = Lane::<Coupon, Untold>::new(partition, "redis://127.0.0.1:1", "i:coupon".into(), 600_000, within, desk);
        *lane.gate.borrow_mut() = Gate::Open;
        let submit = |coupon: &str, step, user: &str| {
            let mut op = CouponOp::new(Id::from(coupon), coupon::Action::step(step, Id::from(user)), None);
            op.client = 1;
            lane.submit(op, Instant::now(), Untold);
        };
        let next = || lane.next_batch(1, "run").map_or_else(Vec::new, |sent| Vec::from(sent.operations));
        let names =
            |batch: &[Queued<Coupon, Untold>]| -> Vec<String> { batch.iter().map(|queued| format!("{:?}", queued.op.action)).collect() };
        let send_back = |batch: Vec<Queued<Coupon, Untold>>| {
            for mut queued in batch {
                let why = Rc::from("somebody holds it");
                lane.desk.sent_back(&queued.op, &why);
                queued.again = Some(why);
                lane.park(queued, Duration::ZERO);
            }
            lane.desk.returned();
            // Some time later.
            lane.bell.again_at.set(Some(Instant::now()));
        };
        for user in 0..5_000 {
            submit("a", CouponStep::Issue, &format!("u-{user}"));
        }
        submit("a", CouponStep::Use, "u-4000");
        let first = next();
        assert_eq!(first.len(), limits::BATCH_OPERATIONS_MAX);
        let oldest = names(&first[..1]);
        send_back(first);
        for _ in 0..3 {
            submit("b", CouponStep::Issue, "u");
            let batch = next();
            assert_eq!(
                (names(&batch[..1]), batch.len(), lane.queue.borrow().len()),
                (oldest.clone(), 2, 0),
                "the one of b goes with the oldest of a"
            );
            let mut tried = batch;
            tried.truncate(1);
            send_back(tried);
            assert_eq!(lane.parked.borrow().len(), 5_001);
        }
        // It is free.
        assert_eq!(next().len(), 1);
        lane.desk.returned();
        let mut issued = Vec::new();
        for _ in 0..10 {
            issued.append(&mut names(&next()));
        }
        assert_eq!((issued.len(), lane.queued()), (5_000, 0));
        let at = |step: &str| issued.iter().position(|name| name.contains(step) && name.contains("u-4000")).unwrap();
        assert!(at("Issue") < at("Use"), "what is behind an issue comes behind it");
    }

    #[test]
    fn what_comes_behind_something_that_is_not_in_the_lane_is_given_back_and_does_not_go_to_redis() {
        #[derive(Clone)]
        struct Behind(&'static str, Rc<RefCell<Vec<String>>>);

        impl Waiter<Stock> for Behind {
            fn done(self, op: &StockOp, result: Result<StockOutcome, Failure>) {
                panic!("{op:?}: {result:?}");
            }

            fn comes_behind(&self, op: &StockOp) -> bool {
                op.items[0].0 == Id::from(self.0)
            }

            fn take_back(self, op: StockOp) {
                self.1.borrow_mut().push(op.items[0].0.to_string());
            }
        }

        let partition = Arc::new(Partition::new(0, 1 << 20).0);
        let lane = Lane::<Stock, Behind>::new(partition, "redis://127.0.0.1:1", "i:stock".into(), 600_000, Duration::from_secs(60), ());
        *lane.gate.borrow_mut() = Gate::Open;
        let taken_back = Rc::default();
        for product in ["a", "b", "a", "c"] {
            let op = StockOp::new(Action::Change(StockKind::Decr), vec![(Id::from(product), 1)]);
            lane.submit(op, Instant::now(), Behind("a", Rc::clone(&taken_back)));
        }
        let goes: Vec<String> =
            lane.next_batch(1, "run").unwrap().operations.iter().map(|queued| queued.op.items[0].0.to_string()).collect();
        assert_eq!((goes, taken_back.take()), (vec!["b".to_owned(), "c".to_owned()], vec!["a".to_owned(), "a".to_owned()]));
    }

    #[test]
    fn what_is_parked_is_not_asked_about_before_its_time_unless_something_has_changed() {
        let (bell, now) = (Bell::default(), Instant::now());
        let at = |ms| now + Duration::from_millis(ms);
        bell.rest_until(at(50));
        bell.ring_by(at(5));
        assert!(!bell.has_rung(at(49)) && bell.has_rung(at(50)) && !bell.has_rung(at(50)));
        bell.ring_by(at(5));
        bell.ring();
        assert!(bell.has_rung(Instant::now()), "something has changed");
        bell.ring_by(at(5));
        assert!(bell.has_rung(at(5)));
    }

    #[test]
    fn full_copies_refuse_what_clients_change_and_nothing_else() {
        let op = |action| StockOp::new(action, vec![(Id::from("a"), 1)]);
        let decr = || op(Action::Change(StockKind::Decr));
        let partition = Arc::new(Partition::new(0, 1).0);
        let note = Note::at(Position::new(1, 1));
        let mut sold = CopiedBatch::new("i:stock:1".into(), 7, 1);
        Stock::keep(&mut sold, 0, &decr(), note);
        partition.copies.keep(sold);
        let lane = Lane::<Stock, Told>::new(partition, "redis://127.0.0.1:1", "i:stock".into(), 600_000, Duration::from_secs(60), ());
        *lane.gate.borrow_mut() = Gate::Open;
        let told = Told::default();
        lane.submit(StockOp::upkeep(Id::from("a"), 0, Upkeep::Freeze { n: 0, reason: "r".into() }), Instant::now(), told.clone());
        lane.submit(op(Action::Read), Instant::now(), told.clone());
        assert_eq!((lane.queued(), told.0.borrow().len()), (2, 0));
        lane.submit(decr(), Instant::now(), told.clone());
        let refused = told.0.borrow();
        assert!(matches!(&refused[..], [Err(Failure::TryAgain(why))] if why.contains("too far behind")), "{refused:?}");
        assert_eq!(lane.queued(), 2);
    }
}
