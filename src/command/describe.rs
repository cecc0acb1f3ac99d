//! Commands described from their specs: COMMAND and its subcommands, HELP texts, the README's table.

use std::fmt::Write as _;

use bytes::Bytes;

use super::spec::{ADMIN, Arg, BLOCKING, CONNECTION, FAST, Kind, LOADING, NOAUTH, PUBSUB, Presence, READONLY, Spec, WRITE, text};
use super::{Args, Call, Step, args};
use crate::domain::glob;
use crate::limits::{CLIENT_NAME_MAX, REQUEST_BULK_MAX};
use crate::resp::{Reply, Request};

pub static COMMAND: Spec = Spec::new("COMMAND", "Describes every command in Redis's form.")
    .flags(LOADING)
    .complexity("O(N) where N is the number of commands")
    .reply("array of descriptions")
    .run(|call| Step::Reply(Reply::Array(call.cx.commands.top().map(entry).collect())))
    .subcommands(&[&COUNT, &INFO, &DOCS, &LIST, &GETKEYS, &GETKEYSANDFLAGS, &HELP]);

static COUNT: Spec = sub("COMMAND|COUNT", "Counts the commands.")
    .reply("integer")
    .run(|call| Step::Reply(Reply::Integer(i64::try_from(call.cx.commands.top().count()).unwrap_or(i64::MAX))));

static INFO: Spec = sub("COMMAND|INFO", "Describes the commands named, or all.")
    .args(&[text("command", CLIENT_NAME_MAX).any_number()])
    .reply("array of descriptions, nil for what is unknown")
    .run(|call| {
        if call.args.raw(0).is_none() {
            return Step::Reply(Reply::Array(call.cx.commands.top().map(entry).collect()));
        }
        if let Some(refusal) = too_many(call) {
            return Step::Reply(refusal);
        }
        let one = |name: &[u8]| call.cx.commands.named(name).map_or(Reply::Nil, |(_, spec)| entry(spec));
        Step::Reply(Reply::Array(call.args.list("command").map(one).collect()))
    });

static DOCS: Spec = sub("COMMAND|DOCS", "Documents the commands named, or all.")
    .args(&[text("command", CLIENT_NAME_MAX).any_number()])
    .reply("map of name to documentation")
    .run(|call| {
        let commands = &call.cx.commands;
        let docs = |spec: &'static Spec| (Reply::text(spec.lower_name()), documentation(spec));
        if call.args.raw(0).is_none() {
            return Step::Reply(Reply::Map(commands.top().map(docs).collect()));
        }
        if let Some(refusal) = too_many(call) {
            return Step::Reply(refusal);
        }
        let named = call.args.list("command").filter_map(|name| commands.named(name));
        Step::Reply(Reply::Map(named.map(|(_, spec)| docs(spec)).collect()))
    });

/// A short request is not to have a reply without bounds.
fn too_many(call: &Call<'_>) -> Option<Reply> {
    let known = call.cx.commands.all().len();
    (call.args.list("command").count() > known)
        .then(|| Reply::error(format!("ERR more names than the {known} commands that there are: ask for all")))
}

static LIST: Spec = sub("COMMAND|LIST", "Lists the commands' names: all, or `FILTERBY MODULE name`, `ACLCAT category`, `PATTERN pattern`.")
    .args(&[text("filter", CLIENT_NAME_MAX).any_number()])
    .reply("array of text")
    .run(list);

fn list(call: &mut Call<'_>) -> Step {
    let filter: Vec<&[u8]> = call.args.list("filter").collect();
    let all = call.cx.commands.all();
    let names = |specs: &mut dyn Iterator<Item = &&'static Spec>| {
        Step::Reply(Reply::Array(specs.map(|spec| Reply::text(spec.lower_name())).collect()))
    };
    match filter[..] {
        [] => names(&mut all.iter().filter(|spec| spec.name_words == 1)),
        [by, kind, value] if by.eq_ignore_ascii_case(b"FILTERBY") => {
            if kind.eq_ignore_ascii_case(b"MODULE") {
                names(&mut all.iter().filter(|spec| is_own(spec) && value.eq_ignore_ascii_case(b"holdfast")))
            } else if kind.eq_ignore_ascii_case(b"ACLCAT") {
                names(&mut all.iter().filter(|spec| categories(spec).iter().any(|known| value.eq_ignore_ascii_case(known.as_bytes()))))
            } else if kind.eq_ignore_ascii_case(b"PATTERN") {
                names(&mut all.iter().filter(|spec| glob::matches(value, spec.name.as_bytes(), true)))
            } else {
                Step::Reply(Reply::error("ERR syntax error"))
            }
        }
        _ => Step::Reply(Reply::error("ERR syntax error")),
    }
}

