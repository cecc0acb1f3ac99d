//! Coupons in Redis and in Postgres: compared while they are issued, and done again where Redis lost them and was filled without them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::bulk::audit;
use crate::harness::{Client, Sidecar, Stack, UNHURRIED, wait_until};
use crate::proxy::{Direction, Proxy};

/// The reconciler as often as it may, where a reply has all the time it needs.
const EVERY_SECOND: &[&str] =
    &["--reply-within-ms", "20000", "--reconcile-sync-every-ms", "1000", "--reconcile-initialise-every-ms", "1000"];

/// Every difference of coupons that was found, in order.
fn found(stack: &Stack) -> Vec<String> {
    stack.postgres.column(
        "SELECT concat_ws(' ', product_id, measure, drift, action) FROM holdfast.drift \
         WHERE measure IN ('total', 'issued', 'used', 'serial', 'users') ORDER BY id",
    )
}

/// Waits until these differences have been found, and nothing else.
fn wait_until_found(stack: &Stack, expected: &[&str]) {
    wait_until("the differences are found", || found(stack).len() >= expected.len());
    assert_eq!(found(stack), expected);
}

fn compared(stack: &Stack) -> u64 {
    let text = stack.sidecar.get("/metrics").1;
    text.lines().find_map(|line| line.strip_prefix("holdfast_reconcile_coupons_total ")?.parse().ok()).unwrap_or(0)
}

fn wait_until_compared(stack: &Stack, more: u64) {
    let before = compared(stack);
    wait_until("coupons are compared", || compared(stack) >= before + more);
}

/// Creates a coupon that each user may have once, and issues 5.
fn issue_five(client: &mut Client, coupon: &str) {
    client.ok(&format!("COUPON.CREATE {coupon} 100"));
    for number in 1..=5 {
        assert!(client.ask(&format!("COUPON.ISSUE {coupon} u{number}")).starts_with(&format!("[ISSUED, {number}, ")));
    }
    assert!(client.ask(&format!("COUPON.USE {coupon} u1")).starts_with("[USED, 1, "));
}

