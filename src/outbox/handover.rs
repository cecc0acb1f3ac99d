//! What this process answered, and what got lost with a Redis that another sidecar filled anew: handed over through Postgres, and taken off
//! Redis by whoever sells.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use metrics::counter;
use tracing::{info, warn};

use crate::domain::change::{Effect, Operation, Remembered, StockKind};
use crate::domain::coupon::{CouponChange, CouponStep, Stepped};
use crate::domain::{Id, OrderState, Position, RequestId};
use crate::ledger::salvage::{self, Answered, HighestSerial, Without};
use crate::ledger::{self, PgConnection, dead_letter};
use crate::limits::{HANDOVER_COUPONS_WAIT, HANDOVER_MAX, LOAD_WITHIN, SALVAGE_CHANGES_MAX, SERVER_CHANGES_MAX};
use crate::store::coupon::{Action, CouponOp, CouponOutcome, Known, Part, Upkeep};
use crate::store::partition::{EndedEpoch, LoadRequest, Wanted};
use crate::store::requests::{HANDED_OVER, Remembered as Recalled, Request};
use crate::store::stock::{self, Items, Looked, StockOp, StockOutcome};
use crate::store::{Connection, Partition};

/// Hands over the copies of these ended epochs that the ledger does not have. Those of an epoch that has not ended are still on their way.
/// Returns whether there were any.
pub async fn hand_over(
    partition: &Partition,
    postgres: &mut PgConnection,
    epoch: u64,
    ended: &[EndedEpoch],
) -> Result<bool, ledger::Error> {
    let beyond = |position: Position| ended.iter().any(|end| end.epoch == position.epoch && !end.has(position.n));
    let beyond: Vec<Answered> = partition.copies.before_epoch(epoch, beyond).into_iter().map(Answered::from).collect();
    hand_over_these(partition, postgres, &beyond).await?;
    let any = !beyond.is_empty();
    partition.copies.forget_ops(&beyond.into_iter().map(|copy| copy.op).collect::<HashSet<_>>());
    Ok(any)
}

/// Hands over all copies of the epochs before `epoch`, under which another sidecar fills Redis: it waits for them. They are kept until they
/// are known to be saved.
pub async fn hand_over_all(partition: &Partition, postgres: &mut PgConnection, epoch: u64) -> Result<(), ledger::Error> {
    let copies: Vec<Answered> = partition.copies.before_epoch(epoch, |_| true).into_iter().map(Answered::from).collect();
    hand_over_these(partition, postgres, &copies).await
}

/// Hands over those of them that the ledger does not have.
pub(super) async fn hand_over_these(partition: &Partition, postgres: &mut PgConnection, copies: &[Answered]) -> Result<(), ledger::Error> {
    for copies in copies.chunks(SALVAGE_CHANGES_MAX) {
        let known = salvage::in_ledger(postgres, copies).await?;
        let lost: Vec<Answered> = copies.iter().filter(|copy| !known.contains(&copy.name())).cloned().collect();
        if !lost.is_empty() {
            salvage::hand_over(postgres, partition.id, &lost).await?;
            warn!(partition = partition.id, changes = lost.len(), "handed over what was answered before redis lost its data");
            counter!("holdfast_salvaged_total", "what" => "handed_over").increment(lost.len() as u64);
        }
    }
    Ok(())
}

/// Takes off Redis what sidecars handed over, each once: under its client's REQUEST as long as that is remembered, for `window_ms`, else under
/// the name that the server gives to it. What cannot be taken off is owed. Errors with what Redis or Postgres said, for the log.
pub async fn take_up(
    partition: &Arc<Partition>,
    redis: &mut Connection,
    postgres: &mut PgConnection,
    window_ms: i64,
) -> Result<(), String> {
    let text = |error: ledger::Error| error.to_string();
    if !salvage::is_anything_handed_over(postgres).await.map_err(text)? {
        return Ok(());
    }
    let now_ms = redis.time_ms().await.map_err(|error| error.to_string())?;
    if !salvage::lock_handed_over(postgres, partition.id).await.map_err(text)? {
        return Ok(());
    }
    let mut owing = BTreeSet::new();
    let taken_up = TakeUp { partition, window_ms, remembered_since_ms: now_ms.saturating_sub(window_ms) }.run(postgres, &mut owing).await;
    // What fits is taken off before its product is frozen for what does not. What a person has unfrozen by now they had not seen.
    let n = partition.head().n;
    let freeze = |product| StockOp::upkeep(product, 0, stock::Upkeep::Freeze { n, reason: dead_letter::FROZEN.to_owned() });
    let freezes: Vec<StockOp> = owing.into_iter().map(freeze).collect();
    for freezes in freezes.chunks(SERVER_CHANGES_MAX) {
        partition.change_all(freezes.to_vec()).await;
    }
    // It is looked whether they are.
    partition.parked.notify_one();
    salvage::unlock_handed_over(postgres, partition.id).await.map_err(text)?;
    taken_up.map_err(text)
}

