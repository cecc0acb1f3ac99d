//! What this process answered, and what got lost with a Redis that another sidecar filled anew: handed over through Postgres, and taken off
//! Redis by whoever sells.

use std::collections::HashSet;
use std::sync::Arc;

use metrics::counter;
use tracing::{info, warn};

use crate::domain::change::{Effect, Operation, StockKind};
use crate::domain::coupon::{CouponChange, CouponStep, Stepped};
use crate::domain::{Id, OrderState, Position, RequestId};
use crate::ledger::salvage::{self, Answered};
use crate::ledger::{self, PgConnection};
use crate::limits::{HANDOVER_COUPONS_WAIT, HANDOVER_MAX, LOAD_WITHIN, SALVAGE_CHANGES_MAX};
use crate::store::Partition;
use crate::store::coupon::{Action, CouponOp, CouponOutcome, Known, Part};
use crate::store::partition::{EndedEpoch, LoadRequest, Wanted};
use crate::store::requests::{HANDED_OVER, Remembered, Request};
use crate::store::stock::{self, Items, StockOp, StockOutcome};

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

async fn hand_over_these(partition: &Partition, postgres: &mut PgConnection, copies: &[Answered]) -> Result<(), ledger::Error> {
    for copies in copies.chunks(SALVAGE_CHANGES_MAX) {
        let known = salvage::in_ledger(postgres, copies).await?;
        let lost: Vec<Answered> = copies.iter().filter(|copy| !known.contains(&(copy.op.clone(), copy.operation.k))).cloned().collect();
        if !lost.is_empty() {
            salvage::hand_over(postgres, partition.id, &lost).await?;
            warn!(partition = partition.id, changes = lost.len(), "handed over what was answered before redis lost its data");
            counter!("holdfast_salvaged_total", "what" => "handed_over").increment(lost.len() as u64);
        }
    }
    Ok(())
}

/// Takes off Redis what sidecars handed over, each once: under the name that the server gives to it, as a REQUEST. What cannot be taken
/// off is owed.
pub async fn take_up(partition: &Arc<Partition>, postgres: &mut PgConnection) -> Result<(), ledger::Error> {
    if !salvage::is_anything_handed_over(postgres).await? || !salvage::lock_handed_over(postgres, partition.id).await? {
        return Ok(());
    }
    let taken_up = take_up_locked(partition, postgres).await;
    salvage::unlock_handed_over(postgres, partition.id).await?;
    taken_up
}

async fn take_up_locked(partition: &Arc<Partition>, postgres: &mut PgConnection) -> Result<(), ledger::Error> {
    // What still stands in the outbox is not in the ledger yet, and must not be done again.
    if !has_reached_postgres(partition).await {
        return Ok(());
    }
    let (mut left, mut wait) = (HANDOVER_MAX, HashSet::new());
    while left > 0 {
        let before = (left, wait.len());
        let without: Vec<String> = wait.iter().cloned().collect();
        for answered in salvage::handed_over(postgres, partition.id, &without, left).await? {
            let coupon = answered.operation.coupon();
            // What came later of a coupon comes behind that.
            if coupon.is_some_and(|coupon| wait.contains(coupon)) {
                continue;
            }
            let owed = match done_again(partition, postgres, &answered).await? {
                Done::AsAnswered => None,
                Done::Refused(why) => Some(format!("it was answered before Redis lost its data, and cannot be repeated{why}")),
                Done::Unknown => match coupon {
                    Some(coupon) if wait.len() < HANDOVER_COUPONS_WAIT => {
                        wait.insert(coupon.to_owned());
                        continue;
                    }
                    _ => return Ok(()),
                },
            };
            info!(partition = partition.id, origin = %answered.origin, op = answered.op, owed, "taken up what another sidecar handed over");
            salvage::taken_up(postgres, partition.id, &answered, owed.as_deref()).await?;
            left -= 1;
            if owed.is_some() {
                partition.parked.notify_one();
            }
        }
        if (left, wait.len()) == before {
            break;
        }
    }
    Ok(())
}

/// Waits until Postgres has what Redis has decided by now. `false` where that takes too long.
async fn has_reached_postgres(partition: &Partition) -> bool {
    let head = partition.head().n;
    let applied = async { partition.applied.subscribe().wait_for(|applied| applied.n >= head).await.is_ok() };
    tokio::time::timeout(LOAD_WITHIN, applied).await.unwrap_or(false)
}

/// Does a change again that was handed over, if it is not in the ledger by now.
async fn done_again(partition: &Partition, postgres: &mut PgConnection, answered: &Answered) -> Result<Done, ledger::Error> {
    let id = format!("hf-{}-{}", answered.op, answered.operation.k);
    let is_there = !salvage::in_ledger(postgres, std::slice::from_ref(answered)).await?.is_empty();
    if is_there || salvage::is_request_known(postgres, &id).await? {
        return Ok(Done::AsAnswered);
    }
    Ok(match again(&answered.operation, &id, answered.at_ms) {
        None => Done::Refused(String::new()),
        Some(Again::Stock(op)) => match partition.change(op).await {
            Ok(StockOutcome::Done { .. } | StockOutcome::Remembered(Remembered::Known(_))) => Done::AsAnswered,
            Ok(outcome) if is_as_answered(&answered.operation, &outcome) => Done::AsAnswered,
            Ok(refused) => Done::Refused(format!(": {refused:?}")),
            Err(_) => Done::Unknown,
        },
        Some(Again::Coupon(op)) => coupon_done_again(partition, postgres, op, answered).await?,
    })
}