static GETKEYS: Spec = sub("COMMAND|GETKEYS", "Answers the keys of a whole command.")
    .args(&[text("word", REQUEST_BULK_MAX).repeated()])
    .reply("array of keys")
    .example("COMMAND GETKEYS PING")
    .run(|call| Step::Reply(keys(call, |key, _| Reply::Bulk(key))));

static GETKEYSANDFLAGS: Spec = sub("COMMAND|GETKEYSANDFLAGS", "Answers the keys of a whole command and what it does with them.")
    .args(&[text("word", REQUEST_BULK_MAX).repeated()])
    .reply("array of pairs of key and flags")
    .example("COMMAND GETKEYSANDFLAGS PING")
    .run(|call| Step::Reply(keys(call, |key, spec| Reply::Array(vec![Reply::Bulk(key), key_flags(spec)]))));

fn keys(call: &Call<'_>, show: fn(Bytes, &Spec) -> Reply) -> Reply {
    let words: Request = call.args.list("word").collect();
    let Ok((_, spec)) = call.cx.commands.find(&words) else { return Reply::error("ERR Invalid command specified") };
    if !spec.args.iter().any(Arg::is_key) {
        return Reply::error("ERR The command has no key arguments");
    }
    if !args::arity_fits(spec, words.len()) {
        return Reply::error("ERR Invalid number of arguments specified for command");
    }
    match Args::parse(spec, words.clone()) {
        Ok(args) => Reply::Array(args.key_positions().into_iter().map(|at| show(words.shared(at), spec)).collect()),
        Err(_) => Reply::error("ERR Invalid arguments specified for command"),
    }
}

static HELP: Spec = sub("COMMAND|HELP", "Lists the subcommands.").reply("array of text").run(|_| Step::Reply(help(&COMMAND)));

const fn sub(name: &'static str, summary: &'static str) -> Spec {
    Spec::new(name, summary).flags(LOADING)
}

/// HELP's reply for a command with subcommands.
pub fn help(parent: &'static Spec) -> Reply {
    let mut lines = vec![format!("{} <subcommand> [<arg> [value] ...]. Subcommands are:", parent.name)];
    for spec in parent.subcommands {
        let syntax = syntax(spec);
        lines.push(syntax.split_once(' ').map_or(syntax.as_str(), |(_, own)| own).to_owned());
        lines.push(format!("    {}", spec.summary));
    }
    Reply::Array(lines.into_iter().map(|line| Reply::Simple(line.into())).collect())
}

/// The commands that are Holdfast's rather than Redis's.
fn is_own(spec: &Spec) -> bool {
    spec.name.contains('.')
}

/// The ACL categories, with Redis's rule for those that follow from flags.
pub fn categories(spec: &Spec) -> Vec<&'static str> {
    let mut categories: Vec<&'static str> = Vec::new();
    let by_flag: [(u32, &[&str]); 6] = [
        (WRITE, &["write"]),
        (READONLY, &["read"]),
        (ADMIN, &["admin", "dangerous"]),
        (PUBSUB, &["pubsub"]),
        (BLOCKING, &["blocking"]),
        (CONNECTION, &["connection"]),
    ];
    for (flag, names) in by_flag {
        if spec.is(flag) {
            categories.extend(names);
        }
    }
    categories.push(if spec.is(FAST) { "fast" } else { "slow" });
    if is_own(spec) {
        categories.push(spec.family);
    }
    categories
}

fn words(words: impl IntoIterator<Item = &'static str>) -> Reply {
    Reply::Set(words.into_iter().map(Reply::simple).collect())
}

