//! Every key's name, once (design: one partition on standalone Redis and Sentinel, so no hash tags yet).

use crate::domain::Id;
use crate::domain::lock::LockName;

/// Hash: epoch, verified run id, n, last op, state, and `<instance>:<lane>` → counter of each lane.
pub const META: &str = "holdfast:meta";
/// Stream: the changes that Postgres may not have yet, and some that it has.
pub const OUTBOX: &str = "holdfast:outbox";
/// String: which sidecar may expire orders, for a moment.
pub const SWEEPER: &str = "holdfast:sweeper";
/// Hash: product → units held by orders.
pub const HELD: &str = "stock:held";
/// Hash: product → why a person has to look at it.
pub const FROZEN: &str = "stock:frozen";
/// Hash: product → threshold of the low-stock event.
pub const LOW: &str = "stock:low";
/// Hash: product → n when it was deleted, until it is created again: what Postgres says of it may be older.
pub const DELETED: &str = "stock:deleted";
/// Sorted set: order → until when its units are held, in Unix ms.
pub const EXPIRY: &str = "stock:expiry";
/// Where products were unfrozen by a person last: a hash of n.
pub const UNFROZEN: &str = "stock:unfrozen";
/// What stands before an order's id: a hash with its state, its expiry, its items, and the position that made it so.
pub const ORDER_PREFIX: &str = "stock:order:";
/// Hash: epoch, run id, and the highest fencing token that this node has given out.
pub const LOCKS: &str = "holdfast:lock";
/// What stands before a product's id.
pub const PRODUCT_PREFIX: &str = "stock:product:";
/// What stands before a coupon's id in the key of its terms.
pub const COUPON_INFO_PREFIX: &str = "coupon:info:";

/// What stands before a coupon's id in the key of its users.
const COUPON_USERS_PREFIX: &str = "coupon:users:";
/// What stands in the keys of the memory of REQUEST ids.
const REQUEST_PREFIX: &str = "holdfast:request:";
/// What the keys begin with that a rebuild removes and makes anew.
pub const REBUILT_PREFIXES: [&str; 5] = [PRODUCT_PREFIX, ORDER_PREFIX, COUPON_INFO_PREFIX, COUPON_USERS_PREFIX, REQUEST_PREFIX];

/// See [`ORDER_PREFIX`].
pub fn order(order: &Id) -> String {
    format!("{ORDER_PREFIX}{order}")
}

/// String: a product's available units in decimal.
pub fn product(product: &Id) -> String {
    format!("{PRODUCT_PREFIX}{product}")
}

/// Hash: a coupon's lock, in Redisson's layout.
pub fn coupon_lock(coupon: &Id) -> String {
    format!("coupon:issue:{coupon}")
}

/// Hash: a lock, in Redisson's layout: who holds it, and how often.
pub fn lock(name: &LockName) -> String {
    name.coupon().map_or_else(|| name.as_str().to_owned(), |coupon| coupon_lock(&coupon))
}

/// String: the newest fencing token of a lock, where Redisson's RFencedLock has its own.
pub fn lock_token(name: &LockName) -> String {
    format!("redisson_lock_token:{{{}}}", lock(name))
}

/// Channel: where Redisson, and a sidecar, say that a lock is free.
pub fn lock_channel(name: &LockName) -> String {
    format!("redisson_lock__channel:{{{}}}", lock(name))
}

/// Hash: the owner that may acquire a lock once more, its token, and the names of the scripts that acquired it.
pub fn lock_owner(name: &LockName) -> String {
    format!("holdfast:owner:{{{}}}", lock(name))
}

/// String: what one acquisition or release of a lock did, for the while in which it may be sent again.
pub fn lock_done(name: &LockName, op: &str) -> String {
    format!("holdfast:owner:{{{}}}:{op}", lock(name))
}

/// Hash: total, issued, used, window, per-user limit, state.
pub fn coupon_info(coupon: &Id) -> String {
    format!("{COUPON_INFO_PREFIX}{coupon}")
}

/// Hash: user → serials and their states.
pub fn coupon_users(coupon: &Id) -> String {
    format!("{COUPON_USERS_PREFIX}{coupon}")
}

/// Hash: request id → digest and reply. The bucket says which stretch of time and which of 64 parts.
pub fn request(bucket: impl std::fmt::Display, part: u16) -> String {
    format!("{REQUEST_PREFIX}{bucket}.{part}")
}
