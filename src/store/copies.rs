//! What this process has answered and Postgres does not have yet: kept here, so that it survives a Redis that loses its data.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::coupon::CouponOp;
use super::partition::EndedEpoch;
use super::requests::Request;
use super::stock::{Action, StockOp};
use crate::domain::change::{Detail, Effect, Item, Operation, Remembered, StockKind};
use crate::domain::coupon::{CouponChange, CouponStep, Stepped};
use crate::domain::{Id, Position};
use crate::limits;
use crate::sabotage::breaks;

/// What the script said of an accepted operation, as far as its copy needs it.
#[derive(Clone, Debug)]
pub struct Note {
    pub position: Position,
    /// Of a user's coupon.
    pub serial: i64,
    pub remaining: i64,
    /// What was available after it; only where a REQUEST may ask for it again.
    pub available: Vec<i64>,
    /// Its line in the outbox, where that says what the operation itself does not.
    pub line: Option<Box<Operation>>,
}

impl Note {
    /// Of what was accepted there, and says nothing more.
    pub fn at(position: Position) -> Self {
        Self { position, serial: 0, remaining: 0, available: Vec::new(), line: None }
    }
}

/// An accepted operation.
#[derive(Debug)]
pub enum Kept {
    Stock(StockOp),
    Coupon(CouponOp),
    /// As its line in the outbox says.
    Line(Box<Operation>),
}

/// One accepted operation of a batch.
#[derive(Debug)]
pub struct Copy {
    /// Its place in the batch.
    pub k: u32,
    pub kept: Kept,
    pub note: Note,
}

/// Ids of the operations of a batch, one after the other.
#[derive(Debug, Default)]
struct Names(String);

/// Where one of them stands.
#[derive(Clone, Copy, Debug)]
struct Name {
    at: u32,
    len: u16,
}

impl Names {
    fn push(&mut self, id: &Id) -> Name {
        let at = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0.push_str(id.as_str());
        Name { at, len: u16::try_from(id.as_str().len()).unwrap_or(u16::MAX) }
    }

    fn get(&self, name: Name) -> &str {
        let at = name.at as usize;
        self.0.get(at..at + usize::from(name.len)).unwrap_or_default()
    }

    /// One that is mostly the `last` once more: a hot one is named once, not once an operation.
    fn push_again(&mut self, id: &Id, last: Option<Name>) -> Name {
        last.filter(|last| self.get(*last) == id.as_str()).unwrap_or_else(|| self.push(id))
    }
}

/// No batch has as many operations as an `u16` can say.
fn small(k: u32) -> u16 {
    u16::try_from(k).unwrap_or(u16::MAX)
}

/// Operations that are by far the most, and are kept close together: those that give or take units of one product and carry no REQUEST, and
/// issues of coupons without one. All of a batch have one epoch.
#[derive(Debug, Default)]
pub struct Small {
    epoch: u64,
    /// The newest of their positions: what was decided one by one may stand behind what was summed.
    newest: u64,
    names: Names,
    parts: Vec<Part>,
    issues: Vec<Issue>,
    /// For how many there is to be room when the first comes.
    room: usize,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    n: u64,
    delta: i64,
    product: Name,
    k: u16,
}

#[derive(Clone, Copy, Debug)]
struct Issue {
    n: u64,
    serial: i64,
    remaining: i64,
    coupon: Name,
    user: Name,
    k: u16,
}

impl Small {
    fn saw(&mut self, position: Position) {
        self.epoch = position.epoch;
        self.newest = self.newest.max(position.n);
    }

    /// Takes in the operation at place `k` of its batch, which moved `product` by `delta`.
    pub fn moved(&mut self, k: u32, product: &Id, delta: i64, position: Position) {
        self.saw(position);
        if self.parts.is_empty() {
            self.parts.reserve(self.room);
        }
        let product = self.names.push_again(product, self.parts.last().map(|last| last.product));
        self.parts.push(Part { n: position.n, delta, product, k: small(k) });
    }

