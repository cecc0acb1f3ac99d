//! Every bound, with its reason. What is bounded by configuration stands in config.rs.

use std::time::Duration;

/// What the setting `reply_within_ms` may be: below, a busy network would refuse what it could do; above, a client has given up.
pub const REPLY_WITHIN_MIN_MS: u64 = 20;
pub const REPLY_WITHIN_MAX_MS: u64 = 60_000;

/// When the sidecar stops waiting for Redis, where a command is to be answered within `reply`: what is left is for writing the reply and
/// for a late wake-up.
pub fn operation_within(reply: Duration) -> Duration {
    reply * 17 / 20
}

/// Keys that what waits in a lane touches, from which on some clients are led through a second one. So many take Redis a tenth of a millisecond and
/// more, in which this thread can work out answers and make the next batch; less, and two smaller batches cost both sides more than one.
pub const BESIDE_FROM_KEYS: usize = 128;

/// The part of a lane's time in which it asks what is parked whether it may go.
pub const PARKED_ASKED_PART: u32 = 10;

/// Operations in one script call: it keeps Redis busy for 1 to 3 ms at the most, and everybody else waits that long.
pub const BATCH_OPERATIONS_MAX: usize = 512;

/// Turns of the thread between two batches: in the first the replies are written, in the second is read what their clients ask for next. More
/// make a batch hardly larger (without pipelining 37 operations of 50 clients against 25 after one), and wait longer.
pub const GATHER_TURNS: usize = 2;

/// Keys in one script call: `unpack` in Redis's Lua takes 7,999 values, and MSET needs two a key.
pub const BATCH_KEYS_MAX: usize = 3_000;

/// Bytes of one script call, which are also about the bytes of its outbox entry.
pub const BATCH_BYTES_MAX: usize = 256 * 1024;

/// What the setting `stock.sold_out_ms` may be: what is restocked elsewhere sells here after that at the latest, which nobody notices.
pub const SOLD_OUT_MAX_MS: u64 = 50;

/// Products that are known to be sold out: as many as a flash sale has, some 100 bytes each. Of more, Redis is asked.
pub const SOLD_OUT_NOTES_MAX: usize = 100_000;

/// Room for such notes that is kept while there are none.
pub const SOLD_OUT_NOTES_KEPT: usize = 64;

/// Connections that may wait to be accepted: as many as connect at once when a fleet of services starts. The kernel's own bound counts, too.
pub const LISTEN_BACKLOG: u32 = 4_096;

/// What the setting `threads` may be.
pub const THREADS_MAX: u64 = crate::domain::request::THREADS_MAX;

/// The most threads that serve clients where their number follows from the cores: one Redis does not keep more of them busy.
pub const THREADS_BY_CORES_MAX: usize = 4;

/// Operations that may wait for Redis in one lane. At 10,000 a second, far below what Redis takes, more than this would only wait to
/// be refused at its deadline.
pub const LANE_QUEUE_MAX: usize = 100_000;

/// Of the time that an operation has, the part that it may wait for its batch: the rest is for a script call, and for what takes longer than
/// usual. What would wait longer is refused as it comes. Refused late, at its deadline, it would have kept others waiting: under more load
/// than Redis takes nearly all would be late.
pub const QUEUE_PART: u32 = 2;

/// However slow the last batches were, so many of them may wait: what comes at once when a stall is over is no overload.
pub const QUEUE_BATCHES_MIN: usize = 2;

/// What is not sent so long before its deadline is not sent at all, or twice as long as full batches take if that is longer: its answer would hardly be in time.
pub const SEND_WITHIN: Duration = Duration::from_millis(5);

/// How long one WAIT for a replica lasts. It ends as soon as the replica has everything, so a long one costs nothing; each reply has its own
/// time-out.
pub const REPLICA_WAIT: Duration = Duration::from_secs(1);

/// How long an operation waits before it is tried again that a script did not take, say because somebody else holds its coupon's lock.
pub const LOCKED_RETRY_AFTER: Duration = Duration::from_millis(5);

/// How long it is said of what waits for its coupon's turn who holds the lock, before that is looked up again.
pub const LOCKED_REASON_FOR: Duration = Duration::from_millis(20);

/// How long it is remembered of a coupon that nobody issues that somebody else holds its lock: longer than its issues may wait for a batch.
pub const LOCKED_FORGET_AFTER: Duration = Duration::from_secs(1);

/// How much time a try needs: with less left it would more likely end in doubt than in a decision.
pub const LOCKED_RETRY_WITHIN: Duration = Duration::from_millis(15);

/// How long the lock of a coupon is kept though nobody issues it: longer than a client takes from one reply to its next request, so that one
/// that issues alone does not acquire it each time.
pub const COUPON_IDLE: Duration = Duration::from_millis(2);

/// How many turns with the lock of a coupon that nobody waits for may follow each other without a release between them: each release costs two
/// round trips in which nothing is issued, a tenth of a turn. Behind the last the lock is left free for [`LOCK_STAY_OUT`], for those who try for it
/// without waiting.
pub const COUPON_TURNS_MAX: u32 = 10;

