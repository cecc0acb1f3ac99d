//! HOLDFAST.DRAIN: ends this server as a SIGTERM does, but only when Postgres has what it has answered, and says so.
//!
//! From then on nothing new is begun: commands about data get LOADING, `/readyz` says so, and clients go elsewhere while what they hold here goes on.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::spawn_local;
use tokio_util::sync::CancellationToken;

use super::spec::{ADMIN, LOADING, Spec};
use super::{Call, Context, Step, change};
use crate::resp::Reply;

/// Whether the server is being drained, and how it is ended. Shared by every thread.
#[derive(Debug)]
pub struct Drain {
    begun: AtomicBool,
    /// Ends the server, as a SIGTERM does.
    shutdown: CancellationToken,
    /// How long Postgres is waited for.
    within: Duration,
}

impl Drain {
    /// Not yet; `within` is how long it may take then.
    pub fn new(shutdown: CancellationToken, within: Duration) -> Self {
        Self { begun: AtomicBool::new(false), shutdown, within }
    }

    /// Nothing new from now on.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// Whether it has begun.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// Why nothing new is begun, once it has.
    pub fn refusal(&self) -> Option<&'static str> {
        self.has_begun().then_some("LOADING Holdfast is draining: go on with another sidecar")
    }
}

pub static DRAIN: Spec = Spec::new("HOLDFAST.DRAIN", "Ends this server as a SIGTERM does, once Postgres has what was answered.")
    .family("holdfast")
    .flags(ADMIN | LOADING)
    .reply("`OK, position`, or `PENDING, applied` where Postgres took longer than `shutdown_timeout_ms`; then the server ends")
    .run(drain);

fn drain(call: &mut Call<'_>) -> Step {
    call.cx.drain.begin();
    tracing::info!(client = %call.session.client.address, "draining: nothing new is begun");
    // Goes on although its client may leave.
    let draining = spawn_local(finish(Rc::clone(call.cx)));
    Step::CloseAfter(Box::pin(async move { draining.await.unwrap_or_else(|_| Reply::error("ERR the server ends")) }))
}

/// Waits until what was begun has been answered, and until Postgres has it; then ends the server.
async fn finish(cx: Rc<Context>) -> Reply {
    let partition = &cx.backend.partition;
    let level = async {
        // By then all that was dispatched before has been decided, on every thread.
        tokio::time::sleep(cx.backend.reply_within).await;
        let newest = partition.head();
        partition.applied.subscribe().wait_for(|applied| *applied >= newest).await.ok()?;
        Some(newest)
    };
    let reply = match tokio::time::timeout(cx.drain.within, level).await {
        Ok(Some(newest)) => change::outcome("OK", [Reply::text(newest.to_string())]),
        _ => change::outcome("PENDING", [Reply::text(partition.applied.borrow().to_string())]),
    };
    cx.drain.shutdown.cancel();
    reply
}
