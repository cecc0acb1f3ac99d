//! The configuration: what the settings are, where their values come from, and what they come to.
//!
//! A flag overrides an environment variable, which overrides the TOML file, which overrides the default. Everything is checked before
//! anything starts, all that is wrong is reported at once, and each report says where the value came from.

mod render;
mod secret;
mod settings;

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::providers::{Format as _, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::{Deserialize, Deserializer};

pub use render::{example, markdown_table};
pub use secret::{Secret, SecretUrl};
pub use settings::{Kind, SETTINGS, Setting};

/// The environment variable that names the TOML file, as the flag `--config` does.
pub const FILE_VARIABLE: &str = "HOLDFAST_CONFIG";

/// What every environment variable begins with.
const VARIABLE_PREFIX: &str = "HOLDFAST_";

/// Every setting's value, checked. [`SETTINGS`] says what each one means.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub listen: SocketAddr,
    pub insecure: bool,
    pub max_clients: usize,
    pub threads: usize,
    #[serde(rename = "reply_within_ms", deserialize_with = "milliseconds")]
    pub reply_within: Duration,
    #[serde(rename = "shutdown_timeout_ms", deserialize_with = "milliseconds")]
    pub shutdown_timeout: Duration,
    pub passthrough: Passthrough,
    pub auth: Auth,
    pub limits: Limits,
    pub tls: Tls,
    pub http: Http,
    pub redis: Redis,
    pub postgres: Postgres,
    pub outbox: Outbox,
    pub ledger: Ledger,
    pub idempotency: Idempotency,
    /// By command, as its settings name it.
    pub ack: BTreeMap<String, String>,
    pub stock: Stock,
    pub coupon: Coupon,
    pub lock: Lock,
    pub reconcile: Reconcile,
    pub log: Log,
}

/// Whether clients may read the backing Redis through this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Passthrough {
    Off,
    ReadOnly,
}

/// The section `[auth]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    pub requirepass: Secret,
    /// Empty where there is none.
    pub users_file: PathBuf,
    #[serde(rename = "within_ms", deserialize_with = "milliseconds")]
    pub within: Duration,
    pub failures: u32,
    #[serde(rename = "delay_ms", deserialize_with = "milliseconds")]
    pub delay: Duration,
    /// These three: what a request may hold before AUTH, where `[limits]` does not say less.
    pub args: usize,
    #[serde(rename = "bulk_kib", deserialize_with = "kibibytes")]
    pub bulk: usize,
    #[serde(rename = "request_kib", deserialize_with = "kibibytes")]
    pub request: usize,
}

impl Auth {
    /// Whether clients have to show who they are.
    pub fn is_on(&self) -> bool {
        !self.requirepass.is_empty() || !self.users_file.as_os_str().is_empty()
    }
}

/// The section `[limits]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub args: usize,
    #[serde(rename = "bulk_kib", deserialize_with = "kibibytes")]
    pub bulk: usize,
    #[serde(rename = "request_kib", deserialize_with = "kibibytes")]
    pub request: usize,
    pub in_flight: usize,
    #[serde(rename = "output_kib", deserialize_with = "kibibytes")]
    pub output: usize,
    #[serde(rename = "input_mib", deserialize_with = "mebibytes")]
    pub input: usize,
    #[serde(rename = "stall_ms", deserialize_with = "milliseconds")]
    pub stall: Duration,
    /// Zero: never.
    #[serde(rename = "idle_ms", deserialize_with = "milliseconds")]
    pub idle: Duration,
    #[serde(rename = "keepalive_ms", deserialize_with = "milliseconds")]
    pub keepalive: Duration,
}

/// The section `[tls]`. A path that is empty names no file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    pub client_ca_file: PathBuf,
}

/// The section `[http]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    pub listen: SocketAddr,
    pub tls: bool,
}

/// The section `[redis]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    pub url: SecretUrl,
}

/// The section `[postgres]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Postgres {
    pub url: SecretUrl,
}

/// The section `[outbox]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outbox {
    #[serde(rename = "copies_mib", deserialize_with = "mebibytes")]
    pub copies_bytes: usize,
    pub max_changes: u64,
    #[serde(rename = "max_mib", deserialize_with = "mebibytes")]
    pub max_bytes: usize,
}

/// The section `[ledger]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    pub detail: LedgerDetail,
}

