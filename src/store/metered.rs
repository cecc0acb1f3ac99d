//! A connection to Redis of which only so much is read. The redis crate reads an answer whole, however long it is; where a person asks what they
//! like, nobody knows how long that is before it comes.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use redis::{ConnectionAddr, TlsCertificates};
use rustix::net::sockopt;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::Error;
use crate::limits::REDIS_SILENCE_MAX;

/// How many bytes may still be read. Shared by who grants them and the connection.
#[derive(Debug)]
pub struct Budget(AtomicUsize);

impl Budget {
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(bytes)))
    }

    /// From now on so many.
    pub fn grant(&self, bytes: usize) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    /// Whether more came than that.
    pub fn is_spent(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    fn spend(&self, bytes: usize) -> io::Result<()> {
        let left = self.0.load(Ordering::Relaxed).saturating_sub(bytes);
        self.0.store(left, Ordering::Relaxed);
        if left == 0 { Err(io::Error::other("more came than may be read")) } else { Ok(()) }
    }
}

/// What a connection is made of.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Duplex for S {}

/// See the module. Ends with an error once the budget is spent.
pub struct Metered {
    stream: Box<dyn Duplex>,
    budget: Arc<Budget>,
}

impl Metered {
    /// Connects to an address. Errors where that cannot be done, or is not offered here.
    pub async fn connect(address: &ConnectionAddr, certificates: Option<TlsCertificates>, budget: Arc<Budget>) -> Result<Self, Error> {
        Ok(Self { stream: dial(address, certificates).await?, budget })
    }
}

/// Connects over TCP, or over TLS that is checked: to all addresses of a name at once, and the first that answers counts. Errors with
/// [`Error::Unfit`] where the address asks for something else.
pub(super) async fn dial(address: &ConnectionAddr, certificates: Option<TlsCertificates>) -> Result<Box<dyn Duplex>, Error> {
    let broken = |error: io::Error| Error::Connection(error.into());
    let unfit = |why: &dyn std::fmt::Display| Error::Unfit(format!("redis.url: {why}"));
    let (host, port, secure) = match address {
        ConnectionAddr::Tcp(host, port) => (host, *port, None),
        ConnectionAddr::TcpTls { host, port, insecure: false, .. } => {
            let connector = TlsConnector::from(Arc::new(tls(certificates).map_err(|why| unfit(&why))?));
            (host, *port, Some((connector, ServerName::try_from(host.clone()).map_err(|why| unfit(&why))?)))
        }
        _ => return Err(Error::Unfit("redis.url: reading through needs TCP, and TLS that is checked".into())),
    };
    let mut tries = JoinSet::new();
    for address in tokio::net::lookup_host((host.as_str(), port)).await.map_err(broken)? {
        let secure = secure.clone();
        tries.spawn(async move {
            let stream = tcp(address).await?;
            Ok::<Box<dyn Duplex>, io::Error>(match secure {
                Some((connector, name)) => Box::new(connector.connect(name, stream).await?),
                None => Box::new(stream),
            })
        });
    }
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    while let Some(tried) = tries.join_next().await {
        match tried.unwrap_or_else(|panicked| Err(io::Error::other(panicked))) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(broken(failed))
}

/// TCP as the other connections to Redis have it.
async fn tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(&stream, u32::try_from(REDIS_SILENCE_MAX.as_millis()).unwrap_or(u32::MAX))?;
    Ok(stream)
}

/// TLS as the other connections to Redis have it. Errors with what cannot be used.
fn tls(certificates: Option<TlsCertificates>) -> Result<ClientConfig, String> {
    let (own, root) = certificates.map_or((None, None), |certificates| (certificates.client_tls, certificates.root_cert));
    let read = |pem: &[u8]| CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|why| why.to_string());
    let trusted = match root {
        Some(pem) => read(&pem)?,
        None => {
            let found = rustls_native_certs::load_native_certs();
            match found.errors.first() {
                Some(why) if found.certs.is_empty() => return Err(format!("this machine's list of who may sign: {why}")),
                _ => found.certs,
            }
        }
    };
    let mut roots = RootCertStore::empty();
    for certificate in trusted {
        roots.add(certificate).map_err(|why| why.to_string())?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(|why| why.to_string())?;
    let builder = builder.with_root_certificates(roots);
    let Some(own) = own else { return Ok(builder.with_no_client_auth()) };
    let key = PrivateKeyDer::from_pem_slice(&own.client_key).map_err(|why| why.to_string())?;
    builder.with_client_auth_cert(read(&own.client_cert)?, key).map_err(|why| why.to_string())
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        Poll::Ready(self.budget.spend(buffer.filled().len() - before))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_redis_that_says_nothing_is_given_up_by_the_kernel() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = tcp(listener.local_addr().unwrap()).await.unwrap();
        assert_eq!(u128::from(sockopt::tcp_user_timeout(&stream).unwrap()), REDIS_SILENCE_MAX.as_millis());
    }
}
