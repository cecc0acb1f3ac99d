//! The STOCK family: its operations as lua/stock_write.lua takes them, and what it answers.

mod sums;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Instant;

use smallvec::{SmallVec, smallvec};

use self::sums::{Plan, Worked};
use super::copies::{CopiedBatch, Copy, Kept, Note};
use super::key_list::KeyList;
use super::lane::{Encoded, Family, Positions, Verdict};
use super::pack::Pack;
use super::partition::Found;
use super::requests::{self, Remembered, Request, RequestKeys};
use super::script::{self, Script};
use super::sold_out::SoldOut;
use super::words::Words;
use super::{Error, keys};
use crate::domain::change::{Effect, Item, Operation, StockKind};
use crate::domain::{Grain, Id, InboxMark, Order, OrderState, Position, items_text, text};

/// What a STOCK operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reads the available units; changes nothing.
    Read,
    /// Reads an order; changes nothing.
    Look,
    Change(StockKind),
}

impl Action {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "get",
            Self::Look => "look",
            Self::Change(kind) => kind.as_str(),
        }
    }
}

/// Products with their quantities; most operations have one.
pub type Items = SmallVec<[(Id, i64); 1]>;

/// One STOCK operation over one or more products, all or nothing.
#[derive(Clone, Debug)]
pub struct StockOp {
    pub action: Action,
    /// Each product once, with its quantity (0 where there is none to give).
    pub items: Items,
    /// The new threshold of the low-stock event; only with [`StockKind::Set`].
    pub low: Option<i64>,
    pub request: Option<Box<Request>>,
    /// Only where the server itself asks; `items` is one product then.
    pub upkeep: Option<Box<Upkeep>>,
    /// Only of what is about an order. `items` is what it takes: nothing once it is there.
    pub order: Option<Box<OfOrder>>,
}

/// Which order an operation is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfOrder {
    pub order: Id,
    /// For how long its units are held, in ms; only of a reservation and its extension.
    pub ttl_ms: i64,
    pub looked: Looked,
}

/// What is known of an order that Redis does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Looked {
    NotYet,
    /// Postgres has no such order either.
    Nowhere,
    /// What Postgres has: it counts as long as Redis has nothing.
    Found(Order),
}

impl OfOrder {
    fn write(&self, batch: &mut Pack, place: usize, items: &Items) {
        batch.array(5).count(place).text(self.order.as_str()).integer(self.ttl_ms);
        match &self.looked {
            Looked::NotYet => batch.no(),
            Looked::Nowhere => batch.text(""),
            Looked::Found(order) => batch
                .array(4)
                .text(order.state.as_str())
                .integer(order.expires_ms)
                .text(&order.items_text())
                .text(&order.position.to_string()),
        };
        batch.text(&items_text(items.iter().map(|(product, units)| (product.as_str(), *units))));
    }
}

/// What only the server itself asks for: it brings Redis and Postgres together. Each goes through the write script like any change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upkeep {
    /// Gives Redis a product that only Postgres has, with its threshold and why it is frozen, as Postgres had it at `n` with the inbox up to
    /// `mark`. Refused where Redis has the product, had it deleted since, or has the inbox up to somewhere else, or where it
    /// comes frozen and a person has unfrozen it since.
    Init {
        mark: InboxMark,
        n: u64,
        low: Option<i64>,
        frozen: Option<String>,
    },
    /// Moves Redis as another program moved Postgres, if Redis has the inbox up to `before`; from then on it has it up to `mark`.
    /// What would go below 0 goes to 0, and the product is frozen with `reason`.
    Inbox {
        before: InboxMark,
        mark: InboxMark,
        row: InboxRow,
        reason: String,
    },
    /// Moves Redis by the item's quantity to what Postgres says; compared at `n`, by this `round` of the reconciler. Refused where another
    /// round has corrected anything since. Frozen with `reason` where Redis has too little.
    Correct {
        n: u64,
        round: String,
        reason: String,
    },
    /// Moves what Redis says that orders hold by `units` to what Postgres says; compared like a correction. The item's quantity is 0.
    Hold {
        n: u64,
        round: String,
        units: i64,
    },
    /// Moves Postgres by `pg` to what Redis says. The item's quantity is 0.
    Adopt {
        n: u64,
        round: String,
        pg: i64,
    },
    /// The product takes no more changes until a person has looked. Refused where one has unfrozen it since `n`, where the reason was seen.
    Freeze {
        n: u64,
        reason: String,
    },
    Unfreeze,
}

