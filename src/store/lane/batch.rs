//! A lane's batches: made, sent, and their answers read.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use redis::Value;
use tracing::{info, warn};

use super::Encoded;
use super::{Desk as _, Failure, Family, Lane, Positions, Queued, Verdict, Waiter};
use crate::domain::Position;
use crate::domain::change::{Entry, Operation};
use crate::limits;
use crate::store::clock::Clock;
use crate::store::copies::{CopiedBatch, Note};
use crate::store::partition::State;
use crate::store::script::Script;
use crate::store::words::Words;
use crate::store::{Connection, Error, keys, stream};

/// A batch that was sent, or is about to be.
pub(super) struct Sent<F: Family, W> {
    pub(super) counter: u64,
    epoch: u64,
    run_id: String,
    encoded: Encoded<F::Plan>,
    generation: i64,
    deadline_ms: i64,
    /// When it was made, to be sent for the first time.
    made: Instant,
    /// When it was sent last.
    pub(super) since: Instant,
    pub(super) operations: VecDeque<Queued<F, W>>,
}

/// The keys that every script of a lane is told before those of its batch: meta and the outbox.
const FRAME_KEYS: usize = 2;

/// A batch that is being made.
struct Batch<F: Family, W> {
    operations: VecDeque<Queued<F, W>>,
    /// How many have been admitted, some of which may still be where they waited.
    count: usize,
    keys: usize,
    bytes: usize,
}

impl<F: Family, W> Batch<F, W> {
    /// Whether one more of this [`Family::weight`] fits.
    fn has_room_for(&self, (keys, bytes): (usize, usize)) -> bool {
        let within_bounds = self.keys + keys <= limits::BATCH_KEYS_MAX && self.bytes + bytes <= limits::BATCH_BYTES_MAX;
        self.count == 0 || (within_bounds && self.count < limits::BATCH_OPERATIONS_MAX)
    }

    /// Counts one more.
    fn admit(&mut self, (keys, bytes): (usize, usize)) {
        self.count += 1;
        self.keys += keys;
        self.bytes += bytes;
    }

    /// Takes the first `count` of the queue. They are large: where those are all, they are not moved one by one.
    fn take(&mut self, queue: &mut VecDeque<Queued<F, W>>, count: usize) {
        if count == queue.len() && self.operations.is_empty() {
            std::mem::swap(&mut self.operations, queue);
        } else {
            self.operations.extend(queue.drain(..count));
        }
    }
}

/// Why one of the queue does not go.
enum Stays {
    /// It comes behind another one of its client, which is not in the queue.
    Behind,
    /// It has to wait; why.
    Waits(Rc<str>),
}

type Verb = fn(&Script, &[&str], &[&[u8]]) -> redis::Cmd;

impl<F: Family, W: Waiter<F>> Lane<F, W> {
    /// What goes next: as much as waits, within the bounds of a batch.
    pub(super) fn next_batch(&self, epoch: u64, run_id: &str) -> Option<Sent<F, W>> {
        self.drop_late();
        let operations = self.take_next()?;
        let clock = self.clock.get();
        let youngest = operations.iter().map(|queued| queued.deadline).max().unwrap_or_else(Instant::now);
        let generation = clock.at(Instant::now()).div_euclid(self.window_ms);
        let encoded = F::encode(operations.iter().map(|queued| &queued.op), generation, self.partition.grain);
        if operations.len() >= limits::BATCH_OPERATIONS_MAX / 8 || !self.queue.borrow().is_empty() {
            self.keys.set((encoded.keys.len() + FRAME_KEYS - F::FIXED_KEYS, operations.len()));
        }
        self.counter.set(self.counter.get() + 1);
        self.batch_operations.record(u32::try_from(operations.len()).unwrap_or(u32::MAX));
        Some(Sent {
            counter: self.counter.get(),
            epoch,
            run_id: run_id.to_owned(),
            encoded,
            generation: if operations.iter().any(|queued| F::request(&queued.op).is_some()) { generation } else { 0 },
            deadline_ms: clock.at(youngest),
            made: Instant::now(),
            since: Instant::now(),
            operations,
        })
    }

