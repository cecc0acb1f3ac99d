//! The settings: each declared once, in [`SETTINGS`]. Flags, environment variables, the example file, the README's table and
//! every check of a value come from a row here.

use std::net::SocketAddr;

use figment::value::Value;
use tracing_subscriber::EnvFilter;
use url::Url;

use crate::limits;

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Its key in TOML, with its section in front: `redis.url`.
    pub key: &'static str,
    /// What its value may be.
    pub kind: Kind,
    /// Its value where nobody sets it, as text.
    pub default: &'static str,
    /// What it does, in one sentence.
    pub doc: &'static str,
}

/// What a setting's value may be.
#[derive(Debug)]
pub enum Kind {
    /// An IP address and a port.
    Address,
    /// A URL with one of these schemes. It may hold a password, so it is a secret, and may come from a file.
    Url(&'static [&'static str]),
    /// A password, which may come from a file and has no flag: everybody on the machine sees those.
    Secret,
    /// A file; empty: none.
    Path,
    /// A whole number within a range.
    Integer(u64, u64),
    /// A duration in milliseconds within a range.
    Milliseconds(u64, u64),
    /// `true` or `false`.
    Switch,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A level, or levels by module, as `tracing` writes them.
    LogFilter,
}

/// What a command's reply waits for. The name behind the section is the command's, with `_` for its dot.
const fn ack(key: &'static str, default: &'static str, doc: &'static str) -> Setting {
    Setting { key, kind: Kind::Choice(&["redis", "replica", "postgres"]), default, doc }
}