/// What it is taken up with.
struct TakeUp<'a> {
    partition: &'a Arc<Partition>,
    /// How long a REQUEST id is remembered.
    window_ms: i64,
    /// Since when those are that are remembered now, by Redis's clock.
    remembered_since_ms: i64,
}

impl TakeUp<'_> {
    /// `owing`: the products of what could not be taken off.
    async fn run(&self, postgres: &mut PgConnection, owing: &mut BTreeSet<Id>) -> Result<(), ledger::Error> {
        let partition = self.partition;
        let Some(mut serials) = self.keep_serials(postgres).await? else { return Ok(()) };
        salvage::pass_over_repeated(postgres, partition.id, self.window_ms, true).await?;
        let (mut left, mut wait, mut unknown) = (HANDOVER_MAX, HashSet::new(), 0);
        while left > 0 {
            let leaves_coupons = unknown >= HANDOVER_COUPONS_WAIT;
            let before = (left, wait.len(), leaves_coupons);
            let these: Vec<String> = wait.iter().cloned().collect();
            let without = if leaves_coupons { Without::AllCoupons } else { Without::These(&these) };
            let handed = salvage::handed_over(postgres, partition.id, without, left).await?;
            let known = salvage::known(postgres, partition.id, self.window_ms, &handed).await?;
            let (mut known, open): (Vec<_>, Vec<_>) = handed.into_iter().partition(|one| known.contains(&one.name()));
            known.retain(|one| serials.are_kept(one));
            salvage::settled(postgres, &known).await?;
            let ends = salvage::ends(postgres, partition.id, &open).await?;
            for answered in open {
                let coupon = answered.operation.coupon();
                // What came later of a coupon comes behind that.
                if coupon.is_some_and(|coupon| unknown >= HANDOVER_COUPONS_WAIT || wait.contains(coupon)) {
                    continue;
                }
                let done = match serials.permit(&answered) {
                    true => self.done_again(postgres, &answered, ends.get(&answered.name()).copied(), &serials).await?,
                    false => Done::Later,
                };
                let owed = match (done, coupon) {
                    (Done::AsAnswered, _) => None,
                    (Done::Refused(why), _) => Some(format!("it was answered before Redis lost its data, and cannot be repeated{why}")),
                    (Done::Forgotten, _) => Some("it was answered before Redis lost its data, and cannot be repeated".to_owned()),
                    (Done::Later, Some(coupon)) => {
                        wait.insert(coupon.to_owned());
                        continue;
                    }
                    (Done::Unknown, Some(coupon)) => {
                        wait.insert(coupon.to_owned());
                        unknown += 1;
                        continue;
                    }
                    (Done::Later | Done::Unknown, None) => return Ok(()),
                };
                info!(partition = partition.id, origin = %answered.origin, op = answered.op, owed, "taken up what another sidecar handed over");
                salvage::taken_up(postgres, partition.id, &answered, owed.as_deref()).await?;
                left -= 1;
                if owed.is_some() {
                    owing.extend(answered.operation.products().map(Id::from));
                }
                // Before anybody is given a serial of it that was answered already.
                if let Effect::Coupon { coupon, change: CouponChange::Create(_) } = &answered.operation.effect
                    && let Some(serial) = serials.highest.get(coupon)
                {
                    let highest = [HighestSerial { coupon: coupon.clone(), serial: *serial, is_there: false }];
                    let said = self.keep_in_redis(&highest).await;
                    // Whom it was issued to in between Postgres knows then.
                    if matches!(said.as_slice(), [Some(CouponOutcome::Done { .. } | CouponOutcome::Exists)])
                        && partition.has_reached_postgres().await
                    {
                        serials.kept.insert(coupon.clone());
                    }
                }
            }
            if known.is_empty() && (left, wait.len(), unknown >= HANDOVER_COUPONS_WAIT) == before {
                break;
            }
        }
        Ok(())
    }

    /// Keeps the serials that were handed over from being given out again, whatever becomes of them, in Redis and in Postgres; and sees to it that
    /// Postgres has all that Redis has decided by then: what still stands in the outbox is not in the ledger yet, and must not be done again.
    /// `None`: not yet.
    async fn keep_serials(&self, postgres: &mut PgConnection) -> Result<Option<Serials>, ledger::Error> {
        let highest = salvage::highest_serials(postgres, self.partition.id).await?;
        // In Redis first: what it has given out below them by now reaches Postgres, where is looked for who has one.
        let mut said = self.keep_in_redis(&highest).await;
        for (of, said) in highest.iter().zip(&mut said) {
            if matches!(said, Some(CouponOutcome::Absent)) && of.is_there && load(self.partition, Id::from(of.coupon.as_str())).await {
                *said = self.keep_in_redis(std::slice::from_ref(of)).await.pop().flatten();
            }
        }
        if !self.partition.has_reached_postgres().await {
            return Ok(None);
        }
        let (kept, absent): (Vec<_>, Vec<_>) =
            highest.iter().zip(said).partition(|(_, said)| !matches!(said, None | Some(CouponOutcome::Absent)));
        let (mut kept, absent): (Vec<HighestSerial>, Vec<HighestSerial>) = (
            kept.into_iter().map(|(of, _)| of.clone()).collect(),
            absent.into_iter().filter(|(of, said)| said.is_some() && of.is_there).map(|(of, _)| of.clone()).collect(),
        );
        salvage::keep_these(postgres, self.partition.id, &[kept.as_slice(), &absent].concat()).await?;
        // One that cannot be loaded here may have been by its users, as Postgres had it before.
        let said = self.keep_in_redis(&absent).await;
        kept.extend(absent.into_iter().zip(said).filter(|(_, said)| matches!(said, Some(CouponOutcome::Absent))).map(|(of, _)| of));
        Ok(Some(Serials {
            kept: kept.into_iter().map(|of| of.coupon).collect(),
            highest: highest.into_iter().map(|of| (of.coupon, of.serial)).collect(),
            issued: HashSet::new(),
        }))
    }

    /// Returns what became of each; `None` where Redis does not answer, or cannot say.
    async fn keep_in_redis(&self, highest: &[HighestSerial]) -> Vec<Option<CouponOutcome>> {
        let keep =
            |of: &HighestSerial| CouponOp::new(Id::from(of.coupon.as_str()), Action::Upkeep(Upkeep::Keep { serial: of.serial }), None);
        let mut outcomes = Vec::with_capacity(highest.len());
        for some in highest.chunks(SERVER_CHANGES_MAX) {
            outcomes.extend(self.partition.change_coupons(some.iter().map(keep).collect()).await);
        }
        use CouponOutcome::{Absent, Corrupt, Deleted, Done, Exists};
        let says = |outcome: &CouponOutcome| matches!(outcome, Done { .. } | Exists | Absent | Deleted | Corrupt);
        outcomes.into_iter().map(|outcome| outcome.ok().filter(says)).collect()
    }

    /// Does a change again whose effect nothing has had. `end`: what ends its order waits behind it.
    async fn done_again(
        &self,
        postgres: &mut PgConnection,
        answered: &Answered,
        end: Option<StockKind>,
        serials: &Serials,
    ) -> Result<Done, ledger::Error> {
        let remembered = answered.operation.remembered.as_ref().filter(|_| answered.at_ms > self.remembered_since_ms);
        if let Some(Remembered { request, digest }) = remembered {
            let request = Request::new(RequestId::of_escaped(request), digest.clone());
            match self.done_under(postgres, answered, end, request, serials).await? {
                Done::Forgotten => {}
                done => return Ok(done),
            }
        }
        let id = format!("hf-{}-{}", answered.op, answered.operation.k);
        self.done_under(postgres, answered, end, Request::new(RequestId::of_escaped(&id), HANDED_OVER.to_owned()), serials).await
    }

    async fn done_under(
        &self,
        postgres: &mut PgConnection,
        answered: &Answered,
        end: Option<StockKind>,
        request: Request,
        serials: &Serials,
    ) -> Result<Done, ledger::Error> {
        let partition = self.partition;
        Ok(match again(&answered.operation, request.clone(), answered.at_ms, end) {
            None if end.is_some() => Done::AsAnswered,
            None => Done::Refused(String::new()),
            Some(Again::Stock(mut op)) => {
                if let Some(of) = &mut op.order {
                    of.looked = looked(postgres, &answered.operation, &of.order, answered.at_ms).await?;
                }
                match partition.change(op).await {
                    Ok(StockOutcome::Done { .. }) => Done::AsAnswered,
                    Ok(StockOutcome::Remembered(recalled)) => Done::recalled(&request, &recalled),
                    Ok(StockOutcome::Nowhere) if salvage::is_reservation_owed(postgres, &answered.operation).await? => {
                        Done::Refused(": what it gives back is owed".to_owned())
                    }
                    Ok(outcome) if is_as_answered(&answered.operation, &outcome) => Done::AsAnswered,
                    // Its end gives back nothing either, unless the order cannot change at all.
                    Ok(refused) if comes_to_nothing(&answered.operation, end) && !matches!(refused, StockOutcome::Stuck { .. }) => {
                        Done::AsAnswered
                    }
                    Ok(refused) => Done::Refused(format!(": {refused:?}")),
                    Err(_) => Done::Unknown,
                }
            }
            Some(Again::Coupon(op)) => coupon_done_again(partition, postgres, op, &request, answered, self.window_ms, serials).await?,
        })
    }
}

