//! The commands about the server that every Redis client may send: INFO CONFIG ACL MODULE TIME DBSIZE SLOWLOG LATENCY, and those of
//! Redis Cluster, which are refused in its words.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::connection::VERSION;
use super::spec::{ADMIN, FAST, LOADING, Spec, text};
use super::{Call, Step, args, describe, glob, info};
use crate::limits::{CLIENT_NAME_MAX, ERROR_ECHO_MAX, PATTERN_MAX, REQUEST_BULK_MAX};
use crate::resp::Reply;

const NO_CLUSTER: &str = "ERR This instance has cluster support disabled";

/// What CONFIG GET shows where nothing else says so: what clients and tools ask a Redis for.
pub fn settings(clients_max: usize) -> Vec<(&'static str, String)> {
    let maxclients = clients_max.to_string();
    [
        ("appendonly", "no"),
        ("databases", "1"),
        ("maxclients", &maxclients),
        ("maxmemory", "0"),
        ("maxmemory-policy", "noeviction"),
        ("proto-max-bulk-len", &REQUEST_BULK_MAX.to_string()),
        ("replica-read-only", "yes"),
        ("save", ""),
        ("slowlog-max-len", "0"),
        ("timeout", "0"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .to_vec()
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
        let wanted: Vec<&Bytes> = call.args.list("section").collect();
        Step::Reply(Reply::Verbatim(info::render(call.cx, &wanted)))
    });

pub static CONFIG: Spec = Spec::new("CONFIG", "Shows settings; they are changed in the configuration file.")
    .flags(ADMIN | LOADING)
    .example("CONFIG GET maxclients")
    .subcommands(&[&CONFIG_GET, &CONFIG_SET, &CONFIG_RESETSTAT, &CONFIG_REWRITE, &CONFIG_HELP]);

static CONFIG_GET: Spec = sub("CONFIG|GET", "Shows the settings whose names match a pattern.")
    .args(&[text("pattern", PATTERN_MAX).repeated()])
    .flags(ADMIN | LOADING)
    .complexity("O(N) where N is the number of settings")
    .reply("map")
    .example("CONFIG GET max*")
    .run(|call| {
        let patterns: Vec<&Bytes> = call.args.list("pattern").collect();
        let settings = call.cx.settings.borrow();
        let shown = settings.iter().filter(|(name, _)| patterns.iter().any(|pattern| glob::matches(pattern, name.as_bytes(), true)));
        Step::Reply(Reply::Map(shown.map(|(name, value)| (Reply::word(name), Reply::text(value.clone()))).collect()))
    });

static CONFIG_SET: Spec = sub("CONFIG|SET", "Refused: settings are changed in the configuration file.")
    .args(&[text("setting", PATTERN_MAX).repeated(), text("value", REQUEST_BULK_MAX).repeated()])
    .flags(ADMIN | LOADING)
    .reply("an error")
    .example("CONFIG SET timeout 0")
    .run(|call| {
        let Some(name) = call.args.raw(0) else { return Step::Reply(Reply::error(args::wrong_arity(call.args.spec()))) };
        let known = call.cx.settings.borrow().iter().any(|(setting, _)| name.eq_ignore_ascii_case(setting.as_bytes()));
        let name = super::cut(name, ERROR_ECHO_MAX);
        Step::Reply(Reply::error(if known {
            format!("ERR CONFIG SET failed (possibly related to argument '{name}') - can't set immutable config")
        } else {
            format!("ERR Unknown option or number of arguments for CONFIG SET - '{name}'")
        }))
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

pub static ACL: Spec = Spec::new("ACL", "Shows users and command categories.").flags(LOADING).example("ACL WHOAMI").subcommands(&[
    &ACL_WHOAMI,
    &ACL_CAT,
    &ACL_USERS,
    &ACL_LIST,
    &ACL_HELP,
]);

static ACL_WHOAMI: Spec = sub("ACL|WHOAMI", "Answers the connection's user.").reply("text").run(|_| Step::Reply(Reply::word("default")));

static ACL_CAT: Spec = sub("ACL|CAT", "Lists the command categories, or the commands in one.")
    .args(&[text("category", CLIENT_NAME_MAX).optional()])
    .reply("array of text")
    .run(acl_cat);

fn acl_cat(call: &mut Call<'_>) -> Step {
    let specs = call.cx.commands.all();
    let Some(category) = call.args.maybe_text("category") else {
        let categories: BTreeSet<&str> = specs.iter().flat_map(|spec| describe::categories(spec)).collect();
        return Step::Reply(Reply::Array(categories.into_iter().map(Reply::word).collect()));
    };
    let within = |spec: &Spec| describe::categories(spec).iter().any(|known| category.eq_ignore_ascii_case(known.as_bytes()));
    let names: Vec<Reply> = specs.iter().filter(|spec| within(spec)).map(|spec| Reply::text(spec.lower_name())).collect();
    if names.is_empty() {
        return Step::Reply(Reply::error(format!("ERR Unknown category '{}'", super::cut(category, ERROR_ECHO_MAX))));
    }
    Step::Reply(Reply::Array(names))
}

static ACL_USERS: Spec = sub("ACL|USERS", "Lists the users.")
    .flags(ADMIN | LOADING)
    .reply("array of text")
    .run(|_| Step::Reply(Reply::Array(vec![Reply::word("default")])));

static ACL_LIST: Spec = sub("ACL|LIST", "Lists the users with their rights.")
    .flags(ADMIN | LOADING)
    .reply("array of text")
    .run(|_| Step::Reply(Reply::Array(vec![Reply::word("user default on nopass sanitize-payload ~* &* +@all")])));

static ACL_HELP: Spec = sub("ACL|HELP", "Lists the subcommands.").reply("array of text").run(|_| Step::Reply(describe::help(&ACL)));

pub static MODULE: Spec = Spec::new("MODULE", "Shows Holdfast as the one module of this Redis.")
    .flags(ADMIN | LOADING)
    .example("MODULE LIST")
    .subcommands(&[&MODULE_LIST, &MODULE_HELP]);

static MODULE_LIST: Spec = sub("MODULE|LIST", "Lists the modules.")
    .flags(ADMIN | LOADING)
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

pub static SLOWLOG: Spec = Spec::new("SLOWLOG", "Answers as an empty slow log: slow commands are in the metrics and the logs.")
    .flags(ADMIN | LOADING)
    .example("SLOWLOG LEN")
    .subcommands(&[&SLOWLOG_GET, &SLOWLOG_LEN, &SLOWLOG_RESET, &SLOWLOG_HELP]);

static SLOWLOG_GET: Spec = sub("SLOWLOG|GET", "Answers no entries.")
    .args(&[text("count", 32).optional()])
    .flags(ADMIN | LOADING)
    .reply("an empty array")
    .run(|_| Step::Reply(Reply::Array(vec![])));

static SLOWLOG_LEN: Spec = sub("SLOWLOG|LEN", "Answers 0.").flags(ADMIN | LOADING).reply("integer").run(|_| Step::Reply(Reply::Integer(0)));

static SLOWLOG_RESET: Spec = sub("SLOWLOG|RESET", "Accepted.").flags(ADMIN | LOADING).run(|_| Step::Reply(Reply::ok()));

static SLOWLOG_HELP: Spec =
    sub("SLOWLOG|HELP", "Lists the subcommands.").reply("array of text").run(|_| Step::Reply(describe::help(&SLOWLOG)));

pub static LATENCY: Spec = Spec::new("LATENCY", "Answers as an empty latency monitor: latencies are in the metrics.")
    .flags(ADMIN | LOADING)
    .example("LATENCY LATEST")
    .subcommands(&[&LATENCY_LATEST, &LATENCY_HISTORY, &LATENCY_HISTOGRAM, &LATENCY_RESET, &LATENCY_HELP]);

static LATENCY_LATEST: Spec =
    sub("LATENCY|LATEST", "Answers no events.").flags(ADMIN | LOADING).reply("an empty array").run(|_| Step::Reply(Reply::Array(vec![])));

static LATENCY_HISTORY: Spec = sub("LATENCY|HISTORY", "Answers no events.")
    .args(&[text("event", CLIENT_NAME_MAX)])
    .flags(ADMIN | LOADING)
    .reply("an empty array")
    .example("LATENCY HISTORY command")
    .run(|_| Step::Reply(Reply::Array(vec![])));

static LATENCY_HISTOGRAM: Spec = sub("LATENCY|HISTOGRAM", "Answers no histograms.")
    .args(&[text("command", CLIENT_NAME_MAX).any_number()])
    .flags(ADMIN | LOADING)
    .reply("an empty map")
    .run(|_| Step::Reply(Reply::Map(vec![])));

static LATENCY_RESET: Spec = sub("LATENCY|RESET", "Answers 0.")
    .args(&[text("event", CLIENT_NAME_MAX).any_number()])
    .flags(ADMIN | LOADING)
    .reply("integer")
    .run(|_| Step::Reply(Reply::Integer(0)));

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
            ("CONFIG SET timeout 1", "-ERR CONFIG SET failed (possibly related to argument 'timeout') - can't set immutable config\r\n"),
            ("CONFIG SET foo 1", "-ERR Unknown option or number of arguments for CONFIG SET - 'foo'\r\n"),
            ("CONFIG SET foo", "-ERR wrong number of arguments for 'config|set' command\r\n"),
            ("CONFIG RESETSTAT", "+OK\r\n"),
            ("ACL WHOAMI", "$7\r\ndefault\r\n"),
            ("ACL CAT nonsense", "-ERR Unknown category 'nonsense'\r\n"),
            ("DBSIZE", ":0\r\n"),
            ("SLOWLOG GET 10", "*0\r\n"),
            ("SLOWLOG LEN", ":0\r\n"),
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
    fn holdfast_shows_as_a_module() {
        assert!(Wire::new().send("MODULE LIST").starts_with("*1\r\n*8\r\n$4\r\nname\r\n$8\r\nholdfast\r\n$3\r\nver\r\n:"));
    }

    #[test]
    fn time_is_two_texts() {
        assert!(Wire::new().send("TIME").starts_with("*2\r\n$10\r\n"));
    }
}