/// What the setting `coupon.lease_ms` may be: below a second a stall of the machine would end it, and longer others would wait for no gain
/// where a sidecar died.
pub const COUPON_LEASE_MIN_MS: u64 = 1_000;
pub const COUPON_LEASE_MAX_MS: u64 = 60_000;

// Locks.

/// What LEASE and the time of LOCK.EXTEND may be, in ms: below a second a stall of the machine would end it, above an hour it is no lease.
pub const LOCK_LEASE_MIN_MS: i64 = 1_000;
pub const LOCK_LEASE_MAX_MS: i64 = 3_600_000;

/// The lease where LEASE says nothing: Redisson's.
pub const LOCK_LEASE_DEFAULT_MS: i64 = 30_000;

/// The longest WAIT, in ms: beyond ten minutes a client should ask again.
pub const LOCK_WAIT_MAX_MS: i64 = 600_000;

/// What the setting `lock.session_lease_ms` may be: it is renewed at a third of it, which must be longer than a stall.
pub const LOCK_SESSION_LEASE_MIN_MS: u64 = 1_000;
pub const LOCK_SESSION_LEASE_MAX_MS: u64 = 3_600_000;

/// What the setting `lock.max_hold_ms` may be: a day is as long as any run of a job.
pub const LOCK_HOLD_MIN_MS: u64 = 1_000;
pub const LOCK_HOLD_MAX_MS: u64 = 86_400_000;

/// What the setting `lock.max_turn_ms` may be: a turn that lasts longer keeps other services waiting for no gain.
pub const LOCK_TURN_MAX_MS: u64 = 10_000;

/// How long a sidecar leaves a lock to others after its turn: a few round trips, enough for whoever was told to take it.
pub const LOCK_STAY_OUT: Duration = Duration::from_millis(5);

/// How long after a release a message on its channel is taken for our own: far longer than one travels.
pub const LOCK_ECHO_WITHIN: Duration = Duration::from_millis(50);

/// How long the first in line waits at most without looking, should nobody say that the lock is free: a lost message costs no more.
pub const LOCK_POLL: Duration = Duration::from_millis(250);

/// How long Redis may take for one script of a lock: beyond that the connection is replaced, and the script sent again under the same name.
pub const LOCK_CALL_WITHIN: Duration = Duration::from_secs(1);

/// How long what was done to a lock is remembered: a repetition comes within a few [`LOCK_CALL_WITHIN`].
pub const LOCK_NOTE: Duration = Duration::from_secs(5);

/// How long a release surely is remembered after it was asked for, with what its first sending may take.
pub const LOCK_KNOWN_FOR: Duration = Duration::from_secs(3);
const _: () = assert!(LOCK_KNOWN_FOR.as_millis() + 2 * LOCK_CALL_WITHIN.as_millis() <= LOCK_NOTE.as_millis());

/// How long what is counted is remembered: an owner's further acquisition, and its release. Done twice, it would be one too many, so it is
/// remembered over an outage of a minute; a key of some 150 bytes each in Redis.
pub const LOCK_COUNTED_NOTE: Duration = Duration::from_secs(65);

/// How long a release is sent again while the answer is lost: the last one has to come while the first is remembered.
pub const LOCK_RESEND_WITHIN: Duration = Duration::from_secs(60);
const _: () = assert!(LOCK_RESEND_WITHIN.as_millis() + 2 * LOCK_CALL_WITHIN.as_millis() <= LOCK_COUNTED_NOTE.as_millis());

/// How long the acquisition of a lock is sent again: Redis knows it for as long as it holds the lock by it. The longest lease, after which that
/// is over. Of an owner's further ones it knows the last for as long, the others for [`LOCK_COUNTED_NOTE`].
pub const LOCK_TRY_WITHIN: Duration = Duration::from_millis(LOCK_LEASE_MAX_MS.unsigned_abs());

/// How long after a lease must have ended it is looked whether it has: longer than a request to Redis takes, and shorter than [`LOCK_NOTE`].
pub const LOCK_ENDED_AFTER: Duration = Duration::from_secs(1);

/// How long it is waited before a connection for locks is tried again.
pub const LOCK_RECONNECT_AFTER: Duration = Duration::from_millis(20);

/// How long Postgres may take to say under which epoch tokens go on, before it is asked again.
pub const LOCK_EPOCH_WITHIN: Duration = Duration::from_secs(5);

/// How long it may take until a connection for locks can be used, before another one is tried: one whose other end accepts what it is sent and
/// answers nothing would be waited for for ever. Postgres has its time in it.
pub const LOCK_OPEN_WITHIN: Duration = Duration::from_secs(10);
const _: () = assert!(LOCK_OPEN_WITHIN.as_millis() > LOCK_EPOCH_WITHIN.as_millis() + LEDGER_CONNECT_TIMEOUT.as_millis());

/// No lock's own counter may lead to a higher epoch than this: it would leave too few below 2^21, where tokens reach 2^53.
pub const LOCK_EPOCH_MAX: u64 = 1 << 20;

/// Requests for an epoch that may wait: there is one at a time, and those that were given up.
pub const LOCK_EPOCH_REQUESTS_MAX: usize = 4;

