//! What `holdfast:meta` says of a partition, and opening it under a new epoch.

use redis::Value;

use super::script;
use super::words::Words;
use super::{Connection, Error, keys, stream};
use crate::domain::change::Entry;
use crate::domain::{InboxMark, Position};

/// A partition as Redis has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    pub epoch: u64,
    /// The run id of the Redis process that was verified last.
    pub run_id: String,
    /// Whether scripts may write.
    pub live: bool,
    /// Whether Postgres is being made as this Redis is, or was when that broke off: nobody may fill it.
    pub adopted: bool,
    /// n of the newest change.
    pub n: u64,
    /// The op of the newest entry, `-` before the first.
    pub last: String,
}

/// What the verifier compares with Postgres, read at one moment: a sale in between would look like a loss.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// `None` where this Redis has none.
    pub meta: Option<Meta>,
    pub newest: Option<Entry>,
    pub at_applied: Option<Entry>,
    pub oldest: Option<Entry>,
}

impl Look {
    /// Looks at the partition; `applied` is what Postgres has.
    pub async fn at(connection: &mut Connection, applied: Position) -> Result<Self, Error> {
        let applied = applied.to_string();
        let mut words = Words::new(connection.run(&script::LOOK, &[keys::META, keys::OUTBOX], &[applied.as_bytes()]).await?)?;
        let number = |integer: Option<i64>| integer.map(|integer| u64::try_from(integer).unwrap_or(0));
        let (epoch, run_id, state) = (number(words.maybe_integer()?), words.maybe_text()?, words.maybe_text()?);
        let (n, last) = (number(words.maybe_integer()?).unwrap_or(0), words.maybe_text()?.unwrap_or_default());
        let mut entry = || match words.raw()? {
            Value::Nil => Ok(None),
            value => stream::entry(value).map(Some),
        };
        let (newest, at_applied, oldest) = (entry()?, entry()?, entry()?);
        let [live, adopted] = ["live", ADOPT].map(|word| state.as_deref() == Some(word));
        let meta = epoch.map(|epoch| Meta { epoch, run_id: run_id.unwrap_or_default(), live, adopted, n, last });
        Ok(Self { meta, newest, at_applied, oldest })
    }
}

/// Up to where Redis has what other programs changed in Postgres.
pub async fn inbox_mark(connection: &mut Connection) -> Result<InboxMark, Error> {
    let answer = connection.send(redis::cmd("HGET").arg(keys::META).arg("inbox")).await?;
    let text = Words::new(Value::Array(vec![answer]))?.maybe_text()?;
    let Some(text) = text else { return Ok(InboxMark::default()) };
    InboxMark::parse(&text).ok_or_else(|| Error::Unexpected(format!("{text:?} where the mark of the inbox belongs")))
}

/// Opens the partition to the process at the other end under `epoch`, if it still is as `seen`. `false` if another sidecar was
/// faster.
pub async fn attach(connection: &mut Connection, seen: Option<&Meta>, epoch: u64) -> Result<bool, Error> {
    let from = seen.map(|meta| meta.epoch.to_string()).unwrap_or_default();
    let (n, last) = seen.map_or((0, "-"), |meta| (meta.n, meta.last.as_str()));
    let (to, n, run_id) = (epoch.to_string(), n.to_string(), connection.run_id().to_owned());
    let args = [from.as_bytes(), to.as_bytes(), run_id.as_bytes(), n.as_bytes(), last.as_bytes()];
    let answer = connection.run(&script::ATTACH, &[keys::META], &args).await?;
    Ok(matches!(answer, Value::BulkString(word) if word == b"ok"))
}

const ADOPT: &str = "adopt";

/// Takes the partition to fill this Redis under `epoch`: no script writes until it is opened. `false` if it is under that epoch or a later one
/// already.
pub async fn fence(connection: &mut Connection, epoch: u64) -> Result<bool, Error> {
    fence_as(connection, epoch, "rebuild").await
}

/// The same to fill Postgres from this Redis, which nobody else fills until a person has said so.
pub async fn fence_to_adopt(connection: &mut Connection, epoch: u64) -> Result<bool, Error> {
    fence_as(connection, epoch, ADOPT).await
}

async fn fence_as(connection: &mut Connection, epoch: u64, state: &str) -> Result<bool, Error> {
    let answer = connection.run(&script::FENCE, &[keys::META], &[epoch.to_string().as_bytes(), state.as_bytes()]).await?;
    Ok(matches!(answer, Value::BulkString(word) if word == b"ok"))
}

/// Opens a partition that was filled anew under `epoch` to the process at the other end: `applied` is what it was filled with, `last_op` the
/// op there, `mark` up to where it has the inbox. `false` if it is no longer being filled under this epoch.
pub async fn open(connection: &mut Connection, epoch: u64, applied: Position, last_op: &str, mark: InboxMark) -> Result<bool, Error> {
    let (epoch, n, id, mark) = (epoch.to_string(), applied.n.to_string(), applied.to_string(), mark.to_string());
    let run_id = connection.run_id().to_owned();
    let args = [epoch.as_bytes(), run_id.as_bytes(), n.as_bytes(), last_op.as_bytes(), id.as_bytes(), mark.as_bytes()];
    let answer = connection.run(&script::OPEN, &[keys::META, keys::OUTBOX], &args).await?;
    Ok(matches!(answer, Value::BulkString(word) if word == b"ok"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::RedisServer;

    #[tokio::test]
    async fn a_partition_is_opened_by_one_of_several() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        assert_eq!(Look::at(&mut connection, Position::default()).await.unwrap(), Look::default());
        assert!(attach(&mut connection, None, 1).await.unwrap());
        assert!(!attach(&mut connection, None, 1).await.unwrap(), "there is a meta now");
        let meta = Look::at(&mut connection, Position::default()).await.unwrap().meta.unwrap();
        assert_eq!(meta, Meta { epoch: 1, run_id: connection.run_id().into(), live: true, adopted: false, n: 0, last: "-".into() });
        assert!(attach(&mut connection, Some(&meta), 2).await.unwrap());
        assert!(!attach(&mut connection, Some(&meta), 3).await.unwrap(), "the epoch has moved");
    }
}
