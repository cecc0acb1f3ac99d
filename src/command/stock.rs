//! STOCK: products and their units.

use std::rc::Rc;
use std::time::{Duration, Instant};

use smallvec::{SmallVec, smallvec};
use tokio::sync::oneshot;

use super::args::Ack;
use super::change::{self, ACK_POSTGRES, ACK_REDIS, CROWDED, Confirmation, accepted, failed, outcome};
use super::spec::{self, ACK, FAST, ORDER, PRODUCT, QUANTITY, READONLY, REQUEST, Spec, TIMEOUT, WRITE};
use super::{Backend, Call, Context, Step, doubt, first_use, order, read};
use crate::domain::change::StockKind;
use crate::domain::quantity::{QUANTITY_MAX, TOTAL_MAX};
use crate::domain::{Drift, Id};
use crate::limits;
use crate::resp::{Encoder, Reply, Ticket};
use crate::store::lane::{Failure, Lane, Waiter};
use crate::store::partition::SyncRequest;
use crate::store::stock::{Action, Items, Stock, StockOp, StockOutcome, Upkeep};

pub static SET: Spec = Spec::new("STOCK.SET", "Creates a product, or overwrites its available units.")
    .family("stock")
    .args(&[
        PRODUCT,
        spec::integer("quantity", 0, QUANTITY_MAX, ""),
        spec::integer("low", 0, QUANTITY_MAX, "").token("LOW"),
        REQUEST,
        ACK,
        TIMEOUT,
    ])
    .flags(WRITE | FAST)
    .reply("`OK, quantity, position`")
    .example("STOCK.SET sku-1 100")
    .run(|call| change(call, StockKind::Set, ACK_POSTGRES));

