//! Changes that Postgres refuses: parked, and settled by a person.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Client, Program, Stack, wait_until};

/// The words of the only dead letter.
fn letter(client: &mut Client) -> Vec<String> {
    let reply = client.ask("HOLDFAST.DEADLETTER LIST");
    reply.trim_matches(['[', ']']).split(", ").map(String::from).collect()
}

fn until_frozen(client: &mut Client, product: &str) {
    wait_until("it is frozen", || client.ask(&format!("STOCK.DECR {product} 1")).starts_with("-FROZEN Postgres refused a change of it"));
}

#[test]
fn poisoned_changes_are_parked_and_the_rest_goes_on() {
    const POISONED: u32 = 50;
    // Its own Postgres: what other tests do to theirs is not the relay's standing still.
    let stack = Stack::with_own_postgres();
    let mut client = stack.connect();
    client.ok("STOCK.SET good 1000000");
    (0..POISONED).for_each(|i| client.ok(&format!("STOCK.SET bad-{i} 1000 ACK redis")));
    stack.wait_until_applied();
    let stop = AtomicBool::new(false);
    let (sold, stall) = thread::scope(|scope| {
        let sellers: Vec<_> = (0..4)
            .map(|_| {
                let mut client = stack.connect();
                let stop = &stop;
                scope.spawn(move || {
                    let mut sold = 0_u32;
                    while !stop.load(Ordering::Relaxed) {
                        sold += u32::from(client.ask("STOCK.DECR good 1").starts_with("[OK, "));
                    }
                    sold
                })
            })
            .collect();
        let mut watching = stack.connect();
        let watcher = scope.spawn({
            let stop = &stop;
            move || {
                let (mut moved, mut last, mut longest) = (Instant::now(), String::new(), Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let applied = watching.field("HOLDFAST.STATUS", "applied");
                    if applied != last {
                        longest = longest.max(moved.elapsed());
                        (moved, last) = (Instant::now(), applied);
                    }
                    thread::sleep(Duration::from_millis(5));
                }
                longest
            }
        });
        let mut program = Program::new(&stack.postgres);
        for i in 0..POISONED {
            match i % 2 {
                0 => program.tamper(&format!("UPDATE holdfast.stock SET available = 1 WHERE product_id = 'bad-{i}'")),
                _ => program.tamper(&format!("DELETE FROM holdfast.stock WHERE product_id = 'bad-{i}'")),
            }
            // Together with a product that nothing is wrong with.
            client.ok(&format!("STOCK.DECR bad-{i} 3 good 2"));
            thread::sleep(Duration::from_millis(60));
        }
        stop.store(true, Ordering::Relaxed);
        (sellers.into_iter().map(|seller| seller.join().unwrap()).sum::<u32>(), watcher.join().unwrap())
    });
    stack.wait_until_applied();
    println!("{POISONED} poisoned changes among {sold} sales; the relay stood still for {stall:?} at the longest");
    assert!(stall < Duration::from_secs(5), "{stall:?}");
    let owed = "SELECT count(*) || ' ' || sum(delta) FROM holdfast.dead_letter WHERE in_redis AND product_id LIKE 'bad-%'";
    assert_eq!(stack.postgres.value(owed), format!("{POISONED} -{}", POISONED * 3));
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), POISONED.to_string());
    let left = (1_000_000 - sold - POISONED * 2).to_string();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock WHERE product_id = 'good'"), left);
    assert_eq!(stack.backing().ask("GET stock:product:good"), left);
    assert_eq!(
        stack.postgres.value("SELECT sum(pg_delta) FROM holdfast.stock_ledger WHERE kind = 'decr' AND product_id LIKE 'bad-%'"),
        "-150"
    );
    (0..POISONED).for_each(|i| until_frozen(&mut client, &format!("bad-{i}")));
    client.ok("STOCK.DECR good 1");
    wait_until("they are counted", || client.field("HOLDFAST.STATUS", "dead_letters").trim_end_matches(']') == POISONED.to_string());
    assert!(stack.sidecar.get("/metrics").1.contains(&format!("holdfast_dead_letters{{partition=\"0\"}} {POISONED}")));
    assert!(stack.sidecar.get("/readyz").1.contains(&format!("dead_letters degraded: {POISONED} changes")));
}

#[test]
fn a_dead_letter_is_retried_or_dropped() {
    let stack = Stack::start();
    let (mut client, mut program) = (stack.connect(), Program::new(&stack.postgres));
    client.ok("STOCK.SET a 10");
    assert_eq!(client.ask("HOLDFAST.DEADLETTER LIST"), "[]");
    program.tamper("UPDATE holdfast.stock SET available = 2 WHERE product_id = 'a'");
    client.ok("STOCK.DECR a 5");
    stack.wait_until_applied();
    let words = letter(&mut client);
    assert_eq!(words[..10].iter().step_by(2).collect::<Vec<_>>(), ["id", "position", "product", "kind", "delta"], "{words:?}");
    assert_eq!(words[3..10].iter().step_by(2).collect::<Vec<_>>(), ["1-2", "a", "decr", "-5"], "{words:?}");
    let id = words[1].clone();
    let failed = client.ask(&format!("HOLDFAST.DEADLETTER RETRY {id}"));
    assert!(failed.starts_with("[FAILED, ") && failed.contains("stock_available_check"), "{failed}");
    program.tamper("UPDATE holdfast.stock SET available = 10 WHERE product_id = 'a'");
    assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER RETRY {id}")), "[OK]");
    assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER RETRY {id}")), "[NOTFOUND]");
    assert_eq!(client.ask("HOLDFAST.DEADLETTER LIST COUNT 5"), "[]");
    assert_eq!((client.ask("STOCK.GET a"), stack.postgres.value("SELECT available FROM holdfast.stock")), ("5".into(), "5".into()));
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.inbox"), "0", "Redis had it already");
    until_frozen(&mut client, "a");
    // Given up: Redis gets the units back, though the product waits for a person.
    client.ok("STOCK.SET b 10");
    program.tamper("UPDATE holdfast.stock SET available = 2 WHERE product_id = 'b'");
    client.ok("STOCK.DECR b 5");
    stack.wait_until_applied();
    let id = letter(&mut client)[1].clone();
    assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER DROP {id}")), "[OK]");
    client.until("STOCK.GET b", "10");
    assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER DROP {id}")), "[NOTFOUND]");
    assert!(client.ask("HOLDFAST.DEADLETTER RETRY x").starts_with("-ERR invalid id"));
}