/// Locks that one sidecar knows its clients to hold at a time: some 200 bytes each. Beyond that no session gets one, as it could not be renewed.
pub const LOCKS_HELD_MAX: usize = 1_000_000;

/// From so many on one that no session holds is not noted: then nobody counts that its lease has ended. The rest is left for sessions.
pub const LOCKS_COUNTED_MAX: usize = 900_000;
const _: () = assert!(LOCKS_COUNTED_MAX < LOCKS_HELD_MAX);

/// Channels in one SUBSCRIBE: Redis serves nobody else meanwhile.
pub const LOCK_CHANNELS_AT_ONCE: usize = 500;

/// Sessions whose locks are renewed by one script call, as many as Redisson's watchdog takes.
pub const LOCK_RENEWALS_AT_ONCE: usize = 100;

/// How often it is looked which sessions' locks are to be renewed and have been lost, and how often all the rest: what others hold, and who
/// waits.
pub const LOCK_LOOK_EVERY: Duration = Duration::from_millis(100);
pub const LOCK_LOOK_THOROUGHLY_EVERY: Duration = Duration::from_secs(1);

/// How long a lock that nobody waits for any more is still listened for: it is often wanted again.
pub const LOCK_LINGER: Duration = Duration::from_secs(5);

/// How long a shutdown waits for the last releases.
pub const LOCK_CLOSE_WITHIN: Duration = Duration::from_secs(1);

/// How often an idle connection to Redis is tried, so that a dead one is replaced before it is needed.
pub const HEARTBEAT_EVERY: Duration = Duration::from_millis(500);

/// A Redis that takes longer for its clock does not answer: it hangs, or the network does.
pub const HEARTBEAT_WITHIN: Duration = Duration::from_secs(1);

/// After so long without a sign of life from the other end the kernel gives a connection up, and the lane opens another.
pub const REDIS_SILENCE_MAX: Duration = Duration::from_secs(10);

/// The pauses between tries to connect: short enough not to be noticed, long enough not to be a load.
pub const RECONNECT_MIN: Duration = Duration::from_millis(20);
pub const RECONNECT_MAX: Duration = Duration::from_secs(1);

/// The most clients that `max_clients` may permit. Each takes a file descriptor and some ten KiB: a million is what one machine carries.
pub const MAX_CLIENTS_MAX: u64 = 1_000_000;

/// File descriptors that are needed besides those of clients: connections to Redis and Postgres, listeners, timers, the log; and HTTP's.
pub const FILES_BESIDES_CLIENTS: u64 = 128;

/// And for each thread: its connections to Redis, its listener, and what it waits with.
pub const FILES_OF_A_THREAD: u64 = 12;

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
pub const VERIFY_WITHIN: Duration = Duration::from_secs(15);

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

/// What the setting `outbox.copies_mib` may be.
pub const COPIES_MIB_MIN: u64 = 1;
pub const COPIES_MIB_MAX: u64 = 1 << 20;

/// How many batches of copies are looked at behind the first that stays: there are two lanes, which take turns. And how often all of them are.
pub const COPIES_LOOK_BEHIND: usize = 8;
pub const COPIES_LOOK_EVERY: usize = 64;

// The inbox: what other programs changed in Postgres.

/// How often the inbox is looked at without being told of anything: with it, what was not notified reaches Redis within a second.
pub const INBOX_POLL: Duration = Duration::from_millis(500);

/// How soon it is looked at again while a running transaction holds rows back: doubling, since one that runs for long will not end sooner.
pub const INBOX_BLOCKED_POLL_MIN: Duration = Duration::from_millis(10);
pub const INBOX_BLOCKED_POLL_MAX: Duration = Duration::from_millis(100);

/// Rows of one read, all of which may be on their way to Redis at once: half of what the lane's channel takes.
pub const INBOX_ROWS_MAX: usize = SERVER_CHANGES_MAX / 2;

/// How long a row waits before a sidecar takes it although another one carries the inbox: that one hangs.
pub const INBOX_OTHERS_AFTER: Duration = Duration::from_millis(300);

/// For how long rows that Redis has are kept, for people who look for them; how often, and how many at a time, the older ones are removed.
pub const INBOX_KEEP: Duration = Duration::from_secs(3_600);
pub const INBOX_PRUNE_EVERY: Duration = Duration::from_secs(10);
pub const INBOX_PRUNE_ROWS: usize = 10_000;

// Dead letters: changes that Postgres refuses for their data.

/// Requests about dead letters that may wait: they come from people.
pub const DEAD_LETTER_REQUESTS_MAX: usize = 16;

/// How many dead letters are listed where COUNT says nothing, and at most.
pub const DEAD_LETTERS_LISTED: usize = 100;
pub const DEAD_LETTERS_LISTED_MAX: i64 = 10_000;

/// How often they are counted without being told of a new one, and how many of their products are frozen in Redis at once.
pub const DEAD_LETTERS_EVERY: Duration = Duration::from_secs(2);
pub const DEAD_LETTERS_FROZEN_AT_ONCE: usize = SERVER_CHANGES_MAX / 2;

