//! Clients as services write them: a time-out for each reply, reconnecting, and retries with the same REQUEST id. They write down everything.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use redis::{Connection, ConnectionLike as _, Value};

use crate::history::{Operation, Outcome, Position, Record, Try, position};
use crate::random::Random;

/// A client gives an operation up after so many tries: some 10 s of them.
const TRIES_MAX: usize = 60;

/// How long a client waits for a reply, beyond what it asked the server to wait: the server promises 0.1 s, a stopped one takes longer.
const REPLY_WITHIN: Duration = Duration::from_secs(1);

/// What an `ACK postgres` asks the server to wait.
const ACK_TIMEOUT_MS: u64 = 3_000;

/// What the clients do.
#[derive(Clone)]
pub struct Plan {
    pub clients: usize,
    /// The longest pause of a client between two operations.
    pub pause_us: u64,
    /// Whether every change waits for Postgres.
    pub ack_postgres: bool,
    /// How many operations a second all of them send together, each of which can be accepted. Else as many as they can, of all kinds.
    pub rate: Option<u32>,
    /// How many of 100 operations carry a REQUEST.
    pub with_request: u64,
    /// The sidecar's `ledger.detail`.
    pub detail: String,
}

impl Default for Plan {
    /// With what `HOLDFAST_TEST_DETAIL` says is in a row of the ledger, else an operation.
    fn default() -> Self {
        let detail = std::env::var("HOLDFAST_TEST_DETAIL").unwrap_or_else(|_| "operation".to_owned());
        let plan = Self { clients: 8, pause_us: 6_000, ack_postgres: false, rate: None, with_request: 85, detail };
        if plan.detail == "batch" { plan.by_batch() } else { plan }
    }
}

impl Plan {
    /// With a row of the ledger for all that a batch does to a product, and so many operations at once that there are such.
    pub fn by_batch(self) -> Self {
        Self { clients: 24, with_request: 30, detail: "batch".to_owned(), ..self }
    }
}

/// Products and their units at the start. The first ones run out, and are restocked.
pub const PRODUCTS: [(&str, i64); 6] =
    [("tight", 60), ("short", 2_000), ("sku-2", 1_000_000), ("sku-3", 1_000_000), ("sku-4", 1_000_000), ("sku-5", 1_000_000)];

/// Coupons with their totals and how many a user may have. The first is sold out on the way.
pub const COUPONS: [(&str, i64, i64); 2] = [("few", 200, 1), ("many", 1_000_000, 2)];

/// How many users there are: few enough that some come back.
const USERS: u64 = 3_000;

/// See the module.
pub struct Load {
    clients: Vec<JoinHandle<Vec<Record>>>,
    shared: Arc<Shared>,
}

struct Shared {
    ports: Vec<u16>,
    plan: Plan,
    began: Instant,
    stop: AtomicBool,
    /// Of each port, how many operations have been accepted so far, and what was said last.
    told: Vec<Told>,
}

#[derive(Default)]
struct Told {
    accepted: AtomicU64,
    last: Mutex<String>,
}

impl Load {
    /// Starts the clients, on these ports in turns.
    pub fn start(ports: Vec<u16>, plan: Plan, random: &mut Random) -> Self {
        let told = ports.iter().map(|_| Told::default()).collect();
        let shared = Arc::new(Shared { ports, plan: plan.clone(), began: Instant::now(), stop: AtomicBool::new(false), told });
        let client = |number| {
            let client = Client { number, shared: Arc::clone(&shared), random: random.fork(), connection: None, records: Vec::new() };
            thread::spawn(move || client.run())
        };
        Self { clients: (0..plan.clients).map(client).collect(), shared }
    }

    /// How many operations have been accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted_by_port().iter().sum()
    }

    /// The same of each port.
    pub fn accepted_by_port(&self) -> Vec<u64> {
        self.shared.told.iter().map(|told| told.accepted.load(Ordering::Relaxed)).collect()
    }

    /// What the clients of a port were told last.
    pub fn last_said(&self, port: usize) -> String {
        self.shared.told[port].last.lock().unwrap().clone()
    }

    /// Lets every client finish its operation, and returns what all of them did.
    pub fn stop(self) -> Vec<Record> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    }
}

struct Client {
    number: usize,
    shared: Arc<Shared>,
    random: Random,
    connection: Option<Connection>,
    records: Vec<Record>,
}

/// What one try came to.
enum Said {
    Accepted {
        values: Vec<i64>,
        position: Position,
    },
    /// A business outcome: decided, and nothing was changed.
    Decided,
    /// Surely not executed; worth another try.
    NotNow,
    /// What no fault explains.
    Error,
    NotKnown,
}

