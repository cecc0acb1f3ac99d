//! Listener, connections, sessions. Knows no command's meaning.
//!
//! - [`listener`]: accepts, and turns away what is too many.
//! - [`connection`]: reads, dispatches, writes.
//! - [`session`]: what is known of one client; [`registry`]: of all of them, for CLIENT LIST.

pub mod connection;
pub mod listener;
pub mod registry;
pub mod session;

pub use listener::serve;
