//! What one client may take of the server: the settings of `[auth]` and `[limits]`, for those who serve it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::limits;
use crate::resp::Limits;

/// See the module. Shared by every thread.
#[derive(Debug)]
pub struct Bounds {
    /// What a request may hold, before AUTH and after it.
    pub stranger: Limits,
    pub known: Limits,
    /// How long a client may take to show who it is, and how often it may be wrong.
    pub auth_within: Duration,
    pub auth_failures: u32,
    /// By how much longer each further wrong password of an address is answered.
    pub auth_delay: Duration,
    /// Requests of one connection that wait for their reply: beyond, it is not read.
    pub in_flight: usize,
    /// Unsent bytes of one connection: beyond, it is not read, and no message comes.
    pub output: usize,
    /// Bytes that all clients of a thread may have sent of requests that are not complete: beyond, who has sent much is closed.
    pub input: usize,
    /// How long a client may take none of the bytes that wait for it.
    pub stall: Duration,
    /// After how long a silence of a client the kernel asks whether it is there.
    pub keepalive: Duration,
    idle_ms: AtomicU64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            stranger: Limits::STRANGER,
            known: Limits::KNOWN,
            auth_within: limits::AUTH_WITHIN,
            auth_failures: limits::AUTH_FAILURES,
            auth_delay: limits::AUTH_DELAY,
            in_flight: limits::IN_FLIGHT_MAX,
            output: limits::OUTPUT_SOFT_MAX,
            input: limits::INPUT_TOGETHER_MAX,
            stall: limits::OUTPUT_STALL_MAX,
            keepalive: limits::KEEPALIVE,
            idle_ms: AtomicU64::new(0),
        }
    }
}

impl Bounds {
    /// How long a client may be silent; `None`: for ever.
    pub fn idle(&self) -> Option<Duration> {
        match self.idle_ms.load(Ordering::Relaxed) {
            0 => None,
            ms => Some(Duration::from_millis(ms)),
        }
    }

    /// Changes it, also for the clients that are connected. Zero: for ever.
    pub fn set_idle(&self, idle: Duration) {
        self.idle_ms.store(u64::try_from(idle.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}
