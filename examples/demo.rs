//! A flash sale: 10,000 users race for 1,000 coupons, and 20,000 orders for 100 products of 50 units each, over 200 connections.
//!
//! Runs against the server that `make run` started, then reads everything back from Redis and from Postgres and compares: what was
//! granted must be exactly what there was, and stand in both exactly once. Every request carries a REQUEST id and is sent again until it
//! is answered, as a careful client does it, so the sidecar may be killed (`kill -9`) and started again in the middle of it.

#![allow(clippy::print_stdout, reason = "it talks to a person")]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::error::Error;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisError, Value, from_redis_value};
use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinSet;

const CONNECTIONS: usize = 200;
const USERS: usize = 10_000;
const COUPONS: i64 = 1_000;
const ORDERS: usize = 20_000;
const PRODUCTS: usize = 100;
const UNITS: i64 = 50;

/// How long one request is tried: as long as a person needs to start the sidecar again.
const PATIENCE: Duration = Duration::from_secs(60);
/// The pause before a request is sent again.
const PAUSE: Duration = Duration::from_millis(50);
/// How long an answer may take before the connection counts as broken. The server answers within 0.1 s, or 5 s where Postgres is
/// waited for.
const ANSWER_MAX: Duration = Duration::from_secs(6);

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("demo: {error}");
            return ExitCode::FAILURE;
        }
    };
    match tokio::task::LocalSet::new().block_on(&runtime, demo()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Result<bool> {
    let servers = Servers::find()?;
    let run = format!("demo-{}-{}", SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs(), std::process::id());
    servers.holdfast().await.map_err(|error| servers.is_away(&error))?;
    let sale = Rc::new(Sale::new(servers, run));
    sale.set_up().await?;
    println!("{}: {} connections to {}", sale.run, thousands(CONNECTIONS), sale.servers.listen);

    let coupons = sale.race("coupons", USERS, Sale::issue).await?;
    let orders = sale.race("orders", ORDERS, Sale::order).await?;
    println!();
    println!(
        "{:<10}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>10}{:>10}{:>10}",
        "", "asked", "granted", "refused", "errors", "retries", "per s", "p50 ms", "p99 ms", "max ms"
    );
    coupons.print();
    orders.print();
    for (error, count) in coupons.errors.iter().chain(&orders.errors) {
        println!("  {count} x {error}");
    }
    println!();
    let equal = sale.audit(&coupons, &orders).await?;
    let answered = coupons.errors.is_empty() && orders.errors.is_empty();
    println!();
    match (equal, answered) {
        (true, true) => println!("Granted: exactly what there was. Redis and Postgres agree."),
        (false, _) => println!("DIFFERENT: see above."),
        (true, false) => println!("Some requests were never answered: see the errors above."),
    }
    Ok(equal && answered)
}

/// Where everything listens.
struct Servers {
    listen: String,
    redis: String,
    postgres: String,
}

impl Servers {
    /// From the environment, else from what `holdfast dev` wrote down.
    fn find() -> Result<Self> {
        let file = std::fs::read_to_string(".holdfast/dev.env").unwrap_or_default();
        let find = |name: &str| {
            let written = file.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned);
            std::env::var(name).ok().or(written).ok_or_else(|| {
                format!(
                    "there is neither ./.holdfast/dev.env nor {name}: start the server first with `make run`, in another terminal, and \
                     wait until it is ready"
                )
            })
        };
        Ok(Self { listen: find("HOLDFAST_LISTEN")?, redis: find("HOLDFAST_REDIS_URL")?, postgres: find("HOLDFAST_POSTGRES_URL")? })
    }

    fn is_away(&self, error: &RedisError) -> String {
        format!("nothing answers on {} ({error}): start the server first with `make run`, in another terminal", self.listen)
    }

    /// A new connection to the sidecar.
    async fn holdfast(&self) -> Result<MultiplexedConnection, RedisError> {
        connect(&format!("redis://{}", self.listen)).await
    }
}

async fn connect(url: &str) -> Result<MultiplexedConnection, RedisError> {
    let config = AsyncConnectionConfig::new().set_connection_timeout(Some(Duration::from_secs(1))).set_response_timeout(Some(ANSWER_MAX));
    Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await
}