/// What became of something that was done again.
enum Done {
    AsAnswered,
    /// Why not.
    Refused(String),
    /// Perhaps it ran: under its name it runs once.
    Unknown,
}

/// Does something to a coupon again. A serial is given only if Postgres says that nobody has it, and a redemption is taken back only if
/// Postgres says that it came before.
async fn coupon_done_again(
    partition: &Partition,
    postgres: &mut PgConnection,
    op: CouponOp,
    answered: &Answered,
) -> Result<Done, ledger::Error> {
    let operation = &answered.operation;
    let row = ledger::coupon::load(postgres, op.coupon.as_str()).await?;
    if let Action::Step { step: CouponStep::Issue, serial: Some(serial), .. } = &op.action
        && ledger::coupon::is_issued(postgres, op.coupon.as_str(), *serial).await?
    {
        // Its own client may have it by now, who tried again.
        let known = salvage::known(postgres, partition.id, u64::MAX, std::slice::from_ref(answered)).await?;
        return Ok(match known.is_empty() {
            false => Done::AsAnswered,
            true => Done::Refused(format!(": serial {serial} has been given out again")),
        });
    }
    let (mut redeemed_for, mut takes_none_back) = (None, false);
    if let Action::Step { step: CouponStep::Unuse, serial: Some(serial), .. } = &op.action {
        // The redemption may have been done again just now.
        if !has_reached_postgres(partition).await {
            return Ok(Done::Unknown);
        }
        let order = ledger::coupon::redeemed_before(postgres, partition.id, op.coupon.as_str(), *serial, answered.origin).await?;
        takes_none_back = order.is_none();
        redeemed_for = order.map(|order| order.as_deref().map(Id::from));
    }
    let is_nowhere = row.is_none();
    let op = CouponOp { is_nowhere, again: Some(Known { serial: row.map_or(0, |row| row.last_serial), redeemed_for }), ..op };
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
            if !has_reached_postgres(partition).await {
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
        Ok(CouponOutcome::Done { .. } | CouponOutcome::Remembered(Remembered::Known(_))) => Done::AsAnswered,
        Ok(outcome) if is_coupon_as_answered(operation, &outcome) => Done::AsAnswered,
        Ok(CouponOutcome::Moved) if takes_none_back => Done::Refused(": it has been redeemed since".to_owned()),
        Ok(CouponOutcome::Moved) | Err(_) => Done::Unknown,
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

/// Whether what was done again to an order left it as was answered then. An order that was paid and has expired since is not.
fn is_as_answered(operation: &Operation, outcome: &StockOutcome) -> bool {
    let Effect::Stock { kind, .. } = &operation.effect else { return false };
    let became = match outcome {
        StockOutcome::Told { line, .. } => match &line.effect {
            Effect::Stock { kind, .. } => OrderState::after(*kind),
            _ => None,
        },
        StockOutcome::Stands(order) => Some(order.state),
        _ => None,
    };
    match kind {
        // Whatever became of it afterwards, it had begun.
        StockKind::Reserve | StockKind::Sell => became.is_some(),
        StockKind::Extend => became.is_some_and(|state| state != OrderState::Expired),
        // Either way the units were given back.
        StockKind::Cancel | StockKind::Expire => matches!(became, Some(OrderState::Cancelled | OrderState::Expired)),
        _ => became == OrderState::after(*kind),
    }
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

/// The operation, to be done again under its client's REQUEST, else under the server's own name; `None` for what would overwrite. What is
/// done already to an order, it stays, and a coupon is issued under the serial that was answered. `at_ms`: when it was done, which what is
/// held is counted from.
fn again(operation: &Operation, id: &str, at_ms: i64) -> Option<Again> {
    let request = match &operation.remembered {
        Some(of_client) => Request::new(RequestId::of_escaped(&of_client.request), of_client.digest.clone()),
        None => Request::new(RequestId::of_escaped(id), HANDED_OVER.to_owned()),
    };
    let (kind, items, detail) = match &operation.effect {
        Effect::Stock { kind, items, detail } => (kind, items, detail),
        Effect::Coupon { coupon, change } => {
            let action = coupon_again(change)?;
            return Some(Again::Coupon(CouponOp::new(Id::from(coupon.as_str()), action, Some(request))));
        }
    };
    let items: Items = items.iter().map(|item| (Id::from(item.product.as_str()), item.delta.abs())).collect();
    let op = match (kind, detail.order.as_deref()) {
        (StockKind::Decr | StockKind::Incr, None) => StockOp::new(stock::Action::Change(*kind), items),
        (_, Some(of)) => {
            let items = if matches!(kind, StockKind::Reserve | StockKind::Sell) { items } else { Items::new() };
            let ttl_ms = of.expires_ms.map_or(0, |expires| (expires - at_ms).max(1));
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
            ("expire", Confirmed, false),
        ] {
            assert_eq!(is_as_answered(&answered(kind), &stands(state)), is_so, "{kind}, and it is {state:?}");
        }
        let reserved = Operation::decode("0 reserve order=o expires=9 | a -1 3").unwrap();
        assert!([Held, Confirmed, Cancelled, Expired].into_iter().all(|state| is_as_answered(&reserved, &stands(state))));
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
