//! Finds whole requests in what a client sent.
//!
//! A request is an array of bulk strings, or a line of words. This reader walks the `*n` and `$len` headers once, remembering where it
//! is and where the arguments lie, and refuses what is too large by its header, before a byte of it is buffered. A complete request
//! is cut out of the buffer, with the places of its words. (redis-protocol's decoder knows no limits, and walks all of it
//! once more; the tests compare the two.)

use bytes::{Buf as _, BytesMut};

use super::request::{Place, Places};
use super::{Request, inline};
use crate::limits::{
    HEADER_MAX, INLINE_MAX, READ_MIN, REQUEST_ARGS_MAX, REQUEST_BULK_MAX, REQUEST_BYTES_MAX, STRANGER_ARGS_MAX, STRANGER_BULK_MAX,
    STRANGER_BYTES_MAX,
};

/// How much one request may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub args_max: usize,
    /// Bytes in one argument.
    pub bulk_max: usize,
    /// Bytes in the request, headers included.
    pub bytes_max: usize,
    stranger: bool,
}

impl Limits {
    /// For clients that have shown who they are, or need not.
    pub const KNOWN: Self = Self { args_max: REQUEST_ARGS_MAX, bulk_max: REQUEST_BULK_MAX, bytes_max: REQUEST_BYTES_MAX, stranger: false };
    /// For clients that have yet to AUTH.
    pub const STRANGER: Self =
        Self { args_max: STRANGER_ARGS_MAX, bulk_max: STRANGER_BULK_MAX, bytes_max: STRANGER_BYTES_MAX, stranger: true };

    /// The same with other numbers.
    pub const fn with(self, args_max: usize, bulk_max: usize, bytes_max: usize) -> Self {
        Self { args_max, bulk_max, bytes_max, ..self }
    }
}

/// What is wrong with the bytes, in Redis's words. The connection cannot go on: where the next request starts is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolError(String);

impl ProtocolError {
    fn new(what: impl AsRef<str>) -> Self {
        Self(format!("ERR Protocol error: {}", what.as_ref()))
    }

    /// The error reply's text.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// Where the walk through the current request stands. `at` counts from the buffer's start.
#[derive(Clone, Copy, Debug)]
enum Walk {
    /// Before the first byte.
    Start,
    /// In an inline line; nothing before `at` ends it.
    Inline { at: usize },
    /// Before a bulk's header.
    Bulk { at: usize, left: usize },
    /// In a bulk's bytes or its end, which lies at `end`.
    Body { end: usize, left: usize },
}

/// The bytes of one connection that are not yet requests.
#[derive(Debug)]
pub struct Reader {
    /// What was read; the connection reads into it.
    pub buffer: BytesMut,
    walk: Walk,
    /// Where the arguments of the current request lie.
    found: Places,
    /// Whether the buffer's memory reaches further than it shows: requests, or what was skipped, lie before it.
    is_cut: bool,
    /// Whether the buffer may have more memory than one read of the least size takes, whatever it still shows of it.
    is_large: bool,
}

impl Default for Reader {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), walk: Walk::Start, found: Places::new(), is_cut: false, is_large: false }
    }
}

impl Reader {
    /// Makes room in the buffer for so many bytes more.
    pub fn reserve(&mut self, bytes: usize) {
        self.is_large |= bytes > READ_MIN || !self.buffer.is_empty();
        self.buffer.reserve(bytes);
    }

    /// Whether it has nothing but the memory of one read of the least size, if that.
    pub fn is_small(&self) -> bool {
        self.buffer.is_empty() && !self.is_large
    }

