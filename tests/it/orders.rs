//! STOCK, the commands about orders: reserve, confirm, cancel, extend, expire.

use std::time::Duration;

use crate::bulk::audit;
use crate::harness::{Client, Sidecar, Stack, wait_until};

/// Long enough for a test to be over.
const LONG: &str = "600000";

/// Nobody expires anything until it is released.
const SOMEBODY_ELSE_SWEEPS: &str = "SET holdfast:sweeper somebody-else";

fn held(reply: &str) -> bool {
    reply.starts_with("[HELD, ")
}

/// How many ms after its time the latest order expired, by Redis's clock.
fn latest(stack: &Stack) -> i64 {
    let late = "SELECT max((extract(epoch FROM l.at) * 1000)::bigint - o.expires_ms) FROM holdfast.stock_ledger l \
                JOIN holdfast.stock_order o USING (order_id) WHERE l.kind = 'expire'";
    stack.postgres.value(late).parse().unwrap()
}

#[test]
fn an_order_is_held_then_sold_or_given_back_in_redis_and_in_postgres() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ok("STOCK.SET b 5");
    let ledger = |product: &str| {
        stack.wait_until_applied();
        stack.postgres.value(&format!("SELECT available || ' ' || held FROM holdfast.stock WHERE product_id = '{product}'"))
    };
    assert!(held(&client.ask("STOCK.RESERVE paid 600000 a 1 b 1 a 1")));
    assert_eq!(client.ask("STOCK.MGET a b"), "[8, 4]");
    assert_eq!((client.field("STOCK.INFO a", "held"), ledger("a"), ledger("b")), ("2".into(), "8 2".into(), "4 1".into()));
    assert_eq!(stack.backing().ask("HGET stock:held a"), "2");
    assert_eq!(stack.backing().ask("ZCARD stock:expiry"), "1");
    assert_eq!(client.ask("STOCK.RESERVE paid 600000 a 1"), "[EXISTS, held]");
    let shown = client.ask("STOCK.ORDER paid");
    assert!(shown.starts_with("[order, paid, state, held, expires_at_ms, 1"), "{shown}");
    assert!(shown.ends_with(", items, [a, 2, b, 1]]"), "{shown}");
    assert_eq!(client.ask("STOCK.CONFIRM paid"), "[CONFIRMED, 1-4]");
    assert_eq!(client.ask("STOCK.CONFIRM paid ACK postgres TIMEOUT 20000"), "[CONFIRMED, 1-4]", "the same again");
    assert_eq!(
        (client.ask("STOCK.MGET a b"), client.field("STOCK.INFO a", "held"), ledger("a")),
        ("[8, 4]".into(), "0".into(), "8 0".into())
    );
    assert_eq!(client.ask(&format!("STOCK.EXTEND paid {LONG}")), "[CONFIRMED]");
    assert_eq!(client.ask("STOCK.CANCEL paid"), "[CANCELLED, 1-5]", "the customer sends it back");
    assert_eq!(ledger("a"), "10 0", "Redis and Postgres are both done");
    assert_eq!(client.ask("STOCK.CANCEL paid"), "[CANCELLED, 1-5]");
    assert_eq!(client.ask("STOCK.CONFIRM paid"), "[CANCELLED]");
    assert_eq!(client.ask(&format!("STOCK.EXTEND paid {LONG}")), "[CANCELLED]");
    assert_eq!(client.ask("STOCK.RESERVE paid 600000 a 1"), "[EXISTS, cancelled]");

    assert!(held(&client.ask("STOCK.RESERVE failed 600000 a 3")));
    assert_eq!(client.ask("STOCK.CANCEL failed ACK redis"), "[CANCELLED, 1-7]");
    assert_eq!((client.ask("STOCK.GET a"), ledger("a")), ("10".into(), "10 0".into()));
    assert_eq!(client.ask("STOCK.RESERVE much 600000 b 1 a 11"), "[INSUFFICIENT, a, 10]");
    assert_eq!(client.ask("STOCK.RESERVE much 600000 b 1 nothing 1"), "-NOTFOUND no product 'nothing'");
    assert_eq!(client.ask("STOCK.ORDER much"), "nil");
    assert_eq!(stack.backing().ask("EXISTS stock:held stock:expiry stock:order:much"), "0");
    assert_eq!(
        stack
            .postgres
            .column("SELECT order_id || ' ' || state || ' ' || products::text || ' ' || units::text FROM holdfast.stock_order ORDER BY n"),
        ["paid cancelled {a,b} {2,1}", "failed cancelled {a} {3}"]
    );
    assert_eq!(
        stack
            .postgres
            .column("SELECT kind || ' ' || redis_delta || ' ' || held_delta FROM holdfast.stock_ledger WHERE product_id = 'a' ORDER BY n"),
        ["set 10 0", "reserve -2 2", "confirm 0 -2", "cancel 2 0", "reserve -3 3", "cancel 3 -3"]
    );
}

