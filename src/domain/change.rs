//! The one shape of a change: what the write scripts append to the outbox and what the ledger stores.
//!
//! A stream entry is one batch of accepted operations, under the explicit id `<epoch>-<n of its last operation>`, with the fields
//! `first` (n of its first operation), `prev` (the op of the entry before, `-` for the very first), `op`
//! (`<instance>:<lane>:<counter>`), `at` (Redis's clock, Unix ms) and `changes`: one line an operation,
//!
//! ```text
//! <k> <kind> [name=value ...] | [<product> <delta> <available after> ...]
//! 0 decr request=r-1 digest=9f86d081884c7d65 | sku-1 -3 97 sku-2 -1 4
//! 1 set low=5 new=1 | sku-9 100 100
//! 2 delete | sku-7 -12 0
//! 3 coupon.issue coupon=c-1 user=u-7 serial=12 remaining=988 |      (coupons: see [`coupon`](super::coupon))
//! 4 inbox inbox=771:12 | sku-1 5 102           (gone=1 where it was deleted)
//! 5 freeze reason=differs%20by%2012 | sku-1 0 102
//! 6 reserve order=o-1 expires=1700000060000 | sku-1 -3 99 sku-2 -1 3
//! 7 confirm order=o-1 from=held units=3,1 | sku-1 0 99 sku-2 0 3
//! 8 cancel order=o-7 |
//! ```
//!
//! The last one is of an order that was not there: a tombstone, which refuses it when it comes.
//!
//! k is the operation's place in its batch; the refused ones leave gaps. The sidecar writes each line up to what only the
//! script can know (k stands first, so that a line is found by it), and the script completes it.
//!
//! What was decided by its sum (lua/include/sums.lua) stands in front, without what was available afterwards, as the sidecar wrote it:
//!
//! ```text
//! before   100 40
//! changes  0 decr | sku-1 -3
//!          1 decr | sku-2 -1
//!          2 decr | sku-1 -2
//! ```
//!
//! The field `before` has what was available of each product that such lines mention, in the order of first mention; the rest is
//! addition.
//!
//! Of these, one line may stand for all that the batch did to a product ([`Grain::Batch`](super::Grain)). Then it begins with the first
//! place, says with `runs` which operations it stands for (see [`Runs`]), and has the sum of what they did. Their positions follow each
//! other. Where units were both taken and given it is called `mixed`:
//!
//! ```text
//! before   100 40
//! changes  0 decr runs=0:-3,2:-2 | sku-1 -5
//!          1 decr | sku-2 -1
//! ```

use std::collections::HashMap;
use std::collections::hash_map::Entry as Entered;

use super::coupon::CouponChange;
use super::{InboxMark, OrderChange, OrderState, Position, Runs, text};

/// What a change of stock is called, in the outbox and in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StockKind {
    /// STOCK.SET: creates the product or overwrites its available units; carried as a difference.
    Set,
    /// STOCK.DEL.
    Delete,
    /// STOCK.INCR.
    Incr,
    /// STOCK.DECR.
    Decr,
    /// Several of STOCK.INCR and STOCK.DECR in one line.
    Mixed,
    /// Redis was given what Postgres already has: Postgres itself does not move.
    Init,
    /// Another program changed Postgres, and Redis follows.
    Inbox,
    /// The reconciler moved Redis to what Postgres says.
    Correct,
    /// The reconciler moved Postgres to what Redis says.
    Adopt,
    /// The product waits for a person from here on.
    Freeze,
    /// A person has looked: it sells again.
    Unfreeze,
    /// STOCK.RESERVE: units are held for an order.
    Reserve,
    /// STOCK.DECR with ORDER: units are sold to an order.
    Sell,
    /// STOCK.CONFIRM: the held units are sold.
    Confirm,
    /// STOCK.CANCEL: what the order took comes back.
    Cancel,
    /// STOCK.EXTEND: the units are held for longer.
    Extend,
    /// The order's time has passed: its held units come back.
    Expire,
}

