//! What a command answers, and how it is written in RESP2 and RESP3.

use std::borrow::Cow;

use bytes::{BufMut as _, Bytes, BytesMut};

/// The dialect a connection speaks; HELLO switches it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    #[default]
    Resp2,
    Resp3,
}

impl Protocol {
    /// The number that HELLO takes and CLIENT LIST shows.
    pub const fn number(self) -> i64 {
        match self {
            Self::Resp2 => 2,
            Self::Resp3 => 3,
        }
    }
}

/// A reply, independent of the dialect. What RESP2 lacks is written as Redis writes it there: maps as flat arrays, sets and pushes
/// as arrays, booleans as 0 or 1, doubles and verbatim text as bulk strings.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Simple(Cow<'static, str>),
    /// An error: its word in upper case, a space, one sentence.
    Error(Cow<'static, str>),
    Integer(i64),
    Bulk(Bytes),
    Nil,
    /// Nil where an array was asked for (`*-1` in RESP2).
    NilArray,
    Bool(bool),
    Double(f64),
    /// Text for people; the format is `txt`.
    Verbatim(String),
    Array(Vec<Reply>),
    Set(Vec<Reply>),
    Map(Vec<(Reply, Reply)>),
    /// A message that no request asked for.
    Push(Vec<Reply>),
    /// What most changes are answered with: `OK`, a number, and the position `<epoch>-<n>`.
    Accepted {
        number: i64,
        epoch: u64,
        n: u64,
    },
    /// Written already, see [`Encoder`].
    Encoded(Vec<u8>),
    /// No byte: what there is to say was said in messages.
    Nothing,
}

impl Reply {
    /// `+OK`.
    pub const fn ok() -> Self {
        Self::Simple(Cow::Borrowed("OK"))
    }

    /// A simple string: a word of the protocol, never data.
    pub const fn simple(word: &'static str) -> Self {
        Self::Simple(Cow::Borrowed(word))
    }

    /// A bulk string of bytes.
    pub fn bulk(bytes: impl Into<Bytes>) -> Self {
        Self::Bulk(bytes.into())
    }

    /// A bulk string of a constant word, without a copy.
    pub const fn word(word: &'static str) -> Self {
        Self::Bulk(Bytes::from_static(word.as_bytes()))
    }

