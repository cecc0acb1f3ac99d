//! Saves changes that were answered out of a Redis that lost its data: they get new places in the ledger, and keep the old ones as origin.

mod known;

use std::collections::{BTreeSet, HashMap, HashSet};

use sqlx::{Connection, PgConnection};

pub use self::known::{HighestSerial, highest_serials, in_ledger, keep_serials, keep_these, known, pass_over_repeated};
use super::changes::{Changes, CouponLine, Lifecycle, NO_ITEM, Place, StockLine};
use super::coupon_shelf::CouponShelf;
use super::order_shelf::{self, Made, OrderShelf};
use super::{Error, apply, coupon_write, dead_letter, from_bigint, partition, to_bigint, write};
use crate::domain::Position;
use crate::domain::change::{Effect, Item, Operation, StockKind};
use crate::domain::quantity::TOTAL_MAX;
use crate::limits::ORDER_KEPT_MS;

/// Why a product is frozen that owes units.
const OWED: &str = "units that were sold before Redis lost its data are missing: see HOLDFAST.DEADLETTER LIST";

/// Why a change is owed.
const GONE: &str = "Postgres no longer has these units";
const REFUSED: &str = "Postgres refuses it for its data";

/// A change that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// `<instance>:<lane>:<counter>` of its batch; with its place there it is found again.
    pub op: String,
    /// The position that was answered.
    pub origin: Position,
    /// When, by Redis's clock, in Unix ms.
    pub at_ms: i64,
    pub operation: Operation,
}

/// By what a change is found: the op of its batch, and its place in there.
pub type Name = (String, u32);

impl Answered {
    /// Its name.
    pub fn name(&self) -> Name {
        (self.op.clone(), self.operation.k)
    }
}

/// What became of a run of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Written.
    pub saved: usize,
    /// Parked as dead letters: what they took is no longer there, what they are of an order cannot be made, or Postgres refuses their data.
    pub owed: usize,
    /// Had their effect already.
    pub known: usize,
}

/// Saves them in their order, in one transaction, under `epoch`, which must be the partition's. A change that is [`known`] is passed over, so
/// that a call whose outcome is not known is simply repeated; so is one of an order that is as was answered. What the stock or the coupon does
/// not permit is written all the same, and owed: nothing that was answered is hidden. So is an order's change that cannot be made; but nothing
/// of it is written, and the order stays as it is, until it is handed over again. `window_ms`: how long a REQUEST id is remembered.
pub async fn save(
    connection: &mut PgConnection,
    partition: u32,
    epoch: u64,
    window_ms: i64,
    answered: &[Answered],
) -> Result<Saved, Error> {
    // The parts that are to be tried, the next one last.
    let mut parts = vec![answered];
    let mut all = Saved::default();
    while let Some(part) = parts.pop() {
        let saved = match save_part(connection, partition, epoch, window_ms, part, false).await {
            // What Postgres refuses for its data is owed, once it stands alone.
            Err(Error::Data(_)) if part.len() > 1 => {
                let (first, second) = part.split_at(part.len() / 2);
                parts.extend([second, first]);
                continue;
            }
            Err(Error::Data(_)) => save_part(connection, partition, epoch, window_ms, part, true).await?,
            saved => saved?,
        };
        all.saved += saved.saved;
        all.owed += saved.owed;
        all.known += saved.known;
    }
    Ok(all)
}

/// `refused`: Postgres is known to refuse them for their data.
async fn save_part(
    connection: &mut PgConnection,
    partition: u32,
    epoch: u64,
    window_ms: i64,
    answered: &[Answered],
    refused: bool,
) -> Result<Saved, Error> {
    let mut transaction = connection.begin().await?;
    match save_in(&mut transaction, partition, epoch, window_ms, answered, refused).await {
        Ok(saved) => {
            transaction.commit().await?;
            Ok(saved)
        }
        Err(error) => {
            transaction.rollback().await?;
            Err(error)
        }
    }
}

async fn save_in(
    connection: &mut PgConnection,
    partition: u32,
    epoch: u64,
    window_ms: i64,
    answered: &[Answered],
    refused: bool,
) -> Result<Saved, Error> {
    let Some(row) = partition::lock(connection, partition).await?.filter(|row| row.epoch == epoch) else {
        return Err(taken_over(partition, epoch));
    };
    let known = known(connection, partition, window_ms, answered).await?;
    let (passed, new): (Vec<&Answered>, Vec<&Answered>) = answered.iter().partition(|one| known.contains(&one.name()));
    // Some of their users were given another serial since.
    let passed = passed.into_iter().map(|one| &one.operation);
    let mut shelf = Shelf::load(connection, partition, &new).await?;
    let told = new.iter().map(|one| (*one, shelf.told(one))).filter(|(_, told)| !matches!(told, Told::Already));
    let told: Vec<(&Answered, Told)> = told.collect();
    if told.is_empty() {
        coupon_write::keep_serials(connection, passed).await?;
        return Ok(Saved { known: answered.len(), ..Saved::default() });
    }
    let mut changes = Changes::default();
    let (mut owed, mut undone, mut made) = (Vec::new(), Vec::new(), Vec::new());
    let mut n = row.applied.n;
    for (one, told) in &told {
        let (operation, fits) = match told {
            Told::Moves { .. } if refused && order_shelf::of(one).is_some() => {
                undone.push((*one, REFUSED.to_owned()));
                continue;
            }
            Told::Moves { operation, fits } => (&**operation, *fits),
            Told::Undone(why) => {
                undone.push((*one, why.clone()));
                continue;
            }
            Told::Already => continue,
        };
        n += 1;
        made.push(operation);
        let remembered = operation.remembered.as_ref();
        let place = Place {
            epoch,
            n,
            op: &one.op,
            k: operation.k,
            request: remembered.map(|remembered| remembered.request.as_str()),
            digest: remembered.map(|remembered| remembered.digest.as_str()),
            at_ms: one.at_ms,
            origin: Some(one.origin),
        };
        let taken = match refused {
            false => shelf.take(place, operation, fits, &mut changes),
            true => Err(owe(place, operation, &mut changes)),
        };
        if let Err(why) = taken {
            owed.push((place, operation, why));
        }
    }
    let owing: BTreeSet<&str> = owed.iter().flat_map(|(_, operation, _)| operation.products()).collect();
    changes.frozen.extend(owing.into_iter().map(|product| (product, Some(OWED))));
    write::changes(connection, partition, &changes).await?;
    dead_letter::try_to_balance(connection, made.into_iter()).await?;
    park(connection, partition, &owed).await?;
    hand_over(connection, partition, &undone.iter().map(|(one, _)| (*one).clone()).collect::<Vec<_>>()).await?;
    owe_undone(connection, partition, &undone).await?;
    coupon_write::keep_serials(connection, passed.chain(owed.iter().map(|(_, operation, _)| *operation))).await?;
    settled(connection, answered).await?;
    if row.applied.epoch < epoch {
        apply::end_epochs(connection, partition, row.applied, epoch).await?;
    }
    partition::advance(connection, partition, Position::new(epoch, n), &format!("salvage:{epoch}"), None).await?;
    let owed = owed.len() + undone.len();
    Ok(Saved { saved: told.len() - owed, owed, known: answered.len() - told.len() })
}