/// The serials that were handed over.
struct Serials {
    /// The highest of each coupon.
    highest: HashMap<String, i64>,
    /// The coupons of which none up to that one is given out again.
    kept: HashSet<String>,
    /// What has been issued here, which Postgres need not have yet.
    issued: HashSet<(String, i64)>,
}

impl Serials {
    /// Whether what an issue gives is kept. What was handed over since that was looked at is not, and waits for the next time.
    fn are_kept(&self, one: &Answered) -> bool {
        issued(one)
            .is_none_or(|(coupon, serial)| self.kept.contains(coupon) && self.highest.get(coupon).is_some_and(|up_to| serial <= *up_to))
    }

    /// Whether it may be done again now, and notes it.
    fn permit(&mut self, one: &Answered) -> bool {
        self.are_kept(one) && issued(one).is_none_or(|(coupon, serial)| self.issued.insert((coupon.to_owned(), serial)))
    }
}

/// The coupon and the serial of an issue.
fn issued(answered: &Answered) -> Option<(&str, i64)> {
    match &answered.operation.effect {
        Effect::Coupon { coupon, change: CouponChange::Step(Stepped { step: CouponStep::Issue, serial, .. }) } => Some((coupon, *serial)),
        _ => None,
    }
}

/// Whether what an order was given has come to nothing by what ended it. What was paid does not expire: that end is another reservation's.
fn comes_to_nothing(operation: &Operation, end: Option<StockKind>) -> bool {
    let is_paid = matches!(operation.effect, Effect::Stock { kind: StockKind::Confirm | StockKind::Sell, .. });
    end == Some(StockKind::Cancel) || end.is_some() && !is_paid
}