/// How often a sidecar says in Postgres that it runs, and for how long it counts as running afterwards: a rebuild waits so long for what one
/// that died may have answered.
pub const SIDECAR_RENEW_EVERY: Duration = Duration::from_secs(1);
pub const SIDECAR_LEASE: Duration = Duration::from_secs(3);

/// How long after that what it left behind in Redis is kept: any batch of it that is still on its way is far too late by then.
pub const SIDECAR_KEEP: Duration = Duration::from_secs(600);

/// How often what nobody asks for any more is removed from Redis.
pub const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// How long Redis remembers that a product was deleted, once Postgres has it too: for as long a backup of Postgres that is older may be told of
/// it by `holdfast rebuild --from redis`.
pub const DELETED_KEPT: Duration = Duration::from_secs(86_400);

/// Products that a sweep looks at in one go, of the deleted and of the unfrozen, and how many goes it has for the deleted: what an hour of
/// deletions at full speed leaves is looked at in an hour.
pub const SWEEP_NOTED: usize = 1_000;
pub const SWEEP_DELETED_GOES: usize = 50;

/// How many stretches of time back a sweep looks for buckets of REQUEST ids: what a stop of a quarter of an hour left. Older ones go by their
/// EXPIRE.
pub const SWEEP_STRETCHES: i64 = 15;

// Rebuilding Redis from Postgres.

/// For how long the sidecar that fills Redis keeps the others from it without a sign of life. It gives one with each page, which takes
/// milliseconds; one that died is replaced after this time.
pub const REBUILD_LEASE: Duration = Duration::from_secs(10);

/// How long Postgres may take for a page that it has to sort for: all the coupons of a shop.
pub const REBUILD_SORT: Duration = Duration::from_secs(120);

/// Rows of Postgres that are given to Redis at a time: a few milliseconds of each.
pub const REFILL_PAGE: usize = 5_000;

/// Entries of the outbox that a rebuild carries over at a time, and changes that it saves by name: a transaction of some tens of
/// milliseconds.
pub const REBUILD_READ_ENTRIES: usize = 16;
pub const SALVAGE_CHANGES_MAX: usize = 1_000;

/// Changes handed over by other sidecars that one verification takes up: more wait for the next.
pub const HANDOVER_MAX: i64 = 256;

/// Coupons that it may find to be locked, say, and leaves for the next while it goes on.
pub const HANDOVER_COUPONS_WAIT: usize = 8;

/// How long it waits for such a coupon at the most: for all of them less than a verification may take.
pub const HANDOVER_REPLY_WITHIN: Duration = Duration::from_secs(1);

/// How long a rebuild waits for what sidecars that run have answered: a million changes take half of it.
pub const HANDOVER_WITHIN: Duration = Duration::from_secs(60);

/// Keys of one command that removes or sets many: Redis serves nobody else meanwhile, which is about a millisecond.
pub const REFILL_KEYS: usize = 500;

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

/// How often it is looked how much of Redis's memory the outbox takes. At 40,000 changes a second some 20 MiB come in that time.
pub const OUTBOX_WEIGH_EVERY: Duration = Duration::from_secs(2);

/// What the settings `outbox.max_changes` and `outbox.max_mib` may be.
pub const OUTBOX_CHANGES_MAX: u64 = 1_000_000_000;
pub const OUTBOX_MIB_MAX: u64 = 1 << 20;

/// How often the relay trims.
pub const OUTBOX_TRIM_EVERY: Duration = Duration::from_secs(5);

/// How many places the relay remembers at which the outbox may be cut; when full, every second one is forgotten.
pub const OUTBOX_MARKS_MAX: usize = 4_096;

/// The defaults of `[limits]`. Words in one request: an order of five hundred products has no more.
pub const REQUEST_ARGS_MAX: usize = 1024;

/// Bytes in one argument. Ids are 128 bytes and the largest text is a pattern; this leaves room for a PING or ECHO that measures.
pub const REQUEST_BULK_MAX: usize = 64 << 10;

/// Bytes in one request, headers included: what one connection may make the server hold before it has said anything useful.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;

/// What these three may be set to.
pub const SETTABLE_ARGS: (u64, u64) = (16, 65_535);
pub const SETTABLE_BULK_KIB: (u64, u64) = (1, 1 << 10);
pub const SETTABLE_REQUEST_KIB: (u64, u64) = (64, 64 << 10);

/// What the number of requests in flight and the unsent bytes of a connection may be set to.
pub const SETTABLE_IN_FLIGHT: (u64, u64) = (64, 65_536);
pub const SETTABLE_OUTPUT_KIB: (u64, u64) = (64, 64 << 10);

/// What times of a connection may be set to: from a second to a day.
pub const SETTABLE_TIME_MS: (u64, u64) = (1_000, 86_400_000);

/// The defaults of `[auth]`: how long a client may take to show who it is, and how many wrong passwords it may try.
pub const AUTH_WITHIN: Duration = Duration::from_secs(5);
pub const AUTH_FAILURES: u32 = 3;

/// The default of `auth.delay_ms`: by how much longer each further wrong password of an address is answered.
pub const AUTH_DELAY: Duration = Duration::from_millis(50);

/// Wrong passwords of one address that are answered at once: people mistype.
pub const GUESSES_FREE: u32 = 3;