#[test]
fn a_difference_of_a_coupon_is_found_told_and_corrected() {
    let stack = Stack::with_settings(EVERY_SECOND);
    let mut client = stack.connect();
    issue_five(&mut client, "c");
    stack.wait_until_applied();
    let mut backing = stack.backing();
    backing.ask("EVAL redis.call('HINCRBY',KEYS[1],'issued',-2)redis.call('HINCRBY',KEYS[1],'used',3) 1 coupon:info:c");
    wait_until_found(&stack, &["c issued -2 corrected", "c used 3 corrected"]);
    assert_eq!((client.field("COUPON.INFO c", "issued"), client.field("COUPON.INFO c", "used")), ("5".into(), "1".into()));
    backing.ask("HINCRBY coupon:info:c serial -1");
    wait_until_found(&stack, &["c issued -2 corrected", "c used 3 corrected", "c serial -1 corrected"]);
    assert!(client.ask("COUPON.ISSUE c u6").starts_with("[ISSUED, 6, 94, "), "no serial is given out twice");

    stack.postgres.execute("UPDATE holdfast.coupon SET total = total + 10");
    wait_until("Redis follows", || client.field("COUPON.INFO c", "total") == "110");
    stack.wait_until_applied();
    assert_eq!(found(&stack)[3..], ["c total -10 corrected"]);
    let rows =
        "SELECT kind || ' ' || total_delta || issued_delta || used_delta FROM holdfast.coupon_ledger WHERE kind IN ('correct', 'adopt')";
    assert_eq!(stack.postgres.column(rows), ["correct 000", "correct 000", "correct 000"]);
    wait_until_compared(&stack, 3);
    assert_eq!(found(&stack).len(), 4, "each once");
    let metrics = stack.sidecar.get("/metrics").1;
    assert!(metrics.contains("holdfast_reconcile_drift_total{action=\"corrected\"} 4"), "{metrics}");
    let (said, code) = audit(&stack);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_difference_of_a_coupon_is_corrected_in_postgres_where_redis_is_right() {
    let stack = Stack::with_settings(&[EVERY_SECOND, &["--reconcile-prefer", "redis"]].concat());
    let mut client = stack.connect();
    issue_five(&mut client, "c");
    stack.wait_until_applied();
    stack.postgres.execute("UPDATE holdfast.coupon SET total = total + 10, used = used + 2");
    wait_until_found(&stack, &["c total -10 corrected", "c used -2 corrected"]);
    stack.wait_until_applied();
    assert_eq!(
        stack.postgres.value("SELECT total || ' ' || issued || ' ' || used || ' ' || last_serial FROM holdfast.coupon"),
        "100 5 1 5"
    );
    stack.backing().ask("HINCRBY coupon:info:c serial 2");
    wait_until_found(&stack, &["c total -10 corrected", "c used -2 corrected", "c serial 2 corrected"]);
    assert!(client.ask("COUPON.ISSUE c u6").starts_with("[ISSUED, 8, 94, "));
    stack.wait_until_applied();
    wait_until_compared(&stack, 3);
    assert_eq!(found(&stack).len(), 3, "each once");

    // Who has one is in Postgres: no number of Redis makes it more or fewer.
    client.ok("COUPON.CREATE d 100 PERUSER 2");
    for user in ["u1", "u1", "u2"] {
        assert!(client.ask(&format!("COUPON.ISSUE d {user}")).starts_with("[ISSUED, "));
    }
    stack.wait_until_applied();
    stack.backing().ask("HINCRBY coupon:info:d issued 1");
    wait_until("it is found", || found(&stack).len() >= 4);
    assert_eq!(found(&stack)[3], "d issued 1 frozen");
    let frozen = client.until_not("COUPON.ISSUE d u3", "[");
    assert!(frozen.starts_with("-FROZEN this coupon waits for a person: Redis has "), "{frozen}");
    stack.postgres.execute("UPDATE holdfast.coupon SET issued = issued - 1 WHERE coupon_id = 'c'");
    wait_until("what the users of Postgres show is adopted", || found(&stack).contains(&"c issued 1 corrected".to_owned()));
    stack.wait_until_applied();
    let (said, code) = audit(&stack);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_coupon_that_differs_by_too_much_is_frozen_until_both_sides_agree() {
    let stack = Stack::with_settings(EVERY_SECOND);
    let mut client = stack.connect();
    issue_five(&mut client, "c");
    issue_five(&mut client, "d");
    stack.wait_until_applied();
    let mut backing = stack.backing();
    backing.ask("HINCRBY coupon:info:c total 500");
    wait_until_found(&stack, &["c total 500 frozen"]);
    let refused = "-FROZEN this coupon waits for a person: Redis has 5 of 600 issued, 1 used, last serial 5, \
                   and by Postgres it is 5 of 100 issued, 1 used, last serial 5";
    for command in ["COUPON.ISSUE c u9", "COUPON.USE c u2", "COUPON.REVOKE c u2 ACK redis", "COUPON.ALTER c TOTAL 9 ACK redis"] {
        assert_eq!(client.ask(command), refused, "{command}");
    }
    assert_eq!(client.field("COUPON.INFO c", "total"), "600", "reads go on");
    assert!(client.ask("COUPON.ISSUE d u9").starts_with("[ISSUED, 6, "), "another one is issued");
    backing.ask("HINCRBY coupon:info:c total -500");
    assert!(client.until_not("COUPON.ISSUE c u9", "-FROZEN").starts_with("[ISSUED, 6, 94, "));

    // Who has one could have another if nobody noticed.
    let lines = backing.ask("HGET coupon:users:c u1");
    backing.ask("HDEL coupon:users:c u1");
    wait_until("users are found", || found(&stack).len() == 2);
    assert!(found(&stack).contains(&"c users -1 frozen".to_owned()), "{:?}", found(&stack));
    assert!(client.ask("COUPON.ISSUE c u1").starts_with("-FROZEN this coupon waits for a person: in Redis 5 users have the 6"));
    backing.ask_words(&["HSET", "coupon:users:c", "u1", &lines]);
    assert_eq!(client.until_not("COUPON.ISSUE c u1", "-FROZEN"), "[ALREADY, 1]");

    backing
        .ask("EVAL redis.call('HSET',KEYS[1],'total',9,'issued',0,'used',0,'serial',0,'peruser',1,'start',0,'end',0) 1 coupon:info:stray");
    backing.ask("SET coupon:users:d x");
    wait_until("both are found", || found(&stack).iter().any(|found| found.starts_with("d ")) && found(&stack).len() >= 4);
    assert_eq!(client.until_not("COUPON.ISSUE stray u", "[ISSUED"), "-FROZEN this coupon waits for a person: Postgres does not know it");
    assert!(client.ask("COUPON.ISSUE d u1").starts_with("-FROZEN a key of coupon 'd' holds"));
    let rows = found(&stack);
    assert!(rows.contains(&"stray total 9 frozen".to_owned()) && rows.contains(&"d total -100 none".to_owned()), "{rows:?}");
}

#[test]
fn a_frozen_coupon_is_given_what_postgres_has_or_deleted() {
    let stack = Stack::with_settings(EVERY_SECOND);
    let mut client = stack.connect();
    issue_five(&mut client, "c");
    client.ok("COUPON.CREATE d 10");
    stack.wait_until_applied();
    let mut backing = stack.backing();
    backing.ask("HINCRBY coupon:info:c total 500");
    assert!(client.until_not("COUPON.USE c u1", "[ALREADY").starts_with("-FROZEN "));
    backing.ask("DEL coupon:info:c coupon:users:c");
    assert_eq!(client.ask("COUPON.ISSUE c u1"), "[ALREADY, 1]");
    assert!(client.ask("COUPON.ISSUE c u6").starts_with("[ISSUED, 6, 94, "));
    backing.ask("HINCRBY coupon:info:d total 500");
    assert!(client.until_not("COUPON.USE d u1", "[").starts_with("-FROZEN "));
    client.ok("COUPON.DEL d");
    assert_eq!(stack.postgres.value("SELECT state FROM holdfast.coupon WHERE coupon_id = 'd'"), "deleted");
}

#[test]
fn a_coupon_that_redis_lost_is_given_back_with_who_has_it() {
    let stack = Stack::with_settings(EVERY_SECOND);
    let mut client = stack.connect();
    issue_five(&mut client, "c");
    stack.wait_until_applied();
    let mut backing = stack.backing();
    backing.ask("DEL coupon:info:c coupon:users:c");
    wait_until_found(&stack, &["c total -100 initialised"]);
    assert_eq!(backing.ask("HLEN coupon:users:c"), "5");
    assert_eq!(client.ask("COUPON.ISSUE c u1"), "[ALREADY, 1]");
    assert!(client.ask("COUPON.ISSUE c u6").starts_with("[ISSUED, 6, 94, "));
}

#[test]
fn a_coupon_that_many_have_is_left_to_its_first_use() {
    let stack = Stack::with_settings(EVERY_SECOND);
    stack.postgres.execute(
        "INSERT INTO holdfast.coupon (coupon_id, total, issued, used, per_user, last_serial, state)
         VALUES ('many', 9000, 3000, 0, 1, 3000, 'active');
         INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at)
         SELECT 'many', n, 'u-' || n, 'issued', now() FROM generate_series(1, 3000) n",
    );
    // Each round compares it twice.
    wait_until_compared(&stack, 6);
    assert_eq!(found(&stack), [""; 0], "it waits for nobody");
    assert_eq!(stack.connect().until_not("COUPON.ISSUE many u-7", "-TRYAGAIN"), "[ALREADY, 7]");
}

#[test]
fn busy_coupons_show_no_false_difference() {
    let stack = Stack::with_settings(EVERY_SECOND);
    let mut client = stack.connect();
    for (coupon, per_user) in [("one", 1), ("two", 2)] {
        client.ok(&format!("COUPON.CREATE {coupon} 1000000 PERUSER {per_user}"));
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for number in 0..4 {
            let (stack, stop) = (&stack, &stop);
            scope.spawn(move || {
                let mut client = stack.connect();
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) {
                    let coupon = ["one", "two"][sent % 2];
                    let user = format!("u{number}-{}", sent % 300);
                    let command = match sent % 11 {
                        0..6 => format!("COUPON.ISSUE {coupon} {user}"),
                        6..8 => format!("COUPON.USE {coupon} {user}"),
                        8 => format!("COUPON.UNUSE {coupon} {user}"),
                        9 => format!("COUPON.REVOKE {coupon} {user} ACK redis"),
                        _ => format!("COUPON.ALTER {coupon} TOTAL {} ACK redis", 1_000_000 + sent),
                    };
                    let reply = client.ask(&command);
                    assert!(reply.starts_with('[') || reply.starts_with("-TRYAGAIN"), "{command}: {reply}");
                    sent += 1;
                }
            });
        }
        let before = compared(&stack);
        thread::sleep(Duration::from_secs(8));
        stop.store(true, Ordering::Relaxed);
        let compared = compared(&stack) - before;
        assert!(compared >= 8, "{compared} coupons were compared");
    });
    stack.wait_until_applied();
    wait_until_compared(&stack, 4);
    assert_eq!(found(&stack), [""; 0], "differences that are none");
    let (said, code) = audit(&stack);
    assert_eq!(code, Some(0), "{said}");
}

