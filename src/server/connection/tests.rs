//! A connection over a real socket, with commands made for the test.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::command::spec::{BLOCKING, Spec, integer, text};
use crate::command::{Backend, Commands, Handler, Stats, Step, client, connection, pubsub};
use crate::limits::{
    GUESSES_FREE, IN_FLIGHT_MAX, INPUT_ALWAYS_MAX, INPUT_STRANGER_MAX, INPUT_TOGETHER_MAX, OUTPUT_SOFT_MAX, OUTPUT_STRANGER_MAX,
    OUTPUT_TOGETHER_MAX, PATTERN_TAILS_EACH_MAX, PATTERNS_MAX, PATTERNS_TOGETHER_MAX, READ_BUFFERS_KEPT_MAX, READ_MIN, REFUSED_READ_MAX,
    REFUSED_REST_PART, TLS_INCOMPLETE_MAX, TURN_COMMANDS_MAX,
};
use crate::resp::Ticket;
use crate::session::client::HeldBack;
use crate::session::registry::Registry;
use crate::session::users::Users;

thread_local! {
    static HELD: RefCell<Vec<(Bytes, Ticket)>> = const { RefCell::new(Vec::new()) };
    /// What holds back the client of the last T.BUILD.
    static BUILDING: RefCell<Option<HeldBack>> = const { RefCell::new(None) };
}

