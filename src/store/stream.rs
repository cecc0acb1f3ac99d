//! The outbox, as the relay and the verifier read it.

use std::time::Duration;

use redis::{Cmd, Value};

use super::connection::{Connection, Error};
use super::keys;
use crate::domain::Position;
use crate::domain::change::Entry;
use crate::limits::OUTBOX_ANSWER_TIMEOUT;

/// What one read found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// In the order of the stream.
    pub entries: Vec<Entry>,
    /// How many bytes their fields take, as they were read.
    pub bytes: usize,
}

/// Reads and trims the outbox over a connection of its own, because a read may block. Like [`Connection`] it never reconnects: after an
/// [`Error::Connection`] it is to be replaced.
pub struct OutboxReader {
    connection: Connection,
}

impl OutboxReader {
    /// Connects. Errors as [`Connection::open`] does.
    pub async fn open(url: &str) -> Result<Self, Error> {
        Ok(Self { connection: Connection::open(url).await? })
    }

    /// The run id of the Redis process that it reads from.
    pub fn run_id(&self) -> &str {
        self.connection.run_id()
    }

    /// The entry with exactly this id; `None` where there is none.
    pub async fn entry_at(&mut self, position: Position) -> Result<Option<Entry>, Error> {
        let id = position.to_string();
        let reply = self.ask(redis::cmd("XRANGE").arg(keys::OUTBOX).arg(&id).arg(&id), Duration::ZERO).await?;
        Ok(read(reply)?.entries.pop())
    }

    /// The entries after `position`, at most `entries_max`. Waits up to `block` for the first of them, which is returned as soon as it is
    /// there; zero does not wait. Cancelling it loses nothing. Stops before an entry that cannot be
    /// read; if that is the first, it is an [`Error::Unexpected`] that names it.
    pub async fn read_after(&mut self, position: Position, entries_max: usize, block: Duration) -> Result<Read, Error> {
        let mut command = redis::cmd("XREAD");
        command.arg("COUNT").arg(entries_max);
        if !block.is_zero() {
            command.arg("BLOCK").arg(u64::try_from(block.as_millis().max(1)).unwrap_or(u64::MAX));
        }
        command.arg("STREAMS").arg(keys::OUTBOX).arg(position.to_string());
        match self.ask(&command, block).await? {
            Value::Nil => Ok(Read::default()),
            // One stream was asked for: a map of one pair, in RESP2 an array of one pair.
            Value::Map(mut streams) if streams.len() == 1 => {
                streams.pop().map_or_else(|| Ok(Read::default()), |(_, entries)| read(entries))
            }
            Value::Array(mut streams) if streams.len() == 1 => match streams.pop() {
                Some(Value::Array(mut pair)) if pair.len() == 2 => read(pair.pop().unwrap_or(Value::Nil)),
                other => unexpected(format!("XREAD: {other:?}")),
            },
            other => unexpected(format!("XREAD: {other:?}")),
        }
    }

    /// The id of the newest entry; `None` where the outbox is empty.
    pub async fn last(&mut self) -> Result<Option<Position>, Error> {
        let reply = self.ask(redis::cmd("XREVRANGE").arg(keys::OUTBOX).arg("+").arg("-").arg("COUNT").arg(1), Duration::ZERO).await?;
        Ok(read(reply)?.entries.pop().map(|entry| entry.last))
    }

    /// How many entries the outbox holds.
    pub async fn length(&mut self) -> Result<u64, Error> {
        self.number(redis::cmd("XLEN").arg(keys::OUTBOX)).await
    }

    /// How many bytes of Redis's memory the outbox takes. Every node is looked at, which takes Redis some 0.06 ms for each thousand of them.
    pub async fn exact_memory(&mut self) -> Result<u64, Error> {
        self.number(redis::cmd("MEMORY").arg("USAGE").arg(keys::OUTBOX).arg("SAMPLES").arg(0)).await
    }

    /// About how many bytes of Redis's memory the outbox takes, judged by its oldest entries: where later ones are smaller, too much.
    pub async fn memory(&mut self) -> Result<u64, Error> {
        self.number(redis::cmd("MEMORY").arg("USAGE").arg(keys::OUTBOX)).await
    }

    /// Removes every entry before `min`, and returns how many there were.
    pub async fn trim(&mut self, min: Position) -> Result<u64, Error> {
        self.number(redis::cmd("XTRIM").arg(keys::OUTBOX).arg("MINID").arg("=").arg(min.to_string())).await
    }

    async fn number(&mut self, command: &Cmd) -> Result<u64, Error> {
        match self.ask(command, Duration::ZERO).await? {
            Value::Int(number) => Ok(u64::try_from(number).unwrap_or_default()),
            Value::Nil => Ok(0),
            other => unexpected(format!("a number was asked for: {other:?}")),
        }
    }

    async fn ask(&mut self, command: &Cmd, block: Duration) -> Result<Value, Error> {
        match tokio::time::timeout(block + OUTBOX_ANSWER_TIMEOUT, self.connection.send(command)).await {
            Ok(reply) => reply,
            Err(_) => Err(Error::Connection(std::io::Error::from(std::io::ErrorKind::TimedOut).into())),
        }
    }
}

/// Reads one entry as a script returns it: `[id, [name, value, ...]]`.
pub fn entry(value: Value) -> Result<Entry, Error> {
    let read = read(Value::Array(vec![value]))?;
    read.entries.into_iter().next().ok_or_else(|| Error::Unexpected("an entry of the outbox was asked for".into()))
}

fn unexpected<T>(what: String) -> Result<T, Error> {
    Err(Error::Unexpected(what))
}

