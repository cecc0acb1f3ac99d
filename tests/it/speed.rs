//! What is done for speed, and may not change what is answered: sold-out notes, sums, several threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::harness::{Sidecar, Stack, wait_until};

/// Redis's count of the script calls it has run.
fn scripts(stack: &Stack) -> u64 {
    let stats = stack.backing().ask("INFO commandstats");
    let line = stats.lines().find_map(|line| line.trim().strip_prefix("cmdstat_evalsha:calls=")).unwrap_or("0");
    line.split(',').next().unwrap().parse().unwrap()
}

#[test]
fn a_sold_out_product_is_refused_without_redis_and_sells_again_at_once() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 2");
    assert_eq!(client.ask("STOCK.DECR a 2 REQUEST r"), "[OK, 0, 1-2]");
    let refused = 3_000;
    let before = scripts(&stack);
    for _ in 0..refused {
        assert_eq!(client.ask("STOCK.DECR a 1"), "[INSUFFICIENT, a, 0]");
    }
    let asked = scripts(&stack) - before;
    assert!(asked < refused / 2, "{asked} scripts for {refused} refusals");
    assert_eq!(client.ask("STOCK.DECR a 2 REQUEST r"), "[OK, 0, 1-2]", "a REQUEST is always looked up");
    assert_eq!(client.ask("STOCK.DECR a 1 REQUEST s"), "[INSUFFICIENT, a, 0]");
    // In one pipeline, and over another connection.
    for _ in 0..50 {
        let replies = pipelined(&stack, &["STOCK.DECR a 1", "STOCK.INCR a 1", "STOCK.DECR a 1", "STOCK.DECR a 1"]);
        assert_eq!(replies, ["INSUFFICIENT", "OK", "OK", "INSUFFICIENT"]);
        client.ok("STOCK.SET a 1 ACK redis");
        assert!(stack.connect().ask("STOCK.DECR a 1").starts_with("[OK, 0"));
        assert_eq!(client.ask("STOCK.DECR a 1"), "[INSUFFICIENT, a, 0]");
    }
}

/// The outcome words of commands that are sent at once.
fn pipelined(stack: &Stack, commands: &[&str]) -> Vec<String> {
    use std::io::{BufRead as _, BufReader, Write as _};
    let mut raw = stack.sidecar.raw();
    raw.write_all((commands.join("\r\n") + "\r\n").as_bytes()).unwrap();
    let words = BufReader::new(raw).lines().map(Result::unwrap);
    words.filter(|line| ["OK", "INSUFFICIENT"].contains(&line.as_str())).take(commands.len()).collect()
}

#[test]
fn what_a_client_sends_at_once_is_decided_in_its_order_in_whatever_lane() {
    use std::io::{BufRead as _, BufReader, Write as _};
    const CLIENTS: usize = 16;
    const PRODUCTS: usize = 64;
    let stack = Stack::with_settings(&["--reply-within-ms", "20000"]);
    let mut client = stack.connect();
    let sku = |number: usize, product: usize| format!("sku-{number}-{product}");
    (0..CLIENTS)
        .for_each(|number| (0..PRODUCTS).for_each(|product| client.ok(&format!("STOCK.SET {} 1000000 ACK redis", sku(number, product)))));
    let over = AtomicBool::new(false);
    let mut op = None;
    let sold: usize = thread::scope(|scope| {
        let sell = |number: usize| {
            let mut raw = BufReader::new(stack.sidecar.raw());
            let each = |product| format!("STOCK.DECR {sku} 1\r\nSTOCK.GET {sku}\r\n", sku = sku(number, product));
            let commands: String = (0..PRODUCTS).map(each).collect();
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) {
                raw.get_mut().write_all(commands.as_bytes()).unwrap();
                rounds += 1;
                let left = format!(":{}", 1_000_000 - rounds);
                for _ in 0..2 * PRODUCTS {
                    let mut line = String::new();
                    while !line.starts_with(':') {
                        line.clear();
                        raw.read_line(&mut line).unwrap();
                        assert!(!line.starts_with('-'), "{line}");
                    }
                    assert_eq!(line.trim_end(), left);
                }
            }
            rounds * PRODUCTS
        };
        let selling: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || sell(number))).collect();
        // Both lanes of the first thread have had a part.
        for lane in [":stock:", ":stock.64:"] {
            wait_until(lane, || {
                let newest = stack.backing().ask("XREVRANGE holdfast:outbox + - COUNT 1");
                op = newest.split(", ").find(|word| word.contains(lane)).map(|word| word.trim_matches(['[', ']']).to_owned());
                op.is_some()
            });
        }
        over.store(true, Ordering::Relaxed);
        selling.into_iter().map(|selling| selling.join().unwrap()).sum()
    });
    stack.wait_until_applied();
    let booked = "SELECT count(*) || ' ' || sum(redis_delta) FROM holdfast.stock_ledger WHERE kind = 'decr'";
    assert_eq!(stack.postgres.value(booked), format!("{sold} -{sold}"));
    let other = client.ask(&format!("STOCK.DECR sku-0-0 7 REQUEST hf-{}-0", op.unwrap()));
    assert!(other.starts_with("-MISMATCH "), "what the second lane did is found by its id: {other}");
}

