//! `holdfast dev`: serves on a private Redis and Postgres, which it starts, keeps alive and stops.
//!
//! Both listen on loopback, on ports of their own, and keep their data under one directory, so nothing else on the machine is touched.
//! When `dev` itself is killed, they go on, and the next `dev` takes them over: to them, as to a sidecar in production, it is the
//! sidecar that came and went.

mod account;
mod postgres;
mod process;
mod redis_server;

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::app::{self, Ready};
use crate::config::{Config, SecretUrl};
use process::{Plan, Process};

/// How often it is looked whether the servers still run.
const WATCH_EVERY: Duration = Duration::from_millis(500);

/// Why it does not serve, and what to do about it.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl From<app::Error> for Error {
    fn from(error: app::Error) -> Self {
        Self(error.to_string())
    }
}

/// Serves until `shutdown` is cancelled, with the data under `dir`.
pub async fn run(config: Config, dir: PathBuf, shutdown: CancellationToken) -> Result<(), Error> {
    let dir = create(&dir)?;
    let _lock = lock(&dir)?;
    must_be_free(config.listen, "--listen")?;
    must_be_free(config.http.listen, "--http-listen")?;
    // That of a dev that was killed would lead to where nothing is ready yet.
    _ = fs::remove_file(dir.join(ENV_FILE));
    let mut servers = Servers::default();
    let result = serve(config, &dir, &mut servers, shutdown).await;
    _ = fs::remove_file(dir.join(ENV_FILE));
    servers.stop().await;
    result
}

/// Where programs find what `dev` serves on, while it runs: lines as in `HOLDFAST_LISTEN=127.0.0.1:6380`.
const ENV_FILE: &str = "dev.env";

/// The servers that run. Each is put here as soon as it has begun, so that it is stopped whatever happens next.
#[derive(Default)]
struct Servers {
    redis: Option<Process>,
    postgres: Option<Process>,
}

impl Servers {
    async fn stop(self) {
        // Redis first: it has what Postgres may not have yet, and nobody writes to it any more.
        for mut server in [self.redis, self.postgres].into_iter().flatten() {
            server.stop().await;
        }
    }
}

async fn serve(mut config: Config, dir: &Path, servers: &mut Servers, shutdown: CancellationToken) -> Result<(), Error> {
    let starting = async {
        let redis = redis_server::plan(dir)?;
        let postgres = postgres::plan(dir).await?;
        // Both, before either is waited for: what a killed dev has left must not outlive this one, whatever happens next.
        process::adopt(&redis, &mut servers.redis);
        process::adopt(&postgres, &mut servers.postgres);
        process::start(&redis, &mut servers.redis).await?;
        process::start(&postgres, &mut servers.postgres).await?;
        Ok::<_, Error>((redis, postgres))
    };
    let (redis, postgres) = match shutdown.run_until_cancelled(starting).await {
        Some(started) => started?,
        None => return Ok(()),
    };
    config.redis.url = SecretUrl::from(format!("redis://127.0.0.1:{}", redis.port));
    config.postgres.url = SecretUrl::from(format!("postgres://holdfast@127.0.0.1:{}/holdfast", postgres.port));
    let urls = (config.redis.url.clone(), config.postgres.url.clone());
    let (tell_ready, ready) = oneshot::channel();
    let announcing = async {
        if let Ok(ready) = ready.await {
            announce(dir, ready, &urls.0, &urls.1).unwrap_or_else(|error| tracing::warn!("cannot announce that it is ready: {error}"));
        }
    };
    let beside = async { tokio::join!(announcing, keep_running(servers, &redis, &postgres)) };
    tokio::select! {
        result = app::run(config, shutdown, Some(tell_ready)) => Ok(result?),
        _ = beside => Ok(()),
    }
}

/// Starts a server again that has ended. Never returns.
async fn keep_running(servers: &mut Servers, redis: &Plan, postgres: &Plan) {
    loop {
        tokio::time::sleep(WATCH_EVERY).await;
        for (plan, slot) in [(redis, &mut servers.redis), (postgres, &mut servers.postgres)] {
            if slot.as_mut().is_some_and(Process::is_running) {
                continue;
            }
            tracing::warn!("{} has ended: starting it again", plan.name);
            if let Err(error) = process::start(plan, slot).await {
                tracing::error!("{error}");
            }
        }
    }
}

fn create(dir: &Path) -> Result<PathBuf, Error> {
    fs::create_dir_all(dir)
        .and_then(|()| dir.canonicalize())
        .map_err(|error| Error(format!("cannot keep data in {}: {error}; choose another directory with --dir", dir.display())))
}

