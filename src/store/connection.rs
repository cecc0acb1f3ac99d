//! One TCP connection to the backing Redis, and which Redis process is at its other end.
//!
//! A connection never reconnects by itself: the run id that a script is guarded with is that of the process this very
//! connection reaches. Whoever owns one replaces it when it breaks and shakes hands again.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, PushInfo,
    PushKind, ServerErrorKind, TlsCertificates, Value,
};
use url::Url;

use super::metered::{self, Budget, Metered};
use crate::limits::REDIS_SILENCE_MAX;

/// How long a TCP connection and its handshake may take. Below it a slow network would be cut off, above it a dead address holds
/// back the next try.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why something on Redis did not work.
#[derive(Debug)]
pub enum Error {
    /// The connection broke, or never came about: whether a command that was under way ran is not known.
    Connection(redis::RedisError),
    /// Redis answered with an error: the command did not run.
    Refused(redis::RedisError),
    /// Redis answered something that the command cannot answer.
    Unexpected(String),
    /// The address or the server cannot be used; says what to change.
    Unfit(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connection(error) => write!(f, "connection to Redis: {error}"),
            Self::Refused(error) => write!(f, "Redis refused: {error}"),
            Self::Unexpected(what) => write!(f, "unexpected answer of Redis: {what}"),
            Self::Unfit(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

impl From<redis::RedisError> for Error {
    fn from(error: redis::RedisError) -> Self {
        match error.kind() {
            redis::ErrorKind::Server(_) | redis::ErrorKind::Extension => Self::Refused(error),
            redis::ErrorKind::UnexpectedReturnType | redis::ErrorKind::Parse => Self::Unexpected(error.to_string()),
            redis::ErrorKind::InvalidClientConfig => Self::Unfit(error.to_string()),
            _ => Self::Connection(error),
        }
    }
}

impl Error {
    /// The error's first word, for people.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused(error) => error.code().unwrap_or("ERR"),
            _ => "ERR",
        }
    }

    /// Whether Redis refused before a script's first write, so that nothing was changed: it checks all of these before it starts a script
    /// (Redis 7.0.15, script.c). Any other error may have come in the middle of one.
    pub fn is_before_any_write(&self) -> bool {
        let before = ["OOM", "READONLY", "MISCONF", "NOREPLICAS", "LOADING", "MASTERDOWN", "BUSY", "NOAUTH", "NOSCRIPT", "NOPERM"];
        matches!(self, Self::Refused(_)) && before.contains(&self.code())
    }

    /// Whether Redis refused before a script's first write, and may not do so a little later.
    pub fn is_for_now(&self) -> bool {
        matches!(self, Self::Refused(_)) && ["OOM", "MISCONF", "NOREPLICAS", "BUSY"].contains(&self.code())
    }

    /// Whether what stands in Redis is not what belongs there: it cannot be read, or is of another type.
    pub fn is_about_what_is_there(&self) -> bool {
        matches!(self, Self::Unexpected(_)) || self.code() == "WRONGTYPE"
    }

    /// Whether this server is not the one to write to (any more).
    pub fn is_of_the_role(&self) -> bool {
        matches!(self.code(), "READONLY" | "MASTERDOWN")
    }

    /// Whether Redis says that it does not know the script: then it surely did not run.
    pub fn is_no_script(&self) -> bool {
        matches!(self, Self::Refused(error) if error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoScript))
    }
}

/// A connection and the run id of the Redis process behind it.
#[derive(Clone)]
pub struct Connection {
    inner: MultiplexedConnection,
    run_id: String,
    /// What reads and writes its socket, where no task of its own does.
    driver: Option<Driver>,
}

/// Reads and writes a connection's socket, in the very task that sends over it: what is sent goes out at once, and an answer is read before anything
/// else of the thread is looked at.
#[derive(Clone)]
struct Driver(Arc<Mutex<Option<Driving>>>);

type Driving = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Driver {
    fn drive(&self, cx: &mut Context<'_>) {
        let mut driver = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Where the connection has ended, whatever waits for an answer hears of it.
        if driver.as_mut().is_some_and(|driver| driver.as_mut().poll(cx).is_ready()) {
            *driver = None;
        }
    }
}

