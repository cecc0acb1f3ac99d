//! What is known of one client while it is connected.

use std::any::Any;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::Instant;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::guesses::Waited;
use super::user::User;
use super::users::{Directory, Login};
use crate::resp::{Pipeline, Protocol};

/// What a client said about itself and did last, for others to see.
#[derive(Clone, Debug)]
pub struct Profile {
    pub name: String,
    pub lib_name: String,
    pub lib_ver: String,
    pub protocol: Protocol,
    pub last_command: &'static str,
    pub last_seen: Instant,
    /// Requests that wait for their reply.
    pub in_flight: usize,
    /// Bytes read but not yet dispatched, and bytes not yet sent.
    pub input_bytes: usize,
    pub output_bytes: usize,
    /// What it has subscribed to.
    pub channels: Names,
    pub patterns: Names,
    /// The number of the command by which it watches what all clients send, if it does.
    pub monitors: Option<usize>,
    /// Who it is, once that is known.
    pub login: Option<Login>,
}

/// Channels or patterns, with numbers that grow in the order subscribed to.
pub type Names = HashMap<Bytes, u64, foldhash::fast::RandomState>;

impl Profile {
    /// Whether it has subscribed to anything.
    pub fn subscribes(&self) -> bool {
        !self.channels.is_empty() || !self.patterns.is_empty()
    }

    /// Whether this user may have what messages come to it for: its subscriptions, and MONITOR.
    pub fn suits(&self, user: &User) -> bool {
        self.channels.keys().all(|channel| user.may_watch(channel))
            && self.patterns.keys().all(|pattern| user.may_watch_pattern(pattern))
            && self.monitors.is_none_or(|number| user.may_run(number))
    }
}

/// One connected client, as every thread may see it.
#[derive(Debug)]
pub struct Client {
    pub id: u64,
    pub address: SocketAddr,
    pub local: SocketAddr,
    /// The socket's descriptor, for CLIENT LIST.
    pub fd: i32,
    pub created: Instant,
    /// Ends the connection after what is in flight: by a shutdown or a kill.
    pub stop: CancellationToken,
    /// Why it was killed, if it was.
    killed: OnceLock<&'static str>,
    /// Lets its connection look again at what it waits for.
    waker: OnceLock<Waker>,
    profile: Mutex<Profile>,
}

impl Client {
    pub fn new(id: u64, address: SocketAddr, local: SocketAddr, fd: i32, stop: CancellationToken) -> Self {
        let now = Instant::now();
        let profile = Profile {
            name: String::new(),
            lib_name: String::new(),
            lib_ver: String::new(),
            protocol: Protocol::Resp2,
            last_command: "NULL",
            last_seen: now,
            in_flight: 0,
            input_bytes: 0,
            output_bytes: 0,
            channels: Names::default(),
            patterns: Names::default(),
            monitors: None,
            login: None,
        };
        Self { id, address, local, fd, created: now, stop, killed: OnceLock::new(), waker: OnceLock::new(), profile: Mutex::new(profile) }
    }

    /// Notes how the task of its connection is woken; a task stays the same.
    pub fn waits(&self, waker: &Waker) {
        self.waker.get_or_init(|| waker.clone());
    }

    /// Lets the connection look again at what it waits for.
    pub fn wake(&self) {
        self.waker.get().into_iter().for_each(Waker::wake_by_ref);
    }

    /// What it said and did; held only for a moment, never across an await.
    pub fn profile(&self) -> MutexGuard<'_, Profile> {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection without waiting for what is in flight, and says why, as it is counted.
    pub fn kill(&self, why: &'static str) {
        self.killed.get_or_init(|| why);
        self.stop.cancel();
    }

    /// Why it was killed, if it was.
    pub fn killed(&self) -> Option<&'static str> {
        self.killed.get().copied()
    }

    /// The client's line in CLIENT LIST, in Redis 7.2's format, without a line end.
    pub fn line(&self) -> String {
        let profile = self.profile();
        let mut line = String::with_capacity(320);
        let flags = match (profile.monitors.is_some(), profile.subscribes()) {
            (true, _) => "O",
            (false, true) => "P",
            (false, false) => "N",
        };
        let _ = write!(
            line,
            "id={} addr={} laddr={} fd={} name={} age={} idle={} flags={flags} db=0 sub={} psub={} ssub=0 multi=-1 qbuf={} qbuf-free=0 \
             argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl={} oll={} omem={} tot-mem={} events=r cmd={} user={} redir=-1 resp={} lib-name={} lib-ver={}",
            self.id,
            self.address,
            self.local,
            self.fd,
            profile.name,
            self.created.elapsed().as_secs(),
            profile.last_seen.elapsed().as_secs(),
            profile.channels.len(),
            profile.patterns.len(),
            profile.input_bytes,
            profile.output_bytes,
            profile.in_flight,
            profile.output_bytes,
            profile.input_bytes + profile.output_bytes,
            profile.last_command.to_ascii_lowercase(),
            profile.login.as_ref().map_or("(none)", |login| &login.user.name),
            profile.protocol.number(),
            profile.lib_name,
            profile.lib_ver,
        );
        line
    }
}

