//! An installation under load, with a proxy before each of its parts, and all that can happen to it.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use redis::Commands as _;

use crate::checker::{self, Books, Coupon, CouponRow, Side, StockRow};
use crate::harness::{Client, Database, Sidecar, wait_until};
use crate::history::{Position, Record, position};
use crate::load::{COUPONS, Load, PRODUCTS, Plan};
use crate::proxy::Proxy;
use crate::random::{Random, seed};
use crate::servers::{Postgres, RedisServer};

/// How long the system may take to sell again after a fault has passed.
const SELLS_AGAIN_WITHIN: Duration = Duration::from_secs(20);

/// How many operations have to be accepted before it counts as selling: more than there are clients, who may be told of what came before.
const SELLS: u64 = 30;

/// How many installations run at a time: more would only wait for the machine.
const AT_A_TIME: usize = 2;

/// Keeps a place among the installations that run at a time.
struct Turn;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

impl Turn {
    fn take() -> Self {
        let running = RUNNING.lock().unwrap();
        *ENDED.wait_while(running, |running| *running >= AT_A_TIME).unwrap() += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap() -= 1;
        ENDED.notify_one();
    }
}

/// See the module.
pub struct World {
    pub sidecar: Sidecar,
    pub redis: RedisServer,
    pub database: Database,
    /// Between the clients and the sidecar, the sidecar and Redis, the sidecar and Postgres.
    pub to_sidecar: Proxy,
    pub to_redis: Proxy,
    pub to_postgres: Proxy,
    pub random: Random,
    seed: u64,
    /// Another sidecar on the same Redis and Postgres, and what stands between it and its clients.
    second: Option<(Sidecar, Proxy)>,
    load: Option<Load>,
    began: Instant,
    late: u64,
    detail: String,
    _turn: Turn,
}

impl World {
    /// Starts everything, fills it, and lets the clients begin.
    pub fn start(plan: Plan) -> Self {
        Self::with(plan, false)
    }

    /// The same with two sidecars, each with half of the clients.
    pub fn start_two(plan: Plan) -> Self {
        Self::with(plan, true)
    }

    fn with(plan: Plan, two: bool) -> Self {
        let turn = Turn::take();
        let seed = seed();
        let mut random = Random::new(seed);
        let redis = RedisServer::start();
        let database = Database::new(true);
        let to_redis = Proxy::start(redis.port(), b"EVALSHA");
        let to_postgres = Proxy::start(database.own.as_ref().unwrap().port(), b"COMMIT");
        let sidecar = Self::sidecar(&to_redis, &to_postgres, &database, &plan.detail);
        let to_sidecar = Proxy::start(sidecar.port, b"");
        let second = two.then(|| {
            let sidecar = Self::sidecar(&to_redis, &to_postgres, &database, &plan.detail);
            let to_it = Proxy::start(sidecar.port, b"");
            (sidecar, to_it)
        });
        let ports: Vec<u16> = [Some(to_sidecar.port()), second.as_ref().map(|(_, to_it)| to_it.port())].into_iter().flatten().collect();
        let load = Load::start(ports.clone(), Plan { clients: 0, ..plan.clone() }, &mut random);
        let mut world = Self {
            sidecar,
            redis,
            database,
            to_sidecar,
            to_redis,
            to_postgres,
            random,
            seed,
            second,
            load: Some(load),
            began: Instant::now(),
            late: 0,
            detail: plan.detail.clone(),
            _turn: turn,
        };
        world.wait_until_ready();
        let mut client = world.sidecar.connect();
        for (product, units) in PRODUCTS {
            client.until_not(&format!("STOCK.SET {product} {units} REQUEST set-{product}"), "-");
        }
        for (coupon, total, per_user) in COUPONS {
            client.until_not(&format!("COUPON.CREATE {coupon} {total} PERUSER {per_user} REQUEST create-{coupon}"), "-");
        }
        world.load = Some(Load::start(ports, plan, &mut world.random));
        world.wait_until_it_sells();
        world
    }

    fn sidecar(to_redis: &Proxy, to_postgres: &Proxy, database: &Database, detail: &str) -> Sidecar {
        let server = database.own.as_ref().unwrap().port();
        let postgres_url = database.url.replace(&format!(":{server}/"), &format!(":{}/", to_postgres.port()));
        // The default for replies; compared so often that it falls together with the faults.
        let flags = ["--reply-within-ms", "100", "--reconcile-sync-every-ms", "1000", "--ledger-detail", detail];
        Sidecar::with_settings(&to_redis.redis_url(), &postgres_url, &flags)
    }