impl StockKind {
    pub const ALL: [Self; 17] = [
        Self::Set,
        Self::Delete,
        Self::Incr,
        Self::Decr,
        Self::Mixed,
        Self::Init,
        Self::Inbox,
        Self::Correct,
        Self::Adopt,
        Self::Freeze,
        Self::Unfreeze,
        Self::Reserve,
        Self::Sell,
        Self::Confirm,
        Self::Cancel,
        Self::Extend,
        Self::Expire,
    ];

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Set => "set",
            Self::Delete => "delete",
            Self::Incr => "incr",
            Self::Decr => "decr",
            Self::Mixed => "mixed",
            Self::Init => "init",
            Self::Inbox => "inbox",
            Self::Correct => "correct",
            Self::Adopt => "adopt",
            Self::Freeze => "freeze",
            Self::Unfreeze => "unfreeze",
            Self::Reserve => "reserve",
            Self::Sell => "sell",
            Self::Confirm => "confirm",
            Self::Cancel => "cancel",
            Self::Extend => "extend",
            Self::Expire => "expire",
        }
    }

    /// Whether Postgres moves as Redis does: what a client asked for, and what became of it with time. Everything else brings the two
    /// together.
    pub const fn moves_both(self) -> bool {
        matches!(self, Self::Set | Self::Delete | Self::Incr | Self::Decr | Self::Mixed) || self.is_of_an_order()
    }

    /// Whether it changes an order.
    pub const fn is_of_an_order(self) -> bool {
        OrderState::after(self).is_some()
    }
}

/// One product's part of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub product: String,
    /// By how much Redis's available units moved.
    pub delta: i64,
    /// Redis's available units after it.
    pub available: i64,
}

/// What an accepted operation did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    Stock { kind: StockKind, items: Vec<Item>, detail: Detail },
    Coupon { coupon: String, change: CouponChange },
}

/// What a line of stock says besides its products.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// `low`: the new threshold of the low-stock event.
    pub low: Option<i64>,
    /// `new`: Redis did not have the product; what Postgres has of it, if anything, gives way to what was set.
    pub created: bool,
    /// `inbox`: up to where Redis has what other programs changed in Postgres.
    pub mark: Option<InboxMark>,
    /// `gone`: another program deleted the product.
    pub gone: bool,
    /// `pg`: by how much Postgres moves, where that is not what Redis moved by.
    pub pg: Option<i64>,
    /// `held`: by how much Redis moved what orders hold, to what Postgres says.
    pub held: Option<i64>,
    /// `reason`: why the product is frozen.
    pub reason: Option<String>,
    /// `short`: how many units Redis could not give, since it had fewer. The product is frozen.
    pub short: Option<i64>,
    /// `order`, `expires`, `from`, `units`: what became of an order. There with every change of one, and with nothing else.
    pub order: Option<Box<OrderChange>>,
    /// `runs`: the operations that the line stands for, where it sums up several.
    pub runs: Option<Box<Runs>>,
}

/// The client's idempotency key with the fingerprint of what it asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// In its escaped form, see [`RequestId::escaped`](super::RequestId::escaped).
    pub request: String,
    pub digest: String,
}

/// One accepted operation, or several that one line sums up: see [`Operation::count`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its place in the batch that carried it; that of the first, if there are several.
    pub k: u32,
    pub remembered: Option<Remembered>,
    pub effect: Effect,
}

/// A change that the ledger has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The position that its caller was answered, or would have been.
    pub position: Position,
    pub operation: Operation,
}

/// One entry of the outbox: the accepted operations of one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its id in the stream: the position of its last operation.
    pub last: Position,
    /// n of its first operation.
    pub first_n: u64,
    /// The op of the entry before it.
    pub prev: String,
    /// `<instance>:<lane>:<counter>` of the batch that wrote it.
    pub op: String,
    /// When, by Redis's clock, in Unix ms.
    pub at_ms: i64,
    pub operations: Vec<Operation>,
}

/// Why an entry could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(pub String);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "malformed outbox entry: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

fn malformed<T>(what: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(what.into()))
}