/// Sends one command, given as words.
async fn send(connection: &mut MultiplexedConnection, words: &[&str]) -> Result<Value, RedisError> {
    let mut command = redis::Cmd::new();
    words.iter().for_each(|word| _ = command.arg(word));
    connection.send_packed_command(&command).await?.extract_error()
}

/// One flash sale, with ids that no other has.
struct Sale {
    servers: Servers,
    run: String,
    coupon: String,
    away: Cell<bool>,
}

/// What became of one request.
enum Answer {
    /// The position of the change, and its serial if it is a coupon.
    Granted {
        position: (i64, i64),
        serial: Option<i64>,
    },
    Refused,
    Failed(String),
}

/// One of the 200 clients.
struct Buyer {
    sale: Rc<Sale>,
    bar: ProgressBar,
    connection: Option<MultiplexedConnection>,
    retries: u64,
}

impl Buyer {
    /// Asks until there is an answer. Each try carries the same REQUEST id, so that it has one effect at most.
    async fn ask(&mut self, words: &[&str]) -> Result<Value, String> {
        let began = Instant::now();
        loop {
            let answer = match &mut self.connection {
                Some(connection) => send(connection, words).await,
                None => match self.sale.servers.holdfast().await {
                    Ok(mut connection) => {
                        let answer = send(&mut connection, words).await;
                        self.connection = Some(connection);
                        answer
                    }
                    Err(error) => Err(error),
                },
            };
            let error = match answer {
                Ok(value) => {
                    self.sale.is_back(&self.bar);
                    return Ok(value);
                }
                Err(error) => error,
            };
            match error.code() {
                // Nothing was executed, or it is not known: the REQUEST id tells.
                Some("TRYAGAIN" | "LOADING" | "INDOUBT") => self.sale.is_waiting(&self.bar, &error.to_string()),
                Some(_) => return Err(error.to_string()),
                None => {
                    self.connection = None;
                    self.sale.is_waiting(&self.bar, "the connection broke");
                }
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("no answer within {} s; at last: {error}", PATIENCE.as_secs()));
            }
            self.retries += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }
}

impl Sale {
    fn new(servers: Servers, run: String) -> Self {
        let coupon = format!("{run}-coupon");
        Self { servers, run, coupon, away: Cell::new(false) }
    }

    fn product(&self, number: usize) -> String {
        format!("{}-p{number:03}", self.run)
    }

    /// Says once that it waits.
    fn is_waiting(&self, bar: &ProgressBar, why: &str) {
        if !self.away.replace(true) {
            bar.suspend(|| eprintln!("waiting for the server on {}: {why}", self.servers.listen));
        }
    }

    fn is_back(&self, bar: &ProgressBar) {
        if self.away.replace(false) {
            bar.suspend(|| eprintln!("the server on {} answers", self.servers.listen));
        }
    }

    /// Creates the coupon and the products.
    async fn set_up(self: &Rc<Self>) -> Result<()> {
        let mut buyer = Buyer { sale: Rc::clone(self), bar: ProgressBar::hidden(), connection: None, retries: 0 };
        let request = format!("{}-create", self.run);
        buyer.ask(&["COUPON.CREATE", &self.coupon, &COUPONS.to_string(), "REQUEST", &request, "ACK", "redis"]).await?;
        for number in 0..PRODUCTS {
            let request = format!("{}-set{number}", self.run);
            buyer.ask(&["STOCK.SET", &self.product(number), &UNITS.to_string(), "REQUEST", &request, "ACK", "redis"]).await?;
        }
        Ok(())
    }

    /// The number-th user asks for a coupon.
    async fn issue(buyer: &mut Buyer, number: usize) -> (String, Answer) {
        let (sale, user) = (Rc::clone(&buyer.sale), format!("user-{number}"));
        let request = format!("{}-c{number}", sale.run);
        let answer = buyer.ask(&["COUPON.ISSUE", &sale.coupon, &user, "REQUEST", &request]).await;
        (request, read(answer, "ISSUED", "SOLDOUT"))
    }

    /// The number-th order, of one unit.
    async fn order(buyer: &mut Buyer, number: usize) -> (String, Answer) {
        let sale = Rc::clone(&buyer.sale);
        // A prime: goes through the products in no obvious order, each as often as the others.
        let product = sale.product(number * 37 % PRODUCTS);
        let request = format!("{}-o{number}", sale.run);
        let answer = buyer.ask(&["STOCK.DECR", &product, "1", "REQUEST", &request]).await;
        (request, read(answer, "OK", "INSUFFICIENT"))
    }

