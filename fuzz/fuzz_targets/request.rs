//! The request reader: what a client sends, in pieces. However it is cut, the same requests and the same error are found; within bounds; and
//! where redis-protocol, another decoder, finds requests, each is the same, however many are pipelined.
#![no_main]

use bytes::BytesMut;
use holdfast_fuzz::resp::{Limits, Reader};
use libfuzzer_sys::fuzz_target;
use redis_protocol::resp2::decode::decode_bytes_mut;
use redis_protocol::resp2::types::BytesFrame;

/// The requests that are found, and the error that ended them.
type Found = (Vec<Vec<Vec<u8>>>, Option<String>);

fn found<'a>(pieces: impl Iterator<Item = &'a [u8]>, limits: Limits) -> Found {
    let mut reader = Reader::default();
    let mut requests = Vec::new();
    for piece in pieces {
        reader.buffer.extend_from_slice(piece);
        loop {
            match reader.next(limits) {
                Ok(Some(request)) => requests.push(request.iter().map(<[u8]>::to_vec).collect()),
                Ok(None) => break,
                Err(error) => return (requests, Some(error.text().to_owned())),
            }
        }
        // What is not complete is bounded, too.
        assert!(reader.buffer.len() <= limits.bytes_max + piece.len());
    }
    (requests, None)
}

/// What redis-protocol finds in these bytes, in which the reader has found one array of bulk strings, behind empty ones. So it cannot recurse.
fn decoded(bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut rest = BytesMut::from(bytes);
    loop {
        let (frame, ..) = decode_bytes_mut(&mut rest).ok()??;
        let BytesFrame::Array(words) = frame else { return None };
        if words.is_empty() {
            continue;
        }
        assert!(rest.is_empty(), "the reader has taken more than the request");
        return words.into_iter().map(|word| if let BytesFrame::BulkString(word) = word { Some(word.to_vec()) } else { None }).collect();
    }
}

/// Looks at each request of a pipeline with the other decoder.
fn compare(bytes: &[u8], limits: Limits) {
    let mut reader = Reader::default();
    reader.buffer.extend_from_slice(bytes);
    let mut begin = 0;
    while let Ok(Some(request)) = reader.next(limits) {
        let end = bytes.len() - reader.buffer.len();
        let taken = &bytes[begin..end];
        begin = end;
        if taken.starts_with(b"*")
            && let Some(other) = decoded(taken)
        {
            assert!(request.iter().eq(other.iter().map(Vec::as_slice)), "{request:?} {other:?}");
        }
    }
}

// The first byte says who sends it, the second how long the pieces are.
fuzz_target!(|input: &[u8]| {
    let [who, size, bytes @ ..] = input else { return };
    let limits = if *who == b'?' { Limits::STRANGER } else { Limits::KNOWN };
    let whole = found(std::iter::once(bytes), limits);
    let pieces = found(bytes.chunks(usize::from(*size).max(1)), limits);
    assert_eq!(whole, pieces);
    for words in &whole.0 {
        assert!(!words.is_empty() && words.len() <= limits.args_max);
        assert!(words.iter().map(Vec::len).sum::<usize>() <= limits.bytes_max);
    }
    compare(bytes, limits);
});
