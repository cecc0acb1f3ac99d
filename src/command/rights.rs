//! What users' rules may name, whether a user may run a command, and the log of what operators did.

use std::fmt::Write as _;

use bytes::Bytes;

use super::args::Args;
use super::spec::{ADMIN, Arg, Kind, SECRET, SHOWS, Spec};
use super::{Commands, describe};
use crate::limits::AUDIT_ARGUMENT_MAX;
use crate::resp::Request;
use crate::session::chatter::{self, Line};
use crate::session::user::Catalogue;
use crate::session::{Session, User};

/// What the families' commands are filed under, whether a version has any of them or not.
const CATEGORIES: &[&str] =
    &["stock", "coupon", "lock", "holdfast", "read", "write", "admin", "dangerous", "fast", "slow", "blocking", "connection", "pubsub"];

impl Catalogue for Commands {
    fn count(&self) -> usize {
        self.len()
    }

    fn named(&self, name: &str) -> Option<Vec<usize>> {
        let numbers = |wanted: &dyn Fn(&Spec) -> bool| {
            let numbered = self.all().iter().enumerate();
            numbered.filter(|(_, spec)| wanted(spec)).map(|(number, _)| number).collect::<Vec<_>>()
        };
        match name.strip_prefix('@').map(str::to_ascii_lowercase) {
            Some(all) if all == "all" => Some(numbers(&|_| true)),
            Some(category) if CATEGORIES.contains(&category.as_str()) => {
                Some(numbers(&|spec| describe::categories(spec).contains(&category.as_str())))
            }
            Some(_) => None,
            None => {
                let (number, spec) = Commands::named(self, name.as_bytes())?;
                Some((number..=number + spec.subcommands.len()).collect())
            }
        }
    }

    fn free(&self) -> Vec<usize> {
        let numbered = self.all().iter().enumerate();
        numbered.filter(|(_, spec)| spec.family == "connection" && !spec.is(ADMIN)).map(|(number, _)| number).collect()
    }
}

/// Why the user may not run the command at all, in Redis's words.
pub fn may_run(session: &Session, number: usize, spec: &Spec) -> Result<(), String> {
    let user = session.user();
    if user.may_run(number) {
        return Ok(());
    }
    denied(session, spec, "command");
    Err(format!("NOPERM User {} has no permissions to run the '{}' command", user.name, spec.lower_name()))
}

/// Why the user may not run it with these arguments.
pub fn may_touch(session: &Session, spec: &Spec, args: &Args) -> Result<(), String> {
    if touches_only_its_own(session.user(), spec, args) {
        return Ok(());
    }
    denied(session, spec, "id");
    Err("NOPERM No permissions to access a key".to_owned())
}

/// Whether the user may name every id that the command names. Of the ids only those count that things are kept under. A command that names
/// none of them, such as one that lists them, needs the right to all.
pub fn touches_only_its_own(user: &User, spec: &Spec, args: &Args) -> bool {
    user.may_touch_all() || named(spec, args).is_some_and(|ids| ids.into_iter().all(|id| user.may_touch(id)))
}

/// Whether the user may watch every channel and pattern that the command subscribes to.
pub fn watches_only_its_own(user: &User, spec: &Spec, args: &Args) -> bool {
    match spec.name {
        "SUBSCRIBE" => args.list("channel").all(|channel| user.may_watch(channel)),
        "PSUBSCRIBE" => args.list("pattern").all(|pattern| user.may_watch_pattern(pattern)),
        _ => true,
    }
}

/// The ids that a command names and its user needs the right to; `None` where it needs the right to all.
fn named<'a>(spec: &Spec, args: &'a Args) -> Option<Vec<&'a [u8]>> {
    // What is passed through names keys of Redis, whoever's they are.
    if spec.family == "passthrough" {
        return None;
    }
    if !spec.name.contains('.') || spec.family == "holdfast" {
        return Some(Vec::new());
    }
    let ids = |wanted: &dyn Fn(&Arg) -> bool| args.places(wanted).into_iter().map(|at| &args.words()[at]).collect::<Vec<_>>();
    let mut named = ids(&Arg::is_key);
    if named.is_empty() {
        named = ids(&|arg| matches!(arg.kind, Kind::Id { what: "order id", .. }));
    }
    (!named.is_empty()).then_some(named)
}

/// The rights that one command needs as it was sent, for as long as it waits.
pub struct Needed {
    number: usize,
    /// `None`: all of them.
    ids: Option<Vec<Bytes>>,
}

impl Needed {
    /// Those of the command with this number. Keeps nothing of what was read.
    pub fn by(number: usize, spec: &Spec, args: &Args) -> Self {
        let ids = named(spec, args).map(|ids| ids.into_iter().map(Bytes::copy_from_slice).collect());
        Self { number, ids }
    }

    /// Whether this user has them.
    pub fn are_had_by(&self, user: &User) -> bool {
        user.may_run(self.number) && (user.may_touch_all() || self.ids.as_ref().is_some_and(|ids| ids.iter().all(|id| user.may_touch(id))))
    }
}

/// Counts what a user was refused.
pub fn denied(session: &Session, spec: &Spec, what: &'static str) {
    metrics::counter!("holdfast_denied_total", "what" => what).increment(1);
    if spec.is(ADMIN)
        && let Some(left_out) = chatter::allows(Line::Denied)
    {
        let (user, client, command) = (&session.user().name, session.client.address, spec.name);
        tracing::warn!(target: "holdfast::audit", %user, %client, command, left_out, "denied");
    }
}

