//! A Postgres and a Redis of our own for tests: started on a free port, killed when dropped.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, FromRow, PgConnection};

/// How long a server may take to start on a busy machine.
const START_MAX: Duration = Duration::from_secs(60);

static NUMBER: AtomicU32 = AtomicU32::new(0);

fn number() -> u32 {
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

fn temporary_directory(name: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("holdfast-{name}-{}-{}", std::process::id(), number()));
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

/// A program on PATH, or where Debian keeps those of Postgres, the newest version first.
fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> =
        std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|e| e.path().join("bin")).collect();
    places.sort();
    places.reverse();
    places.extend(std::env::split_paths(&path));
    let found = places.into_iter().map(|place| place.join(name)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("these tests need {name}: install the packages postgresql and redis-server"))
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.lines().any(|line| line.starts_with("Uid:\t0\t")))
}

/// A command that runs as a user whom Postgres accepts: it refuses to run as root.
fn as_postgres(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program);
    command
}

/// A Postgres server.
pub struct Postgres {
    directory: PathBuf,
    port: u16,
    child: Child,
}

impl Postgres {
    /// Makes and starts a new server.
    pub fn start() -> Self {
        let directory = temporary_directory("postgres");
        if is_root() {
            assert!(Command::new("chown").arg("postgres").arg(&directory).status().unwrap().success());
        }
        let made = as_postgres(&program("initdb"))
            .args(["--no-sync", "--auth=trust", "--username=postgres", "--no-locale", "--encoding=UTF8", "--no-instructions", "-D"])
            .arg(directory.join("data"))
            .stdout(Stdio::null())
            .status();
        assert!(made.unwrap().success(), "initdb failed");
        let port = free_port();
        let child = Self::spawn(&directory, port);
        Self { directory, port, child }
    }

    /// The one that tests share, started when the first of them asks and killed when the last of them ends.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Self::start());
            *shared = Arc::downgrade(&server);
            server
        })
    }

    fn spawn(directory: &Path, port: u16) -> Child {
        let began = Instant::now();
        let log = directory.join("log");
        loop {
            let mut child = as_postgres(&program("postgres"))
                .arg("-D")
                .arg(directory.join("data"))
                .args(["-p", &port.to_string(), "-h", "127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=60"])
                .args(["-c", if std::env::var_os("HOLDFAST_TEST_FSYNC").is_some() { "fsync=on" } else { "fsync=off" }])
                .stdout(Stdio::null())
                .stderr(std::fs::File::create(&log).unwrap())
                .spawn()
                .unwrap();
            loop {
                assert!(began.elapsed() < START_MAX, "postgres did not start: {}", std::fs::read_to_string(&log).unwrap_or_default());
                // It listens before it lets anybody in; its log says when it does.
                if std::fs::read_to_string(&log).unwrap_or_default().contains("ready to accept connections") {
                    return child;
                }
                // After a kill -9 the old server's processes may still be going.
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// The address of one of its databases.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    /// Kills it as a power cut would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again after a kill.
    pub fn restart(&mut self) {
        self.child = Self::spawn(&self.directory, self.port);
    }

    /// Makes a database with our schema in it, and returns its address.
    pub async fn migrated(&self) -> String {
        let name = format!("test_{}", number());
        let mut connection = PgConnection::connect(&self.url("postgres")).await.unwrap();
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut connection).await.unwrap();
        let url = self.url(&name);
        super::migrate(&url).await.unwrap();
        url
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill();
        // Its processes notice within moments and may write until then.
        for _ in 0..50 {
            if std::fs::remove_dir_all(&self.directory).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A database of one test, on the server that tests share.
pub struct Database {
    pub url: String,
    pub connection: PgConnection,
    _server: Arc<Postgres>,
}

/// Makes one, with our schema and the row of partition 0 under epoch 1.
pub async fn database() -> Database {
    let server = tokio::task::spawn_blocking(Postgres::shared).await.unwrap();
    let url = server.migrated().await;
    let mut connection = super::connect(&url).await.unwrap();
    super::partition::load(&mut connection, 0).await.unwrap();
    super::partition::take_epoch(&mut connection, 0, 0, "run-1").await.unwrap().unwrap();
    Database { url, connection, _server: server }
}

/// The rows of any query.
pub async fn rows<T: for<'r> FromRow<'r, PgRow> + Send + Unpin>(connection: &mut PgConnection, query: &'static str) -> Vec<T> {
    sqlx::query_as(query).fetch_all(connection).await.unwrap()
}

/// The one number that a query returns.
pub async fn number_of(connection: &mut PgConnection, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(connection).await.unwrap()
}

/// Runs a statement.
pub async fn execute(connection: &mut PgConnection, statement: &'static str) {
    sqlx::raw_sql(statement).execute(connection).await.unwrap();
}

/// A Redis server without persistence.
pub struct RedisServer {
    directory: PathBuf,
    port: u16,
    child: Child,
}

impl RedisServer {
    pub fn start() -> Self {
        let directory = temporary_directory("redis");
        let port = free_port();
        let child = Command::new(program("redis-server"))
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"])
            .arg(&directory)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(began.elapsed() < START_MAX, "redis-server did not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { directory, port, child }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
