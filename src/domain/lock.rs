//! Locks: what they may be named, and under which epoch their fencing tokens grow.

use bytes::Bytes;

use super::Id;

/// What a lock's name may not begin with: these are data, or Redisson's own.
const RESERVED: [&str; 4] = ["stock:", "holdfast:", "redisson_", "coupon:"];

/// What the name of a coupon's lock begins with.
const OF_A_COUPON: &str = "coupon:issue:";

/// A lock's name, which is also its key on the backing Redis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LockName(Id);

impl LockName {
    /// Takes an id as the name of a lock; `None` where it is the name of something else.
    pub fn of(id: Id) -> Option<Self> {
        let name = id.as_str();
        let of_a_coupon = name.strip_prefix(OF_A_COUPON).is_some_and(|coupon| !coupon.is_empty());
        (of_a_coupon || !RESERVED.iter().any(|prefix| name.starts_with(prefix))).then_some(Self(id))
    }

    /// Takes what a client sent as the name of a lock; `None` where it is the name of something else, or of nothing.
    pub fn parse(bytes: Bytes) -> Option<Self> {
        if Id::is_valid(&bytes) {
            return Self::of(Id::of_valid(bytes));
        }
        let long = std::str::from_utf8(&bytes).ok().filter(|_| Self::is_valid(&bytes))?;
        Self::of(Id::from(long))
    }

    /// Whether the bytes may be the name of something that is locked: an id, or what a coupon's id makes the name of its lock.
    pub fn is_valid(bytes: &[u8]) -> bool {
        Id::is_valid(bytes) || bytes.strip_prefix(OF_A_COUPON.as_bytes()).is_some_and(Id::is_valid)
    }

    /// The name of a coupon's lock.
    pub fn of_coupon(coupon: &Id) -> Self {
        Self(Id::from(format!("{OF_A_COUPON}{coupon}").as_str()))
    }

    /// The name in memory of its own, where it is to be kept: see [`Id::detached`].
    pub fn detached(&self) -> Self {
        Self(self.0.detached())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// The name as an id.
    pub fn id(&self) -> &Id {
        &self.0
    }

    /// The coupon that is issued under this lock, if it is one's.
    pub fn coupon(&self) -> Option<Id> {
        self.as_str().strip_prefix(OF_A_COUPON).map(Id::from)
    }
}

impl std::fmt::Display for LockName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Under what an installation gives out fencing tokens: all of one epoch are above `number` · 2^32, and below those of the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    pub number: u64,
    /// Whose locks they are: the same for every sidecar, so that each can release what another acquired.
    pub installation: String,
}

impl Epoch {
    /// The epoch that a token belongs to.
    pub const fn of(token: u64) -> u64 {
        token >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_data_is_no_lock() {
        for good in ["invoice-7", "coupon:issue:spring", "coupons", "stock", "a:b"] {
            assert!(LockName::of(Id::from(good)).is_some(), "{good}");
        }
        for bad in ["stock:product:1", "holdfast:meta", "redisson_lock_token:x", "coupon:info:spring", "coupon:issue:", "coupon:"] {
            assert!(LockName::of(Id::from(bad)).is_none(), "{bad}");
        }
        assert_eq!(LockName::of(Id::from("coupon:issue:spring")).and_then(|name| name.coupon()), Some(Id::from("spring")));
        assert_eq!(LockName::of_coupon(&Id::from("spring")).as_str(), "coupon:issue:spring");
    }

    #[test]
    fn the_lock_of_the_longest_coupon_has_a_name() {
        let parse = |name: String| LockName::parse(Bytes::from(name));
        let coupon = "c".repeat(128);
        assert_eq!(parse(format!("coupon:issue:{coupon}")).and_then(|name| name.coupon()), Some(Id::from(coupon.as_str())));
        assert_eq!(parse(format!("coupon:issue:{coupon}c")), None);
        assert_eq!(parse("l".repeat(129)), None);
        assert!(parse("l".repeat(128)).is_some());
    }
}
