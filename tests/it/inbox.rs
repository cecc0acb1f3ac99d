//! What other programs change in `holdfast.stock`, on its way to Redis.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Program, Sidecar, Stack, wait_until};

/// Redis and Postgres have the same of a product, with nothing on its way.
fn agree(stack: &Stack, product: &str) {
    let redis = stack.backing().ask(&format!("GET stock:product:{product}"));
    let postgres = stack.postgres.value(&format!("SELECT available FROM holdfast.stock WHERE product_id = '{product}'"));
    assert_eq!(redis, postgres, "{product}");
}

/// Waits until Redis has the whole inbox, and Postgres has everything.
fn settle(stack: &Stack) {
    wait_until("redis has the whole inbox", || {
        let mark = stack.backing().ask("HGET holdfast:meta inbox");
        let (xid, id) = mark.split_once(':').unwrap_or(("0", "0"));
        stack.postgres.value(&format!("SELECT count(*) FROM holdfast.inbox WHERE (xid, id) > ('{xid}', {id})")) == "0"
    });
    stack.wait_until_applied();
}

#[test]
fn what_another_program_changes_in_postgres_reaches_redis() {
    let stack = Stack::start();
    let (mut client, mut program) = (stack.connect(), Program::new(&stack.postgres));
    client.ok("STOCK.SET a 10");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.inbox"), "0", "what Holdfast writes is no news");
    let began = Instant::now();
    program.run("UPDATE holdfast.stock SET available = available + 5 WHERE product_id = 'a'");
    client.until("STOCK.GET a", "15");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    program.run("UPDATE holdfast.stock SET low = 3 WHERE product_id = 'a'");
    program.run("BEGIN; UPDATE holdfast.stock SET available = 99 WHERE product_id = 'a'; ROLLBACK");
    settle(&stack);
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.inbox"), "1", "neither is a change of its units");
    for (statement, what) in [
        ("UPDATE holdfast.stock SET product_id = 'z' WHERE product_id = 'a'", "keeps its id"),
        ("INSERT INTO holdfast.stock (product_id, available) VALUES ('a b', 1)", "without white space"),
    ] {
        let refused = program.try_run(statement).unwrap_err();
        assert!(refused.contains(what), "{refused}");
    }
    // Deleted, softly and really: what is sold meanwhile is on its way.
    program.run("UPDATE holdfast.stock SET deleted_at = now() WHERE product_id = 'a'");
    client.until("STOCK.GET a", "nil");
    assert_eq!(client.ask("STOCK.DECR a 1"), "-NOTFOUND no product 'a'");
    program.run("UPDATE holdfast.stock SET deleted_at = NULL, available = 7 WHERE product_id = 'a'");
    client.until("STOCK.GET a", "7");
    program.run("DELETE FROM holdfast.stock WHERE product_id = 'a'");
    client.until("STOCK.GET a", "nil");
    program.run("INSERT INTO holdfast.stock (product_id, available) VALUES ('a', 3), ('b', 4)");
    client.until("STOCK.GET a", "3");
    assert_eq!(client.ask("STOCK.DECR b 1").split(", ").nth(1), Some("3"));
    settle(&stack);
    agree(&stack, "a");
    agree(&stack, "b");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'inbox' AND pg_delta <> 0"), "0");
}

#[test]
fn units_taken_in_postgres_that_were_sold_already_freeze_the_product() {
    let stack = Stack::start();
    let (mut client, mut program) = (stack.connect(), Program::new(&stack.postgres));
    client.ok("STOCK.SET a 10");
    // The relay waits for the lock meanwhile.
    program.run("BEGIN; SELECT FROM holdfast.partition FOR UPDATE");
    client.ok("STOCK.DECR a 8");
    let mut other = Program::new(&stack.postgres);
    other.run("UPDATE holdfast.stock SET available = available - 5 WHERE product_id = 'a'");
    program.run("COMMIT");
    wait_until("the product is frozen", || client.ask("STOCK.DECR a 1").starts_with("-FROZEN another program took units off"));
    assert_eq!(client.ask("STOCK.GET a"), "0");
    stack.wait_until_applied();
    assert!(stack.postgres.value("SELECT frozen FROM holdfast.stock WHERE product_id = 'a'").starts_with("another program"));
}

