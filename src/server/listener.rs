//! Accepts connections.

use std::rc::Rc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::command::Context;

/// Serves until `shutdown`.
pub async fn serve(_listener: TcpListener, _cx: Rc<Context>, shutdown: CancellationToken) {
    shutdown.cancelled().await;
}
