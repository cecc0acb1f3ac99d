//! What `holdfast:meta` says of a partition, and opening it under a new epoch.

use redis::Value;

use super::script;
use super::words::Words;
use super::{Connection, Error, keys};

/// A partition as Redis has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    pub epoch: u64,
    /// The run id of the Redis process that was verified last.
    pub run_id: String,
    /// Whether scripts may write.
    pub live: bool,
    /// n of the newest change.
    pub n: u64,
    /// The op of the newest entry, `-` before the first.
    pub last: String,
}

impl Meta {
    /// Reads it; `None` where this Redis has none.
    pub async fn read(connection: &mut Connection) -> Result<Option<Self>, Error> {
        let mut command = redis::cmd("HMGET");
        command.arg(keys::META).arg(&["epoch", "run", "state", "n", "last"]);
        let mut words = Words::new(connection.send(&command).await?)?;
        let number = |integer: Option<i64>| integer.map(|integer| u64::try_from(integer).unwrap_or(0));
        let Some(epoch) = number(words.maybe_integer()?) else { return Ok(None) };
        let (run_id, state) = (words.maybe_text()?.unwrap_or_default(), words.maybe_text()?);
        let n = number(words.maybe_integer()?).unwrap_or(0);
        Ok(Some(Self { epoch, run_id, live: state.as_deref() == Some("live"), n, last: words.maybe_text()?.unwrap_or_default() }))
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::RedisServer;

    #[tokio::test]
    async fn a_partition_is_opened_by_one_of_several() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        assert_eq!(Meta::read(&mut connection).await.unwrap(), None);
        assert!(attach(&mut connection, None, 1).await.unwrap());
        assert!(!attach(&mut connection, None, 1).await.unwrap(), "there is a meta now");
        let meta = Meta::read(&mut connection).await.unwrap().unwrap();
        assert_eq!(meta, Meta { epoch: 1, run_id: connection.run_id().into(), live: true, n: 0, last: "-".into() });
        assert!(attach(&mut connection, Some(&meta), 2).await.unwrap());
        assert!(!attach(&mut connection, Some(&meta), 3).await.unwrap(), "the epoch has moved");
    }
}