#[test]
fn a_sale_to_an_order_can_be_undone() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ok("STOCK.SET b 10");
    assert_eq!(client.ask("STOCK.DECR a 1 b 2 a 2 ORDER o"), "[OK, 7, 8, 1-3]");
    assert_eq!(client.ask("STOCK.DECR a 1 ORDER o"), "[EXISTS, confirmed]");
    assert_eq!(client.ask("STOCK.DECR a 8 ORDER p"), "[INSUFFICIENT, a, 7]");
    assert_eq!(client.ask("STOCK.CONFIRM o"), "[CONFIRMED, 1-3]", "it is that already");
    assert_eq!(client.ask("STOCK.ORDER o"), "[order, o, state, confirmed, expires_at_ms, 0, items, [a, 3, b, 2]]");
    assert_eq!(client.ask("STOCK.CANCEL o"), "[CANCELLED, 1-4]");
    assert_eq!(client.ask("STOCK.MGET a b"), "[10, 10]");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.column("SELECT available || ' ' || held FROM holdfast.stock ORDER BY product_id"), ["10 0", "10 0"]);
}

#[test]
fn a_cancellation_that_comes_first_refuses_the_order() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    assert_eq!(client.ask("STOCK.CONFIRM o"), "[NOTFOUND]");
    assert_eq!(client.ask(&format!("STOCK.EXTEND o {LONG}")), "[NOTFOUND]");
    assert_eq!(client.ask("STOCK.CANCEL o"), "[CANCELLED, 1-2]");
    assert_eq!(client.ask("STOCK.CANCEL o"), "[CANCELLED, 1-2]");
    assert_eq!(client.ask("STOCK.RESERVE o 600000 a 1"), "[CANCELLED]");
    assert_eq!(client.ask("STOCK.DECR a 1 ORDER o"), "[CANCELLED]");
    assert_eq!(client.ask("STOCK.CONFIRM o"), "[CANCELLED]");
    assert_eq!(client.ask("STOCK.GET a"), "10");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT state || cardinality(products) FROM holdfast.stock_order"), "cancelled0");
    let ttl: i64 = stack.backing().ask("TTL stock:order:o").parse().unwrap();
    assert!((86_000..=86_400).contains(&ttl), "{ttl}");
}

#[test]
fn units_come_back_by_themselves_also_after_a_restart() {
    let mut stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    assert!(held(&client.ask("STOCK.RESERVE o 200 a 4")));
    client.until("STOCK.GET a", "10");
    assert!(client.ask("STOCK.ORDER o").contains("state, expired"));
    assert_eq!(client.ask("STOCK.CONFIRM o"), "[EXPIRED]");
    assert_eq!(client.ask("STOCK.CANCEL o"), "[EXPIRED]");
    assert_eq!(client.ask(&format!("STOCK.EXTEND o {LONG}")), "[EXPIRED]");
    assert_eq!(client.ask("STOCK.RESERVE o 200 a 1"), "[EXISTS, expired]");

    // It is there again before that is due.
    assert!(held(&client.ask("STOCK.RESERVE p 12000 a 4")));
    stack.sidecar.kill();
    stack.restart_sidecar();
    // Nobody asks for anything.
    wait_until("the order has expired in postgres", || {
        stack.postgres.value("SELECT state FROM holdfast.stock_order WHERE order_id = 'p'") == "expired"
    });
    assert!(latest(&stack) < 1_000);
    assert_eq!(stack.postgres.value("SELECT available || ' ' || held FROM holdfast.stock"), "10 0");
    assert_eq!(stack.backing().ask("EXISTS stock:held stock:expiry"), "0");
}