/// What Postgres has of an order, for a Redis that has none. One that was forgotten when it began anew, or was held, is another.
async fn looked(postgres: &mut PgConnection, operation: &Operation, order: &Id, at_ms: i64) -> Result<Looked, ledger::Error> {
    let Some(row) = ledger::order::load(postgres, &[order.to_string()]).await?.pop() else { return Ok(Looked::Nowhere) };
    let order = row.order()?;
    let may_be_another = operation.begun_order().is_some() || operation.was_held();
    let is_another = may_be_another && ledger::order::is_forgotten(order.state, row.changed_at_ms, at_ms);
    Ok(if is_another { Looked::Nowhere } else { Looked::Found(order) })
}

/// What became of something that was done again.
enum Done {
    AsAnswered,
    /// Why not.
    Refused(String),
    /// Not under this REQUEST: it is out of its time, or stands for something else by now.
    Forgotten,
    /// Perhaps it ran: under its name it runs once.
    Unknown,
    /// Not now: what it is about has to become another first.
    Later,
}

impl Done {
    /// What it means that its REQUEST was not executed. Under the server's own name only the change itself is done, whoever asks for it.
    fn recalled(request: &Request, recalled: &Recalled) -> Self {
        match recalled {
            Recalled::Known(text) if request.id.sent().is_some() || request.reply_in(text).is_some() => Self::AsAnswered,
            _ => Self::Forgotten,
        }
    }
}