/// Two sidecars, of which one hands over late what it answered.
pub struct Late {
    pub stack: Stack,
    pub client: Client,
    _other: Sidecar,
    _to_postgres: Proxy,
}

impl Late {
    pub fn wait_until_taken_up(&self) {
        wait_until("everything is handed over and taken up", || {
            self.stack.postgres.value("SELECT count(*) > 0 AND bool_and(done) FROM holdfast.salvage") == "true"
        });
        self.stack.wait_until_applied();
    }

    pub fn end(self) {
        let (said, code) = audit(&self.stack);
        assert_eq!(code, Some(0), "{said}");
    }
}

/// What `lost` of one sidecar answered gets lost with Redis while that sidecar has no Postgres, and another fills Redis without it.
fn lost_and_handed_over_late(lost: impl FnOnce(&mut Client), meanwhile: impl FnOnce(&mut Client), after: impl FnOnce(&Stack, &mut Client)) {
    let mut late = late(UNHURRIED, lost, |_, client| meanwhile(client));
    late.wait_until_taken_up();
    after(&late.stack, &mut late.client);
    late.end();
}

/// The same, with so many ms for each reply, up to where it is handed over.
pub fn late(reply_within_ms: u32, lost: impl FnOnce(&mut Client), meanwhile: impl FnOnce(&Stack, &mut Client)) -> Late {
    let mut stack = Stack::with_own_postgres();
    let port = stack.postgres.own.as_ref().unwrap().port();
    let to_postgres = Proxy::start(port, b"COMMIT");
    let url = stack.postgres.url.replace(&format!(":{port}/"), &format!(":{}/", to_postgres.port()));
    let other = Sidecar::with_deadline(&stack.redis.url(), &url, reply_within_ms);
    wait_until("the other is ready", || other.get("/readyz").0 == 200);
    let (mut others, mut backing) = (other.connect(), stack.backing());
    issue_five(&mut others, "c");
    others.ok("STOCK.SET a 100");
    stack.wait_until_applied();
    stack.postgres.holding("BEGIN; SELECT * FROM holdfast.partition FOR UPDATE", || {
        lost(&mut others);
        to_postgres.hold(Direction::Requests);
        to_postgres.cut();
        // It may have read what it is to carry.
        stack.sidecar.kill();
        backing.ask("FLUSHALL");
    });
    // The other's lease has to pass first.
    stack.sidecar = Sidecar::with_deadline(&stack.redis.url(), &stack.postgres.url, reply_within_ms);
    stack.wait_until_ready();
    let mut client = stack.connect();
    assert_eq!(client.until_not("COUPON.ISSUE c u1", "-"), "[ALREADY, 1]");
    meanwhile(&stack, &mut client);
    to_postgres.cut();
    to_postgres.release();
    Late { stack, client, _other: other, _to_postgres: to_postgres }
}

