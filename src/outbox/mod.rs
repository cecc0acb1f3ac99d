//! From what the scripts appended in Redis to Postgres: the relay; the verifier, which compares both before anything is sold; the loader,
//! which finds in Postgres what Redis does not have.

pub mod clerk;
pub mod inbox;
pub mod loader;
mod proof;
pub mod relay;
mod retry;
mod slice;
mod trim;
pub mod verify;

pub use relay::Relay;
