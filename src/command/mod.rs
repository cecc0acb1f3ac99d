//! The table of commands, argument matching, dispatch, the handlers. Sees requests and replies, never a socket.
//!
//! - [`spec`]: how a command is declared; [`table`]: every command there is.
//! - [`args`]: a request matched against its spec.
//! - [`describe`]: COMMAND, COMMAND DOCS and the README's table, from the specs.
//! - [`stats`]: what INFO and the metrics count; [`info`]: INFO's text.
//! - [`connection`], [`client`], [`server`], [`slowlog`]: the session's and the server's own commands.
//! - [`pubsub`]: channels, and MONITOR; [`passthrough`]: reading the backing Redis.
//! - [`acl`]: the users; `rights`: what each may run, and the log of what operators did.
//! - [`stock`], [`coupon`], [`lock`], [`holdfast`], [`drain`], [`dead_letter`]: what Holdfast is for; [`backend`]: what they work with; [`ack`], [`replicas`]: replies that wait for Postgres, or for a replica.

pub mod ack;
pub mod acl;
pub mod args;
pub mod backend;
mod change;
pub mod client;
pub mod connection;
pub mod coupon;
pub mod dead_letter;
pub mod describe;
mod doubt;
pub mod drain;
pub mod first_use;
mod heartbeat;
pub mod holdfast;
pub mod info;
pub mod lock;
pub mod order;
pub mod passthrough;
pub mod pubsub;
mod read;
mod refusals;
pub mod replicas;
mod rights;
pub mod server;
pub mod slowlog;
pub mod spec;
pub mod stats;
pub mod stock;
pub mod table;

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio_util::sync::CancellationToken;

pub use args::{Ack, Args};
pub use backend::Backend;
pub use drain::Drain;
pub use heartbeat::Heartbeat;
pub use refusals::Refusals;
pub use slowlog::SlowLog;
pub use spec::Spec;
pub use stats::Stats;
pub use table::Commands;

use crate::limits::ERROR_ECHO_MAX;
use crate::resp::{Pipeline, Reply, Request, Stamp, Ticket};
use crate::session::bounds::Bounds;
use crate::session::chatter::{self, Line};
use crate::session::client::{Replies, Session};
use crate::session::guesses::{Guesses, Waited};
use crate::session::hub::Subscribers;
use crate::session::registry::{Blocked, Registry};
use crate::session::user::User;
use crate::session::users::{Directory, Users};
use crate::store::reads::Reads;

