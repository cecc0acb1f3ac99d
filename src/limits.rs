//! (being written)

/// The most clients that `max_clients` may permit. Each takes a file descriptor and some ten KiB: a million is what one machine carries.
pub const MAX_CLIENTS_MAX: u64 = 1_000_000;

/// The longest `shutdown_timeout_ms`: five minutes. What takes longer is killed by whoever supervises us anyway.
pub const SHUTDOWN_TIMEOUT_MAX_MS: u64 = 300_000;

/// The shortest `idempotency.window_ms`: a minute, below which an ordinary client's retries would outlive it.
pub const IDEMPOTENCY_WINDOW_MIN_MS: u64 = 60_000;

/// The longest `idempotency.window_ms`: a day, since every REQUEST id of a window is in Redis's memory.
pub const IDEMPOTENCY_WINDOW_MAX_MS: u64 = 86_400_000;
