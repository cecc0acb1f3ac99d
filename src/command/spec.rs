//! A command, declared once: dispatch, argument matching, COMMAND, COMMAND DOCS, ACL categories, metric labels and the README's table
//! all come from its [`Spec`].

use std::time::Duration;

use super::{Context, Handler};
use crate::domain::quantity::QUANTITY_MAX;
use crate::limits::{PATTERN_MAX, TIMEOUT_MS_MAX};

/// Flags of a command, to be joined with `|`.
pub const WRITE: u32 = 1;
/// Changes nothing.
pub const READONLY: u32 = 1 << 1;
/// Constant time.
pub const FAST: u32 = 1 << 2;
/// For operators.
pub const ADMIN: u32 = 1 << 3;
/// May run before AUTH.
pub const NOAUTH: u32 = 1 << 4;
/// Belongs to publish and subscribe.
pub const PUBSUB: u32 = 1 << 5;
/// May wait long, and hold back its connection.
pub const BLOCKING: u32 = 1 << 6;
/// May run while the server starts, rebuilds or drains.
pub const LOADING: u32 = 1 << 7;
/// Belongs to the connection, not to any data.
pub const CONNECTION: u32 = 1 << 8;

/// May be given secrets, which nothing repeats.
pub const SECRET: u32 = 1 << 9;
/// Changes nothing although it is for operators.
pub const SHOWS: u32 = 1 << 10;

/// One command, or one subcommand (`CLIENT|SETNAME`).
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Upper case; a subcommand's follows its command's after `|`.
    pub name: &'static str,
    /// One sentence.
    pub summary: &'static str,
    /// Which commands it belongs with: `stock`, `coupon`, `lock`, `holdfast`, `connection`, `server`.
    pub family: &'static str,
    pub args: &'static [Arg],
    pub flags: u32,
    /// The reply's shape, for people.
    pub reply: &'static str,
    /// The version of Holdfast that brought it.
    pub since: &'static str,
    pub complexity: &'static str,
    /// A whole request, words separated by one space; it must match `args`.
    pub example: &'static str,
    /// `None` for a command that is nothing without a subcommand.
    pub run: Option<Handler>,
    /// How much more time its reply may take than others, apart from what the client asks it to wait.
    pub more_time: Duration,
    /// Says whether it is refused before its arguments are looked at, and with which error: where far more comes than can be served, a refusal
    /// must cost next to nothing.
    pub early: Option<fn(&Context) -> Option<&'static str>>,
    /// The words of its name: 2 for a subcommand.
    pub name_words: usize,
    /// How many positional arguments have to be given.
    required: usize,
    /// How many positional arguments repeat, as one group.
    pub group_width: usize,
    /// Whether something is optional or repeats.
    is_variadic: bool,
    /// Where the arguments are declared that every change looks for.
    pub at: Places,
    pub subcommands: &'static [&'static Spec],
}

const fn name_words(name: &str) -> usize {
    let (bytes, mut at, mut words) = (name.as_bytes(), 0, 1);
    while at < bytes.len() {
        if bytes[at] == b'|' {
            words += 1;
        }
        at += 1;
    }
    words
}

/// Places among the declared arguments; `None` where a command has no such argument.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    pub request: Option<usize>,
    pub ack: Option<usize>,
    pub timeout: Option<usize>,
    pub order: Option<usize>,
    /// The first of the repeated group.
    pub repeated: Option<usize>,
}

const fn place_of(args: &[Arg], name: &[u8]) -> Option<usize> {
    let mut at = 0;
    while at < args.len() {
        let declared = args[at].name.as_bytes();
        let mut same = declared.len() == name.len();
        let mut byte = 0;
        while same && byte < name.len() {
            same = declared[byte] == name[byte];
            byte += 1;
        }
        if same {
            return Some(at);
        }
        at += 1;
    }
    None
}

impl Spec {
    /// Starts a spec. What is not set: no flags, no arguments, since 0.1.0, O(1), an `OK` for a reply.
    pub const fn new(name: &'static str, summary: &'static str) -> Self {
        Self {
            name,
            summary,
            family: "server",
            args: &[],
            flags: 0,
            reply: "`OK`",
            since: "0.1.0",
            complexity: "O(1)",
            example: name,
            run: None,
            more_time: Duration::ZERO,
            early: None,
            name_words: name_words(name),
            required: 0,
            group_width: 0,
            is_variadic: false,
            at: Places { request: None, ack: None, timeout: None, order: None, repeated: None },
            subcommands: &[],
        }
    }

