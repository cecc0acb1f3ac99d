//! SLOWLOG: the commands that took longest, by name. What they were given is not kept: it may be somebody's, and would be copied for each
//! command that turns out fast.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::spec::{ADMIN, LOADING, SHOWS, Spec, text};
use super::{Step, describe};
use crate::domain::quantity;
use crate::limits::{SLOWLOG_LEN, SLOWLOG_LEN_MAX, SLOWLOG_SLOWER_THAN};
use crate::resp::Reply;
use crate::session::client::Client;

/// One command that took long.
#[derive(Clone, Debug)]
struct Entry {
    id: u64,
    at: SystemTime,
    took: Duration,
    name: &'static str,
    address: SocketAddr,
    client: String,
}

/// The newest of them. Shared by every thread.
#[derive(Debug)]
pub struct SlowLog {
    /// The newest first.
    entries: Mutex<VecDeque<Entry>>,
    next_id: AtomicU64,
    slower_than_us: AtomicU64,
    len_max: AtomicUsize,
}

impl Default for SlowLog {
    fn default() -> Self {
        Self {
            entries: Mutex::default(),
            next_id: AtomicU64::new(0),
            slower_than_us: AtomicU64::new(u64::try_from(SLOWLOG_SLOWER_THAN.as_micros()).unwrap_or(u64::MAX)),
            len_max: AtomicUsize::new(SLOWLOG_LEN),
        }
    }
}

impl SlowLog {
    /// Notes the command if it was slow, its wait for Postgres or a lock included.
    pub fn note(&self, name: &'static str, took: Duration, client: &Client) {
        if took.as_micros() < u128::from(self.slower_than_us.load(Ordering::Relaxed)) {
            return;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let entry = Entry { id, at: SystemTime::now(), took, name, address: client.address, client: client.profile().name.clone() };
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.push_front(entry);
        entries.truncate(self.len_max.load(Ordering::Relaxed));
    }

    /// The settings as CONFIG GET shows them.
    pub fn settings(&self) -> [(&'static str, String); 2] {
        let slower_than = match self.slower_than_us.load(Ordering::Relaxed) {
            u64::MAX => "-1".to_owned(),
            us => us.to_string(),
        };
        [("slowlog-log-slower-than", slower_than), ("slowlog-max-len", self.len_max.load(Ordering::Relaxed).to_string())]
    }

    /// From how many microseconds on a command is slow; -1: never. `None` for what is no such number.
    pub fn slower_than(value: &[u8]) -> Option<u64> {
        if value == b"-1" { Some(u64::MAX) } else { u64::try_from(quantity::parse(value, 0, i64::MAX)?).ok() }
    }

    pub fn set_slower_than(&self, us: u64) {
        self.slower_than_us.store(us, Ordering::Relaxed);
    }

    /// How many are kept. `None` for what is no such number.
    pub fn len_max(value: &[u8]) -> Option<usize> {
        usize::try_from(quantity::parse(value, 0, SLOWLOG_LEN_MAX)?).ok()
    }

    pub fn set_len_max(&self, len_max: usize) {
        self.len_max.store(len_max, Ordering::Relaxed);
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).truncate(len_max);
    }
}

const SHOW: u32 = ADMIN | LOADING | SHOWS;

pub static SLOWLOG: Spec =
    Spec::new("SLOWLOG", "Shows the commands that took longer than `slowlog-log-slower-than`, by name, waits included.")
        .flags(SHOW)
        .example("SLOWLOG LEN")
        .subcommands(&[&GET, &LEN, &RESET, &HELP]);

static GET: Spec = Spec::new("SLOWLOG|GET", "Lists the newest ones: 10, or so many; -1: all.")
    .args(&[text("count", 20).optional()])
    .flags(SHOW)
    .complexity("O(N) where N is the number of entries")
    .reply("array of `id unix_seconds microseconds [command] address name`")
    .run(|call| {
        let count = match call.args.maybe_text("count").map(|count| (count, quantity::parse(count, 0, i64::MAX))) {
            None => 10,
            Some((b"-1", _)) => usize::MAX,
            Some((_, Some(count))) => usize::try_from(count).unwrap_or(usize::MAX),
            Some(_) => return Step::Reply(Reply::error("ERR count should be greater than or equal to -1")),
        };
        let entries = call.cx.slow.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = entries.iter().take(count);
        let integer = |number: u128| Reply::Integer(i64::try_from(number).unwrap_or(i64::MAX));
        let entry = |entry: &Entry| {
            Reply::Array(vec![
                integer(u128::from(entry.id)),
                integer(u128::from(entry.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())),
                integer(entry.took.as_micros()),
                Reply::Array(entry.name.split('|').map(Reply::text).collect()),
                Reply::text(entry.address.to_string()),
                Reply::text(entry.client.clone()),
            ])
        };
        Step::Reply(Reply::Array(shown.map(entry).collect()))
    });

static LEN: Spec = Spec::new("SLOWLOG|LEN", "Counts them.").flags(SHOW).reply("integer").run(|call| {
    let entries = call.cx.slow.entries.lock().unwrap_or_else(PoisonError::into_inner);
    Step::Reply(Reply::Integer(i64::try_from(entries.len()).unwrap_or(i64::MAX)))
});

static RESET: Spec = Spec::new("SLOWLOG|RESET", "Forgets them.").flags(ADMIN | LOADING).run(|call| {
    call.cx.slow.entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
    Step::Reply(Reply::ok())
});

static HELP: Spec = Spec::new("SLOWLOG|HELP", "Lists the subcommands.")
    .flags(LOADING)
    .reply("array of text")
    .run(|_| Step::Reply(describe::help(&SLOWLOG)));

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::command::tests::Wire;

    #[test]
    fn what_was_slow_is_listed_by_name_the_newest_first() {
        let mut wire = Wire::new();
        assert_eq!(wire.send("SLOWLOG LEN"), ":0\r\n");
        let note = |wire: &Wire, name, ms| wire.cx.slow.note(name, Duration::from_millis(ms), wire.client());
        note(&wire, "STOCK.SET", 99);
        note(&wire, "STOCK.SET", 100);
        note(&wire, "CLIENT|LIST", 250);
        assert_eq!(wire.send("SLOWLOG LEN"), ":2\r\n");
        let text = wire.send("SLOWLOG GET 1");
        assert!(text.starts_with("*1\r\n*6\r\n:1\r\n:") && text.contains(":250000\r\n*2\r\n$6\r\nCLIENT\r\n$4\r\nLIST\r\n"), "{text}");
        assert!(wire.send("SLOWLOG GET").starts_with("*2\r\n") && wire.send("SLOWLOG GET -1").starts_with("*2\r\n"));
        assert_eq!(wire.send("CONFIG SET slowlog-max-len 1 slowlog-log-slower-than -1"), "+OK\r\n");
        note(&wire, "STOCK.SET", 5_000);
        assert_eq!(wire.send("SLOWLOG LEN"), ":1\r\n");
        assert_eq!(wire.send("SLOWLOG RESET"), "+OK\r\n");
        assert_eq!(wire.send("SLOWLOG GET"), "*0\r\n");
    }
}
