//! STOCK: the contract, command by command.

use std::process::Command;
use std::time::Duration;

use crate::harness::Stack;
use crate::rebuild::RELAYS_WAIT;

#[test]
fn a_product_is_set_sold_restocked_and_deleted_in_redis_and_in_postgres() {
    let stack = Stack::start();
    let mut client = stack.connect();
    let available = |product: &str| stack.postgres.value(&format!("SELECT available FROM holdfast.stock WHERE product_id = '{product}'"));
    assert_eq!(client.ask("STOCK.SET sku-1 100"), "[OK, 100, 1-1]");
    assert_eq!(available("sku-1"), "100", "STOCK.SET answers when Postgres has it");
    assert_eq!(client.ask("STOCK.DECR sku-1 3"), "[OK, 97, 1-2]");
    assert_eq!(stack.backing().ask("GET stock:product:sku-1"), "97");
    assert_eq!(client.ask("STOCK.DECR sku-1 98"), "[INSUFFICIENT, sku-1, 97]");
    assert_eq!(client.ask("STOCK.INCR sku-1 5 ACK postgres TIMEOUT 20000"), "[OK, 102, 1-3]");
    assert_eq!(available("sku-1"), "102");
    assert_eq!(client.ask("STOCK.GET sku-1"), "102");
    assert_eq!(client.ask("STOCK.GET sku-2"), "nil");
    assert_eq!(client.ask("STOCK.MGET sku-1 nothing sku-1"), "[102, nil, 102]");
    assert_eq!(client.ask("STOCK.SET sku-1 7 LOW 3"), "[OK, 7, 1-4]");
    assert_eq!(client.field("STOCK.INFO sku-1", "low"), "3");
    assert_eq!(
        client.ask("STOCK.INFO sku-1"),
        "[product, sku-1, available, 7, held, 0, low, 3, position, 1-4, applied, 1-4, lag_ms, 0, frozen, nil]"
    );
    assert_eq!(client.ask("STOCK.DEL sku-1"), "[OK, 1-5]");
    assert_eq!(client.ask("STOCK.DEL sku-1"), "[NOTFOUND]");
    assert_eq!(client.ask("STOCK.DECR sku-1 1"), "-NOTFOUND no product 'sku-1'");
    assert_eq!(client.ask("STOCK.INFO sku-1"), "nil");
    assert_eq!(stack.postgres.value("SELECT deleted_at IS NOT NULL FROM holdfast.stock"), "true");
    assert_eq!(
        stack.postgres.column("SELECT kind || ' ' || redis_delta || ' ' || available_after FROM holdfast.stock_ledger ORDER BY n"),
        ["set 100 100", "decr -3 97", "incr 5 102", "set -95 7", "delete -7 0"]
    );
}

#[test]
fn several_products_are_taken_all_or_none_and_the_same_one_twice_is_summed() {
    let stack = Stack::start();
    let mut client = stack.connect();
    for product in ["a", "b", "c"] {
        client.ok(&format!("STOCK.SET {product} 10"));
    }
    assert_eq!(client.ask("STOCK.DECR a 1 b 2 a 3"), "[OK, 6, 8, 1-4]");
    assert_eq!(client.ask("STOCK.DECR a 4 b 4 a 3"), "[INSUFFICIENT, a, 6]");
    assert_eq!(client.ask("STOCK.DECR c 10 b 9"), "[INSUFFICIENT, b, 8]");
    assert_eq!(client.ask("STOCK.DECR c 1 nothing 1"), "-NOTFOUND no product 'nothing'");
    assert_eq!(client.ask("STOCK.MGET a b c"), "[6, 8, 10]");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.column("SELECT available FROM holdfast.stock ORDER BY product_id"), ["6", "8", "10"]);
}