/// Every setting, those without a section first, as TOML wants them.
pub const SETTINGS: &[Setting] = &[
    Setting { key: "listen", kind: Kind::Address, default: "127.0.0.1:6380", doc: "Where Redis clients connect." },
    Setting {
        key: "insecure",
        kind: Kind::Switch,
        default: "false",
        doc: "Permits `listen` to be reachable from other machines although anyone who reaches it may sell.",
    },
    Setting {
        key: "max_clients",
        kind: Kind::Integer(1, limits::MAX_CLIENTS_MAX),
        default: "10000",
        doc: "How many clients may be connected at a time; one more is told so and closed.",
    },
    Setting {
        key: "threads",
        kind: Kind::Integer(0, limits::THREADS_MAX),
        default: "0",
        doc: "How many threads serve clients; 0: one for each four cores, 4 at most.",
    },
    Setting {
        key: "reply_within_ms",
        kind: Kind::Milliseconds(limits::REPLY_WITHIN_MIN_MS, limits::REPLY_WITHIN_MAX_MS),
        default: "100",
        doc: "Within what time of its arrival a STOCK or COUPON command is answered, with an error if Redis is slower.",
    },
    Setting {
        key: "shutdown_timeout_ms",
        kind: Kind::Milliseconds(0, limits::SHUTDOWN_TIMEOUT_MAX_MS),
        default: "10000",
        doc: "How long a shutdown may take to finish what has begun and to bring it to Postgres.",
    },
    Setting {
        key: "passthrough",
        kind: Kind::Choice(&["off", "read-only"]),
        default: "off",
        doc: "Whether operators may read the backing Redis through this server, to look for a fault: `read-only` adds GET, HGETALL, XRANGE, SCAN and their like, and nothing that writes.",
    },
    Setting {
        key: "auth.requirepass",
        kind: Kind::Secret,
        default: "",
        doc: "The password of the user `default`, who may then do everything; empty: there is none.",
    },
    Setting {
        key: "auth.users_file",
        kind: Kind::Path,
        default: "",
        doc: "The file with the users, a line each; a SIGHUP takes over what has changed in it; empty: there are none, and everybody may do everything.",
    },
    Setting {
        key: "auth.within_ms",
        kind: Kind::Milliseconds(limits::SETTABLE_AUTH_MS.0, limits::SETTABLE_AUTH_MS.1),
        default: "5000",
        doc: "How long a client may take to show who it is.",
    },
    Setting {
        key: "auth.failures",
        kind: Kind::Integer(limits::SETTABLE_AUTH_FAILURES.0, limits::SETTABLE_AUTH_FAILURES.1),
        default: "3",
        doc: "How many wrong passwords in a row close a connection.",
    },
    Setting {
        key: "auth.delay_ms",
        kind: Kind::Milliseconds(limits::SETTABLE_AUTH_DELAY_MS.0, limits::SETTABLE_AUTH_DELAY_MS.1),
        default: "50",
        doc: "How much longer each further wrong password from one address waits for its answer, from the fourth on, up to twenty times that; 0: none waits.",
    },
    Setting {
        key: "auth.args",
        kind: Kind::Integer(limits::SETTABLE_STRANGER_ARGS.0, limits::SETTABLE_STRANGER_ARGS.1),
        default: "10",
        doc: "How many words a request may have before AUTH, where `limits.args` permits as many.",
    },
    Setting {
        key: "auth.bulk_kib",
        kind: Kind::Integer(limits::SETTABLE_BULK_KIB.0, limits::SETTABLE_BULK_KIB.1),
        default: "16",
        doc: "How long a word of a request may be before AUTH, where `limits.bulk_kib` permits as much.",
    },
    Setting {
        key: "auth.request_kib",
        kind: Kind::Integer(limits::SETTABLE_STRANGER_REQUEST_KIB.0, limits::SETTABLE_STRANGER_REQUEST_KIB.1),
        default: "1024",
        doc: "How long a request may be as a whole before AUTH, where `limits.request_kib` permits as much.",
    },
    Setting {
        key: "limits.args",
        kind: Kind::Integer(limits::SETTABLE_ARGS.0, limits::SETTABLE_ARGS.1),
        default: "1024",
        doc: "How many words a request may have; before AUTH `auth.args`.",
    },
    Setting {
        key: "limits.bulk_kib",
        kind: Kind::Integer(limits::SETTABLE_BULK_KIB.0, limits::SETTABLE_BULK_KIB.1),
        default: "64",
        doc: "How long a word of a request may be; before AUTH `auth.bulk_kib`.",
    },
    Setting {
        key: "limits.request_kib",
        kind: Kind::Integer(limits::SETTABLE_REQUEST_KIB.0, limits::SETTABLE_REQUEST_KIB.1),
        default: "1024",
        doc: "How long a request may be as a whole; before AUTH `auth.request_kib`.",
    },
    Setting {
        key: "limits.in_flight",
        kind: Kind::Integer(limits::SETTABLE_IN_FLIGHT.0, limits::SETTABLE_IN_FLIGHT.1),
        default: "1024",
        doc: "How many requests of a connection may wait for their replies; until there are fewer, it is not read.",
    },
    Setting {
        key: "limits.output_kib",
        kind: Kind::Integer(limits::SETTABLE_OUTPUT_KIB.0, limits::SETTABLE_OUTPUT_KIB.1),
        default: "1024",
        doc: "How much a client may leave unread; beyond, its requests are not read, and a subscriber is closed.",
    },
    Setting {
        key: "limits.input_mib",
        kind: Kind::Integer(limits::SETTABLE_INPUT_MIB.0, limits::SETTABLE_INPUT_MIB.1),
        default: "32",
        doc: "How much the clients of one thread together may have sent of requests that are not complete; beyond, who has sent more than 16 KiB of one is closed.",
    },
    Setting {
        key: "limits.stall_ms",
        kind: Kind::Milliseconds(limits::SETTABLE_TIME_MS.0, limits::SETTABLE_TIME_MS.1),
        default: "60000",
        doc: "How long a client may take nothing of what waits for it; then it is closed.",
    },
    Setting {
        key: "limits.idle_ms",
        kind: Kind::Milliseconds(0, limits::SETTABLE_TIME_MS.1),
        default: "0",
        doc: "How long a client may be silent, unless it subscribes or waits; 0: for ever.",
    },
    Setting {
        key: "limits.keepalive_ms",
        kind: Kind::Milliseconds(limits::SETTABLE_TIME_MS.0, limits::SETTABLE_TIME_MS.1),
        default: "60000",
        doc: "After how long a silence the kernel asks whether a client is still there; it is closed if it does not answer within half a minute.",
    },
    Setting {
        key: "tls.cert_file",
        kind: Kind::Path,
        default: "",
        doc: "The server's certificate as PEM, those that signed it behind it: then clients connect through TLS only; a SIGHUP reads it again.",
    },
    Setting { key: "tls.key_file", kind: Kind::Path, default: "", doc: "The private key of that certificate as PEM." },
    Setting {
        key: "tls.client_ca_file",
        kind: Kind::Path,
        default: "",
        doc: "The certificates as PEM that sign those of clients: then every client has to show one.",
    },
    Setting {
        key: "http.listen",
        kind: Kind::Address,
        default: "127.0.0.1:9380",
        doc: "Where `/livez`, `/readyz` and `/metrics` are served.",
    },
    Setting {
        key: "http.tls",
        kind: Kind::Switch,
        default: "false",
        doc: "Serves these through TLS as well, with the certificates of `[tls]`.",
    },
    Setting {
        key: "redis.url",
        kind: Kind::Url(&["redis", "rediss"]),
        default: "redis://127.0.0.1:6379",
        doc: "The backing Redis: `redis://user:password@host:port/database`; `rediss://` for TLS, with `?sslrootcert=`, `&sslcert=`, `&sslkey=` for files of one's own.",
    },
    Setting {
        key: "postgres.url",
        kind: Kind::Url(&["postgres", "postgresql"]),
        default: "postgres://holdfast@127.0.0.1:5432/holdfast",
        doc: "The Postgres that every change is written to: `postgres://user:password@host:port/database`.",
    },
    Setting {
        key: "outbox.copies_mib",
        kind: Kind::Integer(limits::COPIES_MIB_MIN, limits::COPIES_MIB_MAX),
        default: "512",
        doc: "How much memory the copies of changes may take that Postgres does not have yet; when it is full, changes are refused.",
    },
    Setting {
        key: "outbox.max_changes",
        kind: Kind::Integer(1, limits::OUTBOX_CHANGES_MAX),
        default: "5000000",
        doc: "How many changes may wait for Postgres; when it is reached, changes are refused until a tenth of it is free.",
    },
    Setting {
        key: "outbox.max_mib",
        kind: Kind::Integer(1, limits::OUTBOX_MIB_MAX),
        default: "1024",
        doc: "How much of Redis's memory the outbox may take; when it is reached, changes are refused until a tenth of it is free.",
    },
    Setting {
        key: "ledger.detail",
        kind: Kind::Choice(&["operation", "batch"]),
        default: "operation",
        doc: "What a row of the ledger is where a command carries no REQUEST: each `operation`, or all that one `batch` did to a product, with how many operations it stands for.",
    },
    Setting {
        key: "idempotency.window_ms",
        kind: Kind::Milliseconds(limits::IDEMPOTENCY_WINDOW_MIN_MS, limits::IDEMPOTENCY_WINDOW_MAX_MS),
        default: "600000",
        doc: "How long a REQUEST id and its reply are remembered.",
    },
    ack("ack.stock_set", "postgres", "What a reply to `STOCK.SET` waits for whose client says no ACK."),
    ack("ack.stock_del", "postgres", "What a reply to `STOCK.DEL` waits for whose client says no ACK."),
    ack("ack.stock_incr", "redis", "What a reply to `STOCK.INCR` waits for whose client says no ACK."),
    ack("ack.stock_decr", "redis", "What a reply to `STOCK.DECR` waits for whose client says no ACK."),
    ack("ack.stock_reserve", "redis", "What a reply to `STOCK.RESERVE` waits for whose client says no ACK."),
    ack("ack.stock_confirm", "redis", "What a reply to `STOCK.CONFIRM` waits for whose client says no ACK."),
    ack("ack.stock_cancel", "postgres", "What a reply to `STOCK.CANCEL` waits for whose client says no ACK."),
    ack("ack.stock_extend", "redis", "What a reply to `STOCK.EXTEND` waits for whose client says no ACK."),
    ack("ack.stock_unfreeze", "postgres", "What a reply to `STOCK.UNFREEZE` waits for whose client says no ACK."),
    ack("ack.coupon_create", "postgres", "What a reply to `COUPON.CREATE` waits for whose client says no ACK."),
    ack("ack.coupon_alter", "postgres", "What a reply to `COUPON.ALTER` waits for whose client says no ACK."),
    ack("ack.coupon_issue", "redis", "What a reply to `COUPON.ISSUE` waits for whose client says no ACK."),
    ack("ack.coupon_use", "redis", "What a reply to `COUPON.USE` waits for whose client says no ACK."),
    ack("ack.coupon_unuse", "redis", "What a reply to `COUPON.UNUSE` waits for whose client says no ACK."),
    ack("ack.coupon_revoke", "postgres", "What a reply to `COUPON.REVOKE` waits for whose client says no ACK."),
    ack("ack.coupon_del", "postgres", "What a reply to `COUPON.DEL` waits for whose client says no ACK."),
    Setting {
        key: "stock.sold_out_ms",
        kind: Kind::Milliseconds(0, limits::SOLD_OUT_MAX_MS),
        default: "50",
        doc: "How long INSUFFICIENT is answered without asking Redis again, except where a REQUEST is given; what is restocked through this sidecar sells at once, through another after that at the latest; 0 always asks.",
    },
    Setting {
        key: "coupon.lock",
        kind: Kind::Choice(&["held", "elide"]),
        default: "held",
        doc: "How a coupon is locked while it is issued; `held`: this sidecar takes the lock, issues to all that wait under one holding, and hands its token to Postgres; `elide`: it goes ahead only while nobody holds the lock. All sidecars should have the same.",
    },
    Setting {
        key: "coupon.lease_ms",
        kind: Kind::Milliseconds(limits::COUPON_LEASE_MIN_MS, limits::COUPON_LEASE_MAX_MS),
        default: "1000",
        doc: "How long a coupon's lock that is `held` outlives a sidecar that dies.",
    },
    Setting {
        key: "lock.session_lease_ms",
        kind: Kind::Milliseconds(limits::LOCK_SESSION_LEASE_MIN_MS, limits::LOCK_SESSION_LEASE_MAX_MS),
        default: "10000",
        doc: "How long a lock that was acquired with SESSION outlives a sidecar that dies; it is renewed at a third of it.",
    },
    Setting {
        key: "lock.max_hold_ms",
        kind: Kind::Milliseconds(limits::LOCK_HOLD_MIN_MS, limits::LOCK_HOLD_MAX_MS),
        default: "3600000",
        doc: "How long a session may hold a lock; it is not renewed beyond that.",
    },
    Setting {
        key: "lock.max_turn_ms",
        kind: Kind::Milliseconds(0, limits::LOCK_TURN_MAX_MS),
        default: "20",
        doc: "How long this sidecar passes a lock on from one of its clients to the next before other sidecars and Java services get their turn.",
    },
    Setting {
        key: "reconcile.sync_every_ms",
        kind: Kind::Milliseconds(limits::RECONCILE_EVERY_MIN_MS, limits::RECONCILE_EVERY_MAX_MS),
        default: "60000",
        doc: "How often Redis is compared with Postgres.",
    },
    Setting {
        key: "reconcile.initialise_every_ms",
        kind: Kind::Milliseconds(limits::RECONCILE_EVERY_MIN_MS, limits::RECONCILE_EVERY_MAX_MS),
        default: "300000",
        doc: "How often Redis is given the products that Postgres has and Redis does not.",
    },
    Setting {
        key: "reconcile.prefer",
        kind: Kind::Choice(&["postgres", "redis"]),
        default: "postgres",
        doc: "Which side is right where the two differ: the other one is moved.",
    },
    Setting {
        key: "reconcile.auto_limit",
        kind: Kind::Integer(0, limits::RECONCILE_AUTO_LIMIT_MAX),
        default: "100",
        doc: "By how many units a product may differ to be corrected; one that differs by more is frozen until a person has looked.",
    },
    Setting { key: "log.format", kind: Kind::Choice(&["text", "json"]), default: "text", doc: "How log lines are written to stderr." },
    Setting {
        key: "log.level",
        kind: Kind::LogFilter,
        default: "info",
        doc: "What is logged: `error`, `warn`, `info`, `debug`, `trace`, `off`, or by module, as in `info,holdfast::outbox=debug`.",
    },
];

