//! INFO's text, in Redis's sections and words: clients wait for `loading:0`, monitoring reads the rest.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Context;
use super::connection::{REDIS_VERSION, VERSION};
use super::server::module_version;
use crate::session::hub::Kind;

/// A section that another part of the program shows: its name, and what appends its `key:value` lines.
pub struct Section {
    pub name: &'static str,
    pub render: Box<dyn Fn(&mut String)>,
}

type Render = fn(&Context, &mut String);

/// Redis's own sections, in its order, and whether INFO shows them unasked.
const SECTIONS: &[(&str, bool, Render)] = &[
    ("Server", true, server),
    ("Clients", true, clients),
    ("Memory", true, memory),
    ("Persistence", true, persistence),
    ("Stats", true, stats),
    ("Replication", true, replication),
    ("CPU", true, cpu),
    ("Modules", true, modules),
    ("Commandstats", false, commandstats),
    ("Errorstats", true, errorstats),
    ("Cluster", true, cluster),
    ("Keyspace", true, keyspace),
];

/// Renders the sections asked for: by name, `default`, `all` or `everything`; nothing asked means `default`.
pub fn render(cx: &Context, wanted: &[&[u8]]) -> String {
    let named = |name: &str| wanted.iter().any(|word| word.eq_ignore_ascii_case(name.as_bytes()));
    let all = named("all") || named("everything");
    let default = all || named("default") || wanted.is_empty();
    let mut text = String::with_capacity(4096);
    let title = |text: &mut String, name: &str| {
        let line = if text.is_empty() { "" } else { "\r\n" };
        let _ = write!(text, "{line}# {name}\r\n");
    };
    for (name, unasked, render) in SECTIONS {
        if named(name) || all || (default && *unasked) {
            title(&mut text, name);
            render(cx, &mut text);
        }
    }
    for section in cx.sections.borrow().iter() {
        if named(section.name) || default {
            title(&mut text, section.name);
            (section.render)(&mut text);
        }
    }
    text
}

fn line(text: &mut String, name: &str, value: impl std::fmt::Display) {
    let _ = write!(text, "{name}:{value}\r\n");
}

fn server(cx: &Context, text: &mut String) {
    let uptime = cx.stats.started.elapsed().as_secs();
    let now_us = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    line(text, "redis_version", REDIS_VERSION);
    line(text, "holdfast_version", VERSION);
    line(text, "redis_mode", "standalone");
    line(text, "os", std::env::consts::OS);
    line(text, "arch_bits", usize::BITS);
    line(text, "process_id", std::process::id());
    for (name, value) in cx.settings.borrow().iter().filter(|(name, _)| *name == "port") {
        line(text, &format!("tcp_{name}"), value);
    }
    line(text, "server_time_usec", now_us);
    line(text, "uptime_in_seconds", uptime);
    line(text, "uptime_in_days", uptime / 86_400);
}

fn clients(cx: &Context, text: &mut String) {
    line(text, "connected_clients", cx.registry.connected());
    line(text, "maxclients", cx.registry.clients_max());
    line(text, "blocked_clients", cx.registry.blocked());
}

fn memory(_: &Context, text: &mut String) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)).and_then(|rest| rest.split_whitespace().next());
        value.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    let (used, peak) = (bytes("VmRSS:"), bytes("VmHWM:"));
    line(text, "used_memory", used);
    line(text, "used_memory_human", format_args!("{:.2}M", used as f64 / 1_048_576.0));
    line(text, "used_memory_rss", used);
    line(text, "used_memory_peak", peak);
    line(text, "maxmemory", 0);
    line(text, "maxmemory_policy", "noeviction");
}

fn persistence(_: &Context, text: &mut String) {
    // Always 0: ioredis and others hold every command back until then, and a backend that is away is no reason to.
    line(text, "loading", 0);
    line(text, "async_loading", 0);
    line(text, "rdb_bgsave_in_progress", 0);
    line(text, "aof_enabled", 0);
}