    /// Takes what goes next, and parks what has to wait; `None` where nothing may go.
    fn take_next(&self) -> Option<VecDeque<Queued<F, W>>> {
        self.desk.returned();
        let mut batch = Batch { operations: self.spare.take(), count: 0, keys: 0, bytes: 0 };
        self.take_parked(&mut batch);
        // What comes later may come behind what is still to be asked about.
        if !self.more_to_ask.get() {
            self.take_queued(&mut batch);
        }
        if batch.operations.is_empty() {
            self.spare(batch.operations);
            self.pace.rests();
            return None;
        }
        self.pace.sent(batch.operations.len(), !self.queue.borrow().is_empty());
        Some(batch.operations)
    }

    /// Takes of what is parked what may go by now, if that is to be asked. What has no time left for another try stays, and ends at its deadline
    /// with the reason it was parked for.
    fn take_parked(&self, batch: &mut Batch<F, W>) {
        let now = Instant::now();
        if self.bell.has_rung(now) {
            self.desk.again();
        } else if !self.more_to_ask.get() {
            return;
        }
        let in_time = now + self.pace.sent_within().max(limits::LOCKED_RETRY_WITHIN);
        let mut parked = self.parked.borrow_mut();
        let (mut stay, mut some_wait) = (Vec::new(), false);
        self.more_to_ask.set(false);
        while let Some(mut queued) = parked.pop_front() {
            let weight = F::weight(&queued.op);
            if !batch.has_room_for(weight) {
                parked.push_front(queued);
                self.more_to_ask.set(true);
                break;
            }
            if queued.deadline <= in_time {
                stay.push(queued);
                continue;
            }
            match self.desk.admit(&mut queued.op) {
                Ok(()) => {
                    batch.admit(weight);
                    batch.operations.push_back(queued);
                }
                Err(reason) => {
                    queued.again = Some(reason);
                    some_wait = true;
                    stay.push(queued);
                }
            }
        }
        if some_wait {
            // However many there are, asking takes a small part of the time.
            self.bell.rest_until(now + now.elapsed() * limits::PARKED_ASKED_PART);
            self.bell.ring_by(now + self.desk.retry_after());
        }
        stay.into_iter().rev().for_each(|queued| parked.push_front(queued));
    }

    /// Takes as much of the queue as fits the batch.
    fn take_queued(&self, batch: &mut Batch<F, W>) {
        loop {
            let mut queue = self.queue.borrow_mut();
            let (mut goes, mut stays) = (0, None);
            for queued in queue.iter_mut() {
                let weight = F::weight(&queued.op);
                if !batch.has_room_for(weight) {
                    break;
                }
                stays = match queued.comes_behind() {
                    true => Some(Stays::Behind),
                    false => self.desk.admit(&mut queued.op).err().map(Stays::Waits),
                };
                if stays.is_some() {
                    break;
                }
                batch.admit(weight);
                goes += 1;
            }
            batch.take(&mut queue, goes);
            let Some((stays, queued)) = stays.and_then(|stays| Some((stays, queue.pop_front()?))) else { return };
            drop(queue);
            match stays {
                Stays::Behind => queued.take_back(),
                Stays::Waits(reason) => self.try_again(queued, reason, self.desk.retry_after()),
            }
        }
    }

    /// Lets an operation wait until the desk rings, and no longer than `after`; refuses it where too many do.
    pub(super) fn park(&self, mut queued: Queued<F, W>, after: Duration) {
        let mut parked = self.parked.borrow_mut();
        if parked.len() >= limits::LANE_QUEUE_MAX {
            drop(parked);
            let reason = queued.why_not("overloaded: too many wait; nothing was changed");
            return queued.finish(Err(Failure::TryAgain(reason)));
        }
        self.bell.ring_by(Instant::now() + after);
        let at = parked.partition_point(|before| before.place() <= queued.place());
        parked.insert(at, queued);
    }

    fn try_again(&self, mut queued: Queued<F, W>, reason: Rc<str>, after: Duration) {
        queued.again = Some(reason);
        // Whoever has been answered does not wait any more.
        if queued.waiter.is_some() {
            self.park(queued, after);
        }
    }

