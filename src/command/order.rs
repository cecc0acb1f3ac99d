//! STOCK, the commands about orders: units that are held for a while, then sold or given back.

use std::rc::Rc;

use smallvec::SmallVec;
use tokio::sync::oneshot;
use tokio::task::spawn_local;

use super::args::Ack;
use super::change::{ACK_POSTGRES, ACK_REDIS, accepted, outcome};
use super::spec::{self, ACK, FAST, ORDER, PRODUCT, QUANTITY, READONLY, REQUEST, Spec, TIMEOUT, WRITE};
use super::stock::{self, Shape, StockWaiter};
use super::{Call, Context, Step};
use crate::domain::change::{Effect, Operation, StockKind};
use crate::domain::history::PastChange;
use crate::domain::{Order, OrderState, Position};
use crate::limits::{self, HISTORY_COUNT, HISTORY_COUNT_MAX, ORDER_TTL_MS_MAX};
use crate::resp::Reply;
use crate::store::partition::Lookup;
use crate::store::stock::{Action, Items, Looked, StockOp};

const TTL_MS: spec::Arg = spec::integer("ttl_ms", 1, ORDER_TTL_MS_MAX, "ms");

pub static RESERVE: Spec =
    Spec::new("STOCK.RESERVE", "Holds units of one or more products for an order, all or nothing, until its time passes.")
        .family("stock")
        .args(&[ORDER, TTL_MS, PRODUCT.repeated(), QUANTITY.repeated(), REQUEST, ACK, TIMEOUT])
        .flags(WRITE | FAST)
        .complexity("O(N) in the number of products")
        .reply("`HELD, expires_at_ms, position` / `INSUFFICIENT, product, available` / `EXISTS, state` / `CANCELLED`")
        .example("STOCK.RESERVE order-1 900000 sku-1 2 sku-2 1")
        .run(|call| match stock::pairs(call) {
            Ok(items) => change(call, StockKind::Reserve, items, ACK_REDIS),
            Err(reply) => Step::Reply(reply),
        });

