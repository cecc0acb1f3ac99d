//! One user: how it shows who it is, and what it may do. Its rules are written as those of Redis's ACL.

use std::fmt;

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};

use crate::domain::glob;
use crate::limits::{USER_NAME_MAX, USER_PATTERNS_MAX, USER_SECRETS_MAX};

/// The SHA-256 of a password: all that is kept of one.
pub type Secret = [u8; 32];

/// What rules may name.
pub trait Catalogue {
    /// How many commands there are; they are numbered from 0.
    fn count(&self) -> usize;

    /// The numbers of the commands that a rule names: `@stock`, `@all`, `info`, `client|list`. `None` for what is none of these.
    fn named(&self, name: &str) -> Option<Vec<usize>>;

    /// The numbers of those that everybody may run: they concern nothing but the caller's own connection.
    fn free(&self) -> Vec<usize>;
}

/// Ids or channels: all, or those that match a pattern.
#[derive(Clone, PartialEq, Eq)]
enum Reach {
    All,
    Some(Vec<String>),
}

impl Reach {
    const NONE: Self = Self::Some(Vec::new());

    fn has(&self, name: &[u8]) -> bool {
        match self {
            Self::All => true,
            Self::Some(patterns) => patterns.iter().any(|pattern| glob::matches(pattern.as_bytes(), name, false)),
        }
    }

    fn add(&mut self, pattern: &str) -> Result<(), String> {
        match self {
            _ if pattern == "*" => *self = Self::All,
            Self::All => return Err("a pattern after one that permits everything: write resetkeys or resetchannels before it".into()),
            Self::Some(patterns) if patterns.len() >= USER_PATTERNS_MAX => return Err(format!("more than {USER_PATTERNS_MAX} patterns")),
            Self::Some(patterns) => patterns.push(pattern.to_owned()),
        }
        Ok(())
    }

    fn show(&self, sign: char) -> String {
        match self {
            Self::All => format!("{sign}*"),
            Self::Some(patterns) => patterns.iter().map(|pattern| format!("{sign}{pattern}")).collect::<Vec<_>>().join(" "),
        }
    }
}

/// See the module.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    /// Whether it may log in.
    pub enabled: bool,
    /// Whether every password is right.
    pub any_password: bool,
    secrets: Vec<Secret>,
    /// A bit a command, by its number.
    commands: Vec<u64>,
    ids: Reach,
    channels: Reach,
    /// What the rules on commands were, for people.
    rules: Vec<String>,
    unrestricted: bool,
}

impl User {
    /// One that may not log in and has no rights, as every rule line begins.
    fn new(name: &str, catalogue: &dyn Catalogue) -> Self {
        let mut user = Self {
            name: name.to_owned(),
            enabled: false,
            any_password: false,
            secrets: Vec::new(),
            commands: vec![0; catalogue.count().div_ceil(64)],
            ids: Reach::NONE,
            channels: Reach::NONE,
            rules: Vec::new(),
            unrestricted: false,
        };
        user.permit(&catalogue.free(), true);
        user
    }

    /// Redis's `default` with every right: with a password, or let in without one.
    pub fn unrestricted(password: Option<&[u8]>) -> Self {
        Self {
            name: "default".to_owned(),
            enabled: true,
            any_password: password.is_none(),
            secrets: password.map(secret).into_iter().collect(),
            commands: Vec::new(),
            ids: Reach::All,
            channels: Reach::All,
            rules: vec!["+@all".to_owned()],
            unrestricted: true,
        }
    }

    /// A `default` that nobody is: strangers have to name a user.
    pub fn nobody() -> Self {
        Self { enabled: false, any_password: false, ..Self::unrestricted(None) }
    }

