//! Bytes to requests and replies to bytes, in RESP2 and RESP3. Knows no command.
//!
//! - [`reader`]: finds whole requests in what a client sent, and refuses what is too large before it is buffered.
//! - [`request`]: what it finds: words in one piece of memory.
//! - [`inline`]: requests typed by hand (`PING\r\n`), with Redis's quoting.
//! - [`reply`]: what a command answers, and how it is written.
//! - [`pipeline`]: the replies of one connection, in the order of its requests.

pub mod inline;
pub mod pipeline;
pub mod reader;
pub mod reply;
pub mod request;

pub use pipeline::{Pipeline, Ready, Stamp, Ticket};
pub use reader::{Limits, ProtocolError, Reader};
pub use reply::{Encoder, Protocol, Reply};
pub use request::Request;

/// Redis Cluster's slot of a key: CRC16 modulo 16,384.
pub fn keyslot(key: &[u8]) -> u16 {
    redis_protocol::redis_keyslot(key)
}
