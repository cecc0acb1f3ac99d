//! The combiner: operations gather while a batch is at Redis, and go as the next one when it returns.
//!
//! A lane numbers its batches and has one under way. There is no timer and no added wait when idle; under load one script call
//! serves everybody who waits. A lane lives on one thread, with the connections it serves.
//!
//! Every operation ends within its deadline in one of four ways: decided; surely not executed ([`Failure::Loading`],
//! [`Failure::TryAgain`]); or not known ([`Failure::InDoubt`]). A batch whose answer was lost with its connection is sent again
//! under the same counter, which the guard runs at most once.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::Value;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::clock::Clock;
use super::partition::State;
use super::requests::Request;
use super::script::Script;
use super::words::Words;
use super::{Connection, Error, Partition, keys, stream};
use crate::domain::Position;
use crate::domain::change::Operation;
use crate::limits;

/// Why an operation was not decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Not executed: starting or rebuilding.
    Loading(String),
    /// Not executed: overloaded, Redis away, or being verified.
    TryAgain(String),
    /// Sent, and no answer in time: the id to ask with.
    InDoubt(String),
}

/// What the script said of one operation.
pub enum Verdict<O> {
    Decided(O),
    /// Not executed, worth another try within the deadline; the reason goes to the client if there is none.
    Again(String),
}

/// The positions of a batch's accepted operations, in their order.
pub struct Positions {
    epoch: u64,
    n: u64,
}

impl Positions {
    /// The position of the next accepted operation.
    pub fn next(&mut self) -> Position {
        self.n += 1;
        Position::new(self.epoch, self.n)
    }
}

/// A batch as the script takes it.
pub struct Encoded {
    /// KEYS behind `holdfast:meta` and `holdfast:outbox`.
    pub keys: Vec<String>,
    /// The operations in msgpack.
    pub batch: Vec<u8>,
}

/// One family of operations: what goes into its script and how to read what comes out.
pub trait Family: 'static {
    /// The lane's name in op ids.
    const LANE: &'static str;
    const SCRIPT: &'static Script;
    type Op: 'static;
    type Outcome: 'static;

    fn request(op: &Self::Op) -> Option<&Request>;
    /// How many keys it may add to a batch, and about how many bytes.
    fn weight(op: &Self::Op) -> (usize, usize);
    fn encode<'a>(ops: impl Iterator<Item = &'a Self::Op> + Clone, generation: i64) -> Encoded;
    fn decode(op: &Self::Op, words: &mut Words, positions: &mut Positions) -> Result<Verdict<Self::Outcome>, Error>;
    /// The outcome of an operation that was accepted by a batch whose answer got lost, from its line in the outbox.
    fn replayed(op: &Self::Op, line: &Operation, position: Position) -> Option<Self::Outcome>;
}

/// Who waits for an operation.
pub trait Waiter<F: Family>: 'static {
    fn done(self, op: &F::Op, result: Result<F::Outcome, Failure>);
}

/// An operation on its way. Once its client has been answered it has no waiter any more, but its part of the script's answer still
/// has to be read.
struct Queued<F: Family, W> {
    op: F::Op,
    waiter: Option<W>,
    deadline: Instant,
    /// Why it was not decided when it was last tried.
    again: Option<String>,
}

impl<F: Family, W: Waiter<F>> Queued<F, W> {
    fn finish(&mut self, result: Result<F::Outcome, Failure>) {
        if let Some(waiter) = self.waiter.take() {
            waiter.done(&self.op, result);
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.waiter.is_some() && self.deadline <= now
    }
}

struct Sent<F: Family, W> {
    counter: u64,
    epoch: u64,
    run_id: String,
    encoded: Encoded,
    generation: i64,
    deadline_ms: i64,
    operations: Vec<Queued<F, W>>,
}

const TOO_LATE: &str = "overloaded: Redis did not get to it in time; nothing was changed";

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
    queue: RefCell<VecDeque<Queued<F, W>>>,
    parked: RefCell<Vec<Queued<F, W>>>,
    unpark_at: Cell<Instant>,
    gate: RefCell<Gate>,
    work: Notify,
    counter: Cell<u64>,
    clock: Cell<Clock>,
    was_live: Cell<bool>,
}