#[test]
fn a_request_runs_once_and_repeats_its_reply() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    let v7 = uuid_v7(0);
    for id in ["r-1", &v7, "a b\u{e9}%"] {
        let words = ["STOCK.DECR", "a", "2", "REQUEST", id];
        let first = client.ask_words(&words);
        assert!(first.starts_with("[OK, "), "{first}");
        assert_eq!(client.ask_words(&words), first);
        assert_eq!(
            client.ask_words(&["stock.decr", "a", "2", "ack", "postgres", "timeout", "20000", "request", id]),
            first,
            "ACK does not count"
        );
        let mismatch = "-MISMATCH this REQUEST id was used with another command or other arguments: use a new id";
        assert_eq!(client.ask_words(&["STOCK.DECR", "a", "1", "REQUEST", id]), mismatch);
        assert_eq!(client.ask_words(&["STOCK.INCR", "a", "2", "REQUEST", id]), mismatch);
    }
    assert_eq!(client.ask("STOCK.GET a"), "4");
    assert_eq!(client.ask("STOCK.DECR a 5 REQUEST r-2"), "[INSUFFICIENT, a, 4]");
    client.ok("STOCK.INCR a 1 REQUEST r-3");
    assert_eq!(client.ask("STOCK.DECR a 5 REQUEST r-2"), "[OK, 0, 1-6]", "a refusal is decided afresh");
    let stale = client.ask(&format!("STOCK.INCR a 1 REQUEST {}", uuid_v7(-601_000)));
    assert!(stale.starts_with("-STALE "), "{stale}");
    let ahead = client.ask(&format!("STOCK.INCR a 1 REQUEST {}", uuid_v7(62_000)));
    assert!(ahead.starts_with("-ERR invalid request id"), "{ahead}");
    assert_eq!(client.ask("STOCK.GET a"), "0");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE request_id IS NOT NULL"), "5");
}

/// A UUIDv7 made so many ms from now.
fn uuid_v7(ms: i64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let stamp = i64::try_from(now.as_millis()).unwrap() + ms;
    format!("{:08x}-{:04x}-7abc-8abc-0123456789ab", stamp >> 16, stamp & 0xffff)
}

#[test]
fn totals_stay_below_2_to_the_53() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 1000000000000");
    stack.backing().ask("SET stock:product:a 9007199254740990");
    assert_eq!(client.ask("STOCK.INCR a 1"), "[OK, 9007199254740991, 1-2]");
    let over = client.ask("STOCK.INCR a 1");
    assert!(over.starts_with("-ERR invalid quantity: product 'a' has 9007199254740991 units"), "{over}");
    assert_eq!(client.ask("STOCK.GET a"), "9007199254740991");
}

#[test]
fn a_key_of_another_type_refuses_only_its_own_operation() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    stack.backing().ask("LPUSH stock:product:list x");
    stack.backing().ask("SET stock:product:text 1e3");
    for product in ["list", "text"] {
        let refused = client.ask(&format!("STOCK.DECR a 1 {product} 1"));
        assert!(refused.starts_with(&format!("-FROZEN the key of product '{product}'")), "{refused}");
    }
    assert_eq!(client.ask("STOCK.GET a"), "10");
    stack.backing().ask("HSET stock:frozen a looked-at");
    assert_eq!(client.ask("STOCK.DECR a 1"), "-FROZEN looked-at");
    assert_eq!(client.ask("STOCK.GET a"), "10", "reads go on");
}

#[test]
fn a_scan_finds_every_product_with_its_units() {
    let stack = Stack::start();
    let mut client = stack.connect();
    for i in 0..300 {
        client.ok(&format!("STOCK.SET sku-{i} {i} ACK redis"));
    }
    client.ok("STOCK.SET other 1");
    // No product is called so: one is what the scripts are tried on.
    let mut backing = stack.backing();
    for key in [&b"stock:product:sku-1 trial 7"[..], b"stock:product:sku-{1}", b"stock:product:sku-\xff"] {
        assert_eq!(backing.ask_words(&[&b"SET"[..], key, b"1"]), "OK");
    }
    let mut found = std::collections::BTreeMap::new();
    let mut cursor = "0".to_owned();
    loop {
        let reply = client.ask(&format!("STOCK.SCAN {cursor} MATCH sku-* COUNT 50"));
        let mut words: Vec<String> = reply.replace(['[', ']'], "").split(", ").map(String::from).filter(|word| !word.is_empty()).collect();
        cursor = words.remove(0);
        for pair in words.chunks(2) {
            found.insert(pair[0].clone(), pair[1].clone());
        }
        if cursor == "0" {
            break;
        }
    }
    assert_eq!(found.len(), 300);
    assert!((0..300).all(|i| found[&format!("sku-{i}")] == i.to_string()));
}

