//! What a sidecar answered before Redis lost it, and handed over when others had gone on: by then its client has done it again, or what it was
//! about has become something else.

use std::cell::Cell;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::coupon_reconcile::{Late, late};
use crate::harness::{Client, Program, Stack, UNHURRIED, wait_until};

fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn dead_letters(late: &Late) -> Vec<String> {
    late.stack.postgres.column("SELECT concat_ws(' ', kind, delta, in_redis) FROM holdfast.dead_letter ORDER BY n, i")
}

/// What Redis and Postgres have of the product `a`: available and held.
fn units(late: &mut Late) -> [String; 2] {
    let in_redis = format!("{} {}", late.client.field("STOCK.INFO a", "available"), late.client.field("STOCK.INFO a", "held"));
    late.stack.wait_until_applied();
    [in_redis, late.stack.postgres.value("SELECT available || ' ' || held FROM holdfast.stock")]
}

/// Hands the expiry of an order over that held three of the product `a`, behind all else.
fn expires(late: &Late, order: &str) {
    late.stack.postgres.execute(&format!(
        "INSERT INTO holdfast.salvage (partition, op, k, origin_epoch, origin_n, line, at_ms) SELECT partition, op, max(k) + 1, origin_epoch, \
         max(origin_n) + 1, max(k) + 1 || ' expire order={order} from=held units=3 | a 3 100', max(at_ms) FROM holdfast.salvage \
         GROUP BY partition, op, origin_epoch ORDER BY origin_epoch DESC, max(origin_n) DESC LIMIT 1"
    ));
}

/// Sends what the others answered once more.
fn again(client: &mut Client, commands: &[&str]) {
    for command in commands {
        let reply = client.ask(command);
        assert!(["[OK, ", "[HELD, ", "[CONFIRMED, ", "[ISSUED, "].iter().any(|word| reply.starts_with(word)), "{command}: {reply}");
    }
}

/// Cancels an order. One that is not there has to come first: it is looked up in Postgres, behind all that there was by then.
fn cancel(client: &mut Client, order: &str) {
    let reply = client.ask(&format!("STOCK.CANCEL {order} ACK redis"));
    assert!(reply.starts_with("[CANCELLED, "), "{order}: {reply}");
}

/// Holds back whoever notes what it has taken up, once that is done in Redis, until this is dropped.
fn held_back(stack: &Stack) -> Program {
    let mut program = Program::new(&stack.postgres);
    program.run(
        "CREATE FUNCTION held_back() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0 AS \
         'BEGIN PERFORM pg_advisory_xact_lock(7); RETURN new; END'; \
         CREATE TRIGGER held_back BEFORE UPDATE ON holdfast.salvage FOR EACH ROW EXECUTE FUNCTION held_back(); SELECT pg_advisory_lock(7)",
    );
    program
}

/// Who is held back, and since when.
fn who_waits(stack: &Stack) -> String {
    let waiting =
        "SELECT coalesce(max(pid || ' ' || waitstart), '') FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND objid = 7";
    stack.postgres.value(waiting)
}

#[test]
fn a_rebuild_leaves_orders_as_they_have_become_since() {
    const BOTH: &[&str] = &["STOCK.RESERVE again 600000 a 3", "STOCK.DECR a 5 ORDER sold"];
    let mut nobody_takes_up = None;
    let mut late = late(
        UNHURRIED,
        |others| {
            cancel(others, "never");
            again(others, BOTH);
        },
        |stack, client| {
            again(client, BOTH);
            let mut program = Program::new(&stack.postgres);
            program.run("SELECT pg_advisory_lock(x'686f6c64'::int, 0)");
            nobody_takes_up = Some(program);
        },
    );
    wait_until("it is handed over", || late.stack.postgres.value("SELECT count(*) FROM holdfast.salvage WHERE NOT done") == "3");
    late.stack.backing().ask("FLUSHALL");
    assert_eq!(late.client.until_not("STOCK.GET a", "-"), "92");
    drop(nobody_takes_up);
    late.wait_until_taken_up();
    assert_eq!(units(&mut late), ["92 3"; 2]);
    assert_eq!(late.client.ask("STOCK.RESERVE never 600000 a 1"), "[CANCELLED]");
    assert_eq!(dead_letters(&late), [""; 0]);
    late.end();
}

