//! Reads everything that Redis holds, for Postgres to be given. Only behind [`meta::fence`](super::meta::fence): nothing changes meanwhile.

use std::collections::{BTreeSet, HashMap};

use redis::Value;

use super::refill::{Coupon, Product};
use super::{Connection, Error, coupon, keys};
use crate::domain::{Id, Order, OrderState, Position};
use crate::limits::REFILL_KEYS;

/// One step through the keys.
#[derive(Default)]
pub struct Page {
    /// Products that hold a number of units.
    pub products: Vec<Product>,
    pub coupons: Vec<(Coupon, Vec<Holder>)>,
    pub orders: Vec<(Id, Order)>,
    /// Keys of ours that hold something else.
    pub unreadable: Vec<String>,
}

/// What a user has of a coupon.
pub struct Holder {
    pub user: String,
    pub coupons: Vec<coupon::Held>,
}

/// A walk through every key; a key may be met twice.
pub struct Walk {
    cursor: String,
    begun: bool,
}

fn read<T: redis::FromRedisValue>(value: Value) -> Result<T, Error> {
    Ok(redis::from_redis_value(value).map_err(redis::RedisError::from)?)
}

impl Walk {
    pub fn new() -> Self {
        Self { cursor: "0".to_owned(), begun: false }
    }

    /// The next step; `None` at the end.
    pub async fn next(&mut self, connection: &mut Connection) -> Result<Option<Page>, Error> {
        if self.begun && self.cursor == "0" {
            return Ok(None);
        }
        self.begun = true;
        let (cursor, found): (String, Vec<Vec<u8>>) =
            read(connection.send(redis::cmd("SCAN").arg(&self.cursor).arg("COUNT").arg(REFILL_KEYS)).await?)?;
        self.cursor = cursor;
        // A step may return a key twice.
        let found: BTreeSet<String> = found.into_iter().filter_map(|key| String::from_utf8(key).ok()).collect();
        let named = |prefix: &'static str| {
            found
                .iter()
                .filter_map(move |key| key.strip_prefix(prefix))
                .filter(|id| Id::is_valid(id.as_bytes()))
                .map(Id::from)
                .collect::<Vec<_>>()
        };
        let mut page = Page::default();
        products(connection, &named(keys::PRODUCT_PREFIX), &mut page).await?;
        for coupon in named(keys::COUPON_INFO_PREFIX) {
            match terms(connection, &coupon).await {
                Ok(coupon) => page.coupons.push(coupon),
                Err(error) if !error.is_about_what_is_there() => return Err(error),
                Err(_) => page.unreadable.push(keys::coupon_info(&coupon)),
            }
        }
        for id in named(keys::ORDER_PREFIX) {
            match order(connection, &id).await {
                // Its time may have passed since its key was met.
                Ok(found) => page.orders.extend(found.map(|order| (id, order))),
                Err(error) if !error.is_about_what_is_there() => return Err(error),
                Err(_) => page.unreadable.push(keys::order(&id)),
            }
        }
        Ok(Some(page))
    }
}

/// The products that were deleted, each with what orders still hold of it.
pub async fn deleted(connection: &mut Connection) -> Result<Vec<(Id, i64)>, Error> {
    let products: Vec<String> = read(connection.send(redis::cmd("HKEYS").arg(keys::DELETED)).await?)?;
    let mut deleted = Vec::new();
    for products in products.chunks(REFILL_KEYS) {
        let held: Vec<Option<i64>> = read(connection.send(redis::cmd("HMGET").arg(keys::HELD).arg(products)).await?)?;
        deleted.extend(products.iter().zip(held).map(|(product, held)| (Id::from(product.as_str()), held.unwrap_or(0))));
    }
    Ok(deleted)
}

impl Default for Walk {
    fn default() -> Self {
        Self::new()
    }
}

