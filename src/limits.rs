//! Every bound of the front, with the reason for its value.

use std::time::Duration;

/// Words in one request. A batch carries at most 3,000 keys to Redis, so more could not be served at once anyway.
pub const REQUEST_ARGS_MAX: usize = 4096;

/// Bytes in one argument. Ids are 128 bytes and the largest text is a pattern; this leaves room for a PING or ECHO that measures.
pub const REQUEST_BULK_MAX: usize = 1 << 20;

/// Bytes in one request, headers included: what one connection may make the server hold before it has said anything useful.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;

/// The same three before AUTH, as in Redis: strangers may say little.
pub const STRANGER_ARGS_MAX: usize = 10;
pub const STRANGER_BULK_MAX: usize = 16_384;
pub const STRANGER_BYTES_MAX: usize = 1 << 20;

/// Bytes in an inline command, as in Redis.
pub const INLINE_MAX: usize = 64 << 10;

/// Bytes in a `*n` or `$len` line. The longest number of 64 bits has 20 bytes; a line without an end cannot become valid after that.
pub const HEADER_MAX: usize = 32;

/// Bytes asked for in one read: the least for an idle connection, doubled up to the most while reads come back full.
pub const READ_MIN: usize = 4 << 10;
pub const READ_MAX: usize = 64 << 10;

/// Bytes read ahead while a command waits alone on its connection. Reading goes on only to notice that the client left.
pub const READ_AHEAD_MAX: usize = 256 << 10;

/// Requests of one connection that wait for their reply. Beyond it the connection is not read, so one client cannot fill every queue.
pub const IN_FLIGHT_MAX: usize = 1024;

/// Commands dispatched for one connection before the others get their turn.
pub const TURN_COMMANDS_MAX: usize = 256;

/// Unsent reply bytes of one connection beyond which nothing more of it is read or encoded.
pub const OUTPUT_SOFT_MAX: usize = 1 << 20;

/// How long a client may take no bytes while replies wait for it. It is stuck or gone: its memory goes to others.
pub const OUTPUT_STALL_MAX: Duration = Duration::from_secs(60);

/// Messages (subscriptions, lost locks) that wait on one connection. They come unasked, so a reader that falls behind is cut off.
pub const MESSAGES_MAX: usize = 4096;

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

const _: () = assert!(READ_MIN <= READ_MAX && READ_MAX <= READ_AHEAD_MAX && READ_AHEAD_MAX <= REQUEST_BYTES_MAX);
const _: () = assert!(REQUEST_BULK_MAX <= REQUEST_BYTES_MAX && STRANGER_BULK_MAX <= STRANGER_BYTES_MAX);
const _: () = assert!(TURN_COMMANDS_MAX <= IN_FLIGHT_MAX && REQUEST_ARGS_MAX <= u16::MAX as usize);