    /// Takes the next complete request; `None` until more is read. After an error the reader is not to be used again.
    pub fn next(&mut self, limits: Limits) -> Result<Option<Request>, ProtocolError> {
        loop {
            match self.walk {
                Walk::Start => match self.buffer.first() {
                    None => return Ok(None),
                    Some(b'*') => {
                        if let Some((end, places)) = self.short(limits) {
                            self.is_cut = true;
                            let whole = self.buffer.split_to(end).freeze();
                            return Ok(Some(Request::new(whole, places)));
                        }
                        let Some((n, after)) = self.header(0, "mbulk")? else { return Ok(None) };
                        let n = n.ok_or_else(|| ProtocolError::new("invalid multibulk length"))?;
                        if n <= 0 {
                            self.is_cut = true;
                            self.buffer.advance(after);
                            continue;
                        }
                        let left = within(n, limits.args_max, limits, "multibulk")?;
                        self.walk = Walk::Bulk { at: after, left };
                    }
                    Some(_) => self.walk = Walk::Inline { at: 0 },
                },
                Walk::Inline { at } => {
                    let Some(newline) = self.buffer[at..].iter().position(|&b| b == b'\n') else {
                        if self.buffer.len() > INLINE_MAX {
                            return Err(ProtocolError::new("too big inline request"));
                        }
                        self.walk = Walk::Inline { at: self.buffer.len() };
                        return Ok(None);
                    };
                    if at + newline > INLINE_MAX {
                        return Err(ProtocolError::new("too big inline request"));
                    }
                    self.walk = Walk::Start;
                    self.is_cut = true;
                    let line = self.buffer.split_to(at + newline + 1);
                    let args = inline::split(&line).ok_or_else(|| ProtocolError::new("unbalanced quotes in request"))?;
                    if !args.is_empty() {
                        within(i64::try_from(args.len()).unwrap_or(i64::MAX), limits.args_max, limits, "multibulk")?;
                        return Ok(Some(args.into_iter().collect()));
                    }
                }
                Walk::Bulk { at, left } => {
                    match self.buffer.get(at) {
                        None => return Ok(None),
                        Some(b'$') => {}
                        Some(&other) => return Err(ProtocolError::new(format!("expected '$', got '{}'", printable(other)))),
                    }
                    let Some((len, after)) = self.header(at, "bulk")? else { return Ok(None) };
                    let len = len.filter(|&len| len >= 0).ok_or_else(|| ProtocolError::new("invalid bulk length"))?;
                    let end = after + within(len, limits.bulk_max, limits, "bulk")? + 2;
                    if end > limits.bytes_max {
                        return Err(ProtocolError::new("invalid bulk length"));
                    }
                    self.found.push(Place::new(after..end - 2));
                    self.walk = Walk::Body { end, left };
                }
                Walk::Body { end, left } => {
                    if self.buffer.len() < end {
                        return Ok(None);
                    }
                    if left > 1 {
                        self.walk = Walk::Bulk { at: end, left: left - 1 };
                        continue;
                    }
                    self.walk = Walk::Start;
                    let is_ended = |word: &Place| self.buffer[word.range().end..].starts_with(b"\r\n");
                    if !self.found.iter().all(is_ended) {
                        return Err(ProtocolError::new("invalid multibulk length"));
                    }
                    self.is_cut = true;
                    let whole = self.buffer.split_to(end).freeze();
                    return Ok(Some(Request::new(whole, std::mem::take(&mut self.found))));
                }
            }
        }
    }

    /// The end of a request and the places of its words, where it is there as a whole and as nearly all are: at most nine words, of 1 to 99 bytes
    /// each. Whatever else there is, the walk finds.
    fn short(&self, limits: Limits) -> Option<(usize, Places)> {
        let bytes = &self.buffer[..];
        let [b'*', count @ b'1'..=b'9', b'\r', b'\n', ..] = *bytes else { return None };
        let count = usize::from(count - b'0');
        if count > limits.args_max {
            return None;
        }
        let (mut places, mut at) = (Places::new(), 4);
        for _ in 0..count {
            let (len, start) = match *bytes.get(at..)? {
                [b'$', a @ b'1'..=b'9', b'\r', b'\n', ..] => (usize::from(a - b'0'), at + 4),
                [b'$', a @ b'1'..=b'9', b @ b'0'..=b'9', b'\r', b'\n', ..] => (usize::from(a - b'0') * 10 + usize::from(b - b'0'), at + 5),
                _ => return None,
            };
            let end = start + len;
            if len > limits.bulk_max || bytes.get(end..end + 2)? != b"\r\n" {
                return None;
            }
            places.push(Place::new(start..end));
            at = end + 2;
        }
        (at <= limits.bytes_max).then_some((at, places))
    }