/// What a row of the ledger stands for where a command carries no REQUEST.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LedgerDetail {
    Operation,
    /// All that one batch did to one product.
    Batch,
}

/// The section `[idempotency]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Idempotency {
    #[serde(rename = "window_ms", deserialize_with = "milliseconds")]
    pub window: Duration,
}

impl Config {
    /// What a command's reply waits for where its client says no ACK, in the words of ACK, if it was set otherwise than by default.
    pub fn ack(&self, command: &str) -> Option<&str> {
        let name = command.to_ascii_lowercase().replace('.', "_");
        let setting = SETTINGS.iter().find(|setting| setting.section_and_name() == ("ack", &name))?;
        self.ack.get(&name).map(String::as_str).filter(|ack| *ack != setting.default)
    }
}

/// The section `[stock]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stock {
    #[serde(rename = "sold_out_ms", deserialize_with = "milliseconds")]
    pub sold_out: Duration,
}

/// The section `[coupon]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coupon {
    pub lock: CouponLock,
    #[serde(rename = "lease_ms", deserialize_with = "milliseconds")]
    pub lease: Duration,
}

/// How a coupon is locked while it is issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CouponLock {
    /// One holding for all that wait, each issue under its fencing token.
    Held,
    /// One round trip: the script goes ahead only while nobody holds the coupon's lock.
    Elide,
}

/// The section `[lock]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    #[serde(rename = "session_lease_ms", deserialize_with = "milliseconds")]
    pub session_lease: Duration,
    #[serde(rename = "max_hold_ms", deserialize_with = "milliseconds")]
    pub max_hold: Duration,
    #[serde(rename = "max_turn_ms", deserialize_with = "milliseconds")]
    pub max_turn: Duration,
}

/// The section `[reconcile]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reconcile {
    #[serde(rename = "sync_every_ms", deserialize_with = "milliseconds")]
    pub sync_every: Duration,
    #[serde(rename = "initialise_every_ms", deserialize_with = "milliseconds")]
    pub initialise_every: Duration,
    pub prefer: Prefer,
    /// In units.
    pub auto_limit: i64,
}

/// Which side is right where Redis and Postgres differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    Postgres,
    Redis,
}

/// The section `[log]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub format: LogFormat,
    pub level: String,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// Where values come from, besides the defaults.
#[derive(Debug, Default)]
pub struct Sources {
    /// Flags: a setting's key and its value.
    pub flags: Vec<(&'static str, String)>,
    /// The TOML file that the flag `--config` names.
    pub file: Option<PathBuf>,
    /// Environment variables.
    pub variables: BTreeMap<String, String>,
}

impl Sources {
    /// The environment variables of this process that are ours. One that is empty counts as not set.
    pub fn variables_of_this_process() -> BTreeMap<String, String> {
        std::env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
            .filter(|(name, value)| name.starts_with(VARIABLE_PREFIX) && !value.is_empty())
            .collect()
    }
}

/// What the sources come to.
#[derive(Debug)]
pub struct Resolved {
    /// The values.
    pub config: Config,
    /// What is probably not as it was meant, for the log.
    pub warnings: Vec<String>,
    /// Each setting's key with its value as text and where that came from.
    shown: BTreeMap<&'static str, (String, String)>,
}

impl Resolved {
    /// Every setting's value in TOML, with where it came from, without passwords.
    pub fn to_toml(&self) -> String {
        render::sections(String::new(), |out, setting| {
            let (_, name) = setting.section_and_name();
            if let Some((text, origin)) = self.shown.get(setting.key) {
                let line = format!("{name} = {}", setting.toml_value(text));
                _ = writeln!(out, "{line:<48} # {origin}");
            }
        })
    }
}

/// Why there is no configuration: everything that is wrong with it.
#[derive(Debug)]
pub struct Error {
    problems: Vec<String>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.join("\n"))
    }
}

impl std::error::Error for Error {}