#[test]
fn a_transaction_that_began_earlier_is_not_passed_over() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ok("STOCK.SET b 10");
    let (mut early, mut late) = (Program::new(&stack.postgres), Program::new(&stack.postgres));
    early.run("BEGIN; UPDATE holdfast.stock SET available = available + 1 WHERE product_id = 'a'");
    late.run("UPDATE holdfast.stock SET available = available + 2 WHERE product_id = 'b'");
    thread::sleep(Duration::from_millis(700));
    assert_eq!(client.ask("STOCK.GET b"), "10", "it waits for the earlier one");
    early.run("COMMIT");
    let began = Instant::now();
    client.until("STOCK.GET a", "11");
    client.until("STOCK.GET b", "12");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    settle(&stack);
    agree(&stack, "a");
}

#[test]
fn the_changes_of_one_product_keep_their_order() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET other 1");
    // The one that began first changes the product last.
    let (mut early, mut late) = (Program::new(&stack.postgres), Program::new(&stack.postgres));
    early.run("BEGIN; UPDATE holdfast.stock SET low = 1 WHERE product_id = 'other'");
    late.run("INSERT INTO holdfast.stock (product_id, available) VALUES ('a', 1)");
    late.run("UPDATE holdfast.stock SET deleted_at = now() WHERE product_id = 'a'");
    early.run("UPDATE holdfast.stock SET deleted_at = NULL, available = 5 WHERE product_id = 'a'; COMMIT");
    client.until("STOCK.GET a", "5");
    assert_eq!(
        stack.postgres.column("SELECT kind FROM holdfast.inbox WHERE product_id = 'a' ORDER BY xid, id"),
        ["create", "delete", "create"]
    );
}

#[test]
fn a_product_that_is_set_before_redis_hears_of_its_deletion_lives_with_what_was_set() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET other 1");
    client.ok("STOCK.SET soft 10");
    client.ok("STOCK.SET hard 10");
    // While a transaction runs that began earlier, Redis does not hear of the deletions.
    let (mut early, mut late) = (Program::new(&stack.postgres), Program::new(&stack.postgres));
    early.run("BEGIN; UPDATE holdfast.stock SET low = 1 WHERE product_id = 'other'");
    late.run("UPDATE holdfast.stock SET deleted_at = now() WHERE product_id = 'soft'");
    late.run("DELETE FROM holdfast.stock WHERE product_id = 'hard'");
    for product in ["soft", "hard"] {
        client.ok(&format!("STOCK.SET {product} 20"));
        client.ok(&format!("STOCK.DECR {product} 5 ACK postgres TIMEOUT 20000"));
        assert_eq!(stack.postgres.value(&format!("SELECT available FROM holdfast.stock WHERE product_id = '{product}'")), "15");
    }
    early.run("COMMIT");
    settle(&stack);
    assert_eq!(stack.backing().ask("HLEN stock:deleted"), "0");
    for product in ["soft", "hard"] {
        client.until(&format!("STOCK.GET {product}"), "15");
        agree(&stack, product);
    }
}

#[test]
fn a_program_without_rights_on_the_inbox_can_change_stock() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    let mut owner = Program::new(&stack.postgres);
    owner.run("CREATE ROLE clerk LOGIN; GRANT USAGE ON SCHEMA holdfast TO clerk; GRANT SELECT, UPDATE ON holdfast.stock TO clerk");
    let mut clerk = Program::connect(&stack.postgres.url.replace("postgres@", "clerk@"));
    assert!(clerk.try_run("SELECT FROM holdfast.inbox").is_err());
    clerk.run("UPDATE holdfast.stock SET available = available - 1 WHERE product_id = 'a'");
    client.until("STOCK.GET a", "9");
    drop(clerk);
    owner.run("DROP OWNED BY clerk; DROP ROLE clerk");
}

const PRODUCTS: u32 = 5;