/// What another program did to a product in Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InboxRow {
    Move,
    Create,
    Delete,
}

impl InboxRow {
    const ALL: [Self; 3] = [Self::Move, Self::Create, Self::Delete];

    /// As `holdfast.inbox` has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Move => "move",
            Self::Create => "create",
            Self::Delete => "delete",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|row| row.as_str() == text)
    }
}

impl Upkeep {
    const fn kind(&self) -> StockKind {
        match self {
            Self::Init { .. } => StockKind::Init,
            Self::Inbox { .. } => StockKind::Inbox,
            Self::Correct { .. } | Self::Hold { .. } => StockKind::Correct,
            Self::Adopt { .. } => StockKind::Adopt,
            Self::Freeze { .. } => StockKind::Freeze,
            Self::Unfreeze => StockKind::Unfreeze,
        }
    }

    fn write(&self, batch: &mut Pack) {
        let n = |n: &u64| i64::try_from(*n).unwrap_or(i64::MAX);
        match self {
            Self::Init { mark, n: at, low, frozen } => {
                batch.array(4).text(&mark.to_string()).integer(n(at));
                match low {
                    Some(low) => batch.integer(*low),
                    None => batch.no(),
                };
                match frozen {
                    Some(reason) => batch.text(reason),
                    None => batch.no(),
                }
            }
            Self::Inbox { before, mark, row, reason } => {
                batch.array(4).text(&before.to_string()).text(&mark.to_string()).text(row.as_str()).text(reason)
            }
            Self::Correct { n: at, round, reason } => batch.array(3).integer(n(at)).text(round).text(reason),
            Self::Hold { n: at, round, units } => batch.array(4).integer(n(at)).text(round).no().integer(*units),
            Self::Adopt { n: at, round, .. } => batch.array(2).integer(n(at)).text(round),
            Self::Freeze { n: at, reason } => batch.array(2).integer(n(at)).text(reason),
            Self::Unfreeze => batch.array(0),
        };
    }

    /// What it adds to its line in the outbox.
    fn write_to(&self, line: &mut String) {
        let _ = match self {
            Self::Inbox { mark, row, reason, .. } => {
                let gone = if *row == InboxRow::Delete { " gone=1" } else { "" };
                write!(line, " inbox={mark}{gone} reason={}", text::escape(reason.as_bytes()))
            }
            Self::Adopt { pg, .. } => write!(line, " pg={pg}"),
            Self::Hold { units, .. } => write!(line, " held={units}"),
            Self::Correct { reason, .. } | Self::Freeze { reason, .. } => write!(line, " reason={}", text::escape(reason.as_bytes())),
            Self::Init { .. } | Self::Unfreeze => Ok(()),
        };
    }
}

impl StockOp {
    /// Whether there may be more units of its products afterwards.
    fn may_add_units(&self) -> bool {
        use StockKind::{Decr, Reserve, Sell};
        !matches!(self.action, Action::Read | Action::Look | Action::Change(Decr | Reserve | Sell))
    }

    /// Whether it may add units of products that only the script finds out, in an order.
    fn may_add_any_units(&self) -> bool {
        self.order.is_some() && self.may_add_units()
    }

    /// What a client asks for.
    pub fn new(action: Action, items: impl Into<Items>) -> Self {
        Self { action, items: items.into(), low: None, request: None, upkeep: None, order: None }
    }

    /// What is asked of an order. `ttl_ms`: 0 where there is none to give.
    pub fn of_order(action: Action, order: Id, ttl_ms: i64, items: Items) -> Self {
        Self { order: Some(Box::new(OfOrder { order, ttl_ms, looked: Looked::NotYet })), ..Self::new(action, items) }
    }

    /// Gives Redis a product as it was found in Postgres.
    pub fn init(product: Id, found: Found) -> Self {
        let Found { available, mark, n, low, frozen } = found;
        Self::upkeep(product, available, Upkeep::Init { mark, n, low, frozen })
    }

