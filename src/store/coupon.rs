//! The COUPON family: its operations as lua/coupon_write.lua takes them, and what it answers.

mod desk;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

pub use desk::{CouponDesk, Fence};

use super::copies::{CopiedBatch, Copy, Kept, Note};
use super::key_list::KeyList;
use super::lane::{Encoded, Family, Positions, Verdict};
use super::pack::Pack;
use super::partition::FoundCoupon;
use super::requests::{self, Remembered, Request, RequestKeys};
use super::script::{self, Script};
use super::words::Words;
use super::{Error, keys};
use crate::domain::change::{Effect, Operation};
use crate::domain::coupon::{Counts, CouponChange, CouponStep, CouponTerms, NewTerms, Stepped};
use crate::domain::{Grain, Id, Position, Side};

/// What a COUPON operation does.
#[derive(Clone, Debug)]
pub enum Action {
    Create(CouponTerms),
    Alter(NewTerms),
    Delete,
    /// The server itself: gives Redis what Postgres has.
    Init(Box<FoundCoupon>, Part),
    /// The server itself: brings Redis and Postgres together.
    Upkeep(Upkeep),
    Step {
        step: CouponStep,
        user: Id,
        /// Which of the user's; `None`: the one that fits.
        serial: Option<i64>,
        /// What it is redeemed for.
        order: Option<Id>,
    },
}

/// What only the server itself asks for, to bring Redis and Postgres together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upkeep {
    /// Moves one side to what the other says; compared at `n`, by this `round`. Refused where another round has corrected anything since.
    Mend { moved: Side, by: Counts, n: u64, round: String },
    /// Nothing changes any more until both sides agree.
    Freeze { reason: String },
    /// They do.
    Thaw,
    /// A serial that was answered, perhaps to nobody who has it now, is not given out again: Redis goes on above it, which is a correction
    /// of Redis.
    Keep { serial: i64 },
}

/// Which part of a coupon Redis is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// Some of its users, which Redis keeps aside.
    Piece,
    /// What is left without users, of whom it has been given so many before.
    Last(usize),
}

impl Part {
    /// As the script takes it.
    fn number(self) -> i64 {
        match self {
            Self::Whole => 0,
            Self::Piece => -1,
            Self::Last(users) => i64::try_from(users).unwrap_or(i64::MAX),
        }
    }
}

impl Action {
    /// A step of the user's coupon that fits.
    pub const fn step(step: CouponStep, user: Id) -> Self {
        Self::Step { step, user, serial: None, order: None }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Alter(_) => "alter",
            Self::Delete => "delete",
            Self::Init(..) => "init",
            Self::Upkeep(Upkeep::Mend { moved: Side::Redis, .. }) => "correct",
            Self::Upkeep(Upkeep::Keep { .. }) => "keep",
            Self::Upkeep(Upkeep::Mend { moved: Side::Postgres, .. }) => "adopt",
            Self::Upkeep(Upkeep::Freeze { .. }) => "freeze",
            Self::Upkeep(Upkeep::Thaw) => "thaw",
            Self::Step { step, .. } => step.as_str(),
        }
    }

    /// The ids that it names besides the coupon.
    pub fn ids(&self) -> impl Iterator<Item = &Id> {
        let (user, order) = if let Self::Step { user, order, .. } = self { (Some(user), order.as_ref()) } else { (None, None) };
        user.into_iter().chain(order)
    }

    fn user(&self) -> Option<&Id> {
        if let Self::Step { user, .. } = self { Some(user) } else { None }
    }

    /// The same in memory of its own.
    fn detached(&self) -> Self {
        match self {
            Self::Step { step, user, serial, order } => {
                Self::Step { step: *step, user: user.detached(), serial: *serial, order: order.as_ref().map(Id::detached) }
            }
            other => other.clone(),
        }
    }

    /// What it did, as far as `note` knows it.
    pub fn change(&self, note: &Note) -> CouponChange {
        match self {
            Self::Create(terms) => CouponChange::Create(terms.clone()),
            // It is no change, and nothing is noted of it.
            Self::Init(found, _) => CouponChange::Create(found.terms.clone()),
            Self::Alter(terms) => CouponChange::Alter { terms: *terms, remaining: note.remaining, by: None },
            Self::Upkeep(Upkeep::Mend { moved, by, .. }) => CouponChange::Mend { moved: *moved, by: *by, remaining: note.remaining },
            Self::Delete | Self::Upkeep(_) => CouponChange::Delete,
            Self::Step { step, user, order, .. } => CouponChange::Step(Stepped {
                step: *step,
                user: user.to_string(),
                serial: note.serial,
                order: order.as_ref().map(ToString::to_string),
                token: None,
                remaining: note.remaining,
            }),
        }
    }
}