    pub fn postgres(&mut self) -> &mut Postgres {
        self.database.own.as_mut().unwrap()
    }

    fn load(&self) -> &Load {
        self.load.as_ref().unwrap()
    }

    /// How many operations have been accepted so far.
    pub fn accepted(&self) -> u64 {
        self.load().accepted()
    }

    /// Lets the load go on for a random while.
    pub fn go_on(&mut self, ms: (u64, u64)) {
        thread::sleep(Duration::from_millis(self.random.between(ms.0, ms.1)));
    }

    fn wait_until_ready(&self) {
        for sidecar in self.sidecars() {
            wait_until("the sidecar is ready", || sidecar.get("/readyz").0 == 200);
        }
    }

    fn sidecars(&self) -> impl Iterator<Item = &Sidecar> {
        std::iter::once(&self.sidecar).chain(self.second.as_ref().map(|(sidecar, _)| sidecar))
    }

    /// Kills the second sidecar, and starts it again.
    pub fn restart_second(&mut self) {
        let (mut sidecar, to_it) = self.second.take().unwrap();
        self.late += late_replies(&sidecar);
        sidecar.kill();
        let sidecar = Self::sidecar(&self.to_redis, &self.to_postgres, &self.database, &self.detail);
        to_it.lead_to(sidecar.port);
        self.second = Some((sidecar, to_it));
    }

