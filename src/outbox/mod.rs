//! From what the scripts appended in Redis to Postgres: the relay, and the verifier that compares both before anything is sold.

mod proof;
pub mod relay;
mod retry;
mod slice;
mod trim;
pub mod verify;

pub use relay::Relay;
