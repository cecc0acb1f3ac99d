//! Listener and connections. Knows no command's meaning.
//!
//! - [`listener`]: accepts, and turns away what is too many.
//! - [`connection`]: reads, dispatches, writes; `stream`: the bytes of one, plain or through TLS.

pub mod connection;
pub mod listener;
mod stream;

pub use listener::serve;