    /// A bulk string of text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Bulk(Bytes::from(text.into()))
    }

    /// An error: `ERR ...`, with its word in front.
    pub fn error(text: impl Into<Cow<'static, str>>) -> Self {
        Self::Error(text.into())
    }

    /// A map with constant keys.
    pub fn map<const N: usize>(fields: [(&'static str, Reply); N]) -> Self {
        Self::Map(fields.into_iter().map(|(key, value)| (Self::word(key), value)).collect())
    }

    /// About how many bytes it takes while it waits.
    pub fn weight(&self) -> usize {
        let held = match self {
            Self::Push(items) | Self::Array(items) | Self::Set(items) => items.iter().map(Self::weight).sum(),
            Self::Map(pairs) => pairs.iter().map(|(name, value)| name.weight() + value.weight()).sum(),
            Self::Bulk(bytes) => bytes.len(),
            Self::Simple(text) | Self::Error(text) => text.len(),
            Self::Verbatim(text) => text.len(),
            Self::Encoded(bytes) => bytes.len(),
            _ => 0,
        };
        size_of::<Self>() + held
    }

    /// Whether it is an error.
    pub const fn is_error(&self) -> bool {
        matches!(self, Self::Error(_))
    }

    /// The reply's error word (`ERR`, `NOTFOUND`), if it is an error.
    pub fn error_word(&self) -> Option<&str> {
        match self {
            Self::Error(text) => Some(text.split(' ').next().unwrap_or(text)),
            _ => None,
        }
    }

    /// Appends the reply's bytes in the given dialect.
    pub fn encode(&self, out: &mut BytesMut, protocol: Protocol) {
        let resp3 = protocol == Protocol::Resp3;
        match self {
            Self::Simple(text) => line(out, b'+', text),
            Self::Error(text) => line(out, b'-', text),
            Self::Integer(n) => number(out, b':', *n),
            Self::Bulk(bytes) => bulk(out, bytes),
            Self::Nil if resp3 => out.put_slice(b"_\r\n"),
            Self::Nil => out.put_slice(b"$-1\r\n"),
            Self::NilArray if resp3 => out.put_slice(b"_\r\n"),
            Self::NilArray => out.put_slice(b"*-1\r\n"),
            Self::Bool(yes) if resp3 => out.put_slice(if *yes { b"#t\r\n" } else { b"#f\r\n" }),
            Self::Bool(yes) => number(out, b':', i64::from(*yes)),
            Self::Double(value) if resp3 => line(out, b',', &value.to_string()),
            Self::Double(value) => bulk(out, value.to_string().as_bytes()),
            Self::Verbatim(text) if resp3 => {
                length(out, b'=', text.len() + 4);
                out.put_slice(b"txt:");
                out.put_slice(text.as_bytes());
                out.put_slice(b"\r\n");
            }
            Self::Verbatim(text) => bulk(out, text.as_bytes()),
            Self::Array(items) => all(out, b'*', items, protocol),
            Self::Set(items) => all(out, if resp3 { b'~' } else { b'*' }, items, protocol),
            Self::Push(items) => all(out, if resp3 { b'>' } else { b'*' }, items, protocol),
            Self::Accepted { number, epoch, n } => put_accepted(out, *number, *epoch, *n),
            Self::Encoded(bytes) => out.put_slice(bytes),
            Self::Nothing => {}
            Self::Map(fields) => {
                if resp3 {
                    length(out, b'%', fields.len());
                } else {
                    length(out, b'*', fields.len() * 2);
                }
                for (key, value) in fields {
                    key.encode(out, protocol);
                    value.encode(out, protocol);
                }
            }
        }
    }
}

/// Writes an array of bulk strings and integers at once, without an allocation an element: both dialects write them alike.
pub struct Encoder(Vec<u8>);

impl Encoder {
    /// An array of `len` elements, which are written next.
    pub fn array(len: usize) -> Self {
        let mut encoder = Self(Vec::with_capacity(64));
        encoder.header(b'*', len);
        encoder
    }

    pub fn bulk(&mut self, bytes: &[u8]) -> &mut Self {
        self.header(b'$', bytes.len());
        self.0.extend_from_slice(bytes);
        self.0.extend_from_slice(b"\r\n");
        self
    }

    pub fn integer(&mut self, integer: i64) -> &mut Self {
        self.0.push(b':');
        self.0.extend_from_slice(itoa::Buffer::new().format(integer).as_bytes());
        self.0.extend_from_slice(b"\r\n");
        self
    }

    pub fn done(self) -> Reply {
        Reply::Encoded(self.0)
    }

    fn header(&mut self, kind: u8, len: usize) {
        if let Ok(digit @ 0..=9) = u8::try_from(len) {
            return self.0.extend_from_slice(&[kind, b'0' + digit, b'\r', b'\n']);
        }
        self.0.push(kind);
        self.0.extend_from_slice(itoa::Buffer::new().format(len).as_bytes());
        self.0.extend_from_slice(b"\r\n");
    }
}

/// Both dialects write it alike. Put together on the stack, it is one copy into the output.
fn put_accepted(out: &mut BytesMut, number: i64, epoch: u64, n: u64) {
    const HEAD: &[u8] = b"*3\r\n$2\r\nOK\r\n:";
    const LONGEST: usize = HEAD.len() + 20 + "\r\n$41\r\n".len() + 41 + "\r\n".len();
    let (mut bytes, mut len) = ([0; LONGEST], 0);
    let mut put = |part: &[u8]| {
        bytes[len..len + part.len()].copy_from_slice(part);
        len += part.len();
    };
    let [mut first, mut second, mut third] = [itoa::Buffer::new(), itoa::Buffer::new(), itoa::Buffer::new()];
    let (epoch, n) = (first.format(epoch), second.format(n));
    put(HEAD);
    put(third.format(number).as_bytes());
    put(b"\r\n$");
    put(third.format(epoch.len() + 1 + n.len()).as_bytes());
    put(b"\r\n");
    put(epoch.as_bytes());
    put(b"-");
    put(n.as_bytes());
    put(b"\r\n");
    out.put_slice(&bytes[..len]);
}

fn all(out: &mut BytesMut, kind: u8, items: &[Reply], protocol: Protocol) {
    length(out, kind, items.len());
    for item in items {
        item.encode(out, protocol);
    }
}

fn bulk(out: &mut BytesMut, bytes: &[u8]) {
    length(out, b'$', bytes.len());
    out.put_slice(bytes);
    out.put_slice(b"\r\n");
}

/// Writes a one-line string. Control bytes, which could end the line early and forge replies, become spaces.
fn line(out: &mut BytesMut, kind: u8, text: &str) {
    out.put_u8(kind);
    let start = out.len();
    out.put_slice(text.as_bytes());
    for byte in &mut out[start..] {
        if byte.is_ascii_control() {
            *byte = b' ';
        }
    }
    out.put_slice(b"\r\n");
}

fn length(out: &mut BytesMut, kind: u8, length: usize) {
    number(out, kind, i64::try_from(length).unwrap_or(i64::MAX));
}

/// Writes `<kind><n>\r\n`.
fn number(out: &mut BytesMut, kind: u8, n: i64) {
    out.put_u8(kind);
    out.put_slice(itoa::Buffer::new().format(n).as_bytes());
    out.put_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(reply: &Reply, protocol: Protocol) -> String {
        let mut out = BytesMut::new();
        reply.encode(&mut out, protocol);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn every_kind_is_written_in_both_dialects() {
        let map = Reply::map([("a", Reply::Integer(1)), ("b", Reply::Nil)]);
        let rows = [
            (Reply::ok(), "+OK\r\n", "+OK\r\n"),
            (Reply::error("ERR no"), "-ERR no\r\n", "-ERR no\r\n"),
            (Reply::Integer(-12), ":-12\r\n", ":-12\r\n"),
            (Reply::Integer(7), ":7\r\n", ":7\r\n"),
            (Reply::text("héé"), "$5\r\nhéé\r\n", "$5\r\nhéé\r\n"),
            (Reply::bulk(Bytes::new()), "$0\r\n\r\n", "$0\r\n\r\n"),
            (Reply::Nil, "$-1\r\n", "_\r\n"),
            (Reply::NilArray, "*-1\r\n", "_\r\n"),
            (Reply::Bool(true), ":1\r\n", "#t\r\n"),
            (Reply::Double(1.5), "$3\r\n1.5\r\n", ",1.5\r\n"),
            (Reply::Verbatim("x".into()), "$1\r\nx\r\n", "=5\r\ntxt:x\r\n"),
            (Reply::Array(vec![Reply::word("OK")]), "*1\r\n$2\r\nOK\r\n", "*1\r\n$2\r\nOK\r\n"),
            (Reply::Set(vec![]), "*0\r\n", "~0\r\n"),
            (Reply::Push(vec![]), "*0\r\n", ">0\r\n"),
            (map, "*4\r\n$1\r\na\r\n:1\r\n$1\r\nb\r\n$-1\r\n", "%2\r\n$1\r\na\r\n:1\r\n$1\r\nb\r\n_\r\n"),
        ];
        for (reply, resp2, resp3) in rows {
            assert_eq!(written(&reply, Protocol::Resp2), resp2);
            assert_eq!(written(&reply, Protocol::Resp3), resp3);
        }
    }

    #[test]
    fn errors_cannot_forge_a_second_reply() {
        assert_eq!(written(&Reply::error("ERR a\r\n+OK\0\x1b"), Protocol::Resp2), "-ERR a  +OK  \r\n");
    }

    proptest! {
        #[test]
        fn integers_are_written_as_the_standard_library_writes_them(n: i64) {
            prop_assert_eq!(written(&Reply::Integer(n), Protocol::Resp2), format!(":{n}\r\n"));
        }

        #[test]
        fn a_line_has_one_end(text: String) {
            let line = written(&Reply::error(text), Protocol::Resp3);
            prop_assert_eq!(line.find('\r'), Some(line.len() - 2));
            prop_assert_eq!(line.find('\n'), Some(line.len() - 1));
        }
    }
}