impl Entry {
    /// Reads an entry of the stream from its id and its field-value pairs.
    pub fn decode<'a>(id: &[u8], fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, Malformed> {
        let Some(last) = Position::parse(id) else {
            return malformed(format!("id {:?}", String::from_utf8_lossy(id)));
        };
        let (mut first, mut prev, mut op, mut at, mut changes, mut before) = (None, None, None, None, None, "");
        for (name, value) in fields {
            let Ok(value) = std::str::from_utf8(value) else {
                return malformed(format!("{last}: not UTF-8"));
            };
            match name {
                b"first" => first = value.parse::<u64>().ok(),
                b"prev" => prev = Some(value),
                b"op" => op = Some(value),
                b"at" => at = value.parse::<i64>().ok(),
                b"changes" => changes = Some(value),
                b"before" => before = value,
                _ => {}
            }
        }
        let (Some(first_n), Some(prev), Some(op), Some(at_ms), Some(changes)) = (first, prev, op, at, changes) else {
            return malformed(format!("{last}: a field is missing"));
        };
        let mut running = Running { values: HashMap::default(), before: text::words(before) };
        let mut operations = Vec::with_capacity(changes.bytes().filter(|byte| *byte == b'\n').count() + 1);
        for line in changes.split('\n') {
            let Some(operation) = Operation::decode_words(line, Some(&mut running)) else { return malformed(format!("line {line:?}")) };
            operations.push(operation);
        }
        let count = operations.iter().map(Operation::count).sum();
        if first_n == 0 || first_n.checked_add(count) != last.n.checked_add(1) {
            return malformed(format!("{last}: {count} operations from {first_n}"));
        }
        Ok(Self { last, first_n, prev: prev.into(), op: op.into(), at_ms, operations })
    }

    /// Its lines, each with n of the first operation that it stands for.
    pub fn lines(&self) -> impl Iterator<Item = (u64, &Operation)> {
        self.operations.iter().scan(self.first_n, |next, operation| {
            let n = *next;
            *next += operation.count();
            Some((n, operation))
        })
    }

    /// Its operations one by one, each with its n.
    pub fn each(&self) -> impl Iterator<Item = (u64, Operation)> {
        (self.first_n..).zip(self.operations.iter().flat_map(Operation::each))
    }
}

impl Operation {
    /// Reads one line of an entry's `changes`.
    pub fn decode(line: &str) -> Result<Self, Malformed> {
        let decoded = Self::decode_words(line, None);
        decoded.map_or_else(|| malformed(format!("line {line:?}")), Ok)
    }

    /// The products that it is about; none for a coupon's.
    pub fn products(&self) -> impl Iterator<Item = &str> {
        let items: &[Item] = if let Effect::Stock { items, .. } = &self.effect { items } else { &[] };
        items.iter().map(|item| item.product.as_str())
    }

    /// What it makes of an order.
    pub fn order(&self) -> Option<&OrderChange> {
        let Effect::Stock { detail, .. } = &self.effect else { return None };
        detail.order.as_deref()
    }

    /// The order that it begins.
    pub fn begun_order(&self) -> Option<&str> {
        self.order_where(|kind| matches!(kind, StockKind::Reserve | StockKind::Sell))
    }

    /// The order that it ends, and whose units it gives back.
    pub fn ended_order(&self) -> Option<&str> {
        self.order_where(|kind| matches!(kind, StockKind::Cancel | StockKind::Expire))
    }

    /// Whether it is of an order that was held before it.
    pub fn was_held(&self) -> bool {
        self.order().is_some_and(|order| order.from == Some(OrderState::Held))
    }

    fn order_where(&self, is_so: impl Fn(StockKind) -> bool) -> Option<&str> {
        match &self.effect {
            Effect::Stock { kind, .. } if is_so(*kind) => Some(&self.order()?.order),
            _ => None,
        }
    }

    /// The coupon that it is about.
    pub fn coupon(&self) -> Option<&str> {
        match &self.effect {
            Effect::Coupon { coupon, .. } => Some(coupon),
            Effect::Stock { .. } => None,
        }
    }

    /// The serial that it is about.
    pub fn serial(&self) -> Option<i64> {
        if let Effect::Coupon { change, .. } = &self.effect { change.serial() } else { None }
    }

    /// The operations that it sums up.
    fn runs(&self) -> Option<(&Runs, &Item)> {
        let Effect::Stock { items, detail, .. } = &self.effect else { return None };
        detail.runs.as_deref().zip(items.first())
    }