    pub const fn family(mut self, family: &'static str) -> Self {
        self.family = family;
        self
    }

    pub const fn args(mut self, args: &'static [Arg]) -> Self {
        self.args = args;
        let mut at = 0;
        while at < args.len() {
            let (presence, repeated) = (args[at].presence, args[at].is_repeated());
            if args[at].token.is_none() {
                self.required += matches!(presence, Presence::Required | Presence::Repeated) as usize;
                self.group_width += repeated as usize;
            }
            self.is_variadic |= !matches!(presence, Presence::Required);
            if repeated && self.at.repeated.is_none() {
                self.at.repeated = Some(at);
            }
            at += 1;
        }
        self.at.request = place_of(args, b"request");
        self.at.ack = place_of(args, b"ack");
        self.at.timeout = place_of(args, b"timeout");
        self.at.order = place_of(args, b"order");
        self
    }

    pub const fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    pub const fn reply(mut self, reply: &'static str) -> Self {
        self.reply = reply;
        self
    }

    pub const fn since(mut self, since: &'static str) -> Self {
        self.since = since;
        self
    }

    pub const fn complexity(mut self, complexity: &'static str) -> Self {
        self.complexity = complexity;
        self
    }

    pub const fn example(mut self, example: &'static str) -> Self {
        self.example = example;
        self
    }

    pub const fn run(mut self, run: Handler) -> Self {
        self.run = Some(run);
        self
    }

    pub const fn more_time(mut self, more_time: Duration) -> Self {
        self.more_time = more_time;
        self
    }

    pub const fn refused_early(mut self, early: fn(&Context) -> Option<&'static str>) -> Self {
        self.early = Some(early);
        self
    }

    pub const fn subcommands(mut self, subcommands: &'static [&'static Spec]) -> Self {
        self.subcommands = subcommands;
        self
    }

    /// Whether the flag is set.
    pub const fn is(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Whether it is promised when its reply comes.
    pub fn is_timed(&self) -> bool {
        matches!(self.family, "stock" | "coupon")
    }

    /// The name as COMMAND and errors show it.
    pub fn lower_name(&self) -> String {
        self.name.to_ascii_lowercase()
    }
    /// The arguments that have no option word, in order.
    pub fn positional(&self) -> impl Iterator<Item = (usize, &'static Arg)> + use<> {
        self.args.iter().enumerate().filter(|(_, arg)| arg.token.is_none())
    }

    /// The arguments behind an option word.
    pub fn options(&self) -> impl Iterator<Item = (usize, &'static Arg)> + use<> {
        self.args.iter().enumerate().filter(|(_, arg)| arg.token.is_some())
    }

    /// The words it needs at least, its name included.
    pub fn words_min(&self) -> usize {
        if self.run.is_none() && !self.subcommands.is_empty() {
            return 2;
        }
        self.name_words + self.required
    }

    /// Whether there is no one number of words: something is optional or repeats.
    pub fn is_variadic(&self) -> bool {
        self.is_variadic || !self.subcommands.is_empty()
    }

    /// The arity as COMMAND shows it: negative for "at least".
    pub fn arity(&self) -> i64 {
        let words = i64::try_from(self.words_min()).unwrap_or(i64::MAX);
        if self.is_variadic() { -words } else { words }
    }
}

/// What an argument may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The id of a thing, which errors name so: `product`, `lock name`.
    Id {
        /// As errors say it: `product id`.
        what: &'static str,
        /// Whether it names what is stored, as COMMAND's key positions show.
        key: bool,
    },
    /// A strict decimal within bounds, in the unit named.
    Integer { min: i64, max: i64, unit: &'static str },
    /// Any bytes.
    Text { bytes_max: usize },
    /// A client's idempotency key.
    RequestId,
    /// One of the words, in any case.
    Word(&'static [&'static str]),
    /// A glob.
    Pattern,
    /// Where a scan goes on.
    Cursor,
    /// The option word alone.
    Flag,
}

/// Whether an argument must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    Required,
    Optional,
    /// Once or more. All repeated arguments of a command stand together and repeat as one group.
    Repeated,
    /// Any number of times, also none.
    Any,
}

/// One argument of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arg {
    pub name: &'static str,
    /// The option word in front of it, upper case. Options come after the positional arguments, in any order.
    pub token: Option<&'static str>,
    pub kind: Kind,
    pub presence: Presence,
    /// Names of arguments that must not be given together with this one.
    pub excludes: &'static [&'static str],
}

impl Arg {
    const fn new(name: &'static str, kind: Kind) -> Self {
        Self { name, token: None, kind, presence: Presence::Required, excludes: &[] }
    }