impl Client {
    fn run(mut self) -> Vec<Record> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let operation = self.next_operation();
            let request = if self.random.chance(self.shared.plan.with_request) { Some(self.new_request()) } else { None };
            let record = self.perform(operation, request);
            if record.is_accepted() {
                self.told().accepted.fetch_add(1, Ordering::Relaxed);
            }
            self.records.push(record);
            thread::sleep(self.pause());
        }
        self.records
    }

    fn port(&self) -> usize {
        self.number % self.shared.ports.len()
    }

    fn told(&self) -> &Told {
        &self.shared.told[self.port()]
    }

    fn pause(&mut self) -> Duration {
        let &Plan { rate, clients, pause_us, .. } = &self.shared.plan;
        match rate {
            None => Duration::from_micros(self.random.below(pause_us + 1)),
            Some(rate) => {
                let each = Duration::from_secs(1) * u32::try_from(clients).unwrap() / rate;
                (each * u32::try_from(self.records.len()).unwrap()).saturating_sub(self.shared.began.elapsed())
            }
        }
    }

    fn next_operation(&mut self) -> Operation {
        let product = |random: &mut Random| match random.below(10) {
            0..4 => 0,
            4..6 => 1,
            _ => usize::try_from(2 + random.below(4)).unwrap(),
        };
        let quantity = |random: &mut Random| i64::try_from(random.between(1, 3)).unwrap();
        let random = &mut self.random;
        if self.shared.plan.rate.is_some() {
            let (product, quantity) = (PRODUCTS[usize::try_from(2 + random.below(4)).unwrap()].0.into(), quantity(random));
            return if random.chance(50) { Operation::Incr(product, quantity) } else { Operation::Decr(vec![(product, quantity)]) };
        }
        match random.below(100) {
            0..50 => {
                let (product, quantity) = (product(random), quantity(random));
                Operation::Decr(vec![(PRODUCTS[product].0.into(), quantity)])
            }
            50..65 => {
                let first = product(random);
                let second = (first + 1 + usize::try_from(random.below(5)).unwrap()) % PRODUCTS.len();
                Operation::Decr([first, second].map(|product| (PRODUCTS[product].0.into(), quantity(random))).into())
            }
            65..80 => {
                let product = product(random);
                Operation::Incr(PRODUCTS[product].0.into(), 4 * quantity(random))
            }
            _ => {
                let coupon = COUPONS[usize::from(random.chance(70))].0.into();
                Operation::Issue { coupon, user: format!("user-{}", random.below(USERS)) }
            }
        }
    }

    /// A fresh id: a UUIDv7 or one of the client's own making.
    fn new_request(&mut self) -> String {
        let (high, low) = (self.random.next(), self.random.next());
        if self.random.chance(50) {
            return format!("client-{}-{high:016x}", self.number);
        }
        let ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let (first, second) = (ms >> 16, ms & 0xffff);
        format!("{first:08x}-{second:04x}-7{:03x}-8{:03x}-{:012x}", high & 0xfff, (high >> 12) & 0xfff, low & 0xffff_ffff_ffff)
    }

    fn perform(&mut self, operation: Operation, request: Option<String>) -> Record {
        let mut words = operation.words();
        if let Some(request) = &request {
            words.extend(["REQUEST".into(), request.clone()]);
        }
        if self.shared.plan.ack_postgres {
            words.extend(["ACK".into(), "postgres".into(), "TIMEOUT".into(), ACK_TIMEOUT_MS.to_string()]);
        }
        let mut tries = Vec::new();
        let mut in_doubt = false;
        let outcome = loop {
            let sent = self.shared.began.elapsed();
            let (said, text) = self.ask(&words);
            self.told().last.lock().unwrap().clone_from(&text);
            tries.push(Try { sent, ended: self.shared.began.elapsed(), said: text.clone() });
            match said {
                Said::Accepted { values, position } => break Outcome::Accepted { values, position },
                Said::Decided => break Outcome::Refused(text),
                Said::Error => break Outcome::Failed(text),
                Said::NotNow => {}
                Said::NotKnown => in_doubt = true,
            }
            if request.is_none() || tries.len() == TRIES_MAX {
                break if in_doubt { Outcome::Unknown } else { Outcome::Refused(text) };
            }
            let longest = 5_000 << tries.len().min(5);
            thread::sleep(Duration::from_micros(self.random.between(1_000, longest)));
        };
        Record { client: self.number, operation, request, tries, outcome }
    }

    fn ask(&mut self, words: &[String]) -> (Said, String) {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => match self.connect() {
                Ok(connection) => connection,
                Err(error) => return (Said::NotNow, format!("cannot connect: {error}")),
            },
        };
        let mut command = redis::Cmd::new();
        command.arg(words);
        match connection.req_packed_command(&command.get_packed_command()) {
            Ok(value) => {
                self.connection = Some(connection);
                understand(&value)
            }
            Err(error) => (Said::NotKnown, format!("connection broken: {error}")),
        }
    }

    fn connect(&self) -> redis::RedisResult<Connection> {
        let client = redis::Client::open(format!("redis://127.0.0.1:{}/", self.shared.ports[self.port()]))?;
        let connection = client.get_connection_with_timeout(REPLY_WITHIN)?;
        let asked = if self.shared.plan.ack_postgres { Duration::from_millis(ACK_TIMEOUT_MS) } else { Duration::ZERO };
        connection.set_read_timeout(Some(REPLY_WITHIN + asked))?;
        Ok(connection)
    }
}

fn understand(value: &Value) -> (Said, String) {
    let parts = match value {
        Value::Array(parts) => parts,
        Value::ServerError(error) => {
            let said = match error.code() {
                "TRYAGAIN" | "LOADING" => Said::NotNow,
                "INDOUBT" | "PENDING" => Said::NotKnown,
                _ => Said::Error,
            };
            return (said, format!("-{} {}", error.code(), error.details().unwrap_or_default()));
        }
        other => return (Said::Error, format!("-? {other:?}")),
    };
    let texts: Vec<String> = parts.iter().filter_map(|part| redis::from_redis_value_ref(part).ok()).collect();
    let said = match texts.first().map(String::as_str) {
        Some("OK" | "ISSUED") => {
            let values = parts.iter().filter_map(|part| if let Value::Int(value) = part { Some(*value) } else { None }).collect();
            match texts.last().and_then(|last| position(last)) {
                Some(position) => Said::Accepted { values, position },
                None => Said::Error,
            }
        }
        Some("INSUFFICIENT" | "SOLDOUT" | "ALREADY") => Said::Decided,
        _ => Said::Error,
    };
    (said, texts.join(" "))
}