/// The words that stand for a level of logging.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

impl Setting {
    /// The setting with this key.
    pub fn find(key: &str) -> Option<&'static Self> {
        SETTINGS.iter().find(|setting| setting.key == key)
    }

    /// Its section in TOML and its name there. The section is empty for those outside of one.
    pub fn section_and_name(&self) -> (&'static str, &'static str) {
        self.key.split_once('.').unwrap_or(("", self.key))
    }

    /// Its name on the command line, without the dashes in front.
    pub fn name(&self) -> String {
        self.key.replace(['.', '_'], "-")
    }

    /// Its flag, if it has one.
    pub fn flag(&self) -> Option<String> {
        (!matches!(self.kind, Kind::Secret)).then(|| self.name())
    }

    /// Its environment variable.
    pub fn variable(&self) -> String {
        format!("HOLDFAST_{}", self.key.replace('.', "_").to_uppercase())
    }

    /// The environment variable that names a file with its value, for secrets.
    pub fn file_variable(&self) -> Option<String> {
        self.is_secret().then(|| format!("{}_FILE", self.variable()))
    }

    /// Whether its value may hold a password.
    pub fn is_secret(&self) -> bool {
        matches!(self.kind, Kind::Url(_) | Kind::Secret)
    }

    /// Whether it is the address of a backend.
    pub fn is_url(&self) -> bool {
        matches!(self.kind, Kind::Url(_))
    }

    /// The word for its value in a usage line.
    pub fn placeholder(&self) -> &'static str {
        match self.kind {
            Kind::Address => "ADDRESS",
            Kind::Url(_) => "URL",
            Kind::Secret => "PASSWORD",
            Kind::Path => "FILE",
            Kind::Integer(..) => "NUMBER",
            Kind::Milliseconds(..) => "MS",
            Kind::Switch => "BOOL",
            Kind::Choice(_) => "WORD",
            Kind::LogFilter => "FILTER",
        }
    }

    /// What its value may be, in words that follow "must be".
    pub fn permitted(&self) -> String {
        match self.kind {
            Kind::Address => "an IP address and a port, such as 127.0.0.1:6380".into(),
            Kind::Url(schemes) => format!("a URL that begins with {}", schemes.map_join(|scheme| format!("{scheme}://"))),
            Kind::Secret => "a password, or empty".into(),
            Kind::Path => "the path of a file, or empty".into(),
            Kind::Integer(min, max) => format!("a whole number from {min} to {max}"),
            Kind::Milliseconds(min, max) => format!("milliseconds, from {min} to {max}"),
            Kind::Switch => "true or false".into(),
            Kind::Choice(words) => words.map_join(|word| (*word).to_string()),
            Kind::LogFilter => format!("{}, or levels by module, such as info,holdfast::outbox=debug", LEVELS.join(", ")),
        }
    }

    /// Its value as TOML writes it.
    pub fn toml_value(&self, text: &str) -> String {
        match self.kind {
            Kind::Integer(..) | Kind::Milliseconds(..) | Kind::Switch => text.into(),
            // TOML's basic strings escape as Rust does, in what can occur here.
            _ => format!("{text:?}"),
        }
    }

    /// Its value in the type it has, checked. Errors with [`Setting::permitted`].
    pub(super) fn check(&self, value: &Value) -> Result<Value, String> {
        self.checked(value).ok_or_else(|| self.permitted())
    }

    fn checked(&self, value: &Value) -> Option<Value> {
        match self.kind {
            Kind::Integer(min, max) | Kind::Milliseconds(min, max) => {
                let number = match value.as_str() {
                    Some(text) => text.parse().ok()?,
                    None => u64::try_from(whole_number(value)?).ok()?,
                };
                (min..=max).contains(&number).then(|| Value::from(number))
            }
            Kind::Switch => match value.as_str() {
                Some(text) => text.parse().ok(),
                None => value.to_bool(),
            }
            .map(Value::from),
            Kind::Address => value.as_str()?.parse::<SocketAddr>().ok().map(|address| Value::from(address.to_string())),
            Kind::Url(schemes) => {
                let url = Url::parse(value.as_str()?).ok()?;
                (schemes.contains(&url.scheme()) && url.has_authority()).then(|| value.clone())
            }
            Kind::Secret | Kind::Path => value.as_str().map(|_| value.clone()),
            Kind::Choice(words) => words.contains(&value.as_str()?).then(|| value.clone()),
            Kind::LogFilter => is_log_filter(value.as_str()?).then(|| value.clone()),
        }
    }
}

