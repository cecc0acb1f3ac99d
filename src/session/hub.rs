//! Channels: what is published in this process, and who has subscribed to it.
//!
//! Whoever publishes does so from any thread through the [`Hub`], which costs nothing worth mentioning while nobody listens. Each thread that
//! serves clients has a [`Subscribers`] with its own, and takes in what the hub sends it through a bounded queue: what does not fit is lost
//! and counted, as a message to a client that is not connected would be. A client that reads too slowly is cut off.

use std::cell::{Cell, RefCell};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;

use super::client::{Client, Names, Profile};
use crate::domain::glob;
use crate::limits::{
    CHANNEL_STEPS, CHANNELS_SHOWN_BYTES_MAX, CHANNELS_STEPS_AT_ONCE, CHANNELS_STEPS_MAX, CHANNELS_TOGETHER_MAX, DELIVERING_MAX,
    HUB_QUEUE_MAX, PATTERN_TAILS_MAX, PATTERNS_TOGETHER_MAX, SUBSCRIPTIONS_TOGETHER_MAX,
};
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
    known: Mutex<Known>,
    monitors: AtomicUsize,
}

/// What anybody has subscribed to.
#[derive(Debug, Default)]
struct Known {
    /// The channels and the patterns, with how many clients each.
    names: [BTreeMap<Bytes, usize>; 2],
    /// Bytes of the patterns behind the first star of each.
    tails: usize,
}

