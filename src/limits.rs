//! Every bound of Holdfast, each with its reason.

use std::time::Duration;

// Postgres: the connections of the relay and of the verifier.

/// How long connecting to Postgres, TLS and the first question may take: long enough for a far network, short enough that a dead
/// address does not hold back the next try.
pub const LEDGER_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Postgres ends a statement after this. A batch takes milliseconds; what takes this long waits for a disk that hangs.
pub const LEDGER_STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Postgres gives up a lock after this: whoever holds one of our rows longer is worth a line in the log, and the batch is retried.
pub const LEDGER_LOCK_TIMEOUT: Duration = Duration::from_secs(1);

/// Postgres ends our session when it sits in an open transaction this long: then we are gone, and others wait for the row we locked.
pub const LEDGER_IDLE_IN_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a migration waits for another sidecar's, or for a lock on a table.
pub const MIGRATION_LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// How often an idle relay asks Postgres whether it is there: a client hears within about a second that it is not.
pub const LEDGER_PING_EVERY: Duration = Duration::from_secs(1);

/// How long Postgres may stay silent before it counts as away. Longer than [`LEDGER_LOCK_TIMEOUT`], which is no silence.
pub const LEDGER_SILENCE_MAX: Duration = Duration::from_secs(3);

/// How long the relay waits for one transaction before it gives up the connection. Longer than any statement may take in Postgres, so
/// that only a network that swallows packets comes here.
pub const LEDGER_TRANSACTION_MAX: Duration = Duration::from_secs(30);

// The relay: from the outbox to Postgres.

/// At how many changes a batch is full: from here on one more change hardly makes the transaction cheaper for each.
pub const RELAY_CHANGES_GOAL: usize = 2_000;

/// The most changes of one transaction: a few tens of milliseconds, for which others wait. A single entry is never split.
pub const RELAY_CHANGES_MAX: usize = 5_000;

/// The most entries of one read. An entry is at most 256 KiB, so that the worst read is 64 MiB.
pub const RELAY_READ_ENTRIES_MAX: usize = 256;

/// At how many bytes a batch is full, whatever the number of its changes.
pub const RELAY_READ_BYTES_GOAL: usize = 8 << 20;

/// How long one read waits in Redis for the next entry: the relay notices within it that it shall stop.
pub const RELAY_BLOCK: Duration = Duration::from_millis(200);

/// How long Redis may take to answer the relay, on top of the time it was asked to block.
pub const OUTBOX_ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// The first wait after something failed; it doubles, up to [`RELAY_BACKOFF_MAX`].
pub const RELAY_BACKOFF_MIN: Duration = Duration::from_millis(10);

/// The longest wait between two tries: what comes back is found within a second.
pub const RELAY_BACKOFF_MAX: Duration = Duration::from_secs(1);

/// A failure that goes on is logged when it begins and then once in this time.
pub const RELAY_LOG_EVERY: Duration = Duration::from_secs(5);

/// After how many transient failures in a row the connection to Postgres is replaced: it may lead to what is no longer the primary.
pub const RELAY_TRANSIENT_TRIES: u32 = 5;

/// How long the relay waits before it looks again at an outbox that does not continue what Postgres has.
pub const RELAY_BROKEN_RETRY: Duration = Duration::from_secs(1);

/// How long the relay waits before it offers Postgres again what Postgres refused for its data.
pub const RELAY_REFUSED_RETRY: Duration = Duration::from_secs(3);

// The outbox: what has been applied stays a while, for whoever asks what became of a batch.

/// An applied entry stays until so many changes have been applied after it...
pub const OUTBOX_KEEP_CHANGES: u64 = 100_000;

/// ...and so much time has passed: every retry of a client comes sooner.
pub const OUTBOX_KEEP_TIME: Duration = Duration::from_secs(600);

/// Applied entries never take more of Redis's memory than this.
pub const OUTBOX_KEEP_BYTES: u64 = 256 << 20;

/// How often the relay trims.
pub const OUTBOX_TRIM_EVERY: Duration = Duration::from_secs(5);

/// How many places the relay remembers at which the outbox may be cut; when full, every second one is forgotten.
pub const OUTBOX_MARKS_MAX: usize = 4_096;