async fn products(connection: &mut Connection, products: &[Id], page: &mut Page) -> Result<(), Error> {
    if products.is_empty() {
        return Ok(());
    }
    let keys: Vec<String> = products.iter().map(keys::product).collect();
    let values: Vec<Option<String>> = read(connection.send(redis::cmd("MGET").arg(&keys)).await?)?;
    let fields: Vec<&[u8]> = products.iter().map(Id::as_bytes).collect();
    let mut beside: HashMap<&str, Vec<Option<String>>> = HashMap::new();
    for key in [keys::HELD, keys::LOW, keys::FROZEN] {
        beside.insert(key, read(connection.send(redis::cmd("HMGET").arg(key).arg(&fields)).await?)?);
    }
    let number = |key: &str, i: usize| beside.get(key).and_then(|values| values.get(i)?.as_ref()?.parse::<i64>().ok());
    for (i, (product, value)) in products.iter().zip(values).enumerate() {
        let Some(available) = value.as_ref().and_then(|value| value.parse().ok()).filter(|available| *available >= 0) else {
            page.unreadable.push(keys::product(product));
            continue;
        };
        let frozen = beside.get(keys::FROZEN).and_then(|values| values.get(i)?.clone());
        let (held, low) = (number(keys::HELD, i).unwrap_or(0), number(keys::LOW, i));
        page.products.push(Product { product: product.clone(), available, held, low, frozen });
    }
    Ok(())
}

async fn order(connection: &mut Connection, order: &Id) -> Result<Option<Order>, Error> {
    let asked = redis::cmd("HMGET").arg(keys::order(order)).arg(&["state", "expires", "items", "position"]).to_owned();
    let fields: Vec<Option<String>> = read(connection.send(&asked).await?)?;
    if fields.iter().all(Option::is_none) {
        return Ok(None);
    }
    let broken = || Error::Unexpected(format!("order '{order}' cannot be read: repair its key in Redis, and run it again"));
    let [Some(state), Some(expires), Some(items), Some(position)] = &fields[..] else { return Err(broken()) };
    let state = OrderState::parse(state).ok_or_else(broken)?;
    // Only one that was cancelled before it came has none.
    let is_so =
        |items: &Vec<(String, i64)>| items.iter().all(|(_, units)| *units >= 0) && (!items.is_empty() || state == OrderState::Cancelled);
    Ok(Some(Order {
        state,
        expires_ms: expires.parse().map_err(|_| broken())?,
        items: Order::parse_items(items).filter(is_so).ok_or_else(broken)?,
        position: Position::parse(position.as_bytes()).ok_or_else(broken)?,
    }))
}

async fn terms(connection: &mut Connection, coupon: &Id) -> Result<(Coupon, Vec<Holder>), Error> {
    let fields: HashMap<String, String> = read(connection.send(redis::cmd("HGETALL").arg(keys::coupon_info(coupon))).await?)?;
    let number = |name: &str| fields.get(name)?.parse().ok();
    let field = |name: &str| number(name).ok_or_else(|| Error::Unexpected(format!("coupon '{coupon}' has no {name}")));
    let terms = Coupon {
        coupon: coupon.clone(),
        total: field("total")?,
        issued: field("issued")?,
        used: field("used")?,
        serial: field("serial")?,
        per_user: field("peruser")?,
        start_ms: field("start")?,
        end_ms: field("end")?,
        deleted: fields.get("state").is_some_and(|state| state == "deleted"),
    };
    let (mut holders, mut cursor) = (Vec::new(), "0".to_owned());
    loop {
        let step = connection.send(redis::cmd("HSCAN").arg(keys::coupon_users(coupon)).arg(&cursor).arg("COUNT").arg(REFILL_KEYS)).await?;
        let (next, found): (String, Vec<(String, String)>) = read(step)?;
        for (user, lines) in found {
            holders.push(Holder { user, coupons: lines.lines().map(coupon::Held::parse).collect::<Result<_, _>>()? });
        }
        cursor = next;
        if cursor == "0" {
            return Ok((terms, holders));
        }
    }
}
