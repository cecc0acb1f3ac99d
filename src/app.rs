//! Builds all the parts, and drains them in reverse order. The only place that knows them all.
//!
//! Two threads: the front serves clients and writes to Redis, and nothing else may delay it; the caller's runtime carries the outbox to
//! Postgres, verifies, and answers HTTP.

mod access;

use std::fmt;
use std::io::{self, BufWriter, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::bulk::{self, Imported};
use crate::command::info::Section;
use crate::command::table::TABLE;
use crate::command::{Ack, Backend, Commands, Context, Drain, SlowLog, Stats, passthrough};
use crate::config::{Config, CouponLock, LedgerDetail, Passthrough, Prefer};
use crate::domain::event::Event;
use crate::domain::{Grain, Side};
use crate::ledger;
use crate::limits;
use crate::outbox::archivist::Archivist;
use crate::outbox::by_hand;
use crate::outbox::clerk::Clerk;
use crate::outbox::expirer::Expirer;
use crate::outbox::herald::Herald;
use crate::outbox::inbox::Inbox;
use crate::outbox::librarian::Librarian;
use crate::outbox::loader::Loader;
use crate::outbox::lock_epochs::LockEpochs;
use crate::outbox::presence::Presence;
use crate::outbox::relay::Relay;
use crate::outbox::sweep::Sweeper;
use crate::outbox::verify::Verifier;
use crate::outbox::weigh::weigh;
use crate::reconcile::Settings;
use crate::reconcile::examine::Examiner;
use crate::reconcile::request::Requests;
use crate::reconcile::schedule::Scheduler;
use crate::server::listener;
use crate::session::bounds::Bounds;
use crate::session::guesses::Guesses;
use crate::session::hub::{Hub, Subscribers};
use crate::session::registry::Registry;
use crate::session::users::Directory;
use crate::store::Partition;
use crate::store::lock::{self, Locks};
use crate::store::partition::{Receivers, ServerChange, State};
use crate::store::reads::Reads;
use crate::telemetry::http::{self, Check, Readiness};
use crate::telemetry::metrics;
use crate::tls::{self, Certificates};

/// Where a server that is ready listens: the ports it was given, where the configuration says 0.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// Where Redis clients connect.
    pub listen: SocketAddr,
    /// Where the HTTP endpoints are served.
    pub http: SocketAddr,
}

/// Why the server could not start, or could not go on.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

fn error(why: impl fmt::Display) -> Error {
    Error(why.to_string())
}