impl<F: Family, W: Waiter<F>> Lane<F, W> {
    /// `instance` is the sidecar's own: a fresh one a process start.
    pub fn new(partition: Arc<Partition>, redis_url: &str, instance: &str, window_ms: i64) -> Rc<Self> {
        Rc::new(Self {
            partition,
            redis_url: redis_url.to_owned(),
            name: format!("{instance}:{}", F::LANE),
            window_ms,
            queue: RefCell::default(),
            parked: RefCell::default(),
            unpark_at: Cell::new(Instant::now()),
            gate: RefCell::new(Gate::Closed(Failure::Loading("starting: waiting for Redis and Postgres, see /readyz".into()))),
            work: Notify::new(),
            counter: Cell::new(0),
            clock: Cell::new(Clock::heard(0)),
            was_live: Cell::new(false),
        })
    }

    /// Takes an operation in; it is done within [`limits::REPLY_WITHIN`] of `arrived`.
    pub fn submit(&self, op: F::Op, arrived: Instant, waiter: W) {
        if let Gate::Closed(failure) = &*self.gate.borrow() {
            return waiter.done(&op, Err(failure.clone()));
        }
        let mut queue = self.queue.borrow_mut();
        if queue.len() >= limits::LANE_QUEUE_MAX {
            drop(queue);
            return waiter.done(&op, Err(Failure::TryAgain("overloaded: too many operations are waiting for Redis".into())));
        }
        queue.push_back(Queued { op, waiter: Some(waiter), deadline: arrived + limits::OPERATION_WITHIN, again: None });
        if queue.len() == 1 {
            self.work.notify_one();
        }
    }

    /// How many operations wait to be sent.
    pub fn queued(&self) -> usize {
        self.queue.borrow().len() + self.parked.borrow().len()
    }

    /// Redis's clock as this lane knows it, in Unix ms.
    pub fn redis_now_ms(&self) -> i64 {
        self.clock.get().at(Instant::now())
    }

    /// Serves the lane until `cancel`, and then until nothing waits any more.
    pub async fn drive(self: Rc<Self>, cancel: CancellationToken) {
        let mut unanswered = None;
        let mut pause = Duration::ZERO;
        while !(cancel.is_cancelled() && self.queued() == 0 && unanswered.is_none()) {
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
        let waiting: Vec<_> = self.queue.take().into_iter().chain(self.parked.take()).collect();
        for mut queued in waiting {
            queued.finish(Err(failure.clone()));
        }
    }

    async fn connect(&self, pause: Duration, unanswered: &mut Option<Sent<F, W>>) -> Result<Connection, Error> {
        let connecting = async {
            tokio::time::sleep(pause).await;
            let mut connection = Connection::open(&self.redis_url).await?;
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
        let parked = self.parked.borrow().iter().map(|queued| queued.deadline).min();
        let sent =
            sent.and_then(|sent| sent.operations.iter().filter(|queued| queued.waiter.is_some()).map(|queued| queued.deadline).min());
        let all = [queued, parked, sent];
        all.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + limits::OPERATION_WITHIN)
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
            late.extend(parked.extract_if(.., |queued| queued.is_due(now)));
        }
        for mut queued in late {
            let reason = queued.again.take().unwrap_or_else(|| TOO_LATE.to_owned());
            metrics::counter!("holdfast_expired_total", "lane" => F::LANE).increment(1);
            queued.finish(Err(Failure::TryAgain(reason)));
        }
        if let Some(sent) = sent {
            self.doubt(sent, |queued| queued.is_due(now));
        }
    }

