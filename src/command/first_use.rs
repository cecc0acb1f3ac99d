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
use crate::domain::change::StockKind;
use crate::limits;
use crate::store::partition::LoadRequest;
use crate::store::stock::{Action, StockOp};

/// Why a product could not be looked up.
const NOT_KNOWN: &str = "TRYAGAIN Redis does not have this product, and Postgres cannot say yet whether there is one; nothing was changed";

/// What is being looked up, and what is known not to be anywhere.
#[derive(Default)]
pub struct FirstUse {
    /// Who waits for a product that somebody is looking up already.
    loading: RefCell<HashMap<Id, Vec<oneshot::Sender<Looked>>>>,
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

/// What a look-up came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looked {
    /// Postgres has it, and Redis is being given it.
    Found,
    Nowhere,
    /// Postgres cannot say.
    Unknown,
}

/// Looks the products up, gives Redis those that Postgres has, and tries the operation again; a STOCK.SET of a product that is nowhere
/// may then create it.
pub fn load_and_retry(cx: &Rc<Context>, products: Vec<Id>, mut op: StockOp, deadline: Instant, waiter: StockWaiter) {
    let cx = Rc::clone(cx);
    spawn_local(async move {
        let lookups: Vec<_> = products.into_iter().map(|product| spawn_local(load(Rc::clone(&cx), product))).collect();
        let all = async {
            let mut nowhere = true;
            for lookup in lookups {
                match lookup.await.unwrap_or(Looked::Unknown) {
                    Looked::Unknown => return None,
                    Looked::Found => nowhere = false,
                    Looked::Nowhere => {}
                }
            }
            Some(nowhere)
        };
        match tokio::time::timeout_at(deadline.into(), all).await {
            Ok(Some(nowhere)) => {
                op.may_create = nowhere && op.action == Action::Change(StockKind::Set);
                cx.backend.stock.submit_until(op, deadline.min(Instant::now() + cx.backend.within), waiter);
            }
            _ => waiter.refuse(NOT_KNOWN),
        }
    });
}

/// Looks one product up, once for all who ask meanwhile.
async fn load(cx: Rc<Context>, product: Id) -> Looked {
    let first_use = &cx.backend.first_use;
    let (sender, receiver) = oneshot::channel();
    let first = {
        let mut loading = first_use.loading.borrow_mut();
        let waiting = loading.entry(product.clone()).or_default();
        waiting.push(sender);
        waiting.len() == 1
    };
    if first {
        let looked = look_up(&cx, &product).await;
        for waiting in first_use.loading.borrow_mut().remove(&product).unwrap_or_default() {
            // Whoever has given up does not hear it.
            _ = waiting.send(looked);
        }
    }
    receiver.await.unwrap_or(Looked::Unknown)
}

async fn look_up(cx: &Rc<Context>, product: &Id) -> Looked {
    let partition = &cx.backend.partition;
    if !partition.ledger_up() {
        return Looked::Unknown;
    }
    let (answer, answered) = oneshot::channel();
    let request = LoadRequest { product: product.clone(), absent_at: partition.head().n, answer };
    if partition.loads.try_send(request).is_err() {
        return Looked::Unknown;
    }
    let Ok(Ok(found)) = tokio::time::timeout(limits::LOAD_WITHIN, answered).await else { return Looked::Unknown };
    match found {
        None => {
            cx.backend.first_use.remember_absent(product.clone());
            Looked::Nowhere
        }
        Some(available) => {
            let init = StockOp {
                action: Action::Change(StockKind::Init),
                items: vec![(product.clone(), available)],
                may_create: false,
                low: None,
                request: None,
            };
            cx.backend.stock.submit(init, Instant::now(), StockWaiter::Nobody);
            Looked::Found
        }
    }
}
