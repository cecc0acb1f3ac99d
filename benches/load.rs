//! How fast it is, beside the usual way: one script call a command, straight to the same Redis.
//!
//! `make bench`, or `BENCH=short make bench` for a minute. Starts a Redis, a Postgres and the release build of its own, on loopback, and
//! stops them in the end. Each case runs in rounds, A B A B: a round through Holdfast, a pause until Postgres has everything, the same
//! operations directly, and so on. Shown are medians over the rounds, and the ratio of the medians: other work on the machine strikes both.
//!
//! The direct script does what anybody would write by hand: read, compare, append one entry to a stream, change. Nothing guards it, and
//! nothing carries its stream anywhere, while Holdfast's relay writes to Postgres on the same cores during its rounds.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "as in tests: what fails shall end it, and the table goes to stdout"
)]

#[path = "../tests/it/harness.rs"]
mod harness;
#[path = "../tests/it/servers.rs"]
mod servers;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, ExitCode};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::Stack;
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinSet, LocalSet};

const CONNECTIONS: usize = 50;
const PIPELINES: [usize; 2] = [1, 16];
const PRODUCTS: u64 = 10_000;
const IDLE_CONNECTIONS: usize = 1_000;
/// Below this ratio on one hot product with pipelining something is broken, however busy the machine is.
const SANE_RATIO: f64 = 0.3;
/// How long Postgres may take to catch up after a round.
const DRAIN_MAX: Duration = Duration::from_secs(120);

const DIRECT_STOCK: &str = "local left = tonumber(redis.call('GET', KEYS[1]))
if not left then return redis.error_reply('NOTFOUND') end
if left < tonumber(ARGV[1]) then return {'INSUFFICIENT', left} end
local after = redis.call('DECRBY', KEYS[1], ARGV[1])
return {'OK', after, redis.call('XADD', KEYS[2], '*', 'changes', 'decr | ' .. KEYS[1] .. ' -' .. ARGV[1] .. ' ' .. after)}";

const DIRECT_COUPON: &str = "local held = redis.call('HGET', KEYS[2], ARGV[1])
if held then return {'ALREADY', held} end
local info = redis.call('HMGET', KEYS[1], 'issued', 'total')
if tonumber(info[1]) >= tonumber(info[2]) then return {'SOLDOUT'} end
local serial = redis.call('HINCRBY', KEYS[1], 'issued', 1)
redis.call('HSET', KEYS[2], ARGV[1], serial)
local id = redis.call('XADD', KEYS[3], '*', 'changes', 'issue | ' .. KEYS[1] .. ' ' .. ARGV[1] .. ' ' .. serial)
return {'ISSUED', serial, tonumber(info[2]) - serial, id}";

/// Ctrl-C or SIGTERM: the round ends, then the servers are stopped.
static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let short = match std::env::var("BENCH").as_deref() {
        Ok("short") => true,
        Ok("full") | Err(_) => false,
        Ok(other) => {
            eprintln!("BENCH={other}: must be short or full");
            return ExitCode::FAILURE;
        }
    };
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut terminate, mut interrupt) = (signal(SignalKind::terminate()).unwrap(), signal(SignalKind::interrupt()).unwrap());
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            STOP.store(true, Ordering::Relaxed);
        });
    });
    let began = Instant::now();
    let mut bench = Bench::start(short);
    bench.print_machine();
    bench.idle_memory();
    let ratio = bench.all();
    println!("\nTook {} s.", began.elapsed().as_secs());
    if ratio.is_some_and(|ratio| ratio < SANE_RATIO) {
        println!("FAILED: below {SANE_RATIO} of direct on one hot product with pipelining.");
        return ExitCode::FAILURE;
    }
    if STOP.load(Ordering::Relaxed) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What is sold, and how.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    HotProduct,
    ManyProducts,
    HotCoupon,
}

impl Case {
    const ALL: [Self; 3] = [Self::HotProduct, Self::ManyProducts, Self::HotCoupon];

