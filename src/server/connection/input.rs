//! What a client sent and nobody has looked at yet.
//!
//! A request that is not complete takes memory: twice what was sent of it at most, and [`READ_MIN`]. Once all clients of a thread together have sent
//! more than `limits.input_mib` of such, who has sent more than [`INPUT_ALWAYS_MAX`] of one is closed as it sends more: to wait for others would be to
//! wait for what they may never send. No more than that is ever read ahead of a command that waits. For strangers half of that is too much, and
//! [`INPUT_STRANGER_MAX`], also of what is complete and has to wait; they are read in small pieces, and hardly ahead. So they cannot have known clients
//! closed. What a TLS session keeps counts, too.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use crate::command::Context as Shared;
use crate::limits::{INPUT_ALWAYS_MAX, INPUT_STRANGER_MAX, READ_BUFFERS_KEPT_MAX, READ_MAX, READ_MIN, REFUSED_READ_MAX, REFUSED_REST_PART};
use crate::resp::{Limits, ProtocolError, Reader, Request};
use crate::server::stream::Stream;

/// What came of reading once.
pub enum Received {
    Bytes,
    /// Some that the stream keeps, for they are not complete.
    Kept,
    /// The client has closed its side.
    End,
    Failure,
}

/// See the module.
pub struct Input {
    shared: Rc<Shared>,
    reader: Reader,
    /// Bytes of the request that was taken and waits for its turn.
    pub set_aside: usize,
    /// Bytes that the stream keeps, and whether the next read finds some of them.
    kept: usize,
    has_more: bool,
    /// What it takes of the memory that all clients share.
    counted: usize,
    /// Bytes to ask for in the next read.
    read_size: usize,
    /// Whether there may be a complete request that could not be dispatched yet.
    pub backlog: bool,
    /// Whether the client has closed its side.
    pub ended: bool,
    rest: Option<Rest>,
}

/// Nothing is read for a while.
struct Rest {
    pause: Duration,
    timer: Pin<Box<Sleep>>,
    /// How many pauses are over.
    over: u32,
}

impl Input {
    /// Nothing yet.
    pub fn new(shared: Rc<Shared>) -> Self {
        Self {
            shared,
            reader: Reader::default(),
            set_aside: 0,
            kept: 0,
            has_more: false,
            counted: 0,
            read_size: READ_MIN,
            backlog: false,
            ended: false,
            rest: None,
        }
    }

    /// Bytes that are no request yet.
    pub fn len(&self) -> usize {
        self.reader.buffer.len()
    }

    /// The next complete request; `None` until more is read.
    pub fn next(&mut self, limits: Limits) -> Result<Option<Request>, ProtocolError> {
        self.reader.next(limits)
    }

    /// Its client was refused for want of time. Nothing is read for a while, and longer while there have been refusals enough; then only a little
    /// at first, since what is read is answered in time.
    pub fn rest(&mut self, pause: Duration) {
        self.rest = Some(Rest { pause, timer: Box::pin(tokio::time::sleep(pause)), over: 0 });
        self.read_size = REFUSED_READ_MAX;
    }

    /// Whether that is so.
    pub fn is_resting(&self) -> bool {
        self.rest.is_some()
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(rest) = &mut self.rest {
            std::task::ready!(rest.timer.as_mut().poll(cx));
            rest.over += 1;
            if rest.over == REFUSED_REST_PART || !self.shared.has_refused_enough(rest.pause) {
                self.rest = None;
            } else {
                rest.timer.as_mut().reset((Instant::now() + rest.pause).into());
            }
        }
        Poll::Ready(())
    }

    /// Reads once, when there is something. Of a known client it asks for twice as much while reads come back full, and for less again afterwards.
    /// `ahead`: of a command that waits, and then also while it rests, so that it is noticed that the client has left.
    pub fn poll_receive(&mut self, stream: &mut Stream, ahead: bool, is_known: bool, cx: &mut Context<'_>) -> Poll<Received> {
        if !ahead && self.poll_rest(cx).is_pending() {
            return Poll::Pending;
        }
        let kept = self.kept;
        let received = self.poll_stream(stream, ahead, is_known, cx);
        (self.kept, self.has_more) = (stream.kept(), stream.has_more());
        if received.is_pending() && self.kept != kept { Poll::Ready(Received::Kept) } else { received }
    }

    fn poll_stream(&mut self, stream: &mut Stream, ahead: bool, is_known: bool, cx: &mut Context<'_>) -> Poll<Received> {
        std::task::ready!(stream.poll_readable(cx));
        if !is_known || ahead {
            self.read_size = self.read_size.min(READ_MIN);
        }
        if self.reader.buffer.capacity() == 0
            && self.read_size <= READ_MIN
            && let Some(kept) = self.shared.read_buffers.borrow_mut().pop()
        {
            self.reader.buffer = kept;
        }
        self.reader.reserve(self.read_size);
        match stream.poll_read(cx, &mut self.reader.buffer, self.read_size) {
            Poll::Pending => {
                self.release();
                Poll::Pending
            }
            Poll::Ready(Ok(0)) => {
                self.ended = true;
                Poll::Ready(Received::End)
            }
            Poll::Ready(Ok(read)) => {
                self.read_size = match read {
                    full if full == self.read_size => (self.read_size * 2).min(READ_MAX),
                    little if little < self.read_size / 4 => (self.read_size / 2).max(READ_MIN),
                    _ => self.read_size,
                };
                Poll::Ready(Received::Bytes)
            }
            Poll::Ready(Err(_)) => Poll::Ready(Received::Failure),
        }
    }

    /// Brings its part of what all have sent and nobody could take yet up to date.
    pub fn settle(&mut self) {
        self.count(self.held());
    }

    fn held(&self) -> usize {
        self.len() + self.set_aside + self.kept
    }

    fn count(&mut self, held: usize) {
        if held != self.counted {
            self.shared.half_sent.set(self.shared.half_sent.get() - self.counted + held);
            self.shared.half_sent_gauge.increment(held as f64 - self.counted as f64);
            self.counted = held;
        }
    }

    /// Whether more may be read ahead of a command that waits: as long as it is, it is noticed that the client has left.
    pub fn reads_ahead(&self, is_known: bool) -> bool {
        self.len() + self.kept < always_max(is_known)
    }

    /// Whether this one has to go because all have sent too much. A known client may have sent complete requests that have to wait, or that the next
    /// read finds.
    pub fn is_too_much(&self, is_known: bool) -> bool {
        let together = if is_known { self.shared.bounds.input } else { self.shared.bounds.input / 2 };
        let may_be_complete = is_known && (self.backlog || self.has_more);
        !may_be_complete && self.shared.half_sent.get() > together && self.held() > always_max(is_known)
    }

    /// Gives memory back that is not in use.
    pub fn release(&mut self) {
        if let Some(buffer) = self.reader.release() {
            let mut kept = self.shared.read_buffers.borrow_mut();
            if kept.len() < READ_BUFFERS_KEPT_MAX {
                kept.push(buffer);
            }
        }
    }

    /// Whether it has no more than one read of the least size, so that it may keep it for as long as its requests are under way.
    pub fn is_small(&self) -> bool {
        self.reader.is_small()
    }
}

/// What a client may have sent that nobody could take yet, whatever the others have.
const fn always_max(is_known: bool) -> usize {
    if is_known { INPUT_ALWAYS_MAX } else { INPUT_STRANGER_MAX }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.count(0);
    }
}
