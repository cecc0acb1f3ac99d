//! The HTTP endpoints: `/livez`, `/readyz`, `/metrics`. They only read, and show no secrets and nothing that clients sent.

use std::future::IntoFuture as _;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::histogram::Handle;
use crate::tls::Certificates;

/// How long answers that are being written may go on after a shutdown began. A scraper that reads slowly is no reason to stay.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// How long a server may take to say that it is ready. Below the second that orchestrators commonly grant a probe.
const PROBE_TIMEOUT: Duration = Duration::from_millis(900);

/// How long a client may take to agree on keys, and how many may do so at a time.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
const HANDSHAKES_MAX: usize = 64;

/// The pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The longest answer of `/readyz` that a probe reads.
const PROBE_BYTES_MAX: u64 = 64 * 1024;

/// One thing that readiness depends on.
#[derive(Clone, Debug)]
pub struct Check {
    /// What is checked: `redis`, `postgres`.
    pub name: &'static str,
    /// Whether it is as it should be.
    pub ok: bool,
    /// Whether the server can do its work without: then it is ready although this is not ok.
    pub optional: bool,
    /// What was found, in a line.
    pub detail: String,
}

/// Whether clients should be sent here.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// Whether the process does anything at all; if not, only a restart helps.
    pub alive: bool,
    /// Everything it depends on.
    pub checks: Vec<Check>,
}

impl Readiness {
    /// Whether everything that is needed is ok.
    pub fn is_ready(&self) -> bool {
        self.checks.iter().all(|check| check.ok || check.optional)
    }

    /// In lines: whether it is ready, then each check, only those that are not ok unless `verbose`.
    fn describe(&self, verbose: bool) -> String {
        let mut text = String::from(if self.is_ready() { "ready\n" } else { "not ready\n" });
        for Check { name, ok, optional, detail } in &self.checks {
            let word = match (ok, optional) {
                (true, _) if !verbose => continue,
                (true, _) => "ok",
                (false, true) => "degraded",
                (false, false) => "failed",
            };
            text.push_str(&format!("{name} {word}: {detail}\n"));
        }
        text
    }
}

/// Tells how ready the server is at this moment. Asked with every `/readyz`, so it looks at what is known and waits for nothing.
pub type ReadinessSource = Arc<dyn Fn() -> Readiness + Send + Sync>;

/// Listens, or says what to do about it.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let advice = "stop what listens there, or choose another address with --http-listen (HOLDFAST_HTTP_LISTEN)";
        io::Error::new(error.kind(), format!("cannot serve HTTP on {address}: {error}; {advice}"))
    })
}

/// Serves, through TLS where there are certificates, until `shutdown` is cancelled.
pub async fn serve(
    listener: TcpListener,
    certificates: Option<Arc<Certificates>>,
    metrics: Handle,
    readiness: ReadinessSource,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let router = router(metrics, readiness);
    let stop = shutdown.clone().cancelled_owned();
    let serving: Pin<Box<dyn Future<Output = io::Result<()>> + Send>> = match certificates {
        None => Box::pin(axum::serve(listener, router).with_graceful_shutdown(stop).into_future()),
        Some(certificates) => {
            let secure = Secure::new(listener, certificates, shutdown.clone())?;
            Box::pin(axum::serve(secure, router).with_graceful_shutdown(stop).into_future())
        }
    };
    tokio::select! {
        result = serving => result,
        () = async { shutdown.cancelled().await; tokio::time::sleep(DRAIN_MAX).await } => Ok(()),
    }
}

/// Connections that have agreed on keys. Each does so in its own time, and holds up no other.
struct Secure {
    address: SocketAddr,
    accepted: mpsc::Receiver<(TlsStream<tokio::net::TcpStream>, SocketAddr)>,
}

impl Secure {
    fn new(listener: TcpListener, certificates: Arc<Certificates>, shutdown: CancellationToken) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (sender, accepted) = mpsc::channel(1);
        let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let accepting = async move {
            while let Ok(place) = Arc::clone(&places).acquire_owned().await {
                let (stream, address) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(_) => {
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                };
                let (acceptor, sender) = (TlsAcceptor::from(certificates.current()), sender.clone());
                tokio::spawn(async move {
                    if let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await {
                        _ = sender.send((stream, address)).await;
                    }
                    drop(place);
                });
            }
        };
        tokio::spawn(shutdown.run_until_cancelled_owned(accepting));
        Ok(Self { address, accepted })
    }
}