#[test]
fn what_was_answered_about_coupons_and_handed_over_late_is_done_again_as_it_was() {
    lost_and_handed_over_late(
        |others| {
            assert!(others.ask("COUPON.ISSUE c late REQUEST r-1").starts_with("[ISSUED, 6, 94, "));
            assert!(others.ask("COUPON.ISSUE c later").starts_with("[ISSUED, 7, 93, "));
            assert!(others.ask("COUPON.USE c later ORDER o-1").starts_with("[USED, 7, "));
            assert!(others.ask("COUPON.UNUSE c u1").starts_with("[ISSUED, 1, "));
            for (user, order) in [("u3", "o-3 REQUEST r-3"), ("u4", "o-4")] {
                assert!(others.ask(&format!("COUPON.USE c {user} ORDER {order}")).starts_with("[USED, "));
                assert!(others.ask(&format!("COUPON.UNUSE c {user}")).starts_with("[ISSUED, "));
            }
            assert!(others.ask("COUPON.USE c u4 ORDER o-5").starts_with("[USED, 4, "));
            assert!(others.ask("COUPON.REVOKE c u2 ACK redis").starts_with("[REVOKED, 2, "));
            others.ok("COUPON.CREATE new 3 ACK redis");
            assert!(others.ask("COUPON.ISSUE new u").starts_with("[ISSUED, 1, 2, "));
        },
        |_| {},
        |stack, client| {
            assert!(client.ask("COUPON.GET c late").contains("serial, 6, state, issued"));
            assert!(
                client.ask("COUPON.GET c later").contains("serial, 7, state, used") && client.ask("COUPON.GET c later").contains("o-1")
            );
            assert!(client.ask("COUPON.GET c u1").contains("serial, 1, state, issued"));
            assert_eq!(client.ask("COUPON.GET c u2"), "[]");
            assert!(client.ask("COUPON.GET c u3").contains("serial, 3, state, issued"));
            assert!(client.ask("COUPON.GET c u4").contains("serial, 4, state, used") && client.ask("COUPON.GET c u4").contains("o-5"));
            assert!(client.ask("COUPON.ISSUE c late REQUEST r-1").starts_with("[ISSUED, 6, "), "under its client's REQUEST");
            assert_eq!(client.ask("COUPON.ISSUE new u"), "[ALREADY, 1]");
            assert!(client.ask("COUPON.ISSUE c next").starts_with("[ISSUED, 8, "), "serials go on");
            stack.wait_until_applied();
            let issues = "SELECT serial || ' ' || user_id || ' ' || state FROM holdfast.coupon_issue WHERE coupon_id = 'c' ORDER BY serial";
            let expected = [
                "1 u1 issued",
                "2 u2 revoked",
                "3 u3 issued",
                "4 u4 used",
                "5 u5 issued",
                "6 late issued",
                "7 later used",
                "8 next issued",
            ];
            assert_eq!(stack.postgres.column(issues), expected);
            assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
        },
    );
}

