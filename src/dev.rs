//! (being written)

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use crate::app;
use crate::config::Config;

/// Serves on a private Redis and Postgres.
pub async fn run(config: Config, _dir: PathBuf, shutdown: CancellationToken) -> Result<(), app::Error> {
    app::run(config, shutdown, None).await
}