#[test]
fn what_redis_has_lost_sight_of_expires_by_postgres_once_and_what_is_sold_stays_sold() {
    let mut stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    for order in ["lost", "sold", "long"] {
        assert!(held(&client.ask(&format!("STOCK.RESERVE {order} {LONG} a 2"))));
    }
    stack.wait_until_applied();
    // Postgres takes that it is sold, and not the order's own row.
    stack.postgres.execute("ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state <> 'confirmed')");
    assert!(client.ask("STOCK.CONFIRM sold").starts_with("[CONFIRMED, "));
    wait_until("it is parked", || stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter") == "1");
    stack.wait_until_applied();
    stack.sidecar.kill();
    stack.backing().ask("DEL stock:order:lost stock:order:sold");
    stack.backing().ask("ZREM stock:expiry lost");
    stack.postgres.execute(
        "UPDATE holdfast.stock_order SET expires_ms = extract(epoch FROM now() - interval '2 minutes') * 1000 WHERE order_id <> 'long'",
    );
    stack.restart_sidecar();
    let expired = "SELECT coalesce(string_agg(order_id, ' '), '') FROM holdfast.stock_ledger WHERE kind = 'expire'";
    wait_until("what was found has expired", || stack.postgres.value(expired) == "lost");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value(expired), "lost");
    assert_eq!(stack.postgres.value("SELECT available || ' ' || held FROM holdfast.stock"), "6 2");
    let mut client = stack.connect();
    assert_eq!(client.ask("STOCK.GET a"), "6");
    assert!(client.ask("STOCK.ORDER sold").contains("state, confirmed"));
    assert!(client.ask("STOCK.ORDER long").contains("state, held"));
}

#[test]
fn an_order_whose_row_postgres_refuses_is_an_order_all_the_same() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    stack.postgres.execute("ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state = 'cancelled')");
    assert!(held(&client.ask(&format!("STOCK.RESERVE back {LONG} a 2"))));
    assert!(held(&client.ask(&format!("STOCK.RESERVE paid {LONG} a 3"))));
    assert!(held(&client.ask(&format!("STOCK.RESERVE open {LONG} a 1"))));
    assert!(client.ask("STOCK.CONFIRM paid").starts_with("[CONFIRMED, "));
    client.ok("STOCK.DECR a 1 ORDER sold");
    wait_until("they are parked", || stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter") == "5");
    stack.postgres.holding("BEGIN; SELECT * FROM holdfast.partition FOR UPDATE", || {
        assert!(client.ask("STOCK.CANCEL back ACK redis").starts_with("[CANCELLED, "));
        stack.backing().ask("FLUSHALL");
    });
    assert_eq!(client.until_not("STOCK.GET a", "-"), "5");
    assert_eq!(client.ask("STOCK.GET a"), "5");
    for (order, state) in [("back", "cancelled"), ("paid", "confirmed"), ("sold", "confirmed"), ("open", "held")] {
        assert!(client.ask(&format!("STOCK.ORDER {order}")).contains(&format!("state, {state}")), "{order}");
    }
    assert!(!held(&client.ask(&format!("STOCK.RESERVE paid {LONG} a 3"))), "it has taken its units");
    assert!(client.ask("STOCK.CANCEL sold").starts_with("[CANCELLED, "));
    stack.backing().ask("DEL stock:order:paid");
    assert!(client.ask("STOCK.ORDER paid").contains("state, confirmed"), "as Postgres has it");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available || ' ' || held FROM holdfast.stock"), "6 1");
    let (said, code) = audit(&stack);
    assert_eq!(code, Some(0), "{said}");
    stack.postgres.execute("ALTER TABLE holdfast.stock_order DROP CONSTRAINT none");
    for letter in stack.postgres.column("SELECT id FROM holdfast.dead_letter ORDER BY id") {
        assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER RETRY {letter}")), "[OK]");
        let (said, code) = audit(&stack);
        assert_eq!(code, Some(0), "{said}");
    }
    let rows = "SELECT order_id || ' ' || state FROM holdfast.stock_order ORDER BY 1";
    assert_eq!(stack.postgres.column(rows), ["back cancelled", "open held", "paid confirmed", "sold cancelled"]);
}