/// What Postgres knows of a coupon that something is done again to.
#[derive(Clone, Debug)]
pub struct Known {
    /// Up to which serial it knows who has one. That of an issue is free if it is not above this one, or above those of Redis.
    pub serial: i64,
    /// Of an UNUSE: the order, if it had one, of the redemption that it takes back. `None`: of none that there is.
    pub redeemed_for: Option<Option<Id>>,
}

/// One COUPON operation.
#[derive(Clone, Debug)]
pub struct CouponOp {
    pub coupon: Id,
    pub action: Action,
    pub request: Option<Request>,
    /// The holding of the coupon's lock that it is issued under; `None`: it is issued while nobody holds the lock.
    pub fence: Option<Arc<Fence>>,
    /// Of a creation: Postgres does not have the coupon either.
    pub is_nowhere: bool,
    /// It was answered before Redis lost its data, and is done again as it was then, if that fits to what Postgres knows.
    pub again: Option<Known>,
    /// The client that sent it; 0 where that was none. What it sends behind an issue that waits for the lock, about the same user or about none,
    /// waits, too.
    pub client: u64,
}

impl CouponOp {
    /// One that no lock is held for yet.
    pub const fn new(coupon: Id, action: Action, request: Option<Request>) -> Self {
        Self { coupon, action, request, fence: None, is_nowhere: false, again: None, client: 0 }
    }

    /// Whether it is an issue that nothing is remembered of.
    const fn is_plain(&self) -> bool {
        self.is_issue() && self.request.is_none()
    }

    /// Whether its client issues the same coupon by one of those.
    fn comes_behind_one_of<'a>(&self, mut others: impl Iterator<Item = &'a Self>) -> bool {
        self.client != 0 && others.any(|other| other.is_issue() && other.client == self.client && other.coupon == self.coupon)
    }

    /// Whether it needs the coupon's lock.
    pub const fn is_issue(&self) -> bool {
        matches!(self.action, Action::Step { step: CouponStep::Issue, .. })
    }
}

/// What became of a COUPON operation. Times in Unix ms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CouponOutcome {
    /// It was created, altered or deleted.
    Done {
        position: Position,
        /// How many can still be issued.
        remaining: i64,
    },
    /// A coupon of the user took the step.
    Stepped {
        serial: i64,
        remaining: i64,
        position: Position,
    },
    /// Redis has been given it, or told that it is frozen or no longer.
    Loaded,
    /// The id is taken.
    Exists,
    /// The new total lies below what is issued.
    TooFew {
        issued: i64,
    },
    /// It would end before it starts.
    EndsBeforeStart,
    /// ISSUE: the user is at the limit; their latest serial. USE: this serial was redeemed before.
    Already {
        serial: i64,
    },
    SoldOut,
    NotStarted {
        start_ms: i64,
    },
    Ended {
        end_ms: i64,
    },
    /// The user does not have it.
    NotIssued,
    /// The user has it, and it was not redeemed.
    NotUsed,
    /// The user has redeemed it.
    Used {
        serial: i64,
    },
    /// Redis does not have the coupon.
    Absent,
    Deleted,
    /// A key of this coupon holds something that does not belong there.
    Corrupt,
    /// Nothing changes until Redis and Postgres agree.
    Frozen {
        reason: String,
    },
    /// Only of what the server itself asks for: what it was made from is no longer so.
    Moved,
    Remembered(Remembered),
}

/// See [`Family`].
pub struct Coupon;

