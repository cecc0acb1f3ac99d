//! The servers that everything is measured on, and what is between two rounds.

use std::cell::Cell;
use std::fs;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use crate::cpu::{self, Cpu};
use crate::harness::{Database, Sidecar, Stack};
use crate::servers::RedisServer;
use crate::wire::{command, send_all};

pub const PRODUCTS: u64 = 10_000;
/// How long Postgres may take to catch up after a round.
const DRAIN_MAX: Duration = Duration::from_secs(300);
/// More than anybody takes.
const PLENTY: &str = "1000000000000";

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
pub static STOP: AtomicBool = AtomicBool::new(false);

pub fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Whether so little is measured that it takes a minute.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Length {
    Short,
    Full,
}

/// Whom the load goes to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Holdfast,
    /// The same Redis, one script call an operation. The script is what anybody would write by hand: read, compare, append one entry to a
    /// stream, change. Nothing guards it, and nobody carries its stream anywhere.
    Direct,
}

/// See the module.
pub struct Stage {
    pub stack: Stack,
    pub runtime: Runtime,
    pub length: Length,
    /// Numbers coupons, users and requests, so that none comes twice.
    pub fresh: Rc<Cell<u64>>,
    pub direct_stock: String,
    pub direct_coupon: String,
    /// The id of a proxy's process, while there is one.
    pub proxy: Cell<Option<u32>>,
}

impl Stage {
    /// With these flags of the sidecar.
    pub fn start(length: Length, flags: &[&str]) -> Self {
        let (redis, postgres) = (RedisServer::start(), Database::new(true));
        let sidecar = Sidecar::with_settings(&redis.url(), &postgres.url, flags);
        let stack = Stack { sidecar, redis, postgres };
        stack.wait_until_ready();
        let mut redis = stack.backing();
        // A rewrite of the append-only file in the middle of a round would strike one side only.
        redis.ask("CONFIG SET auto-aof-rewrite-percentage 0");
        let mut load = |script: &str| redis.ask_words(&["SCRIPT", "LOAD", script]);
        let (direct_stock, direct_coupon) = (load(DIRECT_STOCK), load(DIRECT_COUPON));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { stack, runtime, length, fresh: Rc::new(Cell::new(0)), direct_stock, direct_coupon, proxy: Cell::new(None) }
    }

    pub fn is_short(&self) -> bool {
        self.length == Length::Short
    }

    pub fn port(&self, side: Side) -> u16 {
        match side {
            Side::Holdfast => self.stack.sidecar.port,
            Side::Direct => self.stack.redis.port(),
        }
    }

    /// A number that nobody has had yet.
    pub fn fresh(&self) -> u64 {
        self.fresh.set(self.fresh.get() + 1);
        self.fresh.get()
    }

    pub fn create_products(&self) {
        let products = || (0..PRODUCTS).map(sku).chain(["hot".to_owned()]).map(|name| (name, PLENTY)).chain([("none".to_owned(), "0")]);
        let ours = products().map(|(name, units)| command(&["STOCK.SET", &name, units, "ACK", "redis"]));
        let direct = products().map(|(name, units)| command(&["SET", &format!("direct:{name}"), units]));
        self.runtime.block_on(async {
            send_all(self.port(Side::Holdfast), ours).await;
            send_all(self.port(Side::Direct), direct).await;
        });
        self.drain();
    }

    /// A coupon that nobody has yet.
    pub fn create_coupon(&self, side: Side) -> String {
        let coupon = format!("c-{}", self.fresh());
        match side {
            Side::Holdfast => assert!(self.stack.connect().ask(&format!("COUPON.CREATE {coupon} 1000000000 ACK redis")).starts_with("[OK")),
            Side::Direct => _ = self.stack.backing().ask(&format!("HSET direct:{coupon} issued 0 total 1000000000")),
        }
        coupon
    }

    /// With the relay waiting for Postgres: what the rest of it can, as where Postgres has a machine of its own.
    pub fn relay_held<R>(&self, during: impl FnOnce() -> R) -> R {
        self.stack.postgres.holding("BEGIN; SELECT FROM holdfast.partition FOR UPDATE", during)
    }

    /// How many changes Postgres does not have yet.
    pub fn lag(&self) -> f64 {
        self.stack.connect().field("HOLDFAST.STATUS", "lag").trim_matches(']').parse().unwrap()
    }

    /// Waits until Postgres has everything: how far it was behind, and how long it took.
    pub fn drain(&self) -> (f64, Duration) {
        let began = Instant::now();
        let mut client = self.stack.connect();
        let mut first = None;
        loop {
            let lag: f64 = client.field("HOLDFAST.STATUS", "lag").trim_matches(']').parse().unwrap();
            let first = *first.get_or_insert(lag);
            if lag == 0.0 {
                return (first, began.elapsed());
            }
            assert!(began.elapsed() < DRAIN_MAX, "Postgres is still {lag} changes behind");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn cpu(&self) -> Cpu {
        let mut cpu = Cpu {
            redis: cpu::process(self.stack.redis.pid()),
            postgres: cpu::family(self.stack.postgres.own.as_ref().unwrap().pid()),
            proxy: self.proxy.get().map_or(0, cpu::family),
            machine: cpu::machine(),
            load: cpu::process(std::process::id()) + cpu::ended_children(std::process::id()),
            ..Cpu::default()
        };
        cpu::threads(self.stack.sidecar.pid(), |name, nanos| {
            *(if name.starts_with("front") { &mut cpu.front } else { &mut cpu.back }) += nanos;
        });
        cpu
    }

    /// What it is measured on.
    pub fn machine(&self) -> String {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processor.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1)).unwrap_or("unknown");
        let redis = Command::new("redis-server").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
        let redis = String::from_utf8_lossy(&redis);
        let redis = redis.split(' ').find_map(|word| word.strip_prefix("v=")).unwrap_or("unknown");
        let show = |setting: &str| self.stack.postgres.value(&format!("SELECT current_setting('{setting}')"));
        let (postgres, fsync) = (show("server_version"), show("fsync"));
        let busy = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        format!(
            "holdfast {}, redis {redis} (appendfsync everysec), postgres {postgres} (fsync {fsync})\n{cores} cores of {processor}, shared by \
             all of these and the load generator; load before {}",
            env!("CARGO_PKG_VERSION"),
            busy.split(' ').next().unwrap_or_default()
        )
    }
}

/// A product's name as redis-benchmark makes them of `sku-__rand_int__`.
pub fn sku(number: u64) -> String {
    format!("sku-{number:012}")
}