#[test]
fn what_had_expired_is_given_back_once() {
    let mut nobody_takes_up = None;
    let mut late = late(
        UNHURRIED,
        |others| again(others, &["STOCK.RESERVE o 600000 a 3", "STOCK.EXTEND o 700000"]),
        |stack, _| {
            let mut program = Program::new(&stack.postgres);
            program.run("SELECT pg_advisory_lock(x'686f6c64'::int, 0)");
            nobody_takes_up = Some(program);
        },
    );
    wait_until("it is handed over", || late.stack.postgres.value("SELECT count(*) FROM holdfast.salvage WHERE NOT done") == "2");
    // As if Redis had been lost later. What another order held was never taken.
    expires(&late, "o");
    expires(&late, "of-the-dead");
    drop(nobody_takes_up);
    late.wait_until_taken_up();
    assert_eq!(dead_letters(&late), [""; 0]);
    assert_eq!(late.stack.postgres.value("SELECT count(*) FROM holdfast.stock WHERE frozen IS NOT NULL"), "0");
    late.client.until("STOCK.GET a", "100");
    assert_eq!(units(&mut late), ["100 0"; 2]);
    assert_eq!(late.client.ask("STOCK.CONFIRM o"), "[EXPIRED]", "as it was told");
    late.end();
}

#[test]
fn what_was_cancelled_takes_nothing_from_those_who_have_it_by_now() {
    let mut late = late(
        UNHURRIED,
        |others| {
            again(others, &["STOCK.RESERVE held 600000 a 3", "STOCK.DECR a 5 ORDER sold"]);
            again(others, &["STOCK.RESERVE paid 600000 a 7", "STOCK.EXTEND paid 700000", "STOCK.CONFIRM paid"]);
            ["held", "sold", "paid"].iter().for_each(|order| cancel(others, order));
        },
        |_, client| again(client, &["STOCK.DECR a 99"]),
    );
    late.wait_until_taken_up();
    assert_eq!(dead_letters(&late), [""; 0]);
    assert_eq!(late.stack.postgres.value("SELECT count(*) FROM holdfast.stock WHERE frozen IS NOT NULL"), "0");
    assert_eq!(units(&mut late), ["1 0"; 2]);
    for order in ["held", "sold", "paid"] {
        assert_eq!(late.client.ask(&format!("STOCK.RESERVE {order} 600000 a 1")), "[CANCELLED]");
    }
    late.end();
}

#[test]
fn what_its_client_does_again_while_it_is_taken_up_is_not_owed() {
    const ISSUE: &str = "COUPON.ISSUE c late REQUEST r-c";
    let mut gate = None;
    let mut late = late(UNHURRIED, |others| again(others, &["STOCK.DECR a 3 ORDER o", ISSUE]), |stack, _| gate = Some(held_back(stack)));
    // The order comes first.
    wait_until("it is being taken up", || !who_waits(&late.stack).is_empty());
    let waits = who_waits(&late.stack);
    again(&mut late.client, &[&format!("{ISSUE} ACK postgres TIMEOUT 20000")]);
    assert_eq!(who_waits(&late.stack), waits, "it has not begun anew");
    drop(gate);
    late.wait_until_taken_up();
    assert!(late.client.ask("COUPON.GET c late").contains("serial, 7, state, issued"), "as it was told last");
    assert_eq!(dead_letters(&late), [""; 0]);
    late.end();
}

#[test]
fn the_serial_of_what_its_client_did_again_is_not_given_out_again() {
    const ISSUE: &str = "COUPON.ISSUE c late REQUEST r-c";
    let mut late = late(
        UNHURRIED,
        |others| again(others, &["COUPON.ISSUE c first", "COUPON.ISSUE c second", ISSUE]),
        |_, client| assert!(client.ask(&format!("{ISSUE} ACK postgres TIMEOUT 20000")).starts_with("[ISSUED, 6, ")),
    );
    late.wait_until_taken_up();
    assert!(late.client.ask("COUPON.GET c second").contains("serial, 7, state, issued"));
    assert_eq!(late.stack.postgres.value("SELECT last_serial FROM holdfast.coupon"), "8", "which was told, too");
    let next = late.client.ask("COUPON.ISSUE c next");
    assert!(next.starts_with("[ISSUED, 9, "), "{next}");
    assert_eq!(dead_letters(&late), ["coupon.issue 0 f"], "the first one's serial has been given out again");
    late.end();
}