/// How often `auth.delay_ms` an answer waits at most: a second by default, which leaves time for three before `auth.within_ms` ends.
pub const GUESS_DELAYS_MAX: u32 = 20;

/// In how many parts the names of an address queue for their turn: a service whose password is wrong holds up one of sixteen others, and whoever tries
/// one password with many names tries sixteen in the time of one.
pub const GUESS_QUEUES: u64 = 16;

/// Of `auth.within_ms`, the part that a name and a password may wait for their turn: what is left is for the rest of a handshake.
pub const GUESS_TURN_PART: u32 = 2;

/// After how long without a wrong password an address is forgotten.
pub const GUESSES_WITHIN: Duration = Duration::from_secs(60);

/// Addresses that are remembered, some 100 bytes each, and as many again for each of their queues: as many as clients may be connected by default.
pub const GUESS_ADDRESSES_MAX: usize = 10_000;

/// What `auth.delay_ms` may be set to: twenty times that has to be less than anybody waits.
pub const SETTABLE_AUTH_DELAY_MS: (u64, u64) = (0, 1_000);

/// What these may be set to.
pub const SETTABLE_AUTH_MS: (u64, u64) = (100, 60_000);
pub const SETTABLE_AUTH_FAILURES: (u64, u64) = (1, 1_000);

/// After how long a silence the kernel asks whether a client is there, by how many questions it finds out that it is not, and how long it
/// waits for an answer to each.
pub const KEEPALIVE: Duration = Duration::from_secs(60);
pub const KEEPALIVE_PROBES: u32 = 3;
pub const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);

/// The defaults of the same three before AUTH, as in Redis: strangers may say little.
pub const STRANGER_ARGS_MAX: usize = 10;
pub const STRANGER_BULK_MAX: usize = 16_384;
pub const STRANGER_BYTES_MAX: usize = 1 << 20;

/// What these may be set to: `HELLO 3 AUTH user password SETNAME name` has seven words.
pub const SETTABLE_STRANGER_ARGS: (u64, u64) = (7, SETTABLE_ARGS.1);
pub const SETTABLE_STRANGER_REQUEST_KIB: (u64, u64) = (1, SETTABLE_REQUEST_KIB.1);

/// Bytes in an inline command, as in Redis.
pub const INLINE_MAX: usize = 64 << 10;

/// Bytes in a `*n` or `$len` line. The longest number of 64 bits has 20 bytes; a line without an end cannot become valid after that.
pub const HEADER_MAX: usize = 32;

/// Bytes asked for in one read: the least for an idle connection, doubled up to the most while reads come back full.
pub const READ_MIN: usize = 4 << 10;
pub const READ_MAX: usize = 64 << 10;
/// Read buffers of the least size that a thread keeps for whoever reads next: a quarter of a MiB. As many connections as have nothing under way and then
/// read in one turn are served by them; to allocate one costs as much as to read what a request of a few words is.
pub const READ_BUFFERS_KEPT_MAX: usize = 64;

/// Of the time that an operation has, the part that a connection is not read for after a refusal for want of time. A refusal costs little beside
/// reading and writing for it alone: so several are read at once.
pub const REFUSED_REST_PART: u32 = 5;

/// However long an operation may take, a connection rests no longer at once: other commands may be behind it, and that its client has left is
/// noticed only as it is read.
pub const REFUSED_REST_MAX: Duration = Duration::from_millis(20);

/// Bytes of the first read after a refusal for want of time: some 10 commands; of the next ones twice as many each, until one is refused again. All
/// that is read is answered in time, so what cannot be served stays in the sockets.
pub const REFUSED_READ_MAX: usize = 512;

/// Operations that are served for each that is refused for want of time. A refusal costs a third of what an operation does, of all that works for
/// it: so less than a tenth of the work is lost to them. Beyond it the rest is longer, up to the time that an operation has: then each connection is
/// read once more, and may be refused.
pub const SERVED_FOR_EACH_REFUSED: i64 = 4;

/// Of them, as many at once: a few milliseconds' work.
pub const REFUSED_AT_ONCE_MAX: i64 = 4_096;

/// Requests of one connection that wait for their reply. Beyond it the connection is not read, so one client cannot fill every queue.
pub const IN_FLIGHT_MAX: usize = 1024;

/// Commands dispatched for one connection before the others get their turn.
pub const TURN_COMMANDS_MAX: usize = 64;

/// Unsent reply bytes of one connection beyond which nothing more of it is read or encoded.
pub const OUTPUT_SOFT_MAX: usize = 1 << 20;

/// The same before AUTH: ten thousand strangers who read nothing shall not take the memory of others.
pub const OUTPUT_STRANGER_MAX: usize = 8 << 10;

/// Unsent reply bytes of all clients of one thread beyond which each gets only [`OUTPUT_STRANGER_MAX`]: a thousand that read nothing shall
/// not take a thousand times what one may.
pub const OUTPUT_TOGETHER_MAX: usize = 32 << 20;

