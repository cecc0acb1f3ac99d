//! A whole installation for one test: its own Redis, its own database, the built program.

#![allow(dead_code, reason = "each of the test binaries uses its own part")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use redis::{Connection, ConnectionLike as _, Value};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::servers::{Postgres, RedisServer};

/// How long a test waits for what must come, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The time for a reply, in ms, where a test is of something else: a machine that stalls must not fail it.
pub const UNHURRIED: u32 = 20_000;

/// The built program.
pub struct Sidecar {
    child: Child,
    log: PathBuf,
    pub port: u16,
    pub http: u16,
}

impl Sidecar {
    /// Starts it, and waits until it listens.
    pub fn start(redis_url: &str, postgres_url: &str) -> Self {
        Self::with_deadline(redis_url, postgres_url, UNHURRIED)
    }

    /// The same, with so many ms for each reply.
    pub fn with_deadline(redis_url: &str, postgres_url: &str, reply_within_ms: u32) -> Self {
        Self::with_settings(redis_url, postgres_url, &["--reply-within-ms", &reply_within_ms.to_string()])
    }

    /// The same, with these flags.
    pub fn with_settings(redis_url: &str, postgres_url: &str, flags: &[&str]) -> Self {
        Self::with_flags(&[&["--redis-url", redis_url, "--postgres-url", postgres_url], flags].concat())
    }

    /// One whose backends this file names.
    pub fn with_config(file: &str, flags: &[&str]) -> Self {
        Self::with_flags(&[&["--config", file], flags].concat())
    }

    fn with_flags(flags: &[&str]) -> Self {
        let log = std::env::temp_dir().join(format!(
            "holdfast-it-{}-{:?}-{:?}.log",
            std::process::id(),
            std::thread::current().id(),
            Instant::now()
        ));
        let child = Command::new(env!("CARGO_BIN_EXE_holdfast"))
            .args(["serve", "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"])
            .args(flags)
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut sidecar = Self { child, log, port: 0, http: 0 };
        let text = sidecar.wait_for_log("holdfast starts");
        let line = text.lines().find(|line| line.contains("holdfast starts")).unwrap();
        let port = |name: &str| {
            let address = line.split(&format!("{name}=127.0.0.1:")).nth(1).unwrap_or_else(|| panic!("no {name} in {line}"));
            address.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
        };
        (sidecar.port, sidecar.http) = (port("listen"), port("http"));
        sidecar
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        // Colours off: terminals' escape sequences would stand between a field's name and its value.
        let mut text = String::new();
        let mut bytes = Vec::new();
        File::open(&self.log).unwrap().read_to_end(&mut bytes).unwrap();
        let mut inside = false;
        for c in String::from_utf8_lossy(&bytes).chars() {
            match (inside, c) {
                (false, '\u{1b}') => inside = true,
                (false, c) => text.push(c),
                (true, c) if c.is_ascii_alphabetic() => inside = false,
                _ => {}
            }
        }
        text
    }

    /// Waits until it has logged this.
    pub fn wait_for_log(&mut self, what: &str) -> String {
        let began = Instant::now();
        loop {
            let text = self.log();
            if text.contains(what) {
                return text;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && began.elapsed() < PATIENCE, "'{what}' was not logged, {ended:?}:\n{text}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The id of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        assert!(Command::new("kill").arg(self.pid().to_string()).status().unwrap().success());
        self.child.wait().unwrap().code()
    }

    /// Its exit code, once it has ended by itself.
    pub fn ended(&mut self) -> Option<i32> {
        let began = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < PATIENCE, "it goes on:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.wait().unwrap().code()
    }

    /// What an HTTP path answers: the status and the body.
    pub fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.http)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// A new client connection.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub fn connect(&self) -> Client {
        let client = redis::Client::open(self.url()).unwrap();
        Client { connection: client.get_connection_with_timeout(PATIENCE).unwrap() }
    }