/// Ends it: every epoch before `epoch` ended where Postgres is, and what a relay still holds of them is passed over. `give_up_inbox`: what other
/// programs changed counts as told, since Redis is filled with it. Errors with [`Error::Broken`] where another sidecar has taken over.
pub async fn seal(connection: &mut PgConnection, partition: u32, epoch: u64, give_up_inbox: bool) -> Result<(), Error> {
    let mut transaction = connection.begin().await?;
    let Some(row) = partition::lock(&mut transaction, partition).await?.filter(|row| row.epoch == epoch) else {
        return Err(taken_over(partition, epoch));
    };
    if row.applied.epoch < epoch {
        apply::end_epochs(&mut transaction, partition, Position::new(0, row.applied.n), epoch).await?;
        let applied = Position::new(epoch, row.applied.n);
        partition::advance(&mut transaction, partition, applied, &format!("salvage:{epoch}"), None).await?;
    }
    if give_up_inbox {
        partition::give_up_inbox(&mut transaction, partition).await?;
    }
    dead_letter::coupons_left_redis(&mut transaction, partition).await?;
    transaction.commit().await?;
    Ok(())
}

fn taken_over(partition: u32, epoch: u64) -> Error {
    Error::Broken(format!("partition {partition} is no longer under epoch {epoch}: another sidecar took it"))
}

/// What a change comes to by now.
enum Told {
    /// It moves what it says. Whether the stock permits that.
    Moves { operation: Box<Operation>, fits: bool },
    /// It is an order's, which is as was answered.
    Already,
    /// It is an order's, and cannot be made: why.
    Undone(String),
}

/// What Postgres has of the products, orders and coupons that are touched, as far as it has been worked through.
struct Shelf {
    /// The available units; `None` where it was deleted. Missing where there is no row.
    stock: HashMap<String, Option<i64>>,
    /// The products that have a row, deleted or not.
    rows: HashSet<String>,
    orders: OrderShelf,
    coupons: CouponShelf,
}

impl Shelf {
    async fn load(connection: &mut PgConnection, partition: u32, answered: &[&Answered]) -> Result<Self, Error> {
        let orders = OrderShelf::load(connection, answered).await?;
        let products: BTreeSet<&str> = answered.iter().flat_map(|one| one.operation.products()).chain(orders.products()).collect();
        let stock: Vec<(String, i64, bool)> = sqlx::query_as(
            "SELECT product_id, available, deleted_at IS NOT NULL FROM holdfast.stock WHERE product_id = ANY($1) ORDER BY product_id FOR UPDATE",
        )
        .bind(products.into_iter().collect::<Vec<_>>())
        .fetch_all(&mut *connection)
        .await?;
        Ok(Self {
            rows: stock.iter().map(|(product, ..)| product.clone()).collect(),
            stock: stock.into_iter().map(|(product, available, deleted)| (product, (!deleted).then_some(available))).collect(),
            coupons: CouponShelf::load(connection, partition, answered).await?,
            orders,
        })
    }

    /// What it comes to; the differences of a SET and a DELETE, which a copy does not know, included.
    fn told(&mut self, answered: &Answered) -> Told {
        let mut told = answered.operation.clone();
        let Effect::Stock { kind, items, detail } = &mut told.effect else { return Told::Moves { operation: Box::new(told), fits: true } };
        let made = detail.order.as_deref_mut().map_or(Made::Now, |order| self.orders.make(answered, *kind, items, order));
        match made {
            Made::Now => {}
            Made::Before => return Told::Already,
            Made::TooLate => {
                let order = order_shelf::of(answered).unwrap_or_default();
                return Told::Undone(format!("order '{order}' cannot become that any more"));
            }
        }
        let before = |item: &Item| self.stock.get(&item.product).copied().flatten();
        let replaces = matches!(kind, StockKind::Set | StockKind::Delete);
        let fits = |item: &Item| item.delta == 0 || before(item).is_some_and(|before| (0..=TOTAL_MAX).contains(&(before + item.delta)));
        let fits = replaces || items.iter().all(fits);
        if let (false, StockKind::Reserve | StockKind::Sell, Some(order)) = (fits, *kind, &detail.order) {
            self.orders.forget(&order.order);
            return Told::Undone(GONE.to_owned());
        }
        for item in items {
            let before = self.stock.get(&item.product).copied().flatten();
            let after = match kind {
                StockKind::Set => Some(item.available),
                StockKind::Delete => None,
                _ if fits => before.map(|before| before + item.delta),
                _ => before,
            };
            if replaces {
                item.delta = after.unwrap_or(0) - before.unwrap_or(0);
            }
            // A copy without a REQUEST does not know it.
            if item.available == 0 && answered.operation.remembered.is_none() {
                item.available = after.unwrap_or(0);
            }
            self.stock.insert(item.product.clone(), after);
        }
        Told::Moves { operation: Box::new(told), fits }
    }

    /// Adds what the operation changes. Errors with why it is owed instead; then only its ledger rows are added.
    fn take<'a>(&mut self, place: Place<'a>, operation: &'a Operation, fits: bool, changes: &mut Changes<'a>) -> Result<(), String> {
        match &operation.effect {
            Effect::Stock { kind, items, detail } => {
                let order = detail.order.as_deref();
                if let Some(order) = order {
                    changes.orders.add(place, *kind, items, order);
                }
                if items.is_empty() {
                    changes.stock_lines.push(StockLine { place, i: 0, kind: *kind, item: &NO_ITEM, pg_delta: 0, order, runs: None });
                }
                for (i, item) in items.iter().enumerate() {
                    let line = StockLine { place, i, kind: *kind, item, pg_delta: item.delta, order, runs: None };
                    let held = line.held_delta();
                    if held != 0 && self.rows.contains(&item.product) {
                        changes.stock.entry(&item.product).or_default().held += held;
                    }
                    changes.stock_lines.push(line);
                    // What was deleted and never came here has nothing to move.
                    let is_here = *kind != StockKind::Delete || self.rows.contains(&item.product);
                    if *kind == StockKind::Set {
                        self.rows.insert(item.product.clone());
                    }
                    if fits && is_here && (item.delta != 0 || order.is_none()) {
                        let moved = changes.stock.entry(&item.product).or_default();
                        moved.delta += item.delta;
                        match kind {
                            StockKind::Set => {
                                moved.created = true;
                                moved.lifecycle = Some(Lifecycle::Set);
                                moved.low = detail.low.map(Some).or(moved.low);
                            }
                            StockKind::Delete => {
                                moved.lifecycle = Some(Lifecycle::Deleted(place.at_ms));
                                moved.low = Some(None);
                            }
                            _ => {}
                        }
                    }
                }
                if fits { Ok(()) } else { Err(GONE.to_owned()) }
            }
            Effect::Coupon { coupon, change } => {
                let taken = self.coupons.take(coupon, change, place.origin.unwrap_or_default());
                let line = CouponLine::new(place, coupon, change);
                changes.coupon_lines.push(CouponLine { total_delta: taken.as_ref().copied().unwrap_or(line.total_delta), ..line });
                taken.map(|_| changes.move_coupon(coupon, change, place.at_ms))
            }
        }
    }
}