/// The whole number that a value is, signed or not.
pub(super) fn whole_number(value: &Value) -> Option<i128> {
    value.to_i128().or_else(|| i128::try_from(value.to_u128()?).ok())
}

/// Whether this is a filter for logs. A lone word must be a level: `tracing` would take a misspelt one for the name of a module.
fn is_log_filter(text: &str) -> bool {
    let lone_words_are_levels =
        text.split(',').all(|part| part.contains(['=', '[']) || LEVELS.iter().any(|level| level.eq_ignore_ascii_case(part.trim())));
    lone_words_are_levels && EnvFilter::builder().parse(text).is_ok()
}

/// Joins what may be chosen into a phrase: `a`, `a or b`, `a, b or c`.
trait MapJoin<T> {
    fn map_join(&self, word: impl Fn(&T) -> String) -> String;
}

impl<T> MapJoin<T> for [T] {
    fn map_join(&self, word: impl Fn(&T) -> String) -> String {
        let words: Vec<String> = self.iter().map(word).collect();
        match words.split_last() {
            Some((last, [])) => last.clone(),
            Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_whole() {
        for setting in SETTINGS {
            assert!(setting.check(&Value::from(setting.default)).is_ok(), "the default of {}", setting.key);
            assert!(setting.doc.ends_with('.'), "{} is documented in a sentence", setting.key);
            assert!(setting.key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b == b'.'), "{}", setting.key);
        }
    }

    #[test]
    fn names_are_not_ambiguous() {
        let mut variables: Vec<String> = SETTINGS.iter().flat_map(|s| [Some(s.variable()), s.file_variable()]).flatten().collect();
        let count = variables.len();
        variables.sort();
        variables.dedup();
        assert_eq!(variables.len(), count);
    }

    #[test]
    fn sections_come_after_the_settings_outside_of_one_and_each_only_once() {
        let mut sections: Vec<&str> = SETTINGS.iter().map(|s| s.section_and_name().0).collect();
        assert_eq!(sections[0], "");
        sections.dedup();
        let count = sections.len();
        sections.sort_unstable();
        sections.dedup();
        assert_eq!(sections.len(), count);
    }

    #[test]
    fn a_misspelt_level_is_no_filter() {
        for good in ["info", "WARN", "off", "info,holdfast::outbox=debug", "warn,sqlx=error"] {
            assert!(is_log_filter(good), "{good}");
        }
        for bad in ["inof", "", "info,debgu", "holdfast=loud"] {
            assert!(!is_log_filter(bad), "{bad}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused_with_what_is_permitted() {
        let refused = |key: &str, value: Value| Setting::find(key).unwrap().check(&value).unwrap_err();
        assert_eq!(refused("idempotency.window_ms", Value::from(59_999)), "milliseconds, from 60000 to 86400000");
        assert_eq!(refused("max_clients", Value::from(-1)), "a whole number from 1 to 1000000");
        assert_eq!(refused("max_clients", Value::from("1e3")), "a whole number from 1 to 1000000");
        assert_eq!(refused("redis.url", Value::from("localhost:6379")), "a URL that begins with redis:// or rediss://");
        assert_eq!(refused("insecure", Value::from("yes")), "true or false");
        assert_eq!(refused("listen", Value::from(":6380")), "an IP address and a port, such as 127.0.0.1:6380");
        assert_eq!(refused("coupon.lock", Value::from("none")), "held or elide");
    }
}
