//! Turns lua/*.lua into `scripts.rs`: names for KEYS and ARGV from each header, includes resolved (each once, dependencies first,
//! cycles and unknown names are build errors), and a constant with the number of fixed keys and arguments.

#![allow(clippy::panic, reason = "a build script reports by panicking")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

/// What is replaced in the scripts where a promise is broken on purpose (`src/sabotage.rs`): its name, script, text, what stands there instead.
const SABOTAGE: &[(&str, &str, &str, &str)] = &[
    ("no-batch-replay", "guard", "if m[6] then", "if false then"),
    (
        "no-coupon-token",
        "coupon_write",
        "coupon.fenced = lock_type == 'none' or redis.call('HEXISTS', lock_key, holders[c]) == 0",
        "coupon.fenced = false",
    ),
    (
        "no-lock-epoch",
        "lock",
        "if m[1] ~= epoch or m[2] ~= run or (tonumber(m[3]) or 0) < tonumber(seen) then return nil end\n  return tonumber(m[3])",
        "return tonumber(m[3]) or 0",
    ),
    (
        "no-expiry-check",
        "orders",
        "local is_due = known.state == 'held' and known.expires <= head.now\n",
        "local is_due = kind == 'expire'\n",
    ),
    ("no-release", "orders", "if leaves then shelf.held[i] = (shelf.held[i] or 0) - units[at] end\n", ""),
    ("no-request-memory", "requests", "if text then return 'known', text end\n", ""),
    ("no-request-memory", "requests", "if found[i] then return true end\n", ""),
    ("no-run-id", "guard", "if m[2] ~= run then return nil, {'run', op, now} end\n", ""),
    ("loose-sums", "sums", "if not after or after < 0 or value > TOTAL_MAX then", "if not after or value > TOTAL_MAX then"),
    ("xadd-last", "coupon_write", "append(head, lines)\n", ""),
    ("xadd-last", "coupon_write", "return reply\n", "append(head, lines)\nreturn reply\n"),
    ("xadd-last", "stock_write", "append(head, {}, summed)\n", ""),
    ("xadd-last", "stock_write", "return reply\n", "append(head, {}, summed)\n  return reply\n"),
    ("xadd-last-of-one", "stock_write", "append(head, lines, summed)\n", ""),
    ("xadd-last-of-one", "stock_write", "\nend\nreturn reply\n", "\nend\nappend(head, lines, summed)\nreturn reply\n"),
];

/// Stands in a script where an include's functions are made that what is above it does without.
const INCLUDE_HERE: &str = "-- include here:";

struct Header {
    keys: Vec<String>,
    args: Vec<String>,
    include: Vec<String>,
}

fn main() {
    println!("cargo:rerun-if-changed=lua");
    println!("cargo:rerun-if-changed=migrations");
    let mut files: Vec<_> = fs::read_dir("lua").expect("lua/").map(|entry| entry.expect("lua/").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "lua"));
    files.sort();
    let mut out = String::new();
    for path in files {
        let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a script's name").to_owned();
        let text = fs::read_to_string(&path).expect("a script");
        let header = header(&name, &text);
        let constant = name.to_uppercase();
        let source = source(&name, &text, &header, None);
        let broken: Vec<_> = names_of_sabotage()
            .into_iter()
            .map(|what| (what, self::source(&name, &text, &header, Some(what))))
            .filter(|(_, broken)| *broken != source)
            .collect();
        let summary = text.lines().next().unwrap_or_default().trim_start_matches("-- ");
        let fixed = header.keys.iter().filter(|key| !key.ends_with("...")).count();
        writeln!(
            out,
            "/// {summary}\npub static {constant}: Script = Script::new({name:?}, {source:?}, &{broken:?}, {fixed}, {});\n",
            header.args.len()
        )
        .expect("a string");
    }
    let target = Path::new(&env::var("OUT_DIR").expect("OUT_DIR")).join("scripts.rs");
    fs::write(target, out).expect("scripts.rs");
}

