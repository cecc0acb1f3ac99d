//! What every changing command shares: its REQUEST, its ACK, and how its failures read.

use std::time::{Duration, Instant};

use super::args::{Ack, Args};
use super::backend::Backend;
use super::{Call, Context};
use crate::domain::Position;
use crate::limits;
use crate::resp::{Encoder, Reply, Ticket};
use crate::store::lane::Failure;
use crate::store::requests::{KnownReply, Remembered, Request};

/// The default of a command that answers once Redis has the change.
pub const ACK_REDIS: Ack = Ack::Redis;
/// The default of a command that answers once Postgres has it, too.
pub const ACK_POSTGRES: Ack = Ack::Postgres;

/// What a change's reply waits for, and how long.
#[derive(Clone, Copy, Debug)]
pub struct Confirmation {
    ack: Ack,
    timeout: Duration,
}

impl Confirmation {
    /// From ACK and TIMEOUT, else the command's default, unless another was set. Errors with the reply where it is known beforehand that it
    /// cannot be had.
    pub fn of(call: &Call<'_>, default: Ack) -> Result<Self, Reply> {
        let (args, backend) = (&call.args, &call.cx.backend);
        let partition = &backend.partition;
        let set = &call.cx.acks_set;
        // Mostly none is, and each change comes here.
        let default = if set.is_empty() { default } else { set.get(args.spec().name).copied().unwrap_or(default) };
        let ack = args.ack().unwrap_or(default);
        let otherwise = if default == Ack::Postgres { limits::ACK_POSTGRES_WITHIN } else { limits::ACK_WITHIN };
        let asked = args.timeout_ms().and_then(|ms| u64::try_from(ms).ok()).map(Duration::from_millis);
        if ack == Ack::Postgres && !partition.ledger_up() && partition.live_epoch().is_some() {
            return Err(Reply::error("TRYAGAIN Postgres cannot be reached, so ACK postgres cannot be given; nothing was changed"));
        }
        Ok(Self { ack, timeout: asked.unwrap_or(otherwise) })
    }

    /// How long it may wait for Postgres.
    pub fn waits_for_postgres(self) -> Duration {
        if self.ack == Ack::Postgres { self.timeout } else { Duration::ZERO }
    }

    /// Sends the reply of a change that came at `arrived` and that Redis has at `position`, as soon as it is confirmed as asked.
    pub fn confirm(self, backend: &Backend, arrived: Instant, position: Position, ticket: Ticket, reply: Reply) {
        // Whatever it waited for before, such as a look into Postgres, it is due by then.
        let latest = || arrived + backend.within + self.timeout;
        let timeout = || self.timeout.min(latest().saturating_duration_since(Instant::now()));
        match self.ack {
            Ack::Redis => ticket.complete(reply),
            Ack::Replica => backend.acks.replicas.wait(position, timeout(), ticket, reply),
            Ack::Postgres => backend.acks.wait(position, timeout(), ticket, reply),
        }
    }
}

/// The command's REQUEST, if it carries one.
pub fn request(args: &Args) -> Option<Request> {
    args.request().map(|id| Request::new(id, args.digest()))
}

/// The error of what is refused as it comes, since more waits than is served in time.
pub const CROWDED: &str = "TRYAGAIN overloaded: more operations wait for Redis than it does in time; nothing was changed";

/// The error reply of an operation that was not decided.
pub fn failed(cx: &Context, failure: Failure) -> Reply {
    Reply::error(match failure {
        Failure::Crowded => {
            cx.refused_for_time();
            return Reply::error(CROWDED);
        }
        Failure::Loading(why) => format!("LOADING {why}"),
        Failure::TryAgain(why) => format!("TRYAGAIN {why}"),
        Failure::InDoubt(id) => format!("INDOUBT {id} it is not known yet whether it was executed: ask again with REQUEST {id}"),
    })
}

/// What a remembered REQUEST comes to: the reply of its first execution with its position, or an error.
pub fn replay(request: Option<&Request>, remembered: &Remembered) -> Result<(Position, Reply), Reply> {
    match remembered {
        Remembered::Stale => {
            Err(Reply::error("STALE this REQUEST id is older than idempotency.window_ms: read what became of it, then use a new id"))
        }
        Remembered::Ahead => {
            Err(Reply::error("ERR invalid request id: its time is more than 60 s in the future, check this client's clock"))
        }
        Remembered::Other => Err(mismatch()),
        Remembered::Known(text) => {
            let Some(reply) = request.and_then(|request| request.reply_in(text)) else {
                return Err(mismatch());
            };
            let Some(known) = KnownReply::parse(reply) else {
                return Err(Reply::error("ERR what is remembered of this REQUEST id cannot be read"));
            };
            Ok((known.position, accepted(known.word, &known.integers, known.position)))
        }
    }
}

fn mismatch() -> Reply {
    Reply::error("MISMATCH this REQUEST id was used with another command or other arguments: use a new id")
}

/// The reply of an accepted change: the outcome word, its numbers, the position.
pub fn accepted(word: &str, integers: &[i64], position: Position) -> Reply {
    if let ("OK", [number]) = (word, integers) {
        return Reply::Accepted { number: *number, epoch: position.epoch, n: position.n };
    }
    let mut reply = Encoder::array(integers.len() + 2);
    reply.bulk(word.as_bytes());
    for integer in integers {
        reply.integer(*integer);
    }
    reply.bulk(position.text().as_bytes());
    reply.done()
}

/// A business outcome that changed nothing: the word, and its values.
pub fn outcome(word: &'static str, values: impl IntoIterator<Item = Reply>) -> Reply {
    Reply::Array(std::iter::once(Reply::word(word)).chain(values).collect())
}