    /// Reads a line of a users file: `user <name> <rule> ...`. Errors with what is wrong, without any secret of the line.
    pub fn parse(line: &str, catalogue: &dyn Catalogue) -> Result<Self, String> {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("user") {
            return Err("a line is 'user <name> <rule> ...', or a comment after #".into());
        }
        let name = words.next().ok_or("the user's name is missing")?;
        if name.len() > USER_NAME_MAX || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("a user's name is 1 to {USER_NAME_MAX} printable ASCII characters"));
        }
        let mut user = Self::new(name, catalogue);
        for (number, rule) in (1..).zip(words) {
            user.apply(number, rule, catalogue)?;
        }
        let everything = catalogue.named("@all").unwrap_or_default();
        user.unrestricted = user.ids == Reach::All && everything.into_iter().all(|number| user.may_run(number));
        Ok(user)
    }

    /// Applies the rule with this number.
    fn apply(&mut self, number: usize, rule: &str, catalogue: &dyn Catalogue) -> Result<(), String> {
        match rule {
            "on" => self.enabled = true,
            "off" => self.enabled = false,
            "nopass" => {
                self.any_password = true;
                self.secrets.clear();
            }
            "resetpass" => {
                self.any_password = false;
                self.secrets.clear();
            }
            "allkeys" => self.ids = Reach::All,
            "resetkeys" => self.ids = Reach::NONE,
            "allchannels" => self.channels = Reach::All,
            "resetchannels" => self.channels = Reach::NONE,
            "allcommands" => return self.apply(number, "+@all", catalogue),
            "nocommands" => return self.apply(number, "-@all", catalogue),
            "sanitize-payload" | "skip-sanitize-payload" => {}
            _ => match rule.split_at(rule.chars().next().map_or(0, char::len_utf8)) {
                ("#", digits) => {
                    let secret = from_hex(digits).ok_or("a password is '#' and the 64 hexadecimal digits of its SHA-256")?;
                    if self.secrets.len() >= USER_SECRETS_MAX {
                        return Err(format!("more than {USER_SECRETS_MAX} passwords"));
                    }
                    self.secrets.push(secret);
                    self.any_password = false;
                }
                (">" | "<" | "!", _) => return Err("a password in plain text: write '#' and its SHA-256 in hexadecimal digits".into()),
                ("~", pattern) => self.ids.add(pattern)?,
                ("&", pattern) => self.channels.add(pattern)?,
                ("+", name) => self.rule(rule, name, true, catalogue)?,
                ("-", name) => self.rule(rule, name, false, catalogue)?,
                // Not repeated: it may be a password, or its hash, whose sign was forgotten.
                _ => return Err(format!("rule {number} of the user {} is none that there is", self.name)),
            },
        }
        Ok(())
    }

    fn rule(&mut self, rule: &str, name: &str, permit: bool, catalogue: &dyn Catalogue) -> Result<(), String> {
        let numbers = catalogue.named(name).ok_or_else(|| format!("no command or category '{name}': ACL CAT lists them"))?;
        self.permit(&numbers, permit);
        if name == "@all" {
            self.permit(&catalogue.free(), true);
            self.rules.clear();
        }
        self.rules.push(rule.to_owned());
        Ok(())
    }

    fn permit(&mut self, numbers: &[usize], permit: bool) {
        for number in numbers {
            let bit = 1_u64 << (number % 64);
            if let Some(bits) = self.commands.get_mut(number / 64) {
                *bits = if permit { *bits | bit } else { *bits & !bit };
            }
        }
    }

    /// Whether it may do everything.
    pub const fn is_unrestricted(&self) -> bool {
        self.unrestricted
    }

    /// Whether it may run the command with this number.
    pub fn may_run(&self, number: usize) -> bool {
        self.unrestricted || self.commands.get(number / 64).is_some_and(|bits| bits & (1 << (number % 64)) != 0)
    }

    /// Whether it may name this product, coupon, order or lock.
    pub fn may_touch(&self, id: &[u8]) -> bool {
        self.ids.has(id)
    }

    /// Whether it may name all of them, as who lists them does.
    pub fn may_touch_all(&self) -> bool {
        self.ids == Reach::All
    }

    /// Whether it may watch this channel.
    pub fn may_watch(&self, channel: &[u8]) -> bool {
        self.channels.has(channel)
    }

    /// Whether it may watch every channel that matches this pattern: all of them, or a pattern that was given to it literally.
    pub fn may_watch_pattern(&self, pattern: &[u8]) -> bool {
        match &self.channels {
            Reach::All => true,
            Reach::Some(permitted) => permitted.iter().any(|known| known.as_bytes() == pattern),
        }
    }

    /// Whether a client that showed this secret may go on as this user.
    pub fn admits(&self, secret: Option<&Secret>) -> bool {
        self.enabled && (self.any_password || secret.is_some_and(|secret| bool::from(self.has_secret(secret))))
    }

    /// Compares with every password in the same time, whichever fits.
    pub fn has_secret(&self, secret: &Secret) -> Choice {
        self.secrets.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(secret))
    }

    /// Its rules as ACL LIST shows them; of its passwords only how many there are.
    pub fn show(&self) -> String {
        let mut words = vec![format!("user {}", self.name)];
        words.extend(self.flags().map(str::to_owned));
        words.extend(self.secrets.iter().map(|_| "#(redacted)".to_owned()));
        words.extend([self.show_ids(), self.show_channels(), self.show_commands()]);
        words.retain(|word| !word.is_empty());
        words.join(" ")
    }

    /// `on` or `off`, and `nopass`.
    pub fn flags(&self) -> impl Iterator<Item = &'static str> {
        [Some(if self.enabled { "on" } else { "off" }), self.any_password.then_some("nopass")].into_iter().flatten()
    }

    /// How many passwords it has.
    pub fn secrets(&self) -> usize {
        self.secrets.len()
    }

    pub fn show_ids(&self) -> String {
        self.ids.show('~')
    }

    pub fn show_channels(&self) -> String {
        self.channels.show('&')
    }

    pub fn show_commands(&self) -> String {
        if self.rules.is_empty() { "-@all".to_owned() } else { self.rules.join(" ") }
    }
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "User({})", self.name)
    }
}

