//! What the parts of one sidecar tell each other about a partition: may it sell, how far is it, how far is Postgres.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::bound::Bound;
use super::copies::Copies;
use super::coupon::{CouponOp, CouponOutcome};
use super::lane::Failure;
use super::sold_out::SoldOut;
use super::stock::{Action, StockOp, StockOutcome};
use crate::domain::change::Recorded;
use crate::domain::coupon::CouponTerms;
use crate::domain::history::PastChange;
use crate::domain::request::Sent;
use crate::domain::{DeadLetter, Drift, Grain, Id, InboxMark, Order, Position, Settled};
use crate::limits;

/// Whether a partition sells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not yet, or not now; the reason is for people.
    Loading(String),
    /// Being filled from Postgres; how far is for people.
    Rebuilding(String),
    /// Verified: this Redis process, under this epoch.
    Live { epoch: u64, run_id: String },
}

/// What the relay cannot get over by itself. The text is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The outbox does not continue what Postgres has: nothing may be sold until that is cleared up.
    Broken(String),
    /// Postgres does not take a change, or cannot be used at all: sales go on, and wait in the outbox.
    Held(String),
}

/// An epoch that is over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndedEpoch {
    pub epoch: u64,
    /// n of its last change that Postgres has at its own place.
    pub last_n: u64,
    /// n of those beyond it that were saved and have another place, in order.
    pub saved: Vec<u64>,
    /// n of those beyond it that were handed over and are to be saved yet, in order.
    pub waiting: Vec<u64>,
}

impl EndedEpoch {
    /// Whether Postgres has its change n.
    pub fn has(&self, n: u64) -> bool {
        n <= self.last_n || self.saved.binary_search(&n).is_ok()
    }

    /// Whether Postgres will never have its change n.
    pub fn has_lost(&self, n: u64) -> bool {
        !self.has(n) && self.waiting.binary_search(&n).is_err()
    }
}

/// Asks for something that Redis does not have and Postgres may.
#[derive(Debug)]
pub struct LoadRequest {
    /// n when Redis did not have it: Postgres is asked once it has everything up to there.
    pub absent_at: u64,
    pub wanted: Wanted,
}

/// What is asked for, and how to answer: `None` where there is no such thing. Dropped where Postgres cannot say.
#[derive(Debug)]
pub enum Wanted {
    Product(Id, oneshot::Sender<Option<Found>>),
    Coupon(Id, oneshot::Sender<Option<FoundCoupon>>),
    /// Only whether there is such a coupon.
    Exists(Id, oneshot::Sender<Option<()>>),
    /// The next who have a coupon, behind this user; none where there are no more.
    Users(Id, Id, oneshot::Sender<Option<Vec<CouponUser>>>),
}

/// A user who has some of a coupon, with their lines as Redis keeps them.
pub type CouponUser = (Id, String);

/// A coupon that Postgres has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundCoupon {
    pub terms: CouponTerms,
    /// How many are out.
    pub issued: i64,
    /// How many of them were redeemed.
    pub used: i64,
    /// The highest serial ever issued.
    pub last_serial: i64,
    pub is_deleted: bool,
    /// Who has any, in the order of Postgres, or the first of them.
    pub users: Vec<CouponUser>,
    /// Whether that are not all.
    pub more: bool,
}

/// A product that Postgres has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The units that Redis is to be given.
    pub available: i64,
    /// Up to where of the inbox they count.
    pub mark: InboxMark,
    /// n of the newest change that they count.
    pub n: u64,
    /// Threshold of the low-stock event.
    pub low: Option<i64>,
    /// Why a person has to look at it.
    pub frozen: Option<String>,
}