#[test]
fn nothing_that_is_due_waits_for_postgres() {
    let mut stack = Stack::start();
    stack.connect().ok("STOCK.SET a 100");
    stack.wait_until_applied();
    stack.sidecar.kill();
    // One that starts looks there for what has been held for too long, and gets no answer.
    let again = stack.postgres.holding("BEGIN; LOCK TABLE holdfast.stock_order", || {
        let again = Sidecar::start(&stack.redis.url(), &stack.postgres.url);
        let mut client = again.connect();
        client.until("STOCK.GET a", "100");
        for n in 0..24 {
            assert!(held(&client.ask(&format!("STOCK.RESERVE o{n} {} a 1", 200 + n * 150))));
        }
        client.until("STOCK.GET a", "100");
        again
    });
    stack.sidecar = again;
    stack.wait_until_applied();
    assert!(latest(&stack) < 1_000);
}

#[test]
fn what_comes_after_an_orders_time_is_too_late_even_if_nobody_swept() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    // The right lasts less than that, and is not renewed.
    wait_until("somebody else sweeps", || {
        stack.backing().ask(&format!("{SOMEBODY_ELSE_SWEEPS} NX")) == "OK" || {
            stack.backing().ask("DEL holdfast:sweeper");
            false
        }
    });
    for (order, late) in [("c", "STOCK.CONFIRM c"), ("x", "STOCK.CANCEL x"), ("e", "STOCK.EXTEND e 600000")] {
        assert!(held(&client.ask(&format!("STOCK.RESERVE {order} 1 a 2"))));
        std::thread::sleep(Duration::from_millis(5));
        assert!(client.ask(&format!("STOCK.ORDER {order}")).contains("state, expired"), "reading changes nothing");
        assert_eq!(client.ask("STOCK.GET a"), "8");
        assert_eq!(client.ask(late), "[EXPIRED]");
        assert_eq!(client.ask("STOCK.GET a"), "10", "{late}: and its units are back");
    }
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'expire'"), "3");
    assert_eq!(stack.postgres.value("SELECT available || ' ' || held FROM holdfast.stock"), "10 0");
}

#[test]
fn an_order_expires_once_with_two_sidecars_and_is_extended_in_time() {
    let stack = Stack::start();
    let other = Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    let mut client = stack.connect();
    client.ok("STOCK.SET a 1000");
    for n in 0..300 {
        assert!(held(&client.ask(&format!("STOCK.RESERVE o{n} 1500 a 1"))));
    }
    assert!(held(&client.ask("STOCK.RESERVE kept 400 a 7")));
    assert!(held(&client.ask(&format!("STOCK.EXTEND kept {LONG}"))));
    let mut there = other.connect();
    there.until("STOCK.GET a", "993");
    assert!(there.ask("STOCK.ORDER kept").contains("state, held"));
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'expire'"), "300");
    assert_eq!(stack.postgres.value("SELECT available || ' ' || held FROM holdfast.stock"), "993 7");
    assert_eq!(stack.backing().ask("HGET stock:held a"), "7");
}

