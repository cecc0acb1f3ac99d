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

/// The most clients that `max_clients` may permit. Each takes a file descriptor and some ten KiB: a million is what one machine carries.
pub const MAX_CLIENTS_MAX: u64 = 1_000_000;

/// The longest `shutdown_timeout_ms`: five minutes. What takes longer is killed by whoever supervises us anyway.
pub const SHUTDOWN_TIMEOUT_MAX_MS: u64 = 300_000;

/// The shortest `idempotency.window_ms`: a minute, below which an ordinary client's retries would outlive it.
pub const IDEMPOTENCY_WINDOW_MIN_MS: u64 = 60_000;

/// The longest `idempotency.window_ms`: a day, since every REQUEST id of a window is in Redis's memory.
pub const IDEMPOTENCY_WINDOW_MAX_MS: u64 = 86_400_000;

/// Products in one command: an order rarely has more lines, and each adds to what one script call does.
pub const PRODUCTS_MAX: usize = 256;

/// Coupons of one kind that a user may have: they all stand in one hash field, which every issue reads and writes.
pub const PER_USER_MAX: i64 = 1_000;

/// What COUNT of a SCAN may ask for: it is done in one go, while every sale waits.
pub const SCAN_COUNT_MAX: i64 = 1_000;

/// How long a reply waits for a confirmation by default: that of a command whose default is ACK postgres, and of others.
pub const ACK_POSTGRES_WITHIN: Duration = Duration::from_secs(5);
pub const ACK_WITHIN: Duration = Duration::from_millis(100);

/// How often Redis and Postgres are compared anyway; how soon again where it could not be done; how long one comparison may take.
pub const VERIFY_EVERY: Duration = Duration::from_secs(5);
pub const VERIFY_AGAIN_AFTER: Duration = Duration::from_millis(200);
pub const VERIFY_WITHIN: Duration = Duration::from_secs(5);