    /// How many operations it stands for. Their positions follow each other.
    pub fn count(&self) -> u64 {
        self.runs().map_or(1, |(runs, _)| runs.count())
    }

    /// The operations that it stands for, one by one.
    pub fn each(&self) -> impl Iterator<Item = Self> {
        let summed = self.runs().map(|(runs, item)| {
            let mut available = item.available.saturating_sub(item.delta);
            runs.each().map(move |(k, delta)| {
                available = available.saturating_add(delta);
                let kind = if delta < 0 { StockKind::Decr } else { StockKind::Incr };
                let items = vec![Item { product: item.product.clone(), delta, available }];
                Self { k, remembered: None, effect: Effect::Stock { kind, items, detail: Detail::default() } }
            })
        });
        let alone = summed.is_none().then(|| self.clone());
        summed.into_iter().flatten().chain(alone)
    }

    /// `running`: what is available after the lines before it, where the line does not say it itself.
    fn decode_words<'a>(line: &'a str, mut running: Option<&mut Running<'a>>) -> Option<Self> {
        let mut words = text::words(line);
        let k = words.next()?.parse().ok()?;
        let kind = words.next()?;
        let mut named = Named::default();
        for word in words.by_ref().take_while(|word| *word != "|") {
            let (name, value) = word.split_once('=')?;
            named.0.push((name, value));
        }
        let effect = match kind.strip_prefix("coupon.") {
            Some(kind) => Effect::Coupon { coupon: named.text("coupon")?, change: CouponChange::decode(kind, &named)? },
            None => {
                let kind = StockKind::parse(kind)?;
                let runs = named.find("runs").map_or(Some(None), |runs| Runs::parse(runs).map(Box::new).map(Some))?;
                let mut items = Vec::with_capacity(1);
                while let Some(product) = words.next() {
                    let delta = words.next()?.parse().ok()?;
                    let available = match words.next() {
                        Some(available) => available.parse().ok()?,
                        None if items.is_empty() => running.as_deref_mut()?.available(product, delta)?,
                        None => return None,
                    };
                    items.push(Item { product: product.into(), delta, available });
                }
                let order = match kind.is_of_an_order() {
                    true => Some(Box::new(named.order(kind, &items)?)),
                    false => None,
                };
                let is_tombstone = kind == StockKind::Cancel && order.as_ref().is_some_and(|order| order.from.is_none());
                let sums_up = |runs: &Runs| runs.first() == k && items.len() == 1 && items[0].delta == runs.total();
                if items.is_empty() != is_tombstone || !runs.as_deref().is_none_or(sums_up) {
                    return None;
                }
                let detail = if named.0.is_empty() {
                    Detail { order, runs, ..Detail::default() }
                } else {
                    Detail {
                        low: named.number("low"),
                        created: named.number("new").is_some(),
                        gone: named.number("gone").is_some(),
                        mark: named.find("inbox").map_or(Some(None), |mark| InboxMark::parse(mark).map(Some))?,
                        pg: named.number("pg"),
                        held: named.number("held"),
                        reason: named.find("reason").map(text::unescape),
                        short: named.number("short"),
                        order,
                        runs,
                    }
                };
                Effect::Stock { kind, items, detail }
            }
        };
        let remembered = match (named.text("request"), named.text("digest")) {
            (Some(request), Some(digest)) => Some(Remembered { request, digest }),
            (None, None) => None,
            _ => return None,
        };
        Some(Self { k, remembered, effect })
    }
}

impl std::fmt::Display for Operation {
    /// Writes the line that [`Operation::decode`] reads.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.effect {
            Effect::Stock { kind, .. } => write!(f, "{} {}", self.k, kind.as_str())?,
            Effect::Coupon { change, .. } => write!(f, "{} coupon.{}", self.k, change.kind())?,
        }
        if let Some(Remembered { request, digest }) = &self.remembered {
            write!(f, " request={request} digest={digest}")?;
        }
        match &self.effect {
            Effect::Stock { kind, items, detail } => {
                detail.fmt(f)?;
                detail.order.as_ref().map_or(Ok(()), |order| order.write(*kind, f))?;
                f.write_str(" |")?;
                items.iter().try_for_each(|item| write!(f, " {} {} {}", item.product, item.delta, item.available))
            }
            Effect::Coupon { coupon, change } => write!(f, " coupon={coupon}{change} |"),
        }
    }
}