    /// Takes in the issue at place `k` of its batch, of `coupon` to `user`, as it was answered.
    pub fn issued(&mut self, k: u32, coupon: &Id, user: &Id, note: &Note) {
        self.saw(note.position);
        if self.issues.is_empty() {
            self.issues.reserve(self.room);
            self.names.0.reserve(coupon.as_str().len() + self.room * user.as_str().len());
        }
        let coupon = self.names.push_again(coupon, self.issues.last().map(|last| last.coupon));
        let (user, Note { position, serial, remaining, .. }) = (self.names.push(user), note);
        self.issues.push(Issue { n: position.n, serial: *serial, remaining: *remaining, coupon, user, k: small(k) });
    }

    fn len(&self) -> usize {
        self.parts.len() + self.issues.len()
    }

    fn positions(&self) -> impl Iterator<Item = Position> {
        let all = self.parts.iter().map(|part| part.n).chain(self.issues.iter().map(|issue| issue.n));
        all.map(|n| Position::new(self.epoch, n))
    }

    fn last(&self) -> Position {
        Position::new(self.epoch, self.newest)
    }

    fn bytes(&self) -> usize {
        self.names.0.capacity() + self.parts.capacity() * size_of::<Part>() + self.issues.capacity() * size_of::<Issue>()
    }

    fn shrink(&mut self) {
        self.names.0.shrink_to_fit();
        self.parts.shrink_to_fit();
        self.issues.shrink_to_fit();
    }

    fn operations(&self, wanted: impl Fn(Position) -> bool) -> impl Iterator<Item = (Position, Operation)> {
        let told = |k: u16, effect| Operation { k: k.into(), remembered: None, effect };
        let part = move |part: &Part| {
            let kind = if part.delta < 0 { StockKind::Decr } else { StockKind::Incr };
            let items = vec![Item { product: self.names.get(part.product).to_owned(), delta: part.delta, available: 0 }];
            (part.n, told(part.k, Effect::Stock { kind, items, detail: Detail::default() }))
        };
        let issue = move |issue: &Issue| {
            let Issue { serial, remaining, .. } = *issue;
            let user = self.names.get(issue.user).to_owned();
            let change = CouponChange::Step(Stepped { step: CouponStep::Issue, user, serial, order: None, token: None, remaining });
            (issue.n, told(issue.k, Effect::Coupon { coupon: self.names.get(issue.coupon).to_owned(), change }))
        };
        let at = |n| Position::new(self.epoch, n);
        let (parts, issues) = (self.parts.iter().map(part), self.issues.iter().map(issue));
        parts.chain(issues).map(move |(n, operation)| (at(n), operation)).filter(move |(position, _)| wanted(*position))
    }
}

/// The accepted operations of one batch.
#[derive(Debug)]
pub struct CopiedBatch {
    /// `<instance>:<lane>:<counter>`.
    pub op: String,
    /// When, by Redis's clock, in Unix ms.
    pub at_ms: i64,
    pub small: Small,
    pub copies: Vec<Copy>,
}

impl CopiedBatch {
    /// Of a batch of about so many operations.
    pub fn new(op: String, at_ms: i64, operations: usize) -> Self {
        Self { op, at_ms, small: Small { room: operations, ..Small::default() }, copies: Vec::new() }
    }

    fn len(&self) -> usize {
        self.small.len() + self.copies.len()
    }

    fn positions(&self) -> impl Iterator<Item = Position> {
        self.small.positions().chain(self.copies.iter().map(|copy| copy.note.position))
    }

    fn last(&self) -> Position {
        let copies = self.copies.iter().map(|copy| copy.note.position).max();
        copies.unwrap_or_default().max(self.small.last())
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + self.op.len() + self.small.bytes() + self.copies.iter().map(Copy::bytes).sum::<usize>()
    }

    fn salvage(&self, wanted: &impl Fn(Position) -> bool, all: &mut Vec<Salvaged>) {
        let small = self.small.operations(wanted);
        all.extend(small.map(|(origin, operation)| Salvaged { op: self.op.clone(), origin, at_ms: self.at_ms, operation }));
        all.extend(self.copies.iter().filter(|copy| wanted(copy.note.position)).map(|copy| copy.salvage(self)));
    }
}

/// An operation out of a copy, as the ledger takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Salvaged {
    pub op: String,
    /// What was answered.
    pub origin: Position,
    pub at_ms: i64,
    pub operation: Operation,
}

/// See the module. Bounded: when full, nothing more is accepted until Postgres has caught up.
#[derive(Debug)]
pub struct Copies {
    batches: Mutex<VecDeque<CopiedBatch>>,
    bytes: AtomicUsize,
    bytes_max: usize,
    full: AtomicBool,
    turns: AtomicUsize,
}