pub static DEL: Spec = Spec::new("STOCK.DEL", "Deletes a product.")
    .family("stock")
    .args(&[PRODUCT, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .reply("`OK, position` / `NOTFOUND`")
    .example("STOCK.DEL sku-1")
    .run(|call| change(call, StockKind::Delete, ACK_POSTGRES));

pub static GET: Spec = Spec::new("STOCK.GET", "Returns the available units of a product.")
    .family("stock")
    .args(&[PRODUCT])
    .flags(READONLY | FAST)
    .reply("integer, or nil")
    .example("STOCK.GET sku-1")
    .refused_early(crowded)
    .run(|call| {
        let product = call.args.id("product");
        look(call, smallvec![(product, 0)], Shape::One)
    });

pub static MGET: Spec = Spec::new("STOCK.MGET", "Returns the available units of several products.")
    .family("stock")
    .args(&[PRODUCT.repeated()])
    .flags(READONLY | FAST)
    .complexity("O(N) in the number of products")
    .reply("array of integer or nil")
    .example("STOCK.MGET sku-1 sku-2")
    .run(|call| {
        let products: Items = call.args.ids("product").map(|product| (product, 0)).collect();
        match products.len() > limits::PRODUCTS_MAX {
            true => Step::Reply(too_many_products()),
            false => look(call, products, Shape::Many),
        }
    });

pub static INFO: Spec = Spec::new("STOCK.INFO", "Returns what is known of a product.")
    .family("stock")
    .args(&[PRODUCT])
    .flags(READONLY | FAST)
    .reply("map `product available held low position applied lag_ms frozen`, or nil")
    .example("STOCK.INFO sku-1")
    .run(|call| {
        let product = call.args.id("product");
        read::from_redis(call, |cx| info(cx, product))
    });

pub static INCR: Spec = Spec::new("STOCK.INCR", "Adds units to a product: restocks it, or gives units back.")
    .family("stock")
    .args(&[PRODUCT, QUANTITY, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .reply("`OK, available, position`")
    .example("STOCK.INCR sku-1 5")
    .refused_early(crowded)
    .run(|call| change(call, StockKind::Incr, ACK_REDIS));

pub static DECR: Spec = Spec::new("STOCK.DECR", "Takes units off one or more products, all or nothing, never below zero.")
    .family("stock")
    .args(&[PRODUCT.repeated(), QUANTITY.repeated(), ORDER.token("ORDER"), REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .complexity("O(N) in the number of products")
    .reply("`OK, available..., position` / `INSUFFICIENT, product, available`; with ORDER also `EXISTS, state` / `CANCELLED`")
    .example("STOCK.DECR sku-1 1")
    .refused_early(crowded)
    .run(decr);

pub static SCAN: Spec = Spec::new("STOCK.SCAN", "Iterates over the products.")
    .family("stock")
    .args(&[
        spec::cursor("cursor"),
        spec::pattern("pattern").token("MATCH"),
        spec::integer("count", 1, limits::SCAN_COUNT_MAX, "").token("COUNT"),
    ])
    .flags(READONLY)
    .complexity("O(1) a call, O(N) for a whole iteration")
    .reply("`cursor, [product, available, ...]`")
    .example("STOCK.SCAN 0 MATCH sku-* COUNT 100")
    .run(|call| {
        let scan = read::Scan::of(&call.args);
        read::from_redis(call, |cx| async move {
            match cx.backend.reads.scan_products(&scan.cursor, &scan.pattern, scan.count).await {
                Ok(scanned) => read::scanned(scanned),
                Err(error) => read::failed(&error),
            }
        })
    });

pub static SYNC: Spec = Spec::new("STOCK.SYNC", "Compares products in Redis with Postgres and repairs what differs, all products if none is named.")
    .family("stock")
    .args(&[PRODUCT.any_number(), spec::flag("dryrun", "DRYRUN")])
    .flags(WRITE)
    .complexity("O(N) in the number of products")
    .reply("array of maps, one a product that differs: `product redis postgres in_flight drift action measure`; action: `none`, `corrected`, `frozen`, `initialised`; measure: `available`, `held`")
    .example("STOCK.SYNC sku-1 DRYRUN")
    .more_time(limits::SYNC_REPLY_WITHIN)
    .run(sync);

pub static UNFREEZE: Spec = Spec::new("STOCK.UNFREEZE", "Lets a frozen product change again, after a person has looked.")
    .family("stock")
    .args(&[PRODUCT, REQUEST, ACK, TIMEOUT])
    .flags(WRITE | FAST)
    .reply("`OK, position`")
    .example("STOCK.UNFREEZE sku-1")
    .run(|call| {
        let op = StockOp::upkeep(call.args.id("product"), 0, Upkeep::Unfreeze);
        submit_change(call, op, ACK_POSTGRES)
    });

fn too_many_products() -> Reply {
    Reply::error(format!("ERR too many products: at most {} in one command", limits::PRODUCTS_MAX))
}

fn change(call: &mut Call<'_>, kind: StockKind, default: Ack) -> Step {
    let quantity = if kind == StockKind::Delete { 0 } else { call.args.integer("quantity") };
    let low = if kind == StockKind::Set { call.args.maybe_integer("low") } else { None };
    let items: Items = smallvec![(call.args.id("product"), quantity)];
    submit_change(call, StockOp { low, ..StockOp::new(Action::Change(kind), items) }, default)
}

/// Whether there is no use in taking in more for Redis.
fn crowded(cx: &Context) -> Option<&'static str> {
    cx.backend.is_stock_crowded().then_some(CROWDED)
}

fn decr(call: &mut Call<'_>) -> Step {
    let items = match pairs(call) {
        Ok(items) => items,
        Err(reply) => return Step::Reply(reply),
    };
    let op = match call.args.order() {
        Some(order) => StockOp::of_order(Action::Change(StockKind::Sell), order, 0, items),
        None => StockOp::new(Action::Change(StockKind::Decr), items),
    };
    submit_change(call, op, ACK_REDIS)
}

/// The products with their quantities, each product once. Errors with the reply where there are too many.
pub(super) fn pairs(call: &Call<'_>) -> Result<Items, Reply> {
    let mut items = Items::new();
    for (product, quantity) in call.args.pairs() {
        match items.iter_mut().find(|(known, _)| *known == product) {
            // Each quantity is at most 10^12 and there are at most PRODUCTS_MAX of them: the sum stays in range.
            Some((_, sum)) => *sum += quantity,
            None => items.push((product, quantity)),
        }
        if items.len() > limits::PRODUCTS_MAX {
            return Err(too_many_products());
        }
    }
    Ok(items)
}

pub(super) fn submit_change(call: &mut Call<'_>, mut op: StockOp, default: Ack) -> Step {
    let confirmation = match Confirmation::of(call, default) {
        Ok(confirmation) => confirmation,
        Err(reply) => return Step::Reply(reply),
    };
    op.request = change::request(&call.args).map(Box::new);
    let lane = Rc::clone(call.cx.backend.stock_for(call.session, call.pipeline));
    // What is refused by a note waits for nothing.
    if let Some(refusal) = lane.foreknown(&op, call.arrived) {
        return Step::Reply(refused(&op, &refusal));
    }
    let waiter = StockWaiter::client(call, call.ticket_with(confirmation.waits_for_postgres()), Shape::Change(confirmation));
    doubt::submit(call, &lane, op, confirmation.waits_for_postgres(), waiter);
    Step::Later
}

fn look(call: &mut Call<'_>, items: Items, shape: Shape) -> Step {
    submit_read(call, StockOp::new(Action::Read, items), shape)
}

pub(super) fn submit_read(call: &mut Call<'_>, op: StockOp, shape: Shape) -> Step {
    let lane = Rc::clone(call.cx.backend.stock_for(call.session, call.pipeline));
    let waiter = StockWaiter::client(call, call.ticket(), shape);
    lane.submit(op, call.arrived, waiter);
    Step::Later
}

/// What a reply is made of.
pub(super) enum Shape {
    One,
    Many,
    Change(Confirmation),
}

/// Who waits for a STOCK operation.
pub enum StockWaiter {
    Client(ClientWaiter),
    /// The server itself.
    Server(oneshot::Sender<Result<StockOutcome, Failure>>),
}

/// A client that waits.
pub struct ClientWaiter {
    cx: Rc<Context>,
    ticket: Ticket,
    shape: Shape,
    arrived: Instant,
    /// Whether it goes through the second lane.
    is_beside: bool,
    /// How often products were looked up for it.
    lookups: usize,
}

impl StockWaiter {
    fn client(call: &Call<'_>, ticket: Ticket, shape: Shape) -> Self {
        Self::Client(ClientWaiter {
            cx: Rc::clone(call.cx),
            ticket,
            shape,
            arrived: call.arrived,
            is_beside: call.session.is_beside,
            lookups: 0,
        })
    }

    /// The lane that its operation goes through, as all that its client waits for.
    pub fn lane<'a>(&self, backend: &'a Backend) -> &'a Rc<Lane<Stock, Self>> {
        backend.stock_lane(matches!(self, Self::Client(client) if client.is_beside))
    }

    /// Answers with an error.
    pub fn refuse(self, error: &'static str) {
        if let Self::Client(client) = self {
            client.ticket.complete(Reply::error(error));
        }
    }
}

impl Waiter<Stock> for StockWaiter {
    fn done(self, op: &StockOp, result: Result<StockOutcome, Failure>) {
        let mut client = match self {
            Self::Client(client) => client,
            // Whoever has given up does not hear it.
            Self::Server(answer) => {
                _ = answer.send(result);
                return;
            }
        };
        if matches!(result, Ok(StockOutcome::Unknown)) {
            let (cx, deadline) = (Rc::clone(&client.cx), client.lookup_deadline());
            return order::look_up_and_retry(&cx, op.clone(), deadline, Self::Client(client));
        }
        let missing = result.as_ref().map_or_else(|_| Vec::new(), |outcome| client.missing(op, outcome));
        if missing.is_empty() {
            return client.answer(op, result);
        }
        client.lookups += 1;
        let (cx, deadline) = (Rc::clone(&client.cx), client.lookup_deadline());
        first_use::load_and_retry(&cx, missing, op.clone(), deadline, Self::Client(client));
    }
}

impl ClientWaiter {
    /// Until when products may be looked up for it: a change that waits for Postgres anyway has the time for that.
    fn lookup_deadline(&self) -> Instant {
        let more = if let Shape::Change(confirmation) = self.shape { confirmation.waits_for_postgres() } else { Duration::ZERO };
        self.arrived + self.cx.backend.within + more
    }

    /// The products that Redis does not have and Postgres may.
    fn missing(&self, op: &StockOp, outcome: &StockOutcome) -> Vec<Id> {
        // Each look-up clears up at least one product, so more of them would find nothing new.
        if self.lookups > op.items.len() {
            return Vec::new();
        }
        let unknown = |product: &Id| !self.cx.backend.first_use.is_nowhere(product);
        let products = op.items.iter().map(|(product, _)| product);
        match outcome {
            StockOutcome::Values(values) => products
                .zip(values)
                .filter(|(product, value)| value.is_none() && unknown(product))
                .map(|(product, _)| product.clone())
                .collect(),
            StockOutcome::Absent { item } => products.skip(*item).take(1).filter(|product| unknown(product)).cloned().collect(),
            _ => Vec::new(),
        }
    }

    fn answer(self, op: &StockOp, result: Result<StockOutcome, Failure>) {
        let accepted_at = |position, reply| match self.shape {
            Shape::Change(confirmation) => Ok((confirmation, position, reply)),
            Shape::One | Shape::Many => Err(reply),
        };
        let outcome = match result {
            Err(failure) => Err(failed(&self.cx, failure)),
            Ok(StockOutcome::Done { available, position }) => {
                if op.action == Action::Change(StockKind::Set) {
                    op.items.iter().for_each(|(product, _)| self.cx.backend.first_use.exists(product));
                }
                let names_no_units = matches!(op.action, Action::Change(StockKind::Delete | StockKind::Unfreeze));
                let shown = if names_no_units { SmallVec::new() } else { available };
                accepted_at(position, accepted("OK", &shown, position))
            }
            Ok(StockOutcome::Remembered(remembered)) => {
                change::replay(op.request.as_deref(), &remembered).and_then(|(position, reply)| accepted_at(position, reply))
            }
            Ok(StockOutcome::Values(values)) => {
                let mut values = values.into_iter().map(|value| value.map_or(Reply::Nil, Reply::Integer));
                Err(match self.shape {
                    Shape::One => values.next().unwrap_or(Reply::Nil),
                    _ => Reply::Array(values.collect()),
                })
            }
            Ok(StockOutcome::Told { line, position }) => {
                order::told(&line, position).and_then(|(position, reply)| accepted_at(position, reply))
            }
            Ok(StockOutcome::Stands(stands)) => order::stands(op, &stands).and_then(|(position, reply)| accepted_at(position, reply)),
            Ok(refusal) => Err(refused(op, &refusal)),
        };
        match outcome {
            Ok((confirmation, position, reply)) => confirmation.confirm(&self.cx.backend, self.arrived, position, self.ticket, reply),
            Err(reply) => self.ticket.complete(reply),
        }
    }
}

fn refused(op: &StockOp, refusal: &StockOutcome) -> Reply {
    let product = |item: usize| op.items.get(item).map_or_else(|| Id::from(""), |(product, _)| product.clone());
    match refusal {
        StockOutcome::Short { item, available } => {
            let mut reply = Encoder::array(3);
            reply.bulk(b"INSUFFICIENT").bulk(op.items.get(*item).map_or(b"", |(product, _)| product.as_bytes())).integer(*available);
            reply.done()
        }
        StockOutcome::Absent { .. } if op.action == Action::Change(StockKind::Delete) => outcome("NOTFOUND", []),
        StockOutcome::Absent { item } => Reply::error(format!("NOTFOUND no product '{}'", product(*item))),
        StockOutcome::Frozen { reason, .. } => Reply::error(format!("FROZEN {reason}")),
        StockOutcome::Corrupt { item } => Reply::error(format!(
            "FROZEN the key of product '{}' holds something that is not a number of units: repair it in Redis",
            product(*item)
        )),
        StockOutcome::Over { item, available } => {
            Reply::error(format!("ERR invalid quantity: product '{}' has {available} units, and may not pass {TOTAL_MAX}", product(*item)))
        }
        StockOutcome::Nowhere => order::nowhere(op),
        StockOutcome::Stuck { key } => {
            Reply::error(format!("FROZEN the key '{key}' holds what does not belong there: repair it in Redis; nothing was changed"))
        }
        StockOutcome::Values(_)
        | StockOutcome::Done { .. }
        | StockOutcome::Remembered(_)
        | StockOutcome::Moved
        | StockOutcome::Told { .. }
        | StockOutcome::Stands(_)
        | StockOutcome::Unknown => Reply::error("ERR internal error"),
    }
}

fn sync(call: &mut Call<'_>) -> Step {
    let products: Vec<Id> = call.args.ids("product").collect();
    if products.len() > limits::PRODUCTS_MAX {
        return Step::Reply(too_many_products());
    }
    if let Some(failure) = call.cx.backend.stock.closed() {
        return Step::Reply(failed(call.cx, failure));
    }
    let (answer, answered) = oneshot::channel();
    let (dry_run, arrived) = (call.args.has("dryrun"), call.arrived);
    let request = SyncRequest { products, dry_run, deadline: arrived + limits::SYNC_WITHIN, answer };
    if call.cx.backend.partition.syncs.try_send(request).is_err() {
        return Step::Reply(Reply::error("TRYAGAIN overloaded: too many STOCK.SYNCs are waiting; nothing was changed"));
    }
    Step::Wait(Box::pin(async move {
        match tokio::time::timeout_at((arrived + limits::SYNC_REPLY_WITHIN).into(), answered).await {
            Ok(Ok(Ok(drifts))) => Reply::Array(drifts.iter().map(difference).collect()),
            Ok(Ok(Err(why))) => Reply::error(format!("TRYAGAIN cannot compare now: {why}; nothing was changed")),
            _ if dry_run => Reply::error("TRYAGAIN Redis and Postgres were not compared in time; nothing was changed"),
            _ => Reply::error("INDOUBT STOCK.SYNC did not end in time: what it has corrected is in holdfast.drift; ask again"),
        }
    }))
}

fn difference(drift: &Drift) -> Reply {
    let maybe = |units: Option<i64>| units.map_or(Reply::Nil, Reply::Integer);
    Reply::map([
        ("product", Reply::text(drift.product.clone())),
        ("redis", maybe(drift.redis)),
        ("postgres", maybe(drift.postgres)),
        ("in_flight", Reply::Integer(drift.in_flight)),
        ("drift", Reply::Integer(drift.units())),
        ("action", Reply::text(drift.remedy.as_str())),
        ("measure", Reply::text(drift.measure.as_str())),
    ])
}

async fn info(cx: Rc<Context>, product: Id) -> Reply {
    let applied = *cx.backend.partition.applied.borrow();
    let info = match cx.backend.reads.stock_info(&product, applied).await {
        Ok(info) => info,
        Err(error) => return read::failed(&error),
    };
    let Some(available) = info.available else { return Reply::Nil };
    Reply::map([
        ("product", Reply::bulk(product.bytes().clone())),
        ("available", Reply::Integer(available)),
        ("held", Reply::Integer(info.held)),
        ("low", info.low.map_or(Reply::Nil, Reply::Integer)),
        ("position", Reply::text(info.position.to_string())),
        ("applied", Reply::text(applied.to_string())),
        ("lag_ms", Reply::Integer(info.lag_ms)),
        ("frozen", info.frozen.map_or(Reply::Nil, Reply::text)),
    ])
}
