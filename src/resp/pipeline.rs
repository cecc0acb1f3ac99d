//! The replies of one connection, sent in the order of its requests whatever the order in which they are found.
//!
//! A command that answers later takes a [`Ticket`]; commands behind it run meanwhile and their replies wait in line. However many
//! tickets are completed between two turns of the connection, it is woken once and writes once.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::{Protocol, Reply};
use crate::limits::{CONFIRMED_AT_ONCE_MAX, MESSAGES_BYTES_MAX, MESSAGES_MAX, OUTPUT_STRANGER_MAX, OUTPUT_TOGETHER_MAX};

/// Slots of the queue that an idle connection keeps.
const SLOTS_KEPT_MAX: usize = 32;

/// What is known of a request when its reply is reserved.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// Whatever the dispatcher wants to know the reply by.
    pub tag: usize,
    /// When the request was read.
    pub arrived: Instant,
    /// Until when its reply is promised, if it is.
    pub due: Option<Instant>,
    /// The dialect at that time; a later HELLO does not change it.
    pub protocol: Protocol,
    /// Whether the client asked not to be answered (CLIENT REPLY).
    pub silent: bool,
}

/// A reply whose turn has come.
#[derive(Debug)]
pub struct Ready {
    pub stamp: Stamp,
    pub reply: Reply,
}

#[derive(Debug)]
struct Slot {
    stamp: Stamp,
    reply: Option<Reply>,
}

#[derive(Debug)]
struct State {
    slots: VecDeque<Slot>,
    /// The number of the first slot; grows by one with each reply taken.
    first: u64,
    stamp: Stamp,
    /// What the replies in `slots` weigh that are there already.
    bytes: usize,
    messages: VecDeque<Reply>,
    message_bytes: usize,
    waker: Option<Waker>,
    closed: bool,
    overrun: bool,
}

impl State {
    fn is_ready(&self) -> bool {
        !self.messages.is_empty() || self.overrun || self.slots.front().is_some_and(|slot| slot.reply.is_some())
    }

    fn reserve(&mut self, reply: Option<Reply>) -> u64 {
        self.bytes += reply.as_ref().map_or(0, Reply::weight);
        self.slots.push_back(Slot { stamp: self.stamp, reply });
        self.first + self.slots.len() as u64 - 1
    }
}

/// The ordered replies of one connection. Shared by the connection and the tickets it gave out, on one thread.
#[derive(Debug)]
pub struct Pipeline {
    state: RefCell<State>,
    /// Bytes that the clients of this thread leave unread, all together.
    unread: Rc<Cell<usize>>,
}

impl Pipeline {
    /// No replies yet. What its messages take is counted in `unread`, in bytes, with what else the clients of this thread leave unread.
    pub fn new(unread: Rc<Cell<usize>>) -> Rc<Self> {
        let stamp = Stamp { tag: 0, arrived: Instant::now(), due: None, protocol: Protocol::Resp2, silent: false };
        Rc::new(Self {
            unread,
            state: RefCell::new(State {
                slots: VecDeque::new(),
                first: 0,
                stamp,
                bytes: 0,
                messages: VecDeque::new(),
                message_bytes: 0,
                waker: None,
                closed: false,
                overrun: false,
            }),
        })
    }

    /// Sets what the next reserved replies are stamped with.
    pub fn stamp(&self, stamp: Stamp) {
        self.state.borrow_mut().stamp = stamp;
    }

    /// Gives the reply that is reserved next more time.
    pub fn allow(&self, more: Duration) {
        let stamp = &mut self.state.borrow_mut().stamp;
        stamp.due = stamp.due.map(|due| due + more);
    }

    /// Reserves the next place in line.
    pub fn ticket(self: &Rc<Self>) -> Ticket {
        let number = self.state.borrow_mut().reserve(None);
        Ticket { pipeline: Some(Rc::clone(self)), number }
    }

    /// Puts a reply that is known already into the next place in line.
    pub fn push_ready(&self, reply: Reply) {
        let mut state = self.state.borrow_mut();
        state.reserve(Some(reply));
        Self::wake(state);
    }

    /// Sends a message that answers no request (a subscription's, a lost lock's): it goes out before the next reply. A client that
    /// lets too many gather is cut off: sooner while all clients together leave too much.
    pub fn push_message(&self, message: Reply) {
        let mut state = self.state.borrow_mut();
        if state.closed {
            return;
        }
        let weight = message.weight();
        let is_too_much = state.messages.len() >= MESSAGES_MAX || state.message_bytes + weight > MESSAGES_BYTES_MAX;
        if is_too_much || (self.is_crowded() && state.message_bytes > OUTPUT_STRANGER_MAX) {
            state.overrun = true;
        } else {
            state.message_bytes += weight;
            self.unread.set(self.unread.get() + weight);
            state.messages.push_back(message);
        }
        Self::wake(state);
    }

    /// Whether one more message that was asked for may be added without having its client cut off. If not, there is as soon as the connection has
    /// taken some, upon which it polls the command that runs alone once more.
    pub fn has_room_for_message(&self) -> bool {
        !self.is_crowded() || self.state.borrow().message_bytes <= CONFIRMED_AT_ONCE_MAX
    }

