//! Matches a request against its command's declared arguments, so that a handler cannot see an unvalidated value.

use bytes::Bytes;

use super::spec::{Arg, Kind, OPTION_WORDS, Presence, Spec};
use crate::domain::{Id, RequestId, quantity, request};
use crate::limits::{PATTERN_MAX, SPEC_ARGS_MAX};

/// What a change's reply waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ack {
    Redis,
    Replica,
    Postgres,
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
    words: Vec<Bytes>,
    found: [Found; SPEC_ARGS_MAX],
    /// How many times the repeated group was given, and how many words it has.
    groups: usize,
    group_width: usize,
}

impl Args {
    /// Matches the words, name included; errors with the error reply's text.
    pub fn parse(spec: &'static Spec, words: Vec<Bytes>) -> Result<Self, String> {
        let mut args = Self { spec, words, found: [Found::default(); SPEC_ARGS_MAX], groups: 0, group_width: 0 };
        if !arity_fits(spec, args.words.len()) {
            return Err(wrong_arity(spec));
        }
        let after = args.match_positional()?;
        args.match_options(after)?;
        Ok(args)
    }

    /// Matches the positional arguments and returns the place behind them.
    fn match_positional(&mut self) -> Result<usize, String> {
        let mut at = self.spec.name_words();
        self.group_width = self.spec.positional().filter(|(_, arg)| arg.is_repeated()).count();
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
            if self.words.len() - at < self.group_width {
                return Err(wrong_arity(self.spec));
            }
            for offset in 0..self.group_width {
                let index = first + offset;
                let place = self.found[index].at;
                self.accept(index, &self.spec.args[index], at + offset)?;
                // A list is found where its first element is.
                if self.groups > 0 {
                    self.found[index].at = place;
                }
            }
            at += self.group_width;
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
        let syntax = || "ERR syntax error".to_owned();
        if at < self.words.len() && self.spec.options().next().is_none() && self.group_width == 0 {
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
                if !Id::is_valid(word) || is_option_word(word) {
                    return Err(format!("ERR invalid {what}: 1 to 128 bytes of UTF-8 without spaces, control characters, '{{' or '}}', and no option word"));
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
                if RequestId::parse(word).is_none() {
                    return Err("ERR invalid request id: 1 to 64 bytes, not beginning with 'hf-'".to_owned());
                }
            }
            Kind::Word(words) => {
                let place = words.iter().position(|known| word.eq_ignore_ascii_case(known.as_bytes()));
                let place = place.ok_or_else(|| format!("ERR invalid {}: one of {}", arg.name, words.join(", ")))?;
                integer = i64::try_from(place).unwrap_or_default();
            }
            Kind::Pattern => {
                if word.len() > PATTERN_MAX {
                    return Err(format!("ERR invalid {}: at most {PATTERN_MAX} bytes", arg.name));
                }
            }
            Kind::Cursor => {
                if word.is_empty() || word.len() > 20 || !word.iter().all(u8::is_ascii_digit) {
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
    pub fn words(&self) -> &[Bytes] {
        &self.words
    }

    /// The word behind the command's name and subcommand at `index`, as the client sent it.
    pub fn raw(&self, index: usize) -> Option<&Bytes> {
        self.words.get(self.spec.name_words() + index)
    }

    /// Whether the argument was given.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// The bytes of an argument, if it was given.
    pub fn maybe_text(&self, name: &str) -> Option<&Bytes> {
        self.find(name).map(|found| &self.words[found.at])
    }

    /// The bytes of a required argument.
    pub fn text(&self, name: &str) -> &Bytes {
        &self.words[self.required(name).at]
    }

    /// A required id.
    pub fn id(&self, name: &str) -> Id {
        valid(self.text(name))
    }

    /// An id, if it was given.
    pub fn maybe_id(&self, name: &str) -> Option<Id> {
        self.maybe_text(name).map(valid)
    }

    /// Every id of a list, in the order given; empty where the list is.
    pub fn ids(&self, name: &str) -> impl Iterator<Item = Id> + '_ {
        self.list(name).map(valid)
    }

    /// Every element of a list as bytes, in the order given.
    pub fn list(&self, name: &str) -> impl Iterator<Item = &Bytes> + '_ {
        let first = self.find(name).map_or(0, |found| found.at);
        (0..if first == 0 { 0 } else { self.groups }).map(move |group| &self.words[first + group * self.group_width])
    }

    /// The pairs of a list of two (`product quantity`), in the order given.
    pub fn pairs(&self) -> impl Iterator<Item = (Id, i64)> + '_ {
        assert!(self.group_width == 2, "{} declares no pairs", self.spec.name);
        let first = self.spec.args.iter().position(Arg::is_repeated).map_or(0, |index| self.found[index].at);
        (0..self.groups).map(move |group| {
            let at = first + group * 2;
            (valid(&self.words[at]), quantity::parse(&self.words[at + 1], 0, i64::MAX).unwrap_or_default())
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
        if !self.declares("request") {
            return None;
        }
        self.maybe_text("request").and_then(RequestId::parse)
    }

    /// What the client wants the reply to wait for, if it said.
    pub fn ack(&self) -> Option<Ack> {
        if !self.declares("ack") {
            return None;
        }
        self.maybe_word("ack").map(|word| match word {
            "redis" => Ack::Redis,
            "replica" => Ack::Replica,
            _ => Ack::Postgres,
        })
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
        let first = self.spec.name_words();
        let positional = self.positional_end() - first;
        let mut parts: Vec<&[u8]> = Vec::with_capacity(1 + positional + options.len() * 2);
        parts.push(self.spec.name.as_bytes());
        parts.extend(self.words[first..first + positional].iter().map(|word| &word[..]));
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
        let mut positions = Vec::new();
        for (index, arg) in self.spec.args.iter().enumerate().filter(|(_, arg)| arg.is_key()) {
            let first = self.found[index].at;
            let times = if arg.is_repeated() { self.groups } else { usize::from(first != 0) };
            positions.extend((0..times).map(|group| first + group * self.group_width));
        }
        positions
    }

    /// The place behind the last positional word.
    fn positional_end(&self) -> usize {
        let single = self.spec.positional().filter(|(index, arg)| !arg.is_repeated() && self.found[*index].at != 0).count();
        self.spec.name_words() + single + self.groups * self.group_width
    }

    fn declares(&self, name: &str) -> bool {
        self.spec.args.iter().any(|arg| arg.name == name)
    }

    /// # Panics
    /// If the spec has no such argument: that is a mistake in the handler, which its first test finds.
    fn declared(&self, name: &str) -> (usize, &'static Arg) {
        let declared = self.spec.args.iter().enumerate().find(|(_, arg)| arg.name == name);
        declared.unwrap_or_else(|| panic!("{} declares no argument '{name}'", self.spec.name))
    }

    fn find(&self, name: &str) -> Option<Found> {
        let found = self.found[self.declared(name).0];
        (found.at != 0).then_some(found)
    }

    /// # Panics
    /// As [`Args::declared`], and if the argument is not one that matching has made sure of.
    fn required(&self, name: &str) -> Found {
        self.find(name).unwrap_or_else(|| panic!("{} may come without '{name}': read it with maybe_", self.spec.name))
    }
}

fn is_option_word(word: &[u8]) -> bool {
    OPTION_WORDS.iter().any(|option| word.eq_ignore_ascii_case(option.as_bytes()))
}

/// The id in a word that matching has found valid.
fn valid(word: &Bytes) -> Id {
    Id::parse(word).unwrap_or_else(|| Id::from(""))
}

/// Whether a request of so many words can be this command.
pub fn arity_fits(spec: &Spec, words: usize) -> bool {
    words >= spec.words_min() && (spec.is_variadic() || words == spec.words_min())
}

/// The error for too many or too few words.
pub fn wrong_arity(spec: &Spec) -> String {
    format!("ERR wrong number of arguments for '{}' command", spec.lower_name())
}
