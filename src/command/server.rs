//! The commands about the server that every Redis client may send: INFO CONFIG MODULE TIME DBSIZE LATENCY, and those of
//! Redis Cluster, which are refused in its words.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::connection::VERSION;
use super::slowlog::SlowLog;
use super::spec::{ADMIN, FAST, LOADING, SECRET, SHOWS, Spec, text};
use super::{Context, Step, describe, info};
use crate::domain::{glob, quantity};
use crate::limits::{CLIENT_NAME_MAX, ERROR_ECHO_MAX, MAX_CLIENTS_MAX, PATTERN_MAX, REQUEST_BULK_MAX, SETTABLE_TIME_MS};
use crate::resp::Reply;

/// An operator's command that only shows something.
const SHOW: u32 = ADMIN | LOADING | SHOWS;

/// What Redis says to what is no integer.
pub const NO_INTEGER: &str = "ERR value is not an integer or out of range";

/// An integer as strict as Redis: no `+`, no leading zeros, no spaces.
pub fn integer(text: &[u8]) -> Option<i64> {
    match text.strip_prefix(b"-") {
        Some(digits) => quantity::parse(digits, 1, i64::MAX).map(|number| -number),
        None => quantity::parse(text, 0, i64::MAX),
    }
}

const NO_CLUSTER: &str = "ERR This instance has cluster support disabled";