    /// Waits until each of the sidecars sells.
    pub fn wait_until_it_sells(&self) {
        let (before, began) = (self.load().accepted_by_port(), Instant::now());
        let sells = SELLS / before.len() as u64;
        while let Some(silent) = self.load().accepted_by_port().iter().zip(&before).position(|(now, before)| *now < before + sells) {
            assert!(
                began.elapsed() < SELLS_AGAIN_WITHIN,
                "seed {}: sells nothing for {SELLS_AGAIN_WITHIN:?}: {}",
                self.seed,
                self.state(silent)
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// What a sidecar says of itself, and said to its clients.
    fn state(&self, port: usize) -> String {
        let sidecar = self.sidecars().nth(port).unwrap();
        let ready = sidecar.get("/readyz").1;
        format!("sidecar {port}, {ready}, {}, {}", sidecar.connect().ask("HOLDFAST.STATUS"), self.load().last_said(port))
    }

    /// Waits until Postgres has what Redis has now: only then is what a killed sidecar had answered safe from the next fault.
    pub fn wait_until_carried(&self) {
        let newest: u64 = self.backing().hget("holdfast:meta", "n").unwrap();
        let applied = || self.database.value("SELECT applied_n FROM holdfast.partition").parse::<u64>().unwrap();
        wait_until("what was answered is carried", || applied() >= newest);
    }

    pub fn kill_sidecar(&mut self) {
        self.count_late_replies();
        self.sidecar.kill();
    }

    pub fn restart_sidecar(&mut self) {
        self.sidecar = Self::sidecar(&self.to_redis, &self.to_postgres, &self.database, &self.detail);
        self.to_sidecar.lead_to(self.sidecar.port);
    }

    /// Kills Redis, with all it has, and the sidecar at once. Returns up to where Postgres has come.
    pub fn lose_redis_and_sidecar(&mut self) -> Position {
        self.count_late_replies();
        if self.random.chance(50) {
            self.redis.kill();
            self.sidecar.kill();
        } else {
            self.sidecar.kill();
            self.redis.kill();
        }
        self.to_postgres.cut();
        self.to_postgres.release();
        // Waits for a transaction that ends only now.
        let applied = self.database.value("SELECT epoch || '-' || applied_n FROM holdfast.partition FOR UPDATE");
        self.redis.restart_empty();
        self.restart_sidecar();
        position(&applied).unwrap()
    }

    /// Stops a process for a random while.
    pub fn stall(&mut self, pid: u32, ms: (u64, u64)) {
        let signal = |name: &str| assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
        signal("-STOP");
        self.go_on(ms);
        signal("-CONT");
    }

    /// How much memory the sidecar has, in KiB.
    pub fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.sidecar.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim_end_matches("kB").trim().parse().unwrap()
    }

    /// By how many changes Postgres is behind Redis.
    pub fn behind(&self) -> u64 {
        self.sidecar.connect().field("HOLDFAST.STATUS", "lag").parse().unwrap()
    }

    /// Sends the backing Redis a command.
    pub fn tell_redis(&self, command: &str) {
        redis::cmd(command).exec(&mut self.backing()).unwrap();
    }

    fn backing(&self) -> redis::Connection {
        redis::Client::open(self.redis.url()).unwrap().get_connection().unwrap()
    }

    /// What a counter of the sidecar that runs is at, over all its labels; 0 where it never moved.
    pub fn counted(&self, name: &str) -> u64 {
        let metrics = self.sidecar.get("/metrics").1;
        let lines = metrics.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    fn count_late_replies(&mut self) {
        self.late += late_replies(&self.sidecar);
    }

    /// Ends the load, waits until everything is at rest, and returns what happened and what is there.
    pub fn rest(&mut self) -> (Vec<Record>, Books) {
        let history = self.load.take().unwrap().stop();
        self.wait_until_ready();
        let mut client = self.sidecar.connect();
        let mut redis = self.backing();
        wait_until("everything is applied", || {
            let newest: String = redis.hget("holdfast:meta", "n").unwrap();
            client.field("HOLDFAST.STATUS", "applied").split('-').nth(1) == Some(&newest)
        });
        self.count_late_replies();
        self.late += self.second.as_ref().map_or(0, |(sidecar, _)| late_replies(sidecar));
        let applied = |sidecar: &Sidecar| sidecar.connect().field("HOLDFAST.STATUS", "applied");
        let newest = applied(&self.sidecar);
        self.sidecars().for_each(|sidecar| wait_until("every sidecar is as far", || applied(sidecar) == newest));
        let books = self.books(&mut client);
        (history, books)
    }

    /// Ends the load and checks everything.
    pub fn check(self, what: &str) {
        self.check_but(what, &[]);
    }

    /// The same where Redis and the sidecar died at once, at these positions of Postgres: what was answered beyond them may be lost, nothing
    /// else.
    pub fn check_but(mut self, what: &str, deaths: &[Position]) {
        let (history, mut books) = self.rest();
        leave_out_the_filling(&mut books);
        books.may_lose = !deaths.is_empty();
        self.assert_sound(&history, &books);
        if books.may_lose {
            let lost = checker::lost(&history, &books);
            let at_risk = |position: Position| deaths.iter().any(|applied| applied.0 == position.0 && applied.1 < position.1);
            let wrong = lost.iter().find(|(position, _)| !at_risk(*position));
            assert!(wrong.is_none(), "seed {}: lost, though Postgres had come further when all died: {wrong:?}", self.seed);
            eprintln!("{what}: {} changes lost in {} double failures", lost.len(), deaths.len());
        }
        let count = |wanted: fn(&Record) -> bool| history.iter().filter(|record| wanted(record)).count();
        let (accepted, tried_again) = (count(Record::is_accepted), count(|record| record.tries.len() > 1));
        eprintln!(
            "{what}: seed {}, {:?}, {} operations, {accepted} accepted, {tried_again} tried more than once",
            self.seed,
            self.began.elapsed(),
            history.len()
        );
        assert_eq!(self.late, 0, "seed {}: replies were late though the machine did not stall", self.seed);
    }

    pub fn assert_sound(&self, history: &[Record], books: &Books) {
        let wrong = checker::check(history, books);
        let shown = wrong.iter().take(12).map(|wrong| format!("\n- {wrong}")).collect::<String>();
        assert!(wrong.is_empty(), "HOLDFAST_TEST_SEED={}: {} things are wrong:{shown}", self.seed, wrong.len());
        assert!(history.iter().any(Record::is_accepted));
    }

    fn books(&self, client: &mut Client) -> Books {
        let has_origin = self.database.value(
            "SELECT count(*) FROM information_schema.columns WHERE table_schema = 'holdfast' AND table_name = 'stock_ledger' AND column_name = 'origin_n'",
        ) == "1";
        let origin = if has_origin { "coalesce(origin_epoch || '-' || origin_n, '')" } else { "''" };
        let rows = |query: String| -> Vec<Vec<String>> {
            self.database.column(&query).iter().map(|line| line.split('|').map(str::to_owned).collect()).collect()
        };
        let optional = |text: &String| if text.is_empty() { None } else { Some(text.clone()) };
        let place = |text: &String| -> Option<Position> { position(text) };
        let stock_rows = rows(format!(
            "SELECT concat_ws('|', epoch || '-' || n, {origin}, i, product_id, kind, pg_delta, available_after, coalesce(request_id, ''), \
             coalesce(runs, '')) \
             FROM holdfast.stock_ledger ORDER BY epoch, n, i"
        ));
        let coupon_rows = rows(format!(
            "SELECT concat_ws('|', epoch || '-' || n, {origin}, coupon_id, kind, coalesce(user_id, ''), coalesce(serial, 0), \
             remaining_after, coalesce(request_id, '')) FROM holdfast.coupon_ledger ORDER BY epoch, n"
        ));
        Books {
            stock_rows: stock_rows
                .iter()
                .flat_map(|row| {
                    let whole = StockRow {
                        position: place(&row[0]).unwrap(),
                        origin: place(&row[1]),
                        i: row[2].parse().unwrap(),
                        product: row[3].clone(),
                        kind: row[4].clone(),
                        delta: row[5].parse().unwrap(),
                        after: row[6].parse().unwrap(),
                        request: optional(&row[7]),
                    };
                    whole.one_by_one(&row[8])
                })
                .collect(),
            coupon_rows: coupon_rows
                .iter()
                .map(|row| CouponRow {
                    position: place(&row[0]).unwrap(),
                    origin: place(&row[1]),
                    coupon: row[2].clone(),
                    kind: row[3].clone(),
                    user: row[4].clone(),
                    serial: row[5].parse().unwrap(),
                    remaining: row[6].parse().unwrap(),
                    request: optional(&row[7]),
                })
                .collect(),
            redis: self.redis_side(client),
            postgres: self.postgres_side(),
            drifts: self.database.column("SELECT to_jsonb(drift) FROM holdfast.drift"),
            may_lose: false,
        }
    }

    fn postgres_side(&self) -> Side {
        let pairs = |query: &str| -> Vec<Vec<String>> {
            self.database.column(query).iter().map(|line| line.split('|').map(str::to_owned).collect()).collect()
        };
        let stock = pairs("SELECT product_id || '|' || available FROM holdfast.stock WHERE deleted_at IS NULL");
        let coupons = pairs("SELECT concat_ws('|', coupon_id, total, issued, per_user, last_serial) FROM holdfast.coupon");
        let issues = pairs("SELECT concat_ws('|', coupon_id, serial, user_id) FROM holdfast.coupon_issue");
        let coupon = |row: Vec<String>| {
            let number = |at: usize| row[at].parse().unwrap();
            let own = issues.iter().filter(|issue| issue[0] == row[0]).map(|issue| (issue[1].parse().unwrap(), issue[2].clone()));
            let coupon = Coupon { total: number(1), issued: number(2), per_user: number(3), last_serial: number(4), issues: own.collect() };
            (row[0].clone(), coupon)
        };
        Side {
            stock: stock.into_iter().map(|row| (row[0].clone(), row[1].parse().unwrap())).collect(),
            coupons: coupons.into_iter().map(coupon).collect(),
        }
    }

    /// What Redis has, once each product has been used: what is loaded only then counts as there.
    fn redis_side(&self, client: &mut Client) -> Side {
        let mut redis = self.backing();
        let mut side = Side::default();
        for (product, _) in PRODUCTS {
            client.until_not(&format!("STOCK.GET {product}"), "-");
            let available: Option<i64> = redis.get(format!("stock:product:{product}")).unwrap();
            side.stock.extend(available.map(|available| (product.to_owned(), available)));
        }
        for (name, ..) in COUPONS {
            let info: BTreeMap<String, String> = redis.hgetall(format!("coupon:info:{name}")).unwrap();
            let users: BTreeMap<String, String> = redis.hgetall(format!("coupon:users:{name}")).unwrap();
            let number = |field: &str| info.get(field).map_or(0, |value| value.parse().unwrap());
            let issues = users.iter().flat_map(|(user, lines)| {
                lines.lines().map(|line| (line.split(' ').next().unwrap().parse().unwrap(), user.clone())).collect::<Vec<_>>()
            });
            let coupon = Coupon {
                total: number("total"),
                issued: number("issued"),
                per_user: number("peruser"),
                last_serial: number("serial"),
                issues: issues.collect(),
            };
            side.coupons.insert(name.to_owned(), coupon);
        }
        side
    }
}

/// How many replies of a sidecar were late though the machine did not stall.
fn late_replies(sidecar: &Sidecar) -> u64 {
    let metrics = sidecar.get("/metrics").1;
    let late = metrics.lines().find_map(|line| line.strip_prefix("holdfast_late_replies_total "));
    late.expect("a metric of late replies").parse().unwrap()
}

/// The changes that filled the installation are in no history.
pub fn leave_out_the_filling(books: &mut Books) {
    books.stock_rows.iter_mut().filter(|row| row.kind == "set").for_each(|row| row.request = None);
    books.coupon_rows.iter_mut().filter(|row| row.kind == "create").for_each(|row| row.request = None);
}
