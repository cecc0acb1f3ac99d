//! One connection: reads, dispatches, writes.
//!
//! A turn reads once, dispatches every complete request within bounds, gathers the replies whose turn has come and writes them with one
//! call. What bounds a client: requests in flight, bytes unread, commands a turn, and a time without taking a byte. A command that was
//! dispatched is finished even if its client leaves, but for those that wait alone.
//!
//! - `input`: what the client sent and nobody has looked at yet.
//! - `output`: replies on their way to the client, how late they are, and how much it leaves unread.
//! - `clock`: by when the client has to have said something.

mod clock;
mod input;
mod output;

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll};
use std::time::Instant;

use tokio_util::sync::WaitForCancellationFutureOwned;

use self::clock::Clock;
use self::input::{Input, Received};
use self::output::Output;
use super::stream::Stream;
use crate::command::{After, Context, LocalBoxFuture, Waiting, closed, dispatch};
use crate::limits::TURN_COMMANDS_MAX;
use crate::resp::{Pipeline, ProtocolError, Reply, Request, Stamp};
use crate::session::chatter::{self, Line};
use crate::session::client::Session;
use crate::session::guesses::Waited;

/// Serves one client until it leaves, is told to, or breaks the protocol.
pub async fn run(stream: Stream, session: Session, cx: Rc<Context>) {
    let stopped = Some(Stop { awaited: Box::pin(session.client.stop.clone().cancelled_owned()), is_awaited: false });
    let mut connection = Connection {
        stream,
        session,
        pipeline: Pipeline::new(Rc::clone(&cx.unread)),
        input: Input::new(Rc::clone(&cx)),
        output: Output::new(Rc::clone(&cx)),
        cx,
        waiting: None,
        again: None,
        phase: Phase::Open,
        stopped,
        clock: Clock::new(),
    };
    while connection.phase != Phase::Gone {
        connection.dispatch_turn();
        connection.collect();
        connection.write();
        if connection.is_done() {
            break;
        }
        // Asked only now: the replies that were just taken have made room.
        if connection.input.backlog && connection.has_room() {
            tokio::task::yield_now().await;
        } else {
            connection.count_pause();
            connection.release_memory();
            connection.wind_clock();
            poll_fn(|cx| connection.poll_event(cx)).await;
        }
    }
    if connection.phase != Phase::Gone {
        // Ends with a FIN, so that the last reply is not lost to a reset.
        let _ = tokio::time::timeout(connection.cx.bounds.stall, connection.stream.shutdown()).await;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Takes no more requests; finishes and sends what is in flight.
    Ending,
    /// Nothing more can or shall be sent.
    Gone,
}

struct Connection {
    stream: Stream,
    session: Session,
    cx: Rc<Context>,
    pipeline: Rc<Pipeline>,
    input: Input,
    output: Output,
    /// The command that runs alone.
    waiting: Option<Waiting>,
    /// The request whose turn is later.
    again: Option<Box<Again>>,
    phase: Phase,
    /// `None` once it has been noticed.
    stopped: Option<Stop>,
    clock: Clock,
}

/// That the client is to be served no more.
struct Stop {
    awaited: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Whether it wakes this task: to look is then cheaper than to ask it again.
    is_awaited: bool,
}

/// A request that is dispatched once more, with what came of waiting for its turn.
struct Again {
    request: Request,
    waiting: LocalBoxFuture<'static, Waited>,
    waited: Option<Waited>,
}

impl Connection {
    /// Whether one more request may be dispatched. Replies that wait in line count as unread, too: they are what takes the memory.
    fn has_room(&self) -> bool {
        self.phase == Phase::Open
            && !self.waits_for_one()
            && self.pipeline.in_flight() < self.cx.bounds.in_flight
            && self.output.len() + self.pipeline.bytes() <= self.output_max()
    }

    /// Whether what is behind one command has to wait for it.
    fn waits_for_one(&self) -> bool {
        self.waiting.is_some() || self.again.is_some() || self.session.is_held_back()
    }

    /// Unread bytes beyond which nothing more is read, dispatched or encoded.
    fn output_max(&self) -> usize {
        self.output.max(self.session.authenticated)
    }

    /// Dispatches the requests that were read, as far as there is room, and no more than is fair to the other connections.
    fn dispatch_turn(&mut self) {
        if !(self.session.renew() && self.waiting.as_ref().is_none_or(|waiting| waiting.is_permitted_to(self.session.user()))) {
            self.close("user_changed");
            return;
        }
        if self.input.len() == 0 && self.again.is_none() && !self.input.ended {
            self.input.backlog = !self.has_room();
            self.settle_input();
            return;
        }
        let arrived = Instant::now();
        let mut dispatched = 0;
        let refused = self.cx.refused_early.count();
        let was_known = self.session.authenticated;
        self.input.backlog = true;
        if let Some(again) = self.again.take_if(|again| again.waited.is_some())
            && self.phase == Phase::Open
        {
            self.input.set_aside = 0;
            self.session.turn = again.waited;
            self.dispatch(again.request, arrived);
            self.session.turn = None;
            dispatched += 1;
        }
        while self.has_room() && dispatched < TURN_COMMANDS_MAX {
            let limits = if self.session.authenticated { self.cx.bounds.known } else { self.cx.bounds.stranger };
            match self.input.next(limits) {
                Ok(Some(request)) => self.dispatch(request, arrived),
                Ok(None) => {
                    self.input.backlog = false;
                    if self.input.ended {
                        self.phase = Phase::Ending;
                    }
                    break;
                }
                Err(error) => self.refuse(&error, arrived),
            }
            dispatched += 1;
        }
        if self.cx.refused_early.count() != refused {
            metrics::counter!("holdfast_paused_reads_total", "why" => "crowded").increment(1);
            self.input.rest(self.cx.backend.rest);
        }
        self.settle_input();
        if was_known && !self.session.authenticated {
            // RESET: it has as long to show who it is as one that connects.
            self.clock.begin(arrived);
        }
        if dispatched > 0 {
            self.clock.heard(arrived);
            self.session.publish(self.pipeline.in_flight(), self.input.len(), self.output.len());
        }
    }

    /// Counts what was sent and waits, and ends the connection where all have sent too much and this one more than it may.
    fn settle_input(&mut self) {
        self.input.settle();
        if self.input.is_too_much(self.session.authenticated) {
            self.cut_off("input", "all clients together have sent too much of requests that are not complete");
        }
    }

    fn dispatch(&mut self, request: Request, arrived: Instant) {
        match dispatch(&self.cx, &mut self.session, &self.pipeline, request, arrived) {
            After::Next => {}
            After::Wait(waiting) if self.input.ended && waiting.gives_up => self.phase = Phase::Gone,
            After::Wait(waiting) => self.waiting = Some(waiting),
            After::Close => self.phase = Phase::Ending,
            After::Drop => self.phase = Phase::Gone,
            // Nobody is left to be told.
            After::Again(..) if self.input.ended => self.phase = Phase::Gone,
            After::Again(request, waiting) => {
                self.input.set_aside = request.bytes();
                self.again = Some(Box::new(Again { request, waiting, waited: None }));
            }
        }
    }

    /// Says what is wrong with the bytes, and ends: where the next request starts is not known.
    fn refuse(&mut self, error: &ProtocolError, arrived: Instant) {
        if let Some(left_out) = chatter::allows(Line::ProtocolError) {
            tracing::info!(client = %self.session.client.address, error = error.text(), left_out, "protocol error: connection closed");
        }
        closed("protocol_error");
        let protocol = self.session.protocol;
        self.pipeline.stamp(Stamp { tag: self.cx.commands.len(), arrived, due: None, protocol, silent: false });
        self.pipeline.push_ready(Reply::error(error.text().to_owned()));
        self.phase = Phase::Ending;
    }

    /// Encodes the replies whose turn has come.
    fn collect(&mut self) {
        self.output.collect(&self.pipeline, &self.session);
        if self.pipeline.is_overrun() {
            self.cut_off("slow_subscriber", "a subscriber that reads too slowly");
        }
    }

    /// Sends what the socket takes.
    fn write(&mut self) {
        if self.phase != Phase::Gone && !self.output.write(&mut self.stream) {
            self.phase = Phase::Gone;
        }
    }

    /// Whether everything is said that will be.
    fn is_done(&self) -> bool {
        self.phase == Phase::Gone || (self.phase == Phase::Ending && self.pipeline.in_flight() == 0 && !self.output.is_unsent(&self.stream))
    }

    /// Gives buffers back before what may be a long wait. What requests under way were read into is theirs, too, and is kept for the next ones until
    /// they are over.
    fn release_memory(&mut self) {
        if self.waits_for_one() || self.pipeline.in_flight() == 0 || !self.input.is_small() {
            self.input.release();
        }
        self.pipeline.shrink();
        self.output.release();
    }

    /// Counts that requests wait which it has no room for.
    fn count_pause(&self) {
        let is_full = self.phase == Phase::Open && !self.waits_for_one() && !self.has_room();
        if self.input.backlog && is_full {
            let why = match self.pipeline.in_flight() >= self.cx.bounds.in_flight {
                true => "in_flight",
                false => "output",
            };
            metrics::counter!("holdfast_paused_reads_total", "why" => why).increment(1);
        }
    }

    /// Waits for anything that gives the next turn something to do.
    fn poll_event(&mut self, cx: &mut TaskContext<'_>) -> Poll<()> {
        // All else is asked about right after these are written: then there are none, or more than the client takes.
        if self.output.len() <= self.output_max() && self.pipeline.is_ready() {
            return Poll::Ready(());
        }
        self.session.client.waits(cx.waker());
        let mut event = self.poll_stop(cx);
        // What was held back, and is not any more.
        event |= self.input.backlog && self.has_room();
        event |= self.poll_read(cx);
        event |= self.output.has_gone(&self.stream);
        event |= self.poll_waiting(cx);
        event |= self.poll_again(cx);
        // Past the bound nothing is encoded until the client has taken some: then the socket wakes this task, not the replies.
        event |= match self.output.len() <= self.output_max() {
            true => self.pipeline.poll_ready(cx).is_ready(),
            false => self.pipeline.poll_overrun(cx).is_ready(),
        };
        event |= self.output.is_unsent(&self.stream) && self.stream.poll_writable(cx).is_ready();
        event |= self.poll_stall(cx);
        event |= self.poll_clock(cx);
        if event { Poll::Ready(()) } else { Poll::Pending }
    }

    /// A shutdown lets what is in flight finish, a kill does not.
    fn poll_stop(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let Some(stopped) = &mut self.stopped else { return false };
        let is_over = match stopped.is_awaited {
            true => self.session.client.stop.is_cancelled(),
            false => stopped.awaited.as_mut().poll(cx).is_ready(),
        };
        stopped.is_awaited = true;
        if !is_over {
            return false;
        }
        self.stopped = None;
        match self.session.client.killed() {
            Some(why) => self.close(why),
            None => self.phase = Phase::Ending,
        }
        true
    }

    /// Reads once, if there is room for what may come.
    fn poll_read(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let waits = self.waiting.is_some() || self.again.is_some();
        let ahead = waits && self.phase != Phase::Gone && self.input.reads_ahead(self.session.authenticated);
        if self.input.ended || !(ahead || (self.has_room() && !self.input.backlog)) {
            return false;
        }
        match self.input.poll_receive(&mut self.stream, waits, self.session.authenticated, cx) {
            Poll::Pending => false,
            Poll::Ready(Received::End) => {
                // Nobody is left to wait for it: a lock won now would be held for nobody.
                if self.waiting.as_ref().is_some_and(|waiting| waiting.gives_up) || self.again.is_some() {
                    self.phase = Phase::Gone;
                }
                true
            }
            // What was read ahead of a waiting command gives the next turn nothing to do, and must not make it spin.
            Poll::Ready(Received::Bytes) if waits => {
                self.settle_input();
                cx.waker().wake_by_ref();
                self.phase == Phase::Gone
            }
            Poll::Ready(Received::Bytes) => true,
            Poll::Ready(Received::Kept) => {
                self.settle_input();
                self.phase == Phase::Gone
            }
            Poll::Ready(Received::Failure) => {
                self.phase = Phase::Gone;
                true
            }
        }
    }

    /// Runs the command that runs alone, once every reply before its own is on its way.
    fn poll_waiting(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let Some(waiting) = &mut self.waiting else { return false };
        // What is won for a client that has gone must not be taken for it.
        if self.phase == Phase::Gone {
            return false;
        }
        // Nor for one whose user may no longer have it: the next turn looks at that.
        if self.session.is_outdated() {
            return true;
        }
        if !self.pipeline.is_first(&waiting.ticket) {
            return false;
        }
        let Poll::Ready(reply) = waiting.future.as_mut().poll(cx) else { return false };
        if let Some(waiting) = self.waiting.take() {
            waiting.ticket.complete(reply);
            if waiting.closes {
                self.phase = Phase::Ending;
            }
            // What it has begun to listen to now was permitted when it was asked for.
            if self.session.has_subscribed && !self.session.client.profile().suits(self.session.user()) {
                self.close("user_changed");
            }
        }
        true
    }

    /// Waits for the turn of what is dispatched once more.
    fn poll_again(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let Some(again) = self.again.as_mut().filter(|again| again.waited.is_none()) else { return false };
        let Poll::Ready(waited) = again.waiting.as_mut().poll(cx) else { return false };
        again.waited = Some(waited);
        true
    }

    fn poll_stall(&mut self, cx: &mut TaskContext<'_>) -> bool {
        if self.output.poll_stall(cx).is_pending() {
            return false;
        }
        self.cut_off("stalled", "a client took no bytes for too long");
        true
    }

    /// By when the client has to have said something, and what it is too late with otherwise: showing who it is, or anything at all.
    fn deadline(&self) -> Option<(Instant, &'static str)> {
        if !self.session.authenticated || self.stream.is_shaking_hands() {
            return Some((self.clock.opened + self.cx.bounds.auth_within, "auth_time"));
        }
        let idle = self.cx.bounds.idle().filter(|_| self.phase == Phase::Open)?;
        let waits = self.waiting.is_some()
            || self.again.is_some()
            || self.pipeline.in_flight() > 0
            || self.input.is_resting()
            || self.session.listens();
        Some((if waits { Instant::now() } else { self.clock.active } + idle, "idle"))
    }

    fn wind_clock(&mut self) {
        if !self.clock.is_wound()
            && let Some((deadline, _)) = self.deadline()
        {
            self.clock.wind(deadline);
        }
    }

    /// What has happened since the clock was wound may have moved the deadline: then the next turn winds it again.
    fn poll_clock(&mut self, cx: &mut TaskContext<'_>) -> bool {
        if self.clock.allow(self.cx.bounds.idle()) {
            return true;
        }
        if self.clock.poll(cx).is_pending() {
            return false;
        }
        if let Some((deadline, why)) = self.deadline()
            && deadline <= Instant::now()
        {
            self.close(why);
        }
        true
    }

    /// Ends the connection without another word, and says why.
    fn cut_off(&mut self, why: &'static str, in_words: &'static str) {
        if let Some(left_out) = chatter::allows(Line::Closed) {
            tracing::warn!(client = %self.session.client.address, left_out, "{in_words}: connection closed");
        }
        self.close(why);
    }

    /// Ends the connection without another word.
    fn close(&mut self, why: &'static str) {
        if self.phase != Phase::Gone {
            closed(why);
        }
        self.phase = Phase::Gone;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.waiting = None;
        self.pipeline.close();
    }
}

#[cfg(test)]
mod tests;