    /// A new client connection of this user.
    pub fn connect_as(&self, user: &str, password: &str) -> Client {
        let client = redis::Client::open(format!("redis://{user}:{password}@127.0.0.1:{}/", self.port)).unwrap();
        Client { connection: client.get_connection_with_timeout(PATIENCE).unwrap() }
    }

    /// What `redis-cli` says to one command, and its exit code.
    pub fn cli(&self, arguments: &[&str]) -> (String, Option<i32>) {
        let output = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(arguments).output().unwrap();
        (format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)), output.status.code())
    }

    /// A bare connection, for what no client sends.
    pub fn raw(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("the sidecar's log:\n{}", self.log());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

/// A client, and its replies as one line of text.
pub struct Client {
    connection: Connection,
}

impl Client {
    /// Sends one command, words separated by spaces, and returns the reply: `[OK, 97, 1-2]`, `97`, `nil`, `-ERR ...`.
    pub fn ask(&mut self, command: &str) -> String {
        self.ask_words(&command.split(' ').collect::<Vec<_>>())
    }

    /// Whether the server has closed it.
    pub fn is_closed(&mut self) -> bool {
        let ping = redis::cmd("PING").get_packed_command();
        self.connection.req_packed_command(&ping).is_err_and(|error| error.is_io_error() || error.is_connection_dropped())
    }

    /// Sends one command that must be accepted.
    pub fn ok(&mut self, command: &str) {
        let reply = self.ask(command);
        assert!(reply.starts_with("[OK, "), "{command}: {reply}");
    }

    /// The same, for words that have spaces in them or are empty.
    pub fn ask_words<W: AsRef<[u8]>>(&mut self, words: &[W]) -> String {
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(word.as_ref());
        }
        match self.connection.req_packed_command(&command.get_packed_command()) {
            Ok(value) => show(&value),
            Err(error) => format!("-{} {}", error.code().unwrap_or("?"), error.detail().unwrap_or_default()),
        }
    }

    /// Sends one command, and does not wait for its reply.
    pub fn send<W: AsRef<[u8]>>(&mut self, words: &[W]) {
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(word.as_ref());
        }
        // A connection that is gone shows when the reply is awaited.
        _ = self.connection.send_packed_command(&command.get_packed_command());
    }

    /// The reply to the oldest command that was sent so.
    pub fn receive(&mut self) -> String {
        match self.connection.recv_response() {
            Ok(value) => show(&value),
            Err(error) => format!("-{} {}", error.code().unwrap_or("?"), error.detail().unwrap_or_default()),
        }
    }

    /// Asks until the reply is `expected`.
    pub fn until(&mut self, command: &str, expected: &str) {
        let began = Instant::now();
        loop {
            let reply = self.ask(command);
            if reply == expected {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{command}: {reply}, never {expected}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks until the reply no longer begins with `word`, and returns it.
    pub fn until_not(&mut self, command: &str, word: &str) -> String {
        let began = Instant::now();
        loop {
            let reply = self.ask(command);
            if !reply.starts_with(word) {
                return reply;
            }
            assert!(began.elapsed() < PATIENCE, "{command}: always {reply}");
        }
    }

    /// Everything that a scan finds from its beginning to its end, `family` its command: ids with their numbers.
    pub fn scan(&mut self, family: &str) -> BTreeMap<String, i64> {
        let (mut found, mut cursor) = (BTreeMap::new(), "0".to_owned());
        loop {
            let reply = self.ask(&format!("{family}.SCAN {cursor} COUNT 1000"));
            let (next, page) = scanned(&reply).unwrap_or_else(|| panic!("{reply}"));
            found.extend(page);
            cursor = next;
            if cursor == "0" {
                return found;
            }
        }
    }

    /// A field of a map reply.
    pub fn field(&mut self, command: &str, name: &str) -> String {
        let reply = self.ask(command);
        let words: Vec<&str> = reply.trim_matches(['[', ']']).split(", ").collect();
        let at = words.iter().position(|word| *word == name).unwrap_or_else(|| panic!("no {name} in {reply}"));
        words[at + 1].to_owned()
    }
}

/// Reads a scan's reply: where it goes on, and what it found.
pub fn scanned(reply: &str) -> Option<(String, Vec<(String, i64)>)> {
    let (cursor, found) = reply.strip_prefix('[')?.strip_suffix("]]")?.split_once(", [")?;
    let words: Vec<&str> = found.split(", ").filter(|word| !word.is_empty()).collect();
    let pairs = words.chunks(2).map(|pair| Some((pair[0].to_owned(), pair.get(1)?.parse().ok()?)));
    Some((cursor.to_owned(), pairs.collect::<Option<_>>()?))
}

fn show(value: &Value) -> String {
    match value {
        Value::Nil => "nil".to_owned(),
        Value::Int(integer) => integer.to_string(),
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::SimpleString(text) => text.clone(),
        Value::Okay => "OK".to_owned(),
        Value::Array(values) => format!("[{}]", values.iter().map(show).collect::<Vec<_>>().join(", ")),
        Value::Map(pairs) => format!("[{}]", pairs.iter().map(|(k, v)| format!("{}, {}", show(k), show(v))).collect::<Vec<_>>().join(", ")),
        Value::ServerError(error) => format!("-{} {}", error.code(), error.details().unwrap_or_default()),
        other => format!("{other:?}"),
    }
}

/// See the module.
pub struct Stack {
    pub sidecar: Sidecar,
    pub redis: RedisServer,
    pub postgres: Database,
}

/// The Postgres of one test.
pub struct Database {
    pub url: String,
    _shared: Option<Arc<Postgres>>,
    pub own: Option<Postgres>,
    runtime: tokio::runtime::Runtime,
}

impl Database {
    /// One on the server that tests share, or on one of its `own`.
    pub fn new(own: bool) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (shared, own) = if own { (None, Some(Postgres::start())) } else { (Some(Postgres::shared()), None) };
        let server = own.as_ref().or(shared.as_deref()).unwrap();
        let url = runtime.block_on(server.database());
        Self { url, _shared: shared, own, runtime }
    }

    /// The first column of every row of a query, as text.
    pub fn column(&self, query: &str) -> Vec<String> {
        self.runtime.block_on(async {
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
            let query = format!("WITH q(c) AS ({query}) SELECT coalesce(c::text, 'null') FROM q");
            sqlx::query_scalar(AssertSqlSafe(query)).fetch_all(&mut connection).await.unwrap()
        })
    }

    /// Runs statements, and `during` before their connection is closed: a lock that they took is held so long.
    pub fn holding<R>(&self, statements: &str, during: impl FnOnce() -> R) -> R {
        let connection = self.runtime.block_on(async {
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
            sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&mut connection).await.unwrap();
            connection
        });
        let result = during();
        self.runtime.block_on(connection.close()).unwrap();
        result
    }

    /// Copies the database as it is now, as a backup would, and returns the copy's address. Nobody may be connected to it.
    pub fn copy(&self, name: &str) -> String {
        let (server, database) = self.url.split_once("/test_").unwrap();
        let (database, options) = database.split_once('?').unwrap();
        self.runtime.block_on(async {
            let mut connection = PgConnection::connect(&format!("{server}/postgres?{options}")).await.unwrap();
            // A killed sidecar's session may take a moment to end.
            let began = Instant::now();
            let copy = format!("CREATE DATABASE test_{database}_{name} TEMPLATE test_{database}");
            while let Err(error) = sqlx::raw_sql(AssertSqlSafe(copy.clone())).execute(&mut connection).await {
                assert!(began.elapsed() < PATIENCE, "{error}");
            }
        });
        format!("{server}/test_{database}_{name}?{options}")
    }

    /// Runs statements.
    pub fn execute(&self, statements: &str) {
        self.runtime.block_on(async {
            let mut connection = PgConnection::connect(&self.url).await.unwrap();
            sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&mut connection).await.unwrap();
        });
    }

    /// The only value that a query returns.
    pub fn value(&self, query: &str) -> String {
        self.column(query).join(" ")
    }
}