    /// Gives memory back that the beginning of a request does not need: all of it where there is none, and returns that if it is
    /// small and no request has any of it.
    /// Of a read that brought many requests and one byte more, that byte would keep the whole.
    pub fn release(&mut self) -> Option<BytesMut> {
        if self.buffer.is_empty() {
            if self.buffer.capacity() > 0 || self.is_cut {
                let Self { mut buffer, is_large, .. } = std::mem::replace(self, Self { walk: self.walk, ..Self::default() });
                return (!is_large && buffer.try_reclaim(READ_MIN)).then_some(buffer);
            }
        } else if self.is_cut || self.buffer.capacity() > 2 * self.buffer.len() + READ_MIN {
            self.buffer = BytesMut::from(&self.buffer[..]);
            (self.is_cut, self.is_large) = (false, self.buffer.len() > READ_MIN);
        }
        None
    }

    /// The number in the header at `at`, if it is one, and the place behind it; `None` where it is not complete.
    fn header(&self, at: usize, kind: &str) -> Result<Option<(Option<i64>, usize)>, ProtocolError> {
        let line = &self.buffer[at + 1..];
        // What nearly all are.
        match *line {
            [a @ b'1'..=b'9', b'\r', b'\n', ..] => return Ok(Some((Some(digit(a)), at + 4))),
            [a @ b'1'..=b'9', b @ b'0'..=b'9', b'\r', b'\n', ..] => return Ok(Some((Some(digit(a) * 10 + digit(b)), at + 5))),
            _ => {}
        }
        let Some(end) = line.iter().take(HEADER_MAX).position(|&b| b == b'\r') else {
            if line.len() >= HEADER_MAX {
                return Err(ProtocolError::new(format!("too big {kind} count string")));
            }
            return Ok(None);
        };
        match line.get(end + 1) {
            None => Ok(None),
            Some(b'\n') => Ok(Some((number(&line[..end]), at + 1 + end + 2))),
            // Redis skips whatever byte stands here; a decoder that does not would see another request than we did.
            Some(_) => Err(ProtocolError::new(if kind == "bulk" { "invalid bulk length" } else { "invalid multibulk length" })),
        }
    }
}

fn digit(byte: u8) -> i64 {
    i64::from(byte - b'0')
}