#[test]
fn what_cannot_be_done_again_to_a_coupon_is_owed() {
    lost_and_handed_over_late(
        |others| {
            assert!(others.ask("COUPON.ISSUE c late").starts_with("[ISSUED, 6, 94, "));
            assert!(others.ask("COUPON.ISSUE c later").starts_with("[ISSUED, 7, 93, "));
            assert!(others.ask("COUPON.USE c u2 ORDER o-2").starts_with("[USED, 2, "));
            assert!(others.ask("COUPON.UNUSE c u2").starts_with("[ISSUED, 2, "));
            assert!(others.ask("COUPON.USE c u3 ORDER o-3").starts_with("[USED, 3, "));
            assert!(others.ask("COUPON.UNUSE c u1").starts_with("[ISSUED, 1, "));
            others.ok("COUPON.ALTER c TOTAL 50 ACK redis");
        },
        |client| {
            // Nobody here knows of the others.
            let quick = client.until_not("COUPON.ISSUE c quick", "-");
            assert!(quick.starts_with("[ISSUED, 6, 94, "), "{quick}");
            assert!(client.ask("COUPON.USE c u2 ORDER o-9").starts_with("[USED, 2, "));
            assert!(client.ask("COUPON.USE c u3 ORDER o-3").starts_with("[USED, 3, "), "its client tried again");
            assert!(client.ask("COUPON.UNUSE c u1").starts_with("[ISSUED, 1, "));
            assert!(client.ask("COUPON.USE c u1 ORDER o-1").starts_with("[USED, 1, "));
        },
        |stack, client| {
            assert!(client.ask("COUPON.GET c quick").contains("serial, 6, state, issued"));
            assert_eq!(client.ask("COUPON.GET c late"), "[]", "its serial has been given out again");
            assert!(client.ask("COUPON.GET c later").contains("serial, 7, state, issued"));
            assert_eq!(client.field("COUPON.INFO c", "total"), "100", "terms would overwrite newer ones");
            let owed = "SELECT kind || ' ' || in_redis FROM holdfast.dead_letter ORDER BY n";
            let all = ["coupon.issue false", "coupon.use false", "coupon.unuse false", "coupon.unuse false", "coupon.alter false"];
            assert_eq!(stack.postgres.column(owed), all);
            let letters = "SELECT id FROM holdfast.dead_letter WHERE kind IN ('coupon.issue', 'coupon.unuse') ORDER BY id";
            for letter in stack.postgres.column(letters) {
                assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER RETRY {letter}")), "[OK]");
            }
            wait_until("they are owed again", || {
                stack.postgres.value("SELECT bool_and(done) FROM holdfast.salvage") == "true"
                    && stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter") == "5"
            });
            let redeemed = "SELECT user_id || ' ' || order_id FROM holdfast.coupon_issue WHERE state = 'used' ORDER BY 1";
            assert_eq!(stack.postgres.column(redeemed), ["u1 o-1", "u2 o-9", "u3 o-3"], "later redemptions stay");
            assert!(client.ask("COUPON.GET c u1").contains("o-1") && client.ask("COUPON.GET c u2").contains("o-9"));
        },
    );
}

