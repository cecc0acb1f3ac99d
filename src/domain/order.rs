//! Orders: units that are held for a while, then sold or given back.

use std::fmt::Write;

use super::Position;
use super::change::StockKind;

/// What an order is. There is no way back from the last two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderState {
    /// Its units are held for it until it expires.
    Held,
    /// Its units are sold.
    Confirmed,
    /// Its units were given back; or it was cancelled before it was there, and never had any.
    Cancelled,
    /// Its time passed, and its units were given back.
    Expired,
}

impl OrderState {
    const ALL: [Self; 4] = [Self::Held, Self::Confirmed, Self::Cancelled, Self::Expired];

    /// As Redis, Postgres and replies have it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Confirmed => "confirmed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }

    /// What an order is after a change of this kind; `None` for what is no change of an order.
    pub const fn after(kind: StockKind) -> Option<Self> {
        match kind {
            StockKind::Reserve | StockKind::Extend => Some(Self::Held),
            StockKind::Sell | StockKind::Confirm => Some(Self::Confirmed),
            StockKind::Cancel => Some(Self::Cancelled),
            StockKind::Expire => Some(Self::Expired),
            _ => None,
        }
    }

    /// Whether a change of this kind can be made of an order that is this.
    pub const fn takes(self, kind: StockKind) -> bool {
        match self {
            Self::Held => matches!(kind, StockKind::Extend | StockKind::Confirm | StockKind::Cancel | StockKind::Expire),
            Self::Confirmed => matches!(kind, StockKind::Cancel),
            Self::Cancelled | Self::Expired => false,
        }
    }

    /// Whether an order that is this is as whoever made a change of this kind earlier was told.
    pub const fn is_as_after(self, kind: StockKind) -> bool {
        match kind {
            // Whatever became of it afterwards, it had begun.
            StockKind::Reserve | StockKind::Sell => true,
            StockKind::Extend => !matches!(self, Self::Expired),
            // Either way the units were given back.
            StockKind::Cancel | StockKind::Expire => matches!(self, Self::Cancelled | Self::Expired),
            // An order that was paid and has expired since is not.
            StockKind::Confirm => matches!(self, Self::Confirmed),
            _ => false,
        }
    }
}

/// What a change did to an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderChange {
    pub order: String,
    /// Until when its units are held from here on, in Unix ms by Redis's clock; only of a reservation and its extension.
    pub expires_ms: Option<i64>,
    /// What it was before; `None` where there was no such order.
    pub from: Option<OrderState>,
    /// The order's units of each product, in the order of the change's items.
    pub units: Vec<i64>,
}

impl OrderChange {
    /// By how much the held units of the change's item at place `i` moved.
    pub fn held_delta(&self, kind: StockKind, i: usize) -> i64 {
        let units = self.units.get(i).copied().unwrap_or_default();
        match (self.from, OrderState::after(kind)) {
            (None, Some(OrderState::Held)) => units,
            (Some(OrderState::Held), Some(OrderState::Confirmed | OrderState::Cancelled | OrderState::Expired)) => -units,
            _ => 0,
        }
    }
}

/// An order as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub state: OrderState,
    /// Until when its units are or were held, in Unix ms by Redis's clock; 0 where they never were.
    pub expires_ms: i64,
    /// Its products with their units. None where it was cancelled before it was there.
    pub items: Vec<(String, i64)>,
    /// The position of the change that made it what it is, as its caller was answered.
    pub position: Position,
}

impl Order {
    /// Reads items as [`Order::items_text`] writes them; `None` if they are not such.
    pub fn parse_items(text: &str) -> Option<Vec<(String, i64)>> {
        let mut words = text.split(' ').filter(|word| !word.is_empty());
        let mut items = Vec::new();
        while let Some(product) = words.next() {
            items.push((product.to_owned(), words.next()?.parse().ok()?));
        }
        Some(items)
    }

    /// `<product> <units> <product> <units> ...`, as Redis has them.
    pub fn items_text(&self) -> String {
        items_text(self.items.iter().map(|(product, units)| (product.as_str(), *units)))
    }
}

/// See [`Order::items_text`].
pub fn items_text<'a>(items: impl Iterator<Item = (&'a str, i64)>) -> String {
    let mut text = String::new();
    for (product, units) in items {
        let gap = if text.is_empty() { "" } else { " " };
        let _ = write!(text, "{gap}{product} {units}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_held_from_the_reservation_until_they_are_sold_or_given_back() {
        use StockKind::{Cancel, Confirm, Expire, Extend, Reserve, Sell};
        let change = |from| OrderChange { order: "o".into(), expires_ms: None, from, units: vec![3, 1] };
        let held = |from, kind| [0, 1, 2].map(|i| change(from).held_delta(kind, i));
        assert_eq!(held(None, Reserve), [3, 1, 0]);
        for kind in [Confirm, Cancel, Expire] {
            assert_eq!(held(Some(OrderState::Held), kind), [-3, -1, 0]);
        }
        for (from, kind) in [(Some(OrderState::Held), Extend), (None, Sell), (None, Cancel), (Some(OrderState::Confirmed), Cancel)] {
            assert_eq!(held(from, kind), [0, 0, 0], "{from:?} {kind:?}");
        }
    }

    #[test]
    fn a_change_is_made_of_an_order_or_is_what_it_is_or_comes_too_late() {
        use OrderState::{Cancelled, Confirmed, Expired, Held};
        use StockKind::{Cancel, Confirm, Decr, Expire, Extend, Reserve, Sell};
        let which = |is_so: fn(OrderState, StockKind) -> bool| {
            [Reserve, Sell, Extend, Confirm, Cancel, Expire, Decr]
                .map(|kind| OrderState::ALL.into_iter().filter(|state| is_so(*state, kind)).collect::<Vec<_>>())
        };
        let all = || OrderState::ALL.to_vec();
        assert_eq!(which(OrderState::takes), [vec![], vec![], vec![Held], vec![Held], vec![Held, Confirmed], vec![Held], vec![]]);
        let over = || vec![Cancelled, Expired];
        let as_after = [all(), all(), vec![Held, Confirmed, Cancelled], vec![Confirmed], over(), over(), vec![]];
        assert_eq!(which(OrderState::is_as_after), as_after);
    }

    #[test]
    fn items_are_read_as_they_were_written() {
        let order =
            Order { state: OrderState::Held, expires_ms: 7, items: vec![("a".into(), 3), ("7".into(), 1)], position: Position::new(1, 2) };
        assert_eq!(order.items_text(), "a 3 7 1");
        assert_eq!(Order::parse_items("a 3 7 1"), Some(order.items));
        assert_eq!(Order::parse_items(""), Some(Vec::new()));
        assert_eq!(Order::parse_items("a"), None);
        assert_eq!(Order::parse_items("a x"), None);
    }
}