/// Another program that uses Postgres, with a session of its own.
pub struct Program {
    runtime: tokio::runtime::Runtime,
    connection: PgConnection,
}

impl Program {
    pub fn new(postgres: &Database) -> Self {
        Self::connect(&postgres.url)
    }

    pub fn connect(url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let connection = runtime.block_on(PgConnection::connect(url)).unwrap();
        Self { runtime, connection }
    }

    pub fn run(&mut self, statement: &str) {
        self.try_run(statement).unwrap();
    }

    pub fn try_run(&mut self, statement: &str) -> Result<(), String> {
        let running = sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut self.connection);
        self.runtime.block_on(running).map(drop).map_err(|error| error.to_string())
    }

    /// The number that a query returns.
    pub fn number(&mut self, query: &str) -> f64 {
        let asking = sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(&mut self.connection);
        self.runtime.block_on(asking).unwrap()
    }

    /// Runs a statement that Holdfast does not hear of, as if Postgres had lost something.
    pub fn tamper(&mut self, statement: &str) {
        self.run(&format!("SET holdfast.writer = 'holdfast'; {statement}; RESET holdfast.writer"));
    }
}

impl Stack {
    /// Starts everything, and waits until it sells.
    pub fn start() -> Self {
        Self::with(Database::new(false), UNHURRIED)
    }

