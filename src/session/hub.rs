//! Channels: what is published in this process, and who has subscribed to it.
//!
//! Whoever publishes does so from any thread through the [`Hub`], which costs nothing worth mentioning while nobody listens. Each thread that
//! serves clients has a [`Subscribers`] with its own, and takes in what the hub sends it through a bounded queue: what does not fit is lost
//! and counted, as a message to a client that is not connected would be. A client that reads too slowly is cut off.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::client::Client;
use crate::domain::glob;
use crate::limits::HUB_QUEUE_MAX;
use crate::resp::{Pipeline, Reply};

/// What goes from the hub to every thread.
#[derive(Clone, Debug)]
enum Event {
    Message {
        channel: Bytes,
        payload: Bytes,
    },
    /// A line of MONITOR.
    Line(Arc<str>),
}

/// Takes in what is published. Shared by every thread.
#[derive(Debug, Default)]
pub struct Hub {
    threads: Mutex<Vec<mpsc::Sender<Event>>>,
    /// Channels and patterns subscribed to, on all threads.
    subscriptions: AtomicUsize,
    /// The same by name, with how many clients each.
    names: Mutex<[HashMap<Bytes, usize, foldhash::fast::RandomState>; 2]>,
    monitors: AtomicUsize,
}

impl Hub {
    /// Sends a message to everybody who has subscribed to this channel or to a pattern that matches it. Never waits: call it from wherever
    /// something happens. `payload` is only asked for where anybody listens at all.
    pub fn publish(&self, channel: impl Into<Bytes>, payload: impl FnOnce() -> Bytes) {
        if self.has_subscribers() {
            self.send(Event::Message { channel: channel.into(), payload: payload() });
        }
    }

    /// Whether anybody listens to anything: worth asking before a channel's name is made.
    pub fn has_subscribers(&self) -> bool {
        self.subscriptions.load(Ordering::Relaxed) > 0
    }

    /// The channels, or the patterns, that anybody has subscribed to, with how many each.
    pub fn names(&self, kind: Kind) -> Vec<(Bytes, usize)> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names[kind as usize].iter().map(|(name, count)| (name.clone(), *count)).collect()
    }

    fn added(&self, kind: Kind, name: &Bytes) {
        self.subscriptions.fetch_add(1, Ordering::Relaxed);
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        *names[kind as usize].entry(name.clone()).or_default() += 1;
    }

    fn removed(&self, kind: Kind, name: &Bytes) {
        self.subscriptions.fetch_sub(1, Ordering::Relaxed);
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = names[kind as usize].get_mut(name) {
            *count -= 1;
            if *count == 0 {
                names[kind as usize].remove(name);
            }
        }
    }

    /// Whether anybody watches what all clients send.
    pub fn has_monitors(&self) -> bool {
        self.monitors.load(Ordering::Relaxed) > 0
    }

    /// Shows a command to those who watch.
    pub fn show(&self, line: String) {
        self.send(Event::Line(line.into()));
    }

    fn send(&self, event: Event) {
        for thread in &*self.threads.lock().unwrap_or_else(PoisonError::into_inner) {
            if thread.try_send(event.clone()).is_err() {
                metrics::counter!("holdfast_lost_messages_total").increment(1);
            }
        }
    }
}

/// A client that messages go to.
#[derive(Clone)]
struct Listener {
    client: u64,
    pipeline: Weak<Pipeline>,
}

impl Listener {
    fn send(&self, message: Reply) {
        if let Some(pipeline) = self.pipeline.upgrade() {
            metrics::counter!("holdfast_sent_messages_total").increment(1);
            pipeline.push_message(message);
        }
    }
}

/// The subscribers of one thread.
#[derive(Default)]
pub struct Subscribers {
    channels: RefCell<HashMap<Bytes, Vec<Listener>, foldhash::fast::RandomState>>,
    patterns: RefCell<HashMap<Bytes, Vec<Listener>, foldhash::fast::RandomState>>,
    monitors: RefCell<Vec<Listener>>,
    hub: Arc<Hub>,
}

/// Which of the two a subscription is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Channel,
    Pattern,
}

impl Subscribers {
    pub fn new(hub: Arc<Hub>) -> Rc<Self> {
        Rc::new(Self { hub, ..Self::default() })
    }

    /// The hub that all threads share.
    pub fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// Takes in what is published, until it is cancelled.
    pub async fn run(self: Rc<Self>, cancel: CancellationToken) {
        let (sender, mut events) = mpsc::channel(HUB_QUEUE_MAX);
        self.hub.threads.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        while let Some(Some(event)) = cancel.run_until_cancelled(events.recv()).await {
            self.deliver(&event);
        }
    }

