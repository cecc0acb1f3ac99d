//! Channels: what is published in this process, and who has subscribed to it.
//!
//! Whoever publishes does so from any thread through the [`Hub`], which costs nothing worth mentioning while nobody listens. Each thread that
//! serves clients has a [`Subscribers`] with its own, and takes in what the hub sends it through a bounded queue: what does not fit is lost
//! and counted, as a message to a client that is not connected would be. A client that reads too slowly is cut off.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::client::{Client, Names, Profile};
use crate::domain::glob;
use crate::limits::{CHANNELS_SHOWN_BYTES_MAX, CHANNELS_STEPS_MAX, CHANNELS_TOGETHER_MAX, HUB_QUEUE_MAX, PATTERNS_TOGETHER_MAX};
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

    /// The channels that anybody has subscribed to and that match the pattern, if there is one. `None` where they take more than
    /// [`CHANNELS_SHOWN_BYTES_MAX`], or finding them takes more than [`CHANNELS_STEPS_MAX`].
    pub fn channels(&self, pattern: Option<&[u8]>) -> Option<Vec<Bytes>> {
        let (mut bytes, mut steps) = (CHANNELS_SHOWN_BYTES_MAX, CHANNELS_STEPS_MAX);
        let mut found = Vec::new();
        for channel in self.known()[Kind::Channel as usize].keys() {
            if pattern.map_or(Some(true), |pattern| glob::matches_within(pattern, channel, false, &mut steps))? {
                bytes = bytes.checked_sub(channel.len() + size_of::<Bytes>())?;
                found.push(channel.clone());
            }
        }
        Some(found)
    }

    /// How many channels, or patterns, that is.
    pub fn len(&self, kind: Kind) -> usize {
        self.known()[kind as usize].len()
    }

    /// How many clients have subscribed to this one.
    pub fn count(&self, kind: Kind, name: &Bytes) -> usize {
        self.known()[kind as usize].get(name).copied().unwrap_or(0)
    }

    fn known(&self) -> MutexGuard<'_, [HashMap<Bytes, usize, foldhash::fast::RandomState>; 2]> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more; `false` where all clients have subscribed to too many different ones.
    fn added(&self, kind: Kind, name: &Bytes) -> bool {
        let known = &mut self.known()[kind as usize];
        if known.len() >= kind.together_max() && !known.contains_key(name) {
            metrics::counter!("holdfast_refused_subscriptions_total").increment(1);
            return false;
        }
        *known.entry(name.clone()).or_default() += 1;
        self.subscriptions.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn removed(&self, kind: Kind, name: &Bytes) {
        self.subscriptions.fetch_sub(1, Ordering::Relaxed);
        let mut names = self.known();
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

/// The clients that messages of one name go to, by number.
type Listeners = BTreeMap<u64, Weak<Pipeline>>;

fn send(pipeline: &Weak<Pipeline>, message: Reply) {
    if let Some(pipeline) = pipeline.upgrade() {
        metrics::counter!("holdfast_sent_messages_total").increment(1);
        pipeline.push_message(message);
    }
}

/// The subscribers of one thread.
#[derive(Default)]
pub struct Subscribers {
    channels: RefCell<HashMap<Bytes, Listeners, foldhash::fast::RandomState>>,
    patterns: RefCell<HashMap<Bytes, Listeners, foldhash::fast::RandomState>>,
    monitors: RefCell<Listeners>,
    hub: Arc<Hub>,
}

/// Which of the two a subscription is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Channel,
    Pattern,
}

impl Kind {
    /// How many different ones all clients may have subscribed to together.
    pub const fn together_max(self) -> usize {
        match self {
            Self::Channel => CHANNELS_TOGETHER_MAX,
            Self::Pattern => PATTERNS_TOGETHER_MAX,
        }
    }
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
                for pipeline in self.channels.borrow().get(channel).into_iter().flat_map(Listeners::values) {
                    let words = [Reply::word("message"), Reply::Bulk(channel.clone()), Reply::Bulk(payload.clone())];
                    send(pipeline, Reply::Push(words.into()));
                }
                for (pattern, listeners) in &*self.patterns.borrow() {
                    if !glob::matches(pattern, channel, false) {
                        continue;
                    }
                    for pipeline in listeners.values() {
                        let names = [Reply::word("pmessage"), Reply::Bulk(pattern.clone()), Reply::Bulk(channel.clone())];
                        send(pipeline, Reply::Push(names.into_iter().chain([Reply::Bulk(payload.clone())]).collect()));
                    }
                }
            }
            Event::Line(line) => {
                for pipeline in self.monitors.borrow().values() {
                    send(pipeline, Reply::Simple(line.to_string().into()));
                }
            }
        }
    }

    fn map(&self, kind: Kind) -> &RefCell<HashMap<Bytes, Listeners, foldhash::fast::RandomState>> {
        match kind {
            Kind::Channel => &self.channels,
            Kind::Pattern => &self.patterns,
        }
    }
}

