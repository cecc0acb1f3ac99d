//! Redis and Postgres compared while both are in use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use redis::Value;

use crate::harness::{Database, Sidecar, Stack, wait_until};
use crate::servers::RedisServer;

/// The reconciler as often as it may, where a reply has all the time it needs.
const EVERY_SECOND: &[&str] =
    &["--reply-within-ms", "20000", "--reconcile-sync-every-ms", "1000", "--reconcile-initialise-every-ms", "1000"];

/// The reconciler only when it is asked.
pub const NEVER: &[&str] =
    &["--reply-within-ms", "20000", "--reconcile-sync-every-ms", "86400000", "--reconcile-initialise-every-ms", "86400000"];

/// What no trigger sees.
fn behind_the_trigger(statements: &str) -> String {
    format!("BEGIN; SET LOCAL holdfast.writer = 'holdfast'; {statements}; COMMIT")
}

/// Eight clients that send pipelines of 25, ten times a second each: 2,000 commands a second, on a machine that is up to it.
struct Load<'a> {
    stack: &'a Stack,
    stop: AtomicBool,
    accepted: AtomicU64,
}

impl<'a> Load<'a> {
    /// Runs `command` (of the client's number and the command's) under load while `during` runs. Returns how many commands were accepted.
    fn run<R>(stack: &'a Stack, command: impl Fn(usize, usize) -> String + Sync, during: impl FnOnce() -> R) -> (u64, R) {
        let load = Self { stack, stop: AtomicBool::new(false), accepted: AtomicU64::new(0) };
        let done = thread::scope(|scope| {
            for client in 0..8 {
                let (load, command) = (&load, &command);
                scope.spawn(move || load.drive(client, command));
            }
            let done = during();
            load.stop.store(true, Ordering::Relaxed);
            done
        });
        (load.accepted.into_inner(), done)
    }

    fn drive(&self, client: usize, command: &impl Fn(usize, usize) -> String) {
        let address = redis::Client::open(format!("redis://127.0.0.1:{}/", self.stack.sidecar.port)).unwrap();
        let mut connection = address.get_connection().unwrap();
        let began = Instant::now();
        let mut sent = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let mut pipeline = redis::Pipeline::new();
            for _ in 0..25 {
                let text = command(client, sent);
                let mut words = text.split(' ');
                pipeline.add_command(redis::cmd(words.next().unwrap()).arg(words.collect::<Vec<_>>()).clone());
                sent += 1;
            }
            pipeline.ignore_errors();
            let replies: Vec<Value> = pipeline.query(&mut connection).unwrap();
            let accepted = |reply: &&Value| matches!(reply, Value::Array(words) if words.first() == Some(&Value::BulkString("OK".into())));
            self.accepted.fetch_add(replies.iter().filter(accepted).count() as u64, Ordering::Relaxed);
            let pace = Duration::from_millis(100) * u32::try_from(sent / 25).unwrap();
            thread::sleep(pace.saturating_sub(began.elapsed()));
        }
    }
}

