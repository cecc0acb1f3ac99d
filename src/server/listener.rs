//! Accepts connections, turns away what is too many, and waits for all of them in the end.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::rc::Rc;
use std::sync::Arc;

use rustix::net::sockopt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection;
use super::stream::Stream;
use crate::command::Context;
use crate::limits::{ACCEPT_PAUSE_MAX, ACCEPT_PAUSE_MIN, FILES_BESIDES_CLIENTS, FILES_OF_A_THREAD, KEEPALIVE_EVERY, KEEPALIVE_PROBES};
use crate::session::bounds::Bounds;
use crate::session::client::Session;
use crate::tls::Certificates;

/// Serves clients, through TLS where there are certificates, until `shutdown`, then returns once every connection has finished what it had begun. Runs inside a
/// [`tokio::task::LocalSet`].
pub async fn serve(listener: TcpListener, certificates: Option<Arc<Certificates>>, cx: Rc<Context>, shutdown: CancellationToken) {
    let connections = TaskTracker::new();
    let mut pause = ACCEPT_PAUSE_MIN;
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => {
                pause = ACCEPT_PAUSE_MIN;
                if let Some(connection) = admit(stream, address, certificates.as_deref(), &cx, &shutdown) {
                    connections.spawn_local(connection);
                }
            }
            Err(error) if concerns_one_client(&error) => {}
            Err(error) => {
                tracing::warn!(%error, pause_ms = pause.as_millis(), "cannot accept connections");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(ACCEPT_PAUSE_MAX);
            }
        }
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// Takes as many file descriptors as this process may have: each client needs one, and shells give few.
pub fn allow_files(clients_max: usize, threads: usize) {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    let files = if setrlimit(Resource::Nofile, raised).is_ok() { raised.current } else { limit.current };
    let needed = clients_max as u64 + FILES_BESIDES_CLIENTS + threads as u64 * FILES_OF_A_THREAD;
    if files.is_some_and(|files| files < needed) {
        tracing::warn!(files, needed, "too few open files are allowed for max_clients: raise the limit (ulimit -n, LimitNOFILE)");
    }
}

/// The connection's task; `None` where there are too many.
fn admit(
    stream: TcpStream,
    address: SocketAddr,
    certificates: Option<&Certificates>,
    cx: &Rc<Context>,
    shutdown: &CancellationToken,
) -> Option<impl Future<Output = ()> + use<>> {
    // Both fail only on a connection that is gone already.
    let local = stream.local_addr().ok()?;
    stream.set_nodelay(true).ok()?;
    keep_alive(&stream, &cx.bounds).ok()?;
    let Some(admission) = cx.registry.admit(address, local, stream.as_raw_fd(), shutdown.child_token()) else {
        // A fresh connection's send buffer is empty; where the write fails all the same, the client sees the close.
        let _ = stream.try_write(b"-ERR max number of clients reached\r\n");
        return None;
    };
    let stream = Stream::new(stream, certificates.map(Certificates::current)).ok()?;
    let session = Session::new(admission.client.clone(), &cx.users);
    let connection = connection::run(stream, session, Rc::clone(cx));
    Some(async move {
        connection.await;
        drop(admission);
    })
}

/// Lets the kernel find out when nobody is there any more: a machine that lost its power says no goodbye.
fn keep_alive(stream: &TcpStream, bounds: &Bounds) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, bounds.keepalive)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_EVERY)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(())
}

/// Whether the error says something about the connection that would have been accepted, and nothing about the next.
fn concerns_one_client(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused)
}