/// Resolves and checks every setting. Reads the TOML file and the files of secrets, nothing else.
pub fn load(sources: &Sources) -> Result<Resolved, Error> {
    let mut problems = Vec::new();
    let mut figment = Figment::new();
    for setting in SETTINGS {
        figment = figment.merge(Layer::one(setting, setting.default.into(), "default".into()));
    }
    if let Some((path, origin)) = file(sources) {
        match read_toml(&path, &origin, &mut problems) {
            Ok(layer) => figment = figment.merge(layer),
            Err(problem) => problems.push(problem),
        }
    }
    for setting in SETTINGS {
        match variable(setting, &sources.variables) {
            Ok(Some(layer)) => figment = figment.merge(layer),
            Ok(None) => {}
            Err(problem) => problems.push(problem),
        }
    }
    for (key, text) in &sources.flags {
        if let Some(setting) = Setting::find(key) {
            figment = figment.merge(Layer::one(setting, text.clone(), format!("flag --{}", setting.name())));
        }
    }

    let mut values = Dict::new();
    let mut shown = BTreeMap::new();
    for setting in SETTINGS {
        // Absent only where the file has a value in place of a section, which is already reported as an unknown setting.
        let Ok(value) = figment.find_value(setting.key) else { continue };
        let origin = figment.get_metadata(value.tag()).map_or_else(String::new, |metadata| metadata.name.to_string());
        match setting.check(&value) {
            Ok(value) => {
                shown.insert(setting.key, (show(setting, &value), origin));
                insert(&mut values, setting, value);
            }
            Err(permitted) => problems.push(format!("{} = {}, from {origin}, must be {permitted}", setting.key, show(setting, &value))),
        }
    }
    if !problems.is_empty() {
        return Err(Error { problems });
    }
    let checked = Figment::from(Layer { origin: "settings".into(), values });
    let config: Config = checked.extract().map_err(|error| Error { problems: vec![error.to_string()] })?;
    if !config.listen.ip().is_loopback() && !config.insecure && !config.auth.is_on() {
        let (text, origin) = &shown["listen"];
        return Err(Error {
            problems: vec![format!(
                "listen = {text}, from {origin}, can be reached from other machines, and anyone who reaches it may sell: \
                 listen on 127.0.0.1, name users with --auth-users-file (HOLDFAST_AUTH_USERS_FILE), or permit it with --insecure \
                 (HOLDFAST_INSECURE=true)"
            )],
        });
    }
    Ok(Resolved { config, warnings: misspelt_variables(&sources.variables), shown })
}

/// The TOML file and who named it.
fn file(sources: &Sources) -> Option<(PathBuf, String)> {
    let flag = sources.file.clone().map(|path| (path, "flag --config".into()));
    flag.or_else(|| sources.variables.get(FILE_VARIABLE).map(|path| (path.into(), format!("variable {FILE_VARIABLE}"))))
}

/// Reads the TOML file, adding a problem for each key that is no setting.
fn read_toml(path: &Path, named_by: &str, problems: &mut Vec<String>) -> Result<Layer, String> {
    let origin = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| {
        format!("cannot read {origin}, which the {named_by} names: {error}; correct the path or the file's permissions")
    })?;
    // Not the whole error: it quotes the line, which may hold a password.
    let values: Dict = Toml::from_str(&text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        format!("{origin}, line {}, is not TOML: {}", before.matches('\n').count() + 1, error.message())
    })?;
    let mut keys = Vec::new();
    flatten("", &values, &mut keys);
    for key in keys {
        if Setting::find(&key).is_none() {
            let hint = nearest(&key, SETTINGS.iter().map(|setting| setting.key));
            problems.push(match hint {
                Some(known) => format!("{origin} sets {key}, which is no setting: did you mean {known}?"),
                None => format!("{origin} sets {key}, which is no setting: holdfast.example.toml lists all of them"),
            });
        }
    }
    Ok(Layer { origin, values })
}