impl OrderChange {
    /// A reservation's and a sale's units are what their items moved by.
    fn write(&self, kind: StockKind, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, " order={}", self.order)?;
        self.expires_ms.map_or(Ok(()), |expires| write!(f, " expires={expires}"))?;
        self.from.map_or(Ok(()), |from| write!(f, " from={}", from.as_str()))?;
        if matches!(kind, StockKind::Reserve | StockKind::Sell) {
            return Ok(());
        }
        for (i, units) in self.units.iter().enumerate() {
            write!(f, "{}{units}", if i == 0 { " units=" } else { "," })?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Detail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let numbers = [("low", self.low), ("new", self.created.then_some(1)), ("pg", self.pg), ("held", self.held), ("short", self.short)];
        for (name, number) in numbers {
            number.map_or(Ok(()), |number| write!(f, " {name}={number}"))?;
        }
        self.runs.as_ref().map_or(Ok(()), |runs| write!(f, " runs={runs}"))?;
        self.mark.map_or(Ok(()), |mark| write!(f, " inbox={mark}"))?;
        if self.gone {
            f.write_str(" gone=1")?;
        }
        self.reason.as_ref().map_or(Ok(()), |reason| write!(f, " reason={}", text::escape(reason.as_bytes())))
    }
}

/// What is available of the products of an entry whose lines do not say it.
struct Running<'a> {
    values: HashMap<&'a str, i64, foldhash::fast::RandomState>,
    /// Of the products that are yet to be mentioned.
    before: text::Words<'a>,
}

impl<'a> Running<'a> {
    fn available(&mut self, product: &'a str, delta: i64) -> Option<i64> {
        Some(match self.values.entry(product) {
            Entered::Occupied(known) => {
                let available = known.into_mut();
                *available = available.checked_add(delta)?;
                *available
            }
            Entered::Vacant(new) => *new.insert(self.before.next()?.parse::<i64>().ok()?.checked_add(delta)?),
        })
    }
}

#[derive(Default)]
pub(super) struct Named<'a>(Vec<(&'a str, &'a str)>);

