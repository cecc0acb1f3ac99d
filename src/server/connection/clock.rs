//! When a client was heard of, and a timer until it may be too late with something.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

/// See the module.
pub struct Clock {
    /// Since when it is connected, or a stranger again, and when it has last sent something.
    pub opened: Instant,
    pub active: Instant,
    /// How long it could be silent when this was looked at last.
    pub idle: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Clock {
    /// Of a client that connects now.
    pub fn new() -> Self {
        Self { opened: Instant::now(), active: Instant::now(), idle: None, timer: None }
    }

    /// It has sent something.
    pub fn heard(&mut self, at: Instant) {
        self.active = at;
    }

    /// It begins anew as a stranger.
    pub fn begin(&mut self, at: Instant) {
        self.opened = at;
        self.timer = None;
    }

    /// It may be silent for so long from now on; `false` where that is nothing new.
    pub fn allow(&mut self, idle: Option<Duration>) -> bool {
        let is_new = self.idle != idle;
        if is_new {
            (self.idle, self.timer) = (idle, None);
        }
        is_new
    }

    /// Whether the timer runs.
    pub fn is_wound(&self) -> bool {
        self.timer.is_some()
    }

    /// Lets the timer run until then.
    pub fn wind(&mut self, until: Instant) {
        self.timer = Some(Box::pin(tokio::time::sleep_until(until.into())));
    }

    /// Waits for the timer, if it runs; then it does not any more.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(timer) = &mut self.timer else { return Poll::Pending };
        let over = timer.as_mut().poll(cx);
        if over.is_ready() {
            self.timer = None;
        }
        over
    }
}
