//! Idempotency keys: what a client sends as `REQUEST id`.

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::text;

/// The longest REQUEST id in bytes.
pub const REQUEST_LEN_MAX: usize = 64;

/// The threads of one process that may send batches: more than there are cores on most machines.
pub const THREADS_MAX: u64 = 64;

/// Lanes of a family in a process: each thread has at most two, of which the second is numbered behind those of all threads.
pub const LANES_MAX: u64 = 2 * THREADS_MAX;

/// The server's own ids begin so; a client may name one only to ask what became of it.
const SERVER_PREFIX: &str = "hf-";

/// A client's idempotency key: 1 to 64 bytes, any bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(Bytes);

impl RequestId {
    /// Takes the bytes as a client's id; `None` where they are too long or empty, or begin like the server's own ids and are none.
    pub fn parse(bytes: Bytes) -> Option<Self> {
        Self::is_valid(&bytes).then_some(Self(bytes))
    }

    /// Whether the bytes may be used as a client's id.
    pub fn is_valid(bytes: &[u8]) -> bool {
        let fits = !bytes.is_empty() && bytes.len() <= REQUEST_LEN_MAX;
        fits && (!bytes.starts_with(SERVER_PREFIX.as_bytes()) || sent(bytes).is_some())
    }

    /// What the id stands for, where it is the server's own.
    pub fn sent(&self) -> Option<Sent> {
        sent(&self.0)
    }

    /// The id in memory of its own, see [`Id::detached`](super::Id::detached).
    pub fn detached(&self) -> Self {
        Self(Bytes::copy_from_slice(&self.0))
    }

    /// The id whose [`RequestId::escaped`] form this is: out of the ledger.
    pub fn of_escaped(escaped: &str) -> Self {
        Self(text::unescape_bytes(escaped).into())
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

/// An operation that a sidecar sent to Redis, by which the server names a change that carried no REQUEST: `hf-<op>-<k>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// `<instance>:<lane>`.
    pub lane: String,
    /// The number of its batch in that lane.
    pub counter: u64,
    /// Its place in that batch.
    pub k: u32,
}

impl Sent {
    /// Reads `hf-<instance>:<lane>:<counter>-<k>`, in the one way in which it is written.
    fn parse(id: &str) -> Option<Self> {
        let (op, k) = id.strip_prefix(SERVER_PREFIX)?.split_once('-')?;
        let (lane, counter) = op.rsplit_once(':')?;
        let (instance, family) = lane.split_once(':')?;
        let is_instance = instance.len() == 32 && instance.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let sent = Self { lane: lane.to_owned(), counter: counter.parse().ok()?, k: k.parse().ok()? };
        // Lua counts exactly up to 2^53.
        // Behind the family stands the number of the lane, but for the first.
        let (family, lane_number) = family.split_once('.').unwrap_or((family, "1"));
        let is_lane = lane_number.parse::<u64>().is_ok_and(|number| number > 0 && number < LANES_MAX && number.to_string() == lane_number);
        let fits = is_instance && is_lane && matches!(family, "stock" | "coupon") && (1..1 << 53).contains(&sent.counter);
        (fits && sent.id() == id).then_some(sent)
    }

    /// The name of its batch.
    pub fn op(&self) -> String {
        format!("{}:{}", self.lane, self.counter)
    }

    /// The REQUEST id that stands for it.
    pub fn id(&self) -> String {
        format!("{SERVER_PREFIX}{}-{}", self.op(), self.k)
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

fn sent(id: &[u8]) -> Option<Sent> {
    Sent::parse(std::str::from_utf8(id).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> RequestId {
        RequestId::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    #[test]
    fn a_batch_of_another_thread_is_named_like_any_other() {
        let lane = "0123456789abcdef0123456789abcdef:stock.3";
        assert_eq!(Sent::parse(&format!("hf-{lane}:7-1")), Some(Sent { lane: lane.into(), counter: 7, k: 1 }));
        assert!(Sent::parse("hf-0123456789abcdef0123456789abcdef:stock.127:7-1").is_some());
        for thread in ["0", "03", "128", "x", ""] {
            assert_eq!(Sent::parse(&format!("hf-0123456789abcdef0123456789abcdef:stock.{thread}:7-1")), None, "{thread}");
        }
        let longest = Sent { lane: "0123456789abcdef0123456789abcdef:coupon.63".into(), counter: 99_999_999_999_999, k: 511 };
        assert!(longest.id().len() <= 64, "{}", longest.id());
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
    fn the_servers_own_ids_are_taken_only_as_they_were_given_out() {
        let given = "hf-0123456789abcdef0123456789abcdef:coupon:1700000-511";
        let sent = Sent { lane: "0123456789abcdef0123456789abcdef:coupon".into(), counter: 1_700_000, k: 511 };
        assert_eq!(id(given).sent(), Some(sent.clone()));
        assert_eq!((sent.id().as_str(), sent.op().as_str()), (given, &given[3..given.len() - 4]));
        assert_eq!(id("r-1").sent(), None);
    }

    #[test]
    fn clients_may_not_make_up_ids_of_the_server() {
        assert!(RequestId::parse(Bytes::from_static(b"hf-x")).is_none());
        let instance = "0123456789abcdef0123456789abcdef";
        for other in [
            format!("hf-{instance}:stock:7"),
            format!("hf-{instance}:stock:0-0"),
            format!("hf-{instance}:stock:07-0"),
            format!("hf-{instance}:stock:+7-0"),
            format!("hf-{instance}:stock:7-00"),
            format!("hf-{instance}:stock:7-0-0"),
            format!("hf-{instance}:lock:7-0"),
            format!("hf-{}:stock:7-0", instance.to_uppercase()),
            format!("hf-{}:stock:7-0", &instance[1..]),
            format!("hf-{instance}:stock:{}-0", 1_u64 << 53),
            format!("hf-{instance}:stock:7-{}", 1_u64 << 32),
            format!("hf-{instance}:coupon:{}-0", "9".repeat(30)),
        ] {
            assert!(RequestId::parse(Bytes::from(other.clone())).is_none(), "{other}");
        }
        assert!(RequestId::parse(Bytes::new()).is_none());
        assert!(RequestId::parse(Bytes::from(vec![b'x'; 65])).is_none());
    }
}
