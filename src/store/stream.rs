//! (being written)
use redis::Value;

use super::Error;
use crate::domain::change::Entry;

/// Reads one entry as XRANGE and XREAD give it.
pub fn entry(value: Value) -> Result<Entry, Error> {
    let _ = value;
    Err(Error::Unexpected(String::new()))
}