    /// Runs requests number 0 to `asked`, each client taking the next one when it has its answer.
    async fn race<F>(self: &Rc<Self>, name: &'static str, asked: usize, one: F) -> Result<Tally>
    where
        F: AsyncFn(&mut Buyer, usize) -> (String, Answer) + Copy + 'static,
    {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(asked as u64) } else { ProgressBar::hidden() };
        bar.set_style(ProgressStyle::with_template("{prefix:<8} {bar:40} {human_pos}/{human_len} {per_sec}")?);
        bar.set_prefix(name);
        let shared = Rc::new((Cell::new(0), RefCell::new(Tally::new(name, asked))));
        let mut buyers = Vec::new();
        for _ in 0..CONNECTIONS {
            let connection = self.servers.holdfast().await.ok();
            buyers.push(Buyer { sale: Rc::clone(self), bar: bar.clone(), connection, retries: 0 });
        }
        let mut clients = JoinSet::new();
        let began = Instant::now();
        for mut buyer in buyers {
            let shared = Rc::clone(&shared);
            clients.spawn_local(async move {
                let (next, tally) = &*shared;
                while next.get() < asked {
                    let number = next.replace(next.get() + 1);
                    let began = Instant::now();
                    let (request, answer) = one(&mut buyer, number).await;
                    tally.borrow_mut().add(request, answer, began.elapsed());
                    buyer.bar.inc(1);
                }
                tally.borrow_mut().retries += buyer.retries;
            });
        }
        while let Some(client) = clients.join_next().await {
            client?;
        }
        bar.finish();
        let mut tally = shared.1.replace(Tally::new(name, 0));
        tally.took = began.elapsed();
        Ok(tally)
    }

    /// Reads back from Redis and Postgres what was granted, and prints it side by side.
    async fn audit(&self, coupons: &Tally, orders: &Tally) -> Result<bool> {
        let newest = coupons.granted.iter().chain(&orders.granted).map(|grant| grant.position).max().unwrap_or_default();
        let began = Instant::now();
        self.wait_for(newest).await?;
        println!("Postgres had everything {} ms after the last answer.\n", began.elapsed().as_millis());
        let redis = self.read_redis().await?;
        let postgres = self.read_postgres().await?;

        println!("{:<34}{:>10}{:>10}{:>10}{:>10}", "", "there was", "answered", "Redis", "Postgres");
        let mut equal = true;
        let mut line = |what: &str, counts: [i64; 4]| {
            let same = counts.iter().all(|count| *count == counts[0]);
            equal &= same;
            let [was, answered, redis, postgres] = counts.map(thousands);
            println!("{what:<34}{was:>10}{answered:>10}{redis:>10}{postgres:>10}  {}", if same { "equal" } else { "DIFFERENT" });
        };
        let distinct = |values: &mut dyn Iterator<Item = i64>| count(values.collect::<HashSet<_>>().len());
        let answered_serials = distinct(&mut coupons.granted.iter().filter_map(|grant| grant.serial));
        line("coupons issued", [COUPONS, count(coupons.granted.len()), redis.issued, postgres.issued]);
        line("  users who hold one", [COUPONS, count(coupons.granted.len()), redis.users, postgres.users]);
        line(
            "  distinct serials",
            [COUPONS, answered_serials, distinct(&mut redis.serials.iter().copied()), distinct(&mut postgres.serials.iter().copied())],
        );
        let products = count(PRODUCTS);
        let total = |units: &BTreeMap<String, i64>| units.values().sum::<i64>();
        // By the REQUEST id each answer is known by, since it says which product was ordered.
        let mut answered: BTreeMap<String, i64> = (0..PRODUCTS).map(|number| (self.product(number), 0)).collect();
        for grant in &orders.granted {
            let number = grant.request.rsplit('o').next().and_then(|number| number.parse::<usize>().ok()).unwrap_or_default();
            *answered.entry(self.product(number * 37 % PRODUCTS)).or_default() += 1;
        }
        line("units sold", [products * UNITS, total(&answered), total(&redis.sold), total(&postgres.sold)]);
        let exact = |units: &BTreeMap<String, i64>| count(units.values().filter(|sold| **sold == UNITS).count());
        line("  products of which 50 were sold", [products, exact(&answered), exact(&redis.sold), exact(&postgres.sold)]);
        line("  units left", [0, products * UNITS - total(&answered), redis.available, postgres.available]);

        let all: HashMap<(i64, i64), &str> =
            coupons.granted.iter().chain(&orders.granted).map(|grant| (grant.position, grant.request.as_str())).collect();
        let found = postgres.positions.iter().filter(|(position, request)| all.get(position) == Some(&request.as_str())).count();
        let answers = count(coupons.granted.len() + orders.granted.len());
        line("answers that are in the ledger once", [answers, count(all.len()), count(found), count(postgres.positions.len())]);
        Ok(equal)
    }

