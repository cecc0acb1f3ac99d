//! Messages that answer no request, and what operators look at.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::crowd::memory;
use crate::harness::Stack;

#[test]
fn tools_read_and_change_what_they_do_on_a_redis() {
    let stack = Stack::start();
    let mut client = stack.connect();
    for (request, reply) in [
        ("CONFIG GET maxclients", "[maxclients, 10000]"),
        ("CONFIG SET maxclients 9000 timeout 0", "OK"),
        ("CONFIG GET maxclients", "[maxclients, 9000]"),
        ("CONFIG SET slowlog-log-slower-than 0", "OK"),
        ("CONFIG SET databases 16", "-ERR CONFIG SET failed (possibly related to argument 'databases') - can't set immutable config"),
        ("DBSIZE", "0"),
        ("LATENCY LATEST", "[]"),
        ("PUBSUB CHANNELS", "[]"),
        ("READONLY", "-ERR This instance has cluster support disabled"),
        ("CLIENT TRACKING ON", "-ERR client-side caching is not supported: connect without CLIENT TRACKING"),
    ] {
        assert_eq!(client.ask(request), reply, "{request}");
    }
    assert!(client.ask("SLOWLOG LEN").parse::<u32>().unwrap() > 0);
    assert!(client.ask("SLOWLOG GET 1").contains(", [SLOWLOG, LEN], 127.0.0.1:"));
    assert!(client.ask("MODULE LIST").contains("[name, holdfast, ver, "));
    assert!(stack.sidecar.get("/metrics").1.contains("holdfast_connected_clients 1"));
}

#[test]
fn a_subscription_is_confirmed_and_restricts_resp2() {
    let stack = Stack::start();
    let mut raw = stack.sidecar.raw();
    let request = b"SUBSCRIBE stock:events:mug\r\nSTOCK.GET mug\r\nPUBSUB CHANNELS\r\nPING hi\r\nUNSUBSCRIBE\r\nSTOCK.GET mug\r\nQUIT\r\n";
    raw.write_all(request).unwrap();
    let mut text = String::new();
    raw.read_to_string(&mut text).unwrap();
    let expected = "*3\r\n$9\r\nsubscribe\r\n$16\r\nstock:events:mug\r\n:1\r\n\
        -ERR Can't execute 'stock.get': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context\r\n\
        -ERR Can't execute 'pubsub|channels': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context\r\n\
        *2\r\n$4\r\npong\r\n$2\r\nhi\r\n*3\r\n$11\r\nunsubscribe\r\n$16\r\nstock:events:mug\r\n:0\r\n$-1\r\n+OK\r\n";
    assert_eq!(text, expected);
}

#[test]
fn subscribers_are_counted_over_all_threads() {
    let stack = Stack::with_settings(&["--threads", "3"]);
    let mut subscribers: Vec<_> = (0..12).map(|_| stack.sidecar.raw()).collect();
    for (number, raw) in subscribers.iter_mut().enumerate() {
        raw.write_all(format!("SUBSCRIBE all own-{number}\r\nPSUBSCRIBE stock:*\r\nPING\r\n").as_bytes()).unwrap();
        let lines = BufReader::new(raw.try_clone().unwrap()).lines().map(Result::unwrap);
        assert!(lines.take_while(|line| line != "pong").any(|line| line == ":3"));
    }
    let mut client = stack.connect();
    assert_eq!(client.ask("PUBSUB NUMSUB all own-7 none"), "[all, 12, own-7, 1, none, 0]");
    assert_eq!(client.ask("PUBSUB NUMPAT"), "1");
    assert_eq!(client.ask("PUBSUB CHANNELS").matches("own-").count(), 12);
    assert_eq!(client.ask("PUBSUB CHANNELS al?"), "[all]");
    drop(subscribers);
    client.until("PUBSUB CHANNELS", "[]");
    assert_eq!((client.ask("PUBSUB NUMSUB all"), client.ask("PUBSUB NUMPAT")), ("[all, 0]".into(), "0".into()));
}

