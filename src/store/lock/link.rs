//! The connection that locks are held over, and under which epoch the node behind it gives out tokens.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tracing::{info, warn};

use super::super::clock::Clock;
use super::super::words::Words;
use super::super::{Connection, Error, keys, script};
use crate::domain::lock::Epoch;
use crate::limits::{HEARTBEAT_EVERY, HEARTBEAT_WITHIN, LOCK_EPOCH_WITHIN, LOCK_OPEN_WITHIN, LOCK_RECONNECT_AFTER};

/// Asks Postgres under which epoch a node may give out tokens. Dropped unanswered where Postgres cannot say.
#[derive(Debug)]
pub struct EpochRequest {
    /// What the node holds, if it is known to have every token that was given under it.
    pub kept: Option<u64>,
    /// The highest epoch that the node shows.
    pub seen: u64,
    pub answer: oneshot::Sender<Epoch>,
}

/// A Redis that locks can be held on.
#[derive(Clone)]
pub(super) struct Node {
    pub connection: Connection,
    pub epoch: Arc<Epoch>,
    number: u64,
    /// How Redis calls the connection; `None` where it does not say.
    client: Option<i64>,
    clock: Arc<Mutex<Clock>>,
}

impl Node {
    /// Redis's time at `instant`, in Unix ms.
    pub fn time_at(&self, instant: Instant) -> i64 {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner).at(instant)
    }
}

/// Why the node is to be looked at again.
#[derive(Default)]
struct Doubt {
    /// About the connection of this number.
    number: u64,
    /// A token that is not to be had under its epoch.
    spent: u64,
}

/// See the module.
pub(super) struct Link {
    redis_url: String,
    epochs: mpsc::Sender<EpochRequest>,
    /// The highest token that a script has answered.
    seen: AtomicU64,
    /// Whose locks they are, as it was agreed last.
    installation: Mutex<String>,
    /// The node, or why there is none.
    state: watch::Sender<Result<Node, String>>,
    doubt: Mutex<Doubt>,
    doubted: Notify,
}

impl Link {
    pub fn new(redis_url: &str, epochs: mpsc::Sender<EpochRequest>) -> Self {
        Self {
            redis_url: redis_url.to_owned(),
            epochs,
            seen: AtomicU64::new(0),
            installation: Mutex::default(),
            state: watch::Sender::new(Err("starting".to_owned())),
            doubt: Mutex::default(),
            doubted: Notify::new(),
        }
    }

    /// Waits for a node.
    pub async fn node(&self) -> Node {
        let mut state = self.state.subscribe();
        loop {
            if let Ok(node) = &*state.borrow_and_update() {
                return node.clone();
            }
            // The sender is ours, so it cannot be gone.
            _ = state.changed().await;
        }
    }

    /// A script answered this token: every later one is higher.
    pub fn saw(&self, token: u64) {
        self.seen.fetch_max(token, Ordering::Relaxed);
    }

    /// The highest token that a script has answered; 0 before the first.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// What stands before the token in the fields of this installation's holders.
    pub fn installation(&self) -> String {
        self.installation.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why there is no node; `None` where there is one.
    pub fn trouble(&self) -> Option<String> {
        self.state.borrow().as_ref().err().cloned()
    }

    /// The connection of this node does not answer.
    pub fn failed(&self, node: &Node) {
        self.doubt(node, 0, "Redis cannot be reached");
    }

    /// This node is not known to have every token; `spent`: one that it cannot have under its epoch, 0 where it is not about that.
    pub fn stale(&self, node: &Node, spent: u64) {
        self.doubt(node, spent, "waiting for Postgres to say how locks' tokens go on");
    }

    fn doubt(&self, node: &Node, spent: u64, why: &str) {
        let first = self.state.send_if_modified(|state| {
            let current = matches!(state, Ok(current) if current.number == node.number);
            if current {
                *state = Err(why.to_owned());
            }
            current
        });
        if first {
            *self.doubt.lock().unwrap_or_else(PoisonError::into_inner) = Doubt { number: node.number, spent };
            self.doubted.notify_one();
        }
    }

    /// Connects, and connects again. Never returns.
    pub async fn run(&self) {
        let (mut number, mut agreed, mut said) = (0, None, String::new());
        let mut before: Option<Node> = None;
        loop {
            number += 1;
            let spent = std::mem::take(&mut self.doubt.lock().unwrap_or_else(PoisonError::into_inner).spent);
            let opening = tokio::time::timeout(LOCK_OPEN_WITHIN, self.open(number, spent, before.as_ref(), &mut agreed));
            let silent = || Error::Unexpected(format!("none within {} s of connecting to it", LOCK_OPEN_WITHIN.as_secs()));
            match opening.await.unwrap_or_else(|_| Err(silent())) {
                Ok(node) => {
                    said.clear();
                    before = Some(node.clone());
                    _ = self.state.send_replace(Ok(node.clone()));
                    self.keep(node).await;
                }
                Err(error) => {
                    let why = error.to_string();
                    if said != why {
                        warn!(why, "locks cannot be served yet, trying on");
                        _ = self.state.send_replace(Err(why.clone()));
                        said = why;
                    }
                    tokio::time::sleep(LOCK_RECONNECT_AFTER).await;
                }
            }
        }
    }

    /// Keeps the clock, until the node is in doubt.
    async fn keep(&self, node: Node) {
        let mut connection = node.connection.clone();
        loop {
            tokio::select! {
                () = self.doubted.notified() => {
                    if self.doubt.lock().unwrap_or_else(PoisonError::into_inner).number == node.number {
                        return;
                    }
                }
                () = tokio::time::sleep(HEARTBEAT_EVERY) => match tokio::time::timeout(HEARTBEAT_WITHIN, connection.time_ms()).await {
                    Ok(Ok(ms)) => *node.clock.lock().unwrap_or_else(PoisonError::into_inner) = Clock::heard(ms),
                    _ => self.failed(&node),
                },
            }
        }
    }

    /// Connects and makes sure that no token can be given out twice.
    async fn open(&self, number: u64, spent: u64, before: Option<&Node>, agreed: &mut Option<Arc<Epoch>>) -> Result<Node, Error> {
        let mut connection = Connection::open(&self.redis_url).await?;
        if let Some(before) = before {
            end(before, &mut connection).await?;
        }
        let client = id_of(&mut connection).await?;
        let clock = Arc::new(Mutex::new(Clock::heard(connection.time_ms().await?)));
        loop {
            let marker = Marker::of(&mut connection).await?;
            // One that lies below what was seen is of before, though it is the same process: it was loaded, or written by hand.
            let is_whole = marker.token >= self.seen().max(1) && marker.run.as_deref() == Some(connection.run_id());
            let kept = marker.epoch.filter(|_| is_whole && spent == 0);
            let known = agreed.clone().filter(|epoch| kept == Some(epoch.number));
            let epoch = match known {
                Some(epoch) => epoch,
                None => {
                    let known = agreed.as_ref().map_or(0, |epoch| epoch.number);
                    let tokens = [marker.token, spent, self.seen()].map(Epoch::of);
                    let seen = tokens.into_iter().fold(marker.epoch.unwrap_or(0).max(known), u64::max);
                    let epoch = Arc::new(self.ask(kept, seen).await?);
                    *agreed = Some(Arc::clone(&epoch));
                    epoch
                }
            };
            if kept != Some(epoch.number) {
                let (number, run) = (epoch.number.to_string(), connection.run_id().to_owned());
                let opened = connection.run(&script::LOCK_OPEN, &[keys::LOCKS], &[number.as_bytes(), run.as_bytes()]).await?;
                if Words::new(redis::Value::Array(vec![opened]))?.text()? != "ok" {
                    continue;
                }
                info!(epoch = number, run_id = run, "locks' tokens begin anew, above all that were given");
            }
            self.installation.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&epoch.installation);
            return Ok(Node { connection, epoch, number, client, clock });
        }
    }