#[test]
fn await_waits_for_postgres() {
    let stack = Stack::start();
    let mut client = stack.connect();
    assert_eq!(client.ask("STOCK.SET a 10 ACK redis"), "[OK, 10, 1-1]");
    assert_eq!(client.ask("HOLDFAST.AWAIT 1-1"), "[APPLIED, 1-1]");
    assert_eq!(client.ask("HOLDFAST.AWAIT 1-2 50"), "[PENDING, 1-1]");
    assert!(client.ask("HOLDFAST.AWAIT 7").starts_with("-ERR invalid position"));
}

#[test]
fn a_product_that_only_postgres_has_is_loaded_on_its_first_use() {
    let stack = Stack::start();
    let mut client = stack.connect();
    for product in ["a", "b", "c", "d"] {
        client.ok(&format!("STOCK.SET {product} 10"));
    }
    client.ok("STOCK.DECR a 1");
    client.ask("STOCK.DEL d");
    stack.backing().ask("DEL stock:product:a stock:product:b stock:product:c");
    assert_eq!(client.ask("STOCK.DECR a 2 b 1 a 1"), "[OK, 6, 9, 1-9]", "two loads and the sale");
    assert_eq!(client.ask("STOCK.MGET c nothing"), "[10, nil]");
    stack.backing().ask("DEL stock:product:c");
    assert_eq!(client.ask("STOCK.SET c 4"), "[OK, 4, 1-11]", "created anew");
    assert_eq!(client.ask("STOCK.GET d"), "nil", "it was deleted");
    assert_eq!(client.ask("STOCK.DECR d 1"), "-NOTFOUND no product 'd'");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.column("SELECT available FROM holdfast.stock ORDER BY product_id"), ["6", "9", "4", "0"]);
    assert_eq!(
        stack.postgres.column("SELECT redis_delta || ' ' || pg_delta FROM holdfast.stock_ledger WHERE kind = 'init'"),
        ["9 0", "10 0", "10 0"]
    );
    let created = stack.postgres.value("SELECT redis_delta || ' ' || pg_delta FROM holdfast.stock_ledger WHERE n = 11");
    assert_eq!(created, "4 -6", "what Postgres had gives way");
    let many: Vec<String> = (0..50).map(|i| format!("nothing-{i}")).collect();
    assert_eq!(client.ask(&format!("STOCK.MGET {}", many.join(" "))), format!("[{}]", ["nil"; 50].join(", ")));
}

#[test]
fn many_clients_that_use_an_absent_product_at_once_load_it_once() {
    let stack = Stack::start();
    stack.connect().ok("STOCK.SET a 1000");
    stack.backing().ask("DEL stock:product:a");
    std::thread::scope(|scope| {
        for _ in 0..10 {
            let mut client = stack.connect();
            scope.spawn(move || {
                for _ in 0..10 {
                    // A machine that stalls for the deadline of 100 ms refuses; as clients do, the test asks again.
                    let reply = client.until_not("STOCK.DECR a 1", "-TRYAGAIN");
                    assert!(reply.starts_with("[OK, "), "{reply}");
                }
            });
        }
    });
    assert_eq!(stack.connect().ask("STOCK.GET a"), "900");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'init'"), "1");
}

#[test]
fn a_product_that_appears_in_postgres_is_not_created_over() {
    let stack = Stack::start();
    let mut client = stack.connect();
    assert_eq!(client.ask("STOCK.GET x"), "nil");
    stack.postgres.value("INSERT INTO holdfast.stock (product_id, available) VALUES ('x', 50) RETURNING 1");
    client.ok("STOCK.SET x 100");
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock WHERE product_id = 'x'"), "100");
}