#[test]
fn a_request_repeats_what_it_did_to_an_order() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    let commands = [
        "STOCK.RESERVE o 600000 a 2 REQUEST r1",
        "STOCK.EXTEND o 700000 REQUEST r2",
        "STOCK.CONFIRM o REQUEST r3",
        "STOCK.CANCEL o REQUEST r4",
        "STOCK.DECR a 3 ORDER p REQUEST r5",
        "STOCK.CANCEL nothing REQUEST r6",
    ];
    let first: Vec<_> = commands.iter().map(|command| client.ask(command)).collect();
    let words: Vec<_> = first.iter().map(|reply| reply.split(", ").next().unwrap()).collect();
    assert_eq!(words, ["[HELD", "[HELD", "[CONFIRMED", "[CANCELLED", "[OK", "[CANCELLED"]);
    let again = |client: &mut Client| commands.iter().map(|command| client.ask(command)).collect::<Vec<_>>();
    assert_eq!(again(&mut client), first);
    assert!(client.ask("STOCK.RESERVE o 600000 a 3 REQUEST r1").starts_with("-MISMATCH "));
    stack.wait_until_applied();
    stack.backing().ask("FLUSHALL");
    client.until_not("STOCK.GET a", "-");
    assert_eq!(again(&mut client), first, "also after Redis was filled anew");
    assert_eq!(client.ask("STOCK.GET a"), "7");
}

#[test]
fn a_product_that_is_set_or_deleted_still_owes_what_is_held() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ok("STOCK.SET b 10");
    assert!(held(&client.ask("STOCK.RESERVE o 600000 a 2 b 1")));
    assert!(held(&client.ask("STOCK.RESERVE p 600000 a 3 b 1")));
    assert!(held(&client.ask("STOCK.RESERVE q 600000 a 1")));
    client.ok("STOCK.SET a 50");
    assert_eq!((client.ask("STOCK.GET a"), client.field("STOCK.INFO a", "held")), ("50".into(), "6".into()));
    client.ask("STOCK.CANCEL q");
    assert_eq!(client.ask("STOCK.GET a"), "51");
    client.ok("STOCK.DEL a");
    assert_eq!(client.ask("STOCK.RESERVE r 600000 a 1"), "-NOTFOUND no product 'a'", "no new sales");
    assert_eq!(stack.backing().ask("HGET stock:held a"), "5");
    assert!(client.ask("STOCK.CONFIRM o").starts_with("[CONFIRMED, "));
    assert!(client.ask("STOCK.CANCEL p").starts_with("[CANCELLED, "));
    assert_eq!(client.ask("STOCK.MGET a b"), "[nil, 9]", "a deleted product gets nothing back");
    stack.wait_until_applied();
    let rows = "SELECT product_id || ' ' || available || ' ' || held FROM holdfast.stock ORDER BY product_id";
    assert_eq!(stack.postgres.column(rows), ["a 0 0", "b 9 0"]);
    assert_eq!(stack.backing().ask("EXISTS stock:held"), "0");
}

#[test]
fn an_order_that_redis_no_longer_knows_is_found_in_postgres() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ask("STOCK.DECR a 4 ORDER sold");
    client.ask("STOCK.DECR a 1 ORDER shown");
    client.ask("STOCK.CANCEL undone");
    stack.wait_until_applied();
    assert_eq!(stack.backing().ask("DEL stock:order:sold stock:order:shown stock:order:undone"), "3", "as a day later");
    assert_eq!(client.ask("STOCK.ORDER shown"), "[order, shown, state, confirmed, expires_at_ms, 0, items, [a, 1]]");
    assert_eq!(client.ask("STOCK.CONFIRM sold"), "[CONFIRMED, 1-2]", "as it was answered then");
    assert_eq!(client.ask("STOCK.CANCEL sold"), "[CANCELLED, 1-5]");
    assert_eq!(client.ask("STOCK.CANCEL undone"), "[CANCELLED, 1-4]");
    assert_eq!(client.ask("STOCK.GET a"), "9");
    assert_eq!(client.ask("STOCK.CONFIRM sold"), "[CANCELLED]");
    assert!(held(&client.ask("STOCK.RESERVE shown 600000 a 2")), "an id that is used again later is a new order");
    stack.wait_until_applied();
    assert_eq!(
        stack.postgres.column("SELECT order_id || ' ' || state FROM holdfast.stock_order ORDER BY epoch, n"),
        ["sold cancelled", "shown confirmed", "undone cancelled", "shown held"]
    );
    assert!(client.ask("STOCK.CONFIRM shown").starts_with("[CONFIRMED, "));
    stack.wait_until_applied();
    assert_eq!(
        stack.postgres.column("SELECT state FROM holdfast.stock_order WHERE order_id = 'shown' ORDER BY n"),
        ["confirmed", "confirmed"]
    );
}