/// Serves until `shutdown` is cancelled; says through `ready` when it sells for the first time.
pub async fn run(config: Config, shutdown: CancellationToken, ready: Option<oneshot::Sender<Ready>>) -> Result<(), Error> {
    let metrics = metrics::install().map_err(error)?;
    listener::allow_files(config.max_clients, threads(&config));
    let sessions = Sessions::new(&config)?;
    let hub = Arc::clone(&sessions.hub);
    let http_listener = http::bind(config.http.listen).await.map_err(error)?;
    let listener = listen(config.listen)?;
    let listens = Ready { listen: listener.local_addr().map_err(error)?, http: http_listener.local_addr().map_err(error)? };
    info!(version = env!("CARGO_PKG_VERSION"), listen = %listens.listen, http = %listens.http, "holdfast starts");

    let (partition, Receivers { inquiries, letters, loads, lookups, syncs, changes }) = Partition::new(0, config.outbox.copies_bytes);
    let partition = partition.bounded(config.outbox.max_changes, config.outbox.max_bytes as u64).refusing_for(config.stock.sold_out);
    let partition = partition.written_by(match config.ledger.detail {
        LedgerDetail::Operation => Grain::Operation,
        LedgerDetail::Batch => Grain::Batch,
    });
    let partition = Arc::new(partition);
    let back = CancellationToken::new();
    let pulses: Pulses = Arc::new((0..threads(&config)).map(|_| Mutex::new(Instant::now())).collect());
    let instance = Uuid::new_v4().simple().to_string();
    let http_certificates = sessions.certificates.clone().filter(|_| config.http.tls);
    let drain = Arc::new(Drain::new(shutdown.clone(), config.shutdown_timeout));
    let readiness = readiness(Arc::clone(&partition), shutdown.clone(), Arc::clone(&drain), Arc::clone(&pulses));
    let web = tokio::spawn(http::serve(http_listener, http_certificates, metrics, readiness, back.clone()));
    let (locks, epochs) = Locks::new(locking(&config, &instance));
    tokio::spawn(access::reload(config.clone(), sessions.clone(), shutdown.clone()));
    let shared = Shared {
        partition: Arc::clone(&partition),
        locks,
        instance: instance.clone(),
        sessions,
        drain,
        shutdown: shutdown.clone(),
        pulses,
    };
    let front = Front::start(&config, listener, shared, changes)?;

    let postgres_url = config.postgres.url.expose().to_owned();
    let lock_epochs = LockEpochs { partition: Arc::clone(&partition), postgres_url: postgres_url.clone(), requests: epochs };
    let redis_url = config.redis.url.expose().to_owned();
    let relay =
        Relay { partition: Arc::clone(&partition), redis_url, postgres_url: postgres_url.clone(), drain: config.shutdown_timeout / 2 };
    let loader = Loader::new(Arc::clone(&partition), &postgres_url, loads);
    let librarian = Librarian::new(Arc::clone(&partition), &postgres_url, lookups);
    let expirer = Expirer::new(Arc::clone(&partition), config.redis.url.expose(), &postgres_url, &instance);
    let archivist = Archivist::new(Arc::clone(&partition), &postgres_url, inquiries);
    let clerk = Clerk::new(Arc::clone(&partition), &postgres_url, letters);
    let inbox = Inbox::new(Arc::clone(&partition), config.redis.url.expose(), &postgres_url);
    let verifier = Verifier::new(Arc::clone(&partition), config.redis.url.expose(), &postgres_url, &instance, config.idempotency.window);
    let window_ms = i64::try_from(config.idempotency.window.as_millis()).unwrap_or(i64::MAX);
    let presence = Presence { partition: Arc::clone(&partition), postgres_url: postgres_url.clone(), instance, window_ms };
    let sweeper = Sweeper {
        partition: Arc::clone(&partition),
        redis_url: config.redis.url.expose().to_owned(),
        postgres_url: postgres_url.clone(),
        window_ms,
    };
    let herald = Herald {
        partition: Arc::clone(&partition),
        redis_url: config.redis.url.expose().to_owned(),
        listens: {
            let hub = Arc::clone(&hub);
            move || hub.has_subscribers()
        },
        publish: move |event: Event| hub.publish(event.channel, || event.payload.into()),
    };
    let weighing = {
        let (partition, redis_url) = (Arc::clone(&partition), config.redis.url.expose().to_owned());
        |back| weigh(partition, redis_url, back)
    };
    let settings = reconciling(&config);
    let examiner = || Examiner::new(Arc::clone(&partition), config.redis.url.expose(), &postgres_url, settings);
    let (scheduler, requests) = (Scheduler::new(examiner(), settings), Requests::new(examiner(), syncs));
    let working = {
        let (partition, back, shutdown) = (Arc::clone(&partition), back.clone(), shutdown.clone());
        tokio::spawn(async move {
            if prepare(&partition, &postgres_url, &shutdown).await {
                let reconciling = async { tokio::join!(scheduler.run(back.clone()), requests.run(back.clone())) };
                tokio::join!(
                    relay.run(back.clone()),
                    verifier.run(back.clone()),
                    loader.run(back.clone()),
                    librarian.run(back.clone()),
                    expirer.run(back.clone()),
                    herald.run(back.clone()),
                    archivist.run(back.clone()),
                    inbox.run(back.clone()),
                    clerk.run(back.clone()),
                    lock_epochs.run(back.clone()),
                    sweeper.run(back.clone()),
                    presence.run(back.clone()),
                    weighing(back.clone()),
                    reconciling,
                );
            }
        })
    };
    if let Some(ready) = ready {
        let mut state = partition.state.subscribe();
        tokio::select! {
            live = state.wait_for(|state| matches!(state, State::Live { .. })) => if live.is_ok() { _ = ready.send(listens) },
            () = shutdown.cancelled() => {}
        }
    }
    shutdown.cancelled().await;
    info!("draining: no new connections, what was started is finished");
    let deadline = tokio::time::Instant::now() + config.shutdown_timeout;
    // Half of the time for the clients, the rest for the relay: what it cannot carry stays in Redis.
    if tokio::time::timeout_at(deadline - config.shutdown_timeout / 2, front.stopped()).await.is_err() {
        warn!("clients or redis did not finish in time");
    }
    back.cancel();
    if tokio::time::timeout_at(deadline, working).await.is_err() {
        warn!(
            changes = partition.lag(),
            "not everything could be carried to postgres in time; it stays in redis and goes on at the next start"
        );
    }
    _ = web.await;
    info!("stopped");
    Ok(())
}

