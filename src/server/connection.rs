//! One connection: reads, dispatches, writes.
//!
//! A turn reads once, dispatches every complete request within bounds, gathers the replies whose turn has come and writes them with one
//! call. What bounds a client: requests in flight, bytes unsent, commands a turn, and a time without taking a byte. A command that was
//! dispatched is finished even if its client leaves, but for those that wait alone.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BytesMut};
use tokio::time::Sleep;
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::stream::Stream;
use crate::command::{After, Context, Waiting, closed, dispatch};
use crate::limits::{OUTPUT_KEEP_MAX, OUTPUT_STRANGER_MAX, READ_AHEAD_MAX, READ_MAX, READ_MIN, TURN_COMMANDS_MAX};
use crate::resp::{Pipeline, Reader, Ready, Reply, Request, Stamp};
use crate::session::client::Session;

/// Serves one client until it leaves, is told to, or breaks the protocol.
pub async fn run(stream: Stream, session: Session, cx: Rc<Context>) {
    let stopped = Some(Box::pin(session.client.stop.clone().cancelled_owned()));
    let mut connection = Connection {
        stream,
        session,
        cx,
        pipeline: Pipeline::new(),
        reader: Reader::default(),
        read_size: READ_MIN,
        out: BytesMut::new(),
        waiting: None,
        backlog: false,
        left: false,
        phase: Phase::Open,
        stopped,
        stall: None,
        clock: None,
        held_until: Instant::now(),
        answered: Instant::now(),
        opened: Instant::now(),
        active: Instant::now(),
    };
    while connection.phase != Phase::Gone {
        connection.dispatch_turn();
        connection.collect();
        connection.write();
        if connection.is_done() {
            break;
        }
        // Asked only now: the replies that were just taken have made room.
        if connection.backlog && connection.has_room() {
            tokio::task::yield_now().await;
        } else {
            connection.count_pause();
            connection.release_memory();
            connection.wind_clock();
            poll_fn(|cx| connection.poll_event(cx)).await;
        }
    }
    if connection.phase != Phase::Gone {
        // Ends with a FIN, so that the last reply is not lost to a reset.
        let _ = connection.stream.shutdown().await;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Takes no more requests; finishes and sends what is in flight.
    Ending,
    /// Nothing more can or shall be sent.
    Gone,
}

struct Connection {
    stream: Stream,
    session: Session,
    cx: Rc<Context>,
    pipeline: Rc<Pipeline>,
    reader: Reader,
    /// Bytes to ask for in the next read.
    read_size: usize,
    /// Encoded and not yet sent.
    out: BytesMut,
    /// The command that runs alone.
    waiting: Option<Waiting>,
    /// Whether the reader may hold a complete request that could not be dispatched yet.
    backlog: bool,
    /// Whether the client has closed its side.
    left: bool,
    phase: Phase,
    /// `None` once it has been noticed.
    stopped: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// Runs while bytes wait for the client to take them.
    stall: Option<Pin<Box<Sleep>>>,
    /// Runs until the client may be too late with something: see [`Connection::deadline`].
    clock: Option<Pin<Box<Sleep>>>,
    /// Since when it is connected, and when it has last sent something.
    opened: Instant,
    active: Instant,
    /// When the last reply went out, and until when it was allowed to hold back those behind it.
    answered: Instant,
    held_until: Instant,
}

/// Replies that are counted together.
struct Alike {
    tag: usize,
    arrived: Instant,
    /// Their error word, if they are errors.
    error: Option<Box<str>>,
    count: usize,
}

impl Alike {
    fn takes(&self, stamp: &Stamp, reply: &Reply) -> bool {
        self.tag == stamp.tag && self.arrived == stamp.arrived && self.error.as_deref() == reply.error_word()
    }
}

impl Connection {
    fn has_room(&self) -> bool {
        self.phase == Phase::Open
            && self.waiting.is_none()
            && self.pipeline.in_flight() < self.cx.bounds.in_flight
            && self.out.len() <= self.output_max()
    }

    /// Unsent bytes beyond which nothing more is read or encoded.
    fn output_max(&self) -> usize {
        if self.session.authenticated { self.cx.bounds.output } else { OUTPUT_STRANGER_MAX }
    }

    /// Dispatches the requests that were read, as far as there is room, and no more than is fair to the other connections.
    fn dispatch_turn(&mut self) {
        let arrived = Instant::now();
        let mut dispatched = 0;
        self.backlog = true;
        if !self.session.renew() {
            self.close("user_changed");
            return;
        }
        while self.has_room() && dispatched < TURN_COMMANDS_MAX {
            let limits = if self.session.authenticated { self.cx.bounds.known } else { self.cx.bounds.stranger };
            match self.reader.next(limits) {
                Ok(Some(request)) => self.dispatch(request, arrived),
                Ok(None) => {
                    self.backlog = false;
                    if self.left {
                        self.phase = Phase::Ending;
                    }
                    break;
                }
                Err(error) => {
                    tracing::info!(client = %self.session.client.address, error = error.text(), "protocol error: connection closed");
                    closed("protocol_error");
                    let protocol = self.session.protocol;
                    self.pipeline.stamp(Stamp { tag: self.cx.commands.len(), arrived, due: None, protocol, silent: false });
                    self.pipeline.push_ready(Reply::error(error.text().to_owned()));
                    self.phase = Phase::Ending;
                }
            }
            dispatched += 1;
        }
        if dispatched > 0 {
            self.active = arrived;
            self.session.publish(self.pipeline.in_flight(), self.reader.buffer.len(), self.out.len());
        }
    }

    fn dispatch(&mut self, request: Request, arrived: Instant) {
        match dispatch(&self.cx, &mut self.session, &self.pipeline, request, arrived) {
            After::Next => {}
            After::Wait(waiting) if self.left && waiting.gives_up => self.phase = Phase::Gone,
            After::Wait(waiting) => self.waiting = Some(waiting),
            After::Close => self.phase = Phase::Ending,
            After::Drop => self.phase = Phase::Gone,
        }
    }

    /// Encodes the replies whose turn has come.
    fn collect(&mut self) {
        let mut now = None;
        // Replies of one command to requests that were read together are counted together, and so are errors of one word.
        let mut alike: Option<Alike> = None;
        while self.out.len() <= self.output_max() {
            let Some(Ready { stamp, reply }) = self.pipeline.pop_ready() else { break };
            let now = *now.get_or_insert_with(Instant::now);
            match &mut alike {
                Some(alike) if alike.takes(&stamp, &reply) => alike.count += 1,
                _ => {
                    self.count(alike.take(), now);
                    let error = reply.error_word().map(Into::into);
                    alike = Some(Alike { tag: stamp.tag, arrived: stamp.arrived, error, count: 1 });
                }
            }
            self.watch(&stamp, now);
            if !stamp.silent {
                reply.encode(&mut self.out, stamp.protocol);
            }
        }
        if let Some(now) = now {
            self.count(alike, now);
        }
        if self.pipeline.is_overrun() {
            tracing::warn!(client = %self.session.client.address, "a subscriber that reads too slowly: connection closed");
            self.close("slow_subscriber");
        }
    }

    fn count(&self, alike: Option<Alike>, now: Instant) {
        let Some(Alike { tag, arrived, error, count }) = alike else { return };
        let took = now.saturating_duration_since(arrived);
        match error {
            None => self.cx.stats.succeeded(tag, count, took),
            Some(word) => self.cx.stats.failed(tag, &word, count, took),
        }
        self.note_slow(tag, took);
    }

    fn note_slow(&self, tag: usize, took: Duration) {
        if let Some(spec) = self.cx.commands.all().get(tag) {
            self.cx.slow.note(spec.name, took, &self.session.client);
        }
    }

    /// Notices a reply that comes later than promised. One that had to wait its turn has the time of the one before it.
    fn watch(&mut self, stamp: &Stamp, now: Instant) {
        let held = stamp.arrived < self.answered;
        let due = stamp.due.map_or(now, |due| if held { due.max(self.held_until) } else { due });
        if now > due {
            self.cx.heartbeat.late(stamp.arrived, now - due);
        }
        (self.answered, self.held_until) = (now, due);
    }

    /// Sends what the socket takes.
    fn write(&mut self) {
        while (!self.out.is_empty() || self.stream.has_unsent()) && self.phase != Phase::Gone {
            match self.stream.try_write(&self.out) {
                Ok(0) if !self.out.is_empty() => self.phase = Phase::Gone,
                Ok(sent) => {
                    self.out.advance(sent);
                    self.stall = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.stall.is_none() {
                        self.stall = Some(Box::pin(tokio::time::sleep(self.cx.bounds.stall)));
                    }
                    return;
                }
                Err(_) => self.phase = Phase::Gone,
            }
        }
    }

    /// Whether everything is said that will be.
    fn is_done(&self) -> bool {
        self.phase == Phase::Gone
            || (self.phase == Phase::Ending && self.pipeline.in_flight() == 0 && self.out.is_empty() && !self.stream.has_unsent())
    }

    /// Gives buffers back before what may be a long wait.
    fn release_memory(&mut self) {
        self.reader.release();
        self.pipeline.shrink();
        if self.out.is_empty() && self.out.capacity() > OUTPUT_KEEP_MAX {
            self.out = BytesMut::new();
        }
    }

    /// Counts that requests wait which it has no room for.
    fn count_pause(&self) {
        if self.backlog && self.phase == Phase::Open && self.waiting.is_none() && !self.has_room() {
            let full = self.pipeline.in_flight() >= self.cx.bounds.in_flight;
            metrics::counter!("holdfast_paused_reads_total", "why" => if full { "in_flight" } else { "output" }).increment(1);
        }
    }

    /// Waits for anything that gives the next turn something to do.
    fn poll_event(&mut self, cx: &mut TaskContext<'_>) -> Poll<()> {
        let mut event = self.poll_stop(cx);
        event |= self.poll_read(cx);
        event |= self.poll_waiting(cx);
        // Past the bound nothing is encoded until the client has taken some: then the socket wakes this task, not the replies.
        event |= match self.out.len() <= self.output_max() {
            true => self.pipeline.poll_ready(cx).is_ready(),
            false => self.pipeline.poll_overrun(cx).is_ready(),
        };
        event |= (!self.out.is_empty() || self.stream.has_unsent()) && self.stream.poll_writable(cx).is_ready();
        event |= self.poll_stall(cx);
        event |= self.poll_clock(cx);
        if event { Poll::Ready(()) } else { Poll::Pending }
    }

    /// A shutdown lets what is in flight finish, a kill does not.
    fn poll_stop(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let Some(stopped) = &mut self.stopped else { return false };
        if stopped.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.stopped = None;
        self.phase = if self.session.client.is_killed() { Phase::Gone } else { Phase::Ending };
        true
    }

    /// Reads once, if there is room for what may come.
    fn poll_read(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let ahead = self.waiting.is_some() && self.phase != Phase::Gone && self.reader.buffer.len() < READ_AHEAD_MAX;
        if self.left || !(ahead || (self.has_room() && !self.backlog)) || self.stream.poll_readable(cx).is_pending() {
            return false;
        }
        self.reader.buffer.reserve(self.read_size);
        let room = self.reader.buffer.capacity() - self.reader.buffer.len();
        match self.stream.poll_read(cx, &mut self.reader.buffer) {
            Poll::Pending => {
                self.reader.release();
                false
            }
            Poll::Ready(Ok(0)) => {
                self.left = true;
                // Nobody is left to wait for it: a lock won now would be held for nobody.
                if self.waiting.as_ref().is_some_and(|waiting| waiting.gives_up) {
                    self.phase = Phase::Gone;
                }
                true
            }
            Poll::Ready(Ok(read)) => {
                self.read_size = match read {
                    full if full == room => (self.read_size * 2).min(READ_MAX),
                    little if little < self.read_size / 4 => (self.read_size / 2).max(READ_MIN),
                    _ => self.read_size,
                };
                // What was read ahead of a waiting command gives the next turn nothing to do, and must not make it spin.
                if self.waiting.is_some() {
                    cx.waker().wake_by_ref();
                    return false;
                }
                true
            }
            Poll::Ready(Err(_)) => {
                self.phase = Phase::Gone;
                true
            }
        }
    }

    /// Runs the command that runs alone, once every reply before its own is on its way.
    fn poll_waiting(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let Some(waiting) = &mut self.waiting else { return false };
        // What is won for a client that has gone must not be taken for it.
        if self.phase == Phase::Gone {
            return false;
        }
        if !self.pipeline.is_first(&waiting.ticket) {
            return false;
        }
        let Poll::Ready(reply) = waiting.future.as_mut().poll(cx) else { return false };
        if let Some(waiting) = self.waiting.take() {
            waiting.ticket.complete(reply);
        }
        true
    }

    fn poll_stall(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let Some(stall) = &mut self.stall else { return false };
        if stall.as_mut().poll(cx).is_pending() {
            return false;
        }
        tracing::warn!(client = %self.session.client.address, "a client took no bytes for too long: connection closed");
        self.close("stalled");
        true
    }

    /// By when the client has to have said something, and what it is too late with otherwise: showing who it is, or anything at all.
    fn deadline(&self) -> Option<(Instant, &'static str)> {
        if !self.session.authenticated || self.stream.is_shaking_hands() {
            return Some((self.opened + self.cx.bounds.auth_within, "auth_time"));
        }
        let waits = self.waiting.is_some() || self.pipeline.in_flight() > 0 || self.session.subscribes();
        let idle = self.cx.bounds.idle().filter(|_| self.phase == Phase::Open)?;
        Some((if waits { Instant::now() } else { self.active } + idle, "idle"))
    }

    fn wind_clock(&mut self) {
        if self.clock.is_none()
            && let Some((deadline, _)) = self.deadline()
        {
            self.clock = Some(Box::pin(tokio::time::sleep_until(deadline.into())));
        }
    }

    /// What has happened since the clock was wound may have moved the deadline: then it is wound again.
    fn poll_clock(&mut self, cx: &mut TaskContext<'_>) -> bool {
        let Some(clock) = &mut self.clock else { return false };
        if clock.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.clock = None;
        match self.deadline() {
            Some((deadline, why)) if deadline <= Instant::now() => self.close(why),
            // The next turn winds it.
            _ => {}
        }
        true
    }

    /// Ends the connection without another word.
    fn close(&mut self, why: &'static str) {
        closed(why);
        self.phase = Phase::Gone;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.waiting = None;
        self.pipeline.close();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::net::SocketAddr;
    use std::sync::Arc;

    use bytes::Bytes;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::LocalSet;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::command::spec::{BLOCKING, Spec, integer, text};
    use crate::command::{Commands, Handler, Stats, Step, client, connection, pubsub};
    use crate::limits::{IN_FLIGHT_MAX, OUTPUT_SOFT_MAX};
    use crate::resp::Ticket;
    use crate::session::registry::Registry;

    thread_local! {
        static HELD: RefCell<Vec<(Bytes, Ticket)>> = const { RefCell::new(Vec::new()) };
    }

    static HOLD: Spec = Spec::new("T.HOLD", "Answers when freed.").args(&[text("word", 100)]).run(|call| {
        let held = (call.args.text("word").clone(), call.ticket());
        HELD.with_borrow_mut(|all| all.push(held));
        Step::Later
    });
    static FREE: Spec = Spec::new("T.FREE", "Frees what is held, the last first.").run(|_| {
        let held = HELD.take();
        held.into_iter().rev().for_each(|(word, ticket)| ticket.complete(Reply::Bulk(word)));
        Step::Reply(Reply::ok())
    });
    static SLEEP: Spec = Spec::new("T.SLEEP", "Waits alone.").flags(BLOCKING).args(&[integer("ms", 1, 60_000, "ms")]).run(SLEEP_RUN);
    const SLEEP_RUN: Handler = |call| {
        let ms = Duration::from_millis(call.args.integer("ms").unsigned_abs());
        Step::Wait(Box::pin(async move {
            tokio::time::sleep(ms).await;
            Reply::simple("AWAKE")
        }))
    };
    static LATE: Spec =
        Spec::new("T.LATE", "Waits alone, and has promised more.").family("stock").args(&[integer("ms", 1, 60_000, "ms")]).run(SLEEP_RUN);
    static BIG: Spec = Spec::new("T.BIG", "Answers many bytes.")
        .args(&[integer("bytes", 1, 10_000_000, "bytes")])
        .run(|call| Step::Reply(Reply::bulk(vec![b'x'; usize::try_from(call.args.integer("bytes")).unwrap_or(0)])));
    static TABLE: &[&Spec] = &[
        &HOLD,
        &FREE,
        &SLEEP,
        &LATE,
        &BIG,
        &connection::PING,
        &connection::ECHO,
        &connection::HELLO,
        &connection::AUTH,
        &connection::QUIT,
        &connection::RESET,
        &client::CLIENT,
        &pubsub::SUBSCRIBE,
        &pubsub::PSUBSCRIBE,
        &pubsub::UNSUBSCRIBE,
        &pubsub::PUNSUBSCRIBE,
        &pubsub::PUBSUB_COMMAND,
        &pubsub::MONITOR,
    ];

    struct Server {
        address: SocketAddr,
        cx: Rc<Context>,
        shutdown: CancellationToken,
        serving: tokio::task::JoinHandle<()>,
    }

    /// Runs the test beside a server on this thread.
    async fn served(clients_max: usize, test: impl AsyncFnOnce(Server)) {
        let commands = Rc::new(Commands::new(TABLE));
        let stats = Arc::new(Stats::new(&commands));
        let cx = Rc::new(Context::new(commands, Arc::new(Registry::new(clients_max)), stats, crate::command::Backend::unconnected()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let local = LocalSet::new();
        local.spawn_local(Rc::clone(&cx.subscribers).run(shutdown.clone()));
        let serving = local.spawn_local(crate::server::serve(listener, None, Rc::clone(&cx), shutdown.clone()));
        let test = test(Server { address, cx, shutdown, serving });
        tokio::time::timeout(Duration::from_secs(30), local.run_until(test)).await.unwrap();
    }

    /// Sends bytes and reads until it has as many as expected.
    async fn talk(stream: &mut TcpStream, request: &[u8], reply: &str) {
        stream.write_all(request).await.unwrap();
        expect(stream, reply).await;
    }

    async fn expect(stream: &mut TcpStream, reply: &str) {
        let mut read = vec![0; reply.len()];
        stream.read_exact(&mut read).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&read), reply);
    }

    /// What the server still says before it closes.
    async fn rest(mut stream: TcpStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn a_late_reply_is_counted_and_one_for_which_the_thread_stood_still_apart() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let _guard = metrics::set_default_local_recorder(&recorder);
        let counts = || {
            let text = handle.render();
            ["late", "stalled"].map(|which| text.contains(&format!("holdfast_{which}_replies_total 1")))
        };
        served(10, async |server| {
            tokio::task::spawn_local(Rc::clone(&server.cx.heartbeat).beat());
            let mut client = TcpStream::connect(server.address).await.unwrap();
            talk(&mut client, b"T.LATE 10\r\nT.LATE 20\r\n", "+AWAKE\r\n+AWAKE\r\n").await;
            assert_eq!(counts(), [false, false]);
            talk(&mut client, b"T.LATE 1000\r\n", "+AWAKE\r\n").await;
            assert_eq!(counts(), [true, false]);
            client.write_all(b"T.LATE 50\r\n").await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            std::thread::sleep(Duration::from_millis(500));
            expect(&mut client, "+AWAKE\r\n").await;
            assert_eq!(counts(), [true, true]);
        })
        .await;
    }

    async fn until(mut done: impl FnMut() -> bool) {
        while !done() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn replies_keep_the_order_of_requests_however_they_are_found() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            let request = b"PING\r\nT.HOLD a\r\nPING\r\nT.HOLD b\r\nT.FREE\r\nPING\r\n";
            talk(&mut stream, request, "+PONG\r\n$1\r\na\r\n+PONG\r\n$1\r\nb\r\n+OK\r\n+PONG\r\n").await;
            talk(&mut stream, b"T.HOLD a\r\nPING\r\n", "").await;
            until(|| HELD.with_borrow(|held| !held.is_empty())).await;
            let mut other = TcpStream::connect(server.address).await.unwrap();
            talk(&mut other, b"T.FREE\r\n", "+OK\r\n").await;
            expect(&mut stream, "$1\r\na\r\n+PONG\r\n").await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_command_that_waits_holds_back_those_behind_it_and_waits_for_those_before() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            talk(&mut stream, b"T.HOLD a\r\nT.SLEEP 5\r\nPING\r\n", "").await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            let mut other = TcpStream::connect(server.address).await.unwrap();
            talk(&mut other, b"T.FREE\r\n", "+OK\r\n").await;
            expect(&mut stream, "$1\r\na\r\n+AWAKE\r\n+PONG\r\n").await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_client_that_leaves_stops_waiting() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            talk(&mut stream, b"PING\r\nT.SLEEP 60000\r\nPING\r\n", "+PONG\r\n").await;
            drop(stream);
            until(|| server.cx.registry.connected() == 0).await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_client_that_only_stops_sending_still_gets_its_replies() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(b"T.HOLD a\r\nPING\r\nPI").await.unwrap();
            stream.shutdown().await.unwrap();
            until(|| HELD.with_borrow(|held| !held.is_empty())).await;
            let mut other = TcpStream::connect(server.address).await.unwrap();
            talk(&mut other, b"T.FREE\r\n", "+OK\r\n").await;
            assert_eq!(rest(stream).await, "$1\r\na\r\n+PONG\r\n");
        })
        .await;
    }

    #[tokio::test]
    async fn a_protocol_error_closes_only_its_connection() {
        served(10, async |server| {
            let mut good = TcpStream::connect(server.address).await.unwrap();
            let mut bad = TcpStream::connect(server.address).await.unwrap();
            bad.write_all(b"T.HOLD a\r\n*1\r\n$x\r\n").await.unwrap();
            until(|| HELD.with_borrow(|held| !held.is_empty())).await;
            talk(&mut good, b"T.FREE\r\n", "+OK\r\n").await;
            assert_eq!(rest(bad).await, "$1\r\na\r\n-ERR Protocol error: invalid bulk length\r\n");
            talk(&mut good, b"PING\r\n", "+PONG\r\n").await;
        })
        .await;
    }

    #[tokio::test]
    async fn an_http_request_is_closed_without_a_word() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(b"POST / HTTP/1.1\r\nHost: x\r\n").await.unwrap();
            let mut text = Vec::new();
            // The rest of the request was never read, so the close may arrive as a reset.
            let _ = stream.read_to_end(&mut text).await;
            assert_eq!(text, b"");
        })
        .await;
    }

    #[tokio::test]
    async fn requests_may_come_a_byte_at_a_time_and_switch_the_dialect() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.set_nodelay(true).unwrap();
            for byte in b"*2\r\n$4\r\nECHO\r\n$3\r\na\r\n\r\nCLIENT GETNAME\r\n" {
                stream.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
            expect(&mut stream, "$3\r\na\r\n\r\n$-1\r\n").await;
            let request = b"T.HOLD a\r\nHELLO 3\r\nCLIENT GETNAME\r\nT.FREE\r\nHELLO 2\r\nCLIENT GETNAME\r\n";
            talk(&mut stream, request, "$1\r\na\r\n%7\r\n$6\r\nserver\r\n").await;
            let mut read = BytesMut::new();
            while !read.ends_with(b"$-1\r\n") {
                stream.read_buf(&mut read).await.unwrap();
            }
            let text = String::from_utf8_lossy(&read);
            assert!(text.contains("_\r\n+OK\r\n*14\r\n$6\r\nserver\r\n"), "{text}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_huge_pipeline_is_answered_whole() {
        served(10, async |server| {
            let (mut reading, mut writing) = TcpStream::connect(server.address).await.unwrap().into_split();
            let count = 20_000;
            let sending = tokio::task::spawn_local(async move {
                writing.write_all("*2\r\n$4\r\nECHO\r\n$2\r\nhi\r\n".repeat(count).as_bytes()).await.unwrap();
                writing
            });
            let mut read = vec![0; count * 8];
            reading.read_exact(&mut read).await.unwrap();
            assert!(read.chunks(8).all(|reply| reply == b"$2\r\nhi\r\n"));
            drop(sending.await.unwrap());
        })
        .await;
    }

    #[tokio::test]
    async fn a_client_has_bounded_requests_in_flight() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all("T.HOLD a\r\n".repeat(IN_FLIGHT_MAX + 500).as_bytes()).await.unwrap();
            let held = || HELD.with_borrow(Vec::len);
            until(|| held() == IN_FLIGHT_MAX).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert_eq!(held(), IN_FLIGHT_MAX);
            let mut other = TcpStream::connect(server.address).await.unwrap();
            talk(&mut other, b"T.FREE\r\n", "+OK\r\n").await;
            until(|| held() == 500).await;
            talk(&mut other, b"T.FREE\r\n", "+OK\r\n").await;
            expect(&mut stream, &"$1\r\na\r\n".repeat(IN_FLIGHT_MAX + 500)).await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_slow_reader_is_not_read_from() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            let count = 200;
            stream.write_all("T.BIG 1000000\r\n".repeat(count).as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
            let answered = server.cx.stats.commands_total();
            // What the kernel buffers, and one reply beyond the bound.
            assert!(answered < 30, "{answered}");
            let profile = server.cx.registry.clients()[0].profile().clone();
            assert!(profile.output_bytes <= OUTPUT_SOFT_MAX + 1_000_012, "{}", profile.output_bytes);
            let mut read = vec![0; count * 1_000_012];
            stream.read_exact(&mut read).await.unwrap();
        })
        .await;
    }

    fn publish(server: &Server, channel: &'static str, payload: &'static str) {
        server.cx.subscribers.hub().publish(channel, || Bytes::from_static(payload.as_bytes()));
    }

    #[tokio::test]
    async fn messages_reach_those_who_have_subscribed_in_their_dialect_and_behind_the_confirmation() {
        served(10, async |server| {
            publish(&server, "stock:events:mug", "to nobody");
            let mut two = TcpStream::connect(server.address).await.unwrap();
            let mut three = TcpStream::connect(server.address).await.unwrap();
            talk(&mut two, b"SUBSCRIBE stock:events:mug a a\r\n", "*3\r\n$9\r\nsubscribe\r\n$16\r\nstock:events:mug\r\n:1\r\n").await;
            expect(&mut two, "*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:2\r\n*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:2\r\n").await;
            three.write_all(b"HELLO 3\r\nT.HOLD x\r\nPSUBSCRIBE stock:events:*\r\n").await.unwrap();
            until(|| HELD.with_borrow(|held| !held.is_empty())).await;
            publish(&server, "stock:events:mug", "low");
            expect(&mut two, "*3\r\n$7\r\nmessage\r\n$16\r\nstock:events:mug\r\n$3\r\nlow\r\n").await;
            HELD.take().into_iter().for_each(|(word, ticket)| ticket.complete(Reply::Bulk(word)));
            let mut read = BytesMut::new();
            while !read.ends_with(b"$1\r\nx\r\n>3\r\n$10\r\npsubscribe\r\n$14\r\nstock:events:*\r\n:1\r\n") {
                three.read_buf(&mut read).await.unwrap();
            }
            publish(&server, "stock:events:mug", "soldout");
            publish(&server, "coupon:events:spring", "low");
            expect(&mut two, "*3\r\n$7\r\nmessage\r\n$16\r\nstock:events:mug\r\n$7\r\nsoldout\r\n").await;
            let message = ">4\r\n$8\r\npmessage\r\n$14\r\nstock:events:*\r\n$16\r\nstock:events:mug\r\n$7\r\nsoldout\r\n";
            expect(&mut three, message).await;
            talk(&mut three, b"T.BIG 1\r\nPING\r\n", "$1\r\nx\r\n+PONG\r\n").await;
            let refused =
                "-ERR Can't execute 'echo': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context\r\n";
            talk(&mut two, b"ECHO x\r\nPING\r\n", &format!("{refused}*2\r\n$4\r\npong\r\n$0\r\n\r\n")).await;
            talk(&mut two, b"UNSUBSCRIBE\r\n", "*3\r\n$11\r\nunsubscribe\r\n$16\r\nstock:events:mug\r\n:1\r\n").await;
            expect(&mut two, "*3\r\n$11\r\nunsubscribe\r\n$1\r\na\r\n:0\r\n").await;
            talk(&mut two, b"UNSUBSCRIBE\r\nECHO x\r\n", "*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n$1\r\nx\r\n").await;
            talk(&mut three, b"RESET\r\nECHO x\r\n", "+RESET\r\n$1\r\nx\r\n").await;
            assert!(!server.cx.subscribers.hub().has_subscribers());
            publish(&server, "stock:events:mug", "to nobody");
            talk(&mut two, b"PUBSUB NUMPAT\r\n", ":0\r\n").await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_subscriber_that_reads_nothing_is_cut_off_and_forgotten() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            talk(&mut stream, b"SUBSCRIBE a\r\n", "*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n").await;
            let payload = Bytes::from(vec![b'x'; 10_000]);
            let began = Instant::now();
            while server.cx.registry.connected() > 0 {
                server.cx.subscribers.hub().publish("a", || payload.clone());
                tokio::task::yield_now().await;
                assert!(began.elapsed() < Duration::from_secs(20));
            }
            until(|| !server.cx.subscribers.hub().has_subscribers()).await;
        })
        .await;
    }

    #[tokio::test]
    async fn monitor_shows_what_others_send_without_secrets() {
        served(10, async |server| {
            let mut watching = TcpStream::connect(server.address).await.unwrap();
            talk(&mut watching, b"MONITOR\r\n", "+OK\r\n").await;
            let mut other = TcpStream::connect(server.address).await.unwrap();
            let request = b"AUTH default s3cret\r\nHELLO 3 AUTH default s3cret\r\nCLIENT LIST\r\nECHO \"a\\r\\nb\"\r\nQUIT\r\n";
            other.write_all(request).await.unwrap();
            rest(other).await;
            let mut read = BytesMut::new();
            while !read.ends_with(b"\"QUIT\"\r\n") {
                watching.read_buf(&mut read).await.unwrap();
            }
            let text = String::from_utf8_lossy(&read).into_owned();
            assert!(text.contains(r#""AUTH" "(redacted)""#) && text.contains(r#""ECHO" "a\r\nb""#), "{text}");
            assert!(!text.contains("s3cret") && !text.contains("CLIENT"), "{text}");
            let first = text.lines().next().unwrap();
            assert!(first.starts_with('+') && first.contains(" [0 127.0.0.1:"), "{first}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_silent_client_is_closed_after_the_time_it_has() {
        served(10, async |server| {
            let mut idle = TcpStream::connect(server.address).await.unwrap();
            let mut subscriber = TcpStream::connect(server.address).await.unwrap();
            talk(&mut idle, b"PING\r\n", "+PONG\r\n").await;
            talk(&mut subscriber, b"SUBSCRIBE a\r\n", "*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n").await;
            server.cx.bounds.set_idle(Duration::from_millis(50));
            // The clock is wound with the next thing that it says.
            talk(&mut idle, b"PING\r\n", "+PONG\r\n").await;
            talk(&mut subscriber, b"PING\r\n", "*2\r\n$4\r\npong\r\n$0\r\n\r\n").await;
            assert_eq!(rest(idle).await, "");
            tokio::time::sleep(Duration::from_millis(100)).await;
            talk(&mut subscriber, b"PING\r\n", "*2\r\n$4\r\npong\r\n$0\r\n\r\n").await;
        })
        .await;
    }

    #[tokio::test]
    async fn quit_answers_and_closes() {
        served(10, async |server| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(b"PING\r\nQUIT\r\n").await.unwrap();
            assert_eq!(rest(stream).await, "+PONG\r\n+OK\r\n");
        })
        .await;
    }

    #[tokio::test]
    async fn too_many_clients_are_told_so() {
        served(1, async |server| {
            let mut first = TcpStream::connect(server.address).await.unwrap();
            talk(&mut first, b"PING\r\n", "+PONG\r\n").await;
            let second = TcpStream::connect(server.address).await.unwrap();
            assert_eq!(rest(second).await, "-ERR max number of clients reached\r\n");
            drop(first);
            until(|| server.cx.registry.connected() == 0).await;
            let mut third = TcpStream::connect(server.address).await.unwrap();
            talk(&mut third, b"PING\r\n", "+PONG\r\n").await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_client_can_be_killed_by_another() {
        served(10, async |server| {
            let mut victim = TcpStream::connect(server.address).await.unwrap();
            talk(&mut victim, b"CLIENT ID\r\n", ":1\r\n").await;
            let mut other = TcpStream::connect(server.address).await.unwrap();
            talk(&mut other, b"CLIENT KILL ID 1\r\n", ":1\r\n").await;
            assert_eq!(rest(victim).await, "");
        })
        .await;
    }

    #[tokio::test]
    async fn a_shutdown_finishes_what_is_in_flight_and_closes_the_rest() {
        served(10, async |server| {
            let mut idle = TcpStream::connect(server.address).await.unwrap();
            talk(&mut idle, b"PING\r\n", "+PONG\r\n").await;
            let mut busy = TcpStream::connect(server.address).await.unwrap();
            busy.write_all(b"T.HOLD a\r\n").await.unwrap();
            until(|| HELD.with_borrow(|held| !held.is_empty())).await;
            server.shutdown.cancel();
            assert_eq!(rest(idle).await, "");
            assert!(!server.serving.is_finished());
            HELD.take().into_iter().for_each(|(word, ticket)| ticket.complete(Reply::Bulk(word)));
            assert_eq!(rest(busy).await, "$1\r\na\r\n");
            server.serving.await.unwrap();
        })
        .await;
    }

    #[test]
    fn an_idle_connection_is_small() {
        assert!(size_of::<Connection>() < 1024, "{}", size_of::<Connection>());
    }
}