    /// The same, with so many ms for each reply.
    pub fn with_deadline(reply_within_ms: u32) -> Self {
        Self::with(Database::new(false), reply_within_ms)
    }

    /// The same with a Postgres of its own, to be killed.
    pub fn with_own_postgres() -> Self {
        Self::with(Database::new(true), UNHURRIED)
    }

    /// The same with a Postgres of its own, and these flags.
    pub fn with_flags(flags: &[&str]) -> Self {
        Self::over(Database::new(true), &[&["--reply-within-ms", &UNHURRIED.to_string()], flags].concat())
    }

    /// The same with these flags of the sidecar.
    pub fn with_settings(flags: &[&str]) -> Self {
        Self::over(Database::new(false), flags)
    }

    fn with(postgres: Database, reply_within_ms: u32) -> Self {
        Self::over(postgres, &["--reply-within-ms", &reply_within_ms.to_string()])
    }

    fn over(postgres: Database, flags: &[&str]) -> Self {
        let redis = RedisServer::start();
        let sidecar = Sidecar::with_settings(&redis.url(), &postgres.url, flags);
        let stack = Self { sidecar, redis, postgres };
        stack.wait_until_ready();
        stack
    }

    pub fn wait_until_ready(&self) {
        // The relay's connection to Postgres may come a moment after all else.
        wait_until("the sidecar is ready", || {
            let (status, text) = self.sidecar.get("/readyz");
            status == 200 && !text.contains("postgres degraded")
        });
    }

    pub fn connect(&self) -> Client {
        self.sidecar.connect()
    }

    /// Starts the sidecar again after a kill.
    pub fn restart_sidecar(&mut self) {
        self.sidecar = Sidecar::start(&self.redis.url(), &self.postgres.url);
        self.wait_until_ready();
    }

    /// A connection to the backing Redis.
    pub fn backing(&self) -> Client {
        let client = redis::Client::open(self.redis.url()).unwrap();
        Client { connection: client.get_connection_with_timeout(PATIENCE).unwrap() }
    }

    /// Waits until Postgres has everything.
    pub fn wait_until_applied(&self) {
        let mut client = self.connect();
        wait_until("everything is applied", || {
            let position = self.backing().ask("HGET holdfast:meta n");
            client.field("HOLDFAST.STATUS", "applied").split('-').nth(1) == Some(&position)
        });
    }
}

/// By this process's clock, in Unix ms.
pub fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// What random numbers begin with: this, unless `HOLDFAST_TEST_SEED` says otherwise.
pub fn seed(usual: u64) -> u64 {
    std::env::var("HOLDFAST_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(usual)
}

/// Waits until it is so.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