/// Sells at whatever port `port` names until `stop`. Returns how often it was answered.
fn sell(port: &AtomicU16, stop: &AtomicBool) -> u32 {
    let mut sold = 0;
    while !stop.load(Ordering::Relaxed) {
        let client = redis::Client::open(format!("redis://127.0.0.1:{}/", port.load(Ordering::Relaxed))).unwrap();
        let Ok(mut connection) = client.get_connection() else {
            thread::sleep(Duration::from_millis(20));
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            let product = format!("sku-{}", sold % PRODUCTS);
            match redis::cmd("STOCK.DECR").arg(product).arg(1).query::<redis::Value>(&mut connection) {
                Ok(_) => sold += 1,
                Err(error) if error.is_io_error() => break,
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
    sold
}

/// Ten direct changes a second for so long, while clients sell at these ports and `meanwhile` disturbs. Then both sides agree, and each
/// direct change was taken once.
fn direct_changes_under_load(stack: &mut Stack, seconds: u32, ports: &[AtomicU16], meanwhile: impl FnOnce(&mut Stack)) {
    let mut client = stack.connect();
    (0..PRODUCTS).for_each(|i| client.ok(&format!("STOCK.SET sku-{i} 1000000")));
    let (stop, url) = (AtomicBool::new(false), stack.postgres.url.clone());
    let (updates, sold, slowest) = thread::scope(|scope| {
        let (stop, url) = (&stop, &url);
        let sellers: Vec<_> = (0..4).map(|i| scope.spawn(move || sell(&ports[i % ports.len()], stop))).collect();
        let updater = scope.spawn(move || {
            let (mut program, began) = (Program::connect(url), Instant::now());
            for i in 0..seconds * 10 {
                let (delta, product) = (if i % 3 == 0 { -7 } else { 11 }, i % PRODUCTS);
                program.run(&format!("UPDATE holdfast.stock SET available = available + {delta} WHERE product_id = 'sku-{product}'"));
                thread::sleep((began + Duration::from_millis(100) * (i + 1)).saturating_duration_since(Instant::now()));
            }
            seconds * 10
        });
        let mut backing = stack.backing();
        let watcher = scope.spawn(move || {
            let (mut watcher, mut slowest) = (Program::connect(url), 0.0_f64);
            while !stop.load(Ordering::Relaxed) {
                let mark = backing.ask("HGET holdfast:meta inbox");
                let (xid, id) = mark.split_once(':').unwrap_or(("0", "0"));
                let age = watcher.number(&format!(
                    "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - at)), 0)::float8 FROM holdfast.inbox \
                     WHERE (xid, id) > ('{xid}', {id})"
                ));
                slowest = slowest.max(age);
                thread::sleep(Duration::from_millis(5));
            }
            slowest
        });
        meanwhile(stack);
        let updates = updater.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        (updates, sellers.into_iter().map(|seller| seller.join().unwrap()).sum::<u32>(), watcher.join().unwrap())
    });
    settle(stack);
    eprintln!("{updates} direct changes among {sold} sales; the longest way to redis: {slowest:.3} s");
    assert!(sold > 0);
    let updates = updates.to_string();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.inbox"), updates, "nothing is echoed");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'inbox'"), updates, "each is taken once");
    assert_eq!(
        stack.postgres.value("SELECT sum(redis_delta) FROM holdfast.stock_ledger WHERE kind = 'inbox'"),
        stack.postgres.value("SELECT sum(delta) FROM holdfast.inbox")
    );
    (0..PRODUCTS).for_each(|i| agree(stack, &format!("sku-{i}")));
}

#[test]
fn direct_changes_under_load_reach_redis_once() {
    let mut stack = Stack::start();
    let ports = [AtomicU16::new(stack.sidecar.port)];
    direct_changes_under_load(&mut stack, 10, &ports, |_| {});
}

#[test]
fn direct_changes_reach_redis_once_though_the_sidecar_is_killed() {
    let mut stack = Stack::start();
    let ports = [AtomicU16::new(stack.sidecar.port)];
    direct_changes_under_load(&mut stack, 8, &ports, |stack| {
        for _ in 0..3 {
            thread::sleep(Duration::from_secs(2));
            stack.sidecar.kill();
            stack.restart_sidecar();
            ports[0].store(stack.sidecar.port, Ordering::Relaxed);
        }
    });
}

#[test]
fn direct_changes_reach_redis_once_with_two_sidecars() {
    let mut stack = Stack::start();
    let mut second = Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    wait_until("the second is ready", || second.get("/readyz").0 == 200);
    let ports = [AtomicU16::new(stack.sidecar.port), AtomicU16::new(second.port)];
    direct_changes_under_load(&mut stack, 8, &ports, |stack| {
        thread::sleep(Duration::from_secs(4));
        // Whichever of them carries: the other one takes over.
        stack.sidecar.kill();
        stack.restart_sidecar();
        ports[0].store(stack.sidecar.port, Ordering::Relaxed);
        thread::sleep(Duration::from_secs(2));
        second.kill();
        ports[1].store(stack.sidecar.port, Ordering::Relaxed);
    });
}

#[test]
fn direct_changes_reach_redis_once_though_whoever_carries_them_hangs() {
    let mut stack = Stack::start();
    let second = Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    wait_until("the second is ready", || second.get("/readyz").0 == 200);
    // It has the lock and does nothing, so that both take what has waited too long.
    let mut hanging = Program::new(&stack.postgres);
    hanging.run("SELECT pg_advisory_lock(x'696e626f'::int, 0)");
    let ports = [AtomicU16::new(stack.sidecar.port), AtomicU16::new(second.port)];
    direct_changes_under_load(&mut stack, 5, &ports, |_| {});
}