    /// What the server itself asks for. `quantity`: see [`Upkeep`]; 0 where there is none to give.
    pub fn upkeep(product: Id, quantity: i64, upkeep: Upkeep) -> Self {
        let action = Action::Change(upkeep.kind());
        Self { upkeep: Some(Box::new(upkeep)), ..Self::new(action, smallvec![(product, quantity)] as Items) }
    }
}

/// What became of a STOCK operation. `item` counts from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StockOutcome {
    /// Read: the available units of each item, `None` where there is no such product.
    Values(SmallVec<[Option<i64>; 1]>),
    /// Accepted: the available units of each item after it.
    Done {
        available: SmallVec<[i64; 1]>,
        position: Position,
    },
    /// Too little is available.
    Short {
        item: usize,
        available: i64,
    },
    /// Redis has no such product.
    Absent {
        item: usize,
    },
    /// The product waits for a person.
    Frozen {
        item: usize,
        reason: String,
    },
    /// The key holds something that is not a number of units.
    Corrupt {
        item: usize,
    },
    /// It would pass the largest total there may be.
    Over {
        item: usize,
        available: i64,
    },
    /// Only of what the server asks for: what it was made from is no longer so.
    Moved,
    /// What became of an order, as its line in the outbox says.
    Told {
        line: Box<Operation>,
        position: Position,
    },
    /// Nothing changed, since the order is this already.
    Stands(Box<Order>),
    /// Redis does not have the order, and Postgres was not asked.
    Unknown,
    /// There is no such order.
    Nowhere,
    /// The order cannot change, since this key holds what does not belong there.
    Stuck {
        key: String,
    },
    Remembered(Remembered),
}

/// See [`Family`].
pub struct Stock;

impl Family for Stock {
    const LANE: &'static str = "stock";
    const SCRIPT: &'static Script = &script::STOCK_WRITE;
    /// The keys of lua/stock_write.lua before the products: meta, outbox, frozen, low, deleted, held, expiry, unfrozen.
    const FIXED_KEYS: usize = 8;
    type Op = StockOp;
    type Outcome = StockOutcome;
    type Plan = Plan;
    type Desk = ();

    fn changes(op: &StockOp) -> bool {
        !matches!(op.action, Action::Read | Action::Look)
    }

    fn is_of_a_client(op: &StockOp) -> bool {
        op.upkeep.is_none() && op.action != Action::Change(StockKind::Expire)
    }

    fn request(op: &StockOp) -> Option<&Request> {
        op.request.as_deref()
    }

    fn leave_alone(op: &mut StockOp) {
        if let Some(request) = &mut op.request {
            request.alone = true;
        }
    }

    const FOREKNOWS: bool = true;

    fn foreknown(sold_out: &SoldOut, op: &StockOp, asked: Instant) -> Option<StockOutcome> {
        let (product, delta) = sums::part(op).filter(|(_, delta)| *delta < 0)?;
        let available = sold_out.refuses(product, -delta, asked)?;
        Some(StockOutcome::Short { item: 0, available })
    }

    fn may_turn_all(op: &StockOp) -> bool {
        op.may_add_any_units()
    }

    fn goes(sold_out: &SoldOut, op: &StockOp, deadline: Instant) {
        if op.may_add_units() {
            sold_out.may_rise(op.items.iter().map(|(product, _)| product), deadline);
        }
    }

    fn learn(sold_out: &SoldOut, op: &StockOp, outcome: &StockOutcome, asked: Instant) {
        let products = op.items.iter().map(|(product, _)| product);
        if let StockOutcome::Told { line, .. } = outcome
            && op.may_add_any_units()
        {
            line.products().for_each(|product| sold_out.dropped(product));
        }
        if op.may_add_units() {
            return sold_out.rose(products);
        }
        match outcome {
            StockOutcome::Short { item, available } => {
                if let Some((product, _)) = op.items.get(*item) {
                    sold_out.had(product, *available, asked);
                }
            }
            _ if sold_out.refuses_nobody() => {}
            StockOutcome::Told { line, .. } => {
                if let Effect::Stock { items, .. } = &line.effect {
                    products.zip(items).for_each(|(product, item)| sold_out.saw(product, Some(item.available), asked));
                }
            }
            StockOutcome::Done { available, .. } => {
                products.zip(available).for_each(|(product, available)| sold_out.saw(product, Some(*available), asked));
            }
            StockOutcome::Values(values) => products.zip(values).for_each(|(product, value)| sold_out.saw(product, *value, asked)),
            StockOutcome::Absent { item } | StockOutcome::Frozen { item, .. } | StockOutcome::Corrupt { item } => {
                products.skip(*item).take(1).for_each(|product| sold_out.saw(product, None, asked));
            }
            _ => {}
        }
    }