/// The value that the environment gives a setting: by its variable, or by the file that another one names.
fn variable(setting: &'static Setting, variables: &BTreeMap<String, String>) -> Result<Option<Layer>, String> {
    let name = setting.variable();
    let direct = variables.get(&name).map(|text| Layer::one(setting, text.clone(), format!("variable {name}")));
    let Some(file_name) = setting.file_variable() else { return Ok(direct) };
    let Some(path) = variables.get(&file_name) else { return Ok(direct) };
    if direct.is_some() {
        return Err(format!("{name} and {file_name} are both set: unset one of them"));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read {path}, which {file_name} names: {error}; correct the path or the file's permissions"))?;
    Ok(Some(Layer::one(setting, text.trim().to_owned(), format!("{path} (variable {file_name})"))))
}

/// Warns of variables that are nearly ours. Others that begin like ours are left alone: Kubernetes makes such ones for a
/// service that is called holdfast.
fn misspelt_variables(variables: &BTreeMap<String, String>) -> Vec<String> {
    let mut known: Vec<String> =
        SETTINGS.iter().flat_map(|setting| [Some(setting.variable()), setting.file_variable()]).flatten().collect();
    known.push(FILE_VARIABLE.into());
    let strangers = variables.keys().filter(|name| !known.contains(name));
    strangers
        .filter_map(|name| {
            let near = nearest(name, known.iter().map(String::as_str))?;
            Some(format!("the variable {name} is not read: did you mean {near}?"))
        })
        .collect()
}

/// The known name that this one is most likely meant to be, if any is near.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    known
        .map(|known| {
            // A setting under the wrong section, or under none, is as near as one with a letter wrong.
            let moved = if last(known) == last(name) || known.split('.').next() == Some(name) { 1 } else { usize::MAX };
            (strsim::osa_distance(name, known).min(moved), known)
        })
        .filter(|&(distance, known)| distance <= (known.len() / 4).clamp(1, 3))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, known)| known)
}

/// The dotted keys of everything that is not a section.
fn flatten(prefix: &str, values: &Dict, keys: &mut Vec<String>) {
    for (name, value) in values {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Dict(_, inner) if Setting::find(&key).is_none() => flatten(&key, inner, keys),
            _ => keys.push(key),
        }
    }
}

/// A value as text, without its password.
fn show(setting: &Setting, value: &Value) -> String {
    match value {
        Value::String(_, text) if setting.is_url() => SecretUrl::from(text.clone()).masked(),
        Value::String(_, text) if setting.is_secret() => Secret::from(text.clone()).masked().into(),
        Value::String(_, text) => text.clone(),
        Value::Bool(_, switch) => switch.to_string(),
        Value::Num(..) => settings::whole_number(value).map_or_else(|| "a fraction".into(), |number| number.to_string()),
        Value::Array(..) => "a list".into(),
        Value::Dict(..) => "a section".into(),
        Value::Char(..) | Value::Empty(..) => "nothing".into(),
    }
}

fn insert(values: &mut Dict, setting: &Setting, value: Value) {
    match setting.section_and_name() {
        ("", name) => _ = values.insert(name.into(), value),
        (section, name) => {
            let section = values.entry(section.into()).or_insert_with(|| Value::from(Dict::new()));
            if let Value::Dict(_, inner) = section {
                inner.insert(name.into(), value);
            }
        }
    }
}

fn milliseconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    u64::deserialize(deserializer).map(Duration::from_millis)
}

fn kibibytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    usize::deserialize(deserializer).map(|kibibytes| kibibytes.saturating_mul(1 << 10))
}

fn mebibytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    usize::deserialize(deserializer).map(|mebibytes| mebibytes.saturating_mul(1 << 20))
}

/// Values of one origin, which figment remembers for each of them.
struct Layer {
    origin: String,
    values: Dict,
}

