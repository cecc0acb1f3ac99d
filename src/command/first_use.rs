//! Products that Postgres has and Redis does not: loaded when they are first used.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Instant;

use tokio::sync::oneshot;
use tokio::task::spawn_local;

use super::Context;
use super::stock::StockWaiter;
use crate::domain::Id;
use crate::limits;
use crate::store::partition::LoadRequest;
use crate::store::stock::{StockOp, StockOutcome};

/// Why a product could not be looked up.
const NOT_KNOWN: &str = "TRYAGAIN Redis does not have this product, and Postgres cannot say yet whether there is one; nothing was changed";

/// What is being looked up, and what is known not to be anywhere.
#[derive(Default)]
pub struct FirstUse {
    /// Who waits for a product that somebody is looking up already.
    loading: RefCell<HashMap<Id, Vec<oneshot::Sender<bool>>>>,
    absent: RefCell<HashMap<Id, Instant>>,
}

impl FirstUse {
    /// Whether Postgres said moments ago that it does not have the product either.
    pub fn is_nowhere(&self, product: &Id) -> bool {
        self.absent.borrow().get(product).is_some_and(|until| Instant::now() < *until)
    }

    /// The product exists now.
    pub fn exists(&self, product: &Id) {
        self.absent.borrow_mut().remove(product);
    }

    fn remember_absent(&self, product: Id) {
        let mut absent = self.absent.borrow_mut();
        if absent.len() >= limits::ABSENT_MAX {
            let now = Instant::now();
            absent.retain(|_, until| now < *until);
            if absent.len() >= limits::ABSENT_MAX {
                absent.clear();
            }
        }
        absent.insert(product, Instant::now() + limits::ABSENT_FOR);
    }
}

/// Looks the products up, gives Redis those that Postgres has, and tries the operation again.
pub fn load_and_retry(cx: &Rc<Context>, products: Vec<Id>, op: StockOp, deadline: Instant, waiter: StockWaiter) {
    let cx = Rc::clone(cx);
    spawn_local(async move {
        let lookups: Vec<_> = products.into_iter().map(|product| spawn_local(load(Rc::clone(&cx), product))).collect();
        let all = async {
            for lookup in lookups {
                if !lookup.await.unwrap_or(false) {
                    return false;
                }
            }
            true
        };
        match tokio::time::timeout_at(deadline.into(), all).await {
            Ok(true) => cx.backend.stock.submit_until(op, deadline.min(Instant::now() + cx.backend.within), waiter),
            _ => waiter.refuse(NOT_KNOWN),
        }
    });
}

/// Looks one product up, once for all who ask meanwhile. `false` where Postgres cannot say.
async fn load(cx: Rc<Context>, product: Id) -> bool {
    let first_use = &cx.backend.first_use;
    let (sender, receiver) = oneshot::channel();
    let first = {
        let mut loading = first_use.loading.borrow_mut();
        let waiting = loading.entry(product.clone()).or_default();
        waiting.push(sender);
        waiting.len() == 1
    };
    if first {
        let known = look_up(&cx, &product).await;
        for waiting in first_use.loading.borrow_mut().remove(&product).unwrap_or_default() {
            // Whoever has given up does not hear it.
            _ = waiting.send(known);
        }
    }
    receiver.await.unwrap_or(false)
}

/// Gives Redis a product that Postgres has. `false` where that is not done within [`limits::LOAD_WITHIN`].
async fn look_up(cx: &Context, product: &Id) -> bool {
    let loading = async {
        while cx.backend.partition.ledger_up() {
            let (answer, answered) = oneshot::channel();
            let request = LoadRequest { product: product.clone(), absent_at: cx.backend.partition.head().n, answer };
            if cx.backend.partition.loads.try_send(request).is_err() {
                return false;
            }
            let Ok(found) = answered.await else { return false };
            let Some(found) = found else {
                cx.backend.first_use.remember_absent(product.clone());
                return true;
            };
            let (answer, answered) = oneshot::channel();
            cx.backend.stock.submit(StockOp::init(product.clone(), found), Instant::now(), StockWaiter::Server(answer));
            match answered.await {
                // Another program has changed something in Postgres meanwhile, and Redis has been told.
                Ok(Ok(StockOutcome::Moved)) => {}
                Ok(Ok(StockOutcome::Done { .. } | StockOutcome::Absent { .. })) => return true,
                _ => return false,
            }
        }
        false
    };
    tokio::time::timeout(limits::LOAD_WITHIN, loading).await.unwrap_or(false)
}