/// Holds the directory: two at a time would stop each other's servers.
fn lock(dir: &Path) -> Result<File, Error> {
    let path = dir.join("lock");
    let failed = |error: io::Error| Error(format!("cannot lock {}: {error}; choose another directory with --dir", path.display()));
    let mut file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let owner = fs::read_to_string(&path).unwrap_or_default();
            return Err(Error(format!(
                "another holdfast dev (process {}) runs on {}: stop it, or choose another directory with --dir",
                owner.trim(),
                dir.display()
            )));
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(file)
}

/// Errors where an address is taken: before anything starts, so that the answer comes at once.
fn must_be_free(address: SocketAddr, flag: &str) -> Result<(), Error> {
    TcpListener::bind(address).map(drop).map_err(|error| {
        Error(format!("cannot listen on {address}: {error}; stop what listens there, or choose another address with {flag} 127.0.0.1:PORT"))
    })
}

/// The port that the server in this directory had before, if it is free or the server still has it, else a free one.
fn port(home: &Path, pid_file: &Path) -> Result<u16, Error> {
    let path = home.join("port");
    let before = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u16>().ok());
    if let Some(port) = before
        && (pid_file.exists() || TcpListener::bind(("127.0.0.1", port)).is_ok())
    {
        return Ok(port);
    }
    let chosen = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr()).map(|address| address.port());
    let port = chosen.map_err(|error| Error(format!("there is no free port on 127.0.0.1: {error}")))?;
    fs::write(&path, format!("{port}\n")).map_err(|error| Error(format!("cannot write {}: {error}", path.display())))?;
    Ok(port)
}

/// Finds a program on the PATH.
fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Tells programs, by a file, and the user where to connect.
fn announce(dir: &Path, ready: Ready, redis: &SecretUrl, postgres: &SecretUrl) -> io::Result<()> {
    let Ready { listen, http } = ready;
    let (redis, postgres) = (redis.expose(), postgres.expose());
    let env =
        format!("HOLDFAST_LISTEN={listen}\nHOLDFAST_HTTP_LISTEN={http}\nHOLDFAST_REDIS_URL={redis}\nHOLDFAST_POSTGRES_URL={postgres}\n");
    // Moved into place, so that nobody reads half of it.
    let (new, path) = (dir.join("dev.env.new"), dir.join(ENV_FILE));
    fs::write(&new, env)?;
    fs::rename(new, path)?;
    let port = listen.port();
    writeln!(
        io::stdout(),
        "\n\
         Holdfast is ready: Redis clients connect to {listen}, http://{http}/metrics shows what it does.\n\
         Data and logs of its Redis and Postgres are in {}. Try, in another terminal:\n\
         \n\
         \x20 redis-cli -p {port} STOCK.SET sku-1 100\n\
         \x20 redis-cli -p {port} STOCK.DECR sku-1 3\n\
         \x20 psql {postgres} -c 'select product_id, available from holdfast.stock'\n\
         \n\
         Ctrl-C stops it; the data stays.",
        dir.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_held_by_one_at_a_time() {
        let dir = std::env::temp_dir().join(format!("holdfast-{}", uuid::Uuid::new_v4()));
        let dir = create(&dir).unwrap();
        let held = lock(&dir).unwrap();
        let refused = lock(&dir).unwrap_err().to_string();
        assert!(refused.starts_with(&format!("another holdfast dev (process {}) runs on", std::process::id())), "{refused}");
        drop(held);
        lock(&dir).unwrap();
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_port_that_is_taken_is_refused_with_what_to_do() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused = must_be_free(taken.local_addr().unwrap(), "--listen").unwrap_err().to_string();
        assert!(refused.contains("choose another address with --listen 127.0.0.1:PORT"), "{refused}");
    }

    #[test]
    fn a_server_keeps_its_port_while_that_is_free() {
        let home = create(&std::env::temp_dir().join(format!("holdfast-{}", uuid::Uuid::new_v4()))).unwrap();
        let nowhere = home.join("pid");
        let first = port(&home, &nowhere).unwrap();
        assert_eq!(port(&home, &nowhere).unwrap(), first);
        let taken = TcpListener::bind(("127.0.0.1", first)).unwrap();
        assert_ne!(port(&home, &nowhere).unwrap(), first);
        drop(taken);
        fs::remove_dir_all(home).unwrap();
    }
}