/// What CONFIG GET shows where nothing else says so: what clients and tools ask a Redis for.
pub fn settings() -> Vec<(&'static str, String)> {
    [
        ("appendonly", "no"),
        ("databases", "1"),
        ("io-threads", "1"),
        ("maxmemory", "0"),
        ("maxmemory-policy", "noeviction"),
        ("replica-read-only", "yes"),
        ("save", ""),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .to_vec()
}

/// What it shows as it is at the moment.
fn current(cx: &Context) -> Vec<(&'static str, String)> {
    let mut settings = cx.settings.borrow().clone();
    settings.extend(cx.slow.settings());
    settings.extend([
        ("maxclients", cx.registry.clients_max().to_string()),
        ("proto-max-bulk-len", cx.bounds.known.bulk_max.to_string()),
        ("tcp-keepalive", cx.bounds.keepalive.as_secs().to_string()),
        ("timeout", cx.bounds.idle().unwrap_or_default().as_secs().to_string()),
    ]);
    settings.sort_unstable();
    settings
}

/// A setting that may be changed while the server runs, until it ends.
enum Change {
    MaxClients(usize),
    Timeout(Duration),
    SlowerThan(u64),
    SlowLogLen(usize),
}

impl Change {
    /// Reads a setting and its value. Errors with the error reply's text.
    fn parse(cx: &Context, name: &[u8], value: &[u8]) -> Result<Self, String> {
        let shown = || super::cut(name, ERROR_ECHO_MAX);
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        let failed = |why: &str| format!("ERR CONFIG SET failed (possibly related to argument '{}') - {why}", shown());
        let within = |min: u64, max: u64| match integer(value).map(u64::try_from) {
            Some(Ok(number)) if (min..=max).contains(&number) => Ok(Some(number)),
            Some(_) => Err(failed(&format!("argument must be between {min} and {max} inclusive"))),
            None => Ok(None),
        };
        let change = if is("maxclients") {
            within(1, MAX_CLIENTS_MAX)?.and_then(|most| usize::try_from(most).ok()).map(Self::MaxClients)
        } else if is("timeout") {
            within(0, SETTABLE_TIME_MS.1 / 1_000)?.map(|seconds| Self::Timeout(Duration::from_secs(seconds)))
        } else if is("slowlog-log-slower-than") {
            SlowLog::slower_than(value).map(Self::SlowerThan)
        } else if is("slowlog-max-len") {
            SlowLog::len_max(value).map(Self::SlowLogLen)
        } else if is("requirepass") || current(cx).iter().any(|(known, _)| is(known)) {
            return Err(failed("can't set immutable config"));
        } else {
            return Err(format!("ERR Unknown option or number of arguments for CONFIG SET - '{}'", shown()));
        };
        change.ok_or_else(|| failed("argument couldn't be parsed into an integer"))
    }

    /// Reads all of them. Errors with the error reply's text.
    fn parse_all(cx: &Context, pairs: &[(&[u8], &[u8])]) -> Result<Vec<Self>, String> {
        let mut changes = Vec::new();
        for (at, (name, value)) in pairs.iter().enumerate() {
            let change = Self::parse(cx, name, value)?;
            if pairs[..at].iter().any(|(earlier, _)| earlier.eq_ignore_ascii_case(name)) {
                let shown = super::cut(name, ERROR_ECHO_MAX);
                return Err(format!("ERR CONFIG SET failed (possibly related to argument '{shown}') - duplicate parameter"));
            }
            changes.push(change);
        }
        Ok(changes)
    }

    fn apply(self, cx: &Context) {
        match self {
            Self::MaxClients(most) => cx.registry.set_clients_max(most),
            Self::Timeout(idle) => {
                cx.bounds.set_idle(idle);
                cx.registry.wake();
            }
            Self::SlowerThan(us) => cx.slow.set_slower_than(us),
            Self::SlowLogLen(len) => cx.slow.set_len_max(len),
        }
    }
}

/// The version as Redis numbers modules: two decimal digits a part.
pub fn module_version() -> i64 {
    VERSION.split('.').fold(0, |version, part| version * 100 + part.parse::<i64>().unwrap_or(0))
}

/// Holdfast as HELLO and MODULE LIST show it.
pub fn module() -> Reply {
    Reply::map([
        ("name", Reply::word("holdfast")),
        ("ver", Reply::Integer(module_version())),
        ("path", Reply::word("")),
        ("args", Reply::Array(vec![])),
    ])
}

const fn sub(name: &'static str, summary: &'static str) -> Spec {
    Spec::new(name, summary).flags(LOADING)
}

pub static INFO: Spec = Spec::new("INFO", "Describes the server in Redis's sections and its own.")
    .args(&[text("section", CLIENT_NAME_MAX).any_number()])
    .flags(LOADING)
    .reply("text")
    .example("INFO server")
    .run(|call| {
        let wanted: Vec<&[u8]> = call.args.list("section").collect();
        Step::Reply(Reply::Verbatim(info::render(call.cx, &wanted)))
    });

pub static CONFIG: Spec = Spec::new("CONFIG", "Shows settings, and changes a few until the server ends.")
    .flags(ADMIN | LOADING)
    .example("CONFIG GET maxclients")
    .subcommands(&[&CONFIG_GET, &CONFIG_SET, &CONFIG_RESETSTAT, &CONFIG_REWRITE, &CONFIG_HELP]);

static CONFIG_GET: Spec = sub("CONFIG|GET", "Shows the settings whose names match a pattern.")
    .args(&[text("pattern", PATTERN_MAX).repeated()])
    .flags(SHOW)
    .complexity("O(N) where N is the number of settings")
    .reply("map")
    .example("CONFIG GET max*")
    .run(|call| {
        let patterns: Vec<&[u8]> = call.args.list("pattern").collect();
        let settings = current(call.cx);
        let shown = settings.iter().filter(|(name, _)| patterns.iter().any(|pattern| glob::matches(pattern, name.as_bytes(), true)));
        Step::Reply(Reply::Map(shown.map(|(name, value)| (Reply::word(name), Reply::text(value.clone()))).collect()))
    });

static CONFIG_SET: Spec = sub(
    "CONFIG|SET",
    "Changes `maxclients`, `timeout`, `slowlog-log-slower-than`, `slowlog-max-len` until the server ends: all or nothing.",
)
.args(&[text("setting", PATTERN_MAX).repeated(), text("value", REQUEST_BULK_MAX).repeated()])
.flags(ADMIN | LOADING | SECRET)
.example("CONFIG SET timeout 0")
.run(|call| {
    let pairs: Vec<_> = call.args.list("setting").zip(call.args.list("value")).collect();
    Step::Reply(match Change::parse_all(call.cx, &pairs) {
        Ok(changes) => {
            changes.into_iter().for_each(|change| change.apply(call.cx));
            Reply::ok()
        }
        Err(error) => Reply::error(error),
    })
});

static CONFIG_RESETSTAT: Spec = sub("CONFIG|RESETSTAT", "Sets INFO's counts back to zero.").flags(ADMIN | LOADING).run(|call| {
    call.cx.stats.reset();
    Step::Reply(Reply::ok())
});

static CONFIG_REWRITE: Spec = sub("CONFIG|REWRITE", "Refused: the server never writes its configuration.")
    .flags(ADMIN | LOADING)
    .reply("an error")
    .run(|_| Step::Reply(Reply::error("ERR The server is running without a config file")));

static CONFIG_HELP: Spec =
    sub("CONFIG|HELP", "Lists the subcommands.").reply("array of text").run(|_| Step::Reply(describe::help(&CONFIG)));

pub static MODULE: Spec = Spec::new("MODULE", "Shows Holdfast as the one module of this Redis.")
    .flags(SHOW)
    .example("MODULE LIST")
    .subcommands(&[&MODULE_LIST, &MODULE_HELP]);

static MODULE_LIST: Spec = sub("MODULE|LIST", "Lists the modules.")
    .flags(SHOW)
    .reply("array of maps of `name ver path args`")
    .run(|_| Step::Reply(Reply::Array(vec![module()])));

static MODULE_HELP: Spec =
    sub("MODULE|HELP", "Lists the subcommands.").reply("array of text").run(|_| Step::Reply(describe::help(&MODULE)));

pub static TIME: Spec = Spec::new("TIME", "Answers the server's time in Unix seconds and microseconds.")
    .flags(FAST | LOADING)
    .reply("array of two texts")
    .run(|_| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Step::Reply(Reply::Array(vec![Reply::text(now.as_secs().to_string()), Reply::text(now.subsec_micros().to_string())]))
    });