/// Each command that changes something, as its setting names it, in an order in which all are accepted.
const CHANGES: [(&str, &str); 16] = [
    ("stock_set", "STOCK.SET a 10"),
    ("stock_incr", "STOCK.INCR a 1"),
    ("stock_decr", "STOCK.DECR a 1"),
    ("stock_reserve", "STOCK.RESERVE o 600000 a 1"),
    ("stock_extend", "STOCK.EXTEND o 700000"),
    ("stock_confirm", "STOCK.CONFIRM o"),
    ("stock_cancel", "STOCK.CANCEL o"),
    ("stock_unfreeze", "STOCK.UNFREEZE a"),
    ("stock_del", "STOCK.DEL a"),
    ("coupon_create", "COUPON.CREATE c 5"),
    ("coupon_alter", "COUPON.ALTER c TOTAL 6"),
    ("coupon_issue", "COUPON.ISSUE c u"),
    ("coupon_use", "COUPON.USE c u"),
    ("coupon_unuse", "COUPON.UNUSE c u"),
    ("coupon_revoke", "COUPON.REVOKE c u"),
    ("coupon_del", "COUPON.DEL c"),
];

#[test]
fn a_reply_whose_client_says_no_ack_waits_for_what_the_commands_setting_says() {
    let flag = |name: &str| format!("--ack-{}", name.replace('_', "-"));
    let shown = |flags: &[String]| -> Vec<String> {
        let output = Command::new(env!("CARGO_BIN_EXE_holdfast")).arg("print-config").args(flags).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let section: Vec<&str> = text.split("[ack]").nth(1).unwrap().split('[').next().unwrap().lines().collect();
        let value = |name: &str| section.iter().find_map(|line| line.strip_prefix(&format!("{name} = \""))?.split('"').next());
        CHANGES.iter().map(|(name, _)| value(name).unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()).collect()
    };
    let usual = shown(&[]);
    let other = |ack: &String| if ack == "redis" { "postgres" } else { "redis" }.to_owned();
    let swapped = CHANGES.iter().zip(&usual).flat_map(|((name, _), ack)| [flag(name), other(ack)]).collect();
    for flags in [Vec::new(), swapped] {
        let stack =
            Stack::with_settings(&[&["--reply-within-ms", "20000"], &*flags.iter().map(String::as_str).collect::<Vec<_>>()].concat());
        let mut client = stack.connect();
        let waited_for = stack.postgres.holding(RELAYS_WAIT, || {
            let waits = |(_, command): &(&str, &str)| {
                let reply = client.ask(&format!("{command} TIMEOUT 20"));
                let is_pending = reply.starts_with("-PENDING ");
                assert!(is_pending || reply.starts_with('['), "{command}: {reply}");
                if is_pending { "postgres" } else { "redis" }.to_owned()
            };
            CHANGES.iter().map(waits).collect::<Vec<_>>()
        });
        assert_eq!(waited_for, shown(&flags), "{CHANGES:?}");
    }
}

#[test]
fn a_reply_that_waits_for_postgres_by_its_setting_waits_as_long_as_others_that_do() {
    let stack = Stack::with_settings(&["--ack-stock-decr", "postgres"]);
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    let (sent, answered) = std::sync::mpsc::channel();
    let waiting = stack.postgres.holding(RELAYS_WAIT, || {
        let waiting = std::thread::spawn(move || sent.send(client.ask("STOCK.DECR a 1")));
        // Five times as long as a reply that waits for Redis by default.
        assert!(answered.recv_timeout(Duration::from_millis(500)).is_err(), "it still waits");
        waiting
    });
    let reply = answered.recv_timeout(Duration::from_secs(30)).unwrap();
    waiting.join().unwrap().unwrap();
    assert!(reply.starts_with("[OK, 9, "), "{reply}");
}