fn locking(config: &Config, instance: &str) -> lock::Settings {
    lock::Settings {
        redis_url: config.redis.url.expose().to_owned(),
        instance: instance.to_owned(),
        session_lease: config.lock.session_lease,
        max_hold: config.lock.max_hold,
        max_turn: config.lock.max_turn,
        coupon_lease: (config.coupon.lock == CouponLock::Held).then_some(config.coupon.lease),
    }
}

fn reconciling(config: &Config) -> Settings {
    let prefer = match config.reconcile.prefer {
        Prefer::Postgres => Side::Postgres,
        Prefer::Redis => Side::Redis,
    };
    let (sync_every, initialise_every) = (config.reconcile.sync_every, config.reconcile.initialise_every);
    Settings { sync_every, initialise_every, prefer, auto_limit: config.reconcile.auto_limit }
}

/// Whether what the configuration names can be used; connects to nothing.
pub fn check(config: &Config) -> Result<(), Error> {
    access::users(config)?;
    access::certificates(config).map(drop)
}

/// What a probe of the HTTP endpoints needs where these are served through TLS.
pub fn probe_client(config: &Config) -> Result<Option<Arc<rustls::ClientConfig>>, Error> {
    let files = access::files(config)?.filter(|_| config.http.tls);
    files.map(|files| tls::own_client(&files).map_err(Error)).transpose()
}

/// Brings Postgres to this version's tables.
pub async fn migrate(config: &Config) -> Result<(), Error> {
    ledger::migrate(config.postgres.url.expose()).await.map_err(error)?;
    info!("postgres has this version's tables");
    Ok(())
}

/// Makes the other side as `from` is.
pub async fn rebuild(config: &Config, from: Side) -> Result<(), Error> {
    let window_ms = i64::try_from(config.idempotency.window.as_millis()).unwrap_or(i64::MAX);
    by_hand::rebuild(from, config.redis.url.expose(), config.postgres.url.expose(), window_ms).await.map_err(error)
}

/// Sets every product of a CSV file. Errors also where a line was refused.
pub async fn import(config: &Config, file: &Path, shutdown: CancellationToken) -> Result<(), Error> {
    let Imported { set, before, refused } = bulk::import(config, file, shutdown).await.map_err(error)?;
    let earlier = if before > 0 { format!(" ({before} lines were done before)") } else { String::new() };
    say(format_args!("{set} products set{earlier}, {refused} lines refused"))?;
    if refused > 0 { Err(Error(format!("{refused} lines of {} were refused", file.display()))) } else { Ok(()) }
}

/// Writes every product to standard output.
pub async fn export(config: &Config) -> Result<(), Error> {
    let mut out = BufWriter::new(io::stdout().lock());
    let (products, position) = bulk::export(config.postgres.url.expose(), 0, &mut out).await.map_err(error)?;
    info!(products, %position, "exported");
    Ok(())
}