#[test]
fn the_backing_redis_is_read_through_only_where_that_is_on_and_never_written() {
    let stack = Stack::start();
    let off = stack.connect().ask("GET stock:product:a");
    assert!(off.starts_with("-ERR unknown command 'GET', with args beginning with: 'stock:product:a'"), "{off}");
    let stack = Stack::with_settings(&["--passthrough", "read-only", "--reply-within-ms", "20000"]);
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    for (request, reply) in [
        ("GET stock:product:a", "10"),
        ("GET nothing", "nil"),
        ("MGET stock:product:a nothing", "[10, nil]"),
        ("EXISTS stock:product:a", "1"),
        ("TYPE holdfast:outbox", "stream"),
        ("XLEN holdfast:outbox", "1"),
        ("HGET holdfast:meta n", "1"),
        ("TTL stock:product:a", "-1"),
        ("HGET stock:product:a n", "-WRONGTYPE Operation against a key holding the wrong kind of value"),
        ("GET", "-ERR wrong number of arguments for 'get' command"),
    ] {
        assert_eq!(client.ask(request), reply, "{request}");
    }
    assert!(client.ask("SCAN 0 MATCH stock:* COUNT 100").contains("stock:product:a"));
    for never in ["SET stock:product:a 5", "DEL stock:product:a", "EVAL x 0", "KEYS *", "FLUSHALL", "CONFIG SET save x"] {
        assert!(client.ask(never).starts_with("-ERR "), "{never}");
    }
    assert_eq!(client.ask("STOCK.GET a"), "10");
}

#[test]
fn what_is_read_through_does_not_make_redis_work_for_long() {
    let stack = Stack::with_settings(&["--passthrough", "read-only", "--reply-within-ms", "20000"]);
    let (mut client, mut backing) = (stack.connect(), stack.backing());
    let fields = |count: usize| (0..count).map(|n| format!(" {n} x")).collect::<String>();
    backing.ask(&format!("MSET{}", fields(20_000)));
    backing.ask(&format!("HSET few{}", fields(1_000)));
    backing.ask(&format!("HSET many{}", fields(1_001)));
    assert!(client.ask("SCAN 0 COUNT 1000000000").matches(", ").count() < 5_000);
    assert_eq!(client.ask("HGETALL few").matches(", ").count(), 1_999);
    assert_eq!(client.ask("HGETALL many"), "-ERR the hash has 1001 fields: HGET reads one");
    assert_eq!(client.ask("HGETALL 7"), "-WRONGTYPE Operation against a key holding the wrong kind of value");
    assert_eq!(client.ask("HGETALL nothing"), "[]");
    let refused = "-ERR name a COUNT of at most 1000: sales wait while Redis works on it";
    assert_eq!(client.ask("XRANGE holdfast:outbox - +"), refused);
}

#[test]
fn what_is_read_through_is_bounded_as_it_comes_and_tells_clients_nothing_to_act_on() {
    let stack = Stack::with_settings(&["--passthrough", "read-only", "--reply-within-ms", "20000"]);
    let (mut client, mut backing) = (stack.connect(), stack.backing());
    let long = "x".repeat(64 << 20);
    backing.ask(&format!("SET long {long}"));
    for n in 0..200 {
        backing.ask(&format!("HSET wide {n} {}", &long[..10_000]));
    }
    backing.ask(&format!("SET short {}", &long[..1_000_000]));
    assert_eq!(client.ask("GET short").len(), 1_000_000);
    let before = memory(&stack.sidecar);
    let refused = "-ERR the reply has more than 1048576 bytes: ask for less, or ask Redis itself";
    for _ in 0..3 {
        for request in ["GET long", "MGET short short", "HGETALL wide"] {
            assert_eq!(client.ask(request), refused, "{request}");
        }
        assert_eq!(client.ask("STRLEN long"), (64 << 20).to_string());
    }
    let after = memory(&stack.sidecar);
    assert!(after < before + (16 << 20), "{before} bytes before, {after} after");
    assert_eq!(backing.ask("ACL SETUSER default -hlen"), "OK");
    let denied = client.ask("HLEN wide");
    assert!(denied.starts_with("-ERR Redis says: NOPERM "), "{denied}");
}