    const fn name(self) -> &'static str {
        match self {
            Self::HotProduct => "STOCK.DECR, one product",
            Self::ManyProducts => "STOCK.DECR, 10,000 products",
            Self::HotCoupon => "COUPON.ISSUE, one coupon",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Holdfast,
    Direct,
}

/// What happened in the rounds of one side of one case.
#[derive(Default)]
struct Rounds {
    rates: Vec<f64>,
    redis_micros: Vec<f64>,
    front_micros: Vec<f64>,
    back_micros: Vec<f64>,
    latency: Option<Histogram<u64>>,
    /// The p50 and p99 in ms that redis-benchmark says.
    said: Vec<(f64, f64)>,
    /// Changes that Postgres did not have when the round ended, and how long it took to get them.
    lags: Vec<(f64, f64)>,
    errors: BTreeMap<String, u64>,
}

/// CPU time that was used, in nanoseconds.
#[derive(Clone, Copy, Default)]
struct Cpu {
    redis: u64,
    front: u64,
    back: u64,
}

/// What one round came to.
struct Round {
    operations: u64,
    took: Duration,
    latency: Option<Histogram<u64>>,
    said: Option<(f64, f64)>,
    errors: BTreeMap<String, u64>,
}

struct Bench {
    stack: Stack,
    runtime: Runtime,
    round: Duration,
    rounds: usize,
    /// Numbers coupons and users, so that none comes twice.
    fresh: Rc<Cell<u64>>,
    direct_stock: String,
    direct_coupon: String,
}

impl Bench {
    fn start(short: bool) -> Self {
        let stack = Stack::with_own_postgres();
        let mut redis = stack.backing();
        // A rewrite of the append-only file in the middle of a round would strike one side only.
        redis.ask("CONFIG SET auto-aof-rewrite-percentage 0");
        let mut load = |script: &str| redis.ask_words(&["SCRIPT", "LOAD", script]);
        let (direct_stock, direct_coupon) = (load(DIRECT_STOCK), load(DIRECT_COUPON));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (round, rounds) = if short { (Duration::from_millis(400), 3) } else { (Duration::from_millis(1500), 5) };
        Self { stack, runtime, round, rounds, fresh: Rc::new(Cell::new(0)), direct_stock, direct_coupon }
    }