impl Copies {
    /// `bytes_max`: about how much memory they may take.
    pub fn new(bytes_max: usize) -> Self {
        Self { batches: Mutex::default(), bytes: AtomicUsize::new(0), bytes_max, full: AtomicBool::new(false), turns: AtomicUsize::new(1) }
    }

    fn batches(&self) -> MutexGuard<'_, VecDeque<CopiedBatch>> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// About how many bytes they take.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.batches().iter().map(CopiedBatch::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.batches().is_empty()
    }

    /// Whether nothing more may be accepted. Once full it stays so until an eighth is free again, so that it does not flap.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    fn resized(&self, bytes: usize) {
        self.bytes.store(bytes, Ordering::Relaxed);
        if bytes >= self.bytes_max {
            self.full.store(true, Ordering::Relaxed);
        } else if bytes < self.bytes_max / 8 * 7 {
            self.full.store(false, Ordering::Relaxed);
        }
    }

    /// Takes a batch in, before any of its replies is written.
    pub fn keep(&self, mut batch: CopiedBatch) {
        if batch.len() == 0 || breaks("no-copies") {
            return;
        }
        batch.small.shrink();
        batch.copies.shrink_to_fit();
        let mut batches = self.batches();
        self.resized(self.bytes() + batch.bytes());
        batches.push_back(batch);
    }

    /// Gives up what Postgres has: up to `applied` in its epoch, and up to where the `ended` ones ended.
    pub fn forget(&self, applied: Position, ended: &[EndedEpoch]) {
        self.retain(|batch| {
            let last = batch.last();
            let of_it = ended.iter().find(|ended| ended.epoch == last.epoch);
            let is_there = |ended: &EndedEpoch| batch.positions().all(|position| ended.has(position.n));
            !(last.epoch == applied.epoch && last.n <= applied.n || of_it.is_some_and(is_there))
        });
    }

    /// Gives up these batches: Postgres has them, or was handed them.
    pub fn forget_ops(&self, ops: &std::collections::HashSet<String>) {
        self.retain(|batch| !ops.contains(&batch.op));
    }

    fn retain(&self, keep: impl Fn(&CopiedBatch) -> bool) {
        let mut gone = Vec::new();
        let mut batches = self.batches();
        // They come nearly in order, so what may go stands in front but for the few of another lane or epoch.
        while batches.front().is_some_and(|batch| !keep(batch)) {
            gone.extend(batches.pop_front());
        }
        // What stays in front may do so for long: now and then all are looked at.
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        if turn.is_multiple_of(limits::COPIES_LOOK_EVERY) || batches.iter().take(limits::COPIES_LOOK_BEHIND).any(|batch| !keep(batch)) {
            let (stay, go) = std::mem::take(&mut *batches).into_iter().partition(keep);
            *batches = stay;
            let go: VecDeque<_> = go;
            gone.extend(go);
        }
        if !gone.is_empty() {
            self.resized(self.bytes().saturating_sub(gone.iter().map(CopiedBatch::bytes).sum()));
        }
        drop(batches);
    }

    /// The operations of every epoch before `epoch` whose position is `wanted`, in the order in which they took effect. Lanes wait meanwhile,
    /// so only what is wanted is written out.
    pub fn before_epoch(&self, epoch: u64, wanted: impl Fn(Position) -> bool) -> Vec<Salvaged> {
        let batches = self.batches();
        let old = batches.iter().filter(|batch| batch.last().epoch < epoch);
        let mut all = Vec::new();
        old.for_each(|batch| batch.salvage(&wanted, &mut all));
        drop(batches);
        all.sort_by_key(|salvaged| salvaged.origin);
        all
    }

    /// Of every batch its op and the position of its last accepted operation.
    pub fn ops(&self) -> Vec<(String, Position)> {
        self.batches().iter().map(|batch| (batch.op.clone(), batch.last())).collect()
    }
}