/// The first and last key's place and the step between keys, and whether GETKEYS knows better.
fn key_range(spec: &Spec) -> (i64, i64, i64, bool) {
    let first = spec.positional().position(|(_, arg)| arg.is_key());
    let Some(place) = first.and_then(|place| i64::try_from(spec.name_words + place).ok()) else { return (0, 0, 0, false) };
    let repeats = spec.positional().any(|(_, arg)| arg.is_key() && arg.is_repeated());
    let ends_with_keys = spec.options().next().is_none() && spec.positional().filter(|(_, arg)| arg.is_repeated()).count() == 1;
    match (repeats, ends_with_keys) {
        (false, _) => (place, place, 1, false),
        (true, true) => (place, -1, 1, false),
        (true, false) => (place, place, 1, true),
    }
}

fn key_flags(spec: &Spec) -> Reply {
    words(if spec.is(WRITE) { ["RW", "update"] } else { ["RO", "access"] })
}

/// A command as COMMAND and COMMAND INFO show it: ten elements.
fn entry(spec: &'static Spec) -> Reply {
    let (first, last, step, movable) = key_range(spec);
    let by_flag = [
        (WRITE, "write"),
        (READONLY, "readonly"),
        (ADMIN, "admin"),
        (PUBSUB, "pubsub"),
        (BLOCKING, "blocking"),
        (LOADING, "loading"),
        (LOADING, "stale"),
        (FAST, "fast"),
        (NOAUTH, "no_auth"),
    ];
    let mut flags: Vec<&'static str> = by_flag.iter().filter(|(flag, _)| spec.is(*flag)).map(|(_, name)| *name).collect();
    if is_own(spec) {
        flags.push("module");
    }
    if movable {
        flags.push("movablekeys");
    }
    Reply::Array(vec![
        Reply::text(spec.lower_name()),
        Reply::Integer(spec.arity()),
        words(flags),
        Reply::Integer(first),
        Reply::Integer(last),
        Reply::Integer(step),
        Reply::Set(categories(spec).into_iter().map(|name| Reply::Simple(format!("@{name}").into())).collect()),
        Reply::Array(vec![]),
        Reply::Array(key_specs(spec)),
        Reply::Array(spec.subcommands.iter().map(|sub| entry(sub)).collect()),
    ])
}

fn key_specs(spec: &Spec) -> Vec<Reply> {
    let (first, last, step, movable) = key_range(spec);
    if first == 0 {
        return vec![];
    }
    let mut flags = vec!["RO", "access"];
    if spec.is(WRITE) {
        flags = vec!["RW", "update"];
    }
    if movable {
        flags.push("incomplete");
    }
    let kind = |name, fields| Reply::map([("type", Reply::word(name)), ("spec", fields)]);
    let last = if last < 0 { last } else { 0 };
    vec![Reply::map([
        ("flags", words(flags)),
        ("begin_search", kind("index", Reply::map([("index", Reply::Integer(first))]))),
        (
            "find_keys",
            kind("range", Reply::map([("lastkey", Reply::Integer(last)), ("keystep", Reply::Integer(step)), ("limit", Reply::Integer(0))])),
        ),
    ])]
}

/// A command as COMMAND DOCS shows it. Keys are bulk strings: redis-cli aborts on anything else.
fn documentation(spec: &'static Spec) -> Reply {
    let mut fields = vec![
        (Reply::word("summary"), Reply::word(spec.summary)),
        (Reply::word("since"), Reply::word(spec.since)),
        (Reply::word("group"), Reply::word(if is_own(spec) { "module" } else { spec.family })),
        (Reply::word("complexity"), Reply::word(spec.complexity)),
    ];
    if is_own(spec) {
        fields.push((Reply::word("module"), Reply::word("holdfast")));
    }
    if !spec.args.is_empty() {
        fields.push((Reply::word("arguments"), Reply::Array(arguments(spec))));
    }
    if !spec.subcommands.is_empty() {
        let docs = |sub: &&'static Spec| (Reply::text(sub.lower_name()), documentation(sub));
        fields.push((Reply::word("subcommands"), Reply::Map(spec.subcommands.iter().map(docs).collect())));
    }
    Reply::Map(fields)
}