impl Connection {
    /// Connects and shakes hands: learns the run id and checks that this Redis can be trusted with stock. Errors with
    /// [`Error::Unfit`] and what to change where it cannot.
    pub async fn open(url: &str) -> Result<Self, Error> {
        let (url, certificates) = with_certificates(url)?;
        Self::open_with(url.into_connection_info()?, certificates, AsyncConnectionConfig::new()).await
    }

    /// The same for a connection that subscribes: `told` is called with the channel of each message, and with none when the connection ends.
    /// It must not wait.
    pub async fn open_listening(url: &str, told: impl Fn(Option<&[u8]>) + Send + Sync + 'static) -> Result<Self, Error> {
        let (url, certificates) = with_certificates(url)?;
        let info = url.into_connection_info()?;
        // Only there may one connection subscribe and send other commands.
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let pushed = move |push: PushInfo| -> Result<(), std::convert::Infallible> {
            match (push.kind, push.data.first()) {
                (PushKind::Message, Some(Value::BulkString(channel))) => told(Some(channel)),
                (PushKind::Disconnection, _) => told(None),
                _ => {}
            }
            Ok(())
        };
        Self::open_with(info.set_redis_settings(settings), certificates, AsyncConnectionConfig::new().set_push_sender(pushed)).await
    }

    /// The same for one over which one task sends, one command after the other, which drives it itself.
    pub async fn open_driven(url: &str) -> Result<Self, Error> {
        let (certain, certificates) = with_certificates(url)?;
        let info = certain.into_connection_info()?;
        if !matches!(info.addr(), ConnectionAddr::Tcp(..) | ConnectionAddr::TcpTls { insecure: false, .. }) {
            return Self::open(url).await;
        }
        let opening = async {
            let stream = metered::dial(info.addr(), certificates).await?;
            let config = AsyncConnectionConfig::new().set_response_timeout(None);
            let (inner, driver) = MultiplexedConnection::new_with_config(info.redis_settings(), stream, config).await?;
            let driver = Some(Driver(Arc::new(Mutex::new(Some(Box::pin(driver))))));
            let mut connection = Self { inner, run_id: String::new(), driver };
            connection.shake_hands().await?;
            Ok(connection)
        };
        within_connect_timeout(opening).await
    }

    /// The same for one of which only as much is read as `budget` grants: then it ends.
    pub async fn open_metered(url: &str, budget: &Arc<Budget>) -> Result<Self, Error> {
        let (url, certificates) = with_certificates(url)?;
        let info = url.into_connection_info()?;
        let opening = async {
            let stream = Metered::connect(info.addr(), certificates, Arc::clone(budget)).await?;
            let config = AsyncConnectionConfig::new().set_response_timeout(None);
            let (inner, driver) = MultiplexedConnection::new_with_config(info.redis_settings(), stream, config).await?;
            // Ends with the last of its handles.
            tokio::spawn(driver);
            let mut connection = Self { inner, run_id: String::new(), driver: None };
            connection.shake_hands().await?;
            Ok(connection)
        };
        within_connect_timeout(opening).await
    }

    async fn open_with(info: ConnectionInfo, certificates: Option<TlsCertificates>, config: AsyncConnectionConfig) -> Result<Self, Error> {
        let tcp = info.tcp_settings().clone().set_nodelay(true).set_user_timeout(REDIS_SILENCE_MAX);
        let info = info.set_tcp_settings(tcp);
        let client = match certificates {
            None => Client::open(info)?,
            Some(certificates) => Client::build_with_tls(info, certificates)?,
        };
        let config = config
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            // A time-out never closes a connection: each caller has its own deadline, and a reply that comes late is still read.
            .set_response_timeout(None);
        let opening = async {
            let inner = client.get_multiplexed_async_connection_with_config(&config).await?;
            let mut connection = Self { inner, run_id: String::new(), driver: None };
            connection.shake_hands().await?;
            Ok(connection)
        };
        within_connect_timeout(opening).await
    }