#[test]
fn an_answer_that_nobody_waits_for_any_more_is_not_taken_for_the_next_one() {
    let stack = Stack::with_settings(&["--passthrough", "read-only", "--reply-within-ms", "20000"]);
    let (mut client, mut backing) = (stack.connect(), stack.backing());
    backing.ask(&format!("SET long {}", "x".repeat(1_000_000)));
    let signal = |name: &str| assert!(Command::new("kill").args([name, &stack.redis.pid().to_string()]).status().unwrap().success());
    for _ in 0..5 {
        assert_eq!(client.ask("STRLEN long"), "1000000", "the connection is there");
        signal("-STOP");
        let mut killed = BufReader::new(stack.sidecar.raw());
        killed.get_mut().write_all(b"CLIENT ID\r\nGET long\r\n").unwrap();
        let mut id = String::new();
        killed.read_line(&mut id).unwrap();
        assert_eq!(client.ask(&format!("CLIENT KILL ID {}", id.trim_start_matches(':').trim_end())), "1");
        std::thread::scope(|scope| {
            let next = scope.spawn(|| stack.connect().ask("MGET long nothing"));
            // Long enough that it has been sent: later, and this shows nothing.
            std::thread::sleep(Duration::from_millis(50));
            signal("-CONT");
            assert_eq!(next.join().unwrap().len(), "[, nil]".len() + 1_000_000);
        });
    }
    signal("-STOP");
    let given_up = client.ask("GET long");
    assert!(given_up.starts_with("-TRYAGAIN Redis does not answer"), "{given_up}");
    signal("-CONT");
    assert_eq!(client.ask("MGET long nothing").len(), "[, nil]".len() + 1_000_000);
}

#[test]
fn what_is_sold_out_back_or_low_is_told_to_whoever_listens() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET mug 10 LOW 3");
    client.ok("STOCK.SET cup 10");
    client.ok("COUPON.CREATE spring 1");
    let connect = |protocol: &str, command: &str| {
        let mut raw = stack.sidecar.raw();
        raw.write_all(format!("HELLO {protocol}\r\n{command}\r\n").as_bytes()).unwrap();
        BufReader::new(raw)
    };
    let mut mugs = connect("2", "SUBSCRIBE stock:events:mug");
    let mut all = connect("3", "PSUBSCRIBE stock:events:* coupon:events:*");
    let heard = |reader: &mut BufReader<TcpStream>| loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0);
        if line.starts_with('{') {
            return line.trim_end().to_owned();
        }
    };
    // Who has just subscribed is not told what came before it was noticed: until the first of these is heard.
    let mut sure = connect("2", "SUBSCRIBE stock:events:sure");
    client.ok("STOCK.SET sure 1");
    let sent = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = stack.connect();
            while !sent.load(Ordering::Relaxed) {
                client.ask("STOCK.DECR sure 1");
                client.ask("STOCK.INCR sure 1");
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        heard(&mut sure);
        sent.store(true, Ordering::Relaxed);
    });
    let told = |event: &str, product: &str, available: u32, reply: &str| {
        let position = reply.trim_end_matches(']').rsplit(", ").next().unwrap();
        format!(r#"{{"event":"{event}","product":"{product}","available":{available},"position":"{position}"}}"#)
    };
    let low = client.ask("STOCK.DECR mug 8");
    let order = client.ask("STOCK.RESERVE o 600000 mug 2 cup 1");
    let back = client.ask("STOCK.CANCEL o ACK redis");
    let issued = client.ask("COUPON.ISSUE spring u");
    let mug = [told("low", "mug", 2, &low), told("soldout", "mug", 0, &order), told("back", "mug", 2, &back)];
    for event in &mug {
        assert_eq!(heard(&mut mugs), *event);
    }
    let mut others: Vec<String> = Vec::new();
    while others.len() < 4 {
        let event = heard(&mut all);
        if !event.contains("\"sure\"") {
            others.push(event);
        }
    }
    let position = issued.trim_end_matches(']').rsplit(", ").next().unwrap();
    assert_eq!(others[..3], mug);
    assert_eq!(others[3], format!(r#"{{"event":"soldout","coupon":"spring","remaining":0,"position":"{position}"}}"#));
}