#[test]
fn of_two_serials_under_one_request_the_later_counts_however_far_they_are_apart() {
    let mut nobody_takes_up = None;
    let mut late = late(
        UNHURRIED,
        |others| again(others, &["COUPON.ISSUE c late REQUEST r-c"]),
        |stack, _| {
            let mut program = Program::new(&stack.postgres);
            program.run("SELECT pg_advisory_lock(x'686f6c64'::int, 0)");
            nobody_takes_up = Some(program);
        },
    );
    wait_until("it is handed over", || late.stack.postgres.value("SELECT count(*) FROM holdfast.salvage WHERE NOT done") == "1");
    // Another sidecar, which is late as well, answered so when Redis had been lost once more.
    late.stack.postgres.execute(
        "INSERT INTO holdfast.salvage (partition, op, k, origin_epoch, origin_n, line, at_ms) SELECT partition, op, 100 + i, origin_epoch, \
         origin_n + i, 100 + i || ' incr | a 1 100', at_ms FROM holdfast.salvage, generate_series(1, 600) AS i; \
         INSERT INTO holdfast.salvage (partition, op, k, origin_epoch, origin_n, line, at_ms) SELECT partition, 'another:coupon:1', k, \
         origin_epoch + 1, 1000, replace(line, ' serial=6 ', ' serial=9 '), at_ms FROM holdfast.salvage WHERE line LIKE '% serial=6 %'",
    );
    drop(nobody_takes_up);
    late.wait_until_taken_up();
    assert_eq!(units(&mut late), ["700 0"; 2]);
    let held = late.client.ask("COUPON.GET c late");
    assert!(held.contains("serial, 9, state, issued") && !held.contains("serial, 6"), "{held}");
    assert_eq!(dead_letters(&late), [""; 0]);
    assert!(late.client.ask("COUPON.ISSUE c next").starts_with("[ISSUED, 10, "));
    late.end();
}

#[test]
fn what_its_client_did_again_and_postgres_does_not_have_yet_is_waited_for() {
    const ISSUE: &str = "COUPON.ISSUE c late REQUEST r-c";
    let mut gate = None;
    let mut late = late(
        UNHURRIED,
        |others| again(others, &["STOCK.DECR a 3 ORDER o", ISSUE]),
        |stack, client| {
            again(client, &["COUPON.ISSUE c quick ACK postgres TIMEOUT 20000"]);
            gate = Some(held_back(stack));
        },
    );
    wait_until("it is being taken up", || !who_waits(&late.stack).is_empty());
    let waits = who_waits(&late.stack);
    let [mut nobody_applies, mut is_over] = [Program::new(&late.stack.postgres), Program::new(&late.stack.postgres)];
    nobody_applies.run("BEGIN; SELECT * FROM holdfast.partition FOR UPDATE");
    again(&mut late.client, &[ISSUE]);
    assert_eq!(who_waits(&late.stack), waits, "it has not begun anew");
    drop(gate);
    is_over.run("SELECT pg_advisory_lock(x'686f6c64'::int, 0)");
    assert_eq!(dead_letters(&late), [""; 0]);
    drop((nobody_applies, is_over));
    late.wait_until_taken_up();
    assert!(late.client.ask("COUPON.GET c late").contains("serial, 7, state, issued"));
    assert!(late.client.ask("COUPON.GET c quick").contains("serial, 6, state, issued"));
    assert_eq!(dead_letters(&late), [""; 0]);
    late.end();
}