/// A number that looks like chance and is the same in every run.
fn mix(a: usize, b: usize) -> usize {
    let mixed = (a as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (b as u64 + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    usize::try_from((mixed ^ (mixed >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33).unwrap()
}

/// Sells and restocks the products `<prefix>0` to `<prefix><count - 1>`.
fn trade(prefix: &str, count: usize) -> impl Fn(usize, usize) -> String + Sync {
    move |client, sent| {
        let (chance, product) = (mix(client, sent), mix(sent, client) % count);
        match chance % 3 {
            0 => format!("STOCK.INCR {prefix}{product} {}", chance % 5 + 1),
            1 => format!("STOCK.DECR {prefix}{product} {}", chance % 5 + 1),
            _ => format!("STOCK.DECR {prefix}{product} 1 {prefix}{} 1", (product + 1) % count),
        }
    }
}

fn fill(stack: &Stack, prefix: &str, count: usize, units: u32) {
    let mut client = stack.connect();
    for product in 0..count {
        client.ok(&format!("STOCK.SET {prefix}{product} {units} ACK redis"));
    }
    stack.wait_until_applied();
}

/// What Redis has of every product that Postgres has.
fn in_redis(stack: &Stack) -> BTreeMap<String, String> {
    let mut backing = stack.backing();
    let products = stack.postgres.column("SELECT product_id FROM holdfast.stock WHERE deleted_at IS NULL");
    products.into_iter().map(|product| (product.clone(), backing.ask(&format!("GET stock:product:{product}")))).collect()
}

/// What a query says of each product: its first column is the product, its second the value.
fn by_product(postgres: &Database, query: &str) -> BTreeMap<String, String> {
    let rows = postgres.column(&format!("SELECT product || '=' || coalesce(value::text, 'nil') FROM ({query}) AS q (product, value)"));
    rows.iter().map(|row| row.split_once('=').unwrap()).map(|(product, value)| (product.to_owned(), value.to_owned())).collect()
}

const IN_POSTGRES: &str = "SELECT product_id, available FROM holdfast.stock WHERE deleted_at IS NULL";

/// Every difference that was found, as `<product> <drift> <action>`.
fn found(postgres: &Database) -> Vec<String> {
    postgres.column("SELECT product_id || ' ' || drift || ' ' || action FROM holdfast.drift ORDER BY id")
}

/// A counter or gauge of the sidecar.
fn metric(sidecar: &Sidecar, name: &str) -> f64 {
    let text = sidecar.get("/metrics").1;
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0.0)
}

const SYNC_ROUNDS: &str = "holdfast_reconcile_rounds_total{round=\"sync\",result=\"done\"}";

/// Waits for so many more rounds of the schedule.
fn wait_for_rounds(sidecar: &Sidecar, more: f64) {
    let before = metric(sidecar, SYNC_ROUNDS);
    wait_until("the reconciler goes round", || metric(sidecar, SYNC_ROUNDS) >= before + more);
}

#[test]
fn a_busy_stock_shows_no_false_difference() {
    let seconds = std::env::var("HOLDFAST_TEST_RECONCILE_SECONDS").map_or(30, |text| text.parse().unwrap());
    no_false_difference(&Stack::with_settings(EVERY_SECOND), seconds);
}

#[test]
fn a_ledger_with_a_row_a_batch_shows_no_false_difference() {
    let stack = Stack::with_settings(&[EVERY_SECOND, &["--ledger-detail", "batch"]].concat());
    no_false_difference(&stack, 8);
    assert_eq!(stack.postgres.value("SELECT bool_or(operations > 1) FROM holdfast.stock_ledger"), "true");
}

fn no_false_difference(stack: &Stack, seconds: u64) {
    fill(stack, "sku-", 50, 100_000);
    fill(stack, "outside-", 5, 1_000);
    let traded = trade("sku-", 50);
    let command = |client: usize, sent: usize| match mix(client, sent) % 40 {
        // Products that come and go, and are overwritten.
        0 => format!("STOCK.SET shelf-{} {} ACK redis", sent % 7, sent % 90 + 10),
        1 => format!("STOCK.DEL shelf-{} ACK redis", mix(sent, 3) % 7),
        2 | 3 => format!("STOCK.DECR shelf-{} 1", mix(sent, 5) % 7),
        4 => format!("STOCK.SET sku-{} {} ACK redis", mix(sent, 7) % 50, 50_000 + sent),
        5 => format!("STOCK.DECR outside-{} 1", sent % 5),
        _ => traded(client, sent),
    };
    let ((accepted, ()), began) = {
        let began = Instant::now();
        let outside = || {
            let mut changed = 0;
            while began.elapsed() < Duration::from_secs(seconds) {
                // Another program: Redis has not been told of it yet.
                stack
                    .postgres
                    .execute(&format!("UPDATE holdfast.stock SET available = available + 3 WHERE product_id = 'outside-{}'", changed % 5));
                changed += 1;
                thread::sleep(Duration::from_millis(100));
            }
        };
        (Load::run(stack, command, outside), began)
    };
    let rate = accepted / began.elapsed().as_secs();
    let (rounds, compared) = (metric(&stack.sidecar, SYNC_ROUNDS), metric(&stack.sidecar, "holdfast_reconcile_products_total"));
    eprintln!("{accepted} changes, {rate} a second; {rounds} rounds compared {compared} products");
    assert!(accepted > 0 && rounds >= 3.0 && compared >= 3.0 * 50.0, "{rounds} rounds, {compared} products");
    stack.wait_until_applied();
    assert_eq!(found(&stack.postgres), [""; 0], "differences that are none");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind IN ('correct', 'adopt', 'freeze')"), "0");
    let sums = "SELECT l.product_id, sum(l.redis_delta) FROM holdfast.stock_ledger l JOIN holdfast.stock s USING (product_id) \
                WHERE s.deleted_at IS NULL GROUP BY 1";
    wait_until("every product holds what its changes come to", || in_redis(stack) == by_product(&stack.postgres, sums));
    assert_eq!(stack.connect().ask("STOCK.SYNC DRYRUN"), "[]");
}

/// The differences that a person makes on 200 products: what the reconciler is to do about each.
struct Damage {
    redis: Vec<String>,
    postgres: Vec<String>,
    expected: BTreeSet<String>,
    /// By how many units each corrected product differs.
    corrected: BTreeMap<String, i64>,
}

fn damage() -> Damage {
    let (mut redis, mut postgres, mut expected, mut corrected) = (Vec::new(), Vec::new(), BTreeSet::new(), BTreeMap::new());
    for i in 0..200_i64 {
        let product = format!("p-{i}");
        let drift = match i {
            0..60 => {
                let units = if i % 2 == 0 { i + 1 } else { -i };
                redis.push(format!("INCRBY stock:product:{product} {units}"));
                units
            }
            60..80 => {
                redis.push(format!("INCRBY stock:product:{product} {}", 400 + i));
                400 + i
            }
            80..100 => {
                redis.push(format!("SET stock:product:{product} garbage"));
                expected.insert(format!("{product} frozen"));
                continue;
            }
            100..180 => {
                let units = if i % 2 == 0 { i - 90 } else { 90 - i };
                postgres.push(format!("UPDATE holdfast.stock SET available = available + {units} WHERE product_id = '{product}'"));
                -units
            }
            _ => {
                postgres.push(format!("UPDATE holdfast.stock SET available = available + 300 WHERE product_id = '{product}'"));
                -300
            }
        };
        if drift.abs() > 100 {
            expected.insert(format!("{product} {drift} frozen"));
        } else {
            expected.insert(format!("{product} {drift} corrected"));
            corrected.insert(product, drift);
        }
    }
    Damage { redis, postgres, expected, corrected }
}

/// Everything that was found, without the drift where Redis has no number.
fn found_of_damage(postgres: &Database) -> Vec<String> {
    postgres.column(
        "SELECT product_id || CASE WHEN redis IS NULL THEN '' ELSE ' ' || drift END || ' ' || action FROM holdfast.drift ORDER BY id",
    )
}

fn each_difference_is_repaired_once(prefer: &str) {
    let stack = Stack::with_settings(&[EVERY_SECOND, &["--reconcile-prefer", prefer]].concat());
    fill(&stack, "p-", 200, 10_000);
    let damage = damage();
    Load::run(&stack, trade("p-", 200), || {
        thread::sleep(Duration::from_millis(500));
        let mut backing = stack.backing();
        for (redis, postgres) in damage.redis.iter().zip(&damage.postgres) {
            backing.ask(redis);
            stack.postgres.execute(&behind_the_trigger(postgres));
        }
        wait_until("everything is found", || found_of_damage(&stack.postgres).len() >= damage.expected.len());
        wait_for_rounds(&stack.sidecar, 3.0);
    });
    stack.wait_until_applied();
    let found = found_of_damage(&stack.postgres);
    let once: BTreeSet<String> = found.iter().cloned().collect();
    let missing: Vec<_> = damage.expected.difference(&once).collect();
    let too_many: Vec<_> = once.difference(&damage.expected).collect();
    assert!(missing.is_empty() && too_many.is_empty(), "missing {missing:?}, too many {too_many:?}");
    assert_eq!(found.len(), once.len(), "a difference was found twice");

    let (kind, moved) = if prefer == "postgres" { ("correct", "-redis_delta") } else { ("adopt", "pg_delta") };
    let corrections = by_product(&stack.postgres, &format!("SELECT product_id, {moved} FROM holdfast.stock_ledger WHERE kind = '{kind}'"));
    let expected: BTreeMap<String, String> = damage.corrected.iter().map(|(product, drift)| (product.clone(), drift.to_string())).collect();
    assert_eq!(corrections, expected);
    let count = stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind IN ('correct', 'adopt')");
    assert_eq!(count, damage.corrected.len().to_string(), "each once");
    let (redis, postgres) = (in_redis(&stack), by_product(&stack.postgres, IN_POSTGRES));
    for product in damage.corrected.keys() {
        assert_eq!(redis[product], postgres[product], "{product}");
    }
    let frozen = stack.postgres.value("SELECT count(*) FROM holdfast.stock WHERE frozen IS NOT NULL");
    assert_eq!(frozen, (200 - damage.corrected.len()).to_string());
    let mut client = stack.connect();
    assert!(client.ask("STOCK.DECR p-60 1").starts_with("-FROZEN Redis has "), "beyond the limit");
    assert!(client.ask("STOCK.DECR p-80 1").starts_with("-FROZEN "), "garbage");
    assert_eq!(metric(&stack.sidecar, "holdfast_reconcile_drift_total{action=\"corrected\"}"), 140.0);
    assert_eq!(metric(&stack.sidecar, "holdfast_reconcile_drift_total{action=\"frozen\"}"), 60.0);
}

#[test]
fn differences_are_repaired_once_under_load_where_postgres_is_right() {
    each_difference_is_repaired_once("postgres");
}

#[test]
fn differences_are_repaired_once_under_load_where_redis_is_right() {
    each_difference_is_repaired_once("redis");
}

#[test]
fn eight_reconcilers_at_once_repair_each_difference_once() {
    let (redis, postgres) = (RedisServer::start(), Database::new(true));
    let sidecars: Vec<Sidecar> = (0..8).map(|_| Sidecar::with_settings(&redis.url(), &postgres.url, EVERY_SECOND)).collect();
    let mut sidecars = sidecars.into_iter();
    let stack = Stack { sidecar: sidecars.next().unwrap(), redis, postgres };
    let others: Vec<Sidecar> = sidecars.collect();
    for sidecar in &others {
        wait_until("every sidecar is ready", || sidecar.get("/readyz").0 == 200);
    }
    stack.wait_until_ready();
    fill(&stack, "p-", 200, 10_000);
    let damage = damage();
    let mut backing = stack.backing();
    damage.redis.iter().for_each(|command| _ = backing.ask(command));
    stack.postgres.execute(&behind_the_trigger(&damage.postgres.join("; ")));
    thread::scope(|scope| {
        for sidecar in others.iter().chain([&stack.sidecar]) {
            scope.spawn(move || {
                let mut client = sidecar.connect();
                for _ in 0..3 {
                    let reply = client.ask("STOCK.SYNC");
                    assert!(reply.starts_with('['), "{reply}");
                }
            });
        }
    });
    wait_until("everything is found", || found_of_damage(&stack.postgres).len() >= damage.expected.len());
    wait_until("a reconciler goes round", || others.iter().chain([&stack.sidecar]).any(|sidecar| metric(sidecar, SYNC_ROUNDS) >= 3.0));
    stack.wait_until_applied();
    let mut found = found_of_damage(&stack.postgres);
    // One that comes upon what another has just frozen may report it before the other has said so.
    found.retain(|found| !found.ends_with(" none"));
    found.sort();
    assert_eq!(found, damage.expected.iter().cloned().collect::<Vec<_>>());
    let corrections = "SELECT product_id, -sum(redis_delta) FROM holdfast.stock_ledger WHERE kind = 'correct' GROUP BY 1";
    let expected: BTreeMap<String, String> = damage.corrected.iter().map(|(product, drift)| (product.clone(), drift.to_string())).collect();
    assert_eq!(by_product(&stack.postgres, corrections), expected);
    let running = others.iter().chain([&stack.sidecar]).filter(|sidecar| metric(sidecar, SYNC_ROUNDS) > 0.0).count();
    assert_eq!(running, 1, "one of several reconciles on the schedule");
}

#[test]
fn products_that_redis_lost_are_given_back_exactly() {
    let stack = Stack::with_settings(EVERY_SECOND);
    fill(&stack, "p-", 200, 10_000);
    fill(&stack, "quiet-", 100, 7);
    Load::run(&stack, trade("p-", 200), || {
        for wave in 0..4 {
            let mut backing = stack.backing();
            let lost: Vec<String> = (0..200).map(|i| format!("p-{i}")).chain((0..100).map(|i| format!("quiet-{i}"))).collect();
            for product in lost.iter().skip(wave).step_by(2) {
                assert_eq!(backing.ask(&format!("DEL stock:product:{product}")), "1");
            }
            wait_until("every product is back", || in_redis(&stack).values().all(|units| units != "nil"));
            wait_for_rounds(&stack.sidecar, 1.0);
        }
    });
    stack.wait_until_applied();
    assert_eq!(in_redis(&stack), by_product(&stack.postgres, IN_POSTGRES));
    let other = stack.postgres.value("SELECT count(*) FROM holdfast.drift WHERE action <> 'initialised'");
    assert_eq!(other, "0", "{:?}", found(&stack.postgres));
    let initialised = stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'init' AND product_id LIKE 'quiet-%'");
    assert_eq!(initialised, "200", "each once a wave");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.drift WHERE product_id LIKE 'quiet-%'"), "200");
}

#[test]
fn what_only_redis_has_and_what_is_no_number_is_frozen_until_a_person_has_repaired_it() {
    let stack = Stack::with_settings(EVERY_SECOND);
    let mut client = stack.connect();
    client.ok("STOCK.SET mug 10");
    client.ok("STOCK.SET cup 10");
    let mut backing = stack.backing();
    backing.ask("SET stock:product:stray 5");
    backing.ask("SET stock:product:mug x");
    backing.ask("DEL stock:product:cup");
    backing.ask("HSET stock:product:cup field 1");
    wait_until("all three are frozen", || found(&stack.postgres).len() == 3);
    wait_for_rounds(&stack.sidecar, 2.0);
    let mut rows = found(&stack.postgres);
    rows.sort();
    assert_eq!(rows, ["cup -10 frozen", "mug -10 frozen", "stray 5 frozen"], "each once");
    assert_eq!(client.ask("STOCK.DECR stray 1"), "-FROZEN Redis has 5 units, and Postgres does not know the product");
    assert_eq!(client.ask("STOCK.GET stray"), "5", "reads go on");
    assert_eq!(client.field("STOCK.INFO stray", "frozen"), "Redis has 5 units");
    let mug = client.ask("STOCK.SYNC mug");
    assert_eq!(
        mug, "[[product, mug, redis, nil, postgres, 10, in_flight, 0, drift, -10, action, none, measure, available]]",
        "only reported"
    );
    assert!(client.ask("STOCK.UNFREEZE mug").starts_with("-FROZEN the key of product 'mug'"));

    for product in ["mug", "cup", "stray"] {
        backing.ask(&format!("DEL stock:product:{product}"));
    }
    assert!(client.until_not("STOCK.DECR mug 1", "-TRYAGAIN").starts_with("-FROZEN Redis holds \"x\""), "still to be looked at");
    for product in ["mug", "cup", "stray"] {
        client.ok(&format!("STOCK.UNFREEZE {product}"));
    }
    assert!(client.ask("STOCK.DECR mug 1").starts_with("[OK, 9, "));
    assert!(client.ask("STOCK.DECR cup 1").starts_with("[OK, 9, "));
    assert_eq!(client.ask("STOCK.DECR stray 1"), "-NOTFOUND no product 'stray'");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock WHERE frozen IS NOT NULL"), "0");
}

#[test]
fn a_dry_run_says_what_differs_and_changes_nothing() {
    let stack = Stack::with_settings(NEVER);
    let mut client = stack.connect();
    for product in ["a", "b", "c", "d"] {
        client.ok(&format!("STOCK.SET {product} 10"));
    }
    let mut backing = stack.backing();
    backing.ask("INCRBY stock:product:a 3");
    backing.ask("DEL stock:product:b");
    backing.ask("INCRBY stock:product:c 500");
    let row = |product: &str, redis: &str, drift: i64, action: &str| {
        format!("[product, {product}, redis, {redis}, postgres, 10, in_flight, 0, drift, {drift}, action, {action}, measure, available]")
    };
    let rows = |a: &str, b: &str, c: &str| format!("[{}, {}, {}]", row("a", "13", 3, a), row("b", "nil", -10, b), row("c", "510", 500, c));
    assert_eq!(client.ask("STOCK.SYNC DRYRUN"), rows("none", "none", "none"));
    assert_eq!(client.ask("STOCK.SYNC a d nowhere dryrun"), format!("[{}]", row("a", "13", 3, "none")));
    assert_eq!(backing.ask("MGET stock:product:a stock:product:b stock:product:c"), "[13, nil, 510]");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.drift"), "0");
    assert_eq!(client.field("STOCK.INFO a", "position"), "1-4", "no change was made");

    let reply = client.ask("STOCK.SYNC");
    let mut actions: Vec<&str> = reply
        .split("product, ")
        .skip(1)
        .map(|row| row.trim_end_matches([']', ',', ' ', '[']).trim_end_matches(", measure, available"))
        .collect();
    actions.sort_unstable();
    assert!(actions[0].ends_with("corrected") && actions[1].ends_with("initialised") && actions[2].ends_with("frozen"), "{reply}");
    assert_eq!(client.ask("STOCK.MGET a b c d"), "[10, 10, 510, 10]");
    assert_eq!(client.ask("STOCK.SYNC a b d"), "[]");
    assert!(client.ask("STOCK.SYNC c").ends_with("action, none, measure, available]]"));
}

#[test]
fn unfreezing_opens_a_product_once_and_says_so_again() {
    let stack = Stack::with_settings(NEVER);
    let mut client = stack.connect();
    stack.postgres.execute(&behind_the_trigger(
        "INSERT INTO holdfast.stock (product_id, available, low, frozen) VALUES ('old', 7, 5, 'counted wrong')",
    ));
    assert_eq!(client.until_not("STOCK.DECR old 1", "-TRYAGAIN"), "-FROZEN counted wrong", "loaded with all that Postgres has of it");
    assert_eq!(client.field("STOCK.INFO old", "low"), "5");
    let first = client.ask("STOCK.UNFREEZE old REQUEST r-1");
    assert!(first.starts_with("[OK, 1-"), "{first}");
    assert_eq!(client.ask("STOCK.UNFREEZE old REQUEST r-1"), first);
    assert_eq!(stack.postgres.value("SELECT coalesce(frozen, '-') FROM holdfast.stock"), "-");
    assert!(client.ask("STOCK.DECR old 1").starts_with("[OK, 6, "));
    assert_eq!(client.ask("STOCK.UNFREEZE nowhere"), "-NOTFOUND no product 'nowhere'");
}

#[test]
fn nothing_is_compared_while_postgres_is_too_far_behind() {
    let stack = Stack::with_settings(NEVER);
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    stack.postgres.holding("BEGIN; SELECT * FROM holdfast.partition FOR UPDATE", || {
        client.ok("STOCK.DECR a 1 ACK redis");
        let began = Instant::now();
        let reply = client.ask("STOCK.SYNC a");
        assert!(reply.starts_with("-TRYAGAIN cannot compare now: "), "{reply}");
        assert!(began.elapsed() > Duration::from_secs(4), "it has waited for Postgres");
    });
    assert_eq!(client.ask("STOCK.SYNC a"), "[]");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.drift"), "0");
}

#[test]
fn what_orders_hold_in_redis_is_put_right_by_postgres() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET mug 10");
    client.ok("STOCK.SET cup 10");
    assert!(client.ask("STOCK.RESERVE o 600000 mug 3").starts_with("[HELD, "));
    stack.wait_until_applied();
    assert_eq!(client.ask("STOCK.SYNC mug cup"), "[]");
    stack.backing().ask("HSET stock:held mug 9 cup x");
    let drift = |product, redis, postgres, drift| {
        format!(
            "[product, {product}, redis, {redis}, postgres, {postgres}, in_flight, 0, drift, {drift}, action, corrected, measure, held]"
        )
    };
    assert_eq!(client.ask("STOCK.SYNC mug cup"), format!("[{}, {}]", drift("cup", 0, 0, 0), drift("mug", 9, 3, 6)));
    assert_eq!((stack.backing().ask("HGET stock:held mug"), stack.backing().ask("HGET stock:held cup")), ("3".into(), "nil".into()));
    assert!(client.ask("STOCK.CONFIRM o").starts_with("[CONFIRMED, "));
    stack.wait_until_applied();
    assert_eq!(client.ask("STOCK.SYNC mug cup"), "[]");
    assert_eq!(stack.backing().ask("EXISTS stock:held"), "0");
    assert_eq!(stack.postgres.column("SELECT product_id || measure || drift FROM holdfast.drift ORDER BY id"), ["cupheld0", "mugheld6"]);
}
