//! The thresholds of the low-stock event.

use super::{Connection, Error, keys};
use crate::limits::REFILL_KEYS;

/// Reads the thresholds of products, in their order; `None` where a product has none.
pub async fn thresholds(connection: &mut Connection, products: &[&str]) -> Result<Vec<Option<i64>>, Error> {
    let mut found = Vec::with_capacity(products.len());
    for products in products.chunks(REFILL_KEYS) {
        let value = connection.send(redis::cmd("HMGET").arg(keys::LOW).arg(products)).await?;
        let texts: Vec<Option<String>> = redis::from_redis_value(value).map_err(redis::RedisError::from)?;
        found.extend(texts.into_iter().map(|text| text.and_then(|text| text.parse().ok())));
    }
    Ok(found)
}