/// Reads the answer of XRANGE: an array of `[id, [name, value, ...]]`.
fn read(reply: Value) -> Result<Read, Error> {
    let Value::Array(entries) = reply else {
        return unexpected(format!("entries of the outbox were asked for: {reply:?}"));
    };
    let mut found = Read { entries: Vec::with_capacity(entries.len()), bytes: 0 };
    for entry in &entries {
        let Value::Array(entry) = entry else { return unexpected(format!("an entry of the outbox: {entry:?}")) };
        let [Value::BulkString(id), Value::Array(fields)] = entry.as_slice() else {
            return unexpected(format!("an entry of the outbox: {entry:?}"));
        };
        let fields: Vec<&[u8]> =
            fields.iter().filter_map(|field| if let Value::BulkString(bytes) = field { Some(bytes.as_slice()) } else { None }).collect();
        found.bytes += id.len() + fields.iter().map(|field| field.len()).sum::<usize>();
        let pairs = fields.chunks_exact(2).map(|pair| (pair[0], pair[1]));
        match Entry::decode(id, pairs) {
            Ok(entry) => found.entries.push(entry),
            // What stands before it is returned; the next read begins with it.
            Err(_) if !found.entries.is_empty() => break,
            Err(error) => {
                return unexpected(format!(
                    "entry {} of {}: {error}; the entries after it wait",
                    String::from_utf8_lossy(id),
                    keys::OUTBOX
                ));
            }
        }
    }
    Ok(found)
}

/// Writes to the outbox by hand, as the scripts would.
#[cfg(test)]
pub mod testing {
    use super::{Connection, keys};

    /// Appends one entry.
    pub async fn append(connection: &mut Connection, id: &str, first: u64, prev: &str, op: &str, changes: &str) {
        let mut command = redis::cmd("XADD");
        command.arg(keys::OUTBOX).arg(id).arg("first").arg(first).arg("prev").arg(prev).arg("op").arg(op);
        command.arg("at").arg(1_700_000_000_123_u64).arg("changes").arg(changes);
        connection.send(&command).await.unwrap();
    }

    /// Sends any command.
    pub async fn send(connection: &mut Connection, words: &[&str]) {
        let mut command = redis::cmd(words[0]);
        words[1..].iter().for_each(|word| {
            command.arg(word);
        });
        connection.send(&command).await.unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{append, send};
    use super::*;
    use crate::ledger::testing::RedisServer;

    const NO_WAIT: Duration = Duration::ZERO;

    #[tokio::test]
    async fn the_outbox_is_read_and_trimmed_by_position() {
        let server = RedisServer::start();
        let mut writer = Connection::open(&server.url()).await.unwrap();
        for url in [server.url(), format!("{}?protocol=resp3", server.url())] {
            send(&mut writer, &["DEL", keys::OUTBOX]).await;
            let mut reader = OutboxReader::open(&url).await.unwrap();
            assert_eq!((reader.last().await.unwrap(), reader.length().await.unwrap(), reader.memory().await.unwrap()), (None, 0, 0));
            assert_eq!(reader.read_after(Position::default(), 10, NO_WAIT).await.unwrap(), Read::default());
            assert_eq!(reader.read_after(Position::default(), 10, Duration::from_millis(5)).await.unwrap(), Read::default());
            append(&mut writer, "1-2", 1, "-", "i:stock:1", "0 set | a 5 5\n1 decr | a -1 4").await;
            append(&mut writer, "1-3", 3, "i:stock:1", "i:stock:2", "0 decr | a -1 3").await;
            append(&mut writer, "2-4", 4, "i:stock:2", "j:stock:1", "0 decr | a -1 2").await;
            let all = reader.read_after(Position::default(), 10, NO_WAIT).await.unwrap();
            assert_eq!(all.entries.iter().map(|entry| entry.last.to_string()).collect::<Vec<_>>(), ["1-2", "1-3", "2-4"]);
            assert!(all.bytes > 100);
            assert_eq!(reader.read_after(Position::new(1, 3), 10, Duration::from_secs(1)).await.unwrap().entries[0].op, "j:stock:1");
            assert_eq!(reader.read_after(Position::default(), 1, NO_WAIT).await.unwrap().entries.len(), 1);
            assert_eq!(reader.entry_at(Position::new(1, 3)).await.unwrap().unwrap().op, "i:stock:2");
            assert_eq!(reader.entry_at(Position::new(1, 1)).await.unwrap(), None);
            assert_eq!(reader.last().await.unwrap(), Some(Position::new(2, 4)));
            assert!(reader.memory().await.unwrap() > 0 && reader.exact_memory().await.unwrap() > 0);
            assert_eq!(reader.trim(Position::new(1, 3)).await.unwrap(), 1);
            assert_eq!(reader.length().await.unwrap(), 2);
        }
    }

    #[tokio::test]
    async fn an_entry_that_cannot_be_read_is_named() {
        let server = RedisServer::start();
        let mut reader = OutboxReader::open(&server.url()).await.unwrap();
        append(&mut reader.connection, "1-1", 1, "-", "i:stock:1", "nonsense").await;
        let error = reader.read_after(Position::default(), 10, NO_WAIT).await.unwrap_err();
        assert!(error.to_string().contains("entry 1-1 of holdfast:outbox"), "{error}");
        send(&mut reader.connection, &["XADD", keys::OUTBOX, "1-2", "first", "2"]).await;
        let error = reader.entry_at(Position::new(1, 2)).await.unwrap_err();
        assert!(error.to_string().contains("1-2"), "{error}");
    }
}
