//! Where a REQUEST id is remembered.
//!
//! A canonical UUIDv7 carries its time, so all its retries meet in the bucket of that minute whatever the clocks of the sidecars
//! say. Every other id goes into the bucket of the generation (one window long) it first comes in, and is looked for in that one
//! and the one before. Each bucket is split in 64 parts, so that none grows into a key that stalls Redis when it goes.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::lane::Verdict;
use super::pack::Pack;
use super::words::Words;
use super::{Error, keys};
use crate::domain::{Position, RequestId};

/// Into how many parts a bucket is split.
const PARTS: u16 = 64;

/// The fingerprint of what the server itself does under one of its own ids: nobody's arguments.
pub const HANDED_OVER: &str = "handed-over";

/// A REQUEST id with the fingerprint of what it asks for.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: RequestId,
    pub digest: String,
    /// Whether the script is to look it up by itself: something in a batch that was to be decided by its sum is known.
    pub alone: bool,
}

impl Request {
    pub fn new(id: RequestId, digest: String) -> Self {
        Self { id, digest, alone: false }
    }

    /// The same in memory of its own.
    pub fn detached(&self) -> Self {
        Self { id: self.id.detached(), digest: self.digest.clone(), alone: self.alone }
    }

    /// The id's own time in Unix ms, at least 1; 0 where it has none.
    pub fn stamp_ms(&self) -> u64 {
        self.id.uuid_v7_ms().map_or(0, |ms| ms.max(1))
    }

    /// The keys of the buckets that may know the id: one for a UUIDv7; else those of the generations before, at and after `generation`.
    pub fn buckets(&self, generation: i64) -> Vec<String> {
        match self.id.uuid_v7_ms() {
            Some(_) => vec![bucket(&self.id, generation)],
            None => (generation - 1..=generation + 1).map(|generation| bucket(&self.id, generation)).collect(),
        }
    }

    /// How many keys and about how many bytes it adds to a batch.
    pub fn weight(&self) -> (usize, usize) {
        (3, 64 + 4 * self.id.as_bytes().len())
    }

    /// Appends ` request=<id> digest=<digest>`, as an outbox line carries it.
    pub fn write_to(&self, line: &mut String) {
        let _ = write!(line, " request={} digest={}", self.id.escaped(), self.digest);
    }

    /// Whether a remembered text was written by the same command with the same arguments; its reply if so.
    pub fn reply_in<'a>(&self, remembered: &'a str) -> Option<&'a str> {
        let (digest, reply) = remembered.split_once(' ')?;
        (digest == self.digest).then_some(reply)
    }
}

/// The key of the bucket that an id which comes in `generation` is remembered in.
pub fn bucket(id: &RequestId, generation: i64) -> String {
    match id.uuid_v7_ms() {
        Some(ms) => keys::request(format_args!("m{}", ms / 60_000), part(id)),
        None => keys::request(generation, part(id)),
    }
}

fn part(id: &RequestId) -> u16 {
    crate::resp::keyslot(id.as_bytes()) % PARTS
}

/// The keys of the buckets of the last `stretches` minutes and windows in which no id can be asked for any more.
pub fn past_buckets(now_ms: i64, window_ms: i64, stretches: i64) -> Vec<String> {
    // An id is stale once it is older than the window: a minute's bucket, when its last moment is.
    let minute = (now_ms - window_ms).div_euclid(60_000) - 1;
    // An id is looked for in the current window and in the one before; another sidecar's clock may be one behind.
    let generation = now_ms.div_euclid(window_ms) - 3;
    let parts = || 0..PARTS;
    let minutes =
        (minute - stretches + 1..=minute).flat_map(|minute| parts().map(move |part| keys::request(format_args!("m{minute}"), part)));
    let generations = (generation - 1..=generation).flat_map(|generation| parts().map(move |part| keys::request(generation, part)));
    minutes.chain(generations).collect()
}

/// A reply as it is remembered: what [`KnownReply::parse`] reads.
pub fn reply(word: &str, integers: &[i64], position: Position) -> String {
    let mut reply = word.to_owned();
    for integer in integers {
        let _ = write!(reply, " :{integer}");
    }
    let _ = write!(reply, " {position}");
    reply
}

/// After how many ms a bucket goes by itself, as lua/include/requests.lua has it.
pub fn expiry_ms(window_ms: i64) -> i64 {
    window_ms * 4 + 3_600_000
}

/// What the memory of REQUEST ids says of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remembered {
    /// `<digest> <reply>` of its first execution.
    Known(String),
    /// What was done under it is in the ledger, and is something else than is asked for now.
    Other,
    /// A UUIDv7 older than the window.
    Stale,
    /// A UUIDv7 more than a minute in the future.
    Ahead,
}

/// The reply of a first execution, as lua/include/requests.lua was given it: an outcome word, `:` before each integer, the position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownReply<'a> {
    pub word: &'a str,
    pub integers: Vec<i64>,
    pub position: Position,
}