    fn deliver(&self, event: &Event) {
        match event {
            Event::Message { channel, payload } => {
                for listener in self.channels.borrow().get(channel).into_iter().flatten() {
                    let words = [Reply::word("message"), Reply::Bulk(channel.clone()), Reply::Bulk(payload.clone())];
                    listener.send(Reply::Push(words.into()));
                }
                for (pattern, listeners) in &*self.patterns.borrow() {
                    if !glob::matches(pattern, channel, false) {
                        continue;
                    }
                    for listener in listeners {
                        let names = [Reply::word("pmessage"), Reply::Bulk(pattern.clone()), Reply::Bulk(channel.clone())];
                        listener.send(Reply::Push(names.into_iter().chain([Reply::Bulk(payload.clone())]).collect()));
                    }
                }
            }
            Event::Line(line) => {
                for listener in &*self.monitors.borrow() {
                    listener.send(Reply::Simple(line.to_string().into()));
                }
            }
        }
    }

    fn map(&self, kind: Kind) -> &RefCell<HashMap<Bytes, Vec<Listener>, foldhash::fast::RandomState>> {
        match kind {
            Kind::Channel => &self.channels,
            Kind::Pattern => &self.patterns,
        }
    }
}

/// What one client has subscribed to. Dropped, all of it ends.
pub struct Subscriptions {
    subscribers: Rc<Subscribers>,
    client: Arc<Client>,
    pipeline: Weak<Pipeline>,
    names: RefCell<[Vec<Bytes>; 2]>,
    monitors: Cell<bool>,
}

impl Subscriptions {
    pub fn new(subscribers: &Rc<Subscribers>, client: &Arc<Client>, pipeline: &Rc<Pipeline>) -> Rc<Self> {
        Rc::new(Self {
            subscribers: Rc::clone(subscribers),
            client: Arc::clone(client),
            pipeline: Rc::downgrade(pipeline),
            names: RefCell::default(),
            monitors: Cell::new(false),
        })
    }

    /// How many there are, of both kinds.
    pub fn count(&self) -> usize {
        self.names.borrow().iter().map(Vec::len).sum()
    }

    /// The names of one kind, in the order subscribed to.
    pub fn names(&self, kind: Kind) -> Vec<Bytes> {
        self.names.borrow()[kind as usize].clone()
    }

    /// Subscribes; does nothing where it has already.
    pub fn add(&self, kind: Kind, name: Bytes) {
        if self.names.borrow()[kind as usize].contains(&name) {
            return;
        }
        // What was read stays in memory as a whole while a slice of it does.
        let name = Bytes::copy_from_slice(&name);
        self.names.borrow_mut()[kind as usize].push(name.clone());
        let listener = Listener { client: self.client.id, pipeline: self.pipeline.clone() };
        self.subscribers.hub.added(kind, &name);
        self.subscribers.map(kind).borrow_mut().entry(name).or_default().push(listener);
        self.publish_counts();
    }

    /// Ends one; does nothing where there is none.
    pub fn remove(&self, kind: Kind, name: &Bytes) {
        let place = self.names.borrow()[kind as usize].iter().position(|known| known == name);
        let Some(place) = place else { return };
        self.names.borrow_mut()[kind as usize].remove(place);
        let mut map = self.subscribers.map(kind).borrow_mut();
        if let Some(listeners) = map.get_mut(name) {
            listeners.retain(|listener| listener.client != self.client.id);
            if listeners.is_empty() {
                map.remove(name);
            }
        }
        self.subscribers.hub.removed(kind, name);
        drop(map);
        self.publish_counts();
    }

    /// Watches what all clients send from now on.
    pub fn monitor(&self) {
        if !self.monitors.replace(true) {
            let listener = Listener { client: self.client.id, pipeline: self.pipeline.clone() };
            self.subscribers.monitors.borrow_mut().push(listener);
            self.subscribers.hub.monitors.fetch_add(1, Ordering::Relaxed);
            self.client.profile().monitors = true;
        }
    }

    fn publish_counts(&self) {
        let names = self.names.borrow();
        let mut profile = self.client.profile();
        (profile.channels, profile.patterns) = (names[0].len(), names[1].len());
    }
}

impl Drop for Subscriptions {
    fn drop(&mut self) {
        for kind in [Kind::Channel, Kind::Pattern] {
            for name in self.names(kind) {
                self.remove(kind, &name);
            }
        }
        if self.monitors.get() {
            self.subscribers.monitors.borrow_mut().retain(|listener| listener.client != self.client.id);
            self.subscribers.hub.monitors.fetch_sub(1, Ordering::Relaxed);
            self.client.profile().monitors = false;
        }
    }
}