/// The default of `limits.input_mib`: bytes that all clients of one thread may have sent of requests that are not complete. A thousand that send all
/// but the last byte of the largest request would take a GiB. And how much of that each may have whatever the others have: nearly every request. No
/// more is read ahead of a command that waits alone on its connection, which is done only to notice that the client has left.
pub const INPUT_TOGETHER_MAX: usize = 32 << 20;
pub const INPUT_ALWAYS_MAX: usize = 16 << 10;

/// The same before AUTH, where all others may have half as much: nearly every AUTH. Ten thousand strangers do not fill the other half, so that
/// known clients lose nothing by them.
pub const INPUT_STRANGER_MAX: usize = 1 << 10;

/// Bytes of a handshake, or of a record or message of TLS behind it, that is not complete: a record has 18 KiB at most, and the certificates of nearly
/// every client less.
pub const TLS_INCOMPLETE_MAX: usize = 32 << 10;

/// What `limits.input_mib` may be.
pub const SETTABLE_INPUT_MIB: (u64, u64) = (1, 1 << 20);

/// How long a client may take no bytes while replies wait for it. It is stuck or gone: its memory goes to others.
pub const OUTPUT_STALL_MAX: Duration = Duration::from_secs(60);

/// Messages (subscriptions, lost locks) that wait on one connection. They come unasked, so a reader that falls behind is cut off: once all clients of
/// one thread leave more than [`OUTPUT_TOGETHER_MAX`], also who has more than [`OUTPUT_STRANGER_MAX`] of them.
pub const MESSAGES_MAX: usize = 4096;
pub const MESSAGES_BYTES_MAX: usize = 1 << 20;

/// Bytes of messages with which a subscription may then still add its confirmations, which are not to have their client cut off.
pub const CONFIRMED_AT_ONCE_MAX: usize = OUTPUT_STRANGER_MAX / 2;

/// Messages on their way from where they are published to a thread that serves clients, as many as a burst of sales may make while the thread
/// is busy for a few milliseconds.
pub const HUB_QUEUE_MAX: usize = 8_192;

/// SLOWLOG: from how long on a command is slow, how many are kept, and how many may be.
pub const SLOWLOG_SLOWER_THAN: Duration = Duration::from_millis(100);
pub const SLOWLOG_LEN: usize = 128;
pub const SLOWLOG_LEN_MAX: i64 = 10_000;

/// Reading through to Redis: how long it may take, and the bytes of a reply, as it comes and as it is kept. More are not read.
pub const PASSED_WITHIN: Duration = Duration::from_secs(5);
pub const PASSED_REPLY_MAX: usize = 1 << 20;

/// How many keys, members, fields or entries one of these commands makes Redis walk over: less than a ms, in which it does nothing else.
pub const PASSED_ITEMS_MAX: i64 = 1_000;

/// Channels and patterns of one connection, and the bytes of one: an id of 128 bytes behind `coupon:events:` fits.
pub const SUBSCRIPTIONS_MAX: usize = 1_024;
pub const CHANNEL_MAX: usize = 256;

/// Of these, the patterns; and how many different ones all clients may have together: each message is compared with every one, which takes about
/// 0.1 ms for so many that begin as channels do.
pub const PATTERNS_MAX: usize = 64;
pub const PATTERNS_TOGETHER_MAX: usize = 1_024;

/// Bytes of all these patterns behind the first star of each, which may have to be compared again at each place of a channel: with channels of 141 bytes
/// 300,000 steps a message, less than a ms. And for how long messages are compared and handed on before others have their turn.
pub const PATTERN_TAILS_MAX: usize = 2 << 10;
pub const DELIVERING_MAX: Duration = Duration::from_millis(1);

/// How many of these bytes one connection may have: any one pattern, so that one does not take those of all.
pub const PATTERN_TAILS_EACH_MAX: usize = CHANNEL_MAX;
const _: () = assert!(8 * PATTERN_TAILS_EACH_MAX <= PATTERN_TAILS_MAX);

/// Different channels that all clients may have subscribed to together: with names of 256 bytes some 100 MB.
pub const CHANNELS_TOGETHER_MAX: usize = 1 << 18;

/// Subscriptions of all clients together, also to the same names: each takes some 100 bytes beside its name.
pub const SUBSCRIPTIONS_TOGETHER_MAX: usize = 1_000_000;

/// Of them, what PUBSUB CHANNELS shows, in bytes of memory, and how many bytes of its pattern it looks at, those at which it looks again included: as many
/// as a pattern of 8 bytes takes with as many channels as there may be.
pub const CHANNELS_SHOWN_BYTES_MAX: usize = 1 << 20;
pub const CHANNELS_STEPS_MAX: usize = 16 * CHANNELS_TOGETHER_MAX;

/// How many of these bytes a channel costs beside them: it is read from wherever it is in memory. And how many are looked at before others have their
/// turn: less than a ms' work, in which nobody else subscribes.
pub const CHANNEL_STEPS: usize = 8;
pub const CHANNELS_STEPS_AT_ONCE: usize = 1 << 16;

/// Bytes of a reply buffer that an idle connection may keep; a goal of 12 KiB an idle connection leaves little more.
pub const OUTPUT_KEEP_MAX: usize = 1 << 10;

/// Connections served at once, as in Redis. Redisson alone opens 25 an application.
pub const CLIENTS_MAX: usize = 10_000;