    fn print_machine(&self) {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processor.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1)).unwrap_or("unknown");
        let redis = Command::new("redis-server").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
        let redis = String::from_utf8_lossy(&redis);
        let redis = redis.split(' ').find_map(|word| word.strip_prefix("v=")).unwrap_or("unknown");
        let (postgres, fsync) = (self.stack.postgres.value(&show("server_version")), self.stack.postgres.value(&show("fsync")));
        let busy = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        println!("holdfast {}, redis {redis} (appendfsync everysec), postgres {postgres} (fsync {fsync})", env!("CARGO_PKG_VERSION"));
        println!("{cores} cores of {processor}, shared by all of these and the load generator; load before {}", &busy[..4.min(busy.len())]);
        println!(
            "{CONNECTIONS} connections; {} rounds of {} ms a side, A B A B; direct: one EVALSHA a command to the same Redis",
            self.rounds,
            self.round.as_millis()
        );
        println!(
            "The relay carries everything to Postgres during Holdfast's rounds; the direct ones begin when it has nothing left to do."
        );
    }

    /// What the sidecar takes while nobody sells, and what a connection adds.
    fn idle_memory(&self) {
        let (pid, port) = (self.stack.sidecar.pid(), self.stack.sidecar.port);
        let before = memory(pid);
        let connections = self.runtime.block_on(async {
            let mut connections = Vec::new();
            for _ in 0..IDLE_CONNECTIONS {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                stream.write_all(b"PING\r\n").await.unwrap();
                let mut pong = [0; 7];
                stream.read_exact(&mut pong).await.unwrap();
                connections.push(stream);
            }
            connections
        });
        let after = memory(pid);
        drop(connections);
        let each = after.saturating_sub(before) as f64 / IDLE_CONNECTIONS as f64;
        println!("Memory: {:.1} MiB idle; {each:.1} KiB for each of {IDLE_CONNECTIONS} idle connections.\n", before as f64 / 1024.0);
    }

    /// Runs every case; returns the ratio on one hot product with pipelining.
    fn all(&mut self) -> Option<f64> {
        println!(
            "{:<28}{:>5} {:<9}{:>9} {:>17}{:>8}{:>8}{:>10}{:>9}{:>9}{:>9}{:>8}{:>7}",
            "", "pipe", "", "per s", "min-max", "p50 ms", "p99 ms", "redis µs", "front µs", "relay µs", "lag", "drain s", "ratio"
        );
        self.create_products();
        let mut sane = None;
        let mut rates = BTreeMap::new();
        for (c, case) in Case::ALL.into_iter().enumerate() {
            for pipeline in PIPELINES {
                let (ours, direct) = self.interleaved(|bench, side| bench.generate(case, side, pipeline))?;
                let ratio = print(case.name(), pipeline, &ours, &direct);
                rates.insert((c, pipeline), (median(&ours.rates), median(&direct.rates)));
                if case == Case::HotProduct && pipeline == 16 {
                    sane = Some(ratio);
                }
            }
        }
        println!("The same with redis-benchmark:");
        for (c, case) in Case::ALL.into_iter().enumerate() {
            for pipeline in PIPELINES {
                let (ours, direct) = rates[&(c, pipeline)];
                // Shorter: it gives up at the first error, and begins the round again.
                let seconds = self.round.as_secs_f64() / 2.0;
                let (ours, direct) = self.interleaved(|bench, side| {
                    let rate = if side == Side::Holdfast { ours } else { direct };
                    bench.redis_benchmark(case, side, pipeline, format!("{:.0}", (rate * seconds).max(1_000.0)))
                })?;
                print(case.name(), pipeline, &ours, &direct);
            }
        }
        println!(
            "\nper s: median of the rounds. µs: CPU time an operation, of the whole Redis process, of the sidecar's front thread (clients and \
             batches) and of its other threads (relay).\nlag: changes that Postgres did not have yet when a round ended, the most of the \
             rounds; drain: how long it took to get them."
        );
        sane
    }

    /// Rounds A B A B. `None` when told to stop.
    fn interleaved(&self, one: impl Fn(&Self, Side) -> Round) -> Option<(Rounds, Rounds)> {
        let (mut ours, mut direct) = (Rounds::default(), Rounds::default());
        for _ in 0..self.rounds {
            for (side, rounds) in [(Side::Holdfast, &mut ours), (Side::Direct, &mut direct)] {
                if STOP.load(Ordering::Relaxed) {
                    return None;
                }
                let before = self.cpu();
                let round = one(self, side);
                let after = self.cpu();
                rounds.add(round, before, after);
                if side == Side::Holdfast {
                    rounds.lags.push(self.drain());
                } else {
                    self.stack.backing().ask("UNLINK direct:outbox");
                }
            }
        }
        Some((ours, direct))
    }

    /// How far Postgres is behind, and how long it takes to get there.
    fn drain(&self) -> (f64, f64) {
        let began = Instant::now();
        let mut client = self.stack.connect();
        let mut first = None;
        loop {
            let lag: f64 = client.field("HOLDFAST.STATUS", "lag").trim_matches(']').parse().unwrap();
            let first = *first.get_or_insert(lag);
            if lag == 0.0 {
                return (first, began.elapsed().as_secs_f64());
            }
            assert!(began.elapsed() < DRAIN_MAX, "Postgres is still {lag} changes behind");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn create_products(&self) {
        let names: Vec<String> = (0..PRODUCTS).map(sku).chain(["hot".to_owned()]).collect();
        let ours = names.iter().map(|name| command(&["STOCK.SET", name, "1000000000000", "ACK", "redis"])).collect();
        let direct = names.iter().map(|name| command(&["SET", &format!("direct:{name}"), "1000000000000"])).collect();
        self.runtime.block_on(async {
            send_all(self.stack.sidecar.port, ours).await;
            send_all(self.stack.redis.port(), direct).await;
        });
        self.drain();
    }

    /// A coupon that nobody has yet.
    fn create_coupon(&self, side: Side) -> String {
        self.fresh.set(self.fresh.get() + 1);
        let coupon = format!("c-{}", self.fresh.get());
        match side {
            Side::Holdfast => assert!(self.stack.connect().ask(&format!("COUPON.CREATE {coupon} 1000000000")).starts_with("[OK")),
            Side::Direct => _ = self.stack.backing().ask(&format!("HSET direct:{coupon} issued 0 total 1000000000")),
        }
        coupon
    }

    /// The words of one operation; `sku` and `user` may be a placeholder.
    fn words(&self, case: Case, side: Side, coupon: &str, sku: &str, user: &str) -> Vec<String> {
        let product = if case == Case::HotProduct { "hot" } else { sku };
        let (stock, issue) = (&self.direct_stock, &self.direct_coupon);
        let text = match (case, side) {
            (Case::HotCoupon, Side::Holdfast) => format!("COUPON.ISSUE {coupon} {user}"),
            (Case::HotCoupon, Side::Direct) => format!("EVALSHA {issue} 3 direct:{coupon} direct:{coupon}:users direct:outbox {user}"),
            (_, Side::Holdfast) => format!("STOCK.DECR {product} 1"),
            (_, Side::Direct) => format!("EVALSHA {stock} 2 direct:{product} direct:outbox 1"),
        };
        text.split(' ').map(str::to_owned).collect()
    }

    fn port(&self, side: Side) -> u16 {
        match side {
            Side::Holdfast => self.stack.sidecar.port,
            Side::Direct => self.stack.redis.port(),
        }
    }

    /// A round with the generator of our own.
    fn generate(&self, case: Case, side: Side, pipeline: usize) -> Round {
        let coupon = if case == Case::HotCoupon { self.create_coupon(side) } else { String::new() };
        // The ids have twelve digits, and are written over in place.
        let words = self.words(case, side, &coupon, &sku(0), &sku(0));
        let template = command(&words.iter().map(String::as_str).collect::<Vec<_>>());
        let place = template.windows(12).position(|digits| digits == b"000000000000");
        let (fresh, many) = (Rc::clone(&self.fresh), case == Case::ManyProducts);
        let write = Rc::new(move |out: &mut Vec<u8>| {
            let at = out.len();
            out.extend_from_slice(&template);
            let Some(place) = place else { return };
            let mut number = fresh.get() + 1;
            fresh.set(number);
            if many {
                // Scrambled, so that neighbours do not come one after the other.
                number = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
                number %= PRODUCTS;
            }
            for digit in out[at + place..at + place + 12].iter_mut().rev() {
                *digit = b'0' + (number % 10) as u8;
                number /= 10;
            }
        });
        let round = self.runtime.block_on(generate(self.port(side), pipeline, self.round, write));
        self.forget_coupon(side, &coupon);
        round
    }

    /// A round with redis-benchmark.
    fn redis_benchmark(&self, case: Case, side: Side, pipeline: usize, operations: String) -> Round {
        let coupon = if case == Case::HotCoupon { self.create_coupon(side) } else { String::new() };
        let range = if case == Case::HotCoupon { "100000000000" } else { "10000" };
        let words = self.words(case, side, &coupon, "sku-__rand_int__", "user-__rand_int__");
        let mut errors = BTreeMap::new();
        let fields = loop {
            let output = Command::new("redis-benchmark")
                .args(["-p", &self.port(side).to_string(), "-c", &CONNECTIONS.to_string(), "-P", &pipeline.to_string()])
                .args(["-n", &operations, "-r", range, "--csv"])
                .args(&words)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            // "test","rps","avg","min","p50","p95","p99","max"; the name of the test is the command, without commas.
            let last = text.lines().last().unwrap_or_default().split(',').skip(1);
            let fields: Vec<f64> = last.filter_map(|field| field.trim_matches('"').parse().ok()).collect();
            if fields.len() == 7 {
                break fields;
            }
            // It ends at the first error reply: the round begins again.
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().find(|line| line.contains("rror")).unwrap_or("it said nothing").to_owned();
            *errors.entry(format!("redis-benchmark gave up: {}", kind_of(said.as_bytes()))).or_default() += 1;
            if errors.values().sum::<u64>() > 5 {
                break Vec::new();
            }
            std::thread::sleep(Duration::from_millis(500));
        };
        self.forget_coupon(side, &coupon);
        let (Some(rate), Some(p50), Some(p99)) = (fields.first(), fields.get(3), fields.get(5)) else {
            return Round { operations: 0, took: Duration::ZERO, latency: None, said: None, errors };
        };
        let operations: u64 = operations.parse().unwrap();
        let took = Duration::from_secs_f64(operations as f64 / rate);
        Round { operations, took, latency: None, said: Some((*p50, *p99)), errors }
    }

    fn forget_coupon(&self, side: Side, coupon: &str) {
        if side == Side::Direct && !coupon.is_empty() {
            self.stack.backing().ask(&format!("UNLINK direct:{coupon} direct:{coupon}:users"));
        }
    }

    fn cpu(&self) -> Cpu {
        let mut cpu = Cpu::default();
        threads(self.stack.redis.pid(), |_, nanos| cpu.redis += nanos);
        threads(self.stack.sidecar.pid(), |name, nanos| if name == "front" { cpu.front += nanos } else { cpu.back += nanos });
        cpu
    }
}

impl Rounds {
    fn add(&mut self, round: Round, before: Cpu, after: Cpu) {
        for (word, count) in round.errors {
            *self.errors.entry(word).or_default() += count;
        }
        if round.operations == 0 {
            // Told as an error; a rate of nothing would spoil the median.
            return;
        }
        let operations = round.operations as f64;
        let micros = |before: u64, after: u64| after.saturating_sub(before) as f64 / 1e3 / operations;
        self.rates.push(operations / round.took.as_secs_f64());
        self.redis_micros.push(micros(before.redis, after.redis));
        self.front_micros.push(micros(before.front, after.front));
        self.back_micros.push(micros(before.back, after.back));
        match (&mut self.latency, round.latency) {
            (Some(all), Some(more)) => all.add(more).unwrap(),
            (all, more) => *all = all.take().or(more),
        }
        self.said.extend(round.said);
    }

    fn quantiles(&self) -> (f64, f64) {
        match &self.latency {
            Some(latency) => (latency.value_at_quantile(0.5) as f64 / 1e3, latency.value_at_quantile(0.99) as f64 / 1e3),
            None => (median(self.said.iter().map(|said| &said.0)), median(self.said.iter().map(|said| &said.1))),
        }
    }
}

/// Prints the two lines of a case, and returns the ratio of the medians.
fn print(name: &str, pipeline: usize, ours: &Rounds, direct: &Rounds) -> f64 {
    let ratio = median(&ours.rates) / median(&direct.rates);
    for (side, rounds) in [(Side::Holdfast, ours), (Side::Direct, direct)] {
        let least = rounds.rates.iter().copied().fold(f64::MAX, f64::min);
        let most = rounds.rates.iter().copied().fold(0.0, f64::max);
        let (p50, p99) = rounds.quantiles();
        let (label, who) = if side == Side::Holdfast { (name, "holdfast") } else { ("", "direct") };
        let pipe = if side == Side::Holdfast { pipeline.to_string() } else { String::new() };
        print!(
            "{label:<28}{pipe:>5} {who:<9}{:>9.0} {:>17}{p50:>8.2}{p99:>8.2}{:>10.2}",
            median(&rounds.rates),
            format!("{least:.0}-{most:.0}"),
            median(&rounds.redis_micros)
        );
        if side == Side::Holdfast {
            let lag = rounds.lags.iter().map(|lag| lag.0).fold(0.0, f64::max);
            let drain = rounds.lags.iter().map(|lag| lag.1).fold(0.0, f64::max);
            print!("{:>9.2}{:>9.2}{lag:>9.0}{drain:>8.2}{ratio:>7.2}", median(&rounds.front_micros), median(&rounds.back_micros));
        }
        println!();
        for (error, count) in &rounds.errors {
            println!("      {count} x {error}");
        }
    }
    ratio
}

/// Sends batches of `pipeline` commands over each connection for a time, each batch when the one before is answered.
async fn generate<W: Fn(&mut Vec<u8>) + 'static>(port: u16, pipeline: usize, duration: Duration, write: Rc<W>) -> Round {
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        streams.push(stream);
    }
    let local = LocalSet::new();
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for mut stream in streams {
        let write = Rc::clone(&write);
        let client = async move {
            let (mut latency, mut errors, mut operations) = (Histogram::new(3).unwrap(), BTreeMap::new(), 0);
            let (mut out, mut input, mut filled) = (Vec::new(), vec![0; 16 << 10], 0);
            while began.elapsed() < duration {
                out.clear();
                (0..pipeline).for_each(|_| write(&mut out));
                let sent = Instant::now();
                stream.write_all(&out).await.unwrap();
                let mut missing = pipeline;
                while missing > 0 {
                    let read = stream.read(&mut input[filled..]).await.unwrap();
                    assert!(read > 0, "the connection was closed");
                    filled += read;
                    let mut at = 0;
                    while let Some(length) = frame(&input[at..filled]) {
                        let reply = &input[at..at + length];
                        if !reply.starts_with(b"*") {
                            *errors.entry(kind_of(reply)).or_default() += 1;
                            (at, missing) = (at + length, missing - 1);
                            continue;
                        }
                        latency.record(u64::try_from(sent.elapsed().as_micros()).unwrap()).unwrap();
                        (at, missing, operations) = (at + length, missing - 1, operations + 1);
                    }
                    input.copy_within(at..filled, 0);
                    filled -= at;
                }
            }
            (operations, latency, errors)
        };
        clients.spawn_local_on(client, &local);
    }
    local
        .run_until(async {
            let mut round =
                Round { operations: 0, took: Duration::ZERO, latency: None, said: None, errors: BTreeMap::<String, u64>::new() };
            let mut all = Histogram::new(3).unwrap();
            while let Some(client) = clients.join_next().await {
                let (operations, latency, errors) = client.unwrap();
                round.operations += operations;
                all.add(latency).unwrap();
                errors.into_iter().for_each(|(word, count): (String, u64)| *round.errors.entry(word).or_default() += count);
            }
            (round.took, round.latency) = (began.elapsed(), Some(all));
            round
        })
        .await
}