    pub(super) async fn resend(
        &self,
        connection: &mut Connection,
        mut sent: Sent<F, W>,
        unanswered: &mut Option<Sent<F, W>>,
    ) -> Result<(), Error> {
        if sent.run_id == connection.run_id() {
            return self.send(connection, sent, true, unanswered).await;
        }
        // Another process: whether the batch ran, and whether that survived, only the ledger can tell. It will not run any more.
        self.in_doubt.set(false);
        self.doubt(&mut sent, |_| true);
        Ok(())
    }

    pub(super) async fn send(
        &self,
        connection: &mut Connection,
        mut sent: Sent<F, W>,
        again: bool,
        unanswered: &mut Option<Sent<F, W>>,
    ) -> Result<(), Error> {
        let op = self.op(sent.counter);
        sent.since = Instant::now();
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
        self.script_seconds.record(started.elapsed());
        // A broken connection leaves the batch unanswered, to be sent again over the next.
        let value = match answer {
            Err(error @ (Error::Connection(_) | Error::Unfit(_))) => return Err(error),
            Err(error) => {
                let Some(sent) = unanswered.take() else { return Err(error) };
                self.in_doubt.set(false);
                return self.refused(sent, again, error);
            }
            Ok(value) => value,
        };
        let Some(sent) = unanswered.take() else { return Ok(()) };
        self.in_doubt.set(false);
        let read = self.answered(sent, again, &op, value);
        self.desk.returned();
        read
    }

    fn command(&self, sent: &Sent<F, W>, run_id: &str, again: bool, verb: Verb) -> redis::Cmd {
        let mut all_keys: Vec<&str> = Vec::with_capacity(sent.encoded.keys.len() + FRAME_KEYS);
        all_keys.extend([keys::META, keys::OUTBOX]);
        all_keys.extend(sent.encoded.keys.iter());
        let numbers = [
            sent.epoch.to_string(),
            self.partition.head().n.to_string(),
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
            let reason = queued.why_not(reason);
            queued.finish(Err(Failure::TryAgain(reason)));
        }
    }

    /// Stops selling until the verifier has compared Redis with Postgres again.
    fn verify(&self, why: &str) {
        self.partition.state.send_replace(State::Loading(why.to_owned()));
        self.partition.verify.notify_one();
    }

