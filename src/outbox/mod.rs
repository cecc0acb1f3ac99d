//! Carries what the scripts appended to the outbox to Postgres.

mod proof;
pub mod relay;
mod retry;
mod slice;
mod trim;

pub use relay::Relay;
