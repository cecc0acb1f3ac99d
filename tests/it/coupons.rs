//! COUPON: the contract, command by command.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};

use crate::harness::Stack;

#[test]
fn a_coupon_is_issued_to_each_user_once_until_it_is_sold_out() {
    let stack = Stack::start();
    let mut client = stack.connect();
    assert_eq!(client.ask("COUPON.ISSUE spring u1"), "-NOTFOUND no coupon 'spring'");
    assert_eq!(client.ask("COUPON.CREATE spring 2"), "[OK, 1-1]");
    assert_eq!(client.ask("COUPON.CREATE spring 9"), "[EXISTS]");
    assert_eq!(client.ask("COUPON.ISSUE spring u1"), "[ISSUED, 1, 1, 1-2]");
    assert_eq!(client.ask("COUPON.ISSUE spring u1"), "[ALREADY, 1]");
    assert_eq!(client.ask("COUPON.ISSUE spring u2 ACK postgres TIMEOUT 20000"), "[ISSUED, 2, 0, 1-3]");
    assert_eq!(client.ask("COUPON.ISSUE spring u3"), "[SOLDOUT]");
    assert!(client.ask("COUPON.GET spring u1").starts_with("[[serial, 1, state, issued, issued_at_ms, 1"));
    assert_eq!(client.ask("COUPON.GET spring nobody"), "[]");
    assert_eq!(client.field("COUPON.INFO spring", "state"), "soldout");
    assert_eq!(client.field("COUPON.INFO spring", "lock"), "coupon:issue:spring");
    assert_eq!(client.ask("COUPON.INFO nothing"), "nil");
    assert_eq!(stack.postgres.column("SELECT user_id FROM holdfast.coupon_issue ORDER BY serial"), ["u1", "u2"]);
    assert_eq!(stack.postgres.value("SELECT total || ' ' || issued FROM holdfast.coupon"), "2 2");
}

#[test]
fn a_user_may_have_as_many_as_the_coupon_says() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 100 PERUSER 3");
    for serial in 1..=3 {
        assert!(client.ask("COUPON.ISSUE c u1").starts_with(&format!("[ISSUED, {serial}, ")));
    }
    assert_eq!(client.ask("COUPON.ISSUE c u1"), "[ALREADY, 3]");
    assert!(client.ask("COUPON.ISSUE c u2").starts_with("[ISSUED, 4, "));
}

#[test]
fn a_coupon_has_its_time() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE early 1 START 32503680000000");
    client.ok("COUPON.CREATE ended 1 END 1000");
    assert_eq!(client.ask("COUPON.ISSUE early u"), "[NOTSTARTED, 32503680000000]");
    assert_eq!(client.ask("COUPON.ISSUE ended u"), "[ENDED, 1000]");
    assert_eq!(client.ask("COUPON.CREATE never 1 START 5 END 5"), "-ERR invalid end: it must be after the start");
    assert_eq!(client.field("COUPON.INFO early", "state"), "notstarted");
}

#[test]
fn nothing_is_issued_while_somebody_holds_the_coupons_lock() {
    let stack = Stack::with_deadline(1_000);
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 10");
    let mut java = stack.backing();
    java.ask("HSET coupon:issue:c 5ad7e6c4:1 1");
    java.ask("PEXPIRE coupon:issue:c 60000");
    let held = client.ask("COUPON.ISSUE c u1");
    assert!(held.starts_with("-TRYAGAIN the lock 'coupon:issue:c' is held by '5ad7e6c4:1'"), "{held}");
    java.ask("DEL coupon:issue:c");
    assert!(client.ask("COUPON.ISSUE c u1").starts_with("[ISSUED, 1, "));
    java.ask("HSET coupon:issue:c 5ad7e6c4:1 1");
    java.ask("PEXPIRE coupon:issue:c 30");
    assert!(client.ask("COUPON.ISSUE c u2").starts_with("[ISSUED, 2, "), "it waits within its deadline");
}

#[test]
fn an_issue_with_a_request_runs_once() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 10 PERUSER 5");
    let first = client.ask("COUPON.ISSUE c u REQUEST r-1");
    assert_eq!(first, "[ISSUED, 1, 9, 1-2]");
    assert_eq!(client.ask("COUPON.ISSUE c u REQUEST r-1 ACK postgres TIMEOUT 20000"), first);
    assert!(client.ask("COUPON.ISSUE c v REQUEST r-1").starts_with("-MISMATCH "));
    assert_eq!(client.field("COUPON.INFO c", "issued"), "1");
}

#[test]
fn a_race_of_many_clients_issues_exactly_what_there_is() {
    let stack = Stack::start();
    stack.connect().ok("COUPON.CREATE c 100");
    let serials: Vec<String> = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..10)
            .map(|racer| {
                let mut client = stack.connect();
                scope.spawn(move || (0..50).map(|i| client.ask(&format!("COUPON.ISSUE c user-{racer}-{i}"))).collect::<Vec<_>>())
            })
            .collect();
        racers.into_iter().flat_map(|racer| racer.join().unwrap()).filter(|reply| reply.starts_with("[ISSUED")).collect()
    });
    assert_eq!(serials.len(), 100);
    let distinct: BTreeSet<_> = serials.iter().map(|reply| reply.split(", ").nth(1).unwrap().to_owned()).collect();
    assert_eq!(distinct.len(), 100);
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(DISTINCT user_id) FROM holdfast.coupon_issue"), "100");
}

#[test]
fn a_coupon_with_garbage_in_it_refuses_only_its_own_issues() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE good 10");
    client.ok("COUPON.CREATE users 10");
    stack.backing().ask("HSET coupon:info:bad total abc");
    stack.backing().ask("HSET coupon:users:users u garbage");
    stack.backing().ask("SET coupon:info:text x");
    for (coupon, serial) in [("bad", 1), ("users", 2), ("text", 3)] {
        let refused = client.ask(&format!("COUPON.ISSUE {coupon} u"));
        assert!(refused.starts_with(&format!("-FROZEN a key of coupon '{coupon}'")), "{refused}");
        assert!(client.ask(&format!("COUPON.ISSUE good user-{serial}")).starts_with(&format!("[ISSUED, {serial}, ")));
    }
}

#[test]
fn a_user_with_very_many_coupons_costs_redis_little() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 100000 PERUSER 1000");
    let mut raw = stack.sidecar.raw();
    raw.write_all(&b"COUPON.ISSUE c u\r\n".repeat(1_001)).unwrap();
    let replies: Vec<String> =
        BufReader::new(raw).lines().map(Result::unwrap).filter(|line| line.starts_with(['*', '-'])).take(1_001).collect();
    assert_eq!(replies.iter().filter(|reply| *reply == "*4").count(), 1_000);
    assert_eq!(client.ask("COUPON.ISSUE c u"), "[ALREADY, 1000]");
    let slowest = stack.backing().ask("SLOWLOG GET 1");
    assert!(!slowest.contains("EVALSHA") || micros(&slowest) < 200_000, "{slowest}");
}

fn micros(slowlog: &str) -> u64 {
    slowlog.split(", ").nth(2).unwrap().parse().unwrap()
}