    fn weight(op: &StockOp) -> (usize, usize) {
        let ids: usize = op.items.iter().map(|(product, _)| product.as_bytes().len()).sum();
        let (keys, bytes) = op.request.as_deref().map_or((0, 0), Request::weight);
        let order = op.order.as_ref().map_or(0, |of| of.order.as_bytes().len());
        (op.items.len() + usize::from(order > 0) + keys, 32 + 2 * ids + 48 * op.items.len() + bytes + 3 * order)
    }

    fn encode<'a>(ops: impl Iterator<Item = &'a StockOp> + Clone, generation: i64, grain: Grain) -> Encoded<Plan> {
        let divided = Plan::divide(ops.clone(), grain);
        let mut keys = KeyList::default();
        for key in [keys::FROZEN, keys::LOW, keys::DELETED, keys::HELD, keys::EXPIRY, keys::UNFROZEN] {
            keys.push(&[key]);
        }
        for product in divided.summed.iter().chain(&divided.decided) {
            keys.push(&[keys::PRODUCT_PREFIX, product.as_str()]);
        }
        let before_orders = Self::FIXED_KEYS + divided.summed.len() + divided.decided.len();
        let mut orders: HashMap<&[u8], usize, foldhash::fast::RandomState> = HashMap::default();
        for of in ops.clone().filter_map(|op| op.order.as_deref()) {
            let place = before_orders + orders.len() + 1;
            orders.entry(of.order.as_bytes()).or_insert_with(|| {
                keys.push(&[keys::ORDER_PREFIX, of.order.as_str()]);
                place
            });
        }
        let mut requests = RequestKeys::after(before_orders + orders.len());
        let mut batch = Pack::default();
        batch.array(3);
        sums::write(&mut batch, &divided, ops.clone(), &mut requests, generation);
        batch.array(divided.decided.len());
        for product in &divided.decided {
            batch.text(product.as_str());
        }
        let left = ops.enumerate().filter(|(k, _)| !divided.plan.is_summed(*k));
        batch.array(left.clone().count());
        let mut places = divided.decided_places.iter();
        for (k, op) in left {
            batch.array(7).text(op.action.as_str()).text(&line(k, op)).array(op.items.len() * 2);
            for ((_, quantity), place) in op.items.iter().zip(&mut places) {
                batch.integer(i64::from(*place) + 1).integer(*quantity);
            }
            requests.write(&mut batch, op.request.as_deref(), generation);
            match op.low {
                Some(low) => batch.integer(low),
                None => batch.no(),
            };
            match &op.upkeep {
                Some(upkeep) => upkeep.write(&mut batch),
                None => {
                    batch.no();
                }
            }
            match &op.order {
                Some(of) => of.write(&mut batch, orders.get(of.order.as_bytes()).copied().unwrap_or_default(), &op.items),
                None => {
                    batch.no();
                }
            }
        }
        for key in requests.into_keys() {
            keys.push(&[&key]);
        }
        Encoded { keys, batch: batch.into_bytes(), plan: divided.plan }
    }

    fn read<'a>(
        plan: &Plan,
        ops: impl Iterator<Item = &'a StockOp> + Clone,
        words: &mut Words,
        positions: &mut Positions,
    ) -> Result<Vec<Verdict<StockOutcome>>, Error> {
        let mut worked = Worked::read(plan, ops.clone(), words, positions)?;
        let mut verdicts = Vec::with_capacity(ops.size_hint().0);
        for (k, op) in ops.enumerate() {
            verdicts.push(match plan.is_summed(k) {
                true => Verdict::Decided(worked.next(plan, op)),
                false => decided(op, words, positions)?,
            });
        }
        worked.check()?;
        Ok(verdicts)
    }

    fn note(op: &StockOp, outcome: &StockOutcome) -> Option<Note> {
        match (op.action, outcome) {
            (Action::Change(kind), StockOutcome::Done { available, position }) if kind.moves_both() => {
                let available = if op.request.is_some() { available.to_vec() } else { Vec::new() };
                Some(Note { available, ..Note::at(*position) })
            }
            (_, StockOutcome::Told { line, position }) => Some(Note { line: Some(line.clone()), ..Note::at(*position) }),
            _ => None,
        }
    }

    fn keep(batch: &mut CopiedBatch, k: u32, op: &StockOp, note: Note) {
        if let Some((product, delta)) = sums::part(op) {
            return batch.small.moved(k, product, delta, note.position);
        }
        if let Some(line) = note.line.clone() {
            return batch.copies.push(Copy { k, kept: Kept::Line(line), note: Note { line: None, ..note } });
        }
        let items = op.items.iter().map(|(product, quantity)| (product.detached(), *quantity)).collect();
        let request = op.request.as_deref().map(|request| Box::new(request.detached()));
        let op = StockOp { action: op.action, items, low: op.low, request, upkeep: op.upkeep.clone(), order: op.order.clone() };
        batch.copies.push(Copy { k, kept: Kept::Stock(op), note });
    }

    fn replayed(op: &StockOp, line: &Operation, position: Position) -> Option<StockOutcome> {
        match &line.effect {
            Effect::Stock { kind, .. } if op.order.is_some() => {
                kind.is_of_an_order().then(|| StockOutcome::Told { line: Box::new(line.clone()), position })
            }
            Effect::Stock { items, .. } if items.len() == op.items.len() => {
                Some(StockOutcome::Done { available: items.iter().map(|item| item.available).collect(), position })
            }
            _ => None,
        }
    }

    fn is_same(op: &StockOp, line: &Operation) -> bool {
        let Effect::Stock { kind, items, detail } = &line.effect else { return false };
        if let Some(of) = &op.order {
            // What comes too late for an order makes it expire.
            let expired = *kind == StockKind::Expire && op.items.is_empty();
            let takes =
                |((product, quantity), (item, units)): (&(Id, i64), (&Item, &i64))| product.as_str() == item.product && quantity == units;
            return detail.order.as_ref().is_some_and(|done| {
                done.order == of.order.as_str()
                    && (expired || op.action == Action::Change(*kind))
                    && (op.items.is_empty()
                        || op.items.len() == items.len() && op.items.iter().zip(items.iter().zip(&done.units)).all(takes))
            });
        }
        let same = |((product, quantity), item): (&(Id, i64), &Item)| {
            product.as_str() == item.product
                && match kind {
                    StockKind::Decr => item.delta == -quantity,
                    StockKind::Incr => item.delta == *quantity,
                    StockKind::Set => item.available == *quantity,
                    _ => true,
                }
        };
        op.action == Action::Change(*kind) && op.items.len() == items.len() && op.items.iter().zip(items).all(same)
    }

    fn remembered(remembered: Remembered) -> StockOutcome {
        StockOutcome::Remembered(remembered)
    }
}

