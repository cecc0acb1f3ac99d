//! What a client sends behind a STOCK operation that waits for a look-up in Postgres: it waits, too, so that all is decided in its order.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Instant;

use tokio::task::spawn_local;

use super::Context;
use super::stock::StockWaiter;
use crate::store::lane::{Failure, Waiter as _};
use crate::store::stock::StockOp;

/// The clients for which something is looked up. As many wait as requests are in flight.
#[derive(Default)]
pub struct LookUps(RefCell<HashMap<u64, Behind>>);

/// What waits behind the look-ups of one client.
#[derive(Default)]
struct Behind {
    look_ups: usize,
    /// How many have waited.
    count: u64,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    number: u64,
    op: StockOp,
    until: Instant,
    waiter: StockWaiter,
}

impl LookUps {
    /// Whether what this client sends has to wait.
    pub fn has(&self, client: u64) -> bool {
        let all = self.0.borrow();
        !all.is_empty() && all.contains_key(&client)
    }

    /// Holds an operation, which is done by `until`, back until nothing is looked up for its client any more.
    pub fn hold(cx: &Rc<Context>, client: u64, op: StockOp, until: Instant, waiter: StockWaiter) {
        let mut all = cx.backend.look_ups.0.borrow_mut();
        let behind = all.entry(client).or_default();
        behind.count += 1;
        let number = behind.count;
        behind.waiting.push_back(Waiting { number, op, until, waiter });
        let cx = Rc::clone(cx);
        spawn_local(async move {
            tokio::time::sleep_until(until.into()).await;
            if let Some(Waiting { op, waiter, .. }) = cx.backend.look_ups.take(client, number) {
                let why = "what was sent before it is being looked up in Postgres; nothing was changed";
                waiter.done(&op, Err(Failure::TryAgain(why.to_owned())));
            }
        });
    }

    fn take(&self, client: u64, number: u64) -> Option<Waiting> {
        let mut all = self.0.borrow_mut();
        let waiting = &mut all.get_mut(&client)?.waiting;
        let at = waiting.iter().position(|waiting| waiting.number == number)?;
        waiting.remove(at)
    }
}

/// A look-up for an operation of this client, until that is decided.
pub struct LookUp {
    cx: Rc<Context>,
    client: u64,
}

impl LookUp {
    pub fn begin(cx: &Rc<Context>, client: u64) -> Self {
        cx.backend.look_ups.0.borrow_mut().entry(client).or_default().look_ups += 1;
        Self { cx: Rc::clone(cx), client }
    }
}

impl Drop for LookUp {
    fn drop(&mut self) {
        let waiting = {
            let mut all = self.cx.backend.look_ups.0.borrow_mut();
            let Some(behind) = all.get_mut(&self.client) else { return };
            behind.look_ups -= 1;
            if behind.look_ups > 0 {
                return;
            }
            all.remove(&self.client).map_or_else(VecDeque::new, |behind| behind.waiting)
        };
        // Each in front of the one before: what this client has sent since comes behind all of them.
        for Waiting { op, until, waiter, .. } in waiting.into_iter().rev() {
            Rc::clone(waiter.lane(&self.cx.backend)).submit_in_front(op, until, waiter);
        }
    }
}