pub static DBSIZE: Spec = Spec::new("DBSIZE", "Answers 0: the data is in the backends.")
    .flags(FAST | LOADING)
    .reply("integer")
    .run(|_| Step::Reply(Reply::Integer(0)));

pub static LATENCY: Spec = Spec::new("LATENCY", "Answers as an empty latency monitor: latencies are in the metrics.")
    .flags(SHOW)
    .example("LATENCY LATEST")
    .subcommands(&[&LATENCY_LATEST, &LATENCY_HISTORY, &LATENCY_HISTOGRAM, &LATENCY_RESET, &LATENCY_GRAPH, &LATENCY_DOCTOR, &LATENCY_HELP]);

static LATENCY_LATEST: Spec =
    sub("LATENCY|LATEST", "Answers no events.").flags(SHOW).reply("an empty array").run(|_| Step::Reply(Reply::Array(vec![])));

static LATENCY_HISTORY: Spec = sub("LATENCY|HISTORY", "Answers no events.")
    .args(&[text("event", CLIENT_NAME_MAX)])
    .flags(SHOW)
    .reply("an empty array")
    .example("LATENCY HISTORY command")
    .run(|_| Step::Reply(Reply::Array(vec![])));

static LATENCY_HISTOGRAM: Spec = sub("LATENCY|HISTOGRAM", "Answers no histograms.")
    .args(&[text("command", CLIENT_NAME_MAX).any_number()])
    .flags(SHOW)
    .reply("an empty map")
    .run(|_| Step::Reply(Reply::Map(vec![])));

static LATENCY_RESET: Spec = sub("LATENCY|RESET", "Answers 0.")
    .args(&[text("event", CLIENT_NAME_MAX).any_number()])
    .flags(SHOW)
    .reply("integer")
    .run(|_| Step::Reply(Reply::Integer(0)));

static LATENCY_GRAPH: Spec = sub("LATENCY|GRAPH", "Refused: there are no events to draw.")
    .args(&[text("event", CLIENT_NAME_MAX)])
    .flags(SHOW)
    .reply("an error")
    .example("LATENCY GRAPH command")
    .run(|call| {
        let event = super::cut(call.args.text("event"), ERROR_ECHO_MAX);
        Step::Reply(Reply::error(format!("ERR No samples available for event '{event}'")))
    });

static LATENCY_DOCTOR: Spec = sub("LATENCY|DOCTOR", "Tells where latencies are shown.").flags(SHOW).reply("text").run(|_| {
    Step::Reply(Reply::Verbatim("Latencies are not monitored here: the metrics have them, under holdfast_command_seconds.\n".to_owned()))
});

static LATENCY_HELP: Spec =
    sub("LATENCY|HELP", "Lists the subcommands.").reply("array of text").run(|_| Step::Reply(describe::help(&LATENCY)));

/// A command of Redis Cluster. Holdfast is one endpoint, whatever is behind it.
const fn cluster(name: &'static str, summary: &'static str) -> Spec {
    Spec::new(name, summary).flags(FAST | LOADING).reply("an error").run(|_| Step::Reply(Reply::error(NO_CLUSTER)))
}