impl Copy {
    fn bytes(&self) -> usize {
        let (_, request) = self.parts();
        // An id stands on the heap with what the allocator and `Bytes` need for it; a number of what was available takes 8 bytes.
        let id = |bytes: &[u8]| 48 + bytes.len();
        let ids = match &self.kept {
            Kept::Stock(op) => op.items.iter().map(|(product, _)| size_of_val(product) + 16 + id(product.as_bytes())).sum(),
            Kept::Coupon(op) => id(op.coupon.as_bytes()) + op.action.ids().map(|named| id(named.as_bytes())).sum::<usize>(),
            Kept::Line(line) => {
                size_of::<Operation>() + line.products().map(|product| size_of::<Item>() + 8 + id(product.as_bytes())).sum::<usize>() + 256
            }
        };
        let request = request.map_or(0, |request| id(request.id.as_bytes()) + id(request.digest.as_bytes()));
        size_of::<Self>() + ids + request
    }

    fn parts(&self) -> (&Kept, Option<&Request>) {
        let request = match &self.kept {
            Kept::Stock(op) => op.request.as_deref(),
            Kept::Coupon(op) => op.request.as_ref(),
            Kept::Line(_) => None,
        };
        (&self.kept, request)
    }

    fn salvage(&self, batch: &CopiedBatch) -> Salvaged {
        let (kept, request) = self.parts();
        let told = |operation| Salvaged { op: batch.op.clone(), origin: self.note.position, at_ms: batch.at_ms, operation };
        let remembered = request.map(|request| Remembered { request: request.id.escaped(), digest: request.digest.clone() });
        let effect = match kept {
            Kept::Stock(op) => stock_effect(op, &self.note),
            Kept::Coupon(CouponOp { coupon, action, .. }) => {
                Effect::Coupon { coupon: coupon.to_string(), change: action.change(&self.note) }
            }
            Kept::Line(line) => return told(line.as_ref().clone()),
        };
        told(Operation { k: self.k, remembered, effect })
    }
}