/// Does something to a coupon again. A serial is given only if Postgres says that nobody has it, and a redemption is taken back only if
/// Postgres says that it came before.
async fn coupon_done_again(
    partition: &Partition,
    postgres: &mut PgConnection,
    op: CouponOp,
    request: &Request,
    answered: &Answered,
    window_ms: i64,
    serials: &Serials,
) -> Result<Done, ledger::Error> {
    let operation = &answered.operation;
    let row = ledger::coupon::load(postgres, op.coupon.as_str()).await?;
    if let Action::Step { step: CouponStep::Issue, serial: Some(serial), .. } = &op.action
        && ledger::coupon::is_issued(postgres, op.coupon.as_str(), *serial).await?
    {
        // By its own client, just now?
        if !partition.has_reached_postgres().await {
            return Ok(Done::Unknown);
        }
        let known = salvage::known(postgres, partition.id, window_ms, std::slice::from_ref(answered)).await?;
        let refused = || Done::Refused(format!(": serial {serial} has been given out again"));
        return Ok(if known.is_empty() { refused() } else { Done::AsAnswered });
    }
    let (mut redeemed_for, mut takes_none_back) = (None, false);
    if let Action::Step { step: CouponStep::Unuse, serial: Some(serial), .. } = &op.action {
        // The redemption may have been done again just now.
        if !partition.has_reached_postgres().await {
            return Ok(Done::Unknown);
        }
        let order = ledger::coupon::redeemed_before(postgres, partition.id, op.coupon.as_str(), *serial, answered.origin).await?;
        takes_none_back = order.is_none();
        redeemed_for = order.map(|order| order.as_deref().map(Id::from));
    }
    let is_nowhere = row.is_none();
    // What Redis gave out below what is kept has reached Postgres.
    let known = serials.kept.get(op.coupon.as_str()).and_then(|coupon| serials.highest.get(coupon)).copied().unwrap_or(0);
    let op = CouponOp { is_nowhere, again: Some(Known { serial: known.max(row.map_or(0, |row| row.last_serial)), redeemed_for }), ..op };
    let mut outcome = partition.change_coupon(op.clone()).await;
    if matches!(outcome, Ok(CouponOutcome::Absent)) && !is_nowhere && load(partition, op.coupon.clone()).await {
        outcome = partition.change_coupon(op.clone()).await;
    }
    if let (Effect::Coupon { change: CouponChange::Step(lost), .. }, Ok(CouponOutcome::Already { serial })) = (&operation.effect, &outcome)
        && lost.step == CouponStep::Use
    {
        let mut redeemed = ledger::coupon::used_for(postgres, op.coupon.as_str(), *serial).await?;
        if redeemed.is_none() {
            // Postgres does not know yet by which, or refuses to.
            if !partition.has_reached_postgres().await {
                return Ok(Done::Unknown);
            }
            redeemed = ledger::coupon::used_for(postgres, op.coupon.as_str(), *serial).await?;
        }
        match redeemed {
            Some(order) if order == lost.order => {}
            Some(_) => return Ok(Done::Refused(format!(": serial {serial} has been redeemed by another order"))),
            None => return Ok(Done::Refused(format!(": serial {serial} is redeemed in Redis by what Postgres does not have"))),
        }
    }
    Ok(match outcome {
        Ok(CouponOutcome::Done { .. }) => Done::AsAnswered,
        Ok(CouponOutcome::Remembered(recalled)) => Done::recalled(request, &recalled),
        Ok(outcome) if is_coupon_as_answered(operation, &outcome) => Done::AsAnswered,
        Ok(CouponOutcome::Moved) if takes_none_back => Done::Refused(": it has been redeemed since".to_owned()),
        // What is frozen waits for a person, and this for what they say.
        Ok(CouponOutcome::Moved | CouponOutcome::Frozen { .. }) => Done::Later,
        Err(_) => Done::Unknown,
        Ok(refused) => Done::Refused(format!(": {refused:?}")),
    })
}