/// Adds only the ledger rows of an operation that Postgres refuses. Returns why it is owed.
fn owe<'a>(place: Place<'a>, operation: &'a Operation, changes: &mut Changes<'a>) -> String {
    match &operation.effect {
        Effect::Stock { kind, items, .. } => {
            let line = |(i, item)| StockLine { place, i, kind: *kind, item, pg_delta: item.delta, order: None, runs: None };
            changes.stock_lines.extend(items.iter().enumerate().map(line));
        }
        Effect::Coupon { coupon, change } => changes.coupon_lines.push(CouponLine::new(place, coupon, change)),
    }
    REFUSED.to_owned()
}

/// Parks changes of which nothing is written, each with why, and freezes their products.
async fn owe_undone(connection: &mut PgConnection, partition: u32, undone: &[(&Answered, String)]) -> Result<(), Error> {
    let owed = undone.iter().map(|(one, why)| {
        let (Position { epoch, n }, k) = (one.origin, one.operation.k);
        (Place { epoch, n, op: &one.op, k, request: None, digest: None, at_ms: one.at_ms, origin: None }, &one.operation, why.clone())
    });
    let owed: Vec<_> = owed.collect();
    park(connection, partition, &owed).await?;
    let frozen = undone.iter().flat_map(|(one, _)| one.operation.products()).map(|product| (product, Some(OWED))).collect();
    write::try_to_freeze(connection, frozen).await
}

/// Parks what is owed: Redis no longer has moved by it.
async fn park(connection: &mut PgConnection, partition: u32, owed: &[(Place<'_>, &Operation, String)]) -> Result<(), Error> {
    let nothing: [Item; 0] = [];
    for (place, operation, why) in owed {
        let items = if let Effect::Stock { items, .. } = &operation.effect { items.as_slice() } else { nothing.as_slice() };
        let line = operation.to_string();
        let kind = line.split(' ').nth(1).unwrap_or_default();
        let lines: Vec<(i32, Option<&str>, i64)> = match items {
            [] => vec![(0, None, 0)],
            items => (0..).zip(items).map(|(i, item)| (i, Some(item.product.as_str()), item.delta)).collect(),
        };
        for (i, product, delta) in lines {
            sqlx::query(
                "INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, product_id, kind, delta, in_redis, reason, line) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, false, $10, $11)",
            )
            .bind(partition::id(partition))
            .bind(to_bigint(place.epoch))
            .bind(to_bigint(place.n))
            .bind(i)
            .bind(place.op)
            .bind(write::small(place.k))
            .bind(product)
            .bind(kind)
            .bind(delta)
            .bind(why)
            .bind(&line)
            .execute(&mut *connection)
            .await?;
        }
    }
    Ok(())
}

/// How many of these batches are in the ledger.
pub async fn known_ops(connection: &mut PgConnection, ops: &[String]) -> Result<usize, Error> {
    let known: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM unnest($1::text[]) AS a (op) WHERE EXISTS (SELECT 1 FROM holdfast.stock_ledger l WHERE l.op = a.op) \
         OR EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.op = a.op)",
    )
    .bind(ops)
    .fetch_one(connection)
    .await?;
    Ok(usize::try_from(known).unwrap_or_default())
}

/// What became of changes at places that no longer are: by epoch, those that have another place in the ledger, or were taken off again, and
/// those that were handed over and wait; each in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    pub saved: HashMap<u64, Vec<u64>>,
    pub waiting: HashMap<u64, Vec<u64>>,
}

/// Reads them.
pub async fn origins(connection: &mut PgConnection, partition: u32) -> Result<Origins, Error> {
    let rows: Vec<(i64, i64, bool)> = sqlx::query_as(
        "SELECT origin_epoch, origin_n, true FROM holdfast.stock_ledger WHERE partition = $1 AND origin_epoch IS NOT NULL \
         UNION SELECT origin_epoch, origin_n, true FROM holdfast.coupon_ledger WHERE partition = $1 AND origin_epoch IS NOT NULL \
         UNION SELECT origin_epoch, origin_n, done FROM holdfast.salvage WHERE partition = $1 ORDER BY 1, 2",
    )
    .bind(partition::id(partition))
    .fetch_all(connection)
    .await?;
    let mut origins = Origins::default();
    for (epoch, n, saved) in rows {
        let of = if saved { &mut origins.saved } else { &mut origins.waiting };
        of.entry(from_bigint(epoch)).or_default().push(from_bigint(n));
    }
    Ok(origins)
}

/// Something that changes whenever [`Origins`] may have.
pub async fn origins_version(connection: &mut PgConnection, partition: u32) -> Result<(i64, i64), Error> {
    let version = sqlx::query_as("SELECT count(*), count(*) FILTER (WHERE done) FROM holdfast.salvage WHERE partition = $1");
    Ok(version.bind(partition::id(partition)).fetch_one(connection).await?)
}

/// Hands changes over to whoever sells. One that was handed over before is passed over.
pub async fn hand_over(connection: &mut PgConnection, partition: u32, answered: &[Answered]) -> Result<(), Error> {
    sqlx::query(
        "INSERT INTO holdfast.salvage (partition, op, k, origin_epoch, origin_n, line, at_ms) \
         SELECT $1, * FROM unnest($2::text[], $3::int[], $4::bigint[], $5::bigint[], $6::text[], $7::bigint[]) ON CONFLICT DO NOTHING",
    )
    .bind(partition::id(partition))
    .bind(answered.iter().map(|one| one.op.as_str()).collect::<Vec<_>>())
    .bind(answered.iter().map(|one| write::small(one.operation.k)).collect::<Vec<_>>())
    .bind(answered.iter().map(|one| to_bigint(one.origin.epoch)).collect::<Vec<_>>())
    .bind(answered.iter().map(|one| to_bigint(one.origin.n)).collect::<Vec<_>>())
    .bind(answered.iter().map(|one| one.operation.to_string()).collect::<Vec<_>>())
    .bind(answered.iter().map(|one| one.at_ms).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Whether anything was handed over that nobody has taken up.
pub async fn is_anything_handed_over(connection: &mut PgConnection) -> Result<bool, Error> {
    Ok(sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM holdfast.salvage WHERE NOT done)").fetch_one(connection).await?)
}

/// Whether a change is owed of which nothing is written: it was handed over, and nobody could make it.
pub(super) async fn is_undone(connection: &mut PgConnection, op: &str, k: i32) -> Result<bool, Error> {
    let undone = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM holdfast.salvage WHERE op = $1 AND k = $2) \
         AND NOT EXISTS (SELECT 1 FROM holdfast.stock_ledger l WHERE l.op = $1 AND l.k = $2) \
         AND NOT EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.op = $1 AND l.k = $2)",
    );
    Ok(undone.bind(op).bind(k).fetch_one(connection).await?)
}

/// Hands such a change over once more.
pub(super) async fn hand_over_again(connection: &mut PgConnection, op: &str, k: i32) -> Result<(), Error> {
    sqlx::query("UPDATE holdfast.salvage SET done = false WHERE op = $1 AND k = $2").bind(op).bind(k).execute(connection).await?;
    Ok(())
}