impl<'a> KnownReply<'a> {
    /// Reads `OK :97 1-5`; `None` if it is not a reply of ours.
    pub fn parse(reply: &'a str) -> Option<Self> {
        let mut words = reply.split(' ');
        let word = words.next()?;
        let (mut integers, mut position) = (Vec::new(), None);
        for word in words {
            match word.strip_prefix(':') {
                Some(integer) => integers.push(integer.parse().ok()?),
                None => position = Some(Position::parse(word.as_bytes())?),
            }
        }
        Some(Self { word, integers, position: position? })
    }
}

/// Reads what the write scripts say of a REQUEST id.
pub(super) fn verdict<O>(word: &str, words: &mut Words, outcome: fn(Remembered) -> O) -> Result<Verdict<O>, Error> {
    Ok(match word {
        "known" => Verdict::Decided(outcome(Remembered::Known(words.text()?))),
        "stale" => Verdict::Decided(outcome(Remembered::Stale)),
        "ahead" => Verdict::Decided(outcome(Remembered::Ahead)),
        "full" => Verdict::Again("overloaded: the memory of REQUEST ids is full for now; nothing was changed".into()),
        other => return Err(Error::Unexpected(format!("word {other:?}"))),
    })
}

/// Gathers the buckets of a batch's requests, which stand in KEYS behind all else.
pub(super) struct RequestKeys {
    before: usize,
    keys: Vec<String>,
    /// Where the buckets of a minute, or else of the generation, and part begin.
    places: HashMap<(Option<u64>, u16), usize, foldhash::fast::RandomState>,
}

impl RequestKeys {
    /// `before`: how many KEYS stand in front.
    pub(super) fn after(before: usize) -> Self {
        Self { before, keys: Vec::new(), places: HashMap::default() }
    }

    /// Writes a request as lua/include/requests.lua reads it, `false` for none.
    pub(super) fn write(&mut self, batch: &mut Pack, request: Option<&Request>, generation: i64) {
        let Some(request) = request else {
            batch.no();
            return;
        };
        let place = self.place(request, generation);
        let stamp_ms = i64::try_from(request.stamp_ms()).unwrap_or(0);
        batch.array(4).text(&request.id.escaped()).text(&request.digest).integer(stamp_ms).count(place);
    }

    /// The place in KEYS where the request's buckets begin, from 1.
    pub(super) fn place(&mut self, request: &Request, generation: i64) -> usize {
        let minute = request.id.uuid_v7_ms().map(|ms| ms / 60_000);
        let next = self.before + self.keys.len() + 1;
        *self.places.entry((minute, part(&request.id))).or_insert_with(|| {
            self.keys.extend(request.buckets(generation));
            next
        })
    }

    pub(super) fn into_keys(self) -> Vec<String> {
        self.keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn request(id: &'static str) -> Request {
        Request::new(RequestId::parse(Bytes::from_static(id.as_bytes())).unwrap(), "d".into())
    }

    #[test]
    fn a_uuid_v7_has_one_bucket_and_other_ids_three() {
        let v7 = request("017f22e2-79b0-7cc3-98c4-dc0c0c07398f");
        assert_eq!(v7.buckets(5), v7.buckets(900));
        assert_eq!(v7.buckets(5).len(), 1);
        let plain = request("r-1");
        assert_eq!(plain.buckets(5).len(), 3);
        assert_eq!(plain.buckets(5)[2], plain.buckets(6)[1]);
    }

    #[test]
    fn only_buckets_that_nobody_asks_for_are_past() {
        let (window, now) = (600_000, 1_700_000_000_000);
        let past = past_buckets(now, window, 15);
        assert_eq!(past.len(), 17 * 64);
        // A UUIDv7 that is not quite stale, and the oldest that a retry may look for.
        let oldest = bucket(
            &RequestId::of_escaped(&format!("{:08x}-{:04x}-7cc3-98c4-dc0c0c07398f", (now - window) >> 16, (now - window) & 0xffff)),
            0,
        );
        assert!(oldest.starts_with("holdfast:request:m") && !past.contains(&oldest), "{oldest}");
        let generation = now / window;
        for needed in request("r-1").buckets(generation - 1) {
            assert!(!past.contains(&needed), "{needed}");
        }
        assert!(past.contains(&bucket(&RequestId::of_escaped("r-1"), generation - 3)));
    }

    #[test]
    fn a_known_reply_is_read_back() {
        assert_eq!(reply("OK", &[97, 4], Position::new(1, 5)), "OK :97 :4 1-5");
        let reply = KnownReply::parse("OK :97 :4 1-5").unwrap();
        assert_eq!((reply.word, reply.integers, reply.position), ("OK", vec![97, 4], Position::new(1, 5)));
        assert_eq!(KnownReply::parse("OK :97"), None);
    }

    #[test]
    fn a_reply_is_given_only_to_the_same_command() {
        assert_eq!(request("r").reply_in("d OK :97 1-5"), Some("OK :97 1-5"));
        assert_eq!(request("r").reply_in("e OK :97 1-5"), None);
    }
}