#[test]
fn orders_survive_an_emptied_redis() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 20");
    client.ok("STOCK.SET gone 20");
    for command in ["RESERVE held 600000 a 1 gone 2", "RESERVE due 3000 a 2", "DECR a 4 ORDER sold", "CANCEL late"] {
        assert!(!client.ask(&format!("STOCK.{command}")).starts_with('-'));
    }
    client.ok("STOCK.DEL gone");
    stack.wait_until_applied();
    stack.backing().ask("FLUSHALL");
    assert_eq!(client.until_not("STOCK.GET a", "-"), "13");
    assert_eq!(client.field("STOCK.INFO a", "held"), "3");
    assert_eq!(stack.backing().ask("HGET stock:held gone"), "2");
    assert_eq!(client.ask("STOCK.RESERVE late 600000 a 1"), "[CANCELLED]");
    assert_eq!(client.ask("STOCK.RESERVE sold 600000 a 1"), "[EXISTS, confirmed]");
    client.until("STOCK.GET a", "15");
    assert!(client.ask("STOCK.ORDER due").contains("state, expired"));
    assert_eq!(client.ask("STOCK.CONFIRM held"), "[CONFIRMED, 2-9]");
    assert_eq!(client.ask("STOCK.CANCEL sold"), "[CANCELLED, 2-10]");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.column("SELECT available || ' ' || held FROM holdfast.stock ORDER BY product_id"), ["19 0", "0 0"]);
    assert_eq!(stack.backing().ask("EXISTS stock:held stock:expiry"), "0");
}

#[test]
fn what_an_order_gives_back_is_there_for_what_comes_after_it_in_one_pipeline() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 2");
    client.ok("STOCK.SET b 2");
    for round in 0..30 {
        let order = format!("o{round}");
        assert!(held(&client.ask(&format!("STOCK.RESERVE {order} 600000 a 2 b 2"))));
        assert_eq!(client.ask("STOCK.DECR a 1"), "[INSUFFICIENT, a, 0]");
        let commands = [&format!("STOCK.CANCEL {order} ACK redis"), "STOCK.DECR a 2", "STOCK.GET b", "STOCK.INCR a 2"];
        let mut connection = redis::Client::open(stack.sidecar.url()).unwrap().get_connection().unwrap();
        let mut pipeline = redis::Pipeline::new();
        for command in commands {
            let mut words = command.split(' ');
            pipeline.add_command(redis::cmd(words.next().unwrap()).arg(words.collect::<Vec<_>>()).clone());
        }
        let replies: Vec<redis::Value> = pipeline.query(&mut connection).unwrap();
        assert!(matches!(&replies[1], redis::Value::Array(words) if words[1] == redis::Value::Int(0)), "{replies:?}");
        assert_eq!(replies[2], redis::Value::Int(2));
    }
}

#[test]
fn what_comes_behind_more_orders_than_one_script_settles_is_decided_behind_them() {
    let (orders, products) = (6, 250);
    let stack = Stack::start();
    let mut client = stack.connect();
    let names: Vec<String> = (0..products).map(|number| format!("p-{number}")).collect();
    names.iter().for_each(|name| client.ok(&format!("STOCK.SET {name} {orders} ACK redis")));
    let items = names.join(" 1 ") + " 1";
    let mut pipeline = redis::Pipeline::new();
    for order in 0..orders {
        assert!(held(&client.ask(&format!("STOCK.RESERVE o-{order} 600000 {items}"))));
        pipeline.cmd("STOCK.CANCEL").arg(format!("o-{order}")).arg("ACK").arg("redis");
    }
    pipeline.cmd("STOCK.DECR").arg("p-0").arg(orders).cmd("STOCK.CANCEL").arg("o-0").arg("ACK").arg("redis");
    let mut connection = redis::Client::open(stack.sidecar.url()).unwrap().get_connection().unwrap();
    let replies: Vec<redis::Value> = pipeline.query(&mut connection).unwrap();
    let word = |reply: &redis::Value| redis::from_redis_value::<Vec<redis::Value>>(reply.clone()).unwrap()[0].clone();
    let words: Vec<String> = replies.iter().map(|reply| redis::from_redis_value(word(reply)).unwrap()).collect();
    assert_eq!(words, [vec!["CANCELLED"; orders], vec!["OK", "CANCELLED"]].concat());
    assert_eq!(client.ask("STOCK.MGET p-0 p-249"), format!("[0, {orders}]"));
}

