//! (being written)

use std::fmt;
use std::net::SocketAddr;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::config::Config;

/// Where a server that is ready listens: the ports it was given, where the configuration says 0.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// Where Redis clients connect.
    pub listen: SocketAddr,
    /// Where the HTTP endpoints are served.
    pub http: SocketAddr,
}

/// Why the server could not start, or could not go on.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Serves until `shutdown` is cancelled; says through `ready` when clients are served.
pub async fn run(config: Config, shutdown: CancellationToken, ready: Option<oneshot::Sender<Ready>>) -> Result<(), Error> {
    if let Some(ready) = ready {
        _ = ready.send(Ready { listen: config.listen, http: config.http.listen });
    }
    shutdown.cancelled().await;
    Ok(())
}

/// Brings Postgres to this version's tables.
pub async fn migrate(config: &Config) -> Result<(), Error> {
    Err(Error(format!("not written yet: migrate {}", config.postgres.url)))
}
