//! What a client learns of a change whose answer got lost, by the id that INDOUBT gave it.

use std::process::Command;

use crate::harness::{Client, Sidecar, Stack, wait_until};
use crate::proxy::{Direction, Proxy};

/// The server's own id out of an INDOUBT reply.
fn id_of(in_doubt: &str) -> String {
    let id = in_doubt.strip_prefix("-INDOUBT ").and_then(|rest| rest.split(' ').next()).unwrap_or_else(|| panic!("{in_doubt}"));
    assert!(id.starts_with("hf-"), "{in_doubt}");
    assert!(in_doubt.ends_with(&format!("ask again with REQUEST {id}")), "{in_doubt}");
    id.to_owned()
}

/// Asks until it is known.
fn known(client: &mut Client, command: &str) -> String {
    let mut reply = String::new();
    wait_until("it is known what became of the change", || {
        reply = client.ask(command);
        !reply.starts_with("-INDOUBT ") && !reply.starts_with("-TRYAGAIN ")
    });
    reply
}

fn behind_a_proxy() -> (Stack, Proxy) {
    let mut stack = Stack::with_own_postgres();
    let proxy = Proxy::start(stack.redis.port(), b"EVALSHA");
    // An issue for which the lock has to be had first is not sent at all, and never in doubt.
    stack.sidecar =
        Sidecar::with_settings(&proxy.redis_url(), &stack.postgres.url, &["--reply-within-ms", "500", "--coupon-lock", "elide"]);
    stack.wait_until_ready();
    (stack, proxy)
}

/// Sends it until it is on its way to Redis and no answer comes.
fn lose(client: &mut Client, proxy: &Proxy, command: &str) -> String {
    proxy.hold(Direction::Answers);
    let in_doubt = client.until_not(command, "-TRYAGAIN");
    proxy.release();
    in_doubt
}

#[test]
fn a_change_that_ran_and_was_not_answered_is_found_in_the_ledger() {
    let (mut stack, proxy) = behind_a_proxy();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100");
    client.ok("STOCK.SET b 100");
    client.ok("COUPON.CREATE c 10");
    let sold = id_of(&lose(&mut client, &proxy, "STOCK.DECR a 3 b 1"));
    let issued = id_of(&lose(&mut client, &proxy, "COUPON.ISSUE c u"));

    stack.postgres.own.as_mut().unwrap().kill();
    wait_until("the sidecar sees that postgres is gone", || client.field("HOLDFAST.STATUS", "postgres") == "down");
    let still = client.until_not(&format!("COUPON.ISSUE c u REQUEST {issued}"), "-TRYAGAIN");
    assert_eq!(id_of(&still), issued);
    stack.postgres.own.as_mut().unwrap().restart();
    wait_until("the sidecar sees that postgres is back", || client.field("HOLDFAST.STATUS", "postgres") == "up");

    for _ in 0..2 {
        assert_eq!(known(&mut client, &format!("STOCK.DECR a 3 b 1 REQUEST {sold}")), "[OK, 97, 99, 1-4]");
        assert_eq!(known(&mut client, &format!("STOCK.DECR a 3 b 1 ACK postgres REQUEST {sold}")), "[OK, 97, 99, 1-4]");
        assert_eq!(known(&mut client, &format!("COUPON.ISSUE c u REQUEST {issued}")), "[ISSUED, 1, 9, 1-5]");
    }
    for other in ["STOCK.DECR a 3 b 2", "STOCK.DECR b 1 a 3", "STOCK.DECR a 3", "STOCK.INCR a 3", "COUPON.ISSUE c u"] {
        let refused = known(&mut client, &format!("{other} REQUEST {sold}"));
        assert!(refused.starts_with("-MISMATCH "), "{other}: {refused}");
    }
    let refused = known(&mut client, &format!("COUPON.ISSUE c v REQUEST {issued}"));
    assert!(refused.starts_with("-MISMATCH "), "{refused}");
    stack.wait_until_applied();
    let sold = "SELECT count(*) || ' ' || sum(redis_delta) || ' ' || count(request_id) FROM holdfast.stock_ledger WHERE kind = 'decr'";
    assert_eq!(stack.postgres.value(sold), "2 -4 0", "it ran, and only when it was first sent");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.coupon_issue"), "1");
}