/// What is kept of a password.
pub fn secret(password: &[u8]) -> Secret {
    Sha256::digest(password).into()
}

fn from_hex(digits: &str) -> Option<Secret> {
    if digits.len() != 64 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut secret = [0; 32];
    for (at, byte) in secret.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).ok()?;
    }
    Some(secret)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Five commands: `get` and `set` of stock, `issue` of coupons, `kill` for operators, `ping` for everybody.
    pub(crate) struct Five;

    impl Catalogue for Five {
        fn count(&self) -> usize {
            5
        }

        fn named(&self, name: &str) -> Option<Vec<usize>> {
            let numbers: &[usize] = match name {
                "@all" => &[0, 1, 2, 3, 4],
                "@stock" => &[0, 1],
                "@admin" => &[3],
                "get" => &[0],
                "set" => &[1],
                "issue" => &[2],
                _ => return None,
            };
            Some(numbers.to_vec())
        }

        fn free(&self) -> Vec<usize> {
            vec![4]
        }
    }

    /// The SHA-256 of "secret".
    pub(crate) const HASH: &str = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

    fn runs(rules: &str) -> Vec<usize> {
        let user = User::parse(&format!("user a on {rules}"), &Five).unwrap();
        (0..5).filter(|number| user.may_run(*number)).collect()
    }

    #[test]
    fn rules_count_in_their_order_and_nothing_is_permitted_unasked() {
        assert_eq!(runs(""), [4]);
        assert_eq!(runs("+@stock"), [0, 1, 4]);
        assert_eq!(runs("+@stock -set"), [0, 4]);
        assert_eq!(runs("-set +@stock"), [0, 1, 4]);
        assert_eq!(runs("+@all -@admin"), [0, 1, 2, 4]);
        assert_eq!(runs("+@all -@all"), [4]);
        assert_eq!(runs("allcommands"), [0, 1, 2, 3, 4]);
        assert_eq!(runs("+@all nocommands +issue"), [2, 4]);
    }

    #[test]
    fn ids_and_channels_are_given_by_patterns() {
        let user = User::parse("user a on +@all ~shop-1-* ~sale &stock:events:*", &Five).unwrap();
        assert!(user.may_touch(b"shop-1-mug") && user.may_touch(b"sale") && !user.may_touch(b"shop-2-mug") && !user.may_touch_all());
        assert!(user.may_watch(b"stock:events:mug") && !user.may_watch(b"coupon:events:x"));
        assert!(user.may_watch_pattern(b"stock:events:*") && !user.may_watch_pattern(b"*") && !user.may_watch_pattern(b"stock:events:a*"));
        assert!(!user.is_unrestricted());
        let all = User::parse("user a on +@all allkeys", &Five).unwrap();
        assert!(all.is_unrestricted() && all.may_touch(b"x") && !all.may_watch(b"x"));
    }

    #[test]
    fn who_is_let_in_is_known_by_hashes_alone() {
        let user = User::parse(&format!("user a on #{HASH}"), &Five).unwrap();
        assert!(user.admits(Some(&secret(b"secret"))) && !user.admits(Some(&secret(b"Secret"))) && !user.admits(None));
        assert!(!User::parse(&format!("user a off #{HASH}"), &Five).unwrap().admits(Some(&secret(b"secret"))));
        assert!(!User::parse(&format!("user a on #{HASH} resetpass"), &Five).unwrap().admits(Some(&secret(b"secret"))));
        assert!(User::parse("user a on nopass", &Five).unwrap().admits(None));
        // As in Redis, whichever comes last counts.
        assert!(!User::parse(&format!("user a on nopass #{HASH}"), &Five).unwrap().admits(None));
        assert!(User::parse(&format!("user a on #{HASH} nopass"), &Five).unwrap().admits(None));
        assert_eq!(user.show(), "user a on #(redacted) -@all");
        assert_eq!(format!("{user:?}"), "User(a)");
    }

    #[test]
    fn what_is_no_rule_is_refused_without_being_repeated_where_it_may_be_a_secret() {
        for (line, why) in [
            ("usr a", "a line is 'user <name> <rule> ...'"),
            ("user", "the user's name is missing"),
            ("user a +@stok", "no command or category '@stok'"),
            ("user a on maybe", "rule 2 of the user a is none that there is"),
            ("user a s3cret", "rule 1 of the user a is none that there is"),
            ("user a >s3cret", "a password in plain text"),
            ("user a #s3cret", "a password is '#' and the 64 hexadecimal digits"),
            ("user a ~* ~a*", "a pattern after one that permits everything"),
        ] {
            let error = User::parse(line, &Five).unwrap_err();
            assert!(error.starts_with(why) && !error.contains("s3cret"), "{line}: {error}");
        }
    }
}