/// The number in a header, as strict as Redis: no `+`, no leading zeros, no spaces.
fn number(text: &[u8]) -> Option<i64> {
    let (negative, digits) = text.strip_prefix(b"-").map_or((false, text), |digits| (true, digits));
    match digits {
        [b'0'] if !negative => return Some(0),
        [b'1'..=b'9', ..] => {}
        _ => return None,
    }
    let number = digits.iter().try_fold(0_i64, |number, digit| {
        let digit = digit.is_ascii_digit().then(|| i64::from(digit - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })?;
    Some(if negative { -number } else { number })
}

/// Checks a header's number against its bound.
fn within(n: i64, max: usize, limits: Limits, kind: &str) -> Result<usize, ProtocolError> {
    usize::try_from(n).ok().filter(|&n| n <= max).ok_or_else(|| {
        let stranger = limits.stranger && n >= 0;
        ProtocolError::new(format!("{} {kind} length", if stranger { "unauthenticated" } else { "invalid" }))
    })
}

fn printable(byte: u8) -> char {
    if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '?' }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use redis_protocol::resp2::decode::decode_bytes_mut;
    use redis_protocol::resp2::types::BytesFrame;

    /// Feeds the bytes in pieces; returns the requests and the error that ended them, if one did.
    fn fed(pieces: &[&[u8]], limits: Limits) -> (Vec<Vec<String>>, Option<String>) {
        let mut reader = Reader::default();
        let mut requests = Vec::new();
        for piece in pieces {
            reader.buffer.extend_from_slice(piece);
            loop {
                match reader.next(limits) {
                    Ok(Some(request)) => requests.push(request.iter().map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()),
                    Ok(None) => break,
                    Err(error) => return (requests, Some(error.text().to_owned())),
                }
            }
        }
        (requests, None)
    }

    fn error(bytes: &[u8]) -> String {
        let error = fed(&[bytes], Limits::KNOWN).1.unwrap_or_default();
        error.strip_prefix("ERR Protocol error: ").unwrap_or_default().to_owned()
    }

    fn encoded(requests: &[Vec<Vec<u8>>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for request in requests {
            bytes.extend_from_slice(format!("*{}\r\n", request.len()).as_bytes());
            for word in request {
                bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
                bytes.extend_from_slice(word);
                bytes.extend_from_slice(b"\r\n");
            }
        }
        bytes
    }

    #[test]
    fn requests_are_found_in_a_stream_and_empty_ones_skipped() {
        let (requests, error) =
            fed(&[b"*1\r\n$4\r\nPING\r\n*0\r\n*-1\r\n\r\n  \r\nECHO 'a b'\r\n*2\r\n$4\r\nECHO\r\n$0\r\n\r\n*1\r\n$4\r\nPI"], Limits::KNOWN);
        assert_eq!(requests, [vec!["PING"], vec!["ECHO", "a b"], vec!["ECHO", ""]]);
        assert_eq!(error, None);
    }

    #[test]
    fn malformed_requests_get_redis_words() {
        for (bytes, expected) in [
            (&b"*x\r\n"[..], "invalid multibulk length"),
            (b"*+1\r\n", "invalid multibulk length"),
            (b"*01\r\n", "invalid multibulk length"),
            (b"*1\rx", "invalid multibulk length"),
            (b"*1025\r\n", "invalid multibulk length"),
            (b"*99999999999999999999\r\n", "invalid multibulk length"),
            (b"*1\r\n+OK\r\n", "expected '$', got '+'"),
            (b"*1\r\n*1\r\n", "expected '$', got '*'"),
            (b"*1\r\n\r", "expected '$', got '?'"),
            (b"*1\r\n$-1\r\n", "invalid bulk length"),
            (b"*1\r\n$x\r\n", "invalid bulk length"),
            (b"*1\r\n$65537\r\n", "invalid bulk length"),
            (b"*1\r\n$9999999999\r\n", "invalid bulk length"),
            (b"echo \"a\r\n", "unbalanced quotes in request"),
            (&[b'*'; 40], "too big mbulk count string"),
            (b"*1\r\n$11111111111111111111111111111111111", "too big bulk count string"),
        ] {
            assert_eq!(error(bytes), expected, "{}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(error(&vec![b'a'; INLINE_MAX + 1]), "too big inline request");
    }

    #[test]
    fn strangers_may_say_little() {
        let said = |bytes: &[u8]| fed(&[bytes], Limits::STRANGER).1.unwrap_or_default();
        assert_eq!(said(b"*11\r\n"), "ERR Protocol error: unauthenticated multibulk length");
        assert_eq!(said(b"*1\r\n$16385\r\n"), "ERR Protocol error: unauthenticated bulk length");
        assert_eq!(said(b"a b c d e f g h i j k\r\n"), "ERR Protocol error: unauthenticated multibulk length");
    }

    #[test]
    fn a_request_is_bounded_as_a_whole_by_its_headers() {
        let mut bytes = b"*17\r\n".to_vec();
        for _ in 0..15 {
            bytes.extend_from_slice(format!("${REQUEST_BULK_MAX}\r\n").as_bytes());
            bytes.resize(bytes.len() + REQUEST_BULK_MAX, b'x');
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"$65536\r\n");
        assert_eq!(error(&bytes), "invalid bulk length");
    }

    #[test]
    fn the_beginning_of_a_request_does_not_keep_what_was_read_before_it() {
        let big = encoded(&[vec![vec![b'x'; 60_000]]]);
        let skipped = b"*0\r\n".repeat(10_000);
        for before in [&big[..], &skipped, &b" \r\n".repeat(10_000)] {
            let mut reader = Reader::default();
            reader.buffer.extend_from_slice(before);
            reader.buffer.extend_from_slice(b"*1\r\n$4\r\nPI");
            let read = reader.buffer.as_ptr_range();
            let mut taken = Vec::new();
            while let Some(request) = reader.next(Limits::KNOWN).unwrap() {
                taken.push(request);
            }
            reader.release();
            assert!(!read.contains(&reader.buffer.as_ptr()) && reader.buffer.capacity() < 100, "{}", reader.buffer.capacity());
            assert!(taken.iter().all(|request| request.shares_memory_with_none()));
            // And what begins is gone on with, also where it has memory of its own and too much of it.
            reader.buffer.reserve(100_000);
            reader.release();
            assert!(reader.buffer.capacity() < 100, "{}", reader.buffer.capacity());
            reader.buffer.extend_from_slice(b"NG\r\n");
            assert!(reader.next(Limits::KNOWN).unwrap().unwrap().iter().eq([b"PING"]));
            reader.release();
            assert_eq!(reader.buffer.capacity(), 0);
        }
    }

    #[test]
    fn memory_that_no_request_has_is_given_back_as_a_whole() {
        let mut reader = Reader::default();
        reader.reserve(READ_MIN);
        reader.buffer.extend_from_slice(b"*1\r\n$4\r\nPING\r\n");
        let start = reader.buffer.as_ptr();
        let request = reader.next(Limits::KNOWN).unwrap().unwrap();
        drop(request);
        let given = reader.release().unwrap();
        assert!(given.is_empty() && given.capacity() >= READ_MIN && given.as_ptr() == start && reader.buffer.capacity() == 0);
        reader.buffer = given;
        reader.buffer.extend_from_slice(b"*1\r\n$4\r\nPING\r\n");
        let request = reader.next(Limits::KNOWN).unwrap().unwrap();
        assert!(reader.is_small() && reader.release().is_none() && request.shares_memory_with_none(), "the request has it");
        // Of much memory no more than that is shown.
        reader.reserve(8 * READ_MIN);
        reader.buffer.extend_from_slice(&b"PING\r\n".repeat(7 * READ_MIN / 6));
        while reader.next(Limits::KNOWN).unwrap().is_some() {}
        assert!(!reader.is_small() && (READ_MIN..2 * READ_MIN).contains(&reader.buffer.capacity()));
        assert!(reader.release().is_none());
        assert!(reader.is_small());
    }

    #[test]
    fn one_byte_at_a_time_finds_the_same() {
        let bytes = b"*2\r\n$4\r\nECHO\r\n$3\r\na\r\n\r\nPING x\r\n*1\r\n$4\r\nPING\r\n";
        let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(fed(&pieces, Limits::KNOWN), fed(&[bytes], Limits::KNOWN));
    }

    /// What redis-protocol reads of it.
    fn decoded(bytes: &[u8]) -> Vec<String> {
        match decode_bytes_mut(&mut BytesMut::from(bytes)).unwrap() {
            Some((BytesFrame::Array(frames), ..)) => frames
                .iter()
                .map(|frame| match frame {
                    BytesFrame::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                    other => panic!("{other:?}"),
                })
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn a_request_is_what_another_decoder_reads(request in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 1..9)) {
            let bytes = encoded(std::slice::from_ref(&request));
            prop_assert_eq!(fed(&[&bytes], Limits::KNOWN), (vec![decoded(&bytes)], None));
        }

        #[test]
        fn a_split_at_any_byte_gives_the_same_requests(
            requests in proptest::collection::vec(proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 1..5), 1..5),
            at in any::<proptest::sample::Index>(),
        ) {
            let bytes = encoded(&requests);
            let at = at.index(bytes.len());
            let whole = fed(&[&bytes], Limits::KNOWN);
            prop_assert_eq!(whole.0.len(), requests.len());
            prop_assert_eq!(fed(&[&bytes[..at], &bytes[at..]], Limits::KNOWN), whole);
        }

        #[test]
        fn no_bytes_panic_and_pieces_never_matter(bytes: Vec<u8>, kind in 0..3_u8) {
            let mut bytes = bytes;
            match kind {
                0 => {}
                1 => bytes.splice(0..0, *b"*2\r\n$1\r\n").for_each(drop),
                _ => bytes.splice(0..0, *b"*1\r\n$").for_each(drop),
            }
            let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
            prop_assert_eq!(fed(&pieces, Limits::KNOWN), fed(&[&bytes], Limits::KNOWN));
        }
    }
}