    /// Makes it an option behind a word: `integer("low", ..).token("LOW")`.
    pub const fn token(mut self, token: &'static str) -> Self {
        self.token = Some(token);
        self.presence = Presence::Optional;
        self
    }

    /// Makes it a positional argument that may be left out.
    pub const fn optional(mut self) -> Self {
        self.presence = Presence::Optional;
        self
    }

    /// Makes it a list of one or more.
    pub const fn repeated(mut self) -> Self {
        self.presence = Presence::Repeated;
        self
    }

    /// Makes it a list that may be empty.
    pub const fn any_number(mut self) -> Self {
        self.presence = Presence::Any;
        self
    }

    /// Refuses it together with the named arguments.
    pub const fn excludes(mut self, names: &'static [&'static str]) -> Self {
        self.excludes = names;
        self
    }

    /// Whether it is a list's element.
    pub const fn is_repeated(&self) -> bool {
        matches!(self.presence, Presence::Repeated | Presence::Any)
    }

    /// Whether it names what is stored.
    pub const fn is_key(&self) -> bool {
        matches!(self.kind, Kind::Id { key: true, .. })
    }

    /// Whether it names a lock.
    pub fn is_lock_name(&self) -> bool {
        self.kind == LOCK_NAME.kind
    }
}

/// A product's id.
pub const PRODUCT: Arg = Arg::new("product", Kind::Id { what: "product id", key: true });
/// A coupon's id.
pub const COUPON: Arg = Arg::new("coupon", Kind::Id { what: "coupon id", key: true });
/// A lock's name.
pub const LOCK_NAME: Arg = Arg::new("name", Kind::Id { what: "lock name", key: true });
/// A lock's fencing token.
pub const TOKEN: Arg = integer("token", 1, crate::domain::quantity::TOTAL_MAX, "");
/// A user's id.
pub const USER: Arg = Arg::new("user", Kind::Id { what: "user id", key: false });
/// An order's id.
pub const ORDER: Arg = Arg::new("order", Kind::Id { what: "order id", key: false });
/// A number of units, one or more.
pub const QUANTITY: Arg = integer("quantity", 1, QUANTITY_MAX, "");

/// The idempotency key that every changing command takes.
pub const REQUEST: Arg = Arg::new("request", Kind::RequestId).token("REQUEST");
/// What the reply of a changing command waits for.
pub const ACK: Arg = word("ack", &["redis", "replica", "postgres"]).token("ACK");
/// How long it waits, in ms.
pub const TIMEOUT: Arg = integer("timeout", 1, TIMEOUT_MS_MAX, "ms").token("TIMEOUT");

/// Words that are nobody's id, in any case: a list of ids ends at the first of them.
pub const OPTION_WORDS: &[&str] = &["REQUEST", "ACK", "TIMEOUT", "ORDER", "LOW", "DRYRUN"];

/// An id of something else; `what` is how errors name it (`owner id`).
pub const fn id(name: &'static str, what: &'static str) -> Arg {
    Arg::new(name, Kind::Id { what, key: false })
}

/// A strict decimal from `min` to `max`, in `unit` (empty: none).
pub const fn integer(name: &'static str, min: i64, max: i64, unit: &'static str) -> Arg {
    Arg::new(name, Kind::Integer { min, max, unit })
}

/// A point in time, in Unix ms.
pub const fn unix_ms(name: &'static str) -> Arg {
    integer(name, 0, crate::domain::quantity::TOTAL_MAX, "unix ms")
}

/// Any bytes, up to `bytes_max` of them.
pub const fn text(name: &'static str, bytes_max: usize) -> Arg {
    Arg::new(name, Kind::Text { bytes_max })
}

/// One of the words, given in lower case.
pub const fn word(name: &'static str, words: &'static [&'static str]) -> Arg {
    Arg::new(name, Kind::Word(words))
}

/// A glob, at most [`PATTERN_MAX`] bytes.
pub const fn pattern(name: &'static str) -> Arg {
    Arg::new(name, Kind::Pattern)
}

/// Where a scan goes on: `0` or what the scan before returned.
pub const fn cursor(name: &'static str) -> Arg {
    Arg::new(name, Kind::Cursor)
}

/// An option word that stands alone: `flag("dryrun", "DRYRUN")`.
pub const fn flag(name: &'static str, token: &'static str) -> Arg {
    Arg::new(name, Kind::Flag).token(token)
}

const _: () = assert!(PATTERN_MAX <= crate::limits::STRANGER_BULK_MAX);
