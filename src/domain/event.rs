//! What buyers and shops want to be told of a product or a coupon: that it is sold out, back, or low.

use std::fmt::Write as _;

use super::change::{Effect, Item, Operation, StockKind};
use super::coupon::CouponChange;
use super::{Position, Side};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// Nothing is available any more.
    SoldOut,
    /// Something is available again.
    Back,
    /// As little is available as the product's threshold, or less, for the first time since there was more.
    Low,
}

impl Happening {
    const fn as_str(self) -> &'static str {
        match self {
            Self::SoldOut => "soldout",
            Self::Back => "back",
            Self::Low => "low",
        }
    }

    /// What a number of units is when it moves from `before` to `after`. `low`: the threshold, if there is one.
    fn of(before: i64, after: i64, low: Option<i64>) -> Option<Self> {
        match low {
            _ if before > 0 && after == 0 => Some(Self::SoldOut),
            Some(low) if before > low && after <= low => Some(Self::Low),
            _ if before == 0 && after > 0 => Some(Self::Back),
            _ => None,
        }
    }
}

/// One event: its channel and what is published there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// `stock:events:<product>` or `coupon:events:<coupon>`.
    pub channel: String,
    /// JSON: `{"event":"soldout","product":"sku-1","available":0,"position":"1-42"}`; of a coupon with `coupon` and `remaining`.
    pub payload: String,
}

/// The products whose threshold [`of_operation`] asks for.
pub fn may_be_low(operation: &Operation) -> impl Iterator<Item = &str> {
    products(operation).filter(|item| item.delta < 0 && item.available > 0).map(|item| item.product.as_str())
}

/// The events of a change at `position`; `low` is the threshold of a product.
pub fn of_operation(operation: &Operation, position: Position, low: impl Fn(&str) -> Option<i64>) -> Vec<Event> {
    if let Effect::Coupon { coupon, change } = &operation.effect {
        let by = match change {
            CouponChange::Step(stepped) => -stepped.step.issued(),
            CouponChange::Alter { by, .. } => by.unwrap_or(0),
            CouponChange::Mend { moved: Side::Redis, by, .. } => by.total.saturating_sub(by.issued),
            CouponChange::Create(_) | CouponChange::Delete | CouponChange::Mend { .. } => 0,
        };
        let happening = Happening::of(change.remaining().saturating_sub(by), change.remaining(), None);
        return happening
            .into_iter()
            .map(|happening| event("coupon", coupon, happening, "remaining", change.remaining(), position))
            .collect();
    }
    let told = |item: &Item| {
        let threshold = if item.delta < 0 { low(&item.product) } else { None };
        let happening = Happening::of(item.available.saturating_sub(item.delta), item.available, threshold)?;
        Some(event("stock", &item.product, happening, "available", item.available, position))
    };
    products(operation).filter_map(told).collect()
}

/// What moved, of a product that is there before and afterwards.
fn products(operation: &Operation) -> impl Iterator<Item = &Item> {
    let items: &[Item] = match &operation.effect {
        Effect::Stock { kind: StockKind::Delete | StockKind::Init, .. } => &[],
        Effect::Stock { detail, .. } if detail.created || detail.gone => &[],
        Effect::Stock { items, .. } => items,
        _ => &[],
    };
    items.iter()
}

fn event(what: &str, id: &str, happening: Happening, number: &str, units: i64, position: Position) -> Event {
    let name = if what == "stock" { "product" } else { what };
    let payload =
        format!("{{\"event\":\"{}\",\"{name}\":\"{}\",\"{number}\":{units},\"position\":\"{position}\"}}", happening.as_str(), json(id));
    Event { channel: format!("{what}:events:{id}"), payload }
}

/// An id inside a JSON string: it has no control characters.
fn json(id: &str) -> String {
    let mut text = String::with_capacity(id.len());
    for letter in id.chars() {
        if matches!(letter, '"' | '\\') {
            text.push('\\');
        }
        let _ = write!(text, "{letter}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &str, low: Option<i64>) -> Vec<String> {
        let operation = Operation::decode(line).unwrap();
        let events = of_operation(&operation, Position::new(1, 7), |_| low);
        events.into_iter().map(|event| format!("{} {}", event.channel, event.payload)).collect()
    }

    #[test]
    fn what_crosses_nothing_or_its_threshold_is_told_once() {
        let sold_out = r#"stock:events:a {"event":"soldout","product":"a","available":0,"position":"1-7"}"#;
        assert_eq!(told("0 decr | a -3 0", Some(5)), [sold_out]);
        assert_eq!(told("0 decr | a -3 5", Some(5)), [r#"stock:events:a {"event":"low","product":"a","available":5,"position":"1-7"}"#]);
        assert_eq!(told("0 decr | a -3 2", Some(5)), [""; 0], "it was low before");
        assert_eq!(told("0 decr | a -3 5", None), [""; 0]);
        assert_eq!(told("0 incr | a 3 3", Some(5)), [r#"stock:events:a {"event":"back","product":"a","available":3,"position":"1-7"}"#]);
        assert_eq!(told("0 reserve order=o expires=9 | a -3 0 b -1 4", None), [sold_out]);
        assert_eq!(told("0 expire order=o from=held units=3 | a 3 3", None).len(), 1);
        assert_eq!(told("0 confirm order=o from=held units=3 | a 0 0", None), [""; 0]);
        assert_eq!(told("0 set new=1 | a 3 3", None), [""; 0], "it is new, not back");
        assert_eq!(told("0 delete | a -3 0", None), [""; 0]);
        assert_eq!(told("0 inbox inbox=7:7 gone=1 | a -3 0", None), [""; 0], "another program has deleted it");
        assert_eq!(told("0 inbox inbox=7:7 | a -3 0", None), [sold_out]);
        let coupon = told("0 coupon.issue coupon=c user=u serial=3 remaining=0 |", None);
        assert_eq!(coupon, [r#"coupon:events:c {"event":"soldout","coupon":"c","remaining":0,"position":"1-7"}"#]);
        let back = told("0 coupon.revoke coupon=c user=u serial=3 remaining=1 |", None);
        assert_eq!(back, [r#"coupon:events:c {"event":"back","coupon":"c","remaining":1,"position":"1-7"}"#]);
        assert_eq!(told("0 coupon.issue coupon=c user=u serial=3 remaining=5 |", None), [""; 0]);
    }

    #[test]
    fn an_id_is_written_as_json_has_it() {
        assert_eq!(json(r#"a"b\c"#), r#"a\"b\\c"#);
    }
}
