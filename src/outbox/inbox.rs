//! Brings to Redis what other programs changed in `holdfast.stock`.
//!
//! Redis knows up to which row of the inbox it has it, and the write script takes a row only from exactly there, so that each is taken
//! once however many sidecars carry. Rows are read from Redis's mark on and sent in their order without waiting for each other; where one
//! is not taken, the rest is not either, and reading begins again at the mark.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{counter, gauge};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::retry::Trouble;
use crate::domain::{Id, InboxMark};
use crate::ledger::inbox::{self, InboxRow, Listener};
use crate::ledger::{self, PgConnection};
use crate::limits::{
    INBOX_BLOCKED_POLL_MAX, INBOX_BLOCKED_POLL_MIN, INBOX_OTHERS_AFTER, INBOX_POLL, INBOX_PRUNE_EVERY, LEDGER_SILENCE_MAX,
    LEDGER_STATEMENT_TIMEOUT, OUTBOX_ANSWER_TIMEOUT,
};
use crate::store::partition::State;
use crate::store::stock::{InboxRow as Kind, StockOp, StockOutcome, Upkeep};
use crate::store::{Connection, Partition, meta};

/// Why a product is frozen whose units another program took away after Redis had sold them.
const SHORT: &str = "another program took units off in Postgres that Redis had sold already: compare with STOCK.SYNC, then STOCK.UNFREEZE";

/// See the module.
pub struct Inbox {
    partition: Arc<Partition>,
    redis_url: String,
    postgres_url: String,
    label: String,
    redis: Option<Connection>,
    ledger: Option<PgConnection>,
    carries: bool,
    pruned: Instant,
    /// How long to wait for a transaction that holds rows back.
    blocked_poll: Duration,
    trouble: Trouble,
}

impl Inbox {
    pub fn new(partition: Arc<Partition>, redis_url: &str, postgres_url: &str) -> Self {
        Self {
            label: partition.id.to_string(),
            partition,
            redis_url: redis_url.to_owned(),
            postgres_url: postgres_url.to_owned(),
            redis: None,
            ledger: None,
            carries: false,
            pruned: Instant::now(),
            blocked_poll: INBOX_BLOCKED_POLL_MIN,
            trouble: Trouble::new("the inbox"),
        }
    }

    /// Carries until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        let heard = Notify::new();
        let url = self.postgres_url.clone();
        let mut listening = std::pin::pin!(listen(&url, &heard));
        let mut state = self.partition.state.subscribe();
        loop {
            let pause = {
                let passing = self.pass();
                // What was sent is taken or not whoever waits for it, and the connections go with this.
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = &mut listening => return,
                    pause = passing => pause,
                }
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = &mut listening => return,
                () = heard.notified() => self.blocked_poll = INBOX_BLOCKED_POLL_MIN,
                _ = state.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Takes what can be taken. Returns how long to wait for more.
    async fn pass(&mut self) -> Duration {
        let run_id = match &*self.partition.state.borrow() {
            State::Live { run_id, .. } => run_id.clone(),
            State::Loading(_) | State::Rebuilding(_) => return INBOX_POLL,
        };
        match self.take(&run_id).await {
            Ok(pause) => {
                self.trouble.over(self.partition.id);
                pause
            }
            Err(why) => {
                (self.redis, self.ledger, self.carries) = (None, None, false);
                self.trouble.failed(self.partition.id, &why).min(INBOX_POLL)
            }
        }
    }

    async fn take(&mut self, run_id: &str) -> Result<Duration, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let redis = match &mut self.redis {
            Some(redis) if redis.run_id() == run_id => redis,
            other => other.insert(Connection::open(&self.redis_url).await.map_err(|error| text(&error))?),
        };
        let ledger = match &mut self.ledger {
            Some(ledger) => ledger,
            none => none.insert(ledger::connect(&self.postgres_url).await.map_err(|error| text(&error))?),
        };
        let marking = tokio::time::timeout(OUTBOX_ANSWER_TIMEOUT, meta::inbox_mark(redis)).await;
        let mark = marking.map_err(|_| "Redis does not answer".to_owned())?.map_err(|error| text(&error))?;
        let looking = tokio::time::timeout(LEDGER_SILENCE_MAX, inbox::after(ledger, mark)).await;
        let waiting = looking.map_err(|_| "Postgres does not answer".to_owned())?.map_err(|error| text(&error))?;
        gauge!("holdfast_inbox_waiting_seconds", "partition" => self.label.clone()).set(waiting.age.as_secs_f64());
        if waiting.rows.is_empty() {
            if waiting.blocked {
                self.blocked_poll = (self.blocked_poll * 2).min(INBOX_BLOCKED_POLL_MAX);
                return Ok(self.blocked_poll);
            }
            self.prune().await?;
            return Ok(INBOX_POLL);
        }
        if !self.carries {
            let asking = tokio::time::timeout(LEDGER_SILENCE_MAX, inbox::carries(ledger, self.partition.id)).await;
            self.carries = asking.map_err(|_| "Postgres does not answer".to_owned())?.map_err(|error| text(&error))?;
            // Whoever carries may hang: what has waited for so long is taken by anybody.
            if !self.carries && waiting.age < INBOX_OTHERS_AFTER {
                return Ok(INBOX_OTHERS_AFTER);
            }
        }
        match self.send(mark, &waiting.rows).await {
            true => Ok(Duration::ZERO),
            false => Ok(INBOX_BLOCKED_POLL_MIN),
        }
    }

    /// Sends the rows in their order, which the lane keeps. Returns whether there were any to send and all were taken.
    async fn send(&self, mark: InboxMark, rows: &[InboxRow]) -> bool {
        let mut before = mark;
        let mut answers = Vec::with_capacity(rows.len());
        for row in rows {
            let Some(kind) = Kind::parse(&row.kind).filter(|_| Id::is_valid(row.product.as_bytes())) else {
                // It cannot be in Redis, and the mark passes over it with the next.
                warn!(product = row.product, kind = row.kind, "a product that no client can name was changed in postgres");
                continue;
            };
            let upkeep = Upkeep::Inbox { before, mark: row.mark, row: kind, reason: SHORT.to_owned() };
            match self.partition.submit(StockOp::upkeep(Id::from(row.product.as_str()), row.delta, upkeep)).await {
                Ok(answer) => answers.push(answer),
                Err(_) => break,
            }
            before = row.mark;
        }
        let (sent, mut taken) = (answers.len(), 0);
        for answer in answers {
            taken += usize::from(matches!(answer.await, Ok(Ok(StockOutcome::Done { .. }))));
        }
        counter!("holdfast_inbox_rows_total", "partition" => self.label.clone()).increment(taken as u64);
        taken == sent && sent > 0
    }

    async fn prune(&mut self) -> Result<(), String> {
        let Some(ledger) = self.ledger.as_mut().filter(|_| self.pruned.elapsed() >= INBOX_PRUNE_EVERY) else { return Ok(()) };
        self.pruned = Instant::now();
        let pruning = tokio::time::timeout(LEDGER_STATEMENT_TIMEOUT, inbox::prune(ledger, self.partition.id)).await;
        pruning.map_err(|_| "Postgres does not answer".to_owned())?.map(drop).map_err(|error| error.to_string())
    }
}

/// Notifies for as long as it is polled; without a connection the poll is all there is.
async fn listen(url: &str, heard: &Notify) {
    loop {
        if let Ok(mut listener) = Listener::open(url).await {
            heard.notify_one();
            while listener.heard().await.is_ok() {
                heard.notify_one();
            }
        }
        tokio::time::sleep(INBOX_POLL).await;
    }
}
