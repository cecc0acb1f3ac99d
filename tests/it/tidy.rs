//! Rules about the source that no compiler holds: who imports whom, and which crate has one owner.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                found.push((entry.display().to_string(), fs::read_to_string(&entry).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// The part of a file before its tests.
fn product(text: &str) -> &str {
    text.split("\n#[cfg(test)]\nmod tests").next().unwrap()
}

/// What each room may import of the crate. A room that is not listed may import everything (main, app, dev, cli).
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("domain", &["domain"]),
    ("limits", &["domain"]),
    ("resp", &["resp", "limits"]),
    ("tls", &["tls"]),
    ("config", &["config", "limits"]),
    ("telemetry", &["telemetry", "config", "limits", "tls"]),
    ("ledger", &["ledger", "domain", "limits", "sabotage"]),
    ("store", &["store", "domain", "limits", "resp", "sabotage"]),
    ("outbox", &["outbox", "store", "ledger", "domain", "limits"]),
    ("reconcile", &["reconcile", "store", "ledger", "domain", "limits", "sabotage"]),
    ("bulk", &["bulk", "command", "config", "outbox", "store", "ledger", "domain", "limits"]),
    ("session", &["session", "domain", "limits", "resp"]),
    ("command", &["command", "session", "store", "domain", "limits", "resp", "sabotage"]),
    ("server", &["server", "command", "session", "resp", "limits", "tls"]),
];

#[test]
fn imports_run_one_way() {
    for (path, text) in sources("src") {
        let room = Path::new(&path).strip_prefix("src").unwrap().iter().next().unwrap().to_string_lossy().replace(".rs", "");
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == room) else { continue };
        for (number, line) in product(&text).lines().enumerate() {
            for part in line.split("crate::").skip(1) {
                let target: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let named_once = line.trim_start().starts_with("//");
                assert!(named_once || allowed.contains(&target.as_str()), "{path}:{}: {room} may not import {target}", number + 1);
            }
        }
    }
}

#[test]
fn the_domain_is_pure() {
    for (path, text) in sources("src/domain") {
        for needle in ["tokio", "async ", "std::fs", "std::net", "std::time", "Instant", "SystemTime"] {
            assert!(!product(&text).contains(needle), "{path} has {needle}: no IO, no async, no clock");
        }
    }
}

#[test]
fn each_backend_crate_has_one_owner() {
    for (needle, owner) in [("redis::", "src/store/"), ("sqlx::", "src/ledger/"), ("redis_protocol::", "src/resp/")] {
        for (path, text) in sources("src").iter().filter(|(path, _)| !path.starts_with(owner)) {
            for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
                let of_another_name = |before: &str| before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
                let in_a_text = |before: &str| before.matches('"').count() % 2 == 1;
                let used = line.match_indices(needle).any(|(at, _)| !of_another_name(&line[..at]) && !in_a_text(&line[..at]));
                assert!(!used, "{path}:{}: {needle} belongs to {owner}", number + 1);
            }
        }
    }
}

#[test]
fn no_queue_is_unbounded_and_nothing_is_left_to_do() {
    for (path, text) in sources("src") {
        for needle in ["unbounded_channel", "todo!(", "unimplemented!(", "dbg!(", "TODO", "FIXME"] {
            assert!(!text.contains(needle), "{path} has {needle}");
        }
    }
}