fn stats(cx: &Context, text: &mut String) {
    line(text, "total_connections_received", cx.registry.received_total());
    line(text, "total_commands_processed", cx.stats.commands_total());
    line(text, "rejected_connections", cx.registry.rejected_total());
    line(text, "expired_keys", 0);
    line(text, "evicted_keys", 0);
    let hub = cx.subscribers.hub();
    line(text, "pubsub_channels", hub.len(Kind::Channel));
    line(text, "pubsub_patterns", hub.len(Kind::Pattern));
    line(text, "total_error_replies", cx.stats.errors().iter().map(|(_, count)| count).sum::<u64>());
}

fn replication(_: &Context, text: &mut String) {
    line(text, "role", "master");
    line(text, "connected_slaves", 0);
}

fn cpu(_: &Context, text: &mut String) {
    // Fields 14 and 15 of the line, counted behind the command's name in parentheses; in hundredths of a second.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let seconds = |at: usize| fields.get(at).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(0.0) / 100.0;
    line(text, "used_cpu_sys", format_args!("{:.6}", seconds(12)));
    line(text, "used_cpu_user", format_args!("{:.6}", seconds(11)));
}

fn modules(_: &Context, text: &mut String) {
    let _ = write!(text, "module:name=holdfast,ver={},api=1,filters=0,usedby=[],using=[],options=[]\r\n", module_version());
}

fn commandstats(cx: &Context, text: &mut String) {
    for count in cx.stats.commands() {
        let name = count.name.to_ascii_lowercase();
        let each = count.micros as f64 / count.calls.max(1) as f64;
        let (calls, micros, failed) = (count.calls, count.micros, count.failed);
        let _ =
            write!(text, "cmdstat_{name}:calls={calls},usec={micros},usec_per_call={each:.2},rejected_calls=0,failed_calls={failed}\r\n");
    }
}

fn errorstats(cx: &Context, text: &mut String) {
    for (word, count) in cx.stats.errors() {
        let _ = write!(text, "errorstat_{word}:count={count}\r\n");
    }
}

fn cluster(_: &Context, text: &mut String) {
    line(text, "cluster_enabled", 0);
}

fn keyspace(_: &Context, _: &mut String) {}

#[cfg(test)]
mod tests {

    use super::Section;
    use crate::command::tests::Wire;

    #[test]
    fn info_shows_what_clients_wait_for_and_monitoring_reads() {
        let mut wire = Wire::new();
        wire.send("nonsense");
        let text = wire.send("INFO");
        for part in [
            "# Server\r\nredis_version:7.2.0\r\n",
            "\r\nloading:0\r\n",
            "\r\nconnected_clients:",
            "\r\ntotal_commands_processed:1\r\n",
            "\r\nrole:master\r\n",
            "\r\ncluster_enabled:0\r\n",
            "\r\nerrorstat_ERR:count=1\r\n",
            "\r\n\r\n# Clients\r\n",
            "\r\n# Keyspace\r\n",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
        assert!(!text.contains("# Commandstats"));
    }

    #[test]
    fn sections_can_be_chosen_and_added() {
        let mut wire = Wire::new();
        wire.cx.sections.borrow_mut().push(Section { name: "Backend", render: Box::new(|text| text.push_str("state:live\r\n")) });
        let text = wire.send("INFO replication BACKEND");
        assert!(text.ends_with("# Replication\r\nrole:master\r\nconnected_slaves:0\r\n\r\n# Backend\r\nstate:live\r\n\r\n"), "{text}");
        assert!(wire.send("INFO everything").contains("cmdstat_info:calls=1,"));
        assert_eq!(wire.send("INFO nothing"), "$0\r\n\r\n");
    }

    #[test]
    fn clients_that_wait_are_counted_until_they_do_not() {
        let mut wire = Wire::new();
        let words = |request: &str| request.split(' ').collect();
        let waiting = ["LOCK.ACQUIRE a WAIT 1000", "HOLDFAST.AWAIT 1-1", "LOCK.INFO a"].map(|request| wire.begin(words(request)));
        assert!(super::render(&wire.cx, &[]).contains("\r\nblocked_clients:2\r\n"));
        drop(waiting);
        assert!(super::render(&wire.cx, &[]).contains("\r\nblocked_clients:0\r\n"));
    }

    #[test]
    fn memory_is_read_from_the_kernel() {
        let text = Wire::new().send("INFO memory");
        let used: u64 = text.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap().trim().parse().unwrap();
        assert!(used > 1 << 20);
    }
}