    pub(super) fn answered(&self, mut sent: Sent<F, W>, again: bool, op: &str, value: Value) -> Result<(), Error> {
        let mut words = Words::new(value)?;
        let status = words.text()?;
        if words.text()? != op {
            self.doubt(&mut sent, |_| true);
            return Err(Error::Unexpected("an answer to another batch: the connection is out of step".into()));
        }
        let now_ms = words.integer()?;
        self.clock.set(Clock::heard(now_ms));
        self.partition.set_redis_up(true);
        match status.as_str() {
            "ok" => self.decided(sent, now_ms, &mut words),
            "replayed" => self.replayed(sent, &mut words),
            "clock" | "requests" => {
                if status == "requests" {
                    sent.operations.iter_mut().for_each(|queued| F::leave_alone(&mut queued.op));
                }
                self.put_back(sent.operations);
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
                let reason = self.too_late();
                self.give_back(sent, reason);
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

    fn decided(&self, mut sent: Sent<F, W>, now_ms: i64, words: &mut Words) -> Result<(), Error> {
        let n = u64::try_from(words.integer()?).unwrap_or(0);
        self.partition.saw_n(sent.epoch, n);
        let mut positions = Positions::after(Position::new(sent.epoch, n));
        let ops = sent.operations.iter().map(|queued| &queued.op);
        let verdicts = match F::read(&sent.encoded.plan, ops, words, &mut positions) {
            Ok(verdicts) => verdicts,
            Err(error) => {
                self.doubt(&mut sent, |_| true);
                return Err(error);
            }
        };
        if let Some(newest) = positions.newest() {
            self.partition.saw(newest);
        }
        // What is finished here is written to its client later, on this thread: by then the copies are kept.
        let mut copies = CopiedBatch::new(self.op(sent.counter), now_ms, sent.operations.len());
        let mut undecided = Vec::new();
        for (k, (queued, verdict)) in (0..).zip(sent.operations.iter_mut().zip(verdicts)) {
            if let Verdict::Decided(outcome) = verdict {
                F::learn(&self.partition.sold_out, &queued.op, &outcome, sent.made);
                let note = F::note(&queued.op, &outcome);
                queued.finish(Ok(outcome));
                if let Some(note) = note {
                    F::keep(&mut copies, k, &queued.op, note);
                }
            } else {
                undecided.push((k, verdict));
            }
        }
        self.partition.copies.keep(copies);
        if undecided.is_empty() {
            self.spare(sent.operations);
        } else {
            self.undecided(sent.operations, undecided);
        }
        Ok(())
    }

    /// Keeps the memory of a batch for the next one.
    fn spare(&self, mut operations: VecDeque<Queued<F, W>>) {
        operations.clear();
        if operations.capacity() <= 2 * limits::BATCH_OPERATIONS_MAX {
            self.spare.set(operations);
        }
    }

    /// Sees to it that those of a batch are tried again which were not decided, by their places in it.
    fn undecided(&self, operations: VecDeque<Queued<F, W>>, undecided: Vec<(u32, Verdict<F::Outcome>)>) {
        let (mut undecided, mut later) = (undecided.into_iter().peekable(), Vec::new());
        for (k, mut queued) in (0..).zip(operations) {
            let Some((_, verdict)) = undecided.next_if(|(at, _)| *at == k) else { continue };
            match verdict {
                Verdict::Decided(_) => {}
                Verdict::Again(reason) => self.try_again(queued, reason.into(), limits::LOCKED_RETRY_AFTER),
                Verdict::Later(reason) => {
                    queued.again = Some(reason.into());
                    later.push(queued);
                }
                Verdict::SentBack(reason) => {
                    let reason = reason.into();
                    self.desk.sent_back(&queued.op, &reason);
                    self.try_again(queued, reason, limits::LOCKED_RETRY_AFTER);
                }
                Verdict::Lost(reason) => {
                    let reason = reason.into();
                    self.desk.lost(&queued.op);
                    self.desk.sent_back(&queued.op, &reason);
                    self.try_again(queued, reason, limits::LOCKED_RETRY_AFTER);
                }
            }
        }
        self.put_back(later);
    }

    /// Puts in front of the queue what goes with the next batch, but for what nobody waits for any more.
    fn put_back(&self, operations: impl IntoIterator<Item = Queued<F, W>, IntoIter: DoubleEndedIterator>) {
        let mut queue = self.queue.borrow_mut();
        operations.into_iter().rev().filter(|queued| queued.waiter.is_some()).for_each(|queued| queue.push_front(queued));
    }

    fn op(&self, counter: u64) -> String {
        format!("{}:{counter}", self.name)
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
        let (op, at_ms) = (self.op(sent.counter), entry.as_ref().map_or(0, |entry| entry.at_ms));
        let mut copies = CopiedBatch::new(op, at_ms, sent.operations.len());
        let mut granted: HashMap<u32, (u64, Operation)> =
            entry.iter().flat_map(Entry::each).map(|(n, operation)| (operation.k, (n, operation))).collect();
        for (k, mut queued) in (0..).zip(sent.operations) {
            let outcome = granted.remove(&k).and_then(|(n, line)| F::replayed(&queued.op, &line, Position::new(sent.epoch, n)));
            if let Some(outcome) = &outcome {
                F::learn(&self.partition.sold_out, &queued.op, outcome, sent.made);
            }
            let note: Option<Note> = outcome.as_ref().and_then(|outcome| F::note(&queued.op, outcome));
            queued.finish(outcome.ok_or_else(|| Failure::TryAgain("the answer was lost; nothing was changed".into())));
            if let Some(note) = note {
                F::keep(&mut copies, k, &queued.op, note);
            }
        }
        if let Some(entry) = entry {
            self.partition.saw(entry.last);
        }
        self.partition.copies.keep(copies);
        Ok(())
    }
}