impl Family for Coupon {
    const LANE: &'static str = "coupon";
    const SCRIPT: &'static Script = &script::COUPON_WRITE;
    /// The keys of lua/coupon_write.lua before the coupons: meta, outbox.
    const FIXED_KEYS: usize = 2;
    type Op = CouponOp;
    type Outcome = CouponOutcome;
    type Plan = ();
    type Desk = CouponDesk;

    fn changes(_: &CouponOp) -> bool {
        true
    }

    fn is_of_a_client(op: &CouponOp) -> bool {
        !matches!(op.action, Action::Init(..) | Action::Upkeep(_))
    }

    fn request(op: &CouponOp) -> Option<&Request> {
        op.request.as_ref()
    }

    fn weight(op: &CouponOp) -> (usize, usize) {
        let ids: usize = op.action.ids().map(|id| id.as_bytes().len()).sum();
        let (keys, mut bytes) = op.request.as_ref().map_or((0, 0), Request::weight);
        if let Action::Upkeep(Upkeep::Freeze { reason }) = &op.action {
            bytes += reason.len();
        }
        if let Action::Init(found, _) = &op.action {
            bytes += found.users.iter().map(|(user, held)| user.as_bytes().len() + held.len() + 8).sum::<usize>();
        }
        (3 + keys, 220 + 4 * op.coupon.as_bytes().len() + 3 * ids + bytes)
    }