/// The key of the advisory lock on what was handed over; the partition is its other half.
const HANDED_OVER_LOCK: i32 = 0x686f_6c64;

/// Takes the right to take up what was handed over, until [`unlock_handed_over`] or the end of the session. `false` where another has it.
pub async fn lock_handed_over(connection: &mut PgConnection, partition: u32) -> Result<bool, Error> {
    let locked = sqlx::query_scalar("SELECT pg_try_advisory_lock($1, $2)").bind(HANDED_OVER_LOCK).bind(partition::id(partition));
    Ok(locked.fetch_one(connection).await?)
}

/// Gives it back.
pub async fn unlock_handed_over(connection: &mut PgConnection, partition: u32) -> Result<(), Error> {
    let unlocked = sqlx::query("SELECT pg_advisory_unlock($1, $2)").bind(HANDED_OVER_LOCK).bind(partition::id(partition));
    unlocked.execute(connection).await?;
    Ok(())
}

/// Which coupons are left out.
#[derive(Clone, Copy, Debug)]
pub enum Without<'a> {
    These(&'a [String]),
    AllCoupons,
}

/// What was handed over and nobody has taken up, in the order in which it took effect.
pub async fn handed_over(connection: &mut PgConnection, partition: u32, without: Without<'_>, max: i64) -> Result<Vec<Answered>, Error> {
    let (these, all): (&[String], bool) = match without {
        Without::These(these) => (these, false),
        Without::AllCoupons => (&[], true),
    };
    let rows: Vec<(String, i64, i64, String, i64)> = sqlx::query_as(
        "SELECT op, origin_epoch, origin_n, line, at_ms FROM holdfast.salvage WHERE partition = $1 AND NOT done \
         AND NOT (split_part(line, ' ', 2) LIKE 'coupon.%' AND ($4 OR substring(line FROM ' coupon=([^ ]+) ') = ANY($2))) \
         ORDER BY origin_epoch, origin_n LIMIT $3",
    )
    .bind(partition::id(partition))
    .bind(these)
    .bind(max)
    .bind(all)
    .fetch_all(connection)
    .await?;
    let answered = |(op, epoch, n, line, at_ms): (String, i64, i64, String, i64)| {
        let operation = Operation::decode(&line).map_err(|error| Error::Unfit(format!("holdfast.salvage, op {op}: {error}")))?;
        Ok(Answered { op, origin: Position::new(from_bigint(epoch), from_bigint(n)), at_ms, operation })
    };
    rows.into_iter().map(answered).collect()
}

/// By which of the changes that were handed over and wait the orders end that these are about: a cancellation or an expiry behind them, and in
/// front of what begins another order of the same id: not what its client asked for again in a Redis that did not know of it.
pub async fn ends(connection: &mut PgConnection, partition: u32, answered: &[Answered]) -> Result<HashMap<Name, StockKind>, Error> {
    let ends = |one: &Answered| matches!(one.operation.effect, Effect::Stock { kind: StockKind::Cancel | StockKind::Expire, .. });
    let of: Vec<(&Answered, &str)> =
        answered.iter().filter(|one| !ends(one)).filter_map(|one| Some((one, order_shelf::of(one)?))).collect();
    if of.is_empty() {
        return Ok(HashMap::new());
    }
    let rows: Vec<(String, String, i64, i64, i64)> = sqlx::query_as(
        "SELECT substring(line FROM ' order=([^ ]+) '), split_part(line, ' ', 2), origin_epoch, origin_n, at_ms FROM holdfast.salvage \
         WHERE partition = $1 AND NOT done AND split_part(line, ' ', 2) IN ('cancel', 'expire', 'reserve', 'sell') \
         AND substring(line FROM ' order=([^ ]+) ') = ANY($2) ORDER BY origin_epoch, origin_n",
    )
    .bind(partition::id(partition))
    .bind(of.iter().map(|(_, order)| *order).collect::<Vec<_>>())
    .fetch_all(connection)
    .await?;
    let end = |(one, order): (&Answered, &str)| {
        for (_, kind, epoch, n, at_ms) in rows.iter().filter(|(of, ..)| of == order) {
            let at = Position::new(from_bigint(*epoch), from_bigint(*n));
            let is_end = matches!(kind.as_str(), "cancel" | "expire");
            if at > one.origin && is_end {
                return Some((one.name(), StockKind::parse(kind)?));
            }
            let is_another = at.epoch == one.origin.epoch || at_ms.saturating_sub(one.at_ms) > ORDER_KEPT_MS;
            if at > one.origin && is_another {
                return None;
            }
        }
        None
    };
    Ok(of.into_iter().filter_map(end).collect())
}