pub static CLUSTER: Spec = cluster("CLUSTER", "Refused: this is one endpoint, so clients need no cluster mode.")
    .args(&[text("argument", REQUEST_BULK_MAX).repeated()])
    .example("CLUSTER INFO");

pub static READONLY: Spec = cluster("READONLY", "Refused, as where Redis has no cluster support.");
pub static READWRITE: Spec = cluster("READWRITE", "Refused, as where Redis has no cluster support.");
pub static ASKING: Spec = cluster("ASKING", "Refused, as where Redis has no cluster support.");

#[cfg(test)]
mod tests {
    use crate::command::tests::{Wire, answers};

    #[test]
    fn tools_get_the_answers_they_wait_for() {
        answers(&[
            ("CONFIG GET timeout", "*2\r\n$7\r\ntimeout\r\n$1\r\n0\r\n"),
            ("CONFIG GET nothing*", "*0\r\n"),
            ("CONFIG SET timeout 1", "+OK\r\n"),
            ("CONFIG SET port 1", "-ERR Unknown option or number of arguments for CONFIG SET - 'port'\r\n"),
            (
                "CONFIG SET databases 1",
                "-ERR CONFIG SET failed (possibly related to argument 'databases') - can't set immutable config\r\n",
            ),
            (
                "CONFIG SET maxclients x",
                "-ERR CONFIG SET failed (possibly related to argument 'maxclients') - argument couldn't be parsed into an integer\r\n",
            ),
            ("CONFIG SET timeout 0 TIMEOUT 1", "-ERR CONFIG SET failed (possibly related to argument 'TIMEOUT') - duplicate parameter\r\n"),
            ("CONFIG SET foo 1 foo 2", "-ERR Unknown option or number of arguments for CONFIG SET - 'foo'\r\n"),
            (
                "CONFIG SET timeout -1",
                "-ERR CONFIG SET failed (possibly related to argument 'timeout') - argument must be between 0 and 86400 inclusive\r\n",
            ),
            ("LATENCY GRAPH x", "-ERR No samples available for event 'x'\r\n"),
            ("CONFIG SET foo 1", "-ERR Unknown option or number of arguments for CONFIG SET - 'foo'\r\n"),
            ("CONFIG SET foo", "-ERR wrong number of arguments for 'config|set' command\r\n"),
            ("CONFIG RESETSTAT", "+OK\r\n"),
            ("DBSIZE", ":0\r\n"),
            ("LATENCY LATEST", "*0\r\n"),
            ("CLUSTER NODES", "-ERR This instance has cluster support disabled\r\n"),
            ("READONLY", "-ERR This instance has cluster support disabled\r\n"),
            ("SENTINEL MASTERS", "-ERR unknown command 'SENTINEL', with args beginning with: 'MASTERS' \r\n"),
        ]);
    }

    #[test]
    fn config_get_takes_patterns_in_any_case() {
        let text = Wire::new().send("CONFIG GET MAX* save");
        assert!(text.starts_with("*8\r\n") && text.contains("maxmemory-policy"), "{text}");
    }

    #[test]
    fn config_set_changes_all_or_nothing() {
        let mut wire = Wire::new();
        assert!(wire.send("CONFIG SET timeout 7 databases 2").starts_with("-ERR CONFIG SET failed"));
        assert_eq!(wire.send("CONFIG GET timeout"), "*2\r\n$7\r\ntimeout\r\n$1\r\n0\r\n");
        assert_eq!(wire.send("CONFIG SET timeout 7 MAXCLIENTS 12"), "+OK\r\n");
        assert_eq!(wire.send("CONFIG GET timeout maxclients"), "*4\r\n$10\r\nmaxclients\r\n$2\r\n12\r\n$7\r\ntimeout\r\n$1\r\n7\r\n");
        assert!(wire.send("INFO clients").contains("maxclients:12\r\n"));
    }

    #[test]
    fn holdfast_shows_as_a_module() {
        assert!(Wire::new().send("MODULE LIST").starts_with("*1\r\n*8\r\n$4\r\nname\r\n$8\r\nholdfast\r\n$3\r\nver\r\n:"));
    }

    #[test]
    fn time_is_two_texts() {
        assert!(Wire::new().send("TIME").starts_with("*2\r\n$10\r\n"));
    }
}