#[test]
fn the_history_of_a_product_is_told() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ask("STOCK.RESERVE o 600000 a 2 REQUEST r%1");
    client.ask("STOCK.CONFIRM o");
    client.ok("STOCK.DECR a 1");
    stack.wait_until_applied();
    let change = |text: &str| format!("[position, {text}, at_ms, ");
    let told = client.ask("STOCK.HISTORY a COUNT 3");
    let expected = [
        "1-4, kind, decr, delta, -1, available, 7, held, 0, order, nil, request, nil",
        "1-3, kind, confirm, delta, 0, available, 8, held, -2, order, o, request, nil",
        "1-2, kind, reserve, delta, -2, available, 8, held, 2, order, o, request, r%1",
    ];
    let mut rest = told.as_str();
    for change in expected.map(change) {
        rest = rest.split_once(&change).unwrap_or_else(|| panic!("no {change} in {told}")).1;
    }
    assert!(client.ask("STOCK.HISTORY a BEFORE 1-2").starts_with("[[position, 1-1, kind, set, delta, 10, available, 10"));
    assert_eq!(client.ask("STOCK.HISTORY nothing"), "[]");
    assert!(client.ask("STOCK.HISTORY a BEFORE x").starts_with("-ERR invalid before"));
}

#[test]
fn a_key_that_is_no_order_stops_only_its_own() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    stack.backing().ask("SET stock:order:odd x");
    assert!(client.ask("STOCK.RESERVE odd 600000 a 1").starts_with("-FROZEN the key 'stock:order:odd'"));
    assert!(client.ask("STOCK.ORDER odd").starts_with("-FROZEN "));
    stack.backing().ask("ZADD stock:expiry 1 odd");
    assert!(held(&client.ask("STOCK.RESERVE o 100 a 2")));
    client.until("STOCK.GET a", "10");
    // A hash that is no order either.
    for fields in ["state held", "state foo expires 9 items a\t1 position 1-1", "state held expires 9 items a position 1-1", "expires 9"] {
        stack.backing().ask("DEL stock:order:odd");
        let words: Vec<String> = format!("HSET stock:order:odd {fields}").split(' ').map(|word| word.replace('\t', " ")).collect();
        stack.backing().ask_words(&words);
        assert!(client.ask("STOCK.CONFIRM odd").starts_with("-FROZEN the key 'stock:order:odd'"), "{fields}");
    }
    // They stand behind the others then.
    let many = "for i = 1, 8000 do redis.call('ZADD',KEYS[1],2,'odd'..i) redis.call('SET',KEYS[2]..i,'x') end";
    stack.backing().ask_words(&["EVAL", many, "2", "stock:expiry", "stock:order:odd"]);
    assert!(held(&client.ask("STOCK.RESERVE p 100 a 2")));
    client.until("STOCK.GET a", "10");
    let due = "return redis.call('ZCOUNT',KEYS[1],0,redis.call('TIME')[1]*1000)";
    wait_until("none is due", || stack.backing().ask_words(&["EVAL", due, "1", "stock:expiry"]) == "0");
    assert_eq!(stack.backing().ask("ZCARD stock:expiry"), "8001", "a person may repair them");
}

/// What became of an order, as its client was told.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Sold,
    GivenBack,
    Abandoned,
}