    /// Waits until Postgres has a position.
    async fn wait_for(self: &Sale, position: (i64, i64)) -> Result<()> {
        let position = format!("{}-{}", position.0, position.1);
        let began = Instant::now();
        loop {
            let asked = async {
                let mut connection = self.servers.holdfast().await?;
                send(&mut connection, &["HOLDFAST.AWAIT", &position, "5000"]).await
            };
            let said = match asked.await {
                Ok(value) => words(&value),
                Err(error) => vec![error.to_string()],
            };
            match said.first().map(String::as_str) {
                Some("APPLIED") => return Ok(()),
                Some("LOST") => return Err(format!("position {position} is lost").into()),
                _ if began.elapsed() > PATIENCE => return Err(format!("Postgres does not get to {position}: {said:?}").into()),
                _ => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    async fn read_redis(&self) -> Result<Found> {
        let mut connection = connect(&self.servers.redis).await?;
        let mut found = Found::default();
        for number in 0..PRODUCTS {
            let product = self.product(number);
            let left: Option<i64> = from_redis_value(send(&mut connection, &["GET", &format!("stock:product:{product}")]).await?)?;
            found.sold.insert(product, left.map_or(0, |left| UNITS - left));
            found.available += left.unwrap_or(0);
        }
        let issued = send(&mut connection, &["HGET", &format!("coupon:info:{}", self.coupon), "issued"]).await?;
        found.issued = from_redis_value::<Option<i64>>(issued)?.unwrap_or(0);
        let users: HashMap<String, String> =
            from_redis_value(send(&mut connection, &["HGETALL", &format!("coupon:users:{}", self.coupon)]).await?)?;
        found.users = count(users.len());
        // A user's field has one line a coupon: serial, state, time, order.
        let serials = users.values().flat_map(|lines| lines.lines()).filter_map(|line| line.split(' ').next()?.parse().ok());
        found.serials = serials.collect();
        Ok(found)
    }

    async fn read_postgres(&self) -> Result<Found> {
        let mut connection = PgConnection::connect(&self.servers.postgres).await?;
        let mut found = Found::default();
        let sold = "SELECT s.product_id, s.available, coalesce(-sum(l.pg_delta) FILTER (WHERE l.kind = 'decr'), 0)::bigint
                    FROM holdfast.stock s LEFT JOIN holdfast.stock_ledger l USING (product_id)
                    WHERE s.product_id = ANY($1) GROUP BY s.product_id";
        let products: Vec<String> = (0..PRODUCTS).map(|number| self.product(number)).collect();
        let rows: Vec<(String, i64, i64)> = sqlx::query_as(sold).bind(&products).fetch_all(&mut connection).await?;
        for (product, available, sold) in rows {
            found.available += available;
            found.sold.insert(product, sold);
        }
        let issued = "SELECT c.issued, count(i.serial), count(DISTINCT i.user_id), coalesce(array_agg(i.serial), '{}')
                      FROM holdfast.coupon c LEFT JOIN holdfast.coupon_issue i USING (coupon_id) WHERE coupon_id = $1 GROUP BY c.issued";
        let row: (i64, i64, i64, Vec<i64>) = sqlx::query_as(issued).bind(&self.coupon).fetch_one(&mut connection).await?;
        // Both what the coupon's row says and what was issued: the smaller one shows where they differ.
        (found.issued, found.users, found.serials) = (row.0.min(row.1), row.2, row.3);
        let positions = "SELECT epoch, n, request_id FROM holdfast.stock_ledger WHERE product_id = ANY($1) AND kind = 'decr'
                         UNION ALL
                         SELECT epoch, n, request_id FROM holdfast.coupon_ledger WHERE coupon_id = $2 AND kind = 'issue'";
        let rows: Vec<(i64, i64, Option<String>)> =
            sqlx::query_as(positions).bind(&products).bind(&self.coupon).fetch_all(&mut connection).await?;
        found.positions = rows.into_iter().map(|(epoch, n, request)| ((epoch, n), request.unwrap_or_default())).collect();
        Ok(found)
    }
}

/// What stands in Redis, or in Postgres.
#[derive(Default)]
struct Found {
    sold: BTreeMap<String, i64>,
    available: i64,
    issued: i64,
    users: i64,
    serials: Vec<i64>,
    positions: Vec<((i64, i64), String)>,
}

/// An accepted request.
struct Grant {
    request: String,
    position: (i64, i64),
    serial: Option<i64>,
}

/// What came of a race.
struct Tally {
    name: &'static str,
    asked: usize,
    granted: Vec<Grant>,
    refused: usize,
    errors: BTreeMap<String, usize>,
    retries: u64,
    took: Duration,
    /// Microseconds from the first try to the answer.
    latency: Option<Histogram<u64>>,
}

impl Tally {
    fn new(name: &'static str, asked: usize) -> Self {
        let latency = Histogram::new_with_max(120_000_000, 3).ok();
        Self { name, asked, granted: Vec::new(), refused: 0, errors: BTreeMap::new(), retries: 0, took: Duration::ZERO, latency }
    }

    fn add(&mut self, request: String, answer: Answer, took: Duration) {
        match answer {
            Answer::Granted { position, serial } => self.granted.push(Grant { request, position, serial }),
            Answer::Refused => self.refused += 1,
            Answer::Failed(error) => *self.errors.entry(error).or_default() += 1,
        }
        if let Some(latency) = &mut self.latency {
            latency.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }

    fn print(&self) {
        let ms = |micros: Option<u64>| format!("{:.1}", Duration::from_micros(micros.unwrap_or(0)).as_secs_f64() * 1e3);
        let quantile = |q| self.latency.as_ref().map(|latency| latency.value_at_quantile(q));
        let [asked, granted, refused, errors] = [self.asked, self.granted.len(), self.refused, self.errors.values().sum()].map(thousands);
        let per_second = thousands(u128::from(u64::try_from(self.asked).unwrap_or(0)) * 1_000_000 / self.took.as_micros().max(1));
        println!(
            "{:<10}{asked:>9}{granted:>9}{refused:>9}{errors:>9}{:>9}{per_second:>9}{:>10}{:>10}{:>10}",
            self.name,
            thousands(self.retries),
            ms(quantile(0.5)),
            ms(quantile(0.99)),
            ms(self.latency.as_ref().map(Histogram::max)),
        );
    }
}

/// Reads a reply: an array whose first word says how it came out, and whose last one is the position if it was granted.
fn read(answer: Result<Value, String>, granted: &str, refused: &str) -> Answer {
    let reply = match answer {
        Ok(value) => words(&value),
        Err(error) => return Answer::Failed(error),
    };
    match reply.first() {
        Some(word) if word == refused => Answer::Refused,
        Some(word) if word == granted => {
            let position = reply.last().and_then(|position| position.split_once('-'));
            match position.and_then(|(epoch, n)| Some((epoch.parse().ok()?, n.parse().ok()?))) {
                Some(position) => {
                    Answer::Granted { position, serial: reply.get(1).filter(|_| word == "ISSUED").and_then(|s| s.parse().ok()) }
                }
                None => Answer::Failed(format!("no position in {reply:?}")),
            }
        }
        _ => Answer::Failed(format!("{reply:?}")),
    }
}

/// A flat array as text.
fn words(value: &Value) -> Vec<String> {
    let Value::Array(values) = value else { return vec![format!("{value:?}")] };
    let word = |value: &Value| match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::Int(integer) => integer.to_string(),
        other => format!("{other:?}"),
    };
    values.iter().map(word).collect()
}

fn count(len: usize) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

/// 12345 as 12,345.
fn thousands(number: impl ToString) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
