//! Listener and connections. Knows no command's meaning.
//!
//! - [`listener`]: accepts, and turns away what is too many.
//! - [`connection`]: reads, dispatches, writes.

pub mod connection;
pub mod listener;

pub use listener::serve;