/// Pause after an accept that failed for want of file descriptors or memory: they do not come back faster by trying.
pub const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(10);
pub const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Bytes of a client's or a library's name, which CLIENT LIST repeats to everybody.
pub const CLIENT_NAME_MAX: usize = 256;

/// Bytes of a MATCH or CONFIG GET pattern: matching costs pattern times text.
pub const PATTERN_MAX: usize = 256;

/// Bytes that an error repeats of what the client sent: of a command's name, and of all its arguments. Redis's own bound.
pub const ERROR_ECHO_MAX: usize = 128;

/// Words a spec may declare. Matched arguments live in an array of this size, without allocation.
pub const SPEC_ARGS_MAX: usize = 12;

/// Bytes in a command's name, subcommand included: looked up through a buffer of this size on the stack.
pub const NAME_MAX: usize = 32;

/// The TIMEOUT option, in ms: beyond ten minutes a client should ask again instead.
pub const TIMEOUT_MS_MAX: i64 = 600_000;

/// Error words that Errorstats tells apart. They come from this program, but a backend's words may pass through.
pub const ERROR_WORDS_MAX: usize = 64;

const _: () = assert!(READ_MIN <= READ_MAX && READ_MAX <= REQUEST_BYTES_MAX);
const _: () = assert!(REQUEST_BULK_MAX <= REQUEST_BYTES_MAX && STRANGER_BULK_MAX <= STRANGER_BYTES_MAX);
const _: () = assert!(TURN_COMMANDS_MAX <= IN_FLIGHT_MAX && REQUEST_ARGS_MAX <= u16::MAX as usize);

/// Operations that are in doubt and may wait to be looked up in the ledger. Each is a query of two index scans, one after the other; what is
/// beyond it stays in doubt, and is asked for again.
pub const INQUIRIES_MAX: usize = 256;

/// Products that may wait to be looked up in Postgres, and how many are looked up at once. Asking for products that exist nowhere must
/// not become a load on Postgres.
pub const LOADS_MAX: usize = 1_024;
pub const LOAD_BATCH_MAX: usize = 256;

/// Changes that the server itself asks for and that wait for the lane: as many as one batch takes.
pub const SERVER_CHANGES_MAX: usize = BATCH_OPERATIONS_MAX;

/// How long Redis keeps an order that is over, in ms; lua/include/orders.lua says the same. Who asks later is answered from Postgres.
pub const ORDER_KEPT_MS: i64 = 86_400_000;

/// For how long units may be held for an order, in ms: 30 days. What is held for longer is sold.
pub const ORDER_TTL_MS_MAX: i64 = 30 * 86_400_000;

/// How often a sidecar looks for orders whose time has passed: they are to be over within a second of it.
pub const EXPIRE_EVERY: Duration = Duration::from_millis(250);
/// How long the right to expire orders lasts without being renewed, in ms: how much later they are over when its sidecar dies.
pub const EXPIRE_LEASE_MS: i64 = 600;
/// How many orders expire at once: a batch takes Redis some milliseconds, which others wait for.
pub const EXPIRE_AT_ONCE: usize = 200;
/// After how long one is tried again that cannot expire, in ms: a key of it is not what it should be, and waits for a person.
pub const STUCK_FOR_MS: i64 = 60_000;
/// How often Postgres is asked for orders that are held there long after their time, and after how long that is.
pub const OVERDUE_EVERY: Duration = Duration::from_secs(60);
pub const OVERDUE_AFTER_MS: i64 = 60_000;

/// How long a position is as text, at most: two numbers of 20 digits and a dash.
pub const POSITION_TEXT_MAX: usize = 41;

/// How often it is looked whether anybody listens to events: what happens before that is not told to them.
pub const EVENTS_LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long the outbox is waited for before it is looked again, and how many entries are read at once.
pub const EVENTS_BLOCK: Duration = Duration::from_millis(500);
pub const EVENTS_READ_ENTRIES: usize = 100;

/// How many changes STOCK.HISTORY shows at most, and if it is not told how many.
pub const HISTORY_COUNT_MAX: i64 = 1_000;
pub const HISTORY_COUNT: i64 = 20;

/// How many coupons of users go through one script where a coupon is loaded on its first use: Redis does nothing else meanwhile. Lua passes no
/// more than 8,000 arguments on.
pub const LOAD_USERS_MAX: usize = 2_000;

/// How long the look-up of a coupon may take with all who have it: some millions.
pub const LOAD_COUPON_WITHIN: Duration = Duration::from_secs(60);

/// How long it is waited before a piece of a coupon is given to Redis again.
pub const LOAD_PIECE_AGAIN: Duration = Duration::from_millis(20);

/// How long a look-up waits for Postgres to have what it needs: past that its clients have been told to try again.
pub const LOAD_WITHIN: Duration = Duration::from_secs(2);

/// For how long, and of how many products, it is remembered that Postgres does not have them either.
pub const ABSENT_FOR: Duration = Duration::from_secs(1);
pub const ABSENT_MAX: usize = 10_000;

