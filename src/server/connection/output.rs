//! Replies on their way to the client: encoded in the order of requests, counted, sent as far as the socket takes them.
//!
//! What a client leaves unread takes memory, also where it waits in a TLS session. Each may leave as much as its bound; but once all clients of a
//! thread together leave more than [`OUTPUT_TOGETHER_MAX`], messages included, each gets only as much as a stranger does, until they have read some.
//! Nobody stands still by that: what a client may always have is one reply more than nothing.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BytesMut};
use tokio::time::Sleep;

use crate::command::Context;
use crate::limits::{OUTPUT_KEEP_MAX, OUTPUT_STRANGER_MAX, OUTPUT_TOGETHER_MAX};
use crate::resp::{Pipeline, Ready, Reply, Stamp};
use crate::server::stream::Stream;
use crate::session::client::Session;

/// See the module.
pub struct Output {
    cx: Rc<Context>,
    /// Encoded and not yet sent.
    bytes: BytesMut,
    /// Bytes that the stream has taken and the socket has not.
    taken: usize,
    /// What all of them take of the memory that all clients share.
    counted: usize,
    /// Runs while bytes wait for the client to take them.
    stall: Option<Pin<Box<Sleep>>>,
    /// When the last reply went out, and until when it was allowed to hold back those behind it.
    answered: Instant,
    held_until: Instant,
}

/// Replies that are counted together.
struct Alike {
    tag: usize,
    arrived: Instant,
    /// Their error word, if they are errors.
    error: Option<Box<str>>,
    count: usize,
}

impl Alike {
    fn takes(&self, stamp: &Stamp, reply: &Reply) -> bool {
        self.tag == stamp.tag && self.arrived == stamp.arrived && self.error.as_deref() == reply.error_word()
    }
}

impl Output {
    /// Nothing yet.
    pub fn new(cx: Rc<Context>) -> Self {
        let now = Instant::now();
        Self { cx, bytes: BytesMut::new(), taken: 0, counted: 0, stall: None, answered: now, held_until: now }
    }

    /// Bytes that wait for the socket.
    pub fn len(&self) -> usize {
        self.bytes.len() + self.taken
    }

    /// Unread bytes beyond which nothing more is encoded.
    pub fn max(&self, authenticated: bool) -> usize {
        match authenticated && self.cx.unread.get() <= OUTPUT_TOGETHER_MAX {
            true => self.cx.bounds.output,
            false => OUTPUT_STRANGER_MAX.min(self.cx.bounds.output),
        }
    }

    /// Whether there is something to send.
    pub fn is_unsent(&self, stream: &Stream) -> bool {
        !self.bytes.is_empty() || stream.has_unsent()
    }

    /// Encodes the replies whose turn has come. Those of one command to requests that were read together are counted together, and so are
    /// errors of one word.
    pub fn collect(&mut self, pipeline: &Pipeline, session: &Session) {
        let max = self.max(session.authenticated);
        let mut now = None;
        let mut alike: Option<Alike> = None;
        while self.len() <= max {
            let Some(Ready { stamp, reply }) = pipeline.pop_ready() else { break };
            let now = *now.get_or_insert_with(Instant::now);
            match &mut alike {
                Some(alike) if alike.takes(&stamp, &reply) => alike.count += 1,
                _ => {
                    self.count(alike.take(), now, session);
                    let error = reply.error_word().map(Into::into);
                    alike = Some(Alike { tag: stamp.tag, arrived: stamp.arrived, error, count: 1 });
                }
            }
            self.watch(&stamp, now);
            if !stamp.silent {
                reply.encode(&mut self.bytes, stamp.protocol);
            }
        }
        if let Some(now) = now {
            self.count(alike, now, session);
        }
    }

    fn count(&self, alike: Option<Alike>, now: Instant, session: &Session) {
        let Some(Alike { tag, arrived, error, count }) = alike else { return };
        let took = now.saturating_duration_since(arrived);
        match error {
            None => self.cx.stats.succeeded(tag, count, took),
            Some(word) => self.cx.stats.failed(tag, &word, count, took),
        }
        self.note_slow(tag, took, session);
    }

    fn note_slow(&self, tag: usize, took: Duration, session: &Session) {
        if let Some(spec) = self.cx.commands.all().get(tag) {
            self.cx.slow.note(spec.name, took, &session.client);
        }
    }

    /// Notices a reply that comes later than promised. One that had to wait its turn has the time of the one before it.
    fn watch(&mut self, stamp: &Stamp, now: Instant) {
        let held = stamp.arrived < self.answered;
        let due = stamp.due.map_or(now, |due| if held { due.max(self.held_until) } else { due });
        if now > due {
            self.cx.heartbeat.late(stamp.arrived, now - due);
        }
        (self.answered, self.held_until) = (now, due);
    }

    /// Sends what the socket takes; returns whether it can go on.
    pub fn write(&mut self, stream: &mut Stream) -> bool {
        let goes_on = self.send(stream);
        self.taken = stream.unsent();
        let unread = self.taken + if self.bytes.is_empty() { 0 } else { self.bytes.capacity() };
        if unread != self.counted {
            self.settle(unread);
        }
        goes_on
    }

    fn send(&mut self, stream: &mut Stream) -> bool {
        while self.is_unsent(stream) {
            match stream.try_write(&self.bytes) {
                Ok(0) if !self.bytes.is_empty() => return false,
                Ok(sent) => {
                    self.bytes.advance(sent);
                    self.stall = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if stream.has_moved() || self.stall.is_none() {
                        self.stall = Some(Box::pin(tokio::time::sleep(self.cx.bounds.stall)));
                    }
                    return true;
                }
                Err(_) => return false,
            }
        }
        self.stall = None;
        true
    }

    /// Whether what was unsent has gone by itself: a TLS session sends what it has as it is read.
    pub fn has_gone(&self, stream: &Stream) -> bool {
        self.len() > 0 && !self.is_unsent(stream)
    }

    /// Brings its part of what all leave unread up to date.
    fn settle(&mut self, unread: usize) {
        self.cx.unread.set(self.cx.unread.get() - self.counted + unread);
        self.counted = unread;
    }

    /// Waits until the client has taken no byte for too long.
    pub fn poll_stall(&mut self, cx: &mut TaskContext<'_>) -> Poll<()> {
        match &mut self.stall {
            Some(stall) => stall.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }

    /// Gives memory back that is not in use.
    pub fn release(&mut self) {
        if self.bytes.is_empty() && self.bytes.capacity() > OUTPUT_KEEP_MAX {
            self.bytes = BytesMut::new();
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.settle(0);
    }
}