#[test]
fn what_a_person_has_unfrozen_is_not_frozen_again_by_what_postgres_does_not_know_yet() {
    let stack = Stack::start();
    let (mut client, mut program) = (stack.connect(), Program::new(&stack.postgres));
    client.ok("STOCK.SET a 10");
    program.tamper("UPDATE holdfast.stock SET available = 2");
    client.ok("STOCK.DECR a 5");
    stack.wait_until_applied();
    wait_until("it is frozen", || client.field("STOCK.INFO a", "frozen") != "nil");
    stack.wait_until_applied();
    stack.postgres.holding("BEGIN; SELECT * FROM holdfast.partition FOR UPDATE", || {
        client.ok("STOCK.UNFREEZE a ACK redis");
        // When the second is counted, what the first came to is over.
        for letters in ["2", "3"] {
            program.run(
                "INSERT INTO holdfast.dead_letter (partition, epoch, n, i, op, k, product_id, kind, delta, in_redis, reason, line) \
                 SELECT partition, epoch, n, i, op, k, product_id, kind, 0, in_redis, reason, line FROM holdfast.dead_letter LIMIT 1",
            );
            wait_until("it is counted", || client.ask("HOLDFAST.STATUS").contains(&format!("dead_letters, {letters}")));
        }
        assert_eq!(client.field("STOCK.INFO a", "frozen"), "nil");
    });
    let sold = client.ask("STOCK.DECR a 1 ACK postgres TIMEOUT 20000");
    assert!(sold.starts_with("[OK, 4, "), "{sold}");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock WHERE frozen IS NOT NULL"), "0");
}

#[test]
fn a_product_made_by_hand_in_redis_holds_nothing_up() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET good 10");
    stack.backing().ask("SET stock:product:ghost 50");
    assert_eq!(client.ask("STOCK.DECR ghost 4 good 1"), "[OK, 46, 9, 1-2]");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), "9");
    assert_eq!(stack.postgres.value("SELECT product_id || delta FROM holdfast.dead_letter"), "ghost-4");
    until_frozen(&mut client, "ghost");
    assert!(client.ask("STOCK.DECR good 1 ACK postgres").starts_with("[OK, 8, "));
}

#[test]
fn the_serial_of_a_parked_issue_is_not_given_out_again_by_a_redis_that_is_filled_or_given_the_coupon() {
    let stack = Stack::start();
    let (mut client, mut backing) = (stack.connect(), stack.backing());
    client.ok("COUPON.CREATE c 10");
    stack.postgres.execute("ALTER TABLE holdfast.coupon_issue ADD CHECK (user_id NOT LIKE 'refused-%')");
    assert!(client.ask("COUPON.ISSUE c u").starts_with("[ISSUED, 1, "));
    assert!(client.ask("COUPON.ISSUE c refused-1 ACK postgres").starts_with("[ISSUED, 2, "));
    backing.ask("DEL coupon:info:c coupon:users:c");
    assert!(client.ask("COUPON.ISSUE c v").starts_with("[ISSUED, 3, "));
    assert!(client.ask("COUPON.ISSUE c refused-2 ACK postgres").starts_with("[ISSUED, 4, "));
    backing.ask("FLUSHALL");
    assert!(client.until_not("COUPON.ISSUE c w", "-").starts_with("[ISSUED, 5, "));
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "2");
}

#[test]
fn a_conflict_about_a_coupon_is_parked_and_freezes_nothing() {
    let stack = Stack::start();
    let (mut client, mut program) = (stack.connect(), Program::new(&stack.postgres));
    client.ok("COUPON.CREATE spring 10");
    client.ok("STOCK.SET a 10");
    program
        .run("INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at) VALUES ('spring', 1, 'x', 'issued', now())");
    assert!(client.ask("COUPON.ISSUE spring u").starts_with("[ISSUED, 1, 9, "));
    assert!(client.ask("COUPON.ISSUE spring v ACK postgres").starts_with("[ISSUED, 2, 8, "));
    let words = letter(&mut client);
    assert_eq!(words[3..10].iter().step_by(2).collect::<Vec<_>>(), ["1-3", "nil", "coupon.issue", "0"], "{words:?}");
    assert_eq!(stack.postgres.value("SELECT issued FROM holdfast.coupon"), "1");
    program.run("DELETE FROM holdfast.coupon_issue WHERE user_id = 'x'");
    assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER RETRY {}", words[1])), "[OK]");
    assert_eq!(stack.postgres.value("SELECT issued FROM holdfast.coupon"), "2");
    assert!(client.ask("STOCK.DECR a 1 ACK postgres").starts_with("[OK, 9, "));
}
