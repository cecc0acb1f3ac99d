//! Everything on Redis: connections with the run id of the process behind them, keys, scripts, the combiner. The only place
//! that uses the `redis` crate.

mod bound;
mod clock;
pub mod connection;
pub mod copies;
pub mod coupon;
pub mod expiry;
mod key_list;
pub mod keys;
pub mod lane;
pub mod lock;
pub mod low;
pub mod meta;
mod metered;
mod pack;
pub mod partition;
pub mod reads;
pub mod refill;
pub mod replica;
pub mod requests;
pub mod script;
pub mod settle;
pub mod snapshot;
pub mod sold_out;
pub mod stock;
pub mod stream;
pub mod survey;
pub mod sweep;
pub mod trial;
mod words;

pub use connection::{Connection, Error};
pub use partition::Partition;