#[test]
fn what_a_client_did_again_counts_once_where_both_are_saved_at_once() {
    const BOTH: &[&str] = &["STOCK.DECR a 3 REQUEST r", "COUPON.ISSUE c late REQUEST r-c"];
    let mut nobody_rebuilds = None;
    let mut late = late(
        UNHURRIED,
        |others| again(others, BOTH),
        |stack, client| {
            stack.wait_until_applied();
            let mut program = Program::new(&stack.postgres);
            program.run("BEGIN; SELECT * FROM holdfast.partition FOR UPDATE");
            nobody_rebuilds = Some(program);
            again(client, &["COUPON.ISSUE c quick"]);
            again(client, BOTH);
            stack.backing().ask("FLUSHALL");
        },
    );
    let running = "SELECT count(*) FROM holdfast.sidecar WHERE lease_until > now()";
    wait_until("the other is back", || late.stack.postgres.value(running) == "2");
    drop(nobody_rebuilds);
    assert_eq!(late.client.until_not("STOCK.GET a", "-"), "97");
    late.wait_until_taken_up();
    assert_eq!(units(&mut late), ["97 0"; 2]);
    let issued = "SELECT user_id || ' ' || serial FROM holdfast.coupon_issue WHERE user_id IN ('late', 'quick') ORDER BY serial";
    assert_eq!(late.stack.postgres.column(issued), ["quick 6", "late 7"], "as both were told last");
    assert!(late.client.ask("COUPON.ISSUE c next").starts_with("[ISSUED, 8, "));
    late.stack.wait_until_applied();
    assert_eq!(dead_letters(&late), [""; 0]);
    late.end();
}

/// A UUIDv7 of that time in Unix ms.
fn uuid(ms: u64, last: u8) -> String {
    format!("{:08x}-{:04x}-7cc3-98c4-dc0c0c07{last:04x}", ms >> 16, ms & 0xffff)
}

fn forget_requests(stack: &Stack) {
    let mut backing = stack.backing();
    for key in backing.ask("KEYS holdfast:request:*").trim_matches(['[', ']']).split(", ").filter(|key| !key.is_empty()) {
        backing.ask(&format!("DEL {key}"));
    }
}

#[test]
fn what_comes_when_its_request_is_forgotten_is_done_unless_its_client_did_it_again() {
    let stale_at = Cell::new(0);
    let mut late = late(
        UNHURRIED,
        |others| {
            // For ten seconds more, of the ten minutes that it is remembered.
            stale_at.set(now_ms() + 10_000);
            let id = |last| uuid(stale_at.get() - 600_000, last);
            again(others, &["STOCK.DECR a 3 REQUEST r", &format!("STOCK.DECR a 7 REQUEST {}", id(1))]);
            again(others, &[&format!("COUPON.ISSUE c late REQUEST {}", id(2))]);
        },
        |stack, client| {
            again(client, &["STOCK.DECR a 3 REQUEST r ACK postgres TIMEOUT 20000"]);
            forget_requests(stack);
            std::thread::sleep(Duration::from_millis((stale_at.get() + 500).saturating_sub(now_ms())));
        },
    );
    late.wait_until_taken_up();
    assert_eq!(units(&mut late), ["90 0"; 2]);
    assert!(late.client.ask("COUPON.GET c late").contains("serial, 6, state, issued"));
    assert_eq!(dead_letters(&late), [""; 0]);
    late.end();
}

#[test]
fn an_order_that_redis_has_forgotten_is_looked_up_for_what_comes_late() {
    let mut late = late(
        UNHURRIED,
        |others| {
            cancel(others, "never");
            again(others, &["STOCK.DECR a 2 ORDER twice", "STOCK.DECR a 5 ORDER sold"]);
            cancel(others, "sold");
        },
        |stack, client| {
            for order in ["twice 2", "sold 5"] {
                let (order, units) = order.split_once(' ').unwrap();
                again(client, &[&format!("STOCK.DECR a {units} ORDER {order} ACK postgres TIMEOUT 20000")]);
                // As if it had been over for a day.
                stack.backing().ask(&format!("DEL stock:order:{order}"));
            }
        },
    );
    late.wait_until_taken_up();
    assert_eq!(units(&mut late), ["98 0"; 2]);
    let states = "SELECT order_id || ' ' || state FROM holdfast.stock_order ORDER BY 1";
    assert_eq!(late.stack.postgres.column(states), ["never cancelled", "sold cancelled", "twice confirmed"]);
    assert_eq!(late.client.ask("STOCK.RESERVE never 600000 a 1"), "[CANCELLED]");
    assert_eq!(dead_letters(&late), [""; 0]);
    late.end();
}