/// Gives Redis what Postgres has of a coupon. Returns whether it is there now: not one whose users are too many for one script.
async fn load(partition: &Partition, coupon: Id) -> bool {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let request = LoadRequest { absent_at: partition.head().n, wanted: Wanted::Coupon(coupon.clone(), answer) };
    if partition.loads.send(request).await.is_err() {
        return false;
    }
    let Ok(Ok(Some(found))) = tokio::time::timeout(LOAD_WITHIN, answered).await else { return false };
    let init = |found| CouponOp::new(coupon, Action::Init(Box::new(found), Part::Whole), None);
    !found.more && matches!(partition.change_coupon(init(found)).await, Ok(CouponOutcome::Loaded | CouponOutcome::Exists))
}

/// Whether what was done again to an order left it as was answered then.
fn is_as_answered(operation: &Operation, outcome: &StockOutcome) -> bool {
    let Effect::Stock { kind, .. } = &operation.effect else { return false };
    let became = match outcome {
        // It is held anew, and expires by itself, or is not held any more, or what it held was never taken.
        StockOutcome::Stands(_) | StockOutcome::Nowhere if *kind == StockKind::Expire => return true,
        StockOutcome::Told { line, .. } => match &line.effect {
            Effect::Stock { kind, .. } => OrderState::after(*kind),
            _ => None,
        },
        StockOutcome::Stands(order) => Some(order.state),
        _ => None,
    };
    became.is_some_and(|state| state.is_as_after(*kind))
}

/// The same of a coupon. What was redeemed may have been so again since, and what was revoked may not be there to be revoked.
fn is_coupon_as_answered(operation: &Operation, outcome: &CouponOutcome) -> bool {
    let Effect::Coupon { change, .. } = &operation.effect else { return false };
    match (change, outcome) {
        (CouponChange::Delete, outcome) => matches!(outcome, CouponOutcome::Deleted | CouponOutcome::Absent),
        (CouponChange::Step(answered), outcome) => match (answered.step, outcome) {
            (_, CouponOutcome::Stepped { serial, .. }) | (CouponStep::Use, CouponOutcome::Already { serial }) => *serial == answered.serial,
            (CouponStep::Unuse, CouponOutcome::NotUsed) | (CouponStep::Revoke, CouponOutcome::NotIssued) => true,
            _ => false,
        },
        _ => false,
    }
}

/// What is to be done again.
enum Again {
    Stock(StockOp),
    Coupon(CouponOp),
}

/// The operation, to be done again under this REQUEST; `None` for what would overwrite. What is done already to an order, it stays, and a coupon
/// is issued under the serial that was answered. `at_ms`: when it was done, which what is held is counted from. `end`: what ends its order;
/// what has expired is held no longer than it takes to say so.
fn again(operation: &Operation, request: Request, at_ms: i64, end: Option<StockKind>) -> Option<Again> {
    let (kind, items, detail) = match &operation.effect {
        Effect::Stock { kind, items, detail } => (kind, items, detail),
        Effect::Coupon { coupon, change } => {
            let action = coupon_again(change)?;
            return Some(Again::Coupon(CouponOp::new(Id::from(coupon.as_str()), action, Some(request))));
        }
    };
    let items: Items = items.iter().map(|item| (Id::from(item.product.as_str()), item.delta.abs())).collect();
    let expires = end == Some(StockKind::Expire);
    let op = match (kind, detail.order.as_deref()) {
        (StockKind::Extend, _) if expires => return None,
        (StockKind::Decr | StockKind::Incr, None) => StockOp::new(stock::Action::Change(*kind), items),
        (_, Some(of)) => {
            let items = if matches!(kind, StockKind::Reserve | StockKind::Sell) { items } else { Items::new() };
            let ttl_ms = of.expires_ms.map_or(0, |until| if expires { 1 } else { (until - at_ms).max(1) });
            StockOp::of_order(stock::Action::Change(*kind), Id::from(of.order.as_str()), ttl_ms, items)
        }
        _ => return None,
    };
    Some(Again::Stock(StockOp { request: Some(Box::new(request)), ..op }))
}

