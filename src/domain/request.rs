//! Idempotency keys: what a client sends as `REQUEST id`.

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::text;

/// The longest REQUEST id in bytes.
pub const REQUEST_LEN_MAX: usize = 64;

/// The server's own ids begin so; a client may name one only to ask what became of it.
pub const SERVER_PREFIX: &[u8] = b"hf-";

/// A client's idempotency key: 1 to 64 bytes, any bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(Bytes);

impl RequestId {
    /// Takes the bytes as a client's id; `None` where they are too long, empty, or of the server's own form.
    pub fn parse(bytes: &Bytes) -> Option<Self> {
        let fits = !bytes.is_empty() && bytes.len() <= REQUEST_LEN_MAX && !bytes.starts_with(SERVER_PREFIX);
        fits.then(|| Self(bytes.clone()))
    }

    /// The id whose [`RequestId::escaped`] form this is: out of the ledger.
    pub fn of_escaped(escaped: &str) -> Self {
        Self(text::unescape_bytes(escaped).into())
    }

    /// The same id in memory of its own.
    pub fn unshared(&self) -> Self {
        Self(Bytes::copy_from_slice(&self.0))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The id as one word of printable ASCII, as the outbox and Postgres have it.
    pub fn escaped(&self) -> String {
        text::escape(&self.0)
    }

    /// The time inside a canonical UUIDv7 (`xxxxxxxx-xxxx-7xxx-[89ab]xxx-xxxxxxxxxxxx`), in Unix ms; `None` for every other id.
    pub fn uuid_v7_ms(&self) -> Option<u64> {
        let text = &self.0;
        let dashes_and_digits = text.len() == 36
            && text.iter().enumerate().all(|(i, b)| if matches!(i, 8 | 13 | 18 | 23) { *b == b'-' } else { b.is_ascii_hexdigit() });
        if !dashes_and_digits || text[14] != b'7' || !matches!(text[19], b'8' | b'9' | b'a' | b'b' | b'A' | b'B') {
            return None;
        }
        let digits = text[..8].iter().chain(&text[9..13]);
        digits.map(|&b| char::from(b).to_digit(16).map(u64::from)).try_fold(0, |ms, digit| Some(ms << 4 | digit?))
    }
}

/// The fingerprint of a command and its arguments, which tells a retry from another command under the same id. 16
/// hexadecimal digits of SHA-256; each part is hashed with its length, so that parts cannot run together.
pub fn digest<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> RequestId {
        RequestId::parse(&Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    #[test]
    fn a_uuid_v7_carries_its_time_and_nothing_else_does() {
        assert_eq!(id("017f22e2-79b0-7cc3-98c4-dc0c0c07398f").uuid_v7_ms(), Some(0x017f_22e2_79b0));
        for other in
            ["017f22e2-79b0-4cc3-98c4-dc0c0c07398f", "017f22e2-79b0-7cc3-18c4-dc0c0c07398f", "017f22e279b07cc398c4dc0c0c07398f", "r-1"]
        {
            assert_eq!(id(other).uuid_v7_ms(), None, "{other}");
        }
    }

    #[test]
    fn digests_tell_parts_apart() {
        let of = |parts: &[&'static str]| digest(parts.iter().map(|p| p.as_bytes()).collect::<Vec<_>>().into_iter());
        assert_eq!(of(&["a", "b"]), of(&["a", "b"]));
        assert_ne!(of(&["ab", ""]), of(&["a", "b"]));
        assert_eq!(of(&["a"]).len(), 16);
    }

    #[test]
    fn clients_may_not_use_the_servers_ids() {
        assert!(RequestId::parse(&Bytes::from_static(b"hf-x")).is_none());
        assert!(RequestId::parse(&Bytes::new()).is_none());
        assert!(RequestId::parse(&Bytes::from(vec![b'x'; 65])).is_none());
    }
}