fn arguments(spec: &'static Spec) -> Vec<Reply> {
    let mut shown = Vec::new();
    let group: Vec<&'static Arg> = spec.args.iter().filter(|arg| arg.is_repeated()).collect();
    let mut group_shown = false;
    for arg in spec.args {
        if !arg.is_repeated() || group.len() == 1 {
            shown.push(argument(spec, arg, flags_of(arg.presence)));
        } else if !group_shown {
            group_shown = true;
            let items = group.iter().map(|arg| argument(spec, arg, vec![])).collect();
            shown.push(Reply::Map(vec![
                (Reply::word("name"), Reply::word("item")),
                (Reply::word("type"), Reply::word("block")),
                (Reply::word("flags"), words(flags_of(arg.presence))),
                (Reply::word("arguments"), Reply::Array(items)),
            ]));
        }
    }
    shown
}

fn flags_of(presence: Presence) -> Vec<&'static str> {
    match presence {
        Presence::Required => vec![],
        Presence::Optional => vec!["optional"],
        Presence::Repeated => vec!["multiple"],
        Presence::Any => vec!["optional", "multiple"],
    }
}

fn argument(spec: &Spec, arg: &'static Arg, flags: Vec<&'static str>) -> Reply {
    let kind = match arg.kind {
        Kind::Id { key: true, .. } => "key",
        Kind::Integer { unit: "unix ms", .. } => "unix-time",
        Kind::Integer { .. } => "integer",
        Kind::Word(_) => "oneof",
        Kind::Pattern => "pattern",
        Kind::Flag => "pure-token",
        Kind::Id { .. } | Kind::Text { .. } | Kind::RequestId | Kind::Cursor => "string",
    };
    let mut fields = vec![(Reply::word("name"), Reply::word(arg.name)), (Reply::word("type"), Reply::word(kind))];
    if arg.is_key() && key_range(spec).0 != 0 {
        fields.push((Reply::word("key_spec_index"), Reply::Integer(0)));
    }
    if let Some(token) = arg.token {
        fields.push((Reply::word("token"), Reply::word(token)));
    }
    if !flags.is_empty() {
        fields.push((Reply::word("flags"), words(flags)));
    }
    if let Kind::Word(choices) = arg.kind {
        let choice = |word: &&'static str| {
            Reply::map([
                ("name", Reply::word(word)),
                ("type", Reply::word("pure-token")),
                ("token", Reply::text(word.to_ascii_uppercase())),
            ])
        };
        fields.push((Reply::word("arguments"), Reply::Array(choices.iter().map(choice).collect())));
    }
    Reply::Map(fields)
}

/// How the command is written: `STOCK.MGET product [product ...]`.
pub fn syntax(spec: &Spec) -> String {
    let mut syntax = spec.name.replace('|', " ");
    let group: Vec<String> = spec.args.iter().filter(|arg| arg.is_repeated()).map(shown_value).collect();
    let mut group_shown = false;
    for arg in spec.args {
        let value = shown_value(arg);
        let _ = match (arg.presence, arg.token) {
            (Presence::Repeated | Presence::Any, _) if group_shown => Ok(()),
            (Presence::Repeated, _) => {
                group_shown = true;
                write!(syntax, " {0} [{0} ...]", group.join(" "))
            }
            (Presence::Any, _) => {
                group_shown = true;
                write!(syntax, " [{} ...]", group.join(" "))
            }
            (_, Some(token)) if arg.kind == Kind::Flag => write!(syntax, " [{token}]"),
            (_, Some(token)) => write!(syntax, " [{token} {value}]"),
            (Presence::Optional, None) => write!(syntax, " [{value}]"),
            (Presence::Required, None) => write!(syntax, " {value}"),
        };
    }
    syntax
}

fn shown_value(arg: &Arg) -> String {
    match arg.kind {
        Kind::Word(words) => words.join("|"),
        Kind::RequestId => "id".to_owned(),
        Kind::Integer { unit: "ms", .. } if arg.token.is_some() => "ms".to_owned(),
        _ => arg.name.to_owned(),
    }
}