    fn is_crowded(&self) -> bool {
        self.unread.get() > OUTPUT_TOGETHER_MAX
    }

    /// Counts that so many bytes of messages have gone.
    fn let_go(&self, state: &mut State, bytes: usize) {
        state.message_bytes -= bytes;
        self.unread.set(self.unread.get() - bytes);
    }

    /// Takes the next reply if its turn has come; messages go first.
    pub fn pop_ready(&self) -> Option<Ready> {
        let mut state = self.state.borrow_mut();
        if let Some(reply) = state.messages.pop_front() {
            self.let_go(&mut state, reply.weight());
            return Some(Ready { stamp: Stamp { silent: false, due: None, tag: usize::MAX, ..state.stamp }, reply });
        }
        let reply = state.slots.front_mut()?.reply.take()?;
        let stamp = state.slots.pop_front()?.stamp;
        state.first += 1;
        state.bytes = state.bytes.saturating_sub(reply.weight());
        Some(Ready { stamp, reply })
    }

    /// How many requests wait for their reply to be taken.
    pub fn in_flight(&self) -> usize {
        self.state.borrow().slots.len()
    }

    /// About how many bytes the replies take that are there and not taken.
    pub fn bytes(&self) -> usize {
        self.state.borrow().bytes
    }

    /// Whether messages came faster than the client took them.
    pub fn is_overrun(&self) -> bool {
        self.state.borrow().overrun
    }

    /// Whether [`Pipeline::pop_ready`] has something.
    pub fn is_ready(&self) -> bool {
        self.state.borrow().is_ready()
    }