impl Named<'_> {
    fn find(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }

    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.find(name).map(String::from)
    }

    pub(super) fn number(&self, name: &str) -> Option<i64> {
        self.find(name).and_then(|value| value.parse().ok())
    }

    fn order(&self, kind: StockKind, items: &[Item]) -> Option<OrderChange> {
        // What begins an order has its units in its items, and nothing before it.
        let begins = matches!(kind, StockKind::Reserve | StockKind::Sell);
        let units: Vec<i64> = match self.find("units") {
            Some(_) if begins => return None,
            Some(units) => units.split(',').map(|units| units.parse().ok()).collect::<Option<_>>()?,
            None if begins => items.iter().map(|item| item.delta.checked_neg()).collect::<Option<_>>()?,
            None => Vec::new(),
        };
        let from = self.find("from").map_or(Some(None), |from| OrderState::parse(from).map(Some))?;
        let expires_ms = self.number("expires");
        let is_whole = units.len() == items.len()
            && units.iter().all(|units| *units >= 0)
            && !(begins && from.is_some())
            && expires_ms.is_some() == matches!(kind, StockKind::Reserve | StockKind::Extend);
        is_whole.then_some(OrderChange { order: self.text("order")?, expires_ms, from, units })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::coupon::CouponTerms;

    fn entry(id: &str, first: &str, changes: &str) -> Result<Entry, Malformed> {
        let fields = [("first", first), ("prev", "-"), ("op", "i:stock:1"), ("at", "1700000000000"), ("changes", changes)];
        Entry::decode(id.as_bytes(), fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
    }

    #[test]
    fn every_kind_of_line_is_read() {
        let text = "0 decr request=r-1 digest=9f86 | sku-1 -3 97 sku-2 -1 4\n1 set low=5 new=1 | sku-9 100 100\n4 delete | sku-7 -12 0\n\
                    5 coupon.issue coupon=c-1 user=u=7 serial=12 remaining=988 |\n6 coupon.create coupon=c total=10 peruser=1 end=7 |";
        let entry = entry("3-14", "10", text).unwrap();
        assert_eq!((entry.last, entry.first_n, entry.operations.len()), (Position::new(3, 14), 10, 5));
        let item = |product: &str, delta, available| Item { product: product.into(), delta, available };
        assert_eq!(
            entry.operations[0],
            Operation {
                k: 0,
                remembered: Some(Remembered { request: "r-1".into(), digest: "9f86".into() }),
                effect: Effect::Stock {
                    kind: StockKind::Decr,
                    items: vec![item("sku-1", -3, 97), item("sku-2", -1, 4)],
                    detail: Detail::default(),
                },
            }
        );
        assert_eq!(
            entry.operations[1].effect,
            Effect::Stock {
                kind: StockKind::Set,
                items: vec![item("sku-9", 100, 100)],
                detail: Detail { low: Some(5), created: true, ..Detail::default() }
            }
        );
        assert_eq!((entry.operations[3].coupon(), entry.operations[3].serial()), (Some("c-1"), Some(12)));
        assert_eq!(entry.operations.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"), text, "written as read");
        let terms = CouponTerms { total: 10, per_user: 1, start_ms: None, end_ms: Some(7) };
        assert_eq!(entry.operations[4].effect, Effect::Coupon { coupon: "c".into(), change: CouponChange::Create(terms) });
    }

    #[test]
    fn lines_without_what_was_available_are_completed_from_the_entry() {
        let decoded = |before: &str, changes: &str| {
            let fields = [("first", "1"), ("prev", "-"), ("op", "i:stock:1"), ("at", "7"), ("before", before), ("changes", changes)];
            let n = changes.lines().count();
            Entry::decode(format!("1-{n}").as_bytes(), fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
        };
        let text = "0 decr | a -3\n2 incr | | 5\n3 decr | a -2\n1 decr request=r digest=d | c -1 8";
        let written: Vec<_> = decoded("100 7", text).unwrap().operations.iter().map(ToString::to_string).collect();
        assert_eq!(written, ["0 decr | a -3 97", "2 incr | | 5 12", "3 decr | a -2 95", "1 decr request=r digest=d | c -1 8"]);
        for bad in ["", "100", "100 x"] {
            assert!(decoded(bad, text).is_err(), "{bad:?}");
        }
        assert!(Operation::decode("0 decr | a -3").is_err(), "alone it does not say what was available");
        assert!(decoded("5 6", "0 decr | a -1 b -1").is_err(), "only of one product");
        assert!(decoded("9223372036854775807", "0 incr | a 1").is_err());
    }

    #[test]
    fn a_line_that_sums_up_stands_for_its_operations() {
        let decoded = |first: &str, last: &str, before: &str, changes: &str| {
            let fields = [("first", first), ("prev", "-"), ("op", "i:stock:1"), ("at", "7"), ("before", before), ("changes", changes)];
            Entry::decode(format!("1-{last}").as_bytes(), fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
        };
        let text = "0 mixed runs=0-1:-3,5:4 | a -2\n2 decr | b -1\n3 decr runs=3:-1,6:-1 | c -2\n4 set request=r digest=d | d 5 5";
        let entry = decoded("11", "17", "100 7 2", text).unwrap();
        assert_eq!(entry.lines().map(|(n, line)| (n, line.count())).collect::<Vec<_>>(), [(11, 3), (14, 1), (15, 2), (17, 1)]);
        let written = "0 mixed runs=0-1:-3,5:4 | a -2 98";
        assert_eq!((entry.operations[0].to_string().as_str(), Operation::decode(written)), (written, Ok(entry.operations[0].clone())));
        let each: Vec<_> = entry.each().map(|(n, operation)| format!("{n}: {operation}")).collect();
        let expected = [
            "11: 0 decr | a -3 97",
            "12: 1 decr | a -3 94",
            "13: 5 incr | a 4 98",
            "14: 2 decr | b -1 6",
            "15: 3 decr | c -1 1",
            "16: 6 decr | c -1 0",
            "17: 4 set request=r digest=d | d 5 5",
        ];
        assert_eq!(each, expected);
        assert!(decoded("11", "16", "100 7 2", text).is_err(), "another count");
        for bad in ["0 decr runs=0-1:-3 | a -5", "1 decr runs=0-1:-3 | a -6", "0 decr runs= | a -6", "0 decr runs=0-1:-3 | a -6 b -6"] {
            assert!(decoded("1", "2", "100 7", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_the_server_does_by_itself_is_read() {
        let detail = |line: &str| match Operation::decode(line).unwrap().effect {
            Effect::Stock { detail, .. } => detail,
            other => panic!("{other:?}"),
        };
        let inbox = detail("0 inbox inbox=771:12 short=3 | a -2 0");
        assert_eq!((inbox.mark, inbox.short), (Some(InboxMark { xid: 771, id: 12 }), Some(3)));
        assert_eq!(detail("0 adopt pg=-3 | a 0 7").pg, Some(-3));
        assert_eq!(detail("0 freeze reason=off%20by%2012 | a 0 7").reason.as_deref(), Some("off by 12"));
        assert!(Operation::decode("0 inbox inbox=x | a 0 0").is_err());
    }

    #[test]
    fn every_line_is_written_as_it_was_read() {
        for line in [
            "0 decr request=r%201 digest=9f86 | sku-1 -3 97 sku-2 -1 4",
            "1 set low=5 new=1 | sku-9 100 100",
            "4 inbox short=3 inbox=771:12 reason=off%20by%2012 | a -2 0",
            "5 adopt pg=-3 | a 0 7",
            "5 correct held=-3 | a 0 7",
            "8 reserve request=r digest=d order=o=1 expires=1700000060000 | a -3 97 b -1 4",
            "9 sell order=o-2 | a -3 94",
            "10 confirm order=o-1 from=held units=3,1 | a 0 97 b 0 4",
            "11 cancel order=o-2 from=confirmed units=3 | a 3 97",
            "12 cancel order=o-9 |",
            "13 expire order=o-3 from=held units=1 | a 1 98",
            "14 extend order=o-3 expires=1700000090000 from=held units=1 | a 0 97",
        ] {
            assert_eq!(Operation::decode(line).unwrap().to_string(), line);
        }
    }

    #[test]
    fn a_product_may_be_called_like_the_separator() {
        let operation = Operation::decode("0 decr | | -1 4").unwrap();
        let Effect::Stock { items, .. } = operation.effect else { panic!() };
        assert_eq!(items[0].product, "|");
    }

    #[test]
    fn what_is_not_an_entry_is_refused() {
        for bad in [
            "",
            "x decr | a 1 1",
            "0 frob | a 1 1",
            "0 decr |",
            "0 decr | a 1",
            "0 decr | a x 1",
            "0 decr request=1 | a 1 1",
            "0 coupon.issue coupon=c |",
            "0 reserve | a -1 1",
            "0 reserve order=o | a -1 1",
            "0 reserve order=o expires=7 |",
            "0 reserve order=o expires=7 from=held | a -1 1",
            "0 reserve order=o expires=7 units=1 | a -1 1",
            "0 reserve order=o expires=7 | a -9223372036854775808 1",
            "0 sell order=o | a 1 1",
            "0 confirm order=o from=held units=-9223372036854775808 | a 0 1",
            "0 confirm order=o from=held | a 0 1",
            "0 confirm order=o from=held units=1,2 | a 0 1",
            "0 cancel order=o from=held |",
            "0 cancel order=o from=gone units=1 | a 1 1",
            "0 cancel order=o units=1 | a 1 1",
        ] {
            assert!(Operation::decode(bad).is_err(), "{bad:?}");
        }
        assert!(entry("1-2", "1", "0 incr | a 1 1").is_err(), "two positions, one operation");
        assert!(entry("1-0", "0", "0 incr | a 1 1").is_err(), "n starts at 1");
        assert!(entry("x", "1", "0 incr | a 1 1").is_err());
        assert!(entry("1-1", "1", "0 incr | a 1 1").is_ok());
    }
}
