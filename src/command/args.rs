//! Matches a request against its command's declared arguments, so that a handler cannot see an unvalidated value.

use bytes::Bytes;

use super::spec::{Arg, Kind, OPTION_WORDS, Presence, Spec};
use crate::domain::{Id, LockName, RequestId, quantity, request};
use crate::limits::{PATTERN_MAX, SPEC_ARGS_MAX};
use crate::resp::Request;

/// What a change's reply waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ack {
    Redis,
    Replica,
    Postgres,
}

impl Ack {
    /// From one of its words.
    pub fn of_word(word: &str) -> Self {
        match word {
            "redis" => Self::Redis,
            "replica" => Self::Replica,
            _ => Self::Postgres,
        }
    }
}

/// Where one declared argument was found.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    /// Its place in the words; 0 where it was not given.
    at: usize,
    /// Its value, if it is a number; the place among the words, if it is one of several words.
    integer: i64,
}

/// A request that matches its spec. Arguments are read by the names they are declared under.
#[derive(Clone, Debug)]
pub struct Args {
    spec: &'static Spec,
    words: Request,
    found: [Found; SPEC_ARGS_MAX],
    /// How many times the repeated group was given.
    groups: usize,
}

impl Args {
    /// Matches the words, name included; errors with the error reply's text.
    pub fn parse(spec: &'static Spec, words: Request) -> Result<Self, String> {
        let mut args = Self::unmatched(spec, words);
        args.match_words()?;
        Ok(args)
    }

    /// The words, name included, before they are matched: none of the arguments is there.
    pub(super) fn unmatched(spec: &'static Spec, words: Request) -> Self {
        Self { spec, words, found: [Found::default(); SPEC_ARGS_MAX], groups: 0 }
    }

    /// Matches them, where they are: [`Args::parse`] without moving it. Once only.
    pub(super) fn match_words(&mut self) -> Result<(), String> {
        if !arity_fits(self.spec, self.words.len()) {
            return Err(wrong_arity(self.spec));
        }
        let after = self.match_positional()?;
        self.match_options(after)
    }

    /// Matches the positional arguments and returns the place behind them.
    fn match_positional(&mut self) -> Result<usize, String> {
        let mut at = self.spec.name_words;
        for (index, arg) in self.spec.positional() {
            let given = at < self.words.len();
            match arg.presence {
                Presence::Required if !given => return Err(wrong_arity(self.spec)),
                Presence::Required => {}
                Presence::Optional if !given || self.ends_positional(at) => continue,
                Presence::Optional => {}
                Presence::Repeated | Presence::Any => {
                    if self.found[index].at == 0 && self.groups == 0 {
                        at = self.match_groups(index, at)?;
                    }
                    continue;
                }
            }
            self.accept(index, arg, at)?;
            at += 1;
        }
        Ok(at)
    }

    /// Matches the repeated group, whose first argument is `first`.
    fn match_groups(&mut self, first: usize, mut at: usize) -> Result<usize, String> {
        let arg = &self.spec.args[first];
        let least = usize::from(arg.presence == Presence::Repeated);
        while at < self.words.len() && (self.groups < least || !self.ends_positional(at)) {
            if self.words.len() - at < self.spec.group_width {
                return Err(wrong_arity(self.spec));
            }
            for offset in 0..self.spec.group_width {
                let index = first + offset;
                let place = self.found[index].at;
                self.accept(index, &self.spec.args[index], at + offset)?;
                // A list is found where its first element is.
                if self.groups > 0 {
                    self.found[index].at = place;
                }
            }
            at += self.spec.group_width;
            self.groups += 1;
        }
        Ok(at)
    }

    /// Whether the word at `at` is an option's, so that no positional argument can be meant.
    fn ends_positional(&self, at: usize) -> bool {
        let word = &self.words[at];
        let named = |token: &str| word.eq_ignore_ascii_case(token.as_bytes());
        let lists_ids = self.spec.args.iter().any(|arg| arg.is_repeated() && matches!(arg.kind, Kind::Id { .. }));
        self.spec.options().any(|(_, arg)| arg.token.is_some_and(named)) || (lists_ids && is_option_word(word))
    }