/// A future that stays on its thread.
pub type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Runs one command. Handlers of one connection are called in the order of its requests and never wait: what takes time is answered
/// through a ticket or a future.
pub type Handler = fn(&mut Call<'_>) -> Step;

/// What a handler has done.
pub enum Step {
    /// The reply is known.
    Reply(Reply),
    /// The ticket that was taken is completed later; the commands behind run meanwhile.
    Later,
    /// Runs alone on its connection: starts when every earlier reply is done, and the commands behind wait for it. One that is flagged
    /// BLOCKING is dropped if the client leaves.
    Wait(LocalBoxFuture<'static, Reply>),
    /// The last reply of this connection.
    Close(Reply),
    /// The same, of a command that runs alone.
    CloseAfter(LocalBoxFuture<'static, Reply>),
    /// It is not its turn yet: the same request runs again when that is known, and the commands behind wait for it.
    Again(LocalBoxFuture<'static, Waited>),
}

/// One command under way, as its handler sees it.
pub struct Call<'a> {
    pub cx: &'a Rc<Context>,
    pub session: &'a mut Session,
    pub args: Args,
    /// When the request was read.
    pub arrived: Instant,
    pipeline: &'a Rc<Pipeline>,
}

impl Call<'_> {
    /// Reserves this command's place in the replies, for [`Step::Later`].
    pub fn ticket(&self) -> Ticket {
        self.pipeline.ticket()
    }

    /// Reserves this command's place in the replies, with so much more time than a reply has by itself.
    pub fn ticket_with(&self, more: Duration) -> Ticket {
        self.pipeline.allow(more);
        self.pipeline.ticket()
    }

    /// The connection's replies: a command that sends several pushes all but the last here, and what sends messages keeps it.
    pub fn pipeline(&self) -> &Rc<Pipeline> {
        self.pipeline
    }
}

/// What the handlers of one thread share.
pub struct Context {
    pub commands: Rc<Commands>,
    pub registry: Arc<Registry>,
    pub users: Arc<Directory>,
    pub bounds: Arc<Bounds>,
    pub guesses: Arc<Guesses>,
    /// The subscribers of this thread.
    pub subscribers: Rc<Subscribers>,
    /// Bytes that the clients of this thread leave unread, all together: replies and messages.
    pub unread: Rc<Cell<usize>>,
    /// Bytes that they have sent and that are no request yet, none that could be taken, or one that waits for its turn.
    pub half_sent: Cell<usize>,
    /// The same of all threads, for people.
    pub half_sent_gauge: metrics::Gauge,
    pub stats: Arc<Stats>,
    pub slow: Arc<SlowLog>,
    pub heartbeat: Rc<Heartbeat>,
    pub drain: Arc<Drain>,
    /// While set, the error that every command without the LOADING flag gets: `LOADING ...`.
    pub refusal: Cell<Option<&'static str>>,
    /// The commands that are refused as they come, since too much waits.
    pub refused_early: Refusals,
    /// What CONFIG GET shows, secrets left out.
    pub settings: RefCell<Vec<(&'static str, String)>>,
    /// What INFO shows besides its own sections.
    pub sections: RefCell<Vec<info::Section>>,
    pub backend: Backend,
    /// What replies wait for whose clients do not say, by command, where that was set otherwise than the command has it.
    pub acks_set: HashMap<&'static str, Ack>,
    /// Read buffers that nobody has, for whoever reads next.
    pub read_buffers: RefCell<Vec<BytesMut>>,
    /// What reads the backing Redis for people, where that is on.
    pub passing: Option<Rc<Reads>>,
}

impl Context {
    /// `stats` must have been made of the same table.
    pub fn new(commands: Rc<Commands>, registry: Arc<Registry>, stats: Arc<Stats>, backend: Backend) -> Self {
        Self {
            commands,
            registry,
            users: Arc::new(Directory::new(Users::open())),
            bounds: Arc::new(Bounds::default()),
            guesses: Arc::default(),
            subscribers: Subscribers::new(Arc::default()),
            unread: Rc::default(),
            half_sent: Cell::new(0),
            half_sent_gauge: metrics::gauge!("holdfast_half_sent_bytes"),
            stats,
            slow: Arc::default(),
            heartbeat: Heartbeat::new(),
            drain: Arc::new(Drain::new(CancellationToken::new(), Duration::ZERO)),
            refusal: Cell::new(None),
            refused_early: Refusals::default(),
            settings: RefCell::new(server::settings()),
            sections: RefCell::new(Vec::new()),
            backend,
            acks_set: HashMap::new(),
            read_buffers: RefCell::default(),
            passing: None,
        }
    }

    /// Counts an operation that is refused for want of time.
    pub fn refused_for_time(&self) {
        self.refused_early.add(self.backend.served(), Instant::now());
    }

    /// Whether there shall be no more refusals for want of time for now. `still`: as of [`Refusals::are_spent`].
    pub fn has_refused_enough(&self, still: Duration) -> bool {
        self.refused_early.are_spent(self.backend.served(), Instant::now(), still)
    }
}

/// Counts a connection that the server closes, and why.
pub fn closed(why: &'static str) {
    metrics::counter!("holdfast_closed_connections_total", "why" => why).increment(1);
}

/// A command that runs alone on its connection.
pub struct Waiting {
    pub ticket: Ticket,
    pub future: LocalBoxFuture<'static, Reply>,
    /// Whether it is given up when its client leaves, as what may wait long is.
    pub gives_up: bool,
    /// Whether its reply is the last of the connection.
    pub closes: bool,
    /// The rights that it needs; a stranger's needs none.
    needed: Option<Box<rights::Needed>>,
    /// That it is counted among those that may wait long, if it is.
    _blocked: Option<Blocked>,
}

impl Waiting {
    /// Whether this user may run it.
    pub fn is_permitted_to(&self, user: &User) -> bool {
        self.needed.as_ref().is_none_or(|needed| needed.are_had_by(user))
    }
}

/// What the connection does after a command was dispatched.
pub enum After {
    /// Goes on with the next.
    Next,
    /// Polls the future once its ticket is first in line, completes it, then goes on.
    Wait(Waiting),
    /// Sends what is due and closes.
    Close,
    /// Closes at once, without a word.
    Drop,
    /// Dispatches the request once more with what comes of that, and nothing before.
    Again(Request, LocalBoxFuture<'static, Waited>),
}

/// Runs one request, in Redis's order: look up, arity, rights, arguments, handler.
pub fn dispatch(cx: &Rc<Context>, session: &mut Session, pipeline: &Rc<Pipeline>, request: Request, arrived: Instant) -> After {
    let asked = session.replies;
    let silent = session.mute_next();
    let replies = session.replies;
    let stamp = Stamp { tag: cx.commands.len(), arrived, due: None, protocol: session.protocol, silent };
    let (index, spec) = match cx.commands.find(&request) {
        Ok(found) => found,
        Err(_) if is_http(&request[0]) => {
            if let Some(left_out) = chatter::allows(Line::Http) {
                tracing::warn!(client = %session.client.address, left_out, "an HTTP request on the RESP port: closed, for it may come from a browser");
            }
            closed("http");
            return After::Drop;
        }
        Err(error) => {
            pipeline.stamp(stamp);
            pipeline.push_ready(Reply::error(error));
            return After::Next;
        }
    };
    let due = spec.is_timed().then(|| arrived + cx.backend.reply_within + spec.more_time);
    let stamp = Stamp { tag: index, due, ..stamp };
    pipeline.stamp(stamp);
    session.last_command = spec.name;
    let mut needed = None;
    let mut call = Call { cx, session: &mut *session, args: Args::unmatched(spec, request), arrived, pipeline };
    let step = match check(&mut call, index) {
        Err(error) => Step::Reply(Reply::error(error)),
        Ok(run) => {
            let step = run(&mut call);
            if matches!(step, Step::Wait(_) | Step::CloseAfter(_)) && call.session.authenticated {
                needed = Some(Box::new(rights::Needed::by(index, spec, &call.args)));
            }
            step
        }
    };
    let Call { session, args, .. } = &mut call;
    // HELLO and CLIENT REPLY decide about their own reply.
    let silent = if session.replies == replies { silent } else { session.replies != Replies::On };
    if (session.protocol, silent) != (stamp.protocol, stamp.silent) {
        pipeline.stamp(Stamp { protocol: session.protocol, silent, ..stamp });
    }
    // One that has gone is not to keep its place until a wrong password is answered.
    let is_stranger = !session.authenticated;
    match step {
        Step::Reply(reply) => pipeline.push_ready(reply),
        Step::Later => {}
        Step::Wait(future) => {
            let is_blocking = spec.is(spec::BLOCKING);
            let (gives_up, blocked) = (is_blocking || is_stranger, is_blocking.then(|| cx.registry.block()));
            return After::Wait(Waiting { ticket: pipeline.ticket(), future, gives_up, closes: false, needed, _blocked: blocked });
        }
        Step::CloseAfter(future) => {
            let ticket = pipeline.ticket();
            return After::Wait(Waiting { ticket, future, gives_up: is_stranger, closes: true, needed, _blocked: None });
        }
        Step::Close(reply) => {
            pipeline.push_ready(reply);
            return After::Close;
        }
        Step::Again(waiting) => {
            session.replies = asked;
            // What was read with it is not to stay in memory as long as it waits.
            return After::Again(args.words().detached(), waiting);
        }
    }
    After::Next
}

/// Everything that can refuse a command before it runs. Matches its arguments.
fn check(call: &mut Call<'_>, number: usize) -> Result<Handler, Cow<'static, str>> {
    let Call { cx, session, args, .. } = call;
    let spec = args.spec();
    let run = spec.run.ok_or_else(|| args::wrong_arity(spec))?;
    if !args::arity_fits(spec, args.words().len()) {
        return Err(args::wrong_arity(spec).into());
    }
    if !session.authenticated && !spec.is(spec::NOAUTH) {
        return Err("NOAUTH Authentication required.".into());
    }
    let restricted = !session.user().is_unrestricted();
    if restricted && session.authenticated {
        rights::may_run(session, number, spec)?;
    }
    if let Some(refusal) = cx.refusal.get().or_else(|| cx.drain.refusal(spec)).filter(|_| !spec.is(spec::LOADING)) {
        return Err(refusal.into());
    }
    if let Some(refusal) = spec.early.and_then(|early| early(cx)) {
        cx.refused_for_time();
        return Err(refusal.into());
    }
    if session.has_subscribed
        && let Some(refusal) = pubsub::refusal(session, spec)
    {
        return Err(refusal.into());
    }
    args.match_words()?;
    if restricted {
        rights::may_touch(session, spec, args)?;
    }
    if spec.is(spec::ADMIN) {
        rights::audit(session, spec, args);
    }
    // One that has waited for its turn was shown as it came.
    if cx.subscribers.hub().has_monitors() && session.turn.is_none() {
        pubsub::show(cx, session, spec, args.words());
    }
    Ok(run)
}

/// Whether the name is the start of an HTTP request. A web page can make a browser POST to a port on the reader's own machine; what
/// stands in such a request must not run as commands.
fn is_http(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"POST") || name.eq_ignore_ascii_case(b"Host:")
}

/// Redis's words for a command it does not know.
fn unknown_command(words: &Request) -> String {
    let mut beginning = String::new();
    for word in words.iter().skip(1) {
        if beginning.len() >= ERROR_ECHO_MAX {
            break;
        }
        beginning.push_str(&format!("'{}' ", cut(word, ERROR_ECHO_MAX - beginning.len())));
    }
    format!("ERR unknown command '{}', with args beginning with: {beginning}", cut(&words[0], ERROR_ECHO_MAX))
}

/// What a client sent, fit to be repeated in an error: at most `bytes_max` bytes of it, up to the first zero byte.
pub fn cut(bytes: &[u8], bytes_max: usize) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len()).min(bytes_max);
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A client without a socket: sends requests, reads the bytes of their replies.
    pub(crate) struct Wire {
        pub(crate) cx: Rc<Context>,
        session: Session,
        pipeline: Rc<Pipeline>,
    }

    impl Wire {
        pub(crate) fn new() -> Self {
            Self::with_users(Users::open())
        }

        pub(crate) fn with_users(users: Users) -> Self {
            let commands = Rc::new(Commands::new(table::TABLE));
            let stats = Arc::new(Stats::new(&commands));
            let mut cx = Context::new(commands, Arc::new(Registry::new(10)), stats, Backend::unconnected());
            cx.users = Arc::new(Directory::new(users));
            let session = crate::session::client::tests::session_of(&cx.users);
            let pipeline = Pipeline::new(Rc::clone(&cx.unread));
            Self { cx: Rc::new(cx), session, pipeline }
        }

        /// The client whose requests these are.
        pub(crate) fn client(&self) -> &crate::session::client::Client {
            &self.session.client
        }

        /// Begins a command, as the connection does.
        pub(crate) fn begin(&mut self, request: Request) -> After {
            dispatch(&self.cx, &mut self.session, &self.pipeline, request, Instant::now())
        }

        /// Sends words separated by single spaces; returns what was answered at once.
        pub(crate) fn send(&mut self, request: &str) -> String {
            self.begin(request.split(' ').collect());
            let mut out = BytesMut::new();
            while let Some(ready) = self.pipeline.pop_ready() {
                self.cx.stats.replied(ready.stamp.tag, &ready.reply, ready.stamp.arrived.elapsed());
                if !ready.stamp.silent {
                    ready.reply.encode(&mut out, ready.stamp.protocol);
                }
            }
            String::from_utf8_lossy(&out).into_owned()
        }
    }

    /// Checks requests and their replies, each on a connection of its own.
    pub(crate) fn answers(rows: &[(&str, &str)]) {
        for (request, reply) in rows {
            assert_eq!(Wire::new().send(request), *reply, "{request}");
        }
    }

    #[test]
    fn what_cannot_be_served_now_says_so() {
        let mut wire = Wire::new();
        wire.cx.refusal.set(Some("LOADING Holdfast is starting"));
        assert_eq!(wire.send("PING"), "+PONG\r\n");
        assert_eq!(wire.send("STOCK.GET a"), "-LOADING Holdfast is starting\r\n");
        wire.cx.refusal.set(None);
        wire.cx.drain.begin();
        let refused = "-LOADING Holdfast is draining: go on with another sidecar\r\n";
        assert_eq!(wire.send("STOCK.GET a"), refused);
        assert_eq!(wire.send("LOCK.ACQUIRE a"), refused);
        // What ends what was begun goes on.
        for request in ["LOCK.RELEASE a 1", "LOCK.EXTEND a 1 1000", "LOCK.CHECK a 1", "HOLDFAST.AWAIT 1-1"] {
            let after = wire.begin(request.split(' ').collect());
            assert!(matches!(after, After::Wait(_)), "{request}");
        }
        let mut wire = Wire::new();
        wire.cx.drain.begin();
        assert_eq!(wire.send("PING"), "+PONG\r\n");
        let users = Users::read(None, Some("x"), &Commands::new(table::TABLE)).unwrap();
        let mut wire = Wire::with_users(users);
        assert_eq!(wire.send("PING"), "-NOAUTH Authentication required.\r\n");
        assert!(wire.send("HELLO 3").starts_with("-NOAUTH HELLO must be called"));
        assert_eq!(wire.send("AUTH default x"), "+OK\r\n");
        assert_eq!(wire.send("PING"), "+PONG\r\n");
        assert_eq!(wire.send("RESET"), "+RESET\r\n");
        assert_eq!(wire.send("PING"), "-NOAUTH Authentication required.\r\n");
        assert_eq!(wire.send("AUTH x"), "+OK\r\n");
    }

    #[test]
    fn what_is_refused_early_is_not_looked_at() {
        static EARLY: Spec = Spec::new("T.EARLY", "Is refused.")
            .args(&[spec::integer("number", 1, 9, "")])
            .refused_early(|cx| cx.refusal.get().is_none().then_some("TRYAGAIN later"))
            .run(|_| Step::Reply(Reply::ok()));
        static TABLE: &[&Spec] = &[&EARLY];
        let commands = Rc::new(Commands::new(TABLE));
        let stats = Arc::new(Stats::new(&commands));
        let mut wire = Wire::new();
        wire.cx = Rc::new(Context::new(commands, Arc::new(Registry::new(10)), stats, Backend::unconnected()));
        assert_eq!(wire.send("T.EARLY no-number"), "-TRYAGAIN later\r\n");
        assert!(wire.send("T.EARLY 1 2").starts_with("-ERR wrong number of arguments"));
        wire.session.authenticated = false;
        assert!(wire.send("T.EARLY 1").starts_with("-NOAUTH "));
    }

    #[test]
    fn an_unknown_command_is_named_in_redis_words() {
        let words = |text: &str| text.split(' ').collect();
        assert_eq!(unknown_command(&words("foo a b")), "ERR unknown command 'foo', with args beginning with: 'a' 'b' ");
        assert_eq!(unknown_command(&words("foo")), "ERR unknown command 'foo', with args beginning with: ");
        let long = unknown_command(&words(&format!("{} {} {} x", "f".repeat(200), "a".repeat(100), "b".repeat(100))));
        let expected = format!("'{}', with args beginning with: '{}' '{}' ", "f".repeat(128), "a".repeat(100), "b".repeat(25));
        assert_eq!(long, format!("ERR unknown command {expected}"));
    }

    #[test]
    fn a_browser_is_told_from_a_client() {
        assert!(is_http(b"post") && is_http(b"HOST:"));
        assert!(!is_http(b"GET"));
    }
}