#[test]
fn what_is_restocked_elsewhere_sells_here() {
    let stack = Stack::start();
    let second = Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    wait_until("the second is ready", || second.get("/readyz").0 == 200);
    let (mut here, mut elsewhere) = (stack.connect(), second.connect());
    here.ok("STOCK.SET a 0");
    assert_eq!(here.ask("STOCK.DECR a 1"), "[INSUFFICIENT, a, 0]");
    elsewhere.ok("STOCK.INCR a 5");
    // What was noted before is over by then, and nothing is noted that was not asked.
    thread::sleep(Duration::from_millis(51));
    let reply = here.ask("STOCK.DECR a 4");
    assert!(reply.starts_with("[OK, 1, "), "{reply}");
    assert_eq!(here.ask("STOCK.DECR a 3"), "[INSUFFICIENT, a, 1]");
    assert!(here.ask("STOCK.DECR a 1").starts_with("[OK, 0, "));
    assert_eq!(here.ask("STOCK.DECR a 3"), "[INSUFFICIENT, a, 0]", "a sale here puts the note right");
    elsewhere.ok("STOCK.INCR a 9");
    assert_eq!(here.ask("STOCK.GET a"), "9");
    assert!(here.ask("STOCK.DECR a 3").starts_with("[OK, 6, "), "so does a look");
}

#[test]
fn with_the_notes_switched_off_every_refusal_is_asked_for() {
    let stack = Stack::with_flags(&["--stock-sold-out-ms", "0"]);
    let mut client = stack.connect();
    client.ok("STOCK.SET a 0");
    let before = scripts(&stack);
    (0..100).for_each(|_| assert_eq!(client.ask("STOCK.DECR a 1"), "[INSUFFICIENT, a, 0]"));
    assert!(scripts(&stack) - before >= 100);
}

#[test]
fn several_threads_sell_every_unit_once() {
    let stack = Stack::with_flags(&["--threads", "3"]);
    stack.connect().ok("STOCK.SET a 1000");
    stack.connect().ok("COUPON.CREATE c 1000");
    let sold: usize = thread::scope(|scope| {
        let buyers: Vec<_> = (0..24)
            .map(|buyer| {
                let mut client = stack.connect();
                scope.spawn(move || {
                    let bought = |client: &mut crate::harness::Client, n: u32| {
                        let issued = client.ask(&format!("COUPON.ISSUE c u-{buyer}-{n}"));
                        assert!(issued.starts_with("[ISSUED, ") || issued.starts_with("[SOLDOUT"), "{issued}");
                        let reply = client.ask(&format!("STOCK.DECR a 1 REQUEST r-{buyer}-{n}"));
                        assert!(reply.starts_with("[OK, ") || reply.starts_with("[INSUFFICIENT"), "{reply}");
                        let again = client.ask("STOCK.DECR a 1");
                        usize::from(reply.starts_with("[OK, ")) + usize::from(again.starts_with("[OK, "))
                    };
                    (0..45).map(|n| bought(&mut client, n)).sum::<usize>()
                })
            })
            .collect();
        buyers.into_iter().map(|buyer| buyer.join().unwrap()).sum()
    });
    assert_eq!((sold, stack.connect().ask("STOCK.GET a")), (1000, "0".to_owned()));
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), "0");
    assert_eq!(stack.postgres.value("SELECT sum(-pg_delta) FROM holdfast.stock_ledger WHERE kind = 'decr'"), "1000");
    assert_eq!(stack.postgres.value("SELECT count(*) = count(DISTINCT serial) AND count(*) = 1000 FROM holdfast.coupon_issue"), "true");
    // Each thread has lanes of its own, and every client is in the one list.
    let lanes = stack.backing().ask("HKEYS holdfast:meta");
    let lanes: Vec<_> = lanes.trim_matches(['[', ']']).split(", ").filter_map(|lane| lane.split_once(':')).map(|(_, lane)| lane).collect();
    assert!(["stock", "stock.1", "stock.2"].iter().all(|lane| lanes.contains(lane)), "{lanes:?}");
    let clients: Vec<_> = (0..9).map(|_| stack.connect()).collect();
    assert!(stack.connect().ask("CLIENT LIST").lines().filter(|line| line.contains("id=")).count() > clients.len());
}
