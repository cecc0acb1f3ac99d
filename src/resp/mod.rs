//! (being written)

/// Redis Cluster's slot of a key: CRC16 modulo 16,384.
pub fn keyslot(key: &[u8]) -> u16 {
    redis_protocol::redis_keyslot(key)
}
