//! Log lines that clients can provoke: of each kind so many a second, and how many were left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::PROVOKED_LINES_A_SECOND;

/// A kind of line, which is limited by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    WrongPassword,
    ProtocolError,
    /// An HTTP request where Redis clients connect.
    Http,
    /// A connection that is closed for what it takes, or does not take.
    Closed,
    /// A command that a user has no right to.
    Denied,
}

/// Log lines are one for all of the process, so these are, too.
static LINES: [Limiter; 5] = [const { Limiter::new() }; 5];

/// Whether a line of this kind is to be written now, and how many were not since the one before, if any.
pub fn allows(line: Line) -> Option<Option<u64>> {
    let allowed = LINES[line as usize].allows(Instant::now());
    if allowed.is_none() {
        metrics::counter!("holdfast_suppressed_log_lines_total", "what" => line.name()).increment(1);
    }
    allowed
}

impl Line {
    const fn name(self) -> &'static str {
        match self {
            Self::WrongPassword => "wrong_password",
            Self::ProtocolError => "protocol_error",
            Self::Http => "http",
            Self::Closed => "closed",
            Self::Denied => "denied",
        }
    }
}

struct Limiter(Mutex<State>);

struct State {
    /// When this second began, and how many lines it has had.
    began: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Limiter {
    const fn new() -> Self {
        Self(Mutex::new(State { began: None, written: 0, left_out: 0 }))
    }

    fn allows(&self, now: Instant) -> Option<Option<u64>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.began.is_none_or(|began| now.saturating_duration_since(began) >= Duration::from_secs(1)) {
            (state.began, state.written) = (Some(now), 0);
        }
        if state.written >= PROVOKED_LINES_A_SECOND {
            state.left_out += 1;
            return None;
        }
        state.written += 1;
        Some(Some(std::mem::take(&mut state.left_out)).filter(|left_out| *left_out > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_lines_a_second_are_written_and_the_others_counted() {
        let (limiter, begin) = (Limiter::new(), Instant::now());
        let lines = |at: Duration, count: u32| (0..count).map(|_| limiter.allows(begin + at)).collect::<Vec<_>>();
        let first = lines(Duration::ZERO, PROVOKED_LINES_A_SECOND + 7);
        assert_eq!(first.iter().filter(|line| **line == Some(None)).count(), PROVOKED_LINES_A_SECOND as usize);
        assert_eq!(first.iter().filter(|line| line.is_none()).count(), 7);
        assert_eq!(lines(Duration::from_millis(999), 1), [None]);
        assert_eq!(lines(Duration::from_secs(1), 2), [Some(Some(8)), Some(None)]);
    }
}