/// Asks for something that only Postgres has. Dropped unanswered where Postgres cannot say.
#[derive(Debug)]
pub enum Lookup {
    /// An order that Redis does not have.
    Order {
        order: Id,
        /// n when Redis did not have it: Postgres is asked once it has everything up to there.
        absent_at: u64,
        /// `None` where there is no such order.
        answer: oneshot::Sender<Option<Order>>,
    },
    /// What became of a product, the newest change first.
    History {
        product: Id,
        /// Only what came before this position.
        before: Option<Position>,
        /// At most so many.
        count: i64,
        answer: oneshot::Sender<Vec<PastChange>>,
    },
}

/// Asks for a comparison of Redis with Postgres now.
#[derive(Debug)]
pub struct SyncRequest {
    /// These; everything where it is empty.
    pub products: Vec<Id>,
    /// Nothing may be changed.
    pub dry_run: bool,
    /// When the answer is needed: what has been found by then.
    pub deadline: Instant,
    /// The products that differ, or why that cannot be said now; nothing was changed then.
    pub answer: oneshot::Sender<Result<Vec<Drift>, String>>,
}

/// A change that the server itself asks for, and where to say what became of it.
pub enum ServerChange {
    Stock { op: StockOp, answer: oneshot::Sender<Result<StockOutcome, Failure>> },
    Coupon { op: CouponOp, answer: oneshot::Sender<Result<CouponOutcome, Failure>> },
}

/// What a person asks about dead letters. Dropped unanswered where Postgres cannot be asked.
#[derive(Debug)]
pub enum LetterRequest {
    /// The oldest, at most so many.
    List { count: usize, answer: oneshot::Sender<Vec<DeadLetter>> },
    /// Applies one after all.
    Retry { id: i64, answer: oneshot::Sender<Settled> },
    /// Gives one up.
    Drop { id: i64, answer: oneshot::Sender<Settled> },
}

/// Asks what the ledger has of an operation. Dropped unanswered where Postgres cannot say.
#[derive(Debug)]
pub struct Inquiry {
    pub sent: Sent,
    /// `None`: nothing, up to where it has been applied.
    pub answer: oneshot::Sender<Option<Recorded>>,
}

/// What the other end of a partition's channels receives.
pub struct Receivers {
    pub inquiries: mpsc::Receiver<Inquiry>,
    pub letters: mpsc::Receiver<LetterRequest>,
    pub loads: mpsc::Receiver<LoadRequest>,
    pub lookups: mpsc::Receiver<Lookup>,
    pub syncs: mpsc::Receiver<SyncRequest>,
    pub changes: mpsc::Receiver<ServerChange>,
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
    /// Why the relay cannot go on by itself; `None` while it can.
    pub relay_trouble: watch::Sender<Option<Trouble>>,
    /// The epochs that the relay has gone beyond. Set by the verifier.
    pub ended: watch::Sender<Vec<EndedEpoch>>,
    /// Reaches the loader. Bounded: where it is full, the client is told to try again.
    pub loads: mpsc::Sender<LoadRequest>,
    /// Reaches the librarian. Bounded likewise.
    pub lookups: mpsc::Sender<Lookup>,
    /// Reaches the archivist. Bounded likewise: where it is full, it stays in doubt.
    pub inquiries: mpsc::Sender<Inquiry>,
    /// Reaches the reconciler. Bounded likewise.
    pub syncs: mpsc::Sender<SyncRequest>,
    /// Reaches the clerk. Bounded, like the loader's.
    pub letters: mpsc::Sender<LetterRequest>,
    /// Tells the clerk that there is a new dead letter.
    pub parked: Notify,
    dead_letters: AtomicU64,
    /// Reaches the lanes that write, see [`Partition::change`].
    changes: mpsc::Sender<ServerChange>,
    /// How much the outbox may hold.
    pub bound: Bound,
    /// What was answered and Postgres does not have yet.
    pub copies: Copies,
    /// Products that Redis has refused moments ago.
    pub sold_out: SoldOut,
    /// What a line of the outbox stands for of what carries neither ORDER nor REQUEST.
    pub grain: Grain,
    /// Asks the verifier to look now.
    pub verify: Notify,
    redis_up: AtomicBool,
    ledger_up: AtomicBool,
    head: Mutex<Position>,
}

