//! A REQUEST that is one of the server's own ids: its client asks what became of a change whose answer got lost.
//!
//! First Redis makes sure that the change has run or never will. Then the ledger, once it has everything up to there, knows: what has run is
//! answered from there, and what has not runs now, under this id.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::spawn_local;

use super::Call;
use crate::domain::change::Recorded;
use crate::domain::request::Sent;
use crate::store::Partition;
use crate::store::lane::{Failure, Family, Lane, Waiter};
use crate::store::partition::Inquiry;
use crate::store::requests::{HANDED_OVER, Remembered, Request};
use crate::store::settle::Settled;

/// What is known of it.
enum Found {
    /// It ran, or this REQUEST did.
    Recorded(Box<Recorded>),
    /// This REQUEST was executed with the same arguments: `<digest> <reply>`.
    Remembered(String),
    NeverRan,
}

/// Submits a client's change. One whose REQUEST is the server's own is looked up first, for which it has `more` time.
pub fn submit<F: Family, W: Waiter<F>>(call: &Call<'_>, lane: &Rc<Lane<F, W>>, op: F::Op, more: Duration, waiter: W) {
    let Some((request, sent)) = F::request(&op).and_then(|request| Some((request.clone(), request.id.sent()?))) else {
        return lane.submit(op, call.arrived, waiter);
    };
    if let Some(failure) = lane.closed() {
        return waiter.done(&op, Err(failure));
    }
    let (cx, lane) = (Rc::clone(call.cx), Rc::clone(lane));
    let deadline = call.arrived + cx.backend.within + more;
    spawn_local(async move {
        let looking = async {
            let settled = cx.backend.reads.settle(&cx.backend.partition, &request, &sent, lane.generation()).await;
            look_up(&cx.backend.partition, &request, &sent, settled.unwrap_or(Settled::Unknown)).await
        };
        match tokio::time::timeout_at(deadline.into(), looking).await.unwrap_or(None) {
            None => waiter.done(&op, Err(Failure::InDoubt(sent.id()))),
            Some(Found::NeverRan) => lane.submit_until(op, deadline.min(Instant::now() + cx.backend.within), waiter),
            Some(Found::Remembered(text)) => waiter.done(&op, Ok(F::remembered(Remembered::Known(text)))),
            Some(Found::Recorded(recorded)) => {
                let outcome = is_asked_for::<F>(&request, &op, &recorded).then(|| F::replayed(&op, &recorded.operation, recorded.position));
                waiter.done(&op, Ok(outcome.flatten().unwrap_or_else(|| F::remembered(Remembered::Other))));
            }
        }
    });
}

/// `None` where it cannot be said now.
async fn look_up(partition: &Arc<Partition>, request: &Request, sent: &Sent, settled: Settled) -> Option<Found> {
    let n = match settled {
        Settled::Unknown => return None,
        Settled::Known(_, text) if request.reply_in(&text).is_some() => return Some(Found::Remembered(text)),
        // Something else was done under this id: the ledger says what.
        Settled::Known(n, _) | Settled::Within(n) => n,
    };
    if !partition.ledger_up() {
        return None;
    }
    partition.applied.subscribe().wait_for(|applied| applied.n >= n).await.ok()?;
    let (answer, answered) = oneshot::channel();
    partition.inquiries.try_send(Inquiry { sent: sent.clone(), answer }).ok()?;
    Some(answered.await.ok()?.map_or(Found::NeverRan, |recorded| Found::Recorded(Box::new(recorded))))
}

/// Whether what was done is what is asked for. Where it was done under this very REQUEST, its fingerprint says so.
fn is_asked_for<F: Family>(request: &Request, op: &F::Op, recorded: &Recorded) -> bool {
    match &recorded.operation.remembered {
        Some(done) if done.request == request.id.escaped() && done.digest != HANDED_OVER => done.digest == request.digest,
        _ => F::is_same(op, &recorded.operation),
    }
}
