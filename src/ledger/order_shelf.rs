//! What Postgres has of the orders whose changes are being saved, as far as it has been worked through: see [`salvage`](super::salvage).
//!
//! A change of an order may come long after it was answered, when the order has become something else: by what its client did again, or
//! because its time has passed. Then its units have been taken or given back already.

use std::collections::{BTreeSet, HashMap};

use sqlx::PgConnection;

use super::salvage::Answered;
use super::{Error, order};
use crate::domain::change::{Item, StockKind};
use crate::domain::{Order, OrderChange, OrderState};

/// See the module.
pub(super) struct OrderShelf {
    /// With when each became what it is, in Unix ms.
    orders: HashMap<String, (Order, i64)>,
}

/// What a change of an order comes to by now.
#[derive(Debug)]
pub(super) enum Made {
    /// It is made.
    Now,
    /// The order is as was answered.
    Before,
    /// The order has become something else: nothing moves, and it is owed.
    TooLate,
}

impl OrderShelf {
    /// Reads what these are about. The caller holds the partition's row, without which nobody changes an order.
    pub async fn load(connection: &mut PgConnection, answered: &[&Answered]) -> Result<Self, Error> {
        let orders: BTreeSet<&str> = answered.iter().filter_map(|one| of(one)).collect();
        let orders: Vec<String> = orders.into_iter().map(str::to_owned).collect();
        let rows = if orders.is_empty() { Vec::new() } else { order::load(connection, &orders).await? };
        let known = rows.into_iter().map(|row| Ok((row.order.clone(), (row.order()?, row.changed_at_ms))));
        Ok(Self { orders: known.collect::<Result<_, Error>>()? })
    }

    /// The products of which they hold or took units.
    pub fn products(&self) -> impl Iterator<Item = &str> {
        self.orders.values().flat_map(|(order, _)| order.items.iter().map(|(product, _)| product.as_str()))
    }

    /// Makes a change here, and tells it and its items what the order is by now.
    pub fn make(&mut self, answered: &Answered, kind: StockKind, items: &mut Vec<Item>, change: &mut OrderChange) -> Made {
        let known = self.orders.get_mut(&change.order);
        // What was held by then is not what had long been over.
        let may_be_another = answered.operation.begun_order().is_some() || answered.operation.was_held();
        let known = known.filter(|(known, changed_ms)| !may_be_another || !order::is_forgotten(known.state, *changed_ms, answered.at_ms));
        let Some((known, changed_ms)) = known else { return self.make_of_none(answered, kind, items, change) };
        let is_overtaken = matches!(kind, StockKind::Extend | StockKind::Expire) && known.position > answered.origin;
        let after = OrderState::after(kind).filter(|_| known.state.takes(kind) && !is_overtaken);
        let Some(after) = after else {
            // What nobody asked for is nobody's loss.
            if known.state.is_as_after(kind) || kind == StockKind::Expire {
                return Made::Before;
            }
            return Made::TooLate;
        };
        change.from = Some(known.state);
        let units: Vec<i64> = known.items.iter().map(|(_, units)| *units).collect();
        let has_its_products = items.iter().map(|item| &item.product).eq(known.items.iter().map(|(product, _)| product));
        if !has_its_products || change.units != units {
            let comes_back = |units: i64| if matches!(kind, StockKind::Cancel | StockKind::Expire) { units } else { 0 };
            let item = |(product, units): &(String, i64)| Item { product: product.clone(), delta: comes_back(*units), available: 0 };
            (*items, change.units) = (known.items.iter().map(item).collect(), units);
        }
        (known.state, known.position, *changed_ms) = (after, answered.origin, answered.at_ms);
        known.expires_ms = change.expires_ms.unwrap_or(known.expires_ms);
        Made::Now
    }

    /// Gives up an order that cannot begin.
    pub fn forget(&mut self, order: &str) {
        self.orders.remove(order);
    }

    /// Makes a change of an order that is not here. What it took did not come here either, so nothing comes back; a cancellation leaves a
    /// tombstone.
    fn make_of_none(&mut self, answered: &Answered, kind: StockKind, items: &mut Vec<Item>, change: &mut OrderChange) -> Made {
        match kind {
            StockKind::Reserve | StockKind::Sell => {}
            StockKind::Cancel => {
                change.from = None;
                change.units.clear();
                items.clear();
            }
            StockKind::Expire => return Made::Before,
            _ => return Made::TooLate,
        }
        let Some(state) = OrderState::after(kind) else { return Made::Now };
        let taken = items.iter().map(|item| item.product.clone()).zip(change.units.iter().copied()).collect();
        let order = Order { state, expires_ms: change.expires_ms.unwrap_or(0), items: taken, position: answered.origin };
        self.orders.insert(change.order.clone(), (order, answered.at_ms));
        Made::Now
    }
}

/// The order that a change is of.
pub(super) fn of(answered: &Answered) -> Option<&str> {
    answered.operation.order().map(|change| change.order.as_str())
}