#[test]
fn what_others_have_by_now_is_owed_to_whom_it_was_promised() {
    let mut late = late(
        UNHURRIED,
        |others| again(others, &["COUPON.ISSUE c late", "STOCK.DECR a 60", "STOCK.RESERVE o 600000 a 3"]),
        |stack, client| {
            stack.postgres.execute("ALTER TABLE holdfast.coupon_issue ADD CHECK (user_id <> 'quick')");
            again(client, &["COUPON.ISSUE c quick ACK postgres TIMEOUT 20000", "STOCK.DECR a 98"]);
            let letter = stack.postgres.value("SELECT id FROM holdfast.dead_letter");
            assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER DROP {letter}")), "[OK]");
        },
    );
    late.wait_until_taken_up();
    assert_eq!(dead_letters(&late), ["coupon.issue 0 f", "decr -60 f", "reserve -3 f"]);
    // Both parts of what came to nothing are owed.
    expires(&late, "o");
    late.wait_until_taken_up();
    assert_eq!(dead_letters(&late), ["coupon.issue 0 f", "decr -60 f", "reserve -3 f", "expire 3 f"]);
    assert_eq!(late.client.ask("COUPON.GET c late"), "[]", "quick has its serial, in Redis");
    assert!(late.client.ask("COUPON.GET c quick").contains("serial, 6, state, issued"));
    assert_eq!(units(&mut late), ["2 0"; 2]);
}

#[test]
fn what_is_owed_to_an_order_is_made_as_a_whole_once_it_can_be() {
    let mut late = late(
        UNHURRIED,
        |others| {
            again(others, &["STOCK.RESERVE open 600000 a 3", "STOCK.RESERVE paid 600000 a 2", "STOCK.CONFIRM paid"]);
            again(others, &["STOCK.RESERVE over 600000 a 4", "STOCK.DECR a 7 ORDER given-up"]);
        },
        |_, client| again(client, &["STOCK.DECR a 99"]),
    );
    late.wait_until_taken_up();
    assert_eq!(dead_letters(&late), ["reserve -3 f", "reserve -2 f", "confirm 0 f", "reserve -4 f", "sell -7 f"]);
    cancel(&mut late.client, "over");
    let letter = |late: &Late, order: &str| {
        let of = format!("SELECT id FROM holdfast.dead_letter WHERE line LIKE '% order={order} %' ORDER BY id LIMIT 1");
        late.stack.postgres.value(&of)
    };
    let first = letter(&late, "open");
    let frozen = late.client.ask(&format!("HOLDFAST.DEADLETTER RETRY {first}"));
    assert!(frozen.starts_with("[FAILED, product 'a' is frozen"), "{frozen}");
    wait_until("Redis is told", || late.client.field("STOCK.INFO a", "frozen").starts_with("Postgres refused"));
    again(&mut late.client, &["STOCK.UNFREEZE a ACK postgres TIMEOUT 20000", "STOCK.SET a 20 ACK postgres TIMEOUT 20000"]);
    for order in ["open", "paid", "paid", "over"] {
        let letter = letter(&late, order);
        assert_eq!(late.client.ask(&format!("HOLDFAST.DEADLETTER RETRY {letter}")), "[OK]", "{order}");
        assert_eq!(late.client.ask(&format!("HOLDFAST.DEADLETTER RETRY {letter}")), "[NOTFOUND]", "{order}");
        late.wait_until_taken_up();
    }
    let given_up = letter(&late, "given-up");
    assert_eq!(late.client.ask(&format!("HOLDFAST.DEADLETTER DROP {given_up}")), "[OK]");
    assert_eq!(dead_letters(&late), [""; 0]);
    assert_eq!(units(&mut late), ["15 3"; 2]);
    ["open", "over", "paid", "given-up"].iter().for_each(|order| cancel(&mut late.client, order));
    assert_eq!(units(&mut late), ["20 0"; 2], "they give back what they took");
    late.end();
}
