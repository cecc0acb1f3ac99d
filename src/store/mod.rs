//! Everything on Redis: connections with the run id of the process behind them, keys, scripts, the combiner. The only place
//! that uses the `redis` crate.

pub mod connection;
pub mod keys;
pub mod partition;
pub mod stream;

pub use connection::{Connection, Error};
pub use partition::Partition;
