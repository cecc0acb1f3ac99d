//! Compares Redis with Postgres while both are in use, and brings together what differs.
//!
//! [`examine`] compares some products at one position and repairs what differs; [`judge`] says what a difference is and what to do about
//! it; [`coupons`] does both for coupons; [`walk`] goes over all of them. [`schedule`] does that on a schedule, [`request`] when a client asks (STOCK.SYNC).

mod coupons;
pub mod examine;
mod judge;
pub mod request;
pub mod schedule;
mod walk;

use std::time::Duration;

use crate::domain::Side;

/// How to reconcile.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How often products are compared.
    pub sync_every: Duration,
    /// How often Redis is given what only Postgres has.
    pub initialise_every: Duration,
    pub prefer: Side,
    /// Units, or coupons: what differs by more is frozen.
    pub auto_limit: i64,
}