/// What the script says of an operation that it decided by itself.
fn decided(op: &StockOp, words: &mut Words, positions: &mut Positions) -> Result<Verdict<StockOutcome>, Error> {
    let word = words.text()?;
    let mut item = || words.integer().map(|item| usize::try_from(item - 1).unwrap_or(0));
    let outcome = match word.as_str() {
        "ok" if op.action == Action::Read => {
            StockOutcome::Values(op.items.iter().map(|_| words.maybe_integer()).collect::<Result<_, _>>()?)
        }
        "ok" => {
            let available = op.items.iter().map(|_| words.integer()).collect::<Result<_, _>>()?;
            StockOutcome::Done { available, position: positions.take() }
        }
        "short" => StockOutcome::Short { item: item()?, available: words.integer()? },
        "absent" => StockOutcome::Absent { item: item()? },
        "frozen" => StockOutcome::Frozen { item: item()?, reason: words.text()? },
        "corrupt" => StockOutcome::Corrupt { item: item()? },
        "over" => StockOutcome::Over { item: item()?, available: words.integer()? },
        "moved" => StockOutcome::Moved,
        "told" => {
            let line = words.text()?;
            let line = Operation::decode(&line).map_err(|error| Error::Unexpected(error.to_string()))?;
            StockOutcome::Told { line: Box::new(line), position: positions.take() }
        }
        "stands" => StockOutcome::Stands(Box::new(order(words)?)),
        "unknown" => StockOutcome::Unknown,
        "nowhere" => StockOutcome::Nowhere,
        "stuck" => StockOutcome::Stuck { key: words.text()? },
        "later" => return Ok(Verdict::Later("overloaded: too many orders are being settled; nothing was changed".into())),
        other => return requests::verdict(other, words, StockOutcome::Remembered),
    };
    Ok(Verdict::Decided(outcome))
}

