//! Everything on Postgres: the connection, migrations, applying what the outbox carries, and the queries. The only place that
//! uses the `sqlx` crate.
//!
//! [`apply`] is the heart: one transaction takes a run of outbox entries, and the row in `holdfast.partition` that it locks says
//! which of them Postgres has already.

pub mod adopt;
pub mod apply;
pub mod archive;
pub mod audit;
mod changes;
pub mod connection;
pub mod coupon;
mod coupon_shelf;
mod coupon_write;
pub mod dead_letter;
pub mod drift;
pub mod error;
pub mod history;
pub mod import;
pub mod inbox;
pub mod lock;
pub mod migrate;
pub mod order;
mod order_shelf;
mod outside;
pub mod partition;
mod prune;
pub mod refill;
pub mod salvage;
pub mod sidecar;
pub mod stock;
mod write;

#[cfg(test)]
pub mod testing;

pub use apply::{Applied, apply};
pub use connection::{blockers, connect, ping};
pub use dead_letter::apply_parking;
pub use error::Error;
pub use migrate::migrate;
pub use partition::PartitionRow;
pub use prune::prune;
pub use sqlx::PgConnection;

/// A position's number as Postgres stores it. Both halves of a position stay below 2^53.
fn to_bigint(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A number that a CHECK keeps from being negative.
fn from_bigint(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}