    fn encode<'a>(ops: impl Iterator<Item = &'a CouponOp> + Clone, generation: i64, _: Grain) -> Encoded<()> {
        let mut places: HashMap<&Id, usize, foldhash::fast::RandomState> = HashMap::default();
        let mut coupons: Vec<(&Id, Vec<&Id>, Option<&Fence>)> = Vec::new();
        for op in ops.clone() {
            let place = *places.entry(&op.coupon).or_insert_with(|| {
                coupons.push((&op.coupon, Vec::new(), None));
                coupons.len()
            });
            let (_, users, fence) = &mut coupons[place - 1];
            users.extend(op.action.user());
            *fence = op.fence.as_deref().or(*fence);
        }
        let mut requests = RequestKeys::after(Self::FIXED_KEYS + 3 * coupons.len());
        let mut batch = Pack::default();
        batch.array(3).array(coupons.len());
        for (_, _, fence) in &coupons {
            batch.text(fence.map_or("", |fence| fence.field.as_str()));
        }
        batch.array(coupons.len());
        for (_, users, _) in &coupons {
            batch.array(users.len());
            for user in users {
                batch.text(user.as_str());
            }
        }
        batch.array(ops.clone().map(|op| if op.is_plain() { 2 } else { 1 }).sum());
        let mut text = String::new();
        // What is about no user, and stands behind an issue of its client.
        let mut behind_issues: Vec<(&Id, u64)> = Vec::new();
        for (k, op) in ops.clone().enumerate() {
            let place = places.get(&op.coupon).copied().unwrap_or_default();
            text.clear();
            line(&mut text, k, op);
            if op.is_plain() {
                batch.count(place).text(&text);
                continue;
            }
            let more = match op.action {
                Action::Create(_) => 5,
                Action::Init(..) => 10,
                Action::Alter(_) | Action::Step { .. } => 4,
                Action::Upkeep(Upkeep::Mend { .. }) => 6,
                Action::Delete | Action::Upkeep(Upkeep::Freeze { .. } | Upkeep::Keep { .. }) => 1,
                Action::Upkeep(Upkeep::Thaw) => 0,
            };
            batch.array(4 + more).text(op.action.kind()).text(&text).count(place);
            requests.write(&mut batch, op.request.as_ref(), generation);
            match &op.action {
                Action::Create(terms) => {
                    batch.integer(terms.total).integer(terms.per_user);
                    batch.integer(terms.start_ms.unwrap_or(0)).integer(terms.end_ms.unwrap_or(0)).is(op.is_nowhere);
                }
                Action::Init(found, part) => {
                    let FoundCoupon { terms, issued, used, last_serial, is_deleted, users, more: _ } = &**found;
                    for number in [terms.total, terms.per_user, terms.start_ms.unwrap_or(0), terms.end_ms.unwrap_or(0)] {
                        batch.integer(number);
                    }
                    batch.integer(*issued).integer(*used).integer(*last_serial).is(*is_deleted).array(2 * users.len());
                    for (user, held) in users {
                        batch.text(user.as_str()).text(held);
                    }
                    batch.integer(part.number());
                }
                Action::Alter(terms) => {
                    for number in [terms.total, terms.start_ms, terms.end_ms] {
                        match number {
                            Some(number) => batch.integer(number),
                            None => batch.no(),
                        };
                    }
                    let behind = op.comes_behind_one_of(ops.clone().take(k));
                    batch.is(behind);
                    behind_issues.extend(behind.then_some((&op.coupon, op.client)));
                }
                Action::Upkeep(Upkeep::Mend { by, n, round, .. }) => {
                    batch.integer(i64::try_from(*n).unwrap_or(i64::MAX)).text(round);
                    by.named().iter().for_each(|(_, number)| _ = batch.integer(*number));
                }
                Action::Upkeep(Upkeep::Freeze { reason }) => _ = batch.text(reason),
                Action::Upkeep(Upkeep::Thaw) => {}
                Action::Upkeep(Upkeep::Keep { serial }) => _ = batch.integer(*serial),
                Action::Delete => {
                    let behind = op.comes_behind_one_of(ops.clone().take(k));
                    batch.is(behind);
                    behind_issues.extend(behind.then_some((&op.coupon, op.client)));
                }
                Action::Step { step, serial, order, .. } => {
                    let order = match &op.again {
                        Some(Known { redeemed_for, .. }) if *step == CouponStep::Unuse => redeemed_for.as_ref(),
                        _ => Some(order),
                    };
                    let order = order.map_or_else(String::new, |order| order_text(order.as_ref().map(Id::as_str)));
                    batch.integer(serial.unwrap_or(0)).text(&order);
                    match &op.again {
                        Some(known) => batch.integer(known.serial),
                        None => batch.no(),
                    };
                    batch.is(behind_issues.contains(&(&op.coupon, op.client)));
                }
            }
        }
        let mut keys = KeyList::default();
        for (coupon, ..) in coupons {
            [keys::coupon_lock(coupon), keys::coupon_info(coupon), keys::coupon_users(coupon)].iter().for_each(|key| keys.push(&[key]));
        }
        requests.into_keys().iter().for_each(|key| keys.push(&[key]));
        Encoded { keys, batch: batch.into_bytes(), plan: () }
    }

    fn read<'a>(
        (): &(),
        ops: impl Iterator<Item = &'a CouponOp> + Clone,
        words: &mut Words,
        positions: &mut Positions,
    ) -> Result<Vec<Verdict<CouponOutcome>>, Error> {
        let mut more = 0;
        // The serial that was given last, and how many were left.
        let mut last = (0, 0);
        let mut read = |op: &CouponOp| {
            if more == 0 && words.takes("more") {
                more = words.integer()?;
            }
            if more > 0 {
                if !op.is_plain() {
                    return Err(Error::Unexpected("more issues than there were".to_owned()));
                }
                more -= 1;
                last = (last.0 + 1, last.1 - 1);
                return Ok(Verdict::Decided(CouponOutcome::Stepped { serial: last.0, remaining: last.1, position: positions.take() }));
            }
            let verdict = decided(op, words, positions)?;
            if let Verdict::Decided(CouponOutcome::Stepped { serial, remaining, .. }) = &verdict {
                last = (*serial, *remaining);
            }
            Ok(verdict)
        };
        let mut all = Vec::with_capacity(ops.size_hint().0);
        for op in ops {
            all.push(read(op)?);
        }
        if more == 0 { Ok(all) } else { Err(Error::Unexpected("more issues than there were".to_owned())) }
    }

    fn note(op: &CouponOp, outcome: &CouponOutcome) -> Option<Note> {
        // What brings the two sides together is done anew.
        if matches!(op.action, Action::Upkeep(_)) {
            return None;
        }
        let (position, serial, remaining) = match outcome {
            CouponOutcome::Done { position, remaining } => (*position, 0, *remaining),
            CouponOutcome::Stepped { serial, remaining, position } => (*position, *serial, *remaining),
            _ => return None,
        };
        Some(Note { serial, remaining, ..Note::at(position) })
    }

    fn keep(batch: &mut CopiedBatch, k: u32, op: &CouponOp, note: Note) {
        if let (Action::Step { step: CouponStep::Issue, user, .. }, None) = (&op.action, &op.request) {
            return batch.small.issued(k, &op.coupon, user, &note);
        }
        let op = CouponOp::new(op.coupon.detached(), op.action.detached(), op.request.as_ref().map(Request::detached));
        batch.copies.push(Copy { k, kept: Kept::Coupon(op), note });
    }

    fn replayed(op: &CouponOp, line: &Operation, position: Position) -> Option<CouponOutcome> {
        let Effect::Coupon { change, .. } = &line.effect else { return None };
        match change {
            CouponChange::Step(done) => Some(CouponOutcome::Stepped { serial: done.serial, remaining: done.remaining, position }),
            change if change.kind() == op.action.kind() => Some(CouponOutcome::Done { position, remaining: change.remaining() }),
            _ => None,
        }
    }

    fn is_same(op: &CouponOp, line: &Operation) -> bool {
        let Effect::Coupon { coupon, change } = &line.effect else { return false };
        let same = match (&op.action, change) {
            (Action::Create(asked), CouponChange::Create(terms)) => asked == terms,
            (Action::Alter(asked), CouponChange::Alter { terms, .. }) => asked == terms,
            (Action::Delete, CouponChange::Delete) => true,
            (Action::Step { step, user, serial, order }, CouponChange::Step(done)) => {
                *step == done.step
                    && user.as_str() == done.user
                    && serial.is_none_or(|serial| serial == done.serial)
                    && order.as_ref().map(Id::as_str) == done.order.as_deref()
            }
            _ => false,
        };
        same && op.coupon.as_str() == coupon
    }

    fn remembered(remembered: Remembered) -> CouponOutcome {
        CouponOutcome::Remembered(remembered)
    }
}