/// How often the thread that serves clients looks whether it stood still, from how long a stretch on that counts (timers are a ms or two late
/// by themselves, and work may begin when the wait for a tick ends), and how many stretches are remembered: those of the last seconds, and no reply is late by more.
pub const STALL_EVERY: Duration = Duration::from_millis(5);
pub const STALL_MIN: Duration = Duration::from_millis(6);
pub const STALLS_MAX: usize = 512;

/// How often the thread that serves clients shows that it lives, and after how long a silence it counts as dead: far beyond any stall of
/// the machine's scheduler.
pub const PULSE_EVERY: Duration = Duration::from_millis(500);
pub const PULSE_MAX: Duration = Duration::from_secs(15);

// The reconciler: Redis and Postgres compared at one position.

/// What the reconciler's two intervals may be: below, rounds would only wait for one another; above, a day passes with a difference.
pub const RECONCILE_EVERY_MIN_MS: u64 = 1_000;
pub const RECONCILE_EVERY_MAX_MS: u64 = 86_400_000;

/// Products in one comparison: the script that reads them keeps Redis busy for about half a millisecond, and every sale waits that long.
pub const RECONCILE_PRODUCTS: usize = 500;

/// Coupons in one comparison, which takes several commands of each.
pub const RECONCILE_COUPONS: usize = 200;

/// The pause between two comparisons of a round: so at most a tenth of Redis's time goes into them.
pub const RECONCILE_PAUSE: Duration = Duration::from_millis(5);

/// The newest rows of the ledger that one round looks through for the products that have changed. At 2,000 changes a second it is all of
/// a minute's; the others come with the pass over everything.
pub const RECONCILE_CHANGES_MAX: i64 = 120_000;

/// Products of the pass over everything that one round compares: a million products in 20 rounds, and a round within seconds.
pub const RECONCILE_ROUND_PRODUCTS: usize = 50_000;

/// Coupons of the pass over everything that one round compares or initialises: more than most shops ever have.
pub const RECONCILE_ROUND_COUPONS: usize = 20_000;

/// Products that one round of initialising looks at: a million are looked at within half a minute.
pub const INITIALISE_ROUND_PRODUCTS: usize = 1_000_000;

/// Calls of SCAN in one round, in search of products that only Redis has, and keys that each looks at.
pub const RECONCILE_SCANS: usize = 100;
pub const RECONCILE_SCAN_COUNT: usize = 500;

/// How often one comparison is repeated for what moved while it was made. Each time somebody else's correction came between.
pub const RECONCILE_TRIES: usize = 10;

/// Corrections in one go: they share a batch with the clients' operations, which shall not wait for them.
pub const RECONCILE_CHANGES_AT_ONCE: usize = 100;

/// How long one comparison of the schedule may take, the wait for Postgres included: a round that Postgres is too far behind for is
/// left out.
pub const RECONCILE_WITHIN: Duration = Duration::from_secs(5);

/// The most units that `reconcile.auto_limit` may permit: as much as one command may move.
pub const RECONCILE_AUTO_LIMIT_MAX: u64 = 1_000_000_000_000;

/// STOCK.SYNCs that may wait: each may take seconds, and they are done one after the other.
pub const SYNCS_MAX: usize = 16;

/// By when after its arrival a STOCK.SYNC is answered, and by when the reconciler has to be done with it.
pub const SYNC_REPLY_WITHIN: Duration = Duration::from_secs(5);
pub const SYNC_WITHIN: Duration = Duration::from_millis(4_500);

/// Products in the answer of one STOCK.SYNC: it stops when it has found so many.
pub const SYNC_DRIFTS_MAX: usize = 1_000;

// Users.

/// Users of a users file, and its bytes: each AUTH compares with all of them.
pub const USERS_MAX: usize = 1_000;
pub const USERS_FILE_MAX: u64 = 1 << 20;

/// Bytes of a user's name, its passwords, which are two while one is replaced, and its patterns, which each of its commands may be compared
/// with.
pub const USER_NAME_MAX: usize = 64;
pub const USER_SECRETS_MAX: usize = 8;
pub const USER_PATTERNS_MAX: usize = 64;

/// Log lines of one kind that clients may provoke in a second: enough to see what happens, too few to fill a disk.
pub const PROVOKED_LINES_A_SECOND: u32 = 10;

/// Bytes that the audit log and MONITOR repeat of one argument.
pub const AUDIT_ARGUMENT_MAX: usize = 128;

// Imports.

/// Lines that an import is ahead of Postgres: about two seconds of the relay's work, and all that has to be looked up where one goes on.
pub const IMPORT_AHEAD: usize = 50_000;

/// Lines of an import that wait for Redis at a time: some batches, so that Redis is never idle and others' sales wait for one only.
pub const IMPORT_AT_ONCE: usize = 4 * BATCH_OPERATIONS_MAX;

/// Products that are looked up in the ledger at a time where an import goes on.
pub const IMPORT_LOOK_UP: usize = 5_000;

/// How often an import writes down how far it is: what is done twice as often costs Postgres twice as many commits.
pub const IMPORT_NOTED_EVERY: Duration = Duration::from_millis(500);

/// Refused lines of an import that are named: past that the file is a wrong one.
pub const IMPORT_REFUSED_SHOWN: u64 = 1_000;
