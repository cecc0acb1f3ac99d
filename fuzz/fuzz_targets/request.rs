//! The request reader: what a client sends, in pieces. However it is cut, the same requests and the same error are found; within bounds; and
//! where redis-protocol, another decoder, finds a request, it is the same.
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
                Ok(Some(request)) => requests.push(request.args.iter().map(|word| word.to_vec()).collect()),
                Ok(None) => break,
                Err(error) => return (requests, Some(error.text().to_owned())),
            }
        }
        // What is not complete is bounded, too.
        assert!(reader.buffer.len() <= limits.bytes_max + piece.len());
    }
    (requests, None)
}

/// What redis-protocol finds in front, if it is an array of bulk strings.
fn decoded(bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    // It recurses without a bound: only what cannot is given to it.
    if bytes.iter().filter(|byte| **byte == b'*').count() > 1 {
        return None;
    }
    let (frame, ..) = decode_bytes_mut(&mut BytesMut::from(bytes)).ok()??;
    let BytesFrame::Array(words) = frame else { return None };
    words.into_iter().map(|word| if let BytesFrame::BulkString(word) = word { Some(word.to_vec()) } else { None }).collect()
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
    if let (Some(first), true) = (whole.0.first(), bytes.starts_with(b"*"))
        && let Some(other) = decoded(bytes)
        && !other.is_empty()
    {
        assert_eq!(*first, other);
    }
});
