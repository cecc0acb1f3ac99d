//! What time it is at Redis, judged from here.

use std::time::Instant;

/// Redis's clock as last heard. Judged from when an answer arrived, so the guess is never ahead of the real one by more than the clocks
/// drift apart in between: a deadline given by it errs to the early side, where nothing is executed.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    heard: Instant,
    redis_ms: i64,
}

impl Clock {
    /// Redis said `redis_ms` (Unix ms), and its answer is here now.
    pub fn heard(redis_ms: i64) -> Self {
        Self { heard: Instant::now(), redis_ms }
    }

    /// Redis's Unix time in ms at `instant`, before or after it was heard.
    pub fn at(&self, instant: Instant) -> i64 {
        let ms = |duration: std::time::Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        match instant.checked_duration_since(self.heard) {
            Some(later) => self.redis_ms.saturating_add(ms(later)),
            None => self.redis_ms.saturating_sub(ms(self.heard.duration_since(instant))),
        }
    }
}
