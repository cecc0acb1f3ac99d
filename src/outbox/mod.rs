//! From what the scripts appended in Redis to Postgres: the relay; the verifier, which compares both before anything is sold; the rebuild
//! of a Redis that lost its data; the loader, which finds in Postgres what Redis does not have.

pub mod archivist;
pub mod by_hand;
pub mod clerk;
pub mod expirer;
mod handover;
pub mod herald;
pub mod inbox;
pub mod librarian;
pub mod loader;
pub mod lock_epochs;
pub mod presence;
mod proof;
mod rebuild;
pub mod relay;
mod retry;
mod slice;
pub mod sweep;
mod trim;
pub mod verify;
pub mod weigh;

pub use relay::Relay;