#[test]
fn what_redis_gave_out_since_and_postgres_refused_stays_and_is_not_waited_for() {
    let mut late = late(
        UNHURRIED,
        |others| {
            assert!(others.ask("COUPON.ISSUE c late").starts_with("[ISSUED, 6, 94, "));
            assert!(others.ask("COUPON.USE c u3 ORDER o-3").starts_with("[USED, 3, "));
            assert!(others.ask("COUPON.ISSUE c later").starts_with("[ISSUED, 7, 93, "));
        },
        |stack, client| {
            stack.postgres.execute("ALTER TABLE holdfast.coupon_issue ADD CHECK (user_id <> 'quick'), ADD CHECK (order_id <> 'refused')");
            assert!(client.ask("COUPON.ISSUE c quick ACK postgres TIMEOUT 20000").starts_with("[ISSUED, 6, 94, "));
            assert!(client.ask("COUPON.USE c u3 ORDER refused ACK postgres TIMEOUT 20000").starts_with("[USED, 3, "));
        },
    );
    late.wait_until_taken_up();
    assert!(late.client.ask("COUPON.GET c quick").contains("serial, 6, state, issued"));
    assert_eq!(late.client.ask("COUPON.GET c late"), "[]", "somebody has its serial");
    assert!(late.client.ask("COUPON.GET c u3").contains("refused"));
    assert!(late.client.ask("COUPON.GET c later").contains("serial, 7, state, issued"));
    let owed = "SELECT kind || ' ' || in_redis FROM holdfast.dead_letter ORDER BY id";
    assert_eq!(late.stack.postgres.column(owed), ["coupon.issue true", "coupon.use true", "coupon.issue false", "coupon.use false"]);
    late.end();
}

#[test]
fn what_waits_for_a_locked_coupon_keeps_nothing_else_from_being_taken_up() {
    // So long is the lock waited for each time.
    let mut late = late(
        2_000,
        |others| {
            others.ok("COUPON.CREATE wide 1000 ACK redis");
            // More than are read at a time.
            for number in 1..=300 {
                assert!(others.ask(&format!("COUPON.ISSUE wide u{number}")).starts_with(&format!("[ISSUED, {number}, ")));
            }
            assert!(others.ask("STOCK.DECR a 1").starts_with("[OK, 99, "));
        },
        |stack, _| {
            stack.backing().ask("HSET coupon:issue:wide somebody:1 1");
        },
    );
    late.client.until("STOCK.GET a", "99");
    assert_eq!(late.client.field("COUPON.INFO wide", "issued"), "0");
    late.stack.backing().ask("DEL coupon:issue:wide");
    late.wait_until_taken_up();
    assert_eq!(late.client.field("COUPON.INFO wide", "issued"), "300");
    // As if whoever took it up had died just before it was noted, and then Redis.
    late.stack.postgres.execute("UPDATE holdfast.salvage SET done = false");
    late.stack.backing().ask("FLUSHALL");
    assert_eq!(late.client.until_not("STOCK.GET a", "-"), "99");
    assert_eq!(late.client.field("COUPON.INFO wide", "issued"), "300");
    late.wait_until_taken_up();
    assert_eq!(late.stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
    late.end();
}

#[test]
fn with_much_time_for_each_reply_a_locked_coupon_keeps_nothing_else_from_being_taken_up() {
    let mut late = late(
        20_000,
        |others| {
            others.ok("COUPON.CREATE wide 1000 ACK redis");
            assert!(others.ask("COUPON.ISSUE wide u").starts_with("[ISSUED, 1, "));
            assert!(others.ask("STOCK.DECR a 1").starts_with("[OK, 99, "));
        },
        |stack, _| {
            stack.backing().ask("HSET coupon:issue:wide somebody:1 1");
        },
    );
    late.client.until("STOCK.GET a", "99");
    late.stack.backing().ask("DEL coupon:issue:wide");
    late.wait_until_taken_up();
    assert_eq!(late.client.field("COUPON.INFO wide", "issued"), "1");
    late.end();
}
