//! The ids that clients name things by: products, coupons, users, orders, locks.

use bytes::Bytes;

/// The longest id in bytes. It bounds every key, hash field and outbox line that carries one.
pub const ID_LEN_MAX: usize = 128;

/// A product, coupon, user, order or lock name: 1 to 128 bytes of UTF-8 without white space, control characters, `{` or `}`.
///
/// Spaces would break the outbox's text, braces a Redis Cluster hash tag.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(Bytes);

impl Id {
    /// Takes the bytes as an id; `None` where they are not one.
    pub fn parse(bytes: Bytes) -> Option<Self> {
        Self::is_valid(&bytes).then_some(Self(bytes))
    }

    /// Takes bytes that are known to be an id.
    pub(crate) fn of_valid(bytes: Bytes) -> Self {
        debug_assert!(Self::is_valid(&bytes), "not an id: {bytes:?}");
        Self(bytes)
    }

    /// Whether the bytes may be used as an id.
    pub fn is_valid(bytes: &[u8]) -> bool {
        if bytes.is_empty() || bytes.len() > ID_LEN_MAX {
            return false;
        }
        // Without a way out of the loop: so it takes many bytes at once.
        if bytes.iter().fold(true, |fits, &b| fits & (b > b' ') & (b < 0x7f) & (b != b'{') & (b != b'}')) {
            return true;
        }
        !bytes.is_ascii()
            && std::str::from_utf8(bytes)
                .is_ok_and(|text| !text.chars().any(|c| c.is_whitespace() || c.is_control() || c == '{' || c == '}'))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// The id's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The id in memory of its own, where it is to be kept: it shares the buffer that its request was read into.
    pub fn detached(&self) -> Self {
        Self(Bytes::copy_from_slice(&self.0))
    }

    /// The id's bytes, shared.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }
}

impl From<&str> for Id {
    /// For ids that are known to be valid: out of the database, out of the outbox, in tests.
    fn from(text: &str) -> Self {
        Self(Bytes::copy_from_slice(text.as_bytes()))
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_printable_text_without_braces() {
        for good in ["a", "sku-1", "상품-1", "a:b/c", &"x".repeat(128)] {
            assert!(Id::is_valid(good.as_bytes()), "{good}");
        }
        for bad in ["", " ", "a b", "a\tb", "a\r\n", "a\0", "{a", "a}", "\u{a0}", "\u{3000}x", "\u{85}", "\x7f", &"x".repeat(129)] {
            assert!(!Id::is_valid(bad.as_bytes()), "{bad:?}");
        }
        assert!(!Id::is_valid(b"\xff\xfe"));
    }
}