/// Which replies the client wants (CLIENT REPLY).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replies {
    #[default]
    On,
    Off,
    /// All but the next one.
    SkipNext,
    /// All but the one of the command that runs.
    Skipped,
}

/// The state of one client on its own thread.
pub struct Session {
    pub client: Arc<Client>,
    pub protocol: Protocol,
    /// Whether it may run more than HELLO and AUTH.
    pub authenticated: bool,
    pub replies: Replies,
    pub last_command: &'static str,
    /// Who it is; `default` before it has said so.
    login: Login,
    directory: Arc<Directory>,
    /// Which users of the directory `login` is one of.
    generation: u64,
    /// Wrong passwords since the last right one.
    failures: u32,
    /// What came of waiting, while the request runs again whose name and password had to wait for their turn.
    pub turn: Option<Waited>,
    /// Whether it has ever subscribed to anything.
    pub has_subscribed: bool,
    /// Whether what it changes and reads of products goes through the thread's second lane.
    pub is_beside: bool,
    kept: Vec<Box<dyn Any>>,
    held_back: Option<Weak<()>>,
}

/// Why a name and a password were not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// They do not belong together.
    Once,
    /// The same, and there were too many tries.
    TooOften,
}

/// See [`Session::hold_back`].
pub struct HeldBack {
    held: Option<Rc<()>>,
    pipeline: Rc<Pipeline>,
}

impl Drop for HeldBack {
    fn drop(&mut self) {
        self.held = None;
        self.pipeline.nudge();
    }
}

impl Session {
    /// Dispatches nothing more of this client, whose replies are in `pipeline`, for as long as what is returned lives, for it builds on what is
    /// not decided yet.
    pub fn hold_back(&mut self, pipeline: &Rc<Pipeline>) -> HeldBack {
        let held = Rc::new(());
        self.held_back = Some(Rc::downgrade(&held));
        HeldBack { held: Some(held), pipeline: Rc::clone(pipeline) }
    }

    /// Whether that is so.
    pub fn is_held_back(&self) -> bool {
        self.held_back.as_ref().is_some_and(|held| held.strong_count() > 0)
    }

    pub fn new(client: Arc<Client>, directory: &Arc<Directory>) -> Self {
        let generation = directory.generation();
        let login = Login { user: Arc::clone(directory.users().default_user()), secret: None };
        let mut session = Self {
            client,
            protocol: Protocol::Resp2,
            authenticated: false,
            replies: Replies::On,
            last_command: "NULL",
            login: login.clone(),
            directory: Arc::clone(directory),
            generation,
            failures: 0,
            turn: None,
            has_subscribed: false,
            is_beside: false,
            held_back: None,
            kept: Vec::new(),
        };
        session.log_in(login);
        session
    }

    fn log_in(&mut self, login: Login) {
        self.authenticated = login.user.admits(login.secret.as_ref());
        self.client.profile().login = self.authenticated.then(|| login.clone());
        self.login = login;
    }

    /// Who it is.
    pub fn user(&self) -> &Arc<User> {
        &self.login.user
    }

    /// Whether `default` is let in without a password, so that AUTH without a name is a mistake.
    pub fn needs_no_password(&self) -> bool {
        self.directory.users().default_user().any_password
    }

    /// Becomes the user with this name, if the password is right; otherwise stays who it is. May be wrong so many times in a row.
    pub fn authenticate(&mut self, name: &[u8], password: &[u8], failures_max: u32) -> Result<(), Rejected> {
        let Some(login) = self.directory.users().authenticate(name, password) else {
            self.failures += 1;
            return Err(if self.failures >= failures_max { Rejected::TooOften } else { Rejected::Once });
        };
        self.failures = 0;
        self.log_in(login);
        Ok(())
    }

    /// Whether its user may have changed since that was looked at.
    pub fn is_outdated(&self) -> bool {
        self.directory.generation() != self.generation
    }