/// Compares every product and coupon with what the ledgers make of it. Errors where one differs.
pub async fn audit(config: &Config, all: bool) -> Result<(), Error> {
    let mut out = BufWriter::new(io::stdout().lock());
    let found = bulk::audit(config.postgres.url.expose(), all, &mut out).await.map_err(error)?;
    out.flush().map_err(error)?;
    drop(out);
    say(format_args!("{} products and {} coupons, {} of them differ", found.products, found.coupons, found.differ))?;
    if found.differ > 0 { Err(Error("the ledgers do not explain every number".to_owned())) } else { Ok(()) }
}

/// Says to whoever ran the command what became of it.
fn say(what: fmt::Arguments<'_>) -> Result<(), Error> {
    writeln!(io::stdout(), "{what}").map_err(error)
}

/// Binds as the runtime does, but with a longer backlog.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(limits::LISTEN_BACKLOG)
}

fn listen(address: SocketAddr) -> Result<TcpListener, Error> {
    bind(address).map_err(|why| {
        Error(format!(
            "cannot listen on {address}: {why}; stop what listens there, or choose another address with --listen (HOLDFAST_LISTEN)"
        ))
    })
}

/// Waits for Postgres and brings it to this version's tables. `false` if told to stop before.
async fn prepare(partition: &Partition, postgres_url: &str, shutdown: &CancellationToken) -> bool {
    let mut said = String::new();
    loop {
        let why = match ledger::migrate(postgres_url).await {
            Ok(_) => return true,
            Err(why) => why.to_string(),
        };
        if why != said {
            warn!(error = why, "cannot prepare postgres yet, trying on");
            partition.state.send_replace(State::Loading(format!("waiting for Postgres: {why}")));
            said = why;
        }
        if shutdown.run_until_cancelled(tokio::time::sleep(Duration::from_millis(300))).await.is_none() {
            return false;
        }
    }
}

/// When each thread that serves clients last got anything done.
type Pulses = Arc<Vec<Mutex<Instant>>>;

/// How many threads serve clients. Redis runs scripts on one thread, and one thread of ours keeps it busy where clients pipeline; where they
/// do not, sockets cost the most. On 2 cores a second one only takes from Redis and Postgres.
fn threads(config: &Config) -> usize {
    match config.threads {
        0 => std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).clamp(1, limits::THREADS_BY_CORES_MAX)),
        threads => threads,
    }
}

/// The commands that this server has.
fn commands(config: &Config) -> Commands {
    match config.passthrough {
        Passthrough::Off => Commands::new(TABLE),
        Passthrough::ReadOnly => Commands::new(&[TABLE, passthrough::TABLE].concat()),
    }
}

/// What the threads that serve clients know of the clients.
#[derive(Clone)]
struct Sessions {
    registry: Arc<Registry>,
    users: Arc<Directory>,
    bounds: Arc<Bounds>,
    guesses: Arc<Guesses>,
    hub: Arc<Hub>,
    slow: Arc<SlowLog>,
    certificates: Option<Arc<Certificates>>,
    stats: Arc<Stats>,
}

impl Sessions {
    fn new(config: &Config) -> Result<Self, Error> {
        let users = access::users(config)?;
        let (limits, auth) = (&config.limits, &config.auth);
        let mut bounds = Bounds::default();
        bounds.known = bounds.known.with(limits.args, limits.bulk, limits.request);
        let (args, bulk, request) = (auth.args.min(limits.args), auth.bulk.min(limits.bulk), auth.request.min(limits.request));
        bounds.stranger = bounds.stranger.with(args, bulk, request);
        (bounds.auth_within, bounds.auth_failures, bounds.auth_delay) = (auth.within, auth.failures, auth.delay);
        (bounds.in_flight, bounds.output) = (limits.in_flight, limits.output);
        // One alone is always taken whole.
        bounds.input = limits.input.max(limits.request);
        (bounds.stall, bounds.keepalive) = (limits.stall, limits.keepalive);
        bounds.set_idle(limits.idle);
        Ok(Self {
            registry: Arc::new(Registry::new(config.max_clients)),
            users: Arc::new(Directory::new(users)),
            bounds: Arc::new(bounds),
            guesses: Arc::default(),
            hub: Arc::default(),
            slow: Arc::default(),
            certificates: access::certificates(config)?,
            stats: Arc::new(Stats::new(&commands(config))),
        })
    }
}