/// The README's table of the commands of these families.
pub fn markdown_table(specs: &[&Spec], families: &[&str]) -> String {
    let mut table = String::from("| command | what it does | reply |\n|---|---|---|\n");
    let cell = |text: &str| text.replace('|', "\\|");
    for spec in specs.iter().filter(|spec| families.contains(&spec.family)) {
        let shown = std::iter::once(*spec).filter(|spec| spec.run.is_some()).chain(spec.subcommands.iter().copied());
        for spec in shown {
            let _ = writeln!(table, "| `{}` | {} | {} |", cell(&syntax(spec)), cell(spec.summary), cell(spec.reply));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::spec::{ACK, ORDER, PRODUCT, QUANTITY, REQUEST, TIMEOUT};
    use crate::command::tests::{Wire, answers};

    static DECR: Spec = Spec::new("STOCK.DECR", "Takes units off products.")
        .family("stock")
        .args(&[PRODUCT.repeated(), QUANTITY.repeated(), ORDER.token("ORDER"), REQUEST, ACK, TIMEOUT])
        .flags(WRITE | FAST)
        .run(|_| Step::Later);

    static MGET: Spec =
        Spec::new("STOCK.MGET", "Answers units.").family("stock").args(&[PRODUCT.repeated()]).flags(READONLY).run(|_| Step::Later);

    #[test]
    fn syntax_reads_as_in_the_contract() {
        let expected =
            "STOCK.DECR product quantity [product quantity ...] [ORDER order] [REQUEST id] [ACK redis|replica|postgres] [TIMEOUT ms]";
        assert_eq!(syntax(&DECR), expected);
        assert_eq!(syntax(&MGET), "STOCK.MGET product [product ...]");
        let table = markdown_table(&[&DECR, &MGET], &["stock"]);
        assert!(table.contains("| `STOCK.MGET product [product ...]` | Answers units. | `OK` |\n"), "{table}");
        assert!(table.contains("redis\\|replica\\|postgres"), "{table}");
    }

    #[test]
    fn entries_follow_from_the_spec() {
        let Reply::Array(fields) = entry(&DECR) else { panic!() };
        assert_eq!(fields.len(), 10);
        assert_eq!(fields[0], Reply::word("stock.decr"));
        assert_eq!(fields[1], Reply::Integer(-3));
        assert_eq!(fields[2], words(["write", "fast", "module", "movablekeys"]));
        assert_eq!(fields[3..6], [Reply::Integer(1), Reply::Integer(1), Reply::Integer(1)]);
        assert_eq!(fields[6], words(["@write", "@fast", "@stock"]));
        let Reply::Array(fields) = entry(&MGET) else { panic!() };
        assert_eq!((&fields[1], &fields[4]), (&Reply::Integer(-2), &Reply::Integer(-1)));
    }

    #[test]
    fn a_repeated_group_is_one_block() {
        let shown = arguments(&DECR);
        assert_eq!(shown.len(), 5);
        let Reply::Map(block) = &shown[0] else { panic!() };
        assert_eq!(block[1], (Reply::word("type"), Reply::word("block")));
        assert_eq!(block[2], (Reply::word("flags"), words(["multiple"])));
    }

    #[test]
    fn command_answers_what_clients_ask() {
        answers(&[
            ("COMMAND GETKEYS PING", "-ERR The command has no key arguments\r\n"),
            ("COMMAND GETKEYS nope", "-ERR Invalid command specified\r\n"),
            ("COMMAND INFO nope", "*1\r\n$-1\r\n"),
            ("COMMAND LIST FILTERBY PATTERN client|set*", "*2\r\n$14\r\nclient|setname\r\n$14\r\nclient|setinfo\r\n"),
            ("COMMAND LIST FOO", "-ERR syntax error\r\n"),
            ("COMMAND FOO", "-ERR unknown subcommand 'FOO'. Try COMMAND HELP.\r\n"),
        ]);
        let mut wire = Wire::new();
        let count = wire.cx.commands.top().count();
        assert_eq!(wire.send("COMMAND COUNT"), format!(":{count}\r\n"));
        assert!(wire.send("COMMAND").starts_with(&format!("*{count}\r\n*10\r\n")));
        let many = format!("COMMAND DOCS{}", " client".repeat(500));
        assert!(wire.send(&many).starts_with("-ERR more names than the "));
        let docs = wire.send("COMMAND DOCS client|setname");
        assert!(docs.starts_with("*2\r\n$14\r\nclient|setname\r\n*10\r\n$7\r\nsummary\r\n"), "{docs}");
        assert!(wire.send("COMMAND DOCS client").contains("subcommands\r\n"));
        assert!(wire.send("CLIENT HELP").contains("+SETNAME name\r\n"));
    }
}
