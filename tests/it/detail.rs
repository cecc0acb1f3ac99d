//! `ledger.detail = "batch"`: a row of the ledger for all that one batch did to a product, and nothing else is different.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::process::Command;

use crate::harness::{Sidecar, Stack, wait_until};
use crate::proxy::Proxy;
use crate::rebuild::RELAYS_WAIT;

const BATCH: &[&str] = &["--reply-within-ms", "20000", "--ledger-detail", "batch"];

/// A reply to a command over one product: its first word, what was available, and its position.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reply {
    word: String,
    available: i64,
    n: u64,
}

/// A connection whose commands go out at once.
struct Pipeline(BufReader<TcpStream>);

impl Pipeline {
    fn new(stack: &Stack) -> Self {
        Self(BufReader::new(stack.sidecar.raw()))
    }

    fn send<C: AsRef<str>>(&mut self, commands: &[C]) {
        let text: String = commands.iter().map(|command| format!("{}\r\n", command.as_ref())).collect();
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The next reply: `OK` with what is available and a position, or `INSUFFICIENT` with a product and what is available.
    fn reply(&mut self) -> Reply {
        let count = self.line();
        assert_eq!(count, "*3", "{count}");
        let mut words = Vec::new();
        while words.len() < 3 {
            let line = self.line();
            words.push(if line.starts_with('$') { self.line() } else { line.trim_start_matches(':').to_owned() });
        }
        let (available, n) = match words[0].as_str() {
            "OK" => (words[1].parse().unwrap(), words[2].split('-').nth(1).unwrap().parse().unwrap()),
            "INSUFFICIENT" => (words[2].parse().unwrap(), 0),
            other => panic!("{other}: {words:?}"),
        };
        Reply { word: words[0].clone(), available, n }
    }

    fn replies(&mut self, count: usize) -> Vec<Reply> {
        (0..count).map(|_| self.reply()).collect()
    }
}

/// Sends commands while Redis does not answer, so that all of them wait for one batch: only the first, `opener`, goes before.
fn in_one_batch<C: AsRef<str>>(stack: &Stack, opener: &str, commands: &[C]) -> Vec<Reply> {
    let signal = |name: &str| assert!(Command::new("kill").args([name, &stack.redis.pid().to_string()]).status().unwrap().success());
    let (mut first, mut rest) = (Pipeline::new(stack), Pipeline::new(stack));
    let sent = || {
        let text = stack.sidecar.get("/metrics").1;
        text.lines()
            .find_map(|line| line.strip_prefix("holdfast_batch_operations_count{lane=\"stock\"} ")?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let before = sent();
    signal("-STOP");
    first.send(&[opener]);
    wait_until("the first is under way", || sent() > before);
    rest.send(commands);
    // What was sent before over another connection is read before.
    let mut last = stack.sidecar.raw();
    last.write_all(b"PING\r\n").unwrap();
    BufReader::new(last).read_line(&mut String::new()).unwrap();
    signal("-CONT");
    first.reply();
    rest.replies(commands.len())
}

#[test]
fn a_row_stands_for_all_that_a_batch_did_to_a_product() {
    let stack = Stack::with_settings(BATCH);
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100");
    client.ok("STOCK.SET b 5");
    client.ok("STOCK.SET c 9");
    let commands = [
        "STOCK.DECR a 1",
        "STOCK.DECR b 2",
        "STOCK.DECR a 1",
        "STOCK.INCR a 7",
        "STOCK.DECR b 9",
        "STOCK.DECR b 3",
        "STOCK.DECR c 1 REQUEST r-1",
        "STOCK.DECR c 2",
        "STOCK.DECR b 1",
        "STOCK.DECR a 2",
    ];
    let replies = in_one_batch(&stack, "STOCK.INCR a 1", &commands);
    let said: Vec<_> = replies.iter().map(|reply| (reply.word.as_str(), reply.available, reply.n)).collect();
    let expected = [
        // Those of a product have positions that follow each other.
        ("OK", 100, 5),
        ("OK", 3, 9),
        ("OK", 99, 6),
        ("OK", 106, 7),
        ("INSUFFICIENT", 3, 0),
        ("OK", 0, 10),
        // What stands beside a REQUEST is decided one by one.
        ("OK", 8, 11),
        ("OK", 6, 12),
        ("INSUFFICIENT", 0, 0),
        ("OK", 104, 8),
    ];
    assert_eq!(said, expected);
    assert_eq!(client.ask("STOCK.MGET a b c"), "[104, 0, 6]");
    stack.wait_until_applied();
    let rows = "SELECT concat_ws(' ', n, product_id, kind, pg_delta, available_after, operations, runs) FROM holdfast.stock_ledger \
                WHERE n > 3 ORDER BY n";
    let expected =
        ["4 a incr 1 101 1", "5 a mixed 3 104 4 0:-1,2:-1,3:7,9:-2", "9 b decr -5 0 2 1:-2,5:-3", "11 c decr -1 8 1", "12 c decr -2 6 1"];
    assert_eq!(stack.postgres.column(rows), expected);
    assert_eq!(stack.postgres.column("SELECT product_id || ' ' || available FROM holdfast.stock ORDER BY 1"), ["a 104", "b 0", "c 6"]);
    let told = client.ask("STOCK.HISTORY a COUNT 1");
    assert!(told.starts_with("[[position, 1-5, kind, mixed, delta, 3, available, 104, "), "{told}");
    assert!(told.ends_with(", operations, 4]]"), "{told}");
    assert_eq!(client.ask("STOCK.DECR a 1 ACK postgres TIMEOUT 20000"), "[OK, 103, 1-13]");
    assert_eq!(client.ask("HOLDFAST.AWAIT 1-7"), "[APPLIED, 1-7]", "a position inside a row");
}

#[test]
fn events_are_told_of_what_a_batch_did_in_between() {
    let stack = Stack::with_settings(BATCH);
    let mut client = stack.connect();
    for product in ["sure", "mug", "cup"] {
        client.ok(&format!("STOCK.SET {product} 1"));
    }
    client.ok("STOCK.SET mug 4 LOW 2");
    let mut events = Pipeline::new(&stack);
    events.send(&["PSUBSCRIBE stock:events:*"]);
    let mut heard = || loop {
        let line = events.line();
        if line.starts_with('{') {
            return line;
        }
    };
    // Who has just subscribed is not told what came before it was noticed.
    let heard_one = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = stack.connect();
            while !heard_one.load(std::sync::atomic::Ordering::Relaxed) {
                client.ask("STOCK.DECR sure 1");
                client.ask("STOCK.INCR sure 1");
            }
        });
        heard();
        heard_one.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let commands = ["STOCK.DECR mug 1", "STOCK.DECR mug 2", "STOCK.DECR mug 1", "STOCK.INCR mug 3", "STOCK.INCR mug 1"];
    let replies = in_one_batch(&stack, "STOCK.INCR cup 1", &commands);
    let told = |event: &str, available: i64, reply: &Reply| {
        format!(r#"{{"event":"{event}","product":"mug","available":{available},"position":"1-{}"}}"#, reply.n)
    };
    let expected = [told("low", 1, &replies[1]), told("soldout", 0, &replies[2]), told("back", 3, &replies[3])];
    let mut next = || loop {
        let event = heard();
        if !event.contains("sure") {
            return event;
        }
    };
    expected.iter().for_each(|event| assert_eq!(next(), *event));
    // A deletion by another program is none of them.
    stack.postgres.execute("DELETE FROM holdfast.stock WHERE product_id = 'mug'");
    client.until("STOCK.GET mug", "nil");
    client.ok("STOCK.DECR cup 2");
    assert!(next().starts_with(r#"{"event":"soldout","product":"cup""#));
}

#[test]
fn a_batch_whose_answer_was_lost_is_answered_from_its_lines() {
    let mut stack = Stack::with_settings(BATCH);
    let proxy = Proxy::start(stack.redis.port(), b"EVALSHA");
    stack.sidecar = Sidecar::with_settings(&proxy.redis_url(), &stack.postgres.url, BATCH);
    stack.wait_until_ready();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 1000");
    client.ok("STOCK.SET b 1000");
    let mut pipeline = Pipeline::new(&stack);
    let (mut a, mut b, mut positions) = (1000, 1000, Vec::new());
    for round in 0..20 {
        let commands: Vec<String> = (0..30)
            .map(|i| match i % 6 {
                0 => "STOCK.DECR b 1".to_owned(),
                1 => "STOCK.INCR a 1".to_owned(),
                _ => format!("STOCK.DECR a {}", 1 + (round + i) % 3),
            })
            .collect();
        proxy.lose(1);
        pipeline.send(&commands);
        for (command, reply) in commands.iter().zip(pipeline.replies(commands.len())) {
            let words: Vec<&str> = command.split(' ').collect();
            let quantity: i64 = words[2].parse().unwrap();
            let of = if words[1] == "a" { &mut a } else { &mut b };
            *of += if words[0] == "STOCK.INCR" { quantity } else { -quantity };
            assert_eq!((reply.word.as_str(), reply.available), ("OK", *of), "{command}");
            positions.push(reply.n);
        }
        wait_until("the answer was lost", || proxy.left_to_lose() == 0);
    }
    let accepted = positions.len();
    positions.sort_unstable();
    positions.dedup();
    assert_eq!((positions.len(), positions[0], positions[accepted - 1]), (accepted, 3, accepted as u64 + 2));
    stack.wait_until_applied();
    assert_eq!(stack.postgres.column("SELECT available FROM holdfast.stock ORDER BY product_id"), [a.to_string(), b.to_string()]);
    let sums = "SELECT sum(operations) || ' ' || sum(pg_delta) FROM holdfast.stock_ledger WHERE kind <> 'set'";
    assert_eq!(stack.postgres.value(sums), format!("{accepted} {}", a + b - 2000));
    assert_eq!(stack.postgres.value("SELECT count(*) < sum(operations) / 3 FROM holdfast.stock_ledger"), "true");
}

#[test]
fn what_was_answered_survives_redis_and_is_told_from_what_postgres_has() {
    let stack = Stack::with_settings(BATCH);
    let mut client = stack.connect();
    client.ok("STOCK.SET a 1000");
    client.ok("STOCK.SET b 1000");
    let batch =
        |units: i64| -> Vec<String> { (0..20).map(|i| format!("STOCK.DECR {} {units}", if i % 4 == 0 { "b" } else { "a" })).collect() };
    in_one_batch(&stack, "STOCK.DECR a 5", &batch(1));
    stack.wait_until_applied();
    // Its entries stay in the outbox. These do not get to Postgres.
    let answered = stack.postgres.holding(RELAYS_WAIT, || {
        let answered = in_one_batch(&stack, "STOCK.DECR b 5", &batch(2));
        stack.backing().ask("DEL holdfast:meta");
        answered
    });
    assert!(answered.iter().all(|reply| reply.word == "OK"));
    client.until_not("STOCK.GET a", "-");
    assert_eq!(client.ask("STOCK.MGET a b"), "[950, 980]");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.column("SELECT available FROM holdfast.stock ORDER BY product_id"), ["950", "980"]);
    let origins = "SELECT origin_n FROM holdfast.stock_ledger WHERE origin_n IS NOT NULL AND product_id = 'a' ORDER BY 1";
    let answered: Vec<u64> = answered.iter().enumerate().filter(|(i, _)| i % 4 != 0).map(|(_, reply)| reply.n).collect();
    let saved: Vec<u64> = stack.postgres.column(origins).iter().map(|n| n.parse().unwrap()).collect();
    assert!(saved.is_empty() || saved == answered, "{saved:?}");
    in_one_batch(&stack, "STOCK.DECR a 5", &batch(3));
    stack.backing().ask("FLUSHALL");
    client.until_not("STOCK.GET a", "-");
    assert_eq!(client.ask("STOCK.MGET a b"), "[900, 965]");
    stack.wait_until_applied();
    let explained = "SELECT count(*) FROM holdfast.stock s WHERE available <> \
                     (SELECT sum(pg_delta) FROM holdfast.stock_ledger l WHERE l.product_id = s.product_id)";
    assert_eq!(stack.postgres.value(explained), "0");
    assert_eq!(stack.postgres.value("SELECT sum(operations) FROM holdfast.stock_ledger WHERE kind = 'decr'"), "63");
    // What is there of an outbox that does not continue what Postgres has is looked for by name, and all of it is known.
    in_one_batch(&stack, "STOCK.DECR b 5", &batch(4));
    client.ok("STOCK.INCR a 1");
    stack.wait_until_applied();
    let last = stack.postgres.value("SELECT applied_epoch || '-' || applied_n FROM holdfast.partition");
    assert_eq!(stack.backing().ask(&format!("XDEL holdfast:outbox {last}")), "1");
    stack.backing().ask("DEL holdfast:meta");
    client.until_not("STOCK.GET a", "-");
    assert_eq!(client.ask("STOCK.MGET a b"), "[841, 940]");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.column("SELECT available FROM holdfast.stock ORDER BY product_id"), ["841", "940"]);
    assert_eq!(stack.postgres.value(explained), "0");
    assert_eq!(stack.postgres.value("SELECT sum(operations) FROM holdfast.stock_ledger WHERE kind = 'decr'"), "84");
}