/// What one client has subscribed to; its profile has the names. Dropped, all of it ends.
pub struct Subscriptions {
    subscribers: Rc<Subscribers>,
    client: Arc<Client>,
    pipeline: Weak<Pipeline>,
    /// How many there have been.
    begun: Cell<u64>,
}

fn names(profile: &mut Profile, kind: Kind) -> &mut Names {
    match kind {
        Kind::Channel => &mut profile.channels,
        Kind::Pattern => &mut profile.patterns,
    }
}

impl Subscriptions {
    pub fn new(subscribers: &Rc<Subscribers>, client: &Arc<Client>, pipeline: &Rc<Pipeline>) -> Rc<Self> {
        Rc::new(Self {
            subscribers: Rc::clone(subscribers),
            client: Arc::clone(client),
            pipeline: Rc::downgrade(pipeline),
            begun: Cell::new(0),
        })
    }

    /// How many there are, of both kinds.
    pub fn count(&self) -> usize {
        let profile = self.client.profile();
        profile.channels.len() + profile.patterns.len()
    }

    /// How many there are of one kind.
    pub fn count_of(&self, kind: Kind) -> usize {
        names(&mut self.client.profile(), kind).len()
    }

    /// The names of one kind, in the order subscribed to.
    pub fn names(&self, kind: Kind) -> Vec<Bytes> {
        let mut numbered: Vec<(u64, Bytes)> =
            names(&mut self.client.profile(), kind).iter().map(|(name, number)| (*number, name.clone())).collect();
        numbered.sort_unstable_by_key(|(number, _)| *number);
        numbered.into_iter().map(|(_, name)| name).collect()
    }

    /// Subscribes; does nothing where it has already. `false` where all clients have too many different ones together.
    pub fn add(&self, kind: Kind, name: &Bytes) -> bool {
        // What was read stays in memory as a whole while a slice of it does.
        let name = Bytes::copy_from_slice(name);
        match names(&mut self.client.profile(), kind).entry(name.clone()) {
            Entry::Occupied(_) => return true,
            Entry::Vacant(_) if !self.subscribers.hub.added(kind, &name) => return false,
            Entry::Vacant(free) => _ = free.insert(self.begun.get()),
        }
        self.begun.set(self.begun.get() + 1);
        self.subscribers.map(kind).borrow_mut().entry(name).or_default().insert(self.client.id, self.pipeline.clone());
        true
    }

    /// Ends one; does nothing where there is none.
    pub fn remove(&self, kind: Kind, name: &Bytes) {
        if names(&mut self.client.profile(), kind).remove(name).is_none() {
            return;
        }
        let mut map = self.subscribers.map(kind).borrow_mut();
        if let Some(listeners) = map.get_mut(name) {
            listeners.remove(&self.client.id);
            if listeners.is_empty() {
                map.remove(name);
            }
        }
        self.subscribers.hub.removed(kind, name);
    }

    /// Watches what all clients send from now on, as the command with this number permits.
    pub fn monitor(&self, number: usize) {
        if self.client.profile().monitors.replace(number).is_none() {
            self.subscribers.monitors.borrow_mut().insert(self.client.id, self.pipeline.clone());
            self.subscribers.hub.monitors.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Subscriptions {
    fn drop(&mut self) {
        for kind in [Kind::Channel, Kind::Pattern] {
            for name in self.names(kind) {
                self.remove(kind, &name);
            }
        }
        if self.client.profile().monitors.take().is_some() {
            self.subscribers.monitors.borrow_mut().remove(&self.client.id);
            self.subscribers.hub.monitors.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