/// What the script says of an operation.
fn decided(op: &CouponOp, words: &mut Words, positions: &mut Positions) -> Result<Verdict<CouponOutcome>, Error> {
    let word = words.text()?;
    let outcome = match word.as_str() {
        "ok" => match &op.action {
            Action::Create(terms) => CouponOutcome::Done { position: positions.take(), remaining: terms.total },
            Action::Alter(_) | Action::Upkeep(Upkeep::Mend { .. } | Upkeep::Keep { .. }) => {
                CouponOutcome::Done { remaining: words.integer()?, position: positions.take() }
            }
            Action::Delete => CouponOutcome::Done { position: positions.take(), remaining: 0 },
            Action::Init(..) | Action::Upkeep(_) => CouponOutcome::Loaded,
            Action::Step { .. } => {
                CouponOutcome::Stepped { serial: words.integer()?, remaining: words.integer()?, position: positions.take() }
            }
        },
        "exists" => CouponOutcome::Exists,
        "few" => CouponOutcome::TooFew { issued: words.integer()? },
        "order" => CouponOutcome::EndsBeforeStart,
        "already" => CouponOutcome::Already { serial: words.integer()? },
        "soldout" => CouponOutcome::SoldOut,
        "early" => CouponOutcome::NotStarted { start_ms: words.integer()? },
        "ended" => CouponOutcome::Ended { end_ms: words.integer()? },
        "none" => CouponOutcome::NotIssued,
        "unused" => CouponOutcome::NotUsed,
        "used" => CouponOutcome::Used { serial: words.integer()? },
        "absent" => CouponOutcome::Absent,
        "deleted" => CouponOutcome::Deleted,
        "corrupt" => CouponOutcome::Corrupt,
        "frozen" => CouponOutcome::Frozen { reason: words.text()? },
        "moved" => CouponOutcome::Moved,
        "locked" => {
            let (holder, remaining_ms) = (words.text()?, words.integer()?);
            let lock = keys::coupon_lock(&op.coupon);
            return Ok(Verdict::SentBack(format!(
                "the lock '{lock}' is held by '{holder}' for {remaining_ms} ms more; nothing was changed"
            )));
        }
        "fenced" => {
            let lock = keys::coupon_lock(&op.coupon);
            return Ok(Verdict::Lost(format!("the lock '{lock}' was lost before the coupon was issued; nothing was changed")));
        }
        "behind" => {
            let lock = keys::coupon_lock(&op.coupon);
            return Ok(Verdict::SentBack(format!("an issue in front of it waits for the lock '{lock}'; nothing was changed")));
        }
        "loading" => {
            return Ok(Verdict::SentBack(format!("coupon '{}' has just been loaded; nothing was changed", op.coupon)));
        }
        other => return requests::verdict(other, words, CouponOutcome::Remembered),
    };
    Ok(Verdict::Decided(outcome))
}