    async fn ask(&self, kept: Option<u64>, seen: u64) -> Result<Epoch, Error> {
        let silent = || Error::Unfit("waiting for Postgres to say how locks' tokens go on".to_owned());
        let (answer, answered) = oneshot::channel();
        self.epochs.try_send(EpochRequest { kept, seen, answer }).map_err(|_| silent())?;
        match tokio::time::timeout(LOCK_EPOCH_WITHIN, answered).await {
            Ok(Ok(epoch)) => Ok(epoch),
            _ => Err(silent()),
        }
    }
}

/// Ends the connection of before at Redis, so that nothing of it that has not run yet runs later: what is sent again has been decided then, and
/// so has what was given up.
async fn end(before: &Node, connection: &mut Connection) -> Result<(), Error> {
    // Another process has other connections.
    let Some(client) = before.client.filter(|_| before.connection.run_id() == connection.run_id()) else { return Ok(()) };
    match connection.send(redis::cmd("CLIENT").arg("KILL").arg("ID").arg(client)).await {
        Err(error @ Error::Connection(_)) => Err(error),
        Err(error) => {
            warn!(%error, "a connection that was given up cannot be ended at Redis: what was sent over it may still run");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

/// How Redis calls this connection; `None` where it does not say.
async fn id_of(connection: &mut Connection) -> Result<Option<i64>, Error> {
    match connection.send(redis::cmd("CLIENT").arg("ID")).await {
        Err(error @ Error::Connection(_)) => Err(error),
        Ok(redis::Value::Int(id)) => Ok(Some(id)),
        Ok(_) => Ok(None),
        Err(error) => {
            warn!(%error, "Redis does not say how it calls a connection, so one that is given up is not ended there: what was sent over it may still run");
            Ok(None)
        }
    }
}

/// What a node says of its tokens.
struct Marker {
    epoch: Option<u64>,
    run: Option<String>,
    /// The highest that it gave out.
    token: u64,
}

impl Marker {
    async fn of(connection: &mut Connection) -> Result<Self, Error> {
        let answer = match connection.send(redis::cmd("HMGET").arg(keys::LOCKS).arg("epoch").arg("run").arg("token")).await {
            // What does not belong there is replaced.
            Err(error) if error.is_about_what_is_there() => return Ok(Self { epoch: None, run: None, token: 0 }),
            answer => answer?,
        };
        let mut words = Words::new(answer)?;
        let number = |words: &mut Words| Ok::<_, Error>(words.maybe_text()?.and_then(|text| text.parse().ok()));
        let epoch = number(&mut words)?;
        let run = words.maybe_text()?;
        Ok(Self { epoch, run, token: number(&mut words)?.unwrap_or(0) })
    }
}

/// A wait of up to `whole`, between three quarters and all of it by chance, so that sidecars do not poll in step.
pub(super) fn jittered(whole: Duration, chance: u64) -> Duration {
    let part = chance.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 54;
    whole * 3 / 4 + (whole / 4).mul_f64(part as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jittered_wait_is_never_longer_and_hardly_shorter() {
        let whole = Duration::from_millis(250);
        let waits: Vec<Duration> = (0..100).map(|chance| jittered(whole, chance)).collect();
        assert!(waits.iter().all(|wait| *wait <= whole && *wait >= whole * 3 / 4));
        assert!(waits.iter().min() < Some(&(whole * 8 / 10)) && waits.iter().max() > Some(&(whole * 95 / 100)));
    }
}
