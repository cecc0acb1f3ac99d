//! Asks Redis whether a replica has what was written.

use std::time::Duration;

use redis::Value;

use super::words::Words;
use super::{Connection, Error, keys, script};
use crate::domain::Position;

/// What a replica has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicated {
    /// Everything up to here, of its epoch.
    pub position: Position,
    /// Whether a replica has it.
    pub confirmed: bool,
}

/// A connection of its own: WAIT holds up everything behind it. Like [`Connection`] it never reconnects.
pub struct Replicas {
    connection: Connection,
}

impl Replicas {
    /// Connects. Errors as [`Connection::open`] does.
    pub async fn open(url: &str) -> Result<Self, Error> {
        Ok(Self { connection: Connection::open(url).await? })
    }

    /// Waits, at most `timeout`, until one replica has everything that Redis has now. WAIT counts from the last write of its own connection,
    /// which therefore writes first.
    pub async fn wait(&mut self, timeout: Duration) -> Result<Replicated, Error> {
        let mut words = Words::new(self.connection.run(&script::REPLICATE, &[keys::META], &[]).await?)?;
        let number = |integer: Option<i64>| integer.and_then(|integer| u64::try_from(integer).ok()).unwrap_or(0);
        let (epoch, run_id, n) = (number(words.maybe_integer()?), words.maybe_text()?, number(words.maybe_integer()?));
        let timeout_ms = u64::try_from(timeout.as_millis().max(1)).unwrap_or(u64::MAX);
        let replicas = match self.connection.send(redis::cmd("WAIT").arg(1).arg(timeout_ms)).await? {
            Value::Int(replicas) => replicas,
            other => return Err(Error::Unexpected(format!("WAIT: {other:?}"))),
        };
        let verified = run_id.as_deref() == Some(self.connection.run_id());
        Ok(Replicated { position: Position::new(epoch, n), confirmed: verified && replicas >= 1 })
    }
}