    fn match_options(&mut self, mut at: usize) -> Result<(), String> {
        if at >= self.words.len() {
            return Ok(());
        }
        let syntax = || "ERR syntax error".to_owned();
        if self.spec.options().next().is_none() && self.spec.group_width == 0 {
            return Err(wrong_arity(self.spec));
        }
        while at < self.words.len() {
            let word = &self.words[at];
            let option = self.spec.options().find(|(_, arg)| arg.token.is_some_and(|token| word.eq_ignore_ascii_case(token.as_bytes())));
            let (index, arg) = option.ok_or_else(syntax)?;
            if self.found[index].at != 0 {
                return Err(syntax());
            }
            if arg.kind == Kind::Flag {
                self.found[index].at = at;
                at += 1;
                continue;
            }
            if at + 1 >= self.words.len() {
                return Err(syntax());
            }
            self.accept(index, arg, at + 1)?;
            at += 2;
        }
        let contradicts = |arg: &Arg| arg.excludes.iter().any(|name| self.has(name));
        if self.spec.options().any(|(index, arg)| self.found[index].at != 0 && contradicts(arg)) {
            return Err(syntax());
        }
        Ok(())
    }

    /// Checks the word against the argument and notes it.
    fn accept(&mut self, index: usize, arg: &Arg, at: usize) -> Result<(), String> {
        let word = &self.words[at];
        let mut integer = 0;
        match arg.kind {
            Kind::Id { what, .. } => {
                let is_valid = if arg.is_lock_name() { LockName::is_valid } else { Id::is_valid };
                if !is_valid(word) || is_option_word(word) {
                    return Err(format!(
                        "ERR invalid {what}: 1 to 128 bytes of UTF-8 without spaces, control characters, '{{' or '}}', and no option word"
                    ));
                }
            }
            Kind::Integer { min, max, unit } => {
                integer = quantity::parse(word, min, max).ok_or_else(|| {
                    let space = if unit.is_empty() { "" } else { " " };
                    format!("ERR invalid {}: a whole number from {min} to {max}{space}{unit}", arg.name)
                })?;
            }
            Kind::Text { bytes_max } => {
                if word.len() > bytes_max {
                    return Err(format!("ERR invalid {}: at most {bytes_max} bytes", arg.name));
                }
            }
            Kind::RequestId => {
                if !RequestId::is_valid(word) {
                    return Err("ERR invalid request id: 1 to 64 bytes; one that begins with 'hf-' only as INDOUBT named it".to_owned());
                }
            }
            Kind::Word(words) => {
                let place = words.iter().position(|known| word.eq_ignore_ascii_case(known.as_bytes()));
                let wrong = || match self.spec.name.contains('.') {
                    true => format!("ERR invalid {}: one of {}", arg.name, words.join(", ")),
                    // Redis's own commands say no more.
                    false => "ERR syntax error".to_owned(),
                };
                let place = place.ok_or_else(wrong)?;
                integer = i64::try_from(place).unwrap_or_default();
            }
            Kind::Pattern => {
                if word.len() > PATTERN_MAX {
                    return Err(format!("ERR invalid {}: at most {PATTERN_MAX} bytes", arg.name));
                }
            }
            Kind::Cursor => {
                let digits = !word.is_empty() && word.iter().all(u8::is_ascii_digit);
                if !digits || std::str::from_utf8(word).ok().and_then(|text| text.parse::<u64>().ok()).is_none() {
                    return Err("ERR invalid cursor".to_owned());
                }
            }
            Kind::Flag => {}
        }
        self.found[index] = Found { at, integer };
        Ok(())
    }