/// One coupon of a user, as lua/coupon_write.lua keeps it in a line of the user's field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub serial: i64,
    /// `issued` or `used`.
    pub state: String,
    pub issued_at_ms: i64,
    /// What it was redeemed for.
    pub order: Option<String>,
}

impl Held {
    /// Reads a line.
    pub fn parse(line: &str) -> Result<Self, Error> {
        let mut words = line.split(' ');
        let mut read = || {
            let (serial, state, issued_at_ms) = (words.next()?.parse().ok()?, words.next()?.to_owned(), words.next()?.parse().ok()?);
            let order = match words.next()? {
                "-" => None,
                order => Some(order.strip_prefix('=')?.to_owned()),
            };
            words.next().is_none().then_some(Self { serial, state, issued_at_ms, order })
        };
        read().ok_or_else(|| Error::Unexpected(format!("a coupon of a user reads {line:?}")))
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {} {}", self.serial, self.state, self.issued_at_ms, order_text(self.order.as_deref()))
    }
}

/// A user's whole field.
pub fn field(coupons: &[Held]) -> String {
    coupons.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// An order as a user's field has it: it may be called like the mark of none.
fn order_text(order: Option<&str>) -> String {
    order.map_or_else(|| "-".to_owned(), |order| format!("={order}"))
}

/// Writes the operation's line in the outbox: whole for a creation and a deletion, else up to what only the script knows.
fn line(line: &mut String, k: usize, op: &CouponOp) {
    line.push_str(itoa::Buffer::new().format(k));
    // What keeps a serial corrects Redis, by as much as the script says.
    let told = if matches!(op.action, Action::Upkeep(Upkeep::Keep { .. })) { "correct" } else { op.action.kind() };
    for part in [" coupon.", told] {
        line.push_str(part);
    }
    if let Some(request) = &op.request {
        request.write_to(line);
    }
    for part in [" coupon=", op.coupon.as_str()] {
        line.push_str(part);
    }
    match &op.action {
        Action::Create(terms) => {
            let _ = write!(line, "{} |", CouponChange::Create(terms.clone()));
        }
        Action::Alter(terms) => {
            for (name, value) in terms.named() {
                let _ = write!(line, " {name}={value}");
            }
        }
        Action::Delete => line.push_str(" |"),
        Action::Upkeep(Upkeep::Mend { by, .. }) => {
            for (name, value) in by.named() {
                let _ = write!(line, " {name}={value}");
            }
        }
        Action::Init(..) | Action::Upkeep(_) => {}
        Action::Step { user, order, .. } => {
            for part in [" user=", user.as_str()] {
                line.push_str(part);
            }
            if let Some(order) = order {
                let _ = write!(line, " order={order}");
            }
            if let Some(fence) = &op.fence {
                line.push_str(" token=");
                line.push_str(itoa::Buffer::new().format(fence.token));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(action: Action) -> CouponOp {
        CouponOp::new(Id::from("c"), action, None)
    }

    #[test]
    fn lines_can_be_read_back() {
        let terms = CouponTerms { total: 10, per_user: 1, start_ms: None, end_ms: Some(7) };
        let new = NewTerms { total: Some(4), start_ms: None, end_ms: Some(0) };
        let step = |step, serial| Action::Step { step, user: Id::from("u"), serial, order: Some(Id::from("o")) };
        let by = Counts { total: 1, issued: -2, used: 0, serial: 3 };
        let mend = Upkeep::Mend { moved: Side::Redis, by, n: 5, round: "r".into() };
        for (action, completed) in [
            (Action::Create(terms), ""),
            (Action::Alter(new), " remaining=7 by=-6 |"),
            (Action::Delete, ""),
            (Action::Upkeep(mend), " remaining=7 |"),
            (Action::step(CouponStep::Issue, Id::from("u")), " serial=3 remaining=7 |"),
            (step(CouponStep::Use, Some(3)), " serial=3 remaining=7 |"),
            (step(CouponStep::Use, None), " serial=3 remaining=7 |"),
        ] {
            let op = op(action);
            let mut text = String::new();
            line(&mut text, 2, &op);
            let read = Operation::decode(&(text + completed)).unwrap();
            assert_eq!(Coupon::is_same(&op, &read), Coupon::is_of_a_client(&op), "{op:?} {read:?}");
            let remaining = if let Action::Create(terms) = &op.action { terms.total } else { 7 };
            let note = Note { position: Position::new(1, 1), serial: 3, remaining, available: Vec::new(), line: None };
            let copied =
                Operation { k: 2, remembered: None, effect: Effect::Coupon { coupon: "c".into(), change: op.action.change(&note) } };
            assert_eq!(copied.to_string(), read.to_string().replace(" by=-6", ""));
        }
    }

    #[test]
    fn more_issues_have_the_serials_behind_the_first() {
        let issue = || op(Action::step(CouponStep::Issue, Id::from("u")));
        let read = |ops: &[CouponOp], words: &[&str]| {
            let word = |word: &&str| word.parse().map_or_else(|_| redis::Value::BulkString(word.as_bytes().to_vec()), redis::Value::Int);
            let mut words = Words::new(redis::Value::Array(words.iter().map(word).collect())).unwrap();
            Coupon::read(&(), ops.iter(), &mut words, &mut Positions::after(Position::new(1, 9)))
        };
        let stepped = |serial, remaining, n| CouponOutcome::Stepped { serial, remaining, position: Position::new(1, n) };
        let outcome = |verdict| if let Verdict::Decided(outcome) = verdict { Some(outcome) } else { None };
        let issues: Vec<CouponOp> = (0..5).map(|_| issue()).collect();
        let words = ["ok", "7", "4", "more", "2", "soldout", "ok", "11", "0"];
        let expected = [stepped(7, 4, 10), stepped(8, 3, 11), stepped(9, 2, 12), CouponOutcome::SoldOut, stepped(11, 0, 13)];
        let outcomes: Vec<_> = read(&issues, &words).unwrap().into_iter().filter_map(outcome).collect();
        assert_eq!(outcomes, expected);
        assert!(read(&issues, &["ok", "7", "4", "more", "5"]).is_err(), "more than were asked for");
        let create = op(Action::Create(CouponTerms { total: 9, per_user: 1, start_ms: None, end_ms: None }));
        assert!(read(&[issue(), create], &["ok", "7", "4", "more", "1"]).is_err(), "that is no issue");
    }

    #[test]
    fn another_change_is_not_the_same() {
        let used = Operation::decode("0 coupon.use coupon=c user=u order=o serial=3 remaining=7 |").unwrap();
        let asked = |step, serial, order: Option<&str>| op(Action::Step { step, user: Id::from("u"), serial, order: order.map(Id::from) });
        assert!(Coupon::is_same(&asked(CouponStep::Use, None, Some("o")), &used));
        for other in [
            asked(CouponStep::Use, Some(4), Some("o")),
            asked(CouponStep::Use, None, None),
            asked(CouponStep::Revoke, None, Some("o")),
            op(Action::Delete),
        ] {
            assert!(!Coupon::is_same(&other, &used), "{other:?}");
        }
    }

    #[test]
    fn a_users_coupon_is_read_from_its_line() {
        let held = Held { serial: 12, state: "issued".into(), issued_at_ms: 7, order: None };
        assert_eq!(Held::parse("12 issued 7 -").unwrap(), held);
        let used = Held { serial: 13, state: "used".into(), issued_at_ms: 8, order: Some("-".into()) };
        assert_eq!(field(&[held, used.clone()]), "12 issued 7 -\n13 used 8 =-");
        assert_eq!(Held::parse("13 used 8 =-").unwrap(), used);
        for bad in ["12 issued", "12 issued 7 o", "12 issued 7 - -", ""] {
            assert!(Held::parse(bad).is_err(), "{bad}");
        }
    }
}