/// An error reply with its numbers left out, so that those of one kind count as one.
fn kind_of(reply: &[u8]) -> String {
    let reply = String::from_utf8_lossy(reply);
    let mut text = reply.trim().chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).collect::<Vec<_>>();
    text.dedup_by(|a, b| *a == '#' && *b == '#');
    text.into_iter().collect()
}

/// The length of the reply that these bytes begin with, if it is complete.
fn frame(bytes: &[u8]) -> Option<usize> {
    let end = bytes.iter().position(|&byte| byte == b'\n')? + 1;
    let number = || std::str::from_utf8(&bytes[1..end - 2]).ok()?.parse::<i64>().ok();
    match bytes[0] {
        b'$' => {
            let length = usize::try_from(number()?).map_or(end, |length| end + length + 2);
            (length <= bytes.len()).then_some(length)
        }
        b'*' => (0..number()?).try_fold(end, |at, _| Some(at + frame(&bytes[at..])?)),
        _ => Some(end),
    }
}

/// Sends commands, and waits for every answer.
async fn send_all(port: u16, commands: Vec<Vec<u8>>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    for some in commands.chunks(500) {
        stream.write_all(&some.concat()).await.unwrap();
        let (mut input, mut missing) = (Vec::new(), some.len());
        while missing > 0 {
            assert!(stream.read_buf(&mut input).await.unwrap() > 0);
            while let Some(length) = frame(&input) {
                assert!(!input.starts_with(b"-"), "{}", String::from_utf8_lossy(&input));
                input.drain(..length);
                missing -= 1;
            }
        }
    }
}

/// A command as RESP.
fn command(words: &[&str]) -> Vec<u8> {
    let words_of = words.iter().map(|word| format!("${}\r\n{word}\r\n", word.len()));
    format!("*{}\r\n{}", words.len(), words_of.collect::<String>()).into_bytes()
}

/// A product's name as redis-benchmark makes them of `sku-__rand_int__`.
fn sku(number: u64) -> String {
    format!("sku-{number:012}")
}

/// A query for a setting of Postgres.
fn show(setting: &str) -> String {
    format!("SELECT current_setting('{setting}')")
}

/// CPU time of each thread of a process, in nanoseconds.
fn threads(pid: u32, mut each: impl FnMut(&str, u64)) {
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let nanos = read("schedstat").split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0);
        each(read("comm").trim(), nanos);
    }
}

/// The resident memory of a process, in KiB.
fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn median<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().copied().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
