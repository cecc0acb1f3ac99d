//! A Postgres and a Redis of our own for tests: started on a free port, killed when dropped. Shared by the unit tests and the integration
//! tests, so it uses nothing of the crate.

#![allow(dead_code, reason = "each of the test binaries uses its own part")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection};

/// How long a server may take to start on a busy machine.
const START_MAX: Duration = Duration::from_secs(60);

static NUMBER: AtomicU32 = AtomicU32::new(0);

fn number() -> u32 {
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// The process of the Redis on a port; `None` where there is none that answers.
fn process_of_redis(port: u16) -> Option<u32> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    stream.write_all(b"INFO server\r\n").ok()?;
    for line in BufReader::new(stream).lines() {
        if let Some(process) = line.ok()?.strip_prefix("process_id:") {
            return process.trim().parse().ok();
        }
    }
    None
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
                .args(["-p", &port.to_string(), "-h", "127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=200"])
                // Tests need no data after a power cut; a benchmark must pay for it.
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

    /// From now on TLS is spoken only with clients that show a certificate of this directory's `ca.crt`; it has `server.crt` and `server.key`,
    /// too. Without TLS everybody is let in as before.
    pub fn speak_tls(&mut self, certificates: &Path) {
        self.kill();
        let data = self.directory.join("data");
        for name in ["ca.crt", "server.crt", "server.key"] {
            std::fs::copy(certificates.join(name), data.join(name)).unwrap();
            if is_root() {
                assert!(Command::new("chown").arg("postgres").arg(data.join(name)).status().unwrap().success());
            }
            assert!(Command::new("chmod").arg("600").arg(data.join(name)).status().unwrap().success());
        }
        let who = "hostssl all all 127.0.0.1/32 trust clientcert=verify-ca\nhostnossl all all 127.0.0.1/32 trust\n";
        std::fs::write(data.join("pg_hba.conf"), who).unwrap();
        let settings = "\nssl = on\nssl_ca_file = 'ca.crt'\n";
        let written = std::fs::OpenOptions::new().append(true).open(data.join("postgresql.conf"));
        std::io::Write::write_all(&mut written.unwrap(), settings.as_bytes()).unwrap();
        self.restart();
    }

    /// The address of one of its databases.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The id of its first process, which the others are children of.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as a power cut would: with all its processes, which would otherwise finish what they have begun.
    pub fn kill(&mut self) {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let all: Vec<&str> = children.split_ascii_whitespace().collect();
        let _ = self.child.kill();
        let _ = Command::new("kill").arg("-9").args(all).stderr(Stdio::null()).status();
        let _ = self.child.wait();
    }

    /// Starts it again after a kill.
    pub fn restart(&mut self) {
        self.child = Self::spawn(&self.directory, self.port);
    }

    /// Makes an empty database, and returns its address.
    pub async fn database(&self) -> String {
        let name = format!("test_{}", number());
        let mut connection = PgConnection::connect(&self.url("postgres")).await.unwrap();
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut connection).await.unwrap();
        self.url(&name)
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

/// A Redis server. It appends to a file, so that a restart finds everything again.
pub struct RedisServer {
    directory: PathBuf,
    port: u16,
    child: Child,
}

impl RedisServer {
    pub fn start() -> Self {
        let directory = temporary_directory("redis");
        loop {
            let port = free_port();
            if let Some(child) = Self::try_spawn(&directory, port) {
                return Self { directory, port, child };
            }
        }
    }

    fn spawn(directory: &Path, port: u16) -> Child {
        Self::try_spawn(directory, port).unwrap_or_else(|| panic!("port {port} is no longer free"))
    }

    /// `None` where another program was faster to take the port: it may be a Redis, too, of another test.
    fn try_spawn(directory: &Path, port: u16) -> Option<Child> {
        let mut child = Command::new(program("redis-server"))
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
            // A copy of the directory is good only while nothing is being rewritten in it.
            .args(["--auto-aof-rewrite-percentage", "0", "--dir"])
            .arg(directory)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while process_of_redis(port) != Some(child.id()) {
            if child.try_wait().unwrap().is_some() {
                return None;
            }
            assert!(began.elapsed() < START_MAX, "redis-server did not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(child)
    }

    /// One that only speaks TLS, and only to clients with a certificate; the directory has `ca.crt`, `server.crt`, `server.key`.
    pub fn start_with_tls(certificates: &Path) -> Self {
        let directory = temporary_directory("redis");
        let port = free_port();
        let file = |name: &str| certificates.join(name).display().to_string();
        let child = Command::new(program("redis-server"))
            .args(["--port", "0", "--tls-port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
            .args([
                "--tls-cert-file",
                &file("server.crt"),
                "--tls-key-file",
                &file("server.key"),
                "--tls-ca-cert-file",
                &file("ca.crt"),
                "--dir",
            ])
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

    /// Makes it a replica of another one.
    pub fn replicate(&self, master: &Self) {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        std::io::Write::write_all(&mut stream, format!("REPLICAOF 127.0.0.1 {}\r\n", master.port).as_bytes()).unwrap();
        let mut answer = [0; 5];
        std::io::Read::read_exact(&mut stream, &mut answer).unwrap();
        assert_eq!(&answer, b"+OK\r\n");
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again after a kill, with its data.
    pub fn restart(&mut self) {
        self.child = Self::spawn(&self.directory, self.port);
    }

    /// Starts it again after a kill, with nothing.
    pub fn restart_empty(&mut self) {
        std::fs::remove_dir_all(&self.directory).unwrap();
        std::fs::create_dir_all(&self.directory).unwrap();
        self.restart();
    }

    /// A copy of what it has on disk now, to be given back by [`RedisServer::restart_from`].
    pub fn copy_of_data(&self) -> PathBuf {
        let copy = temporary_directory("redis-copy");
        assert!(Command::new("cp").arg("-a").arg(self.directory.join(".")).arg(&copy).status().unwrap().success());
        copy
    }

    /// Starts it again after a kill, with an earlier copy of its data.
    pub fn restart_from(&mut self, copy: &Path) {
        std::fs::remove_dir_all(&self.directory).unwrap();
        assert!(Command::new("cp").arg("-a").arg(copy).arg(&self.directory).status().unwrap().success());
        self.restart();
    }

    /// The id of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_server_of_another_test_is_not_taken_for_the_own() {
        let (first, directory) = (super::RedisServer::start(), super::temporary_directory("redis"));
        assert_eq!(super::process_of_redis(first.port), Some(first.pid()));
        assert!(super::RedisServer::try_spawn(&directory, first.port).is_none());
        std::fs::remove_dir_all(directory).unwrap();
    }
}