/// Writes down that an operator's command runs: who, from where, which, with what. What only shows something is logged as `debug`: monitoring
/// asks for it all the time.
pub fn audit(session: &Session, spec: &Spec, args: &Args) {
    let (user, client, command) = (&session.user().name, session.client.address, spec.name);
    if spec.is(SHOWS) {
        tracing::debug!(target: "holdfast::audit", %user, %client, command, "ran");
    } else {
        tracing::info!(target: "holdfast::audit", %user, %client, command, arguments = shown(spec, args.words(), spec.name_words), "ran");
    }
}

/// The words from `from` on for people, quoted; none of a command that may be given secrets.
pub fn shown(spec: &Spec, words: &Request, from: usize) -> String {
    let mut text = String::new();
    for word in words.iter().skip(from) {
        if !text.is_empty() {
            text.push(' ');
        }
        if spec.is(SECRET) {
            text.push_str("\"(redacted)\"");
        } else {
            quote(&mut text, &word[..word.len().min(AUDIT_ARGUMENT_MAX)]);
        }
    }
    text
}

/// Appends bytes in quotes, escaped as Redis's MONITOR does it, which tools read back.
pub fn quote(text: &mut String, bytes: &[u8]) {
    text.push('"');
    for byte in bytes {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(*byte)]),
            b'\n' => text.push_str("\\n"),
            b'\r' => text.push_str("\\r"),
            b'\t' => text.push_str("\\t"),
            0x07 => text.push_str("\\a"),
            0x08 => text.push_str("\\b"),
            b' '..=b'~' => text.push(char::from(*byte)),
            other => _ = write!(text, "\\x{other:02x}"),
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::super::table::TABLE;
    use super::super::tests::Wire;
    use super::*;
    use crate::session::users::Users;

    /// A client of the user `a` with these rules.
    fn wire(rules: &str) -> Wire {
        let file = format!("user a on nopass {rules}");
        let users = Users::read(Some(&file), None, &Commands::new(TABLE)).unwrap();
        let mut wire = Wire::with_users(users);
        assert_eq!(wire.send("AUTH a x"), "+OK\r\n");
        wire
    }

    #[test]
    fn a_user_runs_what_it_may_and_nothing_else() {
        let mut wire = wire("+@stock -stock.set +client|list ~*");
        for (request, reply) in [
            ("STOCK.SET a 1", "-NOPERM User a has no permissions to run the 'stock.set' command\r\n"),
            ("COUPON.INFO c", "-NOPERM User a has no permissions to run the 'coupon.info' command\r\n"),
            ("CONFIG GET *", "-NOPERM User a has no permissions to run the 'config|get' command\r\n"),
            ("CLIENT KILL ID 99", "-NOPERM User a has no permissions to run the 'client|kill' command\r\n"),
            ("STOCK.GET {", "-ERR invalid product id"),
            ("PING", "+PONG\r\n"),
            ("CLIENT LIST", "$"),
            ("NOSUCH", "-ERR unknown command 'NOSUCH'"),
        ] {
            let answer = wire.send(request);
            assert!(answer.starts_with(reply), "{request}: {answer}");
        }
    }

    #[test]
    fn a_user_with_patterns_names_only_what_matches_them() {
        let mut wire = wire("+@all ~shop-*");
        for denied in ["STOCK.GET mug", "STOCK.DECR shop-mug 1 mug 1", "STOCK.SCAN 0", "STOCK.SYNC", "COUPON.INFO c"] {
            assert_eq!(wire.send(denied), "-NOPERM No permissions to access a key\r\n", "{denied}");
        }
        assert!(!wire.send("STOCK.DECR shop-mug 1 shop-cup 1 ORDER other").starts_with("-NOPERM"));
        assert!(!wire.send("HOLDFAST.STATUS").starts_with("-NOPERM"));
    }

    #[test]
    fn what_rules_may_name_is_in_the_table() {
        let commands = Commands::new(TABLE);
        for spec in commands.all() {
            for category in describe::categories(spec) {
                assert!(CATEGORIES.contains(&category), "{category} of {}", spec.name);
            }
        }
        let named = |name: &str| Catalogue::named(&commands, name).map(|numbers| numbers.len());
        assert_eq!(named("@nothing"), None);
        assert!(named("@lock").is_some());
        assert_eq!(named("@ALL"), Some(commands.len()));
        assert_eq!((named("client|list"), named("stock.get"), named("nothing")), (Some(1), Some(1), None));
        assert!(named("client").unwrap() > 10);
    }

    #[test]
    fn words_are_quoted_as_redis_quotes_them() {
        let mut text = String::new();
        quote(&mut text, b"it's \"a\\\r\n\t\x07\x08\x00\xc3~");
        assert_eq!(text, r#""it's \"a\\\r\n\t\a\b\x00\xc3~""#);
    }

    #[test]
    fn what_may_be_secret_is_not_shown() {
        let words = ["X", "a\r\n", "s3cret"].into_iter().collect();
        assert_eq!(shown(&Spec::new("X", "x."), &words, 1), r#""a\r\n" "s3cret""#);
        assert_eq!(shown(&Spec::new("X", "x.").flags(SECRET), &words, 1), r#""(redacted)" "(redacted)""#);
    }
}