    /// The command these arguments are of.
    pub fn spec(&self) -> &'static Spec {
        self.spec
    }

    /// Every word of the request, the command's name first.
    pub fn words(&self) -> &Request {
        &self.words
    }

    /// The word behind the command's name and subcommand at `index`, as the client sent it.
    pub fn raw(&self, index: usize) -> Option<&[u8]> {
        self.words.get(self.spec.name_words + index)
    }

    /// Whether the argument was given.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// The bytes of an argument, if it was given.
    pub fn maybe_text(&self, name: &str) -> Option<&[u8]> {
        self.find(name).map(|found| &self.words[found.at])
    }

    /// The bytes of a required argument.
    pub fn text(&self, name: &str) -> &[u8] {
        &self.words[self.required(name).at]
    }

    /// The bytes of a required argument, sharing the request's memory.
    pub fn shared(&self, name: &str) -> Bytes {
        self.words.shared(self.required(name).at)
    }

    /// The bytes of an argument, if it was given, sharing the request's memory.
    pub fn maybe_shared(&self, name: &str) -> Option<Bytes> {
        self.find(name).map(|found| self.words.shared(found.at))
    }

    /// A required id.
    pub fn id(&self, name: &str) -> Id {
        self.valid(name, self.required(name).at)
    }

    /// An id, if it was given.
    pub fn maybe_id(&self, name: &str) -> Option<Id> {
        self.find(name).map(|found| self.valid(name, found.at))
    }

    /// Every id of a list, in the order given; empty where the list is.
    pub fn ids<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Id> + 'a {
        self.places_of(name).map(move |at| self.valid(name, at))
    }

    /// Every element of a list as bytes, in the order given.
    pub fn list(&self, name: &str) -> impl Iterator<Item = &[u8]> + '_ {
        self.places_of(name).map(|at| &self.words[at])
    }

    /// The same, sharing the request's memory.
    pub fn shared_list(&self, name: &str) -> impl Iterator<Item = Bytes> + '_ {
        self.places_of(name).map(|at| self.words.shared(at))
    }

    fn places_of(&self, name: &str) -> impl Iterator<Item = usize> + '_ {
        let first = self.find(name).map_or(0, |found| found.at);
        (0..if first == 0 { 0 } else { self.groups }).map(move |group| first + group * self.spec.group_width)
    }

    /// The pairs of a list of two (`product quantity`), in the order given.
    pub fn pairs(&self) -> impl Iterator<Item = (Id, i64)> + '_ {
        assert!(self.spec.group_width == 2, "{} declares no pairs", self.spec.name);
        let index = self.spec.at.repeated.unwrap_or_default();
        let (first, integer) = (self.found[index].at, self.found[index + 1].integer);
        (0..self.groups).map(move |group| {
            let at = first + group * 2;
            // What was found of a list is its last element.
            let last = group + 1 == self.groups;
            let quantity = if last { integer } else { quantity::parse(&self.words[at + 1], 0, i64::MAX).unwrap_or_default() };
            (Id::of_valid(self.words.shared(at)), quantity)
        })
    }

    /// A required number.
    pub fn integer(&self, name: &str) -> i64 {
        self.required(name).integer
    }

    /// A number, if it was given.
    pub fn maybe_integer(&self, name: &str) -> Option<i64> {
        self.find(name).map(|found| found.integer)
    }

    /// One of several words, as its spec writes it, if it was given.
    pub fn maybe_word(&self, name: &str) -> Option<&'static str> {
        let place = usize::try_from(self.find(name)?.integer).ok()?;
        match self.declared(name).1.kind {
            Kind::Word(words) => words.get(place).copied(),
            _ => None,
        }
    }

    /// The client's idempotency key, if it sent one.
    pub fn request(&self) -> Option<RequestId> {
        self.given(self.spec.at.request).and_then(|(_, found)| RequestId::parse(self.words.shared(found.at)))
    }

    /// What the client wants the reply to wait for, if it said.
    pub fn ack(&self) -> Option<Ack> {
        let (index, found) = self.given(self.spec.at.ack)?;
        let Kind::Word(words) = self.spec.args[index].kind else { return None };
        let word = words.get(usize::try_from(found.integer).ok()?)?;
        Some(Ack::of_word(word))
    }

    /// How many ms the reply may wait for that, if the client said.
    pub fn timeout_ms(&self) -> Option<i64> {
        self.given(self.spec.at.timeout).map(|(_, found)| found.integer)
    }

    /// The order that it is for, if there is one.
    pub fn order(&self) -> Option<Id> {
        self.given(self.spec.at.order).map(|(_, found)| Id::of_valid(self.words.shared(found.at)))
    }

    /// The fingerprint of the command and its arguments: two requests with the same one ask for the same change. Options count in any
    /// order and case; REQUEST, ACK and TIMEOUT do not count.
    pub fn digest(&self) -> String {
        let mut options: Vec<(usize, &Arg)> = self
            .spec
            .options()
            .filter(|(index, arg)| self.found[*index].at != 0 && !matches!(arg.token, Some("REQUEST" | "ACK" | "TIMEOUT")))
            .collect();
        options.sort_by_key(|(_, arg)| arg.token);
        let first = self.spec.name_words;
        let positional = self.positional_end() - first;
        let mut parts: Vec<&[u8]> = Vec::with_capacity(1 + positional + options.len() * 2);
        parts.push(self.spec.name.as_bytes());
        parts.extend(self.words.iter().skip(first).take(positional));
        for (index, arg) in options {
            parts.push(arg.token.unwrap_or_default().as_bytes());
            match arg.kind {
                Kind::Flag => {}
                Kind::Word(_) => parts.push(self.maybe_word(arg.name).unwrap_or_default().as_bytes()),
                _ => parts.push(&self.words[self.found[index].at]),
            }
        }
        request::digest(parts.into_iter())
    }

    /// The places of the words that are keys.
    pub fn key_positions(&self) -> Vec<usize> {
        self.places(&Arg::is_key)
    }

    /// The places of the words given for the arguments that are `wanted`.
    pub fn places(&self, wanted: &dyn Fn(&Arg) -> bool) -> Vec<usize> {
        let mut positions = Vec::new();
        for (index, arg) in self.spec.args.iter().enumerate().filter(|(_, arg)| wanted(arg)) {
            let first = self.found[index].at;
            let times = if arg.is_repeated() { self.groups } else { usize::from(first != 0) };
            positions.extend((0..times).map(|group| first + group * self.spec.group_width));
        }
        positions
    }

    /// The place behind the last positional word.
    fn positional_end(&self) -> usize {
        let single = self.spec.positional().filter(|(index, arg)| !arg.is_repeated() && self.found[*index].at != 0).count();
        self.spec.name_words + single + self.groups * self.spec.group_width
    }

    /// What was given for the argument that is declared there.
    fn given(&self, declared: Option<usize>) -> Option<(usize, Found)> {
        let index = declared?;
        let found = self.found[index];
        (found.at != 0).then_some((index, found))
    }

    /// The id in a word that matching has found to be one.
    fn valid(&self, name: &str, at: usize) -> Id {
        match self.declared(name).1.kind {
            Kind::Id { .. } => Id::of_valid(self.words.shared(at)),
            _ => Id::from(""),
        }
    }

    /// # Panics
    /// If the spec has no such argument: that is a mistake in the handler, which its first test finds.
    #[allow(clippy::panic, reason = "a mistake in a handler, not in a request")]
    fn declared(&self, name: &str) -> (usize, &'static Arg) {
        let declared = self.spec.args.iter().enumerate().find(|(_, arg)| is_named(arg, name));
        declared.unwrap_or_else(|| panic!("{} declares no argument '{name}'", self.spec.name))
    }

    fn find(&self, name: &str) -> Option<Found> {
        let found = self.found[self.declared(name).0];
        (found.at != 0).then_some(found)
    }

    /// # Panics
    /// As [`Args::declared`], and if the argument is not one that matching has made sure of.
    #[allow(clippy::panic, reason = "a mistake in a handler, not in a request")]
    fn required(&self, name: &str) -> Found {
        self.find(name).unwrap_or_else(|| panic!("{} may come without '{name}': read it with maybe_", self.spec.name))
    }
}