    /// The run id of the process at the other end.
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// Sends one command and returns its answer.
    pub async fn send(&mut self, command: &redis::Cmd) -> Result<Value, Error> {
        let Some(driver) = &self.driver else {
            return Ok(self.inner.send_packed_command(command).await?.extract_error()?);
        };
        let mut answer = pin!(self.inner.send_packed_command(command));
        let answer = poll_fn(|cx| {
            if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                return Poll::Ready(answer);
            }
            driver.drive(cx);
            answer.as_mut().poll(cx)
        });
        Ok(answer.await?.extract_error()?)
    }

    /// Hears of these channels from now on. Only on a connection that listens.
    pub async fn subscribe(&mut self, channels: &[String]) -> Result<(), Error> {
        Ok(self.inner.subscribe(channels).await?)
    }

    /// No longer hears of these.
    pub async fn unsubscribe(&mut self, channels: &[String]) -> Result<(), Error> {
        Ok(self.inner.unsubscribe(channels).await?)
    }

    /// Redis's clock in Unix ms.
    pub async fn time_ms(&mut self) -> Result<i64, Error> {
        let (seconds, micros): (i64, i64) =
            redis::from_redis_value(self.send(&redis::cmd("TIME")).await?).map_err(redis::RedisError::from)?;
        Ok(seconds * 1000 + micros / 1000)
    }

    async fn shake_hands(&mut self) -> Result<(), Error> {
        let text =
            |value: Value| -> Result<String, Error> { Ok(redis::from_redis_value::<String>(value).map_err(redis::RedisError::from)?) };
        let info = text(self.send(redis::cmd("INFO").arg("server").arg("replication")).await?)?;
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        if field("role").is_some_and(|role| role != "master") {
            return Err(Error::Unfit("this Redis is a replica: give redis.url the address of the master".into()));
        }
        if field("redis_mode").is_some_and(|mode| mode == "cluster") {
            return Err(Error::Unfit(
                "this Redis is a node of a Cluster, which this version cannot use: give redis.url a standalone Redis".into(),
            ));
        }
        let version = field("redis_version").unwrap_or("0");
        let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok()).unwrap_or(0);
        if major < 7 {
            return Err(Error::Unfit(format!("Redis {version} is too old: Holdfast needs Redis 7.0 or later, or Valkey")));
        }
        self.run_id = field("run_id").ok_or_else(|| Error::Unexpected("INFO server has no run_id".into()))?.to_owned();
        for (setting, bad, advice) in [
            (
                "maxmemory-policy",
                None,
                "set maxmemory-policy noeviction: every other policy throws away locks and request ids to make room",
            ),
            (
                "no-appendfsync-on-rewrite",
                Some("yes"),
                "set no-appendfsync-on-rewrite no: with yes nothing is synced while the AOF is rewritten",
            ),
        ] {
            // Managed services may hide CONFIG; what cannot be read cannot be refused.
            let Ok(reply) = self.send(redis::cmd("CONFIG").arg("GET").arg(setting)).await else { continue };
            let Ok(pairs) = redis::from_redis_value::<Vec<String>>(reply) else { continue };
            let Some(value) = pairs.get(1) else { continue };
            if bad.map_or(value != "noeviction", |bad| value == bad) {
                return Err(Error::Unfit(format!("this Redis has {setting} {value}: {advice}")));
            }
        }
        Ok(())
    }
}

async fn within_connect_timeout<T>(opening: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(CONNECT_TIMEOUT, opening).await {
        Ok(opened) => opened,
        Err(_) => Err(Error::Connection(std::io::Error::from(std::io::ErrorKind::TimedOut).into())),
    }
}

