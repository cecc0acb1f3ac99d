//! What is known of the clients: of one, and of all of them. Below the commands, which read and change it, and below the server, which
//! makes it.
//!
//! - [`client`]: one client's session; [`registry`]: all of them, for CLIENT LIST.

pub mod client;
pub mod registry;

pub use client::Session;
pub use registry::Registry;