/// Ten thousand orders over 500 products, through two sidecars: paid, not paid, cancelled later, forgotten.
#[test]
fn what_is_available_held_and_sold_is_what_was_loaded() {
    const ORDERS: u64 = 10_000;
    const PRODUCTS: u64 = 500;
    const LOADED: u64 = 40;
    const BUYERS: u64 = 16;
    let stack = Stack::start();
    let other = Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    wait_until("the other sidecar is ready", || other.get("/readyz").0 == 200);
    let mut client = stack.connect();
    for product in 0..PRODUCTS {
        client.ok(&format!("STOCK.SET p{product} {LOADED} ACK redis"));
    }
    let buyer = |number: u64, mut client: Client| {
        // A few numbers that repeat: xorshift.
        let mut state = 0x9e37_79b9_7f4a_7c15 ^ (number + 1);
        let mut below = move |limit: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % limit
        };
        let mut told: Vec<(Vec<(u64, u64)>, Fate)> = Vec::new();
        for n in (number..ORDERS).step_by(usize::try_from(BUYERS).unwrap()) {
            let mut items: Vec<(u64, u64)> = Vec::new();
            for _ in 0..=below(3) {
                let product = below(PRODUCTS);
                if items.iter().all(|(known, _)| *known != product) {
                    items.push((product, 1 + below(3)));
                }
            }
            let list = items.iter().map(|(product, units)| format!(" p{product} {units}")).collect::<String>();
            let fate = below(20);
            let ttl = if fate < 4 { 20 + below(1_000) } else { 600_000 };
            let reply = client.ask(&format!("STOCK.RESERVE o{n} {ttl}{list} REQUEST r{n}"));
            if !held(&reply) {
                assert!(reply.starts_with("[INSUFFICIENT, "), "{reply}");
                continue;
            }
            told.push((
                items,
                match fate {
                    0..4 => Fate::Abandoned,
                    4..8 => {
                        assert!(client.ask(&format!("STOCK.CANCEL o{n} ACK redis")).starts_with("[CANCELLED, "));
                        Fate::GivenBack
                    }
                    _ => {
                        assert!(client.ask(&format!("STOCK.CONFIRM o{n}")).starts_with("[CONFIRMED, "));
                        if fate < 11 {
                            assert!(client.ask(&format!("STOCK.CANCEL o{n} ACK redis")).starts_with("[CANCELLED, "));
                            Fate::GivenBack
                        } else {
                            Fate::Sold
                        }
                    }
                },
            ));
        }
        told
    };
    let told: Vec<(Vec<(u64, u64)>, Fate)> = std::thread::scope(|scope| {
        let buyers: Vec<_> = (0..BUYERS)
            .map(|number| {
                let client = if number % 2 == 0 { stack.connect() } else { other.connect() };
                scope.spawn(move || buyer(number, client))
            })
            .collect();
        buyers.into_iter().flat_map(|buyer| buyer.join().unwrap()).collect()
    });
    let abandoned = told.iter().filter(|(_, fate)| *fate == Fate::Abandoned).count();
    assert!(abandoned > 500, "{abandoned}");
    wait_until("nothing is held any more", || stack.backing().ask("EXISTS stock:held stock:expiry") == "0");
    stack.wait_until_applied();
    let expired = stack.postgres.value("SELECT count(DISTINCT order_id) FROM holdfast.stock_ledger WHERE kind = 'expire'");
    assert_eq!(expired, abandoned.to_string());
    let rows = stack.postgres.column("SELECT product_id || ' ' || available || ' ' || held FROM holdfast.stock");
    assert_eq!(rows.len() as u64, PRODUCTS);
    for row in rows {
        let words: Vec<&str> = row.split(' ').collect();
        let number: u64 = words[0][1..].parse().unwrap();
        let sold: u64 = told
            .iter()
            .filter(|(_, fate)| *fate == Fate::Sold)
            .flat_map(|(items, _)| items)
            .filter(|(product, _)| *product == number)
            .map(|(_, units)| units)
            .sum();
        assert_eq!((words[1].parse::<u64>().unwrap() + sold, words[2]), (LOADED, "0"), "{row}: {sold} sold");
        assert_eq!(client.ask(&format!("STOCK.GET {}", words[0])), words[1]);
    }
    let sold_orders = told.iter().filter(|(_, fate)| *fate == Fate::Sold).count();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_order WHERE state = 'confirmed'"), sold_orders.to_string());
    assert_eq!(audit(&stack), (format!("{PRODUCTS} products and 0 coupons, 0 of them differ\n"), Some(0)));
}