    /// Takes over what has become of its user. `false` where it may not go on, or may no longer have what it has subscribed to.
    pub fn renew(&mut self) -> bool {
        let generation = self.directory.generation();
        if generation == self.generation {
            return true;
        }
        self.generation = generation;
        let users = self.directory.users();
        match users.renew(&self.login) {
            Some(user) => {
                let suits = self.client.profile().suits(&user);
                self.log_in(Login { user, secret: self.login.secret });
                return suits;
            }
            None if self.authenticated => return false,
            None => self.log_in(Login { user: Arc::clone(users.default_user()), secret: None }),
        }
        true
    }

    /// Whether it has subscribed to anything.
    pub fn subscribes(&self) -> bool {
        // A look at the profile takes a lock, and hardly any client ever subscribes.
        self.has_subscribed && self.client.profile().subscribes()
    }

    /// Whether messages may come to it at any time.
    pub fn listens(&self) -> bool {
        self.has_subscribed && {
            let profile = self.client.profile();
            profile.subscribes() || profile.monitors.is_some()
        }
    }

    /// Keeps a guard that is dropped when the session ends, by RESET, QUIT or a lost connection.
    pub fn keep(&mut self, guard: impl Any) {
        self.kept.push(Box::new(guard));
    }

    /// Every kept guard of one type.
    pub fn kept<T: Any>(&self) -> impl Iterator<Item = &T> {
        self.kept.iter().filter_map(|guard| guard.downcast_ref())
    }

    /// Drops the kept guards of one type that `holds` says no to.
    pub fn retain<T: Any>(&mut self, mut holds: impl FnMut(&T) -> bool) {
        self.kept.retain(|guard| guard.downcast_ref().is_none_or(&mut holds));
    }

    /// Back to how a new connection starts (RESET).
    pub fn reset(&mut self) {
        self.protocol = Protocol::Resp2;
        // What is skipped stays skipped, as in Redis.
        if self.replies == Replies::Off {
            self.replies = Replies::On;
        }
        self.kept.clear();
        self.has_subscribed = false;
        let default = Arc::clone(self.directory.users().default_user());
        self.log_in(Login { user: default, secret: None });
        let mut profile = self.client.profile();
        profile.name.clear();
        profile.protocol = Protocol::Resp2;
    }

    /// Whether the command that starts now goes unanswered; uses up CLIENT REPLY SKIP.
    pub fn mute_next(&mut self) -> bool {
        match self.replies {
            Replies::On => false,
            Replies::Off => true,
            Replies::SkipNext => {
                self.replies = Replies::Skipped;
                true
            }
            Replies::Skipped => {
                self.replies = Replies::On;
                false
            }
        }
    }

    /// Lets others see what this client did, once a turn.
    pub fn publish(&self, in_flight: usize, input_bytes: usize, output_bytes: usize) {
        let mut profile = self.client.profile();
        profile.last_command = self.last_command;
        profile.protocol = self.protocol;
        profile.last_seen = Instant::now();
        profile.in_flight = in_flight;
        profile.input_bytes = input_bytes;
        profile.output_bytes = output_bytes;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::session::users::Users;

    /// A session as a test needs it, connected to nothing.
    pub(crate) fn session() -> Session {
        session_of(&Arc::new(Directory::new(Users::open())))
    }

    /// The same, where these are the users.
    pub(crate) fn session_of(directory: &Arc<Directory>) -> Session {
        let address = SocketAddr::from(([127, 0, 0, 1], 5000));
        let local = SocketAddr::from(([127, 0, 0, 1], 6380));
        Session::new(Arc::new(Client::new(7, address, local, 9, CancellationToken::new())), directory)
    }

    #[test]
    fn a_client_list_line_has_the_fields_of_redis_7_2_in_order() {
        let line = session().client.line();
        let names: Vec<&str> = line.split(' ').filter_map(|field| field.split_once('=')).map(|(name, _)| name).collect();
        let expected = "id addr laddr fd name age idle flags db sub psub ssub multi qbuf qbuf-free argv-mem multi-mem rbs rbp obl oll omem \
                        tot-mem events cmd user redir resp lib-name lib-ver";
        assert_eq!(names.join(" "), expected);
        assert!(line.starts_with("id=7 addr=127.0.0.1:5000 laddr=127.0.0.1:6380 fd=9 name= age=0 idle=0 flags=N db=0 "), "{line}");
    }

    #[test]
    fn kept_guards_are_dropped_by_reset() {
        let mut session = session();
        let held = Arc::new(());
        session.keep(Arc::clone(&held));
        assert_eq!((Arc::strong_count(&held), session.kept::<Arc<()>>().count()), (2, 1));
        session.retain(|_: &Arc<()>| true);
        session.reset();
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[test]
    fn skip_mutes_exactly_one_reply() {
        let mut session = session();
        session.replies = Replies::SkipNext;
        assert!(session.mute_next());
        assert!(!session.mute_next());
    }
}