impl Partition {
    /// A partition, and what its loader, its reconciler and its lane receive.
    /// `copies_bytes_max`: see [`Copies::new`].
    pub fn new(id: u32, copies_bytes_max: usize) -> (Self, Receivers) {
        let (loads, requests) = mpsc::channel(limits::LOADS_MAX);
        let (lookups, looking_up) = mpsc::channel(limits::LOADS_MAX);
        let (inquiries, inquired) = mpsc::channel(limits::INQUIRIES_MAX);
        let (syncs, syncing) = mpsc::channel(limits::SYNCS_MAX);
        let (letters, asked) = mpsc::channel(limits::DEAD_LETTER_REQUESTS_MAX);
        let (changes, changing) = mpsc::channel(limits::SERVER_CHANGES_MAX);
        let partition = Self {
            id,
            loads,
            lookups,
            inquiries,
            syncs,
            letters,
            parked: Notify::new(),
            dead_letters: AtomicU64::new(0),
            changes,
            state: watch::Sender::new(State::Loading("starting".into())),
            applied: watch::Sender::default(),
            relay_trouble: watch::Sender::default(),
            ended: watch::Sender::default(),
            bound: Bound::new(u64::MAX, u64::MAX),
            copies: Copies::new(copies_bytes_max),
            sold_out: SoldOut::new(Duration::ZERO),
            grain: Grain::Operation,
            verify: Notify::new(),
            redis_up: AtomicBool::new(false),
            ledger_up: AtomicBool::new(false),
            head: Mutex::default(),
        };
        (
            partition,
            Receivers { inquiries: inquired, letters: asked, loads: requests, lookups: looking_up, syncs: syncing, changes: changing },
        )
    }

    /// The same with an outbox of at most so many changes that are not applied, and so many bytes of Redis's memory.
    pub fn bounded(self, changes_max: u64, bytes_max: u64) -> Self {
        Self { bound: Bound::new(changes_max, bytes_max), ..self }
    }

    /// The same with refusals that are repeated for so long without asking Redis.
    pub fn refusing_for(self, lasts: Duration) -> Self {
        Self { sold_out: SoldOut::new(lasts), ..self }
    }

    /// The same with lines of this grain.
    pub fn written_by(self, grain: Grain) -> Self {
        Self { grain, ..self }
    }

    /// Makes a change that the server itself asks for. It goes through the lane like a client's, and has its time.
    pub async fn change(&self, op: StockOp) -> Result<StockOutcome, Failure> {
        self.submit(op).await?.await.unwrap_or_else(|_| Err(gone()))
    }

    /// The same without waiting for what becomes of it. Changes are decided in the order in which they are submitted.
    pub async fn submit(&self, op: StockOp) -> Result<oneshot::Receiver<Result<StockOutcome, Failure>>, Failure> {
        let (answer, answered) = oneshot::channel();
        self.changes.send(ServerChange::Stock { op, answer }).await.map_err(|_| gone())?;
        Ok(answered)
    }

    /// Waits until Postgres has what Redis has decided by now, whoever asked for it. `false` where that takes too long.
    pub async fn has_reached_postgres(&self) -> bool {
        // With any answer Redis says how many changes there are.
        let look = StockOp::new(Action::Read, vec![(Id::from("any"), 0)]);
        if self.change(look).await.is_err() {
            return false;
        }
        let head = self.head().n;
        let applied = async { self.applied.subscribe().wait_for(|applied| applied.n >= head).await.is_ok() };
        tokio::time::timeout(limits::LOAD_WITHIN, applied).await.unwrap_or(false)
    }