    /// Tells the clients of these operations that it is not known whether they were executed.
    fn doubt(&self, sent: &mut Sent<F, W>, which: impl Fn(&Queued<F, W>) -> bool) {
        for (k, queued) in sent.operations.iter_mut().enumerate().filter(|(_, queued)| queued.waiter.is_some() && which(queued)) {
            metrics::counter!("holdfast_indoubt_total", "lane" => F::LANE).increment(1);
            let id = match F::request(&queued.op) {
                Some(request) => String::from_utf8_lossy(request.id.as_bytes()).into_owned(),
                None => format!("hf-{}:{}-{k}", self.name, sent.counter),
            };
            queued.finish(Err(Failure::InDoubt(id)));
        }
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
                    continue;
                }
                State::Loading(reason) => {
                    self.close(match self.was_live.get() {
                        true => Failure::TryAgain(format!("being verified: {reason}")),
                        false => Failure::Loading(reason),
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
                if cancel.is_cancelled() {
                    return Ok(());
                }
                let parked = !self.parked.borrow().is_empty();
                let something = async {
                    tokio::select! {
                        () = self.work.notified() => Ok(()),
                        () = tokio::time::sleep_until(self.unpark_at.get().into()), if parked => Ok(()),
                        _ = state.changed() => Ok(()),
                        () = cancel.cancelled() => Ok(()),
                        () = tokio::time::sleep(limits::HEARTBEAT_EVERY) => self.heartbeat(connection).await,
                    }
                };
                self.while_expiring(something, unanswered).await?;
                continue;
            };
            self.send(connection, sent, false, unanswered).await?;
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
        self.clock.set(Clock::heard(connection.time_ms().await?));
        self.partition.set_redis_up(true);
        Ok(())
    }

    /// What goes next: as much as waits, within the bounds of a batch.
    fn next_batch(&self, epoch: u64, run_id: &str) -> Option<Sent<F, W>> {
        self.unpark();
        let mut queue = self.queue.borrow_mut();
        let (mut keys, mut bytes, mut count) = (0, 0, 0);
        for queued in queue.iter().take(limits::BATCH_OPERATIONS_MAX) {
            let (more_keys, more_bytes) = F::weight(&queued.op);
            keys += more_keys;
            bytes += more_bytes;
            if count > 0 && (keys > limits::BATCH_KEYS_MAX || bytes > limits::BATCH_BYTES_MAX) {
                break;
            }
            count += 1;
        }
        if count == 0 {
            return None;
        }
        let operations: Vec<_> = queue.drain(..count).collect();
        drop(queue);
        let clock = self.clock.get();
        let youngest = operations.iter().map(|queued| queued.deadline).max().unwrap_or_else(Instant::now);
        let generation = clock.at(Instant::now()).div_euclid(self.window_ms);
        let encoded = F::encode(operations.iter().map(|queued| &queued.op), generation);
        self.counter.set(self.counter.get() + 1);
        metrics::histogram!("holdfast_batch_operations", "lane" => F::LANE).record(u32::try_from(count).unwrap_or(u32::MAX));
        Some(Sent {
            counter: self.counter.get(),
            epoch,
            run_id: run_id.to_owned(),
            encoded,
            generation: if operations.iter().any(|queued| F::request(&queued.op).is_some()) { generation } else { 0 },
            deadline_ms: clock.at(youngest),
            operations,
        })
    }

    async fn resend(&self, connection: &mut Connection, mut sent: Sent<F, W>, unanswered: &mut Option<Sent<F, W>>) -> Result<(), Error> {
        if sent.run_id == connection.run_id() {
            return self.send(connection, sent, true, unanswered).await;
        }
        // Another process: whether the batch ran, and whether that survived, only the ledger can tell.
        self.doubt(&mut sent, |_| true);
        Ok(())
    }

    async fn send(
        &self,
        connection: &mut Connection,
        sent: Sent<F, W>,
        again: bool,
        unanswered: &mut Option<Sent<F, W>>,
    ) -> Result<(), Error> {
        let op = format!("{}:{}", self.name, sent.counter);
        let command = self.command(&sent, connection.run_id(), again, Script::evalsha);
        *unanswered = Some(sent);
        let started = Instant::now();
        let mut answer = self.while_expiring(connection.send(&command), unanswered).await;
        if let (Err(error), Some(sent)) = (&answer, unanswered.as_ref())
            && error.is_no_script()
        {
            let command = self.command(sent, connection.run_id(), again, Script::eval);
            answer = self.while_expiring(connection.send(&command), unanswered).await;
        }
        metrics::histogram!("holdfast_script_seconds", "lane" => F::LANE).record(started.elapsed());
        // A broken connection leaves the batch unanswered, to be sent again over the next.
        let value = match answer {
            Err(error @ (Error::Connection(_) | Error::Unfit(_))) => return Err(error),
            Err(error) => {
                let Some(sent) = unanswered.take() else { return Err(error) };
                return self.refused(sent, again, error);
            }
            Ok(value) => value,
        };
        let Some(sent) = unanswered.take() else { return Ok(()) };
        self.answered(sent, again, &op, value)
    }

    fn command(&self, sent: &Sent<F, W>, run_id: &str, again: bool, verb: Verb) -> redis::Cmd {
        let mut all_keys: Vec<&str> = Vec::with_capacity(sent.encoded.keys.len() + 2);
        all_keys.extend([keys::META, keys::OUTBOX]);
        all_keys.extend(sent.encoded.keys.iter().map(String::as_str));
        let numbers = [
            sent.epoch.to_string(),
            self.partition.head_n().to_string(),
            sent.deadline_ms.to_string(),
            sent.counter.to_string(),
            self.window_ms.to_string(),
            sent.generation.to_string(),
        ];
        let [epoch, seen, deadline, counter, window, generation] = numbers.each_ref().map(|number| number.as_bytes());
        let resend: &[u8] = if again { b"1" } else { b"0" };
        let lane = self.name.as_bytes();
        let args = [epoch, run_id.as_bytes(), seen, deadline, lane, counter, resend, window, generation, &sent.encoded.batch];
        verb(F::SCRIPT, &all_keys, &args)
    }

    /// Redis answered with an error instead of the script's answer.
    fn refused(&self, mut sent: Sent<F, W>, again: bool, error: Error) -> Result<(), Error> {
        let surely_not = error.is_before_any_write() && !again;
        warn!(lane = F::LANE, error = %error, surely_not_executed = surely_not, "redis refused a batch");
        if surely_not {
            self.give_back(sent, &format!("Redis refused: {}; nothing was changed", error.code()));
        } else {
            self.doubt(&mut sent, |_| true);
            self.verify("a script failed");
        }
        if error.is_of_the_role() { Err(error) } else { Ok(()) }
    }

    fn give_back(&self, sent: Sent<F, W>, reason: &str) {
        for mut queued in sent.operations {
            let reason = queued.again.take().unwrap_or_else(|| reason.to_owned());
            queued.finish(Err(Failure::TryAgain(reason)));
        }
    }

    /// Stops selling until the verifier has compared Redis with Postgres again.
    fn verify(&self, why: &str) {
        self.partition.state.send_replace(State::Loading(why.to_owned()));
        self.partition.verify.notify_one();
    }

    fn answered(&self, mut sent: Sent<F, W>, again: bool, op: &str, value: Value) -> Result<(), Error> {
        let mut words = Words::new(value)?;
        let status = words.text()?;
        if words.text()? != op {
            self.doubt(&mut sent, |_| true);
            return Err(Error::Unexpected("an answer to another batch: the connection is out of step".into()));
        }
        self.clock.set(Clock::heard(words.integer()?));
        match status.as_str() {
            "ok" => self.decided(sent, &mut words),
            "replayed" => self.replayed(sent, &mut words),
            "clock" => {
                let mut queue = self.queue.borrow_mut();
                sent.operations.into_iter().rev().filter(|queued| queued.waiter.is_some()).for_each(|queued| queue.push_front(queued));
                Ok(())
            }
            "never" => {
                self.give_back(sent, "not executed");
                Ok(())
            }
            _ if again => {
                self.doubt(&mut sent, |_| true);
                if status != "late" {
                    self.verify("the guard does not match");
                }
                Ok(())
            }
            "late" => {
                self.give_back(sent, TOO_LATE);
                Ok(())
            }
            other => {
                info!(lane = F::LANE, guard = other, "the guard refused a batch, verifying");
                self.give_back(sent, "Redis is being compared with Postgres; nothing was changed");
                self.verify(&format!("the guard found {other}"));
                Ok(())
            }
        }
    }

    fn decided(&self, mut sent: Sent<F, W>, words: &mut Words) -> Result<(), Error> {
        let n = u64::try_from(words.integer()?).unwrap_or(0);
        let mut positions = Positions { epoch: sent.epoch, n };
        for k in 0..sent.operations.len() {
            let queued = &mut sent.operations[k];
            match F::decode(&queued.op, words, &mut positions) {
                Ok(Verdict::Decided(outcome)) => queued.finish(Ok(outcome)),
                Ok(Verdict::Again(reason)) => queued.again = Some(reason),
                Err(error) => {
                    self.doubt(&mut sent, |_| true);
                    return Err(error);
                }
            }
        }
        self.partition.saw(positions.n);
        let again = sent.operations.into_iter().filter(|queued| queued.waiter.is_some());
        let mut parked = self.parked.borrow_mut();
        parked.extend(again);
        self.unpark_at.set(Instant::now() + limits::LOCKED_RETRY_AFTER);
        Ok(())
    }

    /// Puts what was parked back into the queue, before what came later, once its time has come. What has no time left for another try
    /// stays, and ends at its deadline with the reason it was parked for.
    fn unpark(&self) {
        let now = Instant::now();
        if self.unpark_at.get() <= now {
            self.unpark_at.set(now + limits::LOCKED_RETRY_AFTER);
            let in_time = now + limits::LOCKED_RETRY_WITHIN;
            let (again, stay) = self.parked.take().into_iter().partition(|queued| queued.deadline > in_time);
            *self.parked.borrow_mut() = stay;
            let again: Vec<_> = again;
            let mut queue = self.queue.borrow_mut();
            again.into_iter().rev().for_each(|queued| queue.push_front(queued));
        }
    }

    /// The batch had run, and only its answer was lost: its entry in the outbox says what it granted.
    fn replayed(&self, mut sent: Sent<F, W>, words: &mut Words) -> Result<(), Error> {
        let id = words.text()?;
        let entry = match words.raw()? {
            Value::Nil if id == "-" => None,
            Value::Nil => {
                // It was trimmed: only the ledger knows now.
                self.doubt(&mut sent, |_| true);
                return Ok(());
            }
            value => Some(stream::entry(value)?),
        };
        for (k, queued) in sent.operations.iter_mut().enumerate() {
            let granted = entry.iter().flat_map(|entry| (entry.first_n..).zip(&entry.operations));
            let line = granted.into_iter().find(|(_, line)| usize::try_from(line.k) == Ok(k));
            let outcome = line.and_then(|(n, line)| F::replayed(&queued.op, line, Position::new(sent.epoch, n)));
            queued.finish(outcome.ok_or_else(|| Failure::TryAgain("the answer was lost; nothing was changed".into())));
        }
        if let Some(entry) = entry {
            self.partition.saw(entry.last.n);
        }
        Ok(())
    }
}

type Verb = fn(&Script, &[&str], &[&[u8]]) -> redis::Cmd;