/// The threads that serve clients. They share the listening socket, and each has lanes of its own.
struct Front {
    stopped: Vec<oneshot::Receiver<()>>,
}

impl Front {
    fn start(config: &Config, listener: TcpListener, shared: Shared, changes: mpsc::Receiver<ServerChange>) -> Result<Self, Error> {
        let listener = listener.into_std().map_err(error)?;
        let config = Config { listen: listener.local_addr().map_err(error)?, ..config.clone() };
        // What the server itself asks for goes through the first thread's lanes.
        let mut changes = Some(changes);
        let mut stopped = Vec::new();
        for number in 0..shared.pulses.len() {
            let (stopping, ended) = oneshot::channel();
            stopped.push(ended);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(error)?;
            if number == 0 {
                shared.locks.run_on(runtime.handle());
            }
            let thread = FrontThread {
                number,
                config: config.clone(),
                listener: listener.try_clone().map_err(error)?,
                user: shared.locks.user(),
                shared: shared.clone(),
                changes: changes.take(),
            };
            let serve = move || {
                LocalSet::new().block_on(&runtime, thread.serve());
                _ = stopping.send(());
            };
            let name = if number == 0 { "front".to_owned() } else { format!("front-{number}") };
            thread::Builder::new().name(name).spawn(serve).map_err(error)?;
        }
        Ok(Self { stopped })
    }

    async fn stopped(self) {
        for stopped in self.stopped {
            // An error means that the thread is gone, which is the same.
            _ = stopped.await;
        }
    }
}

/// What the threads that serve clients share.
#[derive(Clone)]
struct Shared {
    partition: Arc<Partition>,
    locks: Locks,
    instance: String,
    sessions: Sessions,
    drain: Arc<Drain>,
    shutdown: CancellationToken,
    pulses: Pulses,
}

/// One thread that serves clients, and what it shares with the others.
struct FrontThread {
    number: usize,
    config: Config,
    listener: std::net::TcpListener,
    shared: Shared,
    /// The locks are served until every thread is done with them.
    user: TaskTrackerToken,
    changes: Option<mpsc::Receiver<ServerChange>>,
}

impl FrontThread {
    async fn serve(self) {
        let config = self.config;
        let Shared { partition, locks, instance, sessions, drain, shutdown, pulses } = self.shared;
        let Ok(listener) = TcpListener::from_std(self.listener) else { return };
        let lanes = CancellationToken::new();
        let (redis_url, window) = (config.redis.url.expose(), config.idempotency.window);
        let locking = {
            let (locks, shutdown) = (locks.clone(), shutdown.clone());
            async move {
                if self.number == 0 {
                    locks.run(shutdown).await;
                }
            }
        };
        let backend = Backend::new(partition, redis_url, &instance, window, config.reply_within, self.number, locks);
        let driving = backend.drive(self.changes, &lanes);
        spawn_local(beat(pulses, self.number, Arc::clone(&backend.partition)));
        let Sessions { registry, users, bounds, guesses, hub, slow, certificates, stats } = sessions;
        let subscribers = Subscribers::new(hub);
        spawn_local(Rc::clone(&subscribers).run(lanes.clone()));
        let context = Context::new(Rc::new(commands(&config)), registry, stats, backend);
        let passing = (config.passthrough == Passthrough::ReadOnly)
            .then(|| Rc::new(Reads::passing(redis_url, limits::PASSED_WITHIN, limits::PASSED_REPLY_MAX)));
        let acks_set = TABLE.iter().filter_map(|spec| Some((spec.name, Ack::of_word(config.ack(spec.name)?)))).collect();
        let cx = Rc::new(Context { users, bounds, guesses, subscribers, slow, drain, passing, acks_set, ..context });
        spawn_local(Rc::clone(&cx.heartbeat).beat());
        cx.settings.borrow_mut().push(("port", config.listen.port().to_string()));
        let (partition, locks) = (Arc::clone(&cx.backend.partition), cx.backend.locks.clone());
        let render = Box::new(move |text: &mut String| {
            show_partition(&partition, text);
            show_locks(&locks, text);
        });
        cx.sections.borrow_mut().push(Section { name: "Holdfast", render });
        let serving = async {
            listener::serve(listener, certificates, Rc::clone(&cx), shutdown).await;
            lanes.cancel();
            drop(self.user);
        };
        tokio::join!(driving, serving, locking);
    }
}