/// Takes the files of certificates out of an address, under the names that Postgres's addresses have for them: `sslrootcert` (who signs the
/// server's, in place of the machine's own list), `sslcert` and `sslkey` (what the server is shown). Read for each connection, so new ones are
/// taken over by themselves.
fn with_certificates(url: &str) -> Result<(String, Option<TlsCertificates>), Error> {
    let Ok(mut parsed) = Url::parse(url) else { return Ok((url.to_owned(), None)) };
    let unfit = |why: String| Error::Unfit(format!("redis.url: {why}"));
    let mut files = [("sslrootcert", None), ("sslcert", None), ("sslkey", None)];
    let mut rest = Vec::new();
    for (name, value) in parsed.query_pairs() {
        match files.iter_mut().find(|(known, _)| *known == name) {
            Some((_, path)) => *path = Some(value.into_owned()),
            None => rest.push((name.into_owned(), value.into_owned())),
        }
    }
    if files.iter().all(|(_, path)| path.is_none()) {
        return Ok((url.to_owned(), None));
    }
    if parsed.scheme() != "rediss" {
        return Err(unfit("certificates need the scheme rediss://".into()));
    }
    parsed.set_query(None);
    if !rest.is_empty() {
        parsed.query_pairs_mut().extend_pairs(rest);
    }
    let read = |path: &Option<String>| {
        path.as_ref().map(|path| std::fs::read(path).map_err(|why| unfit(format!("{path} cannot be read: {why}")))).transpose()
    };
    let [(_, root), (_, cert), (_, key)] = &files;
    let client_tls = match (read(cert)?, read(key)?) {
        (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig { client_cert, client_key }),
        (None, None) => None,
        _ => return Err(unfit("sslcert and sslkey belong together".into())),
    };
    Ok((parsed.into(), Some(TlsCertificates { client_tls, root_cert: read(root)? })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::RedisServer;

    #[test]
    fn certificates_are_named_in_the_address_as_in_postgres() {
        let read = |url: &str| with_certificates(url).map_err(|error| error.to_string());
        assert!(matches!(read("redis://h:1/0?protocol=resp3"), Ok((url, None)) if url == "redis://h:1/0?protocol=resp3"));
        assert!(read("redis://h:1?sslrootcert=/x").unwrap_err().contains("certificates need the scheme rediss://"));
        assert!(read("rediss://h:1?sslrootcert=/nonexistent").unwrap_err().contains("/nonexistent cannot be read"));
        assert!(read("rediss://h:1?sslcert=Cargo.toml").unwrap_err().contains("sslcert and sslkey belong together"));
        let (url, certificates) = read("rediss://a:b@h:1/0?sslrootcert=Cargo.toml&protocol=resp3").unwrap();
        assert_eq!(url, "rediss://a:b@h:1/0?protocol=resp3");
        assert!(certificates.is_some_and(|certificates| certificates.root_cert.is_some() && certificates.client_tls.is_none()));
    }

    async fn refusal(server: &RedisServer) -> String {
        match Connection::open(&server.url()).await {
            Err(Error::Unfit(why)) => why,
            other => panic!("{:?}", other.map(|connection| connection.run_id)),
        }
    }

    #[tokio::test]
    async fn a_redis_that_would_lose_data_is_refused_with_what_to_change() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        let mut set = async |words: [&str; 2], command: &[&str]| {
            let mut command = command.iter().fold(redis::cmd(command[0]), |mut all, word| {
                if *word != command[0] {
                    all.arg(*word);
                }
                all
            });
            words.iter().for_each(|word| _ = command.arg(*word));
            connection.send(&command).await.unwrap();
        };
        for policy in ["allkeys-lru", "volatile-lru", "volatile-ttl"] {
            set(["maxmemory-policy", policy], &["CONFIG", "SET"]).await;
            let why = refusal(&server).await;
            assert!(why.contains(policy) && why.contains("set maxmemory-policy noeviction"), "{why}");
        }
        set(["maxmemory-policy", "noeviction"], &["CONFIG", "SET"]).await;
        set(["no-appendfsync-on-rewrite", "yes"], &["CONFIG", "SET"]).await;
        assert!(refusal(&server).await.contains("set no-appendfsync-on-rewrite no"));
        set(["no-appendfsync-on-rewrite", "no"], &["CONFIG", "SET"]).await;
        set(["127.0.0.1", "1"], &["REPLICAOF"]).await;
        assert!(refusal(&server).await.contains("give redis.url the address of the master"));
        set(["NO", "ONE"], &["REPLICAOF"]).await;
        assert!(Connection::open(&server.url()).await.is_ok());
    }
}
