//! What the parts of one sidecar tell each other about a partition: may it sell, how far is it, how far is Postgres.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::{Notify, watch};

use crate::domain::Position;

/// Whether a partition sells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not yet, or not now; the reason is for people.
    Loading(String),
    /// Verified: this Redis process, under this epoch.
    Live { epoch: u64, run_id: String },
}

/// One partition, shared by the lanes that write to it, the relay that carries it to Postgres and the verifier that opens and closes
/// it. Standalone Redis has one.
pub struct Partition {
    /// The partition's number.
    pub id: u32,
    /// Set by the verifier, watched by the lanes.
    pub state: watch::Sender<State>,
    /// The newest position that Postgres has. Set by the relay, watched by whoever waits for Postgres.
    pub applied: watch::Sender<Position>,
    /// Why the relay cannot go on by itself; empty while it can.
    pub relay_trouble: watch::Sender<String>,
    /// Asks the verifier to look now.
    pub verify: Notify,
    redis_up: AtomicBool,
    ledger_up: AtomicBool,
    head_n: AtomicU64,
}

impl Partition {
    pub fn new(id: u32) -> Self {
        Self {
            id,
            state: watch::Sender::new(State::Loading("starting".into())),
            applied: watch::Sender::default(),
            relay_trouble: watch::Sender::default(),
            verify: Notify::new(),
            redis_up: AtomicBool::new(false),
            ledger_up: AtomicBool::new(false),
            head_n: AtomicU64::new(0),
        }
    }

    /// Whether Redis answered last.
    pub fn redis_up(&self) -> bool {
        self.redis_up.load(Ordering::Relaxed)
    }

    pub fn set_redis_up(&self, up: bool) {
        self.redis_up.store(up, Ordering::Relaxed);
    }

    /// Whether Postgres answered the relay last.
    pub fn ledger_up(&self) -> bool {
        self.ledger_up.load(Ordering::Relaxed)
    }

    pub fn set_ledger_up(&self, up: bool) {
        self.ledger_up.store(up, Ordering::Relaxed);
    }

    /// n of the newest change this sidecar knows of. No script may find less.
    pub fn head_n(&self) -> u64 {
        self.head_n.load(Ordering::Relaxed)
    }

    /// Notes that a change has been seen at n.
    pub fn saw(&self, n: u64) {
        self.head_n.fetch_max(n, Ordering::Relaxed);
    }

    /// Publishes that Postgres has everything up to `position`.
    pub fn set_applied(&self, position: Position) {
        self.saw(position.n);
        self.applied.send_if_modified(|applied| {
            let newer = position > *applied;
            if newer {
                *applied = position;
            }
            newer
        });
    }

    /// How many changes Postgres does not have yet.
    pub fn lag(&self) -> u64 {
        self.head_n().saturating_sub(self.applied.borrow().n)
    }

    /// The epoch this partition is live under; `None` while it is not.
    pub fn live_epoch(&self) -> Option<u64> {
        match &*self.state.borrow() {
            State::Live { epoch, .. } => Some(*epoch),
            State::Loading(_) => None,
        }
    }
}