/// Shows, for as long as this thread gets anything done, that it does.
async fn beat(pulses: Pulses, number: usize, partition: Arc<Partition>) {
    loop {
        *pulses[number].lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        partition.sold_out.purge();
        tokio::time::sleep(limits::PULSE_EVERY).await;
    }
}

/// How locks stand, as INFO shows it.
fn show_locks(locks: &Locks, text: &mut String) {
    let state = locks.trouble().map_or_else(|| "up".to_owned(), |why| format!("down: {why}"));
    text.push_str(&format!("holdfast_locks:{state}\r\nholdfast_lock_waiters:{}\r\n", locks.waiting()));
}

/// How the partition stands, as INFO shows it. `at_risk` changes would be lost if Redis's data and this process died at once.
fn show_partition(partition: &Partition, text: &mut String) {
    let applied = *partition.applied.borrow();
    let word = |yes: bool, this: &'static str, that: &'static str| if yes { this } else { that };
    let lines = [
        ("holdfast_state", word(partition.live_epoch().is_some(), "live", "loading").to_owned()),
        ("holdfast_redis", word(partition.redis_up(), "up", "down").to_owned()),
        ("holdfast_postgres", word(partition.ledger_up(), "up", "down").to_owned()),
        ("holdfast_position", partition.head().to_string()),
        ("holdfast_applied", applied.to_string()),
        ("holdfast_at_risk", partition.lag().to_string()),
        ("holdfast_dead_letters", partition.dead_letters().to_string()),
    ];
    for (name, value) in lines {
        text.push_str(&format!("{name}:{value}\r\n"));
    }
}

fn readiness(partition: Arc<Partition>, shutdown: CancellationToken, drain: Arc<Drain>, pulses: Pulses) -> http::ReadinessSource {
    Arc::new(move || {
        let (live, state) = match &*partition.state.borrow() {
            State::Live { epoch, run_id } => (true, format!("live under epoch {epoch} on redis {run_id}")),
            State::Loading(why) | State::Rebuilding(why) => (false, why.clone()),
        };
        let reachable = |up: bool| if up { "answers" } else { "cannot be reached" }.to_owned();
        let trouble = partition.trouble_text();
        let relay = match trouble.is_empty() {
            true => format!("{} changes behind", partition.lag()),
            false => trouble.clone(),
        };
        let draining = shutdown.is_cancelled() || drain.has_begun();
        let beats = |pulse: &Mutex<Instant>| pulse.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < limits::PULSE_MAX;
        Readiness {
            alive: pulses.iter().all(beats) || shutdown.is_cancelled(),
            checks: vec![
                Check { name: "server", ok: !draining, optional: false, detail: if draining { "draining" } else { "serving" }.into() },
                Check { name: "partition", ok: live, optional: false, detail: state },
                Check { name: "redis", ok: partition.redis_up(), optional: false, detail: reachable(partition.redis_up()) },
                Check { name: "postgres", ok: partition.ledger_up(), optional: true, detail: reachable(partition.ledger_up()) },
                Check { name: "relay", ok: trouble.is_empty(), optional: true, detail: relay },
                Check {
                    name: "outbox",
                    ok: partition.bound.refusal().is_none(),
                    optional: true,
                    detail: partition.bound.refusal().map_or_else(|| format!("{} MiB", partition.bound.bytes() >> 20), String::from),
                },
                Check {
                    name: "dead_letters",
                    ok: partition.dead_letters() == 0,
                    optional: true,
                    detail: format!("{} changes that Postgres refused wait for a person", partition.dead_letters()),
                },
            ],
        }
    })
}