/// Why there may be no further subscription: what all clients have together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// Different channels, or patterns.
    Names(Kind),
    /// Bytes of patterns behind the first star of each.
    Tails,
    /// Subscriptions.
    Subscriptions,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Names(Kind::Channel) => {
                write!(f, "too many channels: all clients together may have {CHANNELS_TOGETHER_MAX} different ones")
            }
            Self::Names(Kind::Pattern) => {
                write!(f, "too many patterns: all clients together may have {PATTERNS_TOGETHER_MAX} different ones")
            }
            Self::Tails => {
                write!(f, "too many patterns: all clients together may have {PATTERN_TAILS_MAX} bytes behind the first star of each")
            }
            Self::Subscriptions => write!(f, "too many subscriptions: all clients together may have {SUBSCRIPTIONS_TOGETHER_MAX}"),
        }
    }
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

    /// The channels that anybody has subscribed to and that match the pattern, if there is one, in order. `None` where they take more than
    /// [`CHANNELS_SHOWN_BYTES_MAX`], or finding them takes more than [`CHANNELS_STEPS_MAX`]. Others have their turn every now and then.
    pub async fn channels(&self, pattern: Option<&[u8]>) -> Option<Vec<Bytes>> {
        let (mut bytes, mut steps) = (CHANNELS_SHOWN_BYTES_MAX, CHANNELS_STEPS_MAX);
        let mut found = Vec::new();
        let prefix = pattern.map_or(&[][..], glob::prefix);
        let mut next = Some(Bytes::copy_from_slice(prefix));
        while let Some(first) = next.take() {
            let left_at = steps.saturating_sub(CHANNELS_STEPS_AT_ONCE);
            for channel in self.known().names[Kind::Channel as usize].range(first..).map(|(channel, _)| channel) {
                if !channel.starts_with(prefix) {
                    break;
                }
                if steps < left_at {
                    next = Some(channel.clone());
                    break;
                }
                steps = steps.checked_sub(CHANNEL_STEPS)?;
                if pattern.map_or(Some(true), |pattern| glob::matches_within(pattern, channel, false, &mut steps))? {
                    bytes = bytes.checked_sub(channel.len() + size_of::<Bytes>())?;
                    found.push(channel.clone());
                }
            }
            if next.is_some() {
                yield_now().await;
            }
        }
        Some(found)
    }

    /// How many channels, or patterns, that is.
    pub fn len(&self, kind: Kind) -> usize {
        self.known().names[kind as usize].len()
    }

    /// How many clients have subscribed to this one.
    pub fn count(&self, kind: Kind, name: &Bytes) -> usize {
        self.known().names[kind as usize].get(name).copied().unwrap_or(0)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more and returns its name, which all who have subscribed to it share. Errors where all clients have too much already.
    fn added(&self, kind: Kind, name: &Bytes) -> Result<Bytes, Full> {
        let mut known = self.known();
        let Known { names, tails } = &mut *known;
        let names = &mut names[kind as usize];
        let shared = names.get_key_value(name).map(|(shared, _)| shared.clone());
        let full = match shared {
            _ if self.subscriptions.load(Ordering::Relaxed) >= SUBSCRIPTIONS_TOGETHER_MAX => Some(Full::Subscriptions),
            None if names.len() >= kind.together_max() => Some(Full::Names(kind)),
            None if *tails + kind.tail(name) > PATTERN_TAILS_MAX => Some(Full::Tails),
            _ => None,
        };
        if let Some(full) = full {
            metrics::counter!("holdfast_refused_subscriptions_total").increment(1);
            return Err(full);
        }
        let shared = shared.unwrap_or_else(|| {
            *tails += kind.tail(name);
            // What was read stays in memory as a whole while a slice of it does.
            Bytes::copy_from_slice(name)
        });
        *names.entry(shared.clone()).or_default() += 1;
        self.subscriptions.fetch_add(1, Ordering::Relaxed);
        Ok(shared)
    }

    fn removed(&self, kind: Kind, name: &Bytes) {
        self.subscriptions.fetch_sub(1, Ordering::Relaxed);
        let mut known = self.known();
        let Known { names, tails } = &mut *known;
        if let Entry::Occupied(mut entry) = names[kind as usize].entry(name.clone()) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
                *tails -= kind.tail(name);
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
    const fn together_max(self) -> usize {
        match self {
            Self::Channel => CHANNELS_TOGETHER_MAX,
            Self::Pattern => PATTERNS_TOGETHER_MAX,
        }
    }

    /// Bytes of one that may have to be compared again at each place of a channel.
    pub fn tail(self, name: &[u8]) -> usize {
        match self {
            Self::Channel => 0,
            Self::Pattern => name.iter().position(|&byte| byte == b'*').map_or(0, |star| name.len() - star - 1),
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
        let mut began = Instant::now();
        while let Some(Some(event)) = cancel.run_until_cancelled(events.recv()).await {
            self.deliver(&event);
            if began.elapsed() >= DELIVERING_MAX {
                yield_now().await;
                began = Instant::now();
            }
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

    /// Bytes of its patterns that may have to be compared again at each place of a channel.
    pub fn tails(&self) -> usize {
        self.client.profile().patterns.keys().map(|pattern| Kind::Pattern.tail(pattern)).sum()
    }

    /// The names of one kind, in the order subscribed to.
    pub fn names(&self, kind: Kind) -> Vec<Bytes> {
        let mut numbered: Vec<(u64, Bytes)> =
            names(&mut self.client.profile(), kind).iter().map(|(name, number)| (*number, name.clone())).collect();
        numbered.sort_unstable_by_key(|(number, _)| *number);
        numbered.into_iter().map(|(_, name)| name).collect()
    }

    /// Whether it has subscribed to it.
    pub fn has(&self, kind: Kind, name: &Bytes) -> bool {
        names(&mut self.client.profile(), kind).contains_key(name)
    }

    /// Subscribes; does nothing where it has already. Errors where all clients have too much together.
    pub fn add(&self, kind: Kind, name: &Bytes) -> Result<(), Full> {
        if self.has(kind, name) {
            return Ok(());
        }
        let name = self.subscribers.hub.added(kind, name)?;
        names(&mut self.client.profile(), kind).insert(name.clone(), self.begun.get());
        self.begun.set(self.begun.get() + 1);
        self.subscribers.map(kind).borrow_mut().entry(name).or_default().insert(self.client.id, self.pipeline.clone());
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    #[test]
    fn different_channels_are_bounded_together_and_given_back() {
        let hub = Hub::default();
        let add = |channel: &str| hub.added(Kind::Channel, &name(channel)).map(drop);
        (0..CHANNELS_TOGETHER_MAX).for_each(|n| assert_eq!(add(&n.to_string()), Ok(())));
        assert_eq!(add("new"), Err(Full::Names(Kind::Channel)));
        assert_eq!(add("7"), Ok(()), "what others have subscribed to costs no more");
        hub.removed(Kind::Channel, &name("7"));
        assert_eq!(add("new"), Err(Full::Names(Kind::Channel)));
        hub.removed(Kind::Channel, &name("7"));
        assert_eq!((add("new"), add("newer")), (Ok(()), Err(Full::Names(Kind::Channel))));
        let told = "too many channels: all clients together may have 262144 different ones";
        assert_eq!(Full::Names(Kind::Channel).to_string(), told);
    }

    #[test]
    fn others_have_their_turn_while_channels_are_looked_for_and_those_that_begin_otherwise_are_not_looked_at() {
        let hub = Hub::default();
        (0..50_000).for_each(|n| assert!(hub.added(Kind::Channel, &name(&format!("c-{n:05}"))).is_ok()));
        let found = |pattern: &str| {
            let mut turns = 1;
            let mut search = std::pin::pin!(hub.channels(Some(pattern.as_bytes())));
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            let found = loop {
                match search.as_mut().poll(&mut cx) {
                    std::task::Poll::Ready(found) => break found.unwrap(),
                    std::task::Poll::Pending => turns += 1,
                }
                assert!(hub.known.try_lock().is_ok());
            };
            (turns, found)
        };
        let all_that_end_so = (0..500).map(|n| name(&format!("c-{n:03}77"))).collect::<Vec<_>>();
        let (turns, ending) = found("*77");
        assert_eq!(ending, all_that_end_so);
        assert!(turns > 50_000 * CHANNEL_STEPS / CHANNELS_STEPS_AT_ONCE, "{turns}");
        assert_eq!(found("c-00077"), (1, vec![name("c-00077")]));
        assert_eq!(found("c-0007[78]"), (1, vec![name("c-00077"), name("c-00078")]));
        assert_eq!(found("d*"), (1, vec![]));
    }

    #[test]
    fn subscriptions_are_bounded_together_also_to_the_same_names_which_are_kept_once() {
        let hub = Hub::default();
        let names: Vec<Bytes> = (0..1_000).map(|n| name(&n.to_string())).collect();
        let mut shared = Vec::new();
        for at in 0..SUBSCRIPTIONS_TOGETHER_MAX {
            let name = hub.added(Kind::Channel, &names[at % names.len()]).unwrap();
            if at % names.len() == 7 {
                shared.push(name.as_ptr());
            }
        }
        assert!(shared.iter().all(|at| *at == shared[0] && *at != names[7].as_ptr()));
        assert_eq!(hub.added(Kind::Channel, &names[0]), Err(Full::Subscriptions));
        assert_eq!(hub.added(Kind::Pattern, &name("*")), Err(Full::Subscriptions));
        hub.removed(Kind::Channel, &names[0]);
        assert!(hub.added(Kind::Pattern, &name("*")).is_ok());
    }

    #[test]
    fn what_has_to_be_compared_at_each_place_of_a_channel_is_bounded_together() {
        let hub = Hub::default();
        // Nothing is behind the stars of these.
        (0..500).for_each(|n| assert!(hub.added(Kind::Pattern, &name(&format!("stock:events:{n}-*"))).is_ok()));
        let late = |n: usize| name(&format!("*{}{n:04}", "[^~]".repeat(51)));
        let most = PATTERN_TAILS_MAX / (late(0).len() - 1);
        (0..most).for_each(|n| assert!(hub.added(Kind::Pattern, &late(n)).is_ok(), "{n}"));
        assert_eq!(hub.added(Kind::Pattern, &late(most)), Err(Full::Tails));
        assert!(hub.added(Kind::Pattern, &late(0)).is_ok(), "what others have subscribed to costs no more");
        assert!(hub.added(Kind::Pattern, &name("stock:*")).is_ok());
        hub.removed(Kind::Pattern, &late(1));
        assert!(hub.added(Kind::Pattern, &late(most)).is_ok());
    }

    #[tokio::test]
    async fn others_have_their_turn_while_many_messages_are_delivered_to_many() {
        let subscribers = Subscribers::new(Arc::default());
        let hub = Arc::clone(subscribers.hub());
        // As many listeners as would be, all but the last of which take no memory.
        let (many, last) = (Pipeline::new(Rc::default()), Pipeline::new(Rc::default()));
        let listeners = (0..5_000).map(|n| (n, Rc::downgrade(if n < 4_999 { &many } else { &last }))).collect();
        subscribers.channels.borrow_mut().insert(name("a"), listeners);
        hub.subscriptions.fetch_add(1, Ordering::Relaxed);
        let cancel = CancellationToken::new();
        let local = tokio::task::LocalSet::new();
        local.spawn_local(Rc::clone(&subscribers).run(cancel.clone()));
        let turns = async {
            while hub.threads.lock().unwrap().is_empty() {
                yield_now().await;
            }
            // Fewer than tokio takes in one go by itself.
            (0..100).for_each(|_| hub.publish("a", || Bytes::from_static(b"x")));
            let (mut turns, mut delivered) = (0, 0);
            while delivered < 100 {
                yield_now().await;
                let before = delivered;
                while last.pop_ready().is_some() {
                    delivered += 1;
                }
                turns += u32::from(delivered > before);
            }
            turns
        };
        let turns = tokio::time::timeout(std::time::Duration::from_secs(30), local.run_until(turns)).await.unwrap();
        assert!(turns >= 5, "{turns}");
    }
}