static HOLD: Spec = Spec::new("T.HOLD", "Answers when freed.").args(&[text("word", 100)]).run(|call| {
    let held = (call.args.shared("word"), call.ticket());
    HELD.with_borrow_mut(|all| all.push(held));
    Step::Later
});
static BUILD: Spec = Spec::new("T.BUILD", "Holds back what its client sends behind it, and is answered when freed.").run(|call| {
    let pipeline = Rc::clone(call.pipeline());
    BUILDING.set(Some(call.session.hold_back(&pipeline)));
    let held = (Bytes::from_static(b"built"), call.ticket());
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
static CROWDED: Spec = Spec::new("T.CROWDED", "Is refused.").refused_early(|_| Some("TRYAGAIN later")).run(|_| Step::Reply(Reply::ok()));
static TABLE: &[&Spec] = &[
    &CROWDED,
    &HOLD,
    &BUILD,
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
    &crate::command::server::CONFIG,
];

struct Server {
    address: SocketAddr,
    cx: Rc<Context>,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

/// Runs the test beside a server on this thread.
async fn served(clients_max: usize, test: impl AsyncFnOnce(Server)) {
    served_by(clients_max, Backend::unconnected(), test).await;
}

/// The same where who is refused rests for so long that nothing else takes as long.
async fn served_with_rest(rest: Duration, test: impl AsyncFnOnce(Server)) {
    served_by(10, Backend { rest, ..Backend::unconnected() }, test).await;
}

async fn served_by(clients_max: usize, backend: Backend, test: impl AsyncFnOnce(Server)) {
    let commands = Rc::new(Commands::new(TABLE));
    let stats = Arc::new(Stats::new(&commands));
    served_in(Context::new(commands, Arc::new(Registry::new(clients_max)), stats, backend), test).await;
}

/// The same where these are the users, and an address that guesses has to wait for this delay.
async fn served_to(users: &str, auth_delay: Duration, test: impl AsyncFnOnce(Server)) {
    served_with(users, auth_delay, 1_000, test).await;
}

/// The same where each may be wrong so many times.
async fn served_with(users: &str, auth_delay: Duration, auth_failures: u32, test: impl AsyncFnOnce(Server)) {
    let commands = Rc::new(Commands::new(TABLE));
    let stats = Arc::new(Stats::new(&commands));
    let users = Users::read(Some(users), None, &*commands).unwrap();
    let mut cx = Context::new(commands, Arc::new(Registry::new(100)), stats, Backend::unconnected());
    cx.users = Arc::new(crate::session::users::Directory::new(users));
    let mut bounds = crate::session::Bounds::default();
    (bounds.auth_delay, bounds.auth_within, bounds.auth_failures) = (auth_delay, Duration::from_secs(60), auth_failures);
    cx.bounds = Arc::new(bounds);
    served_in(cx, test).await;
}

async fn served_in(cx: Context, test: impl AsyncFnOnce(Server)) {
    let cx = Rc::new(cx);
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
async fn read_buffers_are_passed_on_and_only_some_are_kept() {
    const CLIENTS: usize = READ_BUFFERS_KEPT_MAX + 10;
    served(2 * CLIENTS, async |server| {
        let kept = || server.cx.read_buffers.borrow().len();
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            talk(&mut stream, b"PING\r\n", "+PONG\r\n").await;
            clients.push(stream);
        }
        until(|| kept() == 1).await;
        // Requests under way have theirs, and give it back once they are over.
        for stream in &mut clients {
            stream.write_all(b"T.HOLD 0123456789\r\n").await.unwrap();
        }
        until(|| HELD.with_borrow(Vec::len) == CLIENTS).await;
        assert_eq!(kept(), 0);
        let mut other = TcpStream::connect(server.address).await.unwrap();
        talk(&mut other, b"T.FREE\r\n", "+OK\r\n").await;
        for stream in &mut clients {
            expect(stream, "$10\r\n0123456789\r\n").await;
        }
        until(|| kept() == READ_BUFFERS_KEPT_MAX).await;
        // Nobody sees what another has sent, and who waits for long has none.
        talk(&mut other, b"ECHO ab\r\nT.SLEEP 60000\r\n", "$2\r\nab\r\n").await;
        until(|| kept() == READ_BUFFERS_KEPT_MAX).await;
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

/// Longer than anything else in these tests.
const REST: Duration = Duration::from_millis(700);

#[tokio::test]
async fn who_is_refused_for_want_of_time_is_read_again_a_little_later() {
    served_with_rest(REST, async |server| {
        let (mut stream, began) = (TcpStream::connect(server.address).await.unwrap(), Instant::now());
        // As if so many were served.
        server.cx.refused_early.add(1_000, Instant::now());
        talk(&mut stream, b"T.CROWDED\r\nPING\r\n", "-TRYAGAIN later\r\n+PONG\r\n").await;
        assert!(began.elapsed() < REST, "what came behind it at once was taken with it");
        let mut other = TcpStream::connect(server.address).await.unwrap();
        talk(&mut other, b"PING\r\n", "+PONG\r\n").await;
        assert!(began.elapsed() < REST, "nobody else waits");
        talk(&mut stream, b"PING\r\n", "+PONG\r\n").await;
        assert!(began.elapsed() >= REST, "the rest waits");
    })
    .await;
}

#[tokio::test]
async fn all_that_was_read_is_answered_whoever_is_refused() {
    served_with_rest(REST, async |server| {
        let (mut stream, began) = (TcpStream::connect(server.address).await.unwrap(), Instant::now());
        // More than a turn of one connection.
        let refused = TURN_COMMANDS_MAX + 10;
        stream.write_all(format!("{}PING\r\n", "T.CROWDED\r\n".repeat(refused)).as_bytes()).await.unwrap();
        expect(&mut stream, &format!("{}+PONG\r\n", "-TRYAGAIN later\r\n".repeat(refused))).await;
        assert!(began.elapsed() < REST);
    })
    .await;
}

#[tokio::test]
async fn who_was_refused_rests_for_longer_while_there_have_been_refusals_enough() {
    let rest = Duration::from_millis(100);
    served_with_rest(rest, async |server| {
        let (mut stream, began) = (TcpStream::connect(server.address).await.unwrap(), Instant::now());
        // As if others were served, for as many refusals as there are.
        let serving = async {
            loop {
                [1, 0].into_iter().for_each(|served| server.cx.refused_early.add(served, Instant::now()));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let asking = async {
            talk(&mut stream, b"T.CROWDED\r\n", "-TRYAGAIN later\r\n").await;
            talk(&mut stream, b"PING\r\n", "+PONG\r\n").await;
        };
        tokio::select! {
            () = asking => {}
            () = serving => {}
        }
        assert!(began.elapsed() >= rest * (REFUSED_REST_PART - 1), "{:?}", began.elapsed());
    })
    .await;
}

#[tokio::test]
async fn of_who_was_refused_only_a_little_is_read_at_once() {
    let rest = Duration::from_millis(50);
    served_with_rest(rest, async |server| {
        let (mut stream, began) = (TcpStream::connect(server.address).await.unwrap(), Instant::now());
        // A whole number of them is read at first.
        let request = "T.CROWDED\r\n";
        let little = u32::try_from((READ_MIN + 5 * REFUSED_READ_MAX) / request.len()).unwrap();
        stream.write_all(request.repeat(little as usize).as_bytes()).await.unwrap();
        expect(&mut stream, &"-TRYAGAIN later\r\n".repeat(little as usize)).await;
        assert!(began.elapsed() >= rest * 4, "{:?}", began.elapsed());
    })
    .await;
}

#[tokio::test]
async fn what_waits_behind_a_command_that_holds_back_goes_on_as_soon_as_it_may() {
    served(10, async |server| {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let held = || HELD.with_borrow(Vec::len);
        // One behind it came with it, the other one later.
        stream.write_all(b"T.BUILD\r\nT.HOLD a\r\n").await.unwrap();
        until(|| held() == 1).await;
        BUILDING.take();
        until(|| held() == 2).await;
        stream.write_all(b"T.BUILD\r\n").await.unwrap();
        until(|| held() == 3).await;
        stream.write_all(b"T.HOLD b\r\n").await.unwrap();
        BUILDING.take();
        until(|| held() == 4).await;
        let mut other = TcpStream::connect(server.address).await.unwrap();
        talk(&mut other, b"T.FREE\r\n", "+OK\r\n").await;
        expect(&mut stream, "$5\r\nbuilt\r\n$1\r\na\r\n$5\r\nbuilt\r\n$1\r\nb\r\n").await;
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

/// A directory with a certificate of its own for this machine; it goes away with the test.
struct Certificate(std::path::PathBuf);

impl Certificate {
    fn new() -> Self {
        let directory = std::env::temp_dir().join(format!("holdfast-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir_all(&directory).unwrap();
        let made = Self(directory);
        let options = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"];
        let openssl =
            std::process::Command::new("openssl").args(options).args(["-keyout", "key", "-out", "cert"]).current_dir(&made.0).output();
        assert!(openssl.unwrap().status.success());
        made
    }

    fn files(&self) -> crate::tls::Files {
        crate::tls::Files { cert: self.0.join("cert"), key: self.0.join("key"), client_ca: None }
    }
}

impl Drop for Certificate {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the test beside a server that is reached through TLS, where these are the users and a client may take nothing for so long. The test is given what
/// a client needs to know of it.
async fn served_through_tls(users: Users, stall: Duration, test: impl AsyncFnOnce(Rc<Context>, SocketAddr, Arc<rustls::ClientConfig>)) {
    let certificate = Certificate::new();
    let listening = tokio::net::TcpSocket::new_v4().unwrap();
    listening.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    // Small, so that it shows soon what the client takes.
    listening.set_send_buffer_size(8 << 10).unwrap();
    let listener = listening.listen(10).unwrap();
    let address = listener.local_addr().unwrap();
    let commands = Rc::new(Commands::new(TABLE));
    let stats = Arc::new(Stats::new(&commands));
    let mut cx = Context::new(commands, Arc::new(Registry::new(10)), stats, Backend::unconnected());
    let mut bounds = crate::session::Bounds::default();
    (bounds.stall, bounds.auth_within) = (stall, Duration::from_secs(60));
    cx.bounds = Arc::new(bounds);
    cx.users = Arc::new(crate::session::users::Directory::new(users));
    let cx = Rc::new(cx);
    let certificates = Arc::new(crate::tls::Certificates::load(certificate.files()).unwrap());
    let local = LocalSet::new();
    local.spawn_local(crate::server::serve(listener, Some(certificates), Rc::clone(&cx), CancellationToken::new()));
    let test = test(cx, address, crate::tls::own_client(&certificate.files()).unwrap());
    tokio::time::timeout(Duration::from_secs(30), local.run_until(test)).await.unwrap();
}

/// A client through TLS that takes little at a time.
async fn connect_through_tls(address: SocketAddr, config: Arc<rustls::ClientConfig>) -> tokio_rustls::client::TlsStream<TcpStream> {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap();
    let tcp = socket.connect(address).await.unwrap();
    tokio_rustls::TlsConnector::from(config).connect("localhost".try_into().unwrap(), tcp).await.unwrap()
}

#[tokio::test]
async fn who_reads_slowly_through_tls_is_not_closed_as_one_that_does_not_read() {
    let stall = Duration::from_millis(1_000);
    served_through_tls(Users::open(), stall, async |_, address, config| {
        let mut client = connect_through_tls(address, config).await;
        client.write_all(b"T.BIG 1000000\r\n").await.unwrap();
        client.flush().await.unwrap();
        // Less than the 64 KiB that wait in the session in each stretch of that length, for several of them.
        let (mut tcp, _) = client.into_inner();
        let (began, mut taken) = (Instant::now(), 0);
        while began.elapsed() < stall * 3 {
            let read = tcp.read(&mut [0; 1_000]).await.unwrap();
            assert!(read > 0, "closed after {taken} bytes and {:?}", began.elapsed());
            taken += read;
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        assert!(taken < 3 * 65_536, "{taken}: that was not slow");
        // And one that takes nothing is.
        tokio::time::sleep(stall * 2).await;
        let mut rest = Vec::new();
        let _ = tcp.read_to_end(&mut rest).await;
        assert!(rest.len() < 100_000, "{}", rest.len());
    })
    .await;
}

#[tokio::test]
async fn what_waits_in_a_tls_session_counts_as_unread() {
    served_through_tls(Users::open(), Duration::from_secs(60), async |cx, address, config| {
        // As much as a session takes, so that nothing waits elsewhere.
        let length = 60_000;
        let mut client = connect_through_tls(address, config).await;
        client.write_all(format!("T.BIG {length}\r\nPING\r\n").as_bytes()).await.unwrap();
        client.flush().await.unwrap();
        until(|| cx.unread.get() > OUTPUT_STRANGER_MAX).await;
        // Nothing more is answered for one that may leave only so much.
        cx.unread.set(cx.unread.get() + OUTPUT_TOGETHER_MAX);
        let answered = cx.stats.commands_total();
        client.write_all(&b"PING\r\n".repeat(100)).await.unwrap();
        client.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(cx.stats.commands_total(), answered);
        let mut read = vec![0; format!("${length}\r\n\r\n").len() + length + 101 * "+PONG\r\n".len()];
        client.read_exact(&mut read).await.unwrap();
        assert!(read.ends_with(b"+PONG\r\n"));
        until(|| cx.unread.get() == OUTPUT_TOGETHER_MAX).await;
    })
    .await;
}

#[tokio::test]
async fn what_a_tls_session_keeps_of_what_is_not_complete_is_bounded_and_counted() {
    let users = Users::read(Some(&format!("user known on #{HASH} +@all")), None, &Commands::new(TABLE)).unwrap();
    served_through_tls(users, Duration::from_secs(60), async |cx, address, config| {
        let (connected, half_sent) = (|| cx.registry.connected(), || cx.half_sent.get());
        // A hello of the greatest length, in many records, none of which is the last.
        let record = [&b"\x16\x03\x01\x03\xe8"[..], &[0; 1_000]].concat();
        let hello = [&b"\x16\x03\x01\x03\xe8\x01\x00\xff\xff"[..], &[0; 996], &record.repeat(64)].concat();
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(&hello[..20_000]).await.unwrap();
        until(|| half_sent() == 20_000 - READ_MIN).await;
        let _ = stranger.write_all(&hello[20_000..TLS_INCOMPLETE_MAX + 2_000]).await;
        let _ = stranger.read_to_end(&mut Vec::new()).await;
        until(|| connected() == 0 && half_sent() == 0).await;

        // After the handshake, which is over where something was answered.
        let mut client = connect_through_tls(address, Arc::clone(&config)).await;
        client.write_all(b"PING\r\n").await.unwrap();
        let mut read = [0; 34];
        client.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"-NOAUTH Authentication required.\r\n");
        let (mut tcp, _) = client.into_inner();
        let half = [&b"\x17\x03\x03\x40\x00"[..], &[0; 10_000]].concat();
        tcp.write_all(&half).await.unwrap();
        until(|| half_sent() == half.len() - READ_MIN).await;

        // Now other strangers have half-sent so much that there is only little for each, but as much as nearly every hello has.
        let others = INPUT_TOGETHER_MAX / 2;
        cx.half_sent.set(others + half_sent());
        let mut little = TcpStream::connect(address).await.unwrap();
        little.write_all(&hello[..READ_MIN]).await.unwrap();
        let mut much = TcpStream::connect(address).await.unwrap();
        let _ = much.write_all(&hello[..READ_MIN + INPUT_STRANGER_MAX + 1]).await;
        let _ = much.read_to_end(&mut Vec::new()).await;
        let _ = tcp.write_all(b"x").await;
        let _ = tcp.read_to_end(&mut Vec::new()).await;
        until(|| connected() == 1 && half_sent() == others).await;

        // A known client has more, and who connects to become one is let in.
        let mut known = connect_through_tls(address, config).await;
        known.write_all(b"AUTH known secret\r\n").await.unwrap();
        let mut read = [0; 5];
        known.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"+OK\r\n");
        let (mut tcp, _) = known.into_inner();
        tcp.write_all(&half).await.unwrap();
        until(|| half_sent() == others + half.len() - READ_MIN).await;
        assert_eq!(connected(), 2);
    })
    .await;
}

#[tokio::test]
async fn replies_that_wait_behind_another_count_as_unread() {
    served(10, async |server| {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let (count, length) = (50, 400_011);
        let request = format!("T.HOLD a\r\n{}", "T.BIG 400000\r\n".repeat(count));
        stream.write_all(request.as_bytes()).await.unwrap();
        until(|| HELD.with_borrow(|held| !held.is_empty())).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let in_flight = server.cx.registry.clients()[0].profile().in_flight;
        // The one that is held, and what passes the bound.
        assert!(in_flight <= 2 + OUTPUT_SOFT_MAX / length, "{in_flight}");
        let mut other = TcpStream::connect(server.address).await.unwrap();
        talk(&mut other, b"T.FREE\r\n", "+OK\r\n").await;
        expect(&mut stream, "$1\r\na\r\n").await;
        let mut read = vec![0; count * length];
        stream.read_exact(&mut read).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn what_all_leave_unread_is_bounded_together_and_given_back() {
    served(10, async |server| {
        let (count, length) = (200, 100_011);
        let request = "T.BIG 100000\r\n".repeat(count);
        let others = OUTPUT_TOGETHER_MAX + 1;
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        until(|| server.cx.unread.get() > OUTPUT_SOFT_MAX).await;
        stream.read_exact(&mut vec![0; count * length]).await.unwrap();
        until(|| server.cx.unread.get() == 0).await;
        // Now others leave so much that there is little for this one.
        server.cx.unread.set(others);
        stream.write_all(request.as_bytes()).await.unwrap();
        until(|| server.cx.unread.get() > others).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        // One reply beyond the bound, in a buffer that grows by doubling.
        let unread = server.cx.unread.get() - others;
        assert!(unread <= 4 * (OUTPUT_STRANGER_MAX + length), "{unread}");
        stream.read_exact(&mut vec![0; count * length]).await.unwrap();
        until(|| server.cx.unread.get() == others).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        until(|| server.cx.unread.get() > others).await;
        drop(stream);
        until(|| server.cx.unread.get() == others).await;
    })
    .await;
}

#[tokio::test]
async fn what_all_have_half_sent_is_bounded_together_and_shown() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let shown = |bytes: usize| handle.render().contains(&format!("holdfast_half_sent_bytes {bytes}\n"));
    served(10, async |server| {
        let request = format!("*2\r\n$4\r\nECHO\r\n$40000\r\n{}\r\n", "x".repeat(40_000));
        let (half, other_half) = request.as_bytes().split_at(30_000);
        let half_sent = || server.cx.half_sent.get();
        let mut first = TcpStream::connect(server.address).await.unwrap();
        first.write_all(half).await.unwrap();
        until(|| half_sent() == half.len()).await;
        assert!(shown(half.len()), "{}", handle.render());
        talk(&mut first, other_half, "$40000\r\n").await;
        first.read_exact(&mut vec![0; 40_002]).await.unwrap();
        until(|| half_sent() == 0).await;
        assert!(shown(0), "{}", handle.render());
        // Now others have half-sent so much that there is no room for this: what is small goes on, what is not is closed.
        let others = INPUT_TOGETHER_MAX - 20_000;
        server.cx.half_sent.set(others);
        let mut little = TcpStream::connect(server.address).await.unwrap();
        little.write_all(&half[..16_000]).await.unwrap();
        until(|| half_sent() == others + 16_000).await;
        first.write_all(half).await.unwrap();
        // Not all of it was read, so the close may arrive as a reset.
        let _ = first.read_to_end(&mut Vec::new()).await;
        until(|| server.cx.registry.connected() == 1).await;
        until(|| half_sent() == others + 16_000).await;
        server.cx.half_sent.set(2 * INPUT_TOGETHER_MAX);
        talk(&mut little, b"x", "").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(server.cx.registry.connected(), 1, "as little as that each may have");
        drop(little);
        until(|| half_sent() == 2 * INPUT_TOGETHER_MAX - 16_000).await;
        assert!(shown(0), "{}", handle.render());
        // What is complete is taken, however much the others have.
        let mut whole = TcpStream::connect(server.address).await.unwrap();
        talk(&mut whole, &b"PING\r\n".repeat(10_000), &"+PONG\r\n".repeat(10_000)).await;
    })
    .await;
}

/// The SHA-256 of "secret".
const HASH: &str = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

#[tokio::test]
async fn strangers_cannot_have_known_clients_closed_by_what_they_half_send() {
    served_to(&format!("user known on #{HASH} +@all"), Duration::ZERO, async |server| {
        let connected = || server.cx.registry.connected();
        let half_sent = || server.cx.half_sent.get();
        let half = format!("*2\r\n$4\r\nECHO\r\n$16000\r\n{}", "x".repeat(8_000));
        let mut known = TcpStream::connect(server.address).await.unwrap();
        talk(&mut known, b"AUTH known secret\r\n", "+OK\r\n").await;
        let others = INPUT_TOGETHER_MAX / 2;
        server.cx.half_sent.set(others);
        // A stranger that sends more than its share has to go, where a known client goes on.
        let mut stranger = TcpStream::connect(server.address).await.unwrap();
        stranger.write_all(half.as_bytes()).await.unwrap();
        let _ = stranger.read_to_end(&mut Vec::new()).await;
        known.write_all(half.as_bytes()).await.unwrap();
        until(|| half_sent() == others + half.len()).await;
        let mut little = TcpStream::connect(server.address).await.unwrap();
        little.write_all(&half.as_bytes()[..INPUT_STRANGER_MAX]).await.unwrap();
        until(|| half_sent() == others + half.len() + INPUT_STRANGER_MAX).await;
        assert_eq!(connected(), 2);
        let rest = "x".repeat(8_000) + "\r\n";
        talk(&mut known, rest.as_bytes(), "$16000\r\n").await;
        known.read_exact(&mut vec![0; 16_002]).await.unwrap();
        assert_eq!(connected(), 2);
        little.write_all(b"x").await.unwrap();
        until(|| connected() == 1).await;
    })
    .await;
}

/// Takes the turn of this name's passwords: until it is dropped, all others of this machine wait for theirs.
fn take_turn(server: &Server, name: &[u8]) -> crate::session::guesses::Turn {
    let (from, now, delay) = (std::net::IpAddr::from([127, 0, 0, 1]), Instant::now(), server.cx.bounds.auth_delay);
    (0..GUESSES_FREE).for_each(|_| _ = server.cx.guesses.wrong(from, now, delay));
    server.cx.guesses.queue(from, name, now, delay).unwrap().begin().unwrap()
}

#[tokio::test]
async fn what_strangers_send_with_a_password_that_waits_and_behind_it_is_little_and_counted() {
    served_to(&format!("user shop on #{HASH} +@all"), Duration::from_millis(50), async |server| {
        let _turn = take_turn(&server, b"shop");
        let connected = || server.cx.registry.connected();
        let half_sent = || server.cx.half_sent.get();
        // After as many empty lines, which are skipped, a known client would be read in the largest pieces.
        let request = format!("{}AUTH shop x\r\n{}", "\r\n".repeat(62 << 10), "y".repeat(64 << 10));
        let strangers: Vec<_> = (0..20)
            .map(|_| {
                let (address, request) = (server.address, request.clone());
                tokio::task::spawn_local(async move {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    let _ = stream.write_all(request.as_bytes()).await;
                    std::future::pending::<()>().await;
                    drop(stream);
                })
            })
            .collect();
        until(|| {
            let clients = server.cx.registry.clients();
            clients.len() == strangers.len() && clients.iter().all(|client| client.profile().last_command == "AUTH")
        })
        .await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let most = strangers.len() * ("AUTHshopx".len() + INPUT_STRANGER_MAX + READ_MIN);
        assert!(half_sent() <= most, "{}", half_sent());
        // That they leave is not noticed, for they are not read.
        server.cx.registry.clients().iter().for_each(|client| client.kill("killed"));
        until(|| connected() == 0).await;
        // Now others have half-sent so much that there is only little for each stranger, be it in a request that waits or behind one.
        let others = INPUT_TOGETHER_MAX / 2;
        server.cx.half_sent.set(others);
        let mut little = TcpStream::connect(server.address).await.unwrap();
        little.write_all(b"AUTH shop x\r\nPING\r\n").await.unwrap();
        until(|| half_sent() == others + "AUTHshopxPING\r\n".len()).await;
        let much = "x".repeat(INPUT_STRANGER_MAX + 1);
        for request in [format!("AUTH shop {much}\r\n"), format!("AUTH shop x\r\n{much}")] {
            let mut stranger = TcpStream::connect(server.address).await.unwrap();
            stranger.write_all(request.as_bytes()).await.unwrap();
            let _ = stranger.read_to_end(&mut Vec::new()).await;
            until(|| connected() == 1).await;
        }
        little.write_all(much.as_bytes()).await.unwrap();
        until(|| connected() == 0).await;
        assert_eq!(half_sent(), others);
    })
    .await;
}

#[tokio::test]
async fn little_is_read_ahead_of_a_command_that_waits() {
    served(10, async |server| {
        let half_sent = || server.cx.half_sent.get();
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        // With reads that come back full, which ask for more each time.
        talk(&mut stream, &b"PING\r\n".repeat(50_000), &"+PONG\r\n".repeat(50_000)).await;
        stream.write_all(b"T.SLEEP 60000\r\n").await.unwrap();
        until(|| server.cx.registry.clients()[0].profile().last_command == "T.SLEEP").await;
        let behind = tokio::task::spawn_local(async move {
            let _ = stream.write_all(&b"PING\r\n".repeat(50_000)).await;
            stream
        });
        until(|| half_sent() >= INPUT_ALWAYS_MAX).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(half_sent() < INPUT_ALWAYS_MAX + READ_MIN, "{}", half_sent());
        server.cx.registry.clients()[0].kill("killed");
        drop(behind.await.unwrap());
        until(|| half_sent() == 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_stops_waiting_however_much_others_have_half_sent() {
    served(10, async |server| {
        server.cx.half_sent.set(2 * INPUT_TOGETHER_MAX);
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(b"T.SLEEP 60000\r\nPING\r\n").await.unwrap();
        until(|| server.cx.registry.clients().first().is_some_and(|client| client.profile().in_flight == 1)).await;
        drop(stream);
        until(|| server.cx.registry.connected() == 0).await;
    })
    .await;
}

#[tokio::test]
async fn those_who_are_right_do_not_wait_for_each_other_and_who_is_wrong_or_leaves_holds_up_no_longer_than_that() {
    let delay = Duration::from_millis(100);
    served_to(&format!("user shop on #{HASH} +@all"), delay, async |server| {
        let connect = async || TcpStream::connect(server.address).await.unwrap();
        let wrong = "-WRONGPASS invalid username-password pair or user is disabled.\r\n";
        let mut guesser = connect().await;
        for _ in 0..6 {
            talk(&mut guesser, b"AUTH shop x\r\n", wrong).await;
        }
        // The seventh answer waits for 400 ms. It leaves, and so do two that queue behind it.
        let from = std::net::IpAddr::from([127, 0, 0, 1]);
        let is_free = || server.cx.guesses.queue(from, b"shop", Instant::now(), delay).is_some_and(|queue| queue.begin().is_some());
        until(is_free).await;
        let began = Instant::now();
        guesser.write_all(b"AUTH shop x\r\n").await.unwrap();
        until(|| !is_free()).await;
        drop(guesser);
        for _ in 0..2 {
            let mut leaves = connect().await;
            leaves.write_all(b"AUTH shop y\r\n").await.unwrap();
            until(|| server.cx.registry.connected() == 1).await;
            drop(leaves);
            until(|| server.cx.registry.connected() == 0).await;
        }
        let mut right = Vec::new();
        for _ in 0..50 {
            let mut stream = connect().await;
            stream.write_all(b"AUTH shop secret\r\n").await.unwrap();
            right.push(stream);
        }
        for stream in &mut right {
            expect(stream, "+OK\r\n").await;
        }
        let took = began.elapsed();
        // Were each as long as a wrong one, they would take 25 s.
        assert!(took >= delay * 4 && took < Duration::from_secs(10), "{took:?}");
        // None of these has counted as wrong: it is the eighth.
        assert_eq!(server.cx.guesses.wrong(from, Instant::now(), delay), delay * 5);
    })
    .await;
}

#[tokio::test]
async fn a_stranger_that_leaves_keeps_its_place_for_no_wrong_answer_also_not_for_the_last() {
    let (users, delay) = (format!("user shop on #{HASH} +@all"), Duration::from_secs(60));
    for failures_max in [1, 2] {
        served_with(&users, delay, failures_max, async |server| {
            let from = std::net::IpAddr::from([127, 0, 0, 1]);
            (0..GUESSES_FREE).for_each(|_| _ = server.cx.guesses.wrong(from, Instant::now(), delay));
            let mut stranger = TcpStream::connect(server.address).await.unwrap();
            stranger.write_all(b"AUTH shop x\r\n").await.unwrap();
            until(|| server.cx.registry.clients().first().is_some_and(|client| client.profile().in_flight == 1)).await;
            drop(stranger);
            until(|| server.cx.registry.connected() == 0).await;
        })
        .await;
    }
}

#[tokio::test]
async fn who_may_not_have_its_subscriptions_as_another_user_does_not_become_that_user_with_them() {
    let users = format!("user a on #{HASH} +@all allchannels\nuser b on #{HASH} +@all\nuser c on #{HASH} +@all allchannels");
    served_to(&users, Duration::ZERO, async |server| {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(b"AUTH a secret\r\nHELLO 3\r\nSUBSCRIBE x\r\nAUTH c secret\r\nAUTH b secret\r\nPING\r\n").await.unwrap();
        let said = rest(stream).await;
        let end =
            ">3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n+OK\r\n-NOPERM this user may not have what the connection has subscribed to\r\n";
        assert!(said.ends_with(end), "{said}");
    })
    .await;
}

#[tokio::test]
async fn what_waits_for_its_turn_is_shown_once() {
    let delay = Duration::from_millis(20);
    served_to(&format!("user shop on #{HASH} +@all"), delay, async |server| {
        let mut watching = TcpStream::connect(server.address).await.unwrap();
        talk(&mut watching, b"AUTH shop secret\r\nMONITOR\r\n", "+OK\r\n+OK\r\n").await;
        let guess = async |n: usize| {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(b"AUTH shop x\r\n").await.unwrap();
            expect(&mut stream, "-WRONGPASS").await;
            n
        };
        for n in 0..4 {
            guess(n).await;
        }
        // All of these at once: five have to wait.
        tokio::join!(guess(4), guess(5), guess(6), guess(7), guess(8), guess(9));
        let mut last = TcpStream::connect(server.address).await.unwrap();
        last.write_all(b"HELLO 9\r\n").await.unwrap();
        let mut read = BytesMut::new();
        while !String::from_utf8_lossy(&read).contains("HELLO") {
            assert!(watching.read_buf(&mut read).await.unwrap() > 0);
        }
        assert_eq!(String::from_utf8_lossy(&read).matches("\"AUTH\"").count(), 10);
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
async fn patterns_are_bounded_a_client_and_together_and_given_back() {
    served(100, async |server| {
        let hub = server.cx.subscribers.hub();
        let patterns = |client: usize, count: usize| -> String { (0..count).map(|n| format!(" p-{client}-{n}-*")).collect() };
        let mut clients = Vec::new();
        for client in 0..PATTERNS_TOGETHER_MAX / PATTERNS_MAX {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(format!("PSUBSCRIBE{}\r\n", patterns(client, PATTERNS_MAX)).as_bytes()).await.unwrap();
            clients.push(stream);
        }
        until(|| hub.len(crate::session::hub::Kind::Pattern) == PATTERNS_TOGETHER_MAX).await;
        let mut one_more = TcpStream::connect(server.address).await.unwrap();
        let refused = "-ERR too many patterns: a connection may have 64\r\n";
        talk(&mut one_more, format!("PSUBSCRIBE{}\r\n", patterns(0, PATTERNS_MAX + 1)).as_bytes(), refused).await;
        let refused = "-ERR too many patterns: all clients together may have 1024 different ones\r\n";
        talk(&mut one_more, b"PSUBSCRIBE new-*\r\n", refused).await;
        // What others have subscribed to costs no more.
        talk(&mut one_more, b"PSUBSCRIBE p-0-0-*\r\n", "*3\r\n$10\r\npsubscribe\r\n$7\r\np-0-0-*\r\n:1\r\n").await;
        drop(clients);
        until(|| hub.len(crate::session::hub::Kind::Pattern) == 1).await;
        talk(&mut one_more, b"PSUBSCRIBE new-*\r\n", "*3\r\n$10\r\npsubscribe\r\n$5\r\nnew-*\r\n:2\r\n").await;
    })
    .await;
}

#[tokio::test]
async fn no_connection_takes_the_patterns_of_all() {
    served(10, async |server| {
        let mut greedy = TcpStream::connect(server.address).await.unwrap();
        let pattern = |n: usize| format!("*{}{n:03}", "x".repeat(100));
        let refused =
            format!("-ERR too many patterns: a connection may have {PATTERN_TAILS_EACH_MAX} bytes behind the first star of each\r\n");
        let request = (0..3).map(|n| format!(" {}", pattern(n))).collect::<String>();
        talk(&mut greedy, format!("PSUBSCRIBE{request}\r\n").as_bytes(), &refused).await;
        for (n, count) in [(0, 1), (1, 2), (0, 2)] {
            let confirmed = format!("*3\r\n$10\r\npsubscribe\r\n$104\r\n{}\r\n:{count}\r\n", pattern(n));
            talk(&mut greedy, format!("PSUBSCRIBE {}\r\n", pattern(n)).as_bytes(), &confirmed).await;
        }
        talk(&mut greedy, format!("PSUBSCRIBE {}\r\n", pattern(2)).as_bytes(), &refused).await;
        let mut other = TcpStream::connect(server.address).await.unwrap();
        let most = format!("*{}", "y".repeat(PATTERN_TAILS_EACH_MAX - 1));
        let confirmed = format!("*3\r\n$10\r\npsubscribe\r\n${}\r\n{most}\r\n:1\r\n", most.len());
        talk(&mut other, format!("PSUBSCRIBE {most}\r\n").as_bytes(), &confirmed).await;
    })
    .await;
}

#[tokio::test]
async fn what_pubsub_channels_shows_and_compares_is_bounded() {
    served(10, async |server| {
        let name = |client: usize, n: usize| format!("{:x<250}", format!("c-{client}-{n}-"));
        let mut clients = Vec::new();
        for client in 0..5 {
            let channels: String = (0..1_000).map(|n| format!("$250\r\n{}\r\n", name(client, n))).collect();
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(format!("*1001\r\n$9\r\nSUBSCRIBE\r\n{channels}").as_bytes()).await.unwrap();
            let channel = Bytes::from(name(client, 999));
            until(|| server.cx.subscribers.hub().count(crate::session::hub::Kind::Channel, &channel) == 1).await;
            clients.push(stream);
        }
        let mut asks = TcpStream::connect(server.address).await.unwrap();
        let refused = "-ERR too many channels: name a narrower pattern\r\n";
        talk(&mut asks, b"PUBSUB CHANNELS\r\n", refused).await;
        talk(&mut asks, b"PUBSUB CHANNELS c-*\r\n", refused).await;
        talk(&mut asks, b"PUBSUB CHANNELS c-3-77-*\r\n", &format!("*1\r\n$250\r\n{}\r\n", name(3, 77))).await;
        talk(&mut asks, b"PUBSUB CHANNELS *z\r\n", "*0\r\n").await;
        // Each of them is compared with it at a hundred places.
        talk(&mut asks, format!("PUBSUB CHANNELS *{}y\r\n", "x".repeat(100)).as_bytes(), refused).await;
    })
    .await;
}

#[tokio::test]
async fn who_monitors_may_still_ask() {
    served(10, async |server| {
        for protocol in ["2", "3"] {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(format!("HELLO {protocol}\r\nMONITOR\r\nPING\r\nECHO \"it's\"\r\n").as_bytes()).await.unwrap();
            let mut read = BytesMut::new();
            let said = loop {
                let more = stream.read_buf(&mut read).await.unwrap();
                let said = String::from_utf8_lossy(&read).into_owned();
                assert!(more > 0, "closed: {said}");
                if said.contains(" \"ECHO\" \"it's\"\r\n") && said.contains("$4\r\nit's\r\n") {
                    break said;
                }
            };
            let lines: Vec<&str> = said.lines().filter(|line| !line.contains("[0 127.0.0.1:")).collect();
            assert!(lines.ends_with(&["+OK", "+PONG", "$4", "it's"]), "{said}");
        }
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
async fn once_all_leave_much_unread_a_subscriber_that_reads_nothing_is_cut_off_soon_and_one_that_reads_is_not() {
    served(10, async |server| {
        let connected = || server.cx.registry.connected();
        let mut deaf = TcpStream::connect(server.address).await.unwrap();
        let mut reading = TcpStream::connect(server.address).await.unwrap();
        for stream in [&mut deaf, &mut reading] {
            talk(stream, b"SUBSCRIBE a\r\n", "*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n").await;
        }
        let message = format!("*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$1000\r\n{}\r\n", "x".repeat(1_000));
        let payload = Bytes::from(vec![b'x'; 1_000]);
        let others = OUTPUT_TOGETHER_MAX + 1;
        server.cx.unread.set(others);
        let mut published = 0;
        let mut unread_since = None;
        while connected() == 2 {
            server.cx.subscribers.hub().publish("a", || payload.clone());
            published += 1;
            expect(&mut reading, &message).await;
            // What the kernel takes does not count.
            if server.cx.unread.get() > others + OUTPUT_STRANGER_MAX {
                unread_since.get_or_insert(published);
            }
            assert!(published < 100_000);
        }
        let after = published - unread_since.unwrap();
        assert!(after <= 3 * OUTPUT_STRANGER_MAX / 1_000, "{after}");
        talk(&mut reading, b"PING\r\n", "*2\r\n$4\r\npong\r\n$0\r\n\r\n").await;
        assert_eq!((connected(), server.cx.unread.get()), (1, others));
        drop(deaf);
    })
    .await;
}

#[tokio::test]
async fn who_subscribes_to_much_at_once_is_told_so_whole_however_much_others_leave_unread() {
    served(10, async |server| {
        let others = OUTPUT_TOGETHER_MAX + 1;
        server.cx.unread.set(others);
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let (channels, confirmations): (String, String) =
            (1..=1_000).map(|n| (format!(" c{n:04}"), format!("*3\r\n$9\r\nsubscribe\r\n$5\r\nc{n:04}\r\n:{n}\r\n"))).unzip();
        talk(&mut stream, format!("SUBSCRIBE{channels}\r\nPING\r\n").as_bytes(), &confirmations).await;
        expect(&mut stream, "*2\r\n$4\r\npong\r\n$0\r\n\r\n").await;
        until(|| server.cx.unread.get() == others).await;
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
async fn how_long_clients_may_be_silent_is_changed_for_those_who_are() {
    served(10, async |server| {
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        let mut subscriber = TcpStream::connect(server.address).await.unwrap();
        let mut operator = TcpStream::connect(server.address).await.unwrap();
        talk(&mut silent, b"PING\r\n", "+PONG\r\n").await;
        talk(&mut subscriber, b"SUBSCRIBE a\r\n", "*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n").await;
        // An hour's timer runs when it becomes a second.
        talk(&mut operator, b"CONFIG SET timeout 3600\r\n", "+OK\r\n").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        let began = Instant::now();
        talk(&mut operator, b"CONFIG SET timeout 1\r\n", "+OK\r\n").await;
        assert_eq!(rest(silent).await, "");
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert_eq!(rest(operator).await, "");
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
async fn a_client_can_be_killed_by_another_or_itself_and_is_counted() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let _guard = metrics::set_default_local_recorder(&recorder);
    served(10, async |server| {
        let mut victim = TcpStream::connect(server.address).await.unwrap();
        talk(&mut victim, b"CLIENT ID\r\n", ":1\r\n").await;
        let mut other = TcpStream::connect(server.address).await.unwrap();
        talk(&mut other, b"CLIENT KILL ID 1\r\n", ":1\r\n").await;
        assert_eq!(rest(victim).await, "");
        until(|| server.cx.registry.connected() == 1).await;
        talk(&mut other, b"CLIENT KILL SKIPME no\r\n", ":1\r\n").await;
        assert_eq!(rest(other).await, "");
        let counted = handle.render();
        assert!(counted.contains("holdfast_closed_connections_total{why=\"killed\"} 2"), "{counted}");
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