pub static CONFIRM: Spec = Spec::new("STOCK.CONFIRM", "Sells what an order holds: it was paid.")
    .family("stock")
    .args(&[ORDER, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .complexity("O(N) in the number of the order's products")
    .reply("`CONFIRMED, position` / `EXPIRED` / `CANCELLED` / `NOTFOUND`")
    .example("STOCK.CONFIRM order-1")
    .run(|call| change(call, StockKind::Confirm, Items::new(), ACK_REDIS));

pub static CANCEL: Spec = Spec::new("STOCK.CANCEL", "Gives back what an order took; one that is not there yet is refused when it comes.")
    .family("stock")
    .args(&[ORDER, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .complexity("O(N) in the number of the order's products")
    .reply("`CANCELLED, position` / `EXPIRED`")
    .example("STOCK.CANCEL order-1")
    .run(|call| change(call, StockKind::Cancel, Items::new(), ACK_POSTGRES));

pub static EXTEND: Spec = Spec::new("STOCK.EXTEND", "Holds an order's units for so long from now on.")
    .family("stock")
    .args(&[ORDER, TTL_MS, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .complexity("O(N) in the number of the order's products")
    .reply("`HELD, expires_at_ms, position` / `EXPIRED` / `CONFIRMED` / `CANCELLED` / `NOTFOUND`")
    .example("STOCK.EXTEND order-1 900000")
    .run(|call| change(call, StockKind::Extend, Items::new(), ACK_REDIS));

pub static GET: Spec = Spec::new("STOCK.ORDER", "Returns an order.")
    .family("stock")
    .args(&[ORDER])
    .flags(READONLY | FAST)
    .reply("map `order state expires_at_ms items`, or nil; state: `held`, `confirmed`, `cancelled`, `expired`")
    .example("STOCK.ORDER order-1")
    .run(|call| {
        let op = StockOp::of_order(Action::Look, call.args.id("order"), 0, Items::new());
        stock::submit_read(call, op, Shape::One)
    });

pub static HISTORY: Spec = Spec::new("STOCK.HISTORY", "Returns the changes of a product as Postgres has them, the newest first.")
    .family("stock")
    .args(&[
        PRODUCT,
        spec::integer("count", 1, HISTORY_COUNT_MAX, "").token("COUNT"),
        spec::text("before", limits::POSITION_TEXT_MAX).token("BEFORE"),
    ])
    .flags(READONLY)
    .complexity("O(N) in the number of changes returned")
    .reply("array of maps `position kind delta available held order request at_ms operations`; held: by how much the held units moved; operations: how many the row stands for, from that position on")
    .example("STOCK.HISTORY sku-1 COUNT 10")
    .more_time(limits::SYNC_REPLY_WITHIN)
    .run(history);

/// Why an order could not be looked up.
const NOT_KNOWN: &str = "TRYAGAIN Redis does not have this order, and Postgres cannot say yet whether there is one; nothing was changed";

fn change(call: &mut Call<'_>, kind: StockKind, items: Items, default: Ack) -> Step {
    let ttl_ms = if matches!(kind, StockKind::Reserve | StockKind::Extend) { call.args.integer("ttl_ms") } else { 0 };
    let op = StockOp::of_order(Action::Change(kind), call.args.id("order"), ttl_ms, items);
    stock::submit_change(call, op, default)
}

/// What the caller of a change is told, and the position at which it is to be confirmed; an error where there is none.
pub(super) fn told(line: &Operation, position: Position) -> Result<(Position, Reply), Reply> {
    let Effect::Stock { kind, items, detail } = &line.effect else { return Err(Reply::error("ERR internal error")) };
    let expires = detail.order.as_ref().and_then(|order| order.expires_ms);
    let reply = match kind {
        StockKind::Reserve | StockKind::Extend => accepted("HELD", &[expires.unwrap_or_default()], position),
        StockKind::Sell => accepted("OK", &items.iter().map(|item| item.available).collect::<SmallVec<[i64; 4]>>(), position),
        StockKind::Confirm => accepted("CONFIRMED", &[], position),
        StockKind::Cancel => accepted("CANCELLED", &[], position),
        // It came too late, and that has been written down.
        _ => return Err(outcome("EXPIRED", [])),
    };
    Ok((position, reply))
}

/// What the caller is told of an order that did not change.
pub(super) fn stands(op: &StockOp, order: &Order) -> Result<(Position, Reply), Reply> {
    let again = |word| Ok((order.position, accepted(word, &[], order.position)));
    let Action::Change(kind) = op.action else { return Err(shown(op, order)) };
    match (kind, order.state) {
        (StockKind::Reserve | StockKind::Sell, OrderState::Cancelled) if order.items.is_empty() => Err(outcome("CANCELLED", [])),
        (StockKind::Reserve | StockKind::Sell, state) => Err(outcome("EXISTS", [Reply::text(state.as_str())])),
        (StockKind::Confirm, OrderState::Confirmed) => again("CONFIRMED"),
        (StockKind::Cancel, OrderState::Cancelled) => again("CANCELLED"),
        (_, OrderState::Confirmed) => Err(outcome("CONFIRMED", [])),
        (_, OrderState::Cancelled) => Err(outcome("CANCELLED", [])),
        (_, OrderState::Expired) => Err(outcome("EXPIRED", [])),
        (_, OrderState::Held) => Err(Reply::error("ERR internal error")),
    }
}

fn shown(op: &StockOp, order: &Order) -> Reply {
    let id = op.order.as_ref().map_or(Reply::Nil, |of| Reply::bulk(of.order.bytes().clone()));
    let items = order.items.iter().flat_map(|(product, units)| [Reply::text(product.clone()), Reply::Integer(*units)]);
    Reply::map([
        ("order", id),
        ("state", Reply::text(order.state.as_str())),
        ("expires_at_ms", Reply::Integer(order.expires_ms)),
        ("items", Reply::Array(items.collect())),
    ])
}

/// What the caller is told of an order that is nowhere.
pub(super) fn nowhere(op: &StockOp) -> Reply {
    if op.action == Action::Look { Reply::Nil } else { outcome("NOTFOUND", []) }
}

/// Looks the order up in Postgres, and tries the operation again with what it has.
pub(super) fn look_up_and_retry(cx: &Rc<Context>, mut op: StockOp, deadline: std::time::Instant, waiter: StockWaiter) {
    let cx = Rc::clone(cx);
    spawn_local(async move {
        let Some(of) = op.order.as_mut() else { return waiter.refuse(NOT_KNOWN) };
        let (answer, answered) = oneshot::channel();
        let partition = &cx.backend.partition;
        let lookup = Lookup::Order { order: of.order.clone(), absent_at: partition.head().n, answer };
        if !partition.ledger_up() || partition.lookups.try_send(lookup).is_err() {
            return waiter.refuse(NOT_KNOWN);
        }
        match tokio::time::timeout_at(deadline.into(), answered).await {
            Ok(Ok(found)) => of.looked = found.map_or(Looked::Nowhere, Looked::Found),
            _ => return waiter.refuse(NOT_KNOWN),
        }
        let within = cx.backend.within;
        waiter.lane(&cx.backend).submit_until(op, deadline.min(std::time::Instant::now() + within), waiter);
    });
}

fn history(call: &mut Call<'_>) -> Step {
    let before = match call.args.maybe_text("before").map(Position::parse) {
        Some(None) => return Step::Reply(Reply::error("ERR invalid before: it must be a position, such as 1-42")),
        Some(position) => position,
        None => None,
    };
    let count = call.args.maybe_integer("count").unwrap_or(HISTORY_COUNT);
    let (answer, answered) = oneshot::channel();
    let lookup = Lookup::History { product: call.args.id("product"), before, count, answer };
    let partition = &call.cx.backend.partition;
    if !partition.ledger_up() {
        return Step::Reply(Reply::error("TRYAGAIN Postgres cannot be reached, and only it has the history"));
    }
    if partition.lookups.try_send(lookup).is_err() {
        return Step::Reply(Reply::error("TRYAGAIN overloaded: too many look-ups wait for Postgres"));
    }
    let deadline = call.arrived + limits::SYNC_REPLY_WITHIN;
    Step::Wait(Box::pin(async move {
        match tokio::time::timeout_at(deadline.into(), answered).await {
            Ok(Ok(changes)) => Reply::Array(changes.into_iter().map(past).collect()),
            _ => Reply::error("TRYAGAIN Postgres does not answer"),
        }
    }))
}

fn past(change: PastChange) -> Reply {
    let maybe = |text: Option<String>| text.map_or(Reply::Nil, Reply::text);
    let request =
        change.request.map(|request| String::from_utf8_lossy(crate::domain::RequestId::of_escaped(&request).as_bytes()).into_owned());
    Reply::map([
        ("position", Reply::text(change.position.to_string())),
        ("kind", Reply::text(change.kind)),
        ("delta", Reply::Integer(change.delta)),
        ("available", Reply::Integer(change.available)),
        ("held", Reply::Integer(change.held_delta)),
        ("order", maybe(change.order)),
        ("request", maybe(request)),
        ("at_ms", Reply::Integer(change.at_ms)),
        ("operations", Reply::Integer(change.operations)),
    ])
}