/// What is done again to a coupon. New terms would overwrite those that came after them.
fn coupon_again(change: &CouponChange) -> Option<Action> {
    match change {
        CouponChange::Create(terms) => Some(Action::Create(terms.clone())),
        CouponChange::Delete => Some(Action::Delete),
        CouponChange::Step(Stepped { step, user, serial, order, .. }) => {
            Some(Action::Step { step: *step, user: Id::from(user.as_str()), serial: Some(*serial), order: order.as_deref().map(Id::from) })
        }
        CouponChange::Alter { .. } | CouponChange::Mend { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Order, OrderState};

    #[test]
    fn what_an_order_became_since_may_not_be_what_was_answered() {
        let answered = |kind: &str| Operation::decode(&format!("0 {kind} order=o from=held units=1 | a 0 0")).unwrap();
        let stands = |state| {
            StockOutcome::Stands(Box::new(Order { state, expires_ms: 1, items: vec![("a".into(), 1)], position: Position::default() }))
        };
        use OrderState::{Cancelled, Confirmed, Expired, Held};
        for (kind, state, is_so) in [
            ("confirm", Confirmed, true),
            ("confirm", Expired, false),
            ("confirm", Cancelled, false),
            ("cancel", Cancelled, true),
            ("cancel", Expired, true),
            ("cancel", Confirmed, false),
            ("expire", Held, true),
            ("expire", Confirmed, true),
        ] {
            assert_eq!(is_as_answered(&answered(kind), &stands(state)), is_so, "{kind}, and it is {state:?}");
        }
        assert!(is_as_answered(&answered("expire"), &StockOutcome::Nowhere));
        assert!(!is_as_answered(&answered("confirm"), &StockOutcome::Nowhere));
        let reserved = Operation::decode("0 reserve order=o expires=9 | a -1 3").unwrap();
        let (expire, cancel) = (Some(StockKind::Expire), Some(StockKind::Cancel));
        for (operation, end, nothing) in [
            (&reserved, expire, true),
            (&reserved, None, false),
            (&answered("confirm"), cancel, true),
            (&answered("confirm"), expire, false),
        ] {
            assert_eq!(comes_to_nothing(operation, end), nothing, "{operation:?}, {end:?}");
        }
        assert!([Held, Confirmed, Cancelled, Expired].into_iter().all(|state| is_as_answered(&reserved, &stands(state))));
        let sold = Operation::decode("0 decr | a -1 3").unwrap();
        for refused in [StockOutcome::Short { item: 0, available: 0 }, StockOutcome::Absent { item: 0 }] {
            assert!(!is_as_answered(&sold, &refused) && !is_as_answered(&reserved, &refused), "{refused:?}");
        }
        let stepped = |serial| CouponOutcome::Stepped { serial, remaining: 0, position: Position::default() };
        for (line, outcome, is_so) in [
            ("issue", stepped(3), true),
            ("issue", CouponOutcome::Already { serial: 3 }, false),
            ("issue", CouponOutcome::SoldOut, false),
            ("use", CouponOutcome::Already { serial: 3 }, true),
            ("use", CouponOutcome::NotIssued, false),
            ("unuse", CouponOutcome::NotUsed, true),
            ("revoke", CouponOutcome::NotIssued, true),
            ("revoke", CouponOutcome::Used { serial: 3 }, false),
        ] {
            let answered = Operation::decode(&format!("0 coupon.{line} coupon=c user=u serial=3 remaining=1 |")).unwrap();
            assert_eq!(is_coupon_as_answered(&answered, &outcome), is_so, "{line}, and {outcome:?}");
        }
        let expired = StockOutcome::Told { line: Box::new(answered("expire")), position: Position::default() };
        assert!(!is_as_answered(&answered("confirm"), &expired), "it was due by then");
        assert!(is_as_answered(&answered("cancel"), &expired));
    }
}