    /// [`Partition::change`] of a coupon.
    pub async fn change_coupon(&self, op: CouponOp) -> Result<CouponOutcome, Failure> {
        let (answer, answered) = oneshot::channel();
        self.changes.send(ServerChange::Coupon { op, answer }).await.map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    /// The same of several at once, so that they share a batch. Returns their outcomes in their order.
    pub async fn change_coupons(&self, ops: Vec<CouponOp>) -> Vec<Result<CouponOutcome, Failure>> {
        let mut answers = Vec::with_capacity(ops.len());
        for op in ops {
            let (answer, answered) = oneshot::channel();
            answers.push(self.changes.send(ServerChange::Coupon { op, answer }).await.map(|()| answered));
        }
        let mut outcomes = Vec::with_capacity(answers.len());
        for answered in answers {
            outcomes.push(match answered {
                Ok(answered) => answered.await.unwrap_or_else(|_| Err(gone())),
                Err(_) => Err(gone()),
            });
        }
        outcomes
    }

    /// Makes several of them at once, so that they share a batch. Returns their outcomes in their order.
    pub async fn change_all(&self, ops: Vec<StockOp>) -> Vec<Result<StockOutcome, Failure>> {
        let mut answers = Vec::with_capacity(ops.len());
        for op in ops {
            answers.push(self.submit(op).await);
        }
        let mut outcomes = Vec::with_capacity(answers.len());
        for answered in answers {
            outcomes.push(match answered {
                Ok(answered) => answered.await.unwrap_or_else(|_| Err(gone())),
                Err(failure) => Err(failure),
            });
        }
        outcomes
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

    /// The newest change this sidecar knows of. No script may find less.
    pub fn head(&self) -> Position {
        *self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a change has been seen.
    pub fn saw(&self, position: Position) {
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        *head = position.max(*head);
        drop(head);
        self.bound.note_changes(self.lag());
    }

    /// Notes that a script has found n changes under this epoch, of whichever sidecar.
    pub fn saw_n(&self, epoch: u64, n: u64) {
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        if n > head.n && epoch >= head.epoch {
            *head = Position::new(epoch, n);
        }
    }

    /// What this sidecar had seen is over: under a later epoch the newest change is this one. Only the verifier says so.
    pub fn see_anew(&self, position: Position) {
        *self.head.lock().unwrap_or_else(PoisonError::into_inner) = position;
    }

    /// Publishes which epochs have ended, and where.
    pub fn set_ended(&self, ended: Vec<EndedEpoch>) {
        self.copies.forget(*self.applied.borrow(), &ended);
        self.ended.send_if_modified(|known| {
            let new = *known != ended;
            *known = ended;
            new
        });
    }

    /// Publishes that Postgres has everything up to `position`.
    pub fn set_applied(&self, position: Position) {
        self.saw(position);
        self.copies.forget(position, &self.ended.borrow());
        self.applied.send_if_modified(|applied| {
            let newer = position > *applied;
            if newer {
                *applied = position;
            }
            newer
        });
        self.bound.note_changes(self.lag());
    }

    /// What stands in the relay's way, for people; empty while nothing does.
    pub fn trouble_text(&self) -> String {
        match &*self.relay_trouble.borrow() {
            Some(Trouble::Broken(text) | Trouble::Held(text)) => text.clone(),
            None => String::new(),
        }
    }

    /// How many dead letters there were at the last look.
    pub fn dead_letters(&self) -> u64 {
        self.dead_letters.load(Ordering::Relaxed)
    }

    pub fn set_dead_letters(&self, count: u64) {
        self.dead_letters.store(count, Ordering::Relaxed);
    }

    /// How many changes Postgres does not have yet.
    pub fn lag(&self) -> u64 {
        self.head().n.saturating_sub(self.applied.borrow().n)
    }

    /// The epoch this partition is live under; `None` while it is not.
    pub fn live_epoch(&self) -> Option<u64> {
        match &*self.state.borrow() {
            State::Live { epoch, .. } => Some(*epoch),
            State::Loading(_) | State::Rebuilding(_) => None,
        }
    }
}

fn gone() -> Failure {
    Failure::TryAgain("shutting down".into())
}