/// Notes that these have been settled: they are in the ledger.
pub async fn settled(connection: &mut PgConnection, answered: &[Answered]) -> Result<(), Error> {
    sqlx::query(
        "UPDATE holdfast.salvage s SET done = true FROM unnest($1::text[], $2::int[]) AS a (op, k) WHERE s.op = a.op AND s.k = a.k",
    )
    .bind(answered.iter().map(|one| one.op.as_str()).collect::<Vec<_>>())
    .bind(answered.iter().map(|one| write::small(one.operation.k)).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// Notes that a change which was handed over has been taken up, or why it is owed: then its products are frozen.
pub async fn taken_up(connection: &mut PgConnection, partition: u32, answered: &Answered, owed: Option<&str>) -> Result<(), Error> {
    let mut transaction = connection.begin().await?;
    if let Some(why) = owed {
        owe_undone(&mut transaction, partition, &[(answered, why.to_owned())]).await?;
    }
    sqlx::query("UPDATE holdfast.salvage SET done = true WHERE op = $1 AND k = $2")
        .bind(&answered.op)
        .bind(write::small(answered.operation.k))
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(())
}

/// Whether this ends a reservation that could not be done again: what it took and what comes back are owed both, and balance.
pub async fn is_reservation_owed(connection: &mut PgConnection, operation: &Operation) -> Result<bool, Error> {
    let Effect::Stock { kind: StockKind::Expire, detail, .. } = &operation.effect else { return Ok(false) };
    let owed = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM holdfast.dead_letter WHERE kind = 'reserve' AND NOT in_redis \
         AND substring(line FROM ' order=([^ ]+) ') = $1)",
    );
    Ok(owed.bind(detail.order.as_deref().map(|of| &of.order)).fetch_one(connection).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Settled;
    use crate::ledger::testing::{database, execute, number_of, rows};

    pub const WINDOW_MS: i64 = 600_000;

    /// What was answered under epoch 1.
    pub fn answered(op: &str, n: u64, line: &str) -> Answered {
        Answered { op: op.into(), origin: Position::new(1, n), at_ms: 1_700_000_000_000, operation: Operation::decode(line).unwrap() }
    }

    #[tokio::test]
    async fn what_was_answered_is_saved_once_with_its_origin_and_what_is_gone_is_owed() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let first = [
            answered("i:stock:1", 1, "0 set low=3 new=1 | a 0 10"),
            answered("i:stock:2", 2, "0 decr request=r digest=d | a -3 7"),
            answered("i:coupon:1", 3, "0 coupon.create coupon=c total=1 peruser=1 |"),
            answered("i:coupon:1", 4, "1 coupon.issue coupon=c user=u serial=1 remaining=0 |"),
        ];
        let all = Saved { saved: 4, owed: 0, known: 0 };
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &first).await.unwrap(), all);
        let again = Saved { saved: 0, owed: 0, known: 4 };
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &first).await.unwrap(), again);
        let more = [
            first[1].clone(),
            answered("j:stock:1", 9, "0 decr | a -8 0"),
            answered("j:stock:1", 10, "1 decr | a -6 0 ghost -1 0"),
            answered("j:stock:1", 11, "2 incr | a 1 0"),
            answered("j:coupon:1", 12, "0 coupon.issue coupon=c user=v serial=1 remaining=0 |"),
            answered("j:coupon:1", 13, "1 coupon.create coupon=c total=9 peruser=1 |"),
            answered("j:stock:2", 14, "0 delete | a 0 0"),
            answered("j:stock:2", 15, "1 set new=1 | a 0 4"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &more).await.unwrap(), Saved { saved: 3, owed: 4, known: 1 });
        type Line = (i64, i64, String, i64, i64, Option<String>);
        let lines: Vec<Line> = rows(
            connection,
            "SELECT n, origin_n, product_id, pg_delta, available_after, request_id FROM holdfast.stock_ledger ORDER BY n, i",
        )
        .await;
        let line = |n, origin, product: &str, delta, after| (n, origin, product.to_owned(), delta, after, None);
        assert_eq!(
            lines,
            [
                line(1, 1, "a", 10, 10),
                (2, 2, "a".to_owned(), -3, 7, Some("r".to_owned())),
                line(5, 9, "a", -8, 7),
                line(6, 10, "a", -6, 7),
                line(6, 10, "ghost", -1, 0),
                line(7, 11, "a", 1, 8),
                line(10, 14, "a", -8, 0),
                line(11, 15, "a", 4, 4),
            ]
        );
        let stock: Vec<(i64, Option<i64>, bool)> =
            rows(connection, "SELECT available, low, frozen LIKE 'units that were sold%' FROM holdfast.stock").await;
        assert_eq!(stock, [(4, None, true)]);
        let owed: Vec<(i64, Option<String>, String, i64, bool)> =
            rows(connection, "SELECT n, product_id, kind, delta, in_redis FROM holdfast.dead_letter ORDER BY n, i").await;
        let product = |name: &str| Some(name.to_owned());
        assert_eq!(
            owed,
            [
                (5, product("a"), "decr".to_owned(), -8, false),
                (6, product("a"), "decr".to_owned(), -6, false),
                (6, product("ghost"), "decr".to_owned(), -1, false),
                (8, None, "coupon.issue".to_owned(), 0, false),
                (9, None, "coupon.create".to_owned(), 0, false),
            ]
        );
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.coupon_issue").await, 1);
        let row = partition::load(connection, 0).await.unwrap();
        assert_eq!((row.applied, row.last_op.as_str()), (Position::new(1, 11), "salvage:1"));
        assert_eq!(origins(connection, 0).await.unwrap().saved[&1], [1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15]);
        assert!(matches!(save(connection, 0, 7, WINDOW_MS, &more).await, Err(Error::Broken(_))), "another sidecar took the partition");
    }

    #[tokio::test]
    async fn what_cannot_be_made_of_an_order_is_owed_as_a_whole() {
        let mut database = database().await;
        let connection = &mut database.connection;
        save(connection, 0, 1, WINDOW_MS, &[answered("i:stock:1", 1, "0 set | a 10 10"), answered("i:stock:1", 2, "1 set | b 10 10")])
            .await
            .unwrap();
        execute(connection, "ALTER TABLE holdfast.stock ADD CONSTRAINT low CHECK (available > 8 OR product_id = 'b')").await;
        let orders = [
            answered("i:stock:2", 3, "0 reserve order=refused expires=9 | a -3 7"),
            answered("i:stock:2", 4, "1 reserve order=gone expires=9 | a -1 9 b -11 0"),
            answered("i:stock:2", 5, "2 extend order=gone expires=19 from=held units=1,11 | a 0 9 b 0 0"),
            answered("i:stock:2", 6, "3 reserve order=there expires=9 | b -1 9"),
            answered("i:stock:2", 7, "4 cancel order=gone from=held units=1,11 | a 1 10 b 11 10"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &orders).await.unwrap(), Saved { saved: 2, owed: 3, known: 0 });
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &orders).await.unwrap(), Saved { saved: 0, owed: 0, known: 5 });
        let stock = "SELECT available, held, frozen IS NOT NULL FROM holdfast.stock ORDER BY product_id";
        assert_eq!(rows::<(i64, i64, bool)>(connection, stock).await, [(10, 0, true), (9, 1, true)]);
        let states = "SELECT order_id, state FROM holdfast.stock_order ORDER BY order_id";
        let expected = [("gone", "cancelled"), ("there", "held")].map(|(order, state)| (order.to_owned(), state.to_owned()));
        assert_eq!(rows::<(String, String)>(connection, states).await, expected);
        let owed = "SELECT kind, product_id, delta, id FROM holdfast.dead_letter ORDER BY n, i";
        let letters: Vec<(String, String, i64, i64)> = rows(connection, owed).await;
        let shown: Vec<_> = letters.iter().map(|(kind, product, delta, _)| (kind.as_str(), product.as_str(), *delta)).collect();
        assert_eq!(shown, [("reserve", "a", -3), ("reserve", "a", -1), ("reserve", "b", -11), ("extend", "a", 0), ("extend", "b", 0)]);
        let summed = "SELECT sum(pg_delta)::bigint FROM holdfast.stock_ledger";
        assert_eq!(number_of(connection, summed).await, 19, "the ledger explains it");
        // Each is handed over again, or given up, with all of its products.
        let settled = dead_letter::retry(connection, letters[1].3).await.unwrap();
        assert!(matches!(&settled, Settled::Failed(why) if why.contains("frozen")), "{settled:?}");
        // What not even this row can be told is owed all the same.
        execute(
            connection,
            "ALTER TABLE holdfast.stock DROP CONSTRAINT low; UPDATE holdfast.stock SET frozen = NULL;
             ALTER TABLE holdfast.stock ADD CONSTRAINT none CHECK (product_id = 'b') NOT VALID",
        )
        .await;
        let stuck = [
            answered("i:stock:4", 8, "0 reserve order=stuck expires=9 | a -11 0"),
            answered("i:stock:4", 9, "1 reserve order=more expires=9 | b -11 0"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &stuck).await.unwrap(), Saved { saved: 0, owed: 2, known: 0 });
        assert_eq!(rows::<(i64, i64, bool)>(connection, stock).await, [(10, 0, false), (9, 1, true)]);
        execute(connection, "ALTER TABLE holdfast.stock DROP CONSTRAINT none; UPDATE holdfast.stock SET frozen = NULL").await;
        for (letter, settled) in [(1, Settled::Done), (2, Settled::Unknown)] {
            assert_eq!(dead_letter::retry(connection, letters[letter].3).await.unwrap(), settled);
        }
        for (letter, settled) in [(4, Settled::Done), (3, Settled::Unknown)] {
            assert_eq!(dead_letter::discard(connection, letters[letter].3).await.unwrap(), settled);
        }
        assert_eq!(handed_over(connection, 0, Without::These(&[]), 9).await.unwrap(), orders[1..2]);
        assert_eq!(number_of(connection, summed).await, 19);
        assert_eq!(number_of(connection, "SELECT count(*) FROM holdfast.inbox").await, 0);
    }

    #[tokio::test]
    async fn what_an_order_gives_back_in_a_rebuild_balances_with_what_postgres_never_gave() {
        let mut database = database().await;
        let connection = &mut database.connection;
        save(connection, 0, 1, WINDOW_MS, &[answered("i:stock:1", 1, "0 set | a 10 10"), answered("i:stock:1", 2, "1 set | b 10 10")])
            .await
            .unwrap();
        let begun = [answered("i:stock:2", 3, "0 sell order=o | a -3 7"), answered("i:stock:2", 4, "1 sell order=p | b -3 7")];
        save(connection, 0, 1, WINDOW_MS, &begun).await.unwrap();
        // As if the relay had parked what both began with, and nothing of b were taken any more.
        execute(
            connection,
            "SET holdfast.writer = 'holdfast'; UPDATE holdfast.stock SET available = 10; RESET holdfast.writer;
             ALTER TABLE holdfast.stock ADD CONSTRAINT refused CHECK (product_id <> 'b' OR available = 10);
             INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, product_id, kind, delta, in_redis, reason, line)
             SELECT partition, epoch, n, i, op, k, product_id, kind, pg_delta, true, 'r', '0 sell order=' || order_id || ' | ' || product_id || ' -3 7'
             FROM holdfast.stock_ledger WHERE kind = 'sell'",
        )
        .await;
        let ended = [
            answered("i:stock:3", 5, "0 cancel order=o from=confirmed units=3 | a 3 10"),
            answered("i:stock:3", 6, "1 cancel order=p from=confirmed units=3 | b 3 10"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &ended).await.unwrap(), Saved { saved: 1, owed: 1, known: 0 });
        let stock: Vec<(i64,)> = rows(connection, "SELECT available FROM holdfast.stock ORDER BY product_id").await;
        assert_eq!(stock, [(10,), (10,)]);
        let owed = "SELECT kind, product_id, in_redis, id FROM holdfast.dead_letter ORDER BY id";
        let letters: Vec<(String, String, bool, i64)> = rows(connection, owed).await;
        let shown: Vec<_> = letters.iter().map(|(kind, product, in_redis, _)| (kind.as_str(), product.as_str(), *in_redis)).collect();
        assert_eq!(shown, [("sell", "b", true), ("cancel", "b", false)], "that order is not over");
        let held = dead_letter::discard(connection, letters[0].3).await.unwrap();
        assert!(matches!(&held, Settled::Failed(why) if why.contains("STOCK.CANCEL")), "{held:?}");
    }

    #[tokio::test]
    async fn a_late_change_of_an_order_goes_by_what_the_order_has_become() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let start = |k: u64, order: &str| answered("i:stock:1", 2 + k, &format!("{k} reserve order={order} expires=9 | a -3 0"));
        let of = |n: u64, kind: &str, order: &str, delta: i64| {
            answered("j:stock:1", n, &format!("{n} {kind} order={order} from=held units=3 | a {delta} 0"))
        };
        let mut first = vec![answered("i:stock:1", 1, "100 set | a 100 100")];
        first.extend(["gone", "expired", "paid", "kept", "held", "again"].into_iter().zip(1..).map(|(order, k)| start(k, order)));
        first.extend([of(31, "cancel", "gone", 3), of(32, "expire", "expired", 3), of(33, "confirm", "paid", 0)]);
        first.push(answered("j:stock:1", 34, "34 cancel order=never |"));
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &first).await.unwrap(), Saved { saved: 11, owed: 0, known: 0 });
        let units = "SELECT available || ' ' || held FROM holdfast.stock";
        assert_eq!(rows::<(String,)>(connection, units).await, [("88 9".to_owned(),)]);
        // All of these were answered in front of those.
        let late = [
            of(21, "cancel", "gone", 3),
            of(22, "expire", "gone", 3),
            of(23, "cancel", "expired", 3),
            answered("j:stock:2", 24, "0 reserve order=again expires=9 | a -3 0"),
            answered("j:stock:2", 25, "1 sell order=paid | a -3 0"),
            answered("j:stock:2", 26, "2 reserve order=never expires=9 | a -3 0"),
            answered("j:stock:2", 27, "3 expire order=paid from=held units=3 | a 3 0"),
            answered("j:stock:2", 28, "4 expire order=nowhere from=held units=3 | a 3 0"),
            Answered { origin: Position::default(), ..answered("h:stock:1", 0, "0 expire order=held from=held units=3 | a 3 0") },
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &late).await.unwrap(), Saved { saved: 0, owed: 0, known: 9 });
        assert_eq!(rows::<(String,)>(connection, units).await, [("88 9".to_owned(),)]);
        // Paid since: it was not held any more. More, or less, than is held of it: what it has. And what was not there yet, and now is.
        let late = [
            of(51, "cancel", "paid", 3),
            answered("j:stock:2", 52, "5 cancel order=kept from=held units=5 | a 5 0"),
            answered("j:stock:2", 53, "6 cancel order=held |"),
            answered("j:stock:2", 54, "7 cancel order=nowhere from=held units=3 | a 3 0"),
            answered("j:stock:2", 55, "8 reserve order=new expires=9 | a -3 0"),
            answered("j:stock:2", 56, "9 confirm order=new from=held units=3 | a 0 0"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &late).await.unwrap(), Saved { saved: 6, owed: 0, known: 0 });
        assert_eq!(rows::<(String,)>(connection, units).await, [("94 3".to_owned(),)]);
        let late = [
            of(61, "confirm", "gone", 0),
            of(62, "confirm", "expired", 0),
            answered("j:stock:2", 63, "10 extend order=expired expires=99 from=held units=3 | a 0 0"),
            answered("j:stock:2", 64, "11 confirm order=lost from=held units=3 | a 0 0"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &late).await.unwrap(), Saved { saved: 0, owed: 4, known: 0 });
        assert_eq!(rows::<(String,)>(connection, units).await, [("94 3".to_owned(),)]);
        let owed = "SELECT kind, delta, reason LIKE 'order ''%'' cannot become that any more' FROM holdfast.dead_letter ORDER BY n";
        let expected = ["confirm", "confirm", "extend", "confirm"].map(|kind| (kind.to_owned(), 0, true));
        assert_eq!(rows::<(String, i64, bool)>(connection, owed).await, expected);
        let orders: Vec<(String, String)> = rows(connection, "SELECT order_id, state FROM holdfast.stock_order ORDER BY order_id").await;
        let expected = [
            ("again", "held"),
            ("expired", "expired"),
            ("gone", "cancelled"),
            ("held", "cancelled"),
            ("kept", "cancelled"),
            ("never", "cancelled"),
            ("new", "confirmed"),
            ("nowhere", "cancelled"),
            ("paid", "cancelled"),
        ];
        assert_eq!(orders, expected.map(|(order, state)| (order.to_owned(), state.to_owned())));
        let sums = "SELECT sum(pg_delta)::bigint || ' ' || sum(held_delta)::bigint FROM holdfast.stock_ledger";
        assert_eq!(rows::<(String,)>(connection, sums).await, [("94 3".to_owned(),)], "the ledger explains it");
    }

    #[tokio::test]
    async fn an_order_is_extended_by_the_newest_and_begun_anew_once_it_is_forgotten() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let extend =
            |n: u64, expires: i64| answered("i:stock:1", n, &format!("{n} extend order=o expires={expires} from=held units=3 | a 0 0"));
        let first = [
            answered("i:stock:1", 1, "1 set | a 100 100"),
            answered("i:stock:1", 2, "2 reserve order=o expires=9 | a -3 0"),
            extend(9, 99),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &first).await.unwrap(), Saved { saved: 3, owed: 0, known: 0 });
        let both = [extend(5, 55), extend(12, 44)];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &both).await.unwrap(), Saved { saved: 1, owed: 0, known: 1 });
        assert_eq!(number_of(connection, "SELECT expires_ms FROM holdfast.stock_order").await, 44);
        let start_at = |n: u64, at_ms: i64| Answered { at_ms, ..answered("i:stock:1", n, &format!("{n} sell order=o | a -5 0")) };
        let kept_ms = crate::limits::ORDER_KEPT_MS;
        // Of an order of this id that could not begin, and not of the one before.
        let after = |n: u64, kind: &str| Answered {
            at_ms: 1_700_000_000_000 + kept_ms + 2,
            ..answered("j:stock:1", n, &format!("{n} {kind} order=o from=held units=200 | a 0 0"))
        };
        execute(connection, "UPDATE holdfast.stock_order SET state = 'confirmed'").await;
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &[after(13, "confirm")]).await.unwrap(), Saved { saved: 0, owed: 1, known: 0 });
        execute(connection, "UPDATE holdfast.stock_order SET state = 'held'").await;
        let all = [
            start_at(20, 1_700_000_000_000 + kept_ms + 1),
            answered("i:stock:1", 21, "21 cancel order=o from=held units=3 | a 3 0"),
            start_at(22, 1_700_000_000_000 + kept_ms),
            start_at(23, 1_700_000_000_000 + kept_ms + 1),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &all).await.unwrap(), Saved { saved: 2, owed: 0, known: 2 });
        let orders: Vec<(String, i64)> = rows(connection, "SELECT state, units[1] FROM holdfast.stock_order ORDER BY n").await;
        assert_eq!(orders, [("cancelled".into(), 3), ("confirmed".into(), 5)]);
        assert_eq!(number_of(connection, "SELECT available FROM holdfast.stock").await, 95);
    }

    #[tokio::test]
    async fn a_redemption_that_came_later_is_not_taken_back_by_what_is_saved() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let first = [
            answered("i:coupon:1", 1, "0 coupon.create coupon=c total=9 peruser=1 |"),
            answered("i:coupon:1", 2, "1 coupon.issue coupon=c user=u serial=1 remaining=8 |"),
            answered("i:coupon:1", 3, "2 coupon.issue coupon=c user=v serial=2 remaining=7 |"),
            answered("i:coupon:1", 4, "3 coupon.use coupon=c user=v order=o-2 serial=2 remaining=7 |"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &first).await.unwrap(), Saved { saved: 4, owed: 0, known: 0 });
        execute(connection, "UPDATE holdfast.partition SET epoch = 2").await;
        let later = answered("j:coupon:1", 30, "0 coupon.use coupon=c user=u order=o-9 serial=1 remaining=7 |");
        assert_eq!(save(connection, 0, 2, WINDOW_MS, &[later]).await.unwrap(), Saved { saved: 1, owed: 0, known: 0 });
        let late = [
            answered("i:coupon:2", 20, "0 coupon.unuse coupon=c user=u serial=1 remaining=7 |"),
            answered("i:coupon:2", 21, "1 coupon.unuse coupon=c user=v serial=2 remaining=7 |"),
            answered("i:coupon:2", 22, "2 coupon.use coupon=c user=v order=o-3 serial=2 remaining=7 |"),
            answered("i:coupon:2", 23, "3 coupon.unuse coupon=c user=v serial=2 remaining=7 |"),
        ];
        assert_eq!(save(connection, 0, 2, WINDOW_MS, &late).await.unwrap(), Saved { saved: 3, owed: 1, known: 0 });
        let issues: Vec<(i64, String, Option<String>)> =
            rows(connection, "SELECT serial, state, order_id FROM holdfast.coupon_issue ORDER BY serial").await;
        assert_eq!(issues, [(1, "used".into(), Some("o-9".into())), (2, "issued".into(), None)]);
    }

    #[tokio::test]
    async fn what_is_handed_over_is_taken_up_once() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let change = answered("i:stock:2", 2, "0 decr | a -3 7");
        hand_over(connection, 0, std::slice::from_ref(&change)).await.unwrap();
        hand_over(connection, 0, std::slice::from_ref(&change)).await.unwrap();
        assert!(is_anything_handed_over(connection).await.unwrap());
        assert_eq!(handed_over(connection, 0, Without::These(&[]), 9).await.unwrap(), std::slice::from_ref(&change));
        taken_up(connection, 0, &change, Some("too few")).await.unwrap();
        assert!(!is_anything_handed_over(connection).await.unwrap());
        hand_over(connection, 0, &[change]).await.unwrap();
        assert!(!is_anything_handed_over(connection).await.unwrap());
        assert_eq!(number_of(connection, "SELECT sum(delta)::bigint FROM holdfast.dead_letter").await, -3);
    }

    #[tokio::test]
    async fn nobody_is_saved_more_of_a_coupon_than_a_user_may_have() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let of = |n: u64, line: &str| answered("i:coupon:1", n, &format!("{n} coupon.{line} |"));
        let issue = |n: u64, user: &str| of(n, &format!("issue coupon=c user={user} serial={n} remaining=1"));
        let all = [of(1, "create coupon=c total=9 peruser=1"), issue(2, "u"), issue(3, "v")];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &all).await.unwrap(), Saved { saved: 3, owed: 0, known: 0 });
        // What one sidecar answered when the other's answers were lost, and a place that is free again.
        let revoke = of(6, "revoke coupon=c user=v serial=3 remaining=1");
        let late = [issue(4, "u"), issue(5, "w"), revoke, issue(7, "v"), issue(8, "w")];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &late).await.unwrap(), Saved { saved: 3, owed: 2, known: 0 });
        let held = "SELECT user_id, serial FROM holdfast.coupon_issue WHERE state = 'issued' ORDER BY serial";
        assert_eq!(rows::<(String, i64)>(connection, held).await, [("u".into(), 2), ("w".into(), 5), ("v".into(), 7)]);
    }

    #[tokio::test]
    async fn an_order_ends_by_what_comes_before_another_begins_under_its_id() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let lines = [
            "reserve order=o expires=9 | a -1 3",
            "reserve order=o expires=9 | a -1 3",
            "confirm order=o from=held units=1 | a 0 3",
            "cancel order=o from=confirmed units=1 | a 1 4",
            "sell order=p | a -1 3",
            "reserve order=p expires=9 | a -1 3",
            "expire order=p from=held units=1 | a 1 4",
            "reserve order=q expires=9 | a -1 3",
            "reserve order=r expires=9 | a -1 3",
        ];
        let mut handed: Vec<Answered> = (1..).zip(lines).map(|(n, line)| answered("i:stock:1", n, &format!("{n} {line}"))).collect();
        // Their clients asked for both again after the loss, for one of them two days later.
        for (order, after_ms) in [("q", 1_000), ("r", 2 * ORDER_KEPT_MS)] {
            for (n, line) in [(20, "reserve order={order} expires=9 | a -1 3"), (21, "cancel order={order} from=held units=1 | a 1 4")] {
                let line = format!("{n} {}", line.replace("{order}", order));
                let one = answered(&format!("j-{order}:stock:1"), n, &line);
                handed.push(Answered { origin: Position::new(2, n), at_ms: one.at_ms + after_ms, ..one });
            }
        }
        hand_over(connection, 0, &handed).await.unwrap();
        let ends = ends(connection, 0, &handed).await.unwrap();
        let ends: Vec<_> = handed.iter().map(|one| ends.get(&one.name()).copied()).collect();
        let (cancel, expire) = (Some(StockKind::Cancel), Some(StockKind::Expire));
        assert_eq!(ends, [None, cancel, cancel, None, None, expire, None, cancel, None, cancel, None, cancel, None]);
    }

    #[tokio::test]
    async fn what_is_handed_over_of_some_coupons_is_left_out() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let handed = [
            answered("i:coupon:1", 1, "0 coupon.issue coupon=c user=u serial=1 remaining=8 |"),
            answered("i:coupon:1", 2, "1 coupon.delete request=r digest=d coupon=c |"),
            answered("i:coupon:1", 3, "2 coupon.issue coupon=cc user=coupon=c serial=1 remaining=8 |"),
            answered("i:stock:1", 4, "0 decr | coupon=c -3 7 b -1 1"),
        ];
        hand_over(connection, 0, &handed).await.unwrap();
        assert_eq!(handed_over(connection, 0, Without::These(&["d".to_owned()]), 9).await.unwrap(), handed);
        assert_eq!(handed_over(connection, 0, Without::These(&["c".to_owned()]), 9).await.unwrap(), handed[2..]);
        assert_eq!(handed_over(connection, 0, Without::These(&["cc".to_owned(), "c".to_owned()]), 9).await.unwrap(), handed[3..]);
        assert_eq!(handed_over(connection, 0, Without::AllCoupons, 9).await.unwrap(), handed[3..]);
    }

    #[tokio::test]
    async fn the_serials_of_many_coupons_are_kept_at_once() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let coupon = |n: u64, line: &str| answered("i:coupon:1", n, &format!("{n} coupon.{line} |"));
        let created: Vec<Answered> = (1..=50).map(|n| coupon(n, &format!("create coupon=c-{n} total=9 peruser=1"))).collect();
        save(connection, 0, 1, WINDOW_MS, &created).await.unwrap();
        execute(
            connection,
            "CREATE SEQUENCE updates; CREATE FUNCTION count_updates() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM nextval(''updates''); RETURN NULL; END';
             CREATE TRIGGER count_updates AFTER UPDATE ON holdfast.coupon FOR EACH STATEMENT EXECUTE FUNCTION count_updates()",
        )
        .await;
        let issued = |serial: u64| -> Vec<Answered> {
            let issue = |n: u64| coupon(100 * serial + n, &format!("issue coupon=c-{n} user=u serial={serial} remaining=1"));
            (1..=50).map(issue).collect()
        };
        for serial in [7, 8] {
            hand_over(connection, 0, &issued(serial)).await.unwrap();
            settled(connection, &issued(serial)).await.unwrap();
        }
        let passed = Saved { saved: 0, owed: 0, known: 50 };
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &issued(7)).await.unwrap(), passed);
        assert_eq!(number_of(connection, "SELECT last_value FROM updates").await, 1);
        execute(connection, "ALTER TABLE holdfast.coupon ADD CHECK (coupon_id <> 'c-9' OR last_serial < 8)").await;
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &issued(8)).await.unwrap(), passed);
        let kept = "SELECT last_serial, count(*) FROM holdfast.coupon GROUP BY 1 ORDER BY 1";
        assert_eq!(rows::<(i64, i64)>(connection, kept).await, [(7, 1), (8, 49)]);
    }

    #[tokio::test]
    async fn the_serial_of_an_issue_that_is_owed_is_not_given_out_again() {
        let mut database = database().await;
        let connection = &mut database.connection;
        let first = [
            answered("i:coupon:1", 1, "0 coupon.create coupon=c total=1 peruser=1 |"),
            answered("i:coupon:1", 2, "1 coupon.issue coupon=c user=u serial=1 remaining=0 |"),
            answered("i:coupon:1", 3, "2 coupon.create coupon=d total=9 peruser=1 |"),
        ];
        save(connection, 0, 1, WINDOW_MS, &first).await.unwrap();
        execute(connection, "ALTER TABLE holdfast.coupon_issue ADD CHECK (user_id <> 'refused')").await;
        let lost = [
            answered("i:coupon:2", 4, "0 coupon.issue coupon=c user=v serial=4 remaining=0 |"),
            answered("i:coupon:2", 5, "1 coupon.issue coupon=d user=refused serial=7 remaining=8 |"),
            answered("i:coupon:2", 6, "2 coupon.issue coupon=ghost user=v serial=1 remaining=8 |"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &lost).await.unwrap(), Saved { saved: 0, owed: 3, known: 0 });
        let serials: Vec<(String, i64, i64)> =
            rows(connection, "SELECT coupon_id, issued, last_serial FROM holdfast.coupon ORDER BY coupon_id").await;
        assert_eq!(serials, [("c".into(), 1, 4), ("d".into(), 0, 7)]);
        // Whoever drops their dead letters gives up their places, not their serials.
        execute(connection, "DELETE FROM holdfast.dead_letter").await;
        assert!(crate::ledger::coupon::is_issued(connection, "d", 7).await.unwrap());
        assert!(!crate::ledger::coupon::is_issued(connection, "d", 6).await.unwrap());
        let late = [
            answered("j:coupon:1", 5, "0 coupon.issue coupon=d user=w serial=7 remaining=8 |"),
            answered("j:coupon:1", 6, "1 coupon.issue coupon=d user=x serial=6 remaining=7 |"),
        ];
        assert_eq!(save(connection, 0, 1, WINDOW_MS, &late).await.unwrap(), Saved { saved: 1, owed: 1, known: 0 });
        let issued: Vec<(String, i64)> = rows(connection, "SELECT user_id, serial FROM holdfast.coupon_issue WHERE coupon_id = 'd'").await;
        assert_eq!(issued, [("x".into(), 6)], "to nobody else that was handed over late either");
    }
}