#[test]
fn a_change_that_a_hanging_redis_never_got_to_runs_once_under_its_id() {
    let stack = Stack::with_deadline(500);
    let mut client = stack.connect();
    client.until_not("STOCK.SET a 100", "-TRYAGAIN");
    let signal = |name: &str| assert!(Command::new("kill").args([name, &stack.redis.pid().to_string()]).status().unwrap().success());
    let mut in_doubt = String::new();
    // On a machine that stalls it may be too late to be sent.
    wait_until("it is in doubt", || {
        signal("-STOP");
        in_doubt = client.ask("STOCK.DECR a 1");
        signal("-CONT");
        client.until("STOCK.GET a", "100");
        in_doubt.starts_with("-INDOUBT ")
    });
    let command = format!("STOCK.DECR a 1 REQUEST {}", id_of(&in_doubt));
    let sold = known(&mut client, &command);
    assert!(sold.starts_with("[OK, 99, "), "{sold}");
    assert_eq!(known(&mut client, &command), sold);
    stack.wait_until_applied();
    let mut backing = stack.backing();
    for bucket in 0..64 {
        for generation in backing.ask(&format!("KEYS holdfast:request:*.{bucket}")).trim_matches(['[', ']']).split(", ") {
            backing.ask(&format!("DEL {generation}"));
        }
    }
    assert_eq!(known(&mut client, &command), sold, "the ledger knows it when Redis has forgotten it");
    let refused = known(&mut client, &command.replace("a 1", "a 2"));
    assert!(refused.starts_with("-MISMATCH "), "{refused}");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) || ' ' || sum(redis_delta) FROM holdfast.stock_ledger WHERE kind = 'decr'"), "1 -1");
}

#[test]
fn what_was_asked_for_by_its_id_is_not_executed_when_it_arrives_later() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    let mut backing = stack.backing();
    let fields = backing.ask("HKEYS holdfast:meta");
    let lane = fields.trim_matches(['[', ']']).split(", ").find(|field| field.ends_with(":stock")).unwrap().to_owned();
    let recorded = backing.ask(&format!("HGET holdfast:meta {lane}"));
    let next = recorded.split(':').next().unwrap().parse::<u64>().unwrap() + 1;
    let command = format!("STOCK.DECR a 1 REQUEST hf-{lane}:{next}-0");
    let refused = client.ask(&command);
    assert!(refused.starts_with("-TRYAGAIN ") || refused.starts_with("-INDOUBT "), "it may not be the batch of this number: {refused}");
    let sold = known(&mut client, &command);
    assert!(sold.starts_with("[OK, 9, "), "{sold}");
    assert_eq!(known(&mut client, &command), sold);
    assert_eq!(client.ask("STOCK.GET a"), "9");
}

#[test]
fn an_id_that_was_never_sent_is_an_id_like_any_other_and_one_that_cannot_be_is_refused() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ok("COUPON.CREATE c 10");
    let id = "hf-0123456789abcdef0123456789abcdef:coupon:12-3";
    let issue = format!("COUPON.ISSUE c u REQUEST {id}");
    let issued = known(&mut client, &issue);
    assert!(issued.starts_with("[ISSUED, 1, 9, "), "{issued}");
    assert_eq!(known(&mut client, &issue), issued);
    for other in ["COUPON.ISSUE c v", "STOCK.DECR a 1"] {
        let refused = known(&mut client, &format!("{other} REQUEST {id}"));
        assert!(refused.starts_with("-MISMATCH "), "{other}: {refused}");
    }
    for bad in ["hf-1", "hf-0123456789abcdef0123456789abcdef:coupon:0-3", "hf-0123456789abcdef0123456789abcdef:lock:1-3"] {
        let refused = client.ask(&format!("STOCK.DECR a 1 REQUEST {bad}"));
        assert!(refused.starts_with("-ERR invalid request id: "), "{bad}: {refused}");
    }
    assert_eq!(client.ask("STOCK.GET a"), "10");
}
