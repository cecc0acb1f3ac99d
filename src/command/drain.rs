//! HOLDFAST.DRAIN: ends this server as a SIGTERM does, but only when Postgres has what it has answered, and says so.
//!
//! From then on nothing new is begun: commands about data get LOADING, `/readyz` says so, and clients go elsewhere. What they hold here goes on until
//! the server ends: locks are renewed, checked, extended and released, and positions awaited.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::spawn_local;
use tokio_util::sync::CancellationToken;

use super::spec::{ADMIN, LOADING, Spec};
use super::{Call, Context, Step, change, holdfast, lock};
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

    /// Why this command is not begun, once it has.
    pub fn refusal(&self, spec: &'static Spec) -> Option<&'static str> {
        let refuses = self.has_begun() && !GOES_ON.iter().any(|on| std::ptr::eq(*on, spec));
        refuses.then_some("LOADING Holdfast is draining: go on with another sidecar")
    }
}

/// What is about something begun before.
static GOES_ON: [&Spec; 4] = [&lock::RELEASE, &lock::EXTEND, &lock::CHECK, &holdfast::AWAIT];

pub static DRAIN: Spec = Spec::new("HOLDFAST.DRAIN", "Ends this server as a SIGTERM does, once Postgres has what was answered.")
    .family("holdfast")
    .flags(ADMIN | LOADING)
    .reply("`OK, position`, or `PENDING, applied` where Postgres did not have it within `shutdown_timeout_ms`; then the server ends, within as long again")
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
        // An epoch that ended meanwhile may have ended without it.
        (holdfast::fate(partition, newest).await? == holdfast::APPLIED).then_some(newest)
    };
    let reply = match tokio::time::timeout(cx.drain.within, level).await {
        Ok(Some(newest)) => change::outcome("OK", [Reply::text(newest.to_string())]),
        _ => change::outcome("PENDING", [Reply::text(partition.applied.borrow().to_string())]),
    };
    cx.drain.shutdown.cancel();
    reply
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Backend, Commands, Stats, table};
    use super::*;
    use crate::domain::Position;
    use crate::session::registry::Registry;
    use crate::store::partition::EndedEpoch;

    #[tokio::test]
    async fn a_later_epoch_in_postgres_does_not_say_that_it_has_what_was_answered() {
        for (last_n, expected) in [(5, "OK"), (4, "PENDING")] {
            let commands = Rc::new(Commands::new(table::TABLE));
            let stats = Arc::new(Stats::new(&commands));
            let backend = Backend { reply_within: Duration::ZERO, ..Backend::unconnected() };
            let mut cx = Context::new(commands, Arc::new(Registry::new(10)), stats, backend);
            cx.drain = Arc::new(Drain::new(CancellationToken::new(), Duration::from_secs(30)));
            let cx = Rc::new(cx);
            cx.backend.partition.saw(Position::new(1, 5));
            let (reply, ()) = tokio::join!(finish(Rc::clone(&cx)), async {
                while cx.backend.partition.applied.receiver_count() == 0 {
                    tokio::task::yield_now().await;
                }
                cx.backend.partition.set_applied(Position::new(2, 0));
                cx.backend.partition.set_ended(vec![EndedEpoch { epoch: 1, last_n, saved: Vec::new(), waiting: Vec::new() }]);
            });
            assert!(format!("{reply:?}").contains(expected), "{reply:?}");
            assert!(cx.drain.shutdown.is_cancelled());
        }
    }
}