/// The script as Redis gets it, with what `broken` names replaced.
fn source(name: &str, text: &str, header: &Header, broken: Option<&str>) -> String {
    let mut source = String::from(if header_flag(text, "readonly") { "#!lua flags=no-writes\n" } else { "#!lua\n" });
    locals(&mut source, &header.keys, "KEYS");
    locals(&mut source, &header.args, "ARGV");
    let mut done = BTreeSet::new();
    for include in &header.include {
        resolve(include, broken, &mut Vec::new(), &mut done, &mut source);
    }
    for line in body(name, text, broken).split_inclusive('\n') {
        match line.trim().strip_prefix(INCLUDE_HERE) {
            Some(include) => resolve(include.trim(), broken, &mut Vec::new(), &mut done, &mut source),
            None => source.push_str(line),
        }
    }
    source
}

/// None in a build that is to be used.
fn names_of_sabotage() -> BTreeSet<&'static str> {
    let wanted = env::var_os("CARGO_FEATURE_SABOTAGE").is_some();
    SABOTAGE.iter().filter(|_| wanted).map(|(what, ..)| *what).collect()
}

fn header_line<'a>(text: &'a str, field: &str) -> Option<&'a str> {
    text.lines().take_while(|line| line.starts_with("--")).find_map(|line| line.strip_prefix("-- ")?.strip_prefix(field)?.strip_prefix(':'))
}

fn header_flag(text: &str, flag: &str) -> bool {
    header_line(text, "flags").is_some_and(|flags| flags.split(',').any(|known| known.trim() == flag))
}

fn header(name: &str, text: &str) -> Header {
    let list = |field: &str| -> Vec<String> {
        let line = header_line(text, field).unwrap_or_default();
        line.split(',').map(str::trim).filter(|word| !word.is_empty()).map(String::from).collect()
    };
    assert!(header_line(text, "returns").is_some(), "lua/{name}.lua: its header says nothing of what it returns");
    Header { keys: list("keys"), args: list("args"), include: list("include") }
}

/// `local meta, outbox = KEYS[1], KEYS[2]`; a name that ends in `...` stands for all the rest and gets no local.
fn locals(source: &mut String, names: &[String], table: &str) {
    let fixed: Vec<_> = names.iter().filter(|name| !name.ends_with("...")).collect();
    if fixed.is_empty() {
        return;
    }
    let left = fixed.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    let right = (1..=fixed.len()).map(|i| format!("{table}[{i}]")).collect::<Vec<_>>().join(", ");
    writeln!(source, "local {left} = {right}").expect("a string");
}

fn resolve(name: &str, broken: Option<&str>, above: &mut Vec<String>, done: &mut BTreeSet<String>, source: &mut String) {
    assert!(!above.iter().any(|seen| seen == name), "lua includes go round in a circle: {above:?} {name}");
    if !done.insert(name.to_owned()) {
        return;
    }
    let path = format!("lua/include/{name}.lua");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert!(!text.contains(INCLUDE_HERE), "{path}: only a script says where an include stands");
    above.push(name.to_owned());
    for include in header_line(&text, "include").unwrap_or_default().split(',').map(str::trim).filter(|word| !word.is_empty()) {
        resolve(include, broken, above, done, source);
    }
    above.pop();
    source.push_str(&body(name, &text, broken));
}

/// The text without its comments: Redis keeps every script's source in memory and EVAL sends it.
fn body(name: &str, text: &str, broken: Option<&str>) -> String {
    let lines = text.lines().filter(|line| {
        let line = line.trim();
        !line.is_empty() && (!line.starts_with("--") || line.starts_with(INCLUDE_HERE))
    });
    let mut body = lines.fold(String::new(), |all, line| all + line + "\n");
    for (what, script, text, instead) in SABOTAGE {
        if *script == name && broken == Some(*what) {
            assert!(body.contains(text), "lua/{name}.lua no longer has what {what} breaks: {text}");
            body = body.replacen(text, instead, 1);
        }
    }
    body
}