fn order(words: &mut Words) -> Result<Order, Error> {
    let (state, position, expires_ms, items) = (words.text()?, words.text()?, words.integer()?, words.text()?);
    let order = || Some((OrderState::parse(&state)?, Position::parse(position.as_bytes())?, Order::parse_items(&items)?));
    let (state, position, items) = order().ok_or_else(|| Error::Unexpected(format!("an order that is {state:?} at {position:?}")))?;
    Ok(Order { state, expires_ms, items, position })
}

/// What the operation's line in the outbox begins with, up to what only the script knows.
fn line(k: usize, op: &StockOp) -> String {
    let mut line = format!("{k} {}", op.action.as_str());
    if let Some(request) = &op.request {
        request.write_to(&mut line);
    }
    if let Some(low) = op.low {
        let _ = write!(line, " low={low}");
    }
    if let Some(upkeep) = &op.upkeep {
        upkeep.write_to(&mut line);
    }
    match &op.order {
        Some(of) => _ = write!(line, " order={}", of.order),
        None => line.push_str(" |"),
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::RequestId;
    use crate::ledger::testing::RedisServer;
    use crate::store::{Connection, meta};
    use bytes::Bytes;

    #[test]
    fn a_line_begins_with_all_that_the_sidecar_knows() {
        let request = Request::new(RequestId::parse(Bytes::from_static(b"r 1")).unwrap(), "9f86".into());
        let set = StockOp::new(Action::Change(StockKind::Set), vec![(Id::from("a"), 5)]);
        let op = StockOp { low: Some(2), request: Some(Box::new(request)), ..set };
        let line = line(3, &op) + " a 5 5";
        assert_eq!(line, "3 set request=r%201 digest=9f86 low=2 | a 5 5");
        assert!(Operation::decode(&line).is_ok());
    }

    #[test]
    fn what_is_kept_does_not_keep_the_buffer_of_its_request() {
        let buffer = Bytes::from(vec![b'a'; 4096]);
        let request = Request::new(RequestId::parse(buffer.slice(..9)).unwrap(), "9f86".into());
        let mut op = StockOp::new(Action::Change(StockKind::Decr), vec![(Id::parse(buffer.slice(..3)).unwrap(), 1)]);
        op.request = Some(Box::new(request));
        let note = Note::at(Position::new(1, 1));
        let mut batch = CopiedBatch::new("i:stock:1".into(), 7, 1);
        Stock::keep(&mut batch, 0, &op, note);
        drop(op);
        assert!(buffer.is_unique());
    }

    #[test]
    fn a_product_named_by_several_operations_is_one_key() {
        let op = |product| StockOp::new(Action::Change(StockKind::Decr), vec![(Id::from(product), 1)]);
        let encoded = Stock::encode([op("a"), op("b"), op("a")].iter(), 0, Grain::Operation);
        assert_eq!(
            encoded.keys.iter().collect::<Vec<_>>(),
            [
                "stock:frozen",
                "stock:low",
                "stock:deleted",
                "stock:held",
                "stock:expiry",
                "stock:unfrozen",
                "stock:product:a",
                "stock:product:b"
            ]
        );
    }

    /// Runs a batch under a counter, for the second time or not. Returns the script's word and what follows op and time.
    async fn run_batch(connection: &mut Connection, ops: &[StockOp], counter: u32, again: bool) -> (String, Words) {
        let now_ms = connection.time_ms().await.unwrap();
        let generation = now_ms / 600_000;
        let encoded = Stock::encode(ops.iter(), generation, Grain::Operation);
        let keys: Vec<&str> = [keys::META, keys::OUTBOX].into_iter().chain(encoded.keys.iter()).collect();
        let (run_id, counter, generation) = (connection.run_id().to_owned(), counter.to_string(), generation.to_string());
        let resend: &[u8] = if again { b"1" } else { b"0" };
        let args: [&[u8]; 10] = [
            b"1",
            run_id.as_bytes(),
            b"0",
            b"9999999999999",
            b"i:stock",
            counter.as_bytes(),
            resend,
            b"600000",
            generation.as_bytes(),
            &encoded.batch,
        ];
        let mut words = Words::new(connection.run(&script::STOCK_WRITE, &keys, &args).await.unwrap()).unwrap();
        let word = words.text().unwrap();
        (0..2).for_each(|_| _ = words.raw().unwrap());
        (word, words)
    }

    /// The same, of what is accepted. Returns what it says of each operation.
    async fn accepted(connection: &mut Connection, ops: &[StockOp], counter: u32) -> Words {
        let (word, mut words) = run_batch(connection, ops, counter, false).await;
        assert_eq!(word, "ok");
        (0..2).for_each(|_| _ = words.raw().unwrap());
        words
    }

    fn named(op: StockOp, id: &'static str) -> StockOp {
        let request = Request::new(RequestId::parse(Bytes::from_static(id.as_bytes())).unwrap(), "d".into());
        StockOp { request: Some(Box::new(request)), ..op }
    }

    #[tokio::test]
    async fn what_goes_anew_never_runs_as_it_was() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        meta::attach(&mut connection, None, 1).await.unwrap();
        let change = |kind, units| StockOp::new(Action::Change(kind), vec![(Id::from("a"), units)]);
        run_batch(&mut connection, &[change(StockKind::Set, 10)], 1, false).await;
        let decr = || [named(change(StockKind::Decr, 1), "r")];
        assert_eq!(run_batch(&mut connection, &decr(), 2, false).await.0, "ok");
        for (id, counter) in [("r", 3), ("00000000-0000-7000-8000-000000000000", 4)] {
            // Known, and too old.
            let ops = [named(change(StockKind::Decr, 1), "new"), named(change(StockKind::Decr, 1), id)];
            assert_eq!(run_batch(&mut connection, &ops, counter, true).await.0, "requests");
            let noted = connection.send(redis::cmd("HGET").arg(keys::META).arg("i:stock")).await.unwrap();
            assert_eq!(redis::from_redis_value::<String>(noted).unwrap(), format!("{counter}:-"));
            // The first sending comes late.
            assert_eq!(run_batch(&mut connection, &ops, counter, false).await.0, "replayed");
            let mut alone = ops.to_vec();
            alone.iter_mut().for_each(Stock::leave_alone);
            alone.remove(0);
            let (word, mut words) = run_batch(&mut connection, &alone, counter * 10, false).await;
            assert_eq!(word, "ok");
            (0..2).for_each(|_| _ = words.raw().unwrap());
            assert_eq!(words.text().unwrap(), if id == "r" { "known" } else { "stale" });
        }
        let left = connection.send(redis::cmd("GET").arg("stock:product:a")).await.unwrap();
        assert_eq!(redis::from_redis_value::<i64>(left).unwrap(), 9);
    }

    #[tokio::test]
    async fn a_batch_settles_only_so_many_products_for_orders() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        meta::attach(&mut connection, None, 1).await.unwrap();
        let products: Items = (0..250).map(|n| (Id::from(format!("p{n}").as_str()), 1)).collect();
        let set: Vec<_> = products.iter().map(|(id, _)| StockOp::new(Action::Change(StockKind::Set), vec![(id.clone(), 9)])).collect();
        assert_eq!(run_batch(&mut connection, &set, 1, false).await.0, "ok");
        let of_order = |kind, n: usize, items| StockOp::of_order(Action::Change(kind), Id::from(format!("o{n}").as_str()), 60_000, items);
        for n in 0..6 {
            let counter = u32::try_from(n).unwrap() + 2;
            assert_eq!(run_batch(&mut connection, &[of_order(StockKind::Reserve, n, products.clone())], counter, false).await.0, "ok");
        }
        let mut cancelled = 0;
        for counter in 10..12 {
            let ops: Vec<_> = (cancelled..6).map(|n| of_order(StockKind::Cancel, n, Items::new())).collect();
            let mut words = accepted(&mut connection, &ops, counter).await;
            let told: Vec<String> = ops
                .iter()
                .map_while(|_| {
                    let word = words.text().ok()?;
                    (word == "told").then(|| words.text().unwrap())
                })
                .collect();
            cancelled += told.len();
            assert_eq!(cancelled, if counter == 10 { 4 } else { 6 }, "a thousand at a time");
        }
        let held = connection.send(redis::cmd("EXISTS").arg(keys::HELD)).await.unwrap();
        assert_eq!(redis::from_redis_value::<i64>(held).unwrap(), 0);
    }

    #[tokio::test]
    async fn what_a_batch_deletes_is_not_given_back_in_it_nor_from_before_it() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        meta::attach(&mut connection, None, 1).await.unwrap();
        let change = |kind, units| StockOp::new(Action::Change(kind), vec![(Id::from("a"), units)]);
        let init = |n| {
            let found = Found { available: 7, mark: InboxMark::default(), n, low: None, frozen: None };
            StockOp::init(Id::from("a"), found)
        };
        let mut counter = 0;
        let mut run = async |ops: Vec<StockOp>| {
            counter += 1;
            let mut words = accepted(&mut connection, &ops, counter).await;
            // Of each a word and a number.
            ops.iter().map(|_| (words.text().unwrap(), words.integer().unwrap()).0 == "ok").collect::<Vec<_>>()
        };
        // n: 1, 2.
        assert_eq!(run(vec![change(StockKind::Set, 7), change(StockKind::Delete, 0), init(1)]).await, [true, true, false]);
        // 3, 4: what was read at 2 knows of the first deletion, not of the second.
        assert_eq!(run(vec![change(StockKind::Set, 7)]).await, [true]);
        assert_eq!(run(vec![change(StockKind::Delete, 0)]).await, [true]);
        assert_eq!(run(vec![init(2)]).await, [false]);
        assert_eq!(run(vec![init(3)]).await, [false]);
        assert_eq!(run(vec![init(4)]).await, [true]);
        assert_eq!(run(vec![init(5)]).await, [false], "it is there");
    }

    #[tokio::test]
    async fn whoever_has_not_seen_that_a_product_was_unfrozen_does_not_freeze_one() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        meta::attach(&mut connection, None, 1).await.unwrap();
        let mut server_side = Connection::open(&server.url()).await.unwrap();
        let set = |product: &str| StockOp::new(Action::Change(StockKind::Set), vec![(Id::from(product), 7)]);
        let freeze = |product: &str, n| StockOp::upkeep(Id::from(product), 0, Upkeep::Freeze { n, reason: "r".into() });
        let unfreeze = || StockOp::upkeep(Id::from("a"), 0, Upkeep::Unfreeze);
        let mut counter = 0;
        let mut run = async |ops: Vec<StockOp>| {
            counter += 1;
            let mut words = accepted(&mut connection, &ops, counter).await;
            let word = |_: &StockOp| {
                let word = words.text().unwrap();
                let values = [("moved", 0), ("frozen", 2)].into_iter().find(|(known, _)| *known == word).map_or(1, |(_, values)| values);
                (0..values).for_each(|_| _ = words.raw().unwrap());
                word
            };
            ops.iter().map(word).collect::<Vec<_>>()
        };
        // n: 1 to 4, in one batch.
        assert_eq!(run(vec![set("a"), set("b"), freeze("a", 2), unfreeze(), freeze("a", 3)]).await, ["ok", "ok", "ok", "ok", "moved"]);
        assert_eq!(run(vec![freeze("a", 3), freeze("b", 3)]).await, ["moved", "ok"], "each for itself");
        // 6 to 8.
        assert_eq!(run(vec![freeze("a", 4)]).await, ["ok"]);
        assert_eq!(run(vec![unfreeze(), freeze("a", 6)]).await, ["ok", "moved"]);
        assert_eq!(run(vec![freeze("b", 7), freeze("a", 7)]).await, ["frozen", "ok"]);
        // 9: what a first use found in Postgres before that.
        assert_eq!(run(vec![unfreeze()]).await, ["ok"]);
        let init = |n, frozen: Option<&str>| {
            let frozen = frozen.map(str::to_owned);
            StockOp::init(Id::from("a"), Found { available: 7, mark: InboxMark::default(), n, low: None, frozen })
        };
        server_side.send(redis::cmd("DEL").arg("stock:product:a")).await.unwrap();
        assert_eq!(run(vec![init(8, Some("r"))]).await, ["moved"]);
        assert_eq!(run(vec![init(8, None)]).await, ["ok"]);
    }
}