/// What the operation did. A SET's difference is not known here, so it is told as one that creates: it leaves what was set. What was
/// available afterwards is not known where no REQUEST may ask for it: 0.
fn stock_effect(op: &StockOp, note: &Note) -> Effect {
    let kind = if let Action::Change(kind) = op.action { kind } else { StockKind::Incr };
    let item = |(i, (product, quantity)): (usize, &(crate::domain::Id, i64))| Item {
        product: product.to_string(),
        delta: match kind {
            StockKind::Decr => -quantity,
            StockKind::Incr => *quantity,
            _ => 0,
        },
        available: if kind == StockKind::Set { *quantity } else { note.available.get(i).copied().unwrap_or_default() },
    };
    let detail = Detail { low: op.low, created: kind == StockKind::Set, ..Detail::default() };
    Effect::Stock { kind, items: op.items.iter().enumerate().map(item).collect(), detail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Id;

    fn batch(op: &str, epoch: u64, first_n: u64, count: u32) -> CopiedBatch {
        let copies = (0..count).map(|k| Copy {
            k,
            kept: Kept::Stock(StockOp::new(Action::Change(StockKind::Decr), vec![(Id::from("a"), 2)])),
            note: Note::at(Position::new(epoch, first_n + u64::from(k))),
        });
        CopiedBatch { copies: copies.collect(), ..CopiedBatch::new(op.into(), 7, 0) }
    }

    #[test]
    fn what_postgres_has_is_given_up_and_nothing_else() {
        let copies = Copies::new(1 << 20);
        copies.keep(batch("i:stock:1", 1, 1, 2));
        copies.keep(batch("i:stock:2", 1, 3, 2));
        copies.forget(Position::new(1, 3), &[]);
        assert_eq!(copies.len(), 2, "its last is not applied");
        copies.forget(Position::new(2, 9), &[]);
        assert_eq!(copies.len(), 2, "where the first epoch ended is not known yet");
        copies.forget(Position::new(2, 9), &[EndedEpoch { epoch: 1, last_n: 4, ..EndedEpoch::default() }]);
        assert_eq!((copies.len(), copies.bytes()), (0, 0));
    }

    #[test]
    fn operations_on_one_product_are_kept_close_together_and_told_like_others() {
        let copies = Copies::new(1 << 20);
        let mut sold = CopiedBatch::new("i:stock:1".into(), 7, 3);
        for (k, product, delta) in [(0, "a", -2), (2, "a", -1), (3, "b", 4)] {
            sold.small.moved(k, &Id::from(product), delta, Position::new(1, 5 + u64::from(k)));
        }
        let bytes = sold.bytes();
        copies.keep(sold);
        assert_eq!((copies.len(), copies.ops()), (3, vec![("i:stock:1".to_owned(), Position::new(1, 8))]));
        let told: Vec<_> = copies.before_epoch(2, |position| position.n > 5).iter().map(|told| told.operation.to_string()).collect();
        assert_eq!(told, ["2 decr | a -1 0", "3 incr | b 4 0"]);
        copies.forget(Position::new(1, 7), &[]);
        assert_eq!(copies.len(), 3);
        copies.forget(Position::new(1, 8), &[]);
        assert_eq!((copies.len(), copies.bytes()), (0, 0));
        assert!(bytes < size_of::<CopiedBatch>() + 200, "{bytes}");
    }

    #[test]
    fn issues_are_kept_close_together_and_told_like_others() {
        let copies = Copies::new(1 << 20);
        let mut issued = CopiedBatch::new("i:coupon:1".into(), 7, 3);
        for (k, coupon, user, serial) in [(0, "c", "u", 1), (2, "c", "v", 2), (3, "d", "u", 1)] {
            let note = Note { serial, remaining: 9 - serial, ..Note::at(Position::new(1, 5 + u64::from(k))) };
            issued.small.issued(k, &Id::from(coupon), &Id::from(user), &note);
        }
        let bytes = issued.bytes();
        copies.keep(issued);
        assert_eq!((copies.len(), copies.ops()), (3, vec![("i:coupon:1".to_owned(), Position::new(1, 8))]));
        let told: Vec<_> = copies.before_epoch(2, |position| position.n > 5).iter().map(|told| told.operation.to_string()).collect();
        assert_eq!(
            told,
            ["2 coupon.issue coupon=c user=v serial=2 remaining=7 |", "3 coupon.issue coupon=d user=u serial=1 remaining=8 |"]
        );
        assert!(bytes < size_of::<CopiedBatch>() + 300, "{bytes}");
    }

    #[test]
    fn what_stands_in_front_holds_nothing_back() {
        let copies = Copies::new(1 << 20);
        copies.keep(batch("i:coupon:1", 2, 5, 1));
        copies.keep(batch("i:stock:1", 2, 4, 1));
        copies.forget(Position::new(2, 4), &[]);
        assert_eq!(copies.ops(), [("i:coupon:1".to_owned(), Position::new(2, 5))]);
    }

    #[test]
    fn they_are_told_in_the_order_in_which_they_took_effect() {
        let copies = Copies::new(1 << 20);
        copies.keep(batch("i:coupon:1", 1, 5, 1));
        copies.keep(batch("i:stock:1", 1, 4, 1));
        copies.keep(batch("i:stock:2", 2, 6, 1));
        let old = copies.before_epoch(2, |_| true);
        assert_eq!(old.iter().map(|salvaged| salvaged.origin.n).collect::<Vec<_>>(), [4, 5]);
        let Effect::Stock { items, .. } = &old[0].operation.effect else { panic!() };
        assert_eq!(items[0].delta, -2);
    }

    #[test]
    fn what_was_saved_at_another_place_is_given_up_also_behind_many_that_stay() {
        let copies = Copies::new(1 << 20);
        (1..=20).for_each(|n| copies.keep(batch(&format!("i:stock:{n}"), 1, 10 + n, 1)));
        copies.keep(batch("i:stock:21", 1, 40, 2));
        let ended = [EndedEpoch { epoch: 1, last_n: 5, saved: vec![40, 41], waiting: vec![] }];
        (0..limits::COPIES_LOOK_EVERY).for_each(|_| copies.forget(Position::new(2, 6), &ended));
        assert_eq!(copies.len(), 20);
    }

    #[test]
    fn full_is_said_until_an_eighth_is_free() {
        let one = batch("i:stock:1", 1, 1, 1).bytes();
        let copies = Copies::new(one * 8);
        (1..=8).for_each(|n| copies.keep(batch(&format!("i:stock:{n}"), 1, n, 1)));
        assert!(copies.is_full());
        copies.forget(Position::new(1, 1), &[]);
        assert!(copies.is_full());
        copies.forget(Position::new(1, 2), &[]);
        assert!(!copies.is_full());
    }
}