impl axum::serve::Listener for Secure {
    type Io = TlsStream<tokio::net::TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.accepted.recv().await {
            Some(accepted) => accepted,
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

fn router(metrics: Handle, readiness: ReadinessSource) -> Router {
    let text = |content_type: &'static str, body: String| ([(header::CONTENT_TYPE, content_type)], body);
    Router::new()
        .route(
            "/livez",
            get(|State(readiness): State<ReadinessSource>| async move {
                match readiness().alive {
                    true => (StatusCode::OK, "alive\n"),
                    false => (StatusCode::INTERNAL_SERVER_ERROR, "the thread that serves clients hangs\n"),
                }
            }),
        )
        .route(
            "/readyz",
            get(|State(readiness): State<ReadinessSource>, RawQuery(query): RawQuery| async move {
                let verbose = query.is_some_and(|query| query.split('&').any(|part| part == "verbose" || part.starts_with("verbose=")));
                let readiness = readiness();
                let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                (status, readiness.describe(verbose)).into_response()
            }),
        )
        .route("/metrics", get(move || async move { text("text/plain; version=0.0.4; charset=utf-8", metrics.render()) }))
        .with_state(readiness)
}

/// Asks the server that listens there whether it is ready, through TLS where `tls` is given. Errors with what it lacks, or with why it does
/// not say.
pub fn probe(listen: SocketAddr, tls: Option<Arc<ClientConfig>>) -> io::Result<String> {
    let mut address = listen;
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { IpAddr::V6(Ipv6Addr::LOCALHOST) });
    }
    let scheme = if tls.is_some() { "https" } else { "http" };
    let unanswered = |error: io::Error| io::Error::new(error.kind(), format!("no answer from {scheme}://{address}/readyz: {error}"));
    let answer = ask(address, tls).map_err(unanswered)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) == Some("200") { Ok(body.trim_end().into()) } else { Err(io::Error::other(body.trim_end().to_owned())) }
}

fn ask(address: SocketAddr, tls: Option<Arc<ClientConfig>>) -> io::Result<String> {
    let stream = TcpStream::connect_timeout(&address, PROBE_TIMEOUT)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    stream.set_write_timeout(Some(PROBE_TIMEOUT))?;
    match tls {
        None => converse(stream, address),
        Some(config) => {
            let session = ClientConnection::new(config, address.ip().into()).map_err(io::Error::other)?;
            converse(StreamOwned::new(session, stream), address)
        }
    }
}

fn converse(mut stream: impl io::Read + io::Write, address: SocketAddr) -> io::Result<String> {
    write!(stream, "GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    match stream.take(PROBE_BYTES_MAX).read_to_string(&mut answer) {
        // A peer need not say through TLS that it closes; what it said before is whole by its own length.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && !answer.is_empty() => Ok(answer),
        result => result.map(|_| answer),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    async fn get(address: SocketAddr, path: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_endpoints_tell_how_the_server_is() {
        let redis = Arc::new(AtomicBool::new(true));
        let source: ReadinessSource = {
            let redis = Arc::clone(&redis);
            Arc::new(move || Readiness {
                alive: redis.load(Ordering::Relaxed),
                checks: vec![
                    Check { name: "redis", ok: redis.load(Ordering::Relaxed), optional: false, detail: "redis.url".into() },
                    Check { name: "postgres", ok: false, optional: true, detail: "3 s behind".into() },
                ],
            })
        };
        let metrics = crate::telemetry::metrics::install().unwrap();
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(serve(listener, None, metrics, source, shutdown.clone()));

        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/readyz").await.ends_with("ready\npostgres degraded: 3 s behind\n"));
        assert!(get(address, "/readyz?verbose").await.ends_with("ready\nredis ok: redis.url\npostgres degraded: 3 s behind\n"));
        assert!(get(address, "/metrics").await.contains("text/plain; version=0.0.4"));
        assert!(get(address, "/nowhere").await.starts_with("HTTP/1.1 404"));
        let probed = tokio::task::spawn_blocking(move || probe(address, None)).await.unwrap();
        assert_eq!(probed.unwrap(), "ready\npostgres degraded: 3 s behind");

        redis.store(false, Ordering::Relaxed);
        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 500"));
        let answer = get(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("not ready\nredis failed: redis.url"), "{answer}");
        let probed = tokio::task::spawn_blocking(move || probe(address, None)).await.unwrap();
        assert!(probed.unwrap_err().to_string().starts_with("not ready"));

        // An idle client must not hold up the end.
        let _idle = tokio::net::TcpStream::connect(address).await.unwrap();
        shutdown.cancel();
        server.await.unwrap().unwrap();
        let probed = tokio::task::spawn_blocking(move || probe(address, None)).await.unwrap();
        assert!(probed.unwrap_err().to_string().starts_with("no answer from http://127.0.0.1:"));
    }
}
