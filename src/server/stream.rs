//! A client's bytes: plain, or through TLS.
//!
//! TLS is driven here on the socket's readiness, as everything else of a connection is: a record that is not complete waits in the session, and
//! what the socket does not take waits there, too. Both are told, so that they are counted as what waits elsewhere is.

use std::future::poll_fn;
use std::io::{self, Read as _, Write as _};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{BufMut as _, BytesMut};
use rustls::{ServerConfig, ServerConnection};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::limits::{READ_MIN, TLS_INCOMPLETE_MAX};

/// See the module.
pub enum Stream {
    Plain(TcpStream),
    Tls(Box<Tls>),
}

impl Stream {
    /// A connection that was accepted, with TLS where there is a configuration for it. Errors where TLS cannot begin.
    pub fn new(tcp: TcpStream, tls: Option<Arc<ServerConfig>>) -> Result<Self, rustls::Error> {
        Ok(match tls {
            None => Self::Plain(tcp),
            Some(config) => {
                let session = ServerConnection::new(config)?;
                Self::Tls(Box::new(Tls { tcp, session, incomplete: 0, readable: 0, unsent: 0, moved: false, ended: false }))
            }
        })
    }

    /// Whether the two sides have yet to agree on keys.
    pub fn is_shaking_hands(&self) -> bool {
        matches!(self, Self::Tls(tls) if tls.session.is_handshaking())
    }

    /// Bytes that the client has sent and that wait here: of what is not complete, beyond what a session has room for anyway, and decrypted ones.
    pub fn kept(&self) -> usize {
        match self {
            Self::Plain(_) => 0,
            Self::Tls(tls) => tls.incomplete.saturating_sub(READ_MIN) + tls.readable,
        }
    }

    /// Whether the next read finds something without the socket.
    pub fn has_more(&self) -> bool {
        matches!(self, Self::Tls(tls) if tls.readable > 0)
    }

    /// Bytes of the client's replies that were taken and have not left yet.
    pub fn unsent(&self) -> usize {
        match self {
            Self::Plain(_) => 0,
            Self::Tls(tls) => tls.unsent,
        }
    }

    /// Whether bytes that were taken, or that belong to TLS itself, have not left yet.
    pub fn has_unsent(&self) -> bool {
        matches!(self, Self::Tls(tls) if tls.session.wants_write())
    }

    /// Whether any bytes that were taken before have left since this was asked last. What is sent at once is told by [`Stream::try_write`].
    pub fn has_moved(&mut self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(tls) => std::mem::take(&mut tls.moved),
        }
    }

    /// Waits until there is something to read, an end, or an error.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Plain(tcp) => tcp.poll_read_ready(cx).map(drop),
            Self::Tls(tls) => tls.poll_readable(cx),
        }
    }

    /// Reads at most so many bytes, into the room that the buffer has. 0: the client has closed its side.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut BytesMut, most: usize) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(tcp) => pin!(tcp.read_buf(&mut buffer.limit(most))).poll(cx),
            Self::Tls(tls) => tls.poll_read(cx, buffer, most),
        }
    }

    /// Sends what the socket takes, without waiting. With nothing to send, what was taken before and has not left.
    pub fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(tcp) => tcp.try_write(bytes),
            Self::Tls(tls) => tls.try_write(bytes),
        }
    }

    /// Waits until the socket takes something.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let tcp = match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => &tls.tcp,
        };
        tcp.poll_write_ready(cx).map(drop)
    }

    /// Says that nothing more comes.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.shutdown().await,
            Self::Tls(tls) => {
                tls.session.send_close_notify();
                while tls.flush().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                    poll_fn(|cx| tls.tcp.poll_write_ready(cx)).await?;
                }
                tls.tcp.shutdown().await
            }
        }
    }
}

/// A connection through TLS.
pub struct Tls {
    tcp: TcpStream,
    session: ServerConnection,
    /// Bytes that were read since the handshake, or a record, was last complete. What was read of the next one with the end of that one is left out: it
    /// is no more than one read.
    incomplete: usize,
    /// Decrypted bytes that nobody has taken yet.
    readable: usize,
    /// Bytes that were taken and have not left yet.
    unsent: usize,
    /// Whether the socket has taken anything.
    moved: bool,
    /// Whether nothing more comes, be it well or badly.
    ended: bool,
}

impl Tls {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.readable == 0 && !self.ended {
            // An error is found again where it is read.
            _ = ready!(self.tcp.poll_read_ready(cx));
            match self.session.read_tls(&mut Direct(&self.tcp)) {
                Ok(0) => self.ended = true,
                Ok(read) => self.process(read),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => self.ended = true,
            }
            // A part of the handshake, or the alert that says why there will be none. What the socket does not take now goes with the next write.
            _ = self.flush();
        }
        Poll::Ready(())
    }

    /// Decrypts what is complete, now that so many more bytes were read.
    fn process(&mut self, read: usize) {
        let was_shaking_hands = self.session.is_handshaking();
        let state = match self.session.process_new_packets() {
            Ok(state) => state,
            Err(error) => {
                tracing::debug!(%error, "TLS failed");
                self.ended = true;
                return;
            }
        };
        self.readable = state.plaintext_bytes_to_read();
        let is_complete = self.readable > 0 || (was_shaking_hands && !self.session.is_handshaking());
        self.incomplete = if is_complete { 0 } else { self.incomplete + read };
        self.ended = state.peer_has_closed() && self.readable == 0;
        if self.incomplete > TLS_INCOMPLETE_MAX {
            tracing::debug!("TLS failed: more than {TLS_INCOMPLETE_MAX} bytes without an end");
            self.ended = true;
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut BytesMut, most: usize) -> Poll<io::Result<usize>> {
        ready!(self.poll_readable(cx));
        let wanted = self.readable.min(buffer.capacity() - buffer.len()).min(most);
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        let mut chunk = buffer.split_off(buffer.len());
        chunk.put_bytes(0, wanted);
        let read = self.session.reader().read(&mut chunk[..wanted]);
        chunk.truncate(*read.as_ref().unwrap_or(&0));
        buffer.unsplit(chunk);
        self.readable -= read.as_ref().map_or(self.readable, |read| *read);
        Poll::Ready(read)
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush()?;
        let taken = self.session.writer().write(bytes)?;
        self.unsent += taken;
        match self.flush() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            let sent = self.session.write_tls(&mut Direct(&self.tcp))?;
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            // What TLS adds to the bytes leaves with them.
            self.unsent = self.unsent.saturating_sub(sent);
            self.moved = true;
        }
        self.unsent = 0;
        Ok(())
    }
}

/// A socket that is read and written at once or not at all, and read a little at a time.
struct Direct<'a>(&'a TcpStream);

impl io::Read for Direct<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(READ_MIN);
        self.0.try_read(&mut buffer[..most])
    }
}

impl io::Write for Direct<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