impl Layer {
    fn one(setting: &Setting, text: String, origin: String) -> Self {
        let mut values = Dict::new();
        insert(&mut values, setting, Value::from(text));
        Self { origin, values }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TOML file that goes away with the test.
    struct TempFile(PathBuf);

    impl TempFile {
        fn new(text: &str) -> Self {
            let path = std::env::temp_dir().join(format!("holdfast-{}.toml", uuid::Uuid::new_v4()));
            std::fs::write(&path, text).unwrap();
            Self(path)
        }
    }

    impl Drop for TempFile {
        fn drop(&mut self) {
            _ = std::fs::remove_file(&self.0);
        }
    }

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn problems(toml: &str) -> String {
        let file = TempFile::new(toml);
        let error = load(&Sources { file: Some(file.0.clone()), ..Sources::default() }).unwrap_err();
        error.to_string().replace(&file.0.display().to_string(), "the file")
    }

    #[test]
    fn without_sources_every_setting_has_its_default() {
        let config = load(&Sources::default()).unwrap().config;
        assert_eq!(config.listen, "127.0.0.1:6380".parse().unwrap());
        assert_eq!(config.http.listen, "127.0.0.1:9380".parse().unwrap());
        assert_eq!(config.redis.url.expose(), "redis://127.0.0.1:6379");
        assert_eq!(config.postgres.url.expose(), "postgres://holdfast@127.0.0.1:5432/holdfast");
        assert_eq!(config.idempotency.window, Duration::from_mins(10));
        assert_eq!(config.shutdown_timeout, Duration::from_secs(10));
        assert_eq!(config.max_clients, 10_000);
        assert_eq!((config.auth.args, config.auth.bulk, config.auth.request), (10, 16 << 10, 1 << 20));
        assert_eq!((config.coupon.lock, config.coupon.lease), (CouponLock::Held, Duration::from_secs(1)));
        assert_eq!((config.reconcile.sync_every, config.reconcile.initialise_every), (Duration::from_mins(1), Duration::from_mins(5)));
        assert_eq!((config.reconcile.prefer, config.reconcile.auto_limit), (Prefer::Postgres, 100));
        assert_eq!(config.log, Log { format: LogFormat::Text, level: "info".into() });
        assert!(!config.insecure);
    }

    #[test]
    fn flags_override_variables_override_the_file_overrides_defaults() {
        let file = TempFile::new("max_clients = 1\nshutdown_timeout_ms = 1\n[log]\nformat = \"json\"\n[idempotency]\nwindow_ms = 60000\n");
        let resolved = load(&Sources {
            flags: vec![("max_clients", "3".into())],
            file: Some(file.0.clone()),
            variables: variables(&[("HOLDFAST_MAX_CLIENTS", "2"), ("HOLDFAST_SHUTDOWN_TIMEOUT_MS", "2")]),
        })
        .unwrap();
        let config = &resolved.config;
        assert_eq!((config.max_clients, config.shutdown_timeout.as_millis(), config.log.format), (3, 2, LogFormat::Json));
        assert_eq!(config.idempotency.window, Duration::from_mins(1));
        let shown = resolved.to_toml();
        for (line, origin) in [
            ("max_clients = 3", "flag --max-clients"),
            ("shutdown_timeout_ms = 2", "variable HOLDFAST_SHUTDOWN_TIMEOUT_MS"),
            ("format = \"json\"", &file.0.display().to_string()),
            ("level = \"info\"", "default"),
        ] {
            assert!(shown.lines().any(|l| l.starts_with(line) && l.ends_with(&format!("# {origin}"))), "{line} from {origin} in:\n{shown}");
        }
    }

    #[test]
    fn what_print_config_shows_is_a_file_that_gives_the_same() {
        let first =
            load(&Sources { flags: vec![("log.format", "json".into()), ("insecure", "true".into())], ..Sources::default() }).unwrap();
        let file = TempFile::new(&first.to_toml());
        let second = load(&Sources { file: Some(file.0.clone()), ..Sources::default() }).unwrap();
        assert_eq!(first.config, second.config);
    }

    #[test]
    fn the_example_shows_the_defaults() {
        let uncommented: String =
            example().lines().filter(|line| !line.starts_with("# ") && *line != "#").fold(String::new(), |mut all, line| {
                all.push_str(line.strip_prefix('#').unwrap_or(line));
                all.push('\n');
                all
            });
        let file = TempFile::new(&uncommented);
        let resolved = load(&Sources { file: Some(file.0.clone()), ..Sources::default() }).unwrap();
        assert_eq!(resolved.config, load(&Sources::default()).unwrap().config);
        assert!(!resolved.to_toml().contains("# default"), "the example sets every setting");
        let commented = TempFile::new(&example());
        assert!(load(&Sources { file: Some(commented.0.clone()), ..Sources::default() }).unwrap().to_toml().contains("# default"));
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_one() {
        assert_eq!(problems("max_client = 5"), "the file sets max_client, which is no setting: did you mean max_clients?");
        assert_eq!(problems("[redis]\nurls = \"x\""), "the file sets redis.urls, which is no setting: did you mean redis.url?");
        assert_eq!(problems("window_ms = 60000"), "the file sets window_ms, which is no setting: did you mean idempotency.window_ms?");
        assert_eq!(problems("redis = \"redis://a\""), "the file sets redis, which is no setting: did you mean redis.url?");
        assert_eq!(problems("colour = 1"), "the file sets colour, which is no setting: holdfast.example.toml lists all of them");
    }

    #[test]
    fn everything_wrong_is_reported_at_once_with_where_it_came_from() {
        let error = load(&Sources {
            flags: vec![("log.format", "yaml".into())],
            variables: variables(&[("HOLDFAST_IDEMPOTENCY_WINDOW_MS", "10")]),
            ..Sources::default()
        })
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "idempotency.window_ms = 10, from variable HOLDFAST_IDEMPOTENCY_WINDOW_MS, must be milliseconds, from 60000 to 86400000\n\
             log.format = yaml, from flag --log-format, must be text or json"
        );
        assert!(problems("listen = [1]").contains("listen = a list, from the file, must be an IP address"));
        assert!(problems("insecure = true\n[redis]\nurl = redis://:s3cret@host").starts_with("the file, line 3, is not TOML: "));
        assert!(!problems("[redis]\nurl = redis://:s3cret@host").contains("s3cret"));
    }

    #[test]
    fn a_file_that_is_named_must_be_there() {
        let error = load(&Sources { file: Some("/nonexistent/holdfast.toml".into()), ..Sources::default() }).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nonexistent/holdfast.toml, which the flag --config names: "), "{error}");
    }

    #[test]
    fn secrets_come_from_files_and_are_never_shown() {
        let file = TempFile::new("postgres://app:s3cret@db/holdfast\n");
        let path = file.0.display().to_string();
        let both = [("HOLDFAST_POSTGRES_URL_FILE", path.as_str()), ("HOLDFAST_POSTGRES_URL", "postgres://db/holdfast")];
        let resolved = load(&Sources { variables: variables(&both[..1]), ..Sources::default() }).unwrap();
        assert_eq!(resolved.config.postgres.url.expose(), "postgres://app:s3cret@db/holdfast");
        assert!(resolved.to_toml().contains("postgres://app:***@db/holdfast"));
        assert!(!format!("{resolved:?}{}", resolved.to_toml()).contains("s3cret"));
        let error = load(&Sources { variables: variables(&both), ..Sources::default() }).unwrap_err();
        assert_eq!(error.to_string(), "HOLDFAST_POSTGRES_URL and HOLDFAST_POSTGRES_URL_FILE are both set: unset one of them");
        let wrong = load(&Sources { variables: variables(&[("HOLDFAST_REDIS_URL", "http://:s3cret@host")]), ..Sources::default() });
        assert!(!wrong.unwrap_err().to_string().contains("s3cret"));
        let password = load(&Sources { variables: variables(&[("HOLDFAST_AUTH_REQUIREPASS", "s3cret")]), ..Sources::default() }).unwrap();
        assert_eq!(password.config.auth.requirepass.expose(), "s3cret");
        assert!(!format!("{password:?}{}", password.to_toml()).contains("s3cret"));
    }

    #[test]
    fn a_listener_that_others_can_reach_needs_insecure() {
        let open = |insecure: &str| {
            load(&Sources { flags: vec![("listen", "0.0.0.0:6380".into()), ("insecure", insecure.into())], ..Sources::default() })
        };
        assert!(open("false").unwrap_err().to_string().contains("permit it with --insecure"));
        assert!(open("true").is_ok());
        let guarded = |name: &str, value: &str| {
            load(&Sources { flags: vec![("listen", "0.0.0.0:6380".into())], variables: variables(&[(name, value)]), ..Sources::default() })
        };
        assert!(guarded("HOLDFAST_AUTH_REQUIREPASS", "s3cret").is_ok());
        assert!(guarded("HOLDFAST_AUTH_USERS_FILE", "/etc/holdfast/users").is_ok());
        let v6 = load(&Sources { flags: vec![("listen", "[::1]:6380".into())], ..Sources::default() });
        assert!(v6.is_ok());
    }

    #[test]
    fn a_misspelt_variable_is_warned_of_and_those_of_kubernetes_are_not() {
        let names = [("HOLDFAST_REDIS_ULR", "x"), ("HOLDFAST_SERVICE_HOST", "10.0.0.1"), ("HOLDFAST_PORT_6380_TCP", "tcp://10.0.0.1:6380")];
        let resolved = load(&Sources { variables: variables(&names), ..Sources::default() }).unwrap();
        assert_eq!(resolved.warnings, ["the variable HOLDFAST_REDIS_ULR is not read: did you mean HOLDFAST_REDIS_URL?"]);
    }
}
