//! What INFO and the metrics count of commands. Shared by every thread; its labels come from the table, so strangers cannot add any.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::table::Commands;
use crate::limits::ERROR_WORDS_MAX;
use crate::resp::Reply;

/// The counts of one command.
struct Meter {
    name: &'static str,
    calls: AtomicU64,
    failed: AtomicU64,
    micros: AtomicU64,
    ok_total: metrics::Counter,
    error_total: metrics::Counter,
    seconds: metrics::Histogram,
}

impl Meter {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            calls: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            micros: AtomicU64::new(0),
            ok_total: metrics::counter!("holdfast_commands_total", "cmd" => name, "result" => "ok"),
            error_total: metrics::counter!("holdfast_commands_total", "cmd" => name, "result" => "error"),
            seconds: metrics::histogram!("holdfast_command_seconds", "cmd" => name),
        }
    }
}

impl Meter {
    fn count(&self, count: usize, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.calls.fetch_add(count as u64, Ordering::Relaxed);
        self.micros.fetch_add(micros.saturating_mul(count as u64), Ordering::Relaxed);
        self.seconds.record_many(took.as_secs_f64(), count);
    }
}

/// One command's counts at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandCount {
    pub name: &'static str,
    pub calls: u64,
    pub failed: u64,
    /// From arrival to reply, all calls together.
    pub micros: u64,
}

/// The counts of all commands.
pub struct Stats {
    /// By command number, and one more for unknown commands.
    meters: Vec<Meter>,
    /// How often each error word was answered.
    errors: Mutex<BTreeMap<String, u64>>,
    pub started: Instant,
    pub started_at: SystemTime,
}

impl Stats {
    /// Made after the metrics recorder is installed: the handles are created here, once.
    pub fn new(commands: &Commands) -> Self {
        let names = commands.all().iter().map(|spec| spec.name).chain(["unknown"]);
        Self {
            meters: names.map(Meter::new).collect(),
            errors: Mutex::new(BTreeMap::new()),
            started: Instant::now(),
            started_at: SystemTime::now(),
        }
    }

    /// Counts a reply of the command with this number; numbers of none (messages) count nothing.
    pub fn replied(&self, number: usize, reply: &Reply, took: Duration) {
        match reply.error_word() {
            None => self.succeeded(number, 1, took),
            Some(word) => self.failed(number, word, 1, took),
        }
    }

    /// Counts so many replies that are errors of this word and took equally long.
    pub fn failed(&self, number: usize, word: &str, count: usize, took: Duration) {
        let Some(meter) = self.meters.get(number) else { return };
        meter.count(count, took);
        meter.failed.fetch_add(count as u64, Ordering::Relaxed);
        meter.error_total.increment(count as u64);
        self.count_error(word, count as u64);
    }

    /// Counts so many replies that are no errors and took equally long.
    pub fn succeeded(&self, number: usize, count: usize, took: Duration) {
        let Some(meter) = self.meters.get(number) else { return };
        meter.count(count, took);
        meter.ok_total.increment(count as u64);
    }

    fn count_error(&self, word: &str, more: u64) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = errors.get_mut(word) {
            *count += more;
        } else if errors.len() < ERROR_WORDS_MAX {
            errors.insert(word.to_owned(), more);
        }
    }

    /// Commands answered since the start or the last reset.
    pub fn commands_total(&self) -> u64 {
        self.meters.iter().map(|meter| meter.calls.load(Ordering::Relaxed)).sum()
    }

    /// The commands that were called, in the table's order.
    pub fn commands(&self) -> Vec<CommandCount> {
        let count = |meter: &Meter| CommandCount {
            name: meter.name,
            calls: meter.calls.load(Ordering::Relaxed),
            failed: meter.failed.load(Ordering::Relaxed),
            micros: meter.micros.load(Ordering::Relaxed),
        };
        self.meters.iter().map(count).filter(|count| count.calls > 0).collect()
    }

    /// The error words answered and how often.
    pub fn errors(&self) -> Vec<(String, u64)> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(word, count)| (word.clone(), *count)).collect()
    }

    /// CONFIG RESETSTAT; the metrics go on.
    pub fn reset(&self) {
        for meter in &self.meters {
            meter.calls.store(0, Ordering::Relaxed);
            meter.failed.store(0, Ordering::Relaxed);
            meter.micros.store(0, Ordering::Relaxed);
        }
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::table::TABLE;

    #[test]
    fn replies_are_counted_by_command_and_error_word() {
        let commands = Commands::new(TABLE);
        let stats = Stats::new(&commands);
        let (ping, _) = commands.named(b"ping").unwrap();
        stats.replied(ping, &Reply::ok(), Duration::from_micros(5));
        stats.replied(ping, &Reply::error("ERR no"), Duration::from_micros(5));
        stats.replied(commands.len(), &Reply::error("ERR unknown"), Duration::ZERO);
        stats.replied(usize::MAX, &Reply::Nil, Duration::ZERO);
        assert_eq!(stats.commands()[0], CommandCount { name: "PING", calls: 2, failed: 1, micros: 10 });
        assert_eq!((stats.commands_total(), stats.errors()), (3, vec![("ERR".to_owned(), 2)]));
        stats.reset();
        assert_eq!((stats.commands_total(), stats.errors()), (0, vec![]));
    }
}