    /// Waits until [`Pipeline::pop_ready`] has something.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(cx, State::is_ready)
    }

    /// Waits until messages have come faster than the client takes them.
    pub fn poll_overrun(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(cx, |state| state.overrun)
    }

    fn poll(&self, cx: &mut Context<'_>, is_so: fn(&State) -> bool) -> Poll<()> {
        let mut state = self.state.borrow_mut();
        if is_so(&state) {
            return Poll::Ready(());
        }
        if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Whether the ticket's turn has come: every reply before it is taken.
    pub fn is_first(&self, ticket: &Ticket) -> bool {
        self.state.borrow().first == ticket.number
    }

    /// Wakes the connection for another reason than a reply.
    pub fn nudge(&self) {
        let waker = self.state.borrow_mut().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The connection is gone: tickets still out complete into nothing.
    pub fn close(&self) {
        let mut state = self.state.borrow_mut();
        state.closed = true;
        state.waker = None;
        state.slots = VecDeque::new();
        state.bytes = 0;
        state.messages = VecDeque::new();
        let bytes = state.message_bytes;
        self.let_go(&mut state, bytes);
    }

    /// Gives back memory that a burst needed.
    pub fn shrink(&self) {
        let mut state = self.state.borrow_mut();
        if state.slots.is_empty() && state.slots.capacity() > SLOTS_KEPT_MAX {
            state.slots = VecDeque::new();
        }
        if state.messages.is_empty() && state.messages.capacity() > SLOTS_KEPT_MAX {
            state.messages = VecDeque::new();
        }
    }

    fn complete(&self, number: u64, reply: Reply) {
        let mut state = self.state.borrow_mut();
        if state.closed {
            return;
        }
        let Some(slot) = number.checked_sub(state.first).and_then(|at| usize::try_from(at).ok()) else { return };
        let weight = reply.weight();
        if let Some(slot) = state.slots.get_mut(slot) {
            slot.reply = Some(reply);
            state.bytes += weight;
        }
        Self::wake(state);
    }

    /// Wakes the connection if there is something for it. The waker is taken, so that many completions wake once.
    fn wake(mut state: std::cell::RefMut<'_, State>) {
        if !state.is_ready() {
            return;
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A place in the line of replies, to be completed once. Dropped without, it answers an error: a client never waits for nothing.
#[derive(Debug)]
pub struct Ticket {
    /// `None` once completed.
    pipeline: Option<Rc<Pipeline>>,
    number: u64,
}

impl Ticket {
    /// Gives the reply. Does nothing if the connection is gone.
    pub fn complete(mut self, reply: Reply) {
        if let Some(pipeline) = self.pipeline.take() {
            pipeline.complete(self.number, reply);
        }
    }

    /// Whether nobody waits for the reply any more.
    pub fn is_abandoned(&self) -> bool {
        self.pipeline.as_ref().is_none_or(|pipeline| pipeline.state.borrow().closed)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(pipeline) = self.pipeline.take() {
            pipeline.complete(self.number, Reply::error("ERR internal error: the command was dropped"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn taken(pipeline: &Pipeline) -> Vec<Reply> {
        std::iter::from_fn(|| pipeline.pop_ready().map(|ready| ready.reply)).collect()
    }

    #[test]
    fn replies_leave_in_the_order_of_requests() {
        let pipeline = Pipeline::new(Rc::default());
        let (first, second) = (pipeline.ticket(), pipeline.ticket());
        pipeline.push_ready(Reply::Integer(3));
        second.complete(Reply::Integer(2));
        assert_eq!(taken(&pipeline), []);
        assert_eq!(pipeline.in_flight(), 3);
        first.complete(Reply::Integer(1));
        assert_eq!(taken(&pipeline), [Reply::Integer(1), Reply::Integer(2), Reply::Integer(3)]);
        assert_eq!(pipeline.in_flight(), 0);
    }

    #[test]
    fn many_completions_wake_the_connection_once_and_only_for_its_first_reply() {
        let pipeline = Pipeline::new(Rc::default());
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let mut cx = Context::from_waker(&waker);
        let mut tickets: Vec<Ticket> = (0..100).map(|_| pipeline.ticket()).collect();
        assert!(pipeline.poll_ready(&mut cx).is_pending());
        while tickets.len() > 1 {
            tickets.pop().unwrap().complete(Reply::Nil);
        }
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        tickets.pop().unwrap().complete(Reply::Nil);
        pipeline.push_ready(Reply::Nil);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(pipeline.poll_ready(&mut cx).is_ready());
    }

    #[test]
    fn what_waits_behind_another_reply_is_weighed() {
        let pipeline = Pipeline::new(Rc::default());
        let (first, second) = (pipeline.ticket(), pipeline.ticket());
        pipeline.push_ready(Reply::bulk(vec![0; 1_000]));
        second.complete(Reply::Array(vec![Reply::Nil; 100]));
        assert!((1_000 + 100 * size_of::<Reply>()..10_000).contains(&pipeline.bytes()), "{}", pipeline.bytes());
        first.complete(Reply::Nil);
        assert_eq!((taken(&pipeline).len(), pipeline.bytes()), (3, 0));
    }

    #[test]
    fn a_dropped_ticket_answers_an_error() {
        let pipeline = Pipeline::new(Rc::default());
        drop(pipeline.ticket());
        assert_eq!(taken(&pipeline), [Reply::error("ERR internal error: the command was dropped")]);
    }

    #[test]
    fn a_ticket_outlives_its_connection_quietly() {
        let pipeline = Pipeline::new(Rc::default());
        let (completed, dropped) = (pipeline.ticket(), pipeline.ticket());
        pipeline.close();
        assert!(completed.is_abandoned());
        completed.complete(Reply::Nil);
        drop(dropped);
        assert_eq!(taken(&pipeline), []);
    }

    #[test]
    fn messages_overtake_waiting_replies_and_are_bounded() {
        let pipeline = Pipeline::new(Rc::default());
        let ticket = pipeline.ticket();
        pipeline.push_message(Reply::Integer(7));
        assert_eq!(taken(&pipeline), [Reply::Integer(7)]);
        for _ in 0..=MESSAGES_MAX {
            pipeline.push_message(Reply::Nil);
        }
        assert!(pipeline.is_overrun());
        drop(ticket);
    }

    #[test]
    fn messages_are_counted_with_what_all_leave_unread_and_are_few_where_that_is_too_much() {
        let others = OUTPUT_TOGETHER_MAX + 1;
        let unread = Rc::new(Cell::new(0));
        let (first, second) = (Pipeline::new(Rc::clone(&unread)), Pipeline::new(Rc::clone(&unread)));
        let message = || Reply::bulk(vec![b'x'; 1_000]);
        let weight = message().weight();
        (0..20).for_each(|_| first.push_message(message()));
        assert_eq!((unread.get(), first.is_overrun()), (20 * weight, false));
        assert!(first.has_room_for_message());
        unread.set(unread.get() + others);
        assert!(!first.has_room_for_message() && second.has_room_for_message());
        first.push_message(message());
        assert!(first.is_overrun(), "who has much already");
        let mut pushed = 0;
        while !second.is_overrun() {
            second.push_message(message());
            pushed += 1;
        }
        assert_eq!(pushed, OUTPUT_STRANGER_MAX / weight + 2, "the last of them is not kept");
        while first.pop_ready().is_some() {}
        second.close();
        assert_eq!(unread.get(), others);
        second.push_message(message());
        assert_eq!(unread.get(), others, "it is closed");
    }

    #[test]
    fn a_reply_keeps_the_dialect_its_request_came_in() {
        let pipeline = Pipeline::new(Rc::default());
        let ticket = pipeline.ticket();
        pipeline.stamp(Stamp { tag: 5, arrived: Instant::now(), due: None, protocol: Protocol::Resp3, silent: true });
        pipeline.push_ready(Reply::Nil);
        ticket.complete(Reply::Nil);
        let (first, second) = (pipeline.pop_ready().unwrap(), pipeline.pop_ready().unwrap());
        assert_eq!((first.stamp.protocol, first.stamp.silent), (Protocol::Resp2, false));
        assert_eq!((second.stamp.protocol, second.stamp.silent, second.stamp.tag), (Protocol::Resp3, true, 5));
    }
}
