//! Every bound, with its reason. What is bounded by configuration stands in config.rs.

use std::time::Duration;

/// Within this time of its arrival every STOCK and COUPON command is answered (commands.md).
pub const REPLY_WITHIN: Duration = Duration::from_millis(100);

/// When the sidecar stops waiting for Redis: what is left of [`REPLY_WITHIN`] is for writing the reply and for a late wake-up.
pub const OPERATION_WITHIN: Duration = Duration::from_millis(85);

const _: () = assert!(OPERATION_WITHIN.as_millis() < REPLY_WITHIN.as_millis());

/// Operations in one script call: it keeps Redis busy for 1 to 3 ms at the most, and everybody else waits that long.
pub const BATCH_OPERATIONS_MAX: usize = 512;

/// Keys in one script call: `unpack` in Redis's Lua takes 7,999 values, and MSET needs two a key.
pub const BATCH_KEYS_MAX: usize = 3_000;

/// Bytes of one script call, which are also about the bytes of its outbox entry.
pub const BATCH_BYTES_MAX: usize = 256 * 1024;

/// Operations that may wait for Redis in one lane. At 10,000 a second, far below what Redis takes, more than this would only wait to
/// be refused at its deadline.
pub const LANE_QUEUE_MAX: usize = 100_000;

/// How long an operation waits before it is tried again while somebody else holds its coupon's lock.
pub const LOCKED_RETRY_AFTER: Duration = Duration::from_millis(5);

/// How often an idle connection to Redis is tried, so that a dead one is replaced before it is needed.
pub const HEARTBEAT_EVERY: Duration = Duration::from_millis(500);

/// The pauses between tries to connect: short enough not to be noticed, long enough not to be a load.
pub const RECONNECT_MIN: Duration = Duration::from_millis(20);
pub const RECONNECT_MAX: Duration = Duration::from_secs(1);