fn is_option_word(word: &[u8]) -> bool {
    OPTION_WORDS.iter().any(|option| word.eq_ignore_ascii_case(option.as_bytes()))
}

/// Compares in place what mostly differs: a call costs more.
fn is_named(arg: &Arg, name: &str) -> bool {
    arg.name.len() == name.len() && arg.name.as_bytes()[0] == name.as_bytes()[0] && arg.name == name
}

/// Whether a request of so many words can be this command.
pub fn arity_fits(spec: &Spec, words: usize) -> bool {
    words >= spec.words_min() && (spec.is_variadic() || words == spec.words_min())
}

/// The error for too many or too few words.
pub fn wrong_arity(spec: &Spec) -> String {
    format!("ERR wrong number of arguments for '{}' command", spec.lower_name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Step;
    use crate::command::spec::{ACK, LOCK_NAME, ORDER, PRODUCT, QUANTITY, REQUEST, TIMEOUT, USER, cursor, flag, integer, pattern, text};
    use crate::domain::quantity::QUANTITY_MAX;
    use proptest::prelude::*;

    const fn spec(name: &'static str, args: &'static [Arg]) -> Spec {
        Spec::new(name, "Tests.").args(args).run(|_| Step::Later)
    }

    static DECR: Spec = spec("STOCK.DECR", &[PRODUCT.repeated(), QUANTITY.repeated(), ORDER.token("ORDER"), REQUEST, ACK, TIMEOUT]);
    static SET: Spec = spec(
        "STOCK.SET",
        &[PRODUCT, integer("quantity", 0, QUANTITY_MAX, ""), integer("low", 0, QUANTITY_MAX, "").token("LOW"), REQUEST, ACK, TIMEOUT],
    );
    static GET: Spec = spec("STOCK.GET", &[PRODUCT]);
    static MGET: Spec = spec("STOCK.MGET", &[PRODUCT.repeated()]);
    static SYNC: Spec = spec("STOCK.SYNC", &[PRODUCT.any_number(), flag("dryrun", "DRYRUN")]);
    static RESERVE: Spec = spec(
        "STOCK.RESERVE",
        &[ORDER, integer("ttl_ms", 1, 2_592_000_000, "ms"), PRODUCT.repeated(), QUANTITY.repeated(), REQUEST, ACK, TIMEOUT],
    );
    static AWAIT: Spec = spec("HOLDFAST.AWAIT", &[text("position", 64), integer("timeout_ms", 1, 600_000, "ms").optional()]);
    static LOCK: Spec = spec(
        "LOCK.ACQUIRE",
        &[
            LOCK_NAME,
            integer("lease", 1000, 3_600_000, "ms").token("LEASE"),
            integer("wait", 1, 600_000, "ms").token("WAIT"),
            flag("session", "SESSION").excludes(&["lease"]),
        ],
    );
    static SCAN: Spec =
        spec("STOCK.SCAN", &[cursor("cursor"), pattern("match").token("MATCH"), integer("count", 1, 1000, "").token("COUNT")]);
    static ISSUE: Spec = spec("COUPON.ISSUE", &[super::super::spec::COUPON, USER, REQUEST, ACK, TIMEOUT]);

    fn parsed(spec: &'static Spec, request: &str) -> Result<Args, String> {
        Args::parse(spec, request.split(' ').collect())
    }

    fn args(spec: &'static Spec, request: &str) -> Args {
        parsed(spec, request).unwrap_or_else(|error| panic!("{request}: {error}"))
    }

    #[test]
    fn a_handler_reads_what_was_declared() {
        let args = args(&DECR, "stock.decr a 1 b 20 timeout 50 ORDER o-1 Ack Postgres REQUEST r-1");
        let pairs: Vec<(Id, i64)> = args.pairs().collect();
        assert_eq!(pairs, [(Id::from("a"), 1), (Id::from("b"), 20)]);
        assert_eq!(args.ids("product").collect::<Vec<_>>(), [Id::from("a"), Id::from("b")]);
        assert_eq!(args.maybe_id("order"), Some(Id::from("o-1")));
        assert_eq!((args.ack(), args.maybe_integer("timeout")), (Some(Ack::Postgres), Some(50)));
        assert_eq!(args.request().map(|id| id.escaped()), Some("r-1".to_owned()));
        assert_eq!(args.key_positions(), [1, 3]);
        assert_eq!(args.raw(1), Some(&b"1"[..]));
    }

    #[test]
    fn what_is_optional_may_be_left_out() {
        let set = args(&SET, "STOCK.SET a 0");
        assert_eq!((set.id("product"), set.integer("quantity"), set.maybe_integer("low")), (Id::from("a"), 0, None));
        assert_eq!((set.request(), set.ack()), (None, None));
        assert_eq!(args(&AWAIT, "HOLDFAST.AWAIT 1-2").maybe_integer("timeout_ms"), None);
        assert_eq!(args(&AWAIT, "HOLDFAST.AWAIT 1-2 50").maybe_integer("timeout_ms"), Some(50));
        let sync = args(&SYNC, "STOCK.SYNC dryrun");
        assert!(sync.has("dryrun") && sync.ids("product").next().is_none());
        assert_eq!(args(&SYNC, "STOCK.SYNC a b").ids("product").count(), 2);
        assert!(args(&LOCK, "LOCK.ACQUIRE l WAIT 5 SESSION").has("session"));
        assert_eq!(args(&GET, "STOCK.GET a").request(), None);
        let reserve = args(&RESERVE, "STOCK.RESERVE o 5 a 1");
        assert_eq!((reserve.pairs().count(), reserve.key_positions()), (1, vec![3]));
    }

    #[test]
    fn what_does_not_match_is_refused_by_name() {
        const QUANTITY_WORDS: &str = "ERR invalid quantity: a whole number from 1 to 1000000000000";
        let long = format!("STOCK.GET {}", "x".repeat(129));
        let rows: &[(&'static Spec, &str, &str)] = &[
            (&GET, "STOCK.GET", "ERR wrong number of arguments for 'stock.get' command"),
            (&GET, "STOCK.GET a b", "ERR wrong number of arguments for 'stock.get' command"),
            (&GET, "STOCK.GET {a}", "ERR invalid product id"),
            (&GET, &long, "ERR invalid product id"),
            (&GET, "STOCK.GET Request", "ERR invalid product id"),
            (&DECR, "STOCK.DECR a", "ERR wrong number of arguments for 'stock.decr' command"),
            (&DECR, "STOCK.DECR a 1 b", "ERR wrong number of arguments for 'stock.decr' command"),
            (&DECR, "STOCK.DECR a 0", QUANTITY_WORDS),
            (&DECR, "STOCK.DECR a +1", QUANTITY_WORDS),
            (&DECR, "STOCK.DECR a 1 b REQUEST", QUANTITY_WORDS),
            (&DECR, "STOCK.DECR REQUEST r", "ERR invalid product id"),
            (&DECR, "STOCK.DECR a 1 REQUEST", "ERR syntax error"),
            (&DECR, "STOCK.DECR a 1 REQUEST r REQUEST r", "ERR syntax error"),
            (&DECR, "STOCK.DECR a 1 LOW 5", "ERR syntax error"),
            (&DECR, "STOCK.DECR a 1 REQUEST r b 2", "ERR syntax error"),
            (
                &DECR,
                "STOCK.DECR a 1 REQUEST hf-1",
                "ERR invalid request id: 1 to 64 bytes; one that begins with 'hf-' only as INDOUBT named it",
            ),
            (&DECR, "STOCK.DECR a 1 REQUEST ", "ERR invalid request id"),
            (&DECR, "STOCK.DECR a 1 ACK disk", "ERR invalid ack: one of redis, replica, postgres"),
            (&DECR, "STOCK.DECR a 1 TIMEOUT 0", "ERR invalid timeout: a whole number from 1 to 600000 ms"),
            (&DECR, "STOCK.DECR a 1 ORDER a{", "ERR invalid order id"),
            (&SET, "STOCK.SET a 1 b 2", "ERR syntax error"),
            (&MGET, "STOCK.MGET a REQUEST r", "ERR syntax error"),
            (&LOCK, "LOCK.ACQUIRE {l}", "ERR invalid lock name"),
            (&LOCK, "LOCK.ACQUIRE l SESSION LEASE 2000", "ERR syntax error"),
            (&SCAN, "STOCK.SCAN x", "ERR invalid cursor"),
            (&SCAN, "STOCK.SCAN 0 COUNT 1001", "ERR invalid count: a whole number from 1 to 1000"),
            (&ISSUE, "COUPON.ISSUE c \u{a0}", "ERR invalid user id"),
            (&AWAIT, "HOLDFAST.AWAIT 1-2 5 6", "ERR wrong number of arguments for 'holdfast.await' command"),
        ];
        for (spec, request, expected) in rows {
            let error = parsed(spec, request).err().unwrap_or_default();
            assert!(error.starts_with(expected), "{request}: {error}");
        }
    }

    #[test]
    fn the_digest_tells_what_was_asked_and_not_how() {
        let of = |request: &str| args(&DECR, request).digest();
        let one = of("STOCK.DECR a 1 ORDER o");
        for same in ["stock.decr a 1 order o", "STOCK.DECR a 1 REQUEST r ORDER o", "STOCK.DECR a 1 ACK redis ORDER o TIMEOUT 5"] {
            assert_eq!(of(same), one, "{same}");
        }
        for other in ["STOCK.DECR a 1", "STOCK.DECR a 2 ORDER o", "STOCK.DECR b 1 ORDER o", "STOCK.DECR a 1 ORDER O", "STOCK.DECR a 1 o 1"]
        {
            assert_ne!(of(other), one, "{other}");
        }
        let scan = |request: &str| args(&SCAN, request).digest();
        assert_eq!(scan("STOCK.SCAN 0 COUNT 5 MATCH a*"), scan("STOCK.SCAN 0 MATCH a* COUNT 5"));
        assert_ne!(args(&SYNC, "STOCK.SYNC a").digest(), args(&SYNC, "STOCK.SYNC a DRYRUN").digest());
    }

    proptest! {
        #[test]
        fn no_request_panics(words in proptest::collection::vec("[a-c]|[0-9]{1,3}|REQUEST|ACK|redis|TIMEOUT|ORDER|LOW|DRYRUN|\\{|", 0..10)) {
            for spec in [&DECR, &SET, &GET, &MGET, &SYNC, &RESERVE, &AWAIT, &LOCK, &SCAN, &ISSUE] {
                let request = std::iter::once(spec.name).chain(words.iter().map(String::as_str)).collect();
                if let Ok(args) = Args::parse(spec, request) {
                    let _ = (args.digest(), args.key_positions(), args.request(), args.ack());
                }
            }
        }
    }
}
