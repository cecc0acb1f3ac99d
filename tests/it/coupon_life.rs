//! COUPON: redeemed, given back, revoked, altered, deleted; and that all of it survives.

use crate::harness::Stack;

/// Since year 3000, in Unix ms.
const FAR: &str = "32503680000000";

#[test]
fn a_coupon_is_redeemed_once_and_given_back() {
    let stack = Stack::start();
    let mut client = stack.connect();
    assert_eq!(client.ask("COUPON.USE c u"), "-NOTFOUND no coupon 'c'");
    assert_eq!(client.ask("COUPON.UNUSE c u"), "-NOTFOUND no coupon 'c'");
    client.ok("COUPON.CREATE c 10 PERUSER 3");
    assert_eq!(client.ask("COUPON.USE c u"), "[NOTISSUED]");
    assert_eq!(client.ask("COUPON.UNUSE c u"), "[NOTISSUED]");
    assert_eq!(client.ask("COUPON.ISSUE c u"), "[ISSUED, 1, 9, 1-2]");
    assert_eq!(client.ask("COUPON.ISSUE c u"), "[ISSUED, 2, 8, 1-3]");
    assert_eq!(client.ask("COUPON.UNUSE c u"), "[NOTUSED]");
    assert_eq!(
        client.ask("COUPON.USE c u ORDER - ACK postgres TIMEOUT 20000"),
        "[USED, 1, 1-4]",
        "the oldest, and an order may be called so"
    );
    assert!(client.ask("COUPON.GET c u").contains("serial, 1, state, used, issued_at_ms, 1"));
    assert!(client.ask("COUPON.GET c u").contains("order, -], [serial, 2, state, issued"));
    assert_eq!(client.ask("COUPON.USE c u SERIAL 1"), "[ALREADY, 1]");
    assert_eq!(client.ask("COUPON.USE c u SERIAL 3"), "[NOTISSUED]");
    assert_eq!(client.ask("COUPON.USE c v SERIAL 1"), "[NOTISSUED]", "somebody else's");
    assert_eq!(client.ask("COUPON.USE c u SERIAL 2"), "[USED, 2, 1-5]");
    assert_eq!(client.ask("COUPON.USE c u"), "[ALREADY, 2]");
    assert_eq!((client.field("COUPON.INFO c", "used"), client.field("COUPON.INFO c", "issued")), ("2".into(), "2".into()));
    assert_eq!(client.ask("COUPON.UNUSE c u SERIAL 1"), "[ISSUED, 1, 1-6]");
    assert_eq!(client.ask("COUPON.UNUSE c u SERIAL 1"), "[NOTUSED]");
    assert_eq!(client.ask("COUPON.UNUSE c u SERIAL 9"), "[NOTISSUED]");
    assert!(client.ask("COUPON.USE c u SERIAL 0").starts_with("-ERR invalid serial"));
    stack.wait_until_applied();
    let rows = stack
        .postgres
        .column("SELECT concat_ws(' ', serial, user_id, state, order_id, used_at IS NOT NULL) FROM holdfast.coupon_issue ORDER BY serial");
    assert_eq!(rows, ["1 u issued f", "2 u used t"]);
    let ledger = stack.postgres.column(
        "SELECT concat_ws(' ', n, kind, serial, issued_delta, used_delta, total_delta, remaining_after, order_id) \
         FROM holdfast.coupon_ledger ORDER BY n",
    );
    assert_eq!(
        ledger,
        ["1 create 0 0 10 10", "2 issue 1 1 0 0 9", "3 issue 2 1 0 0 8", "4 use 1 0 1 0 8 -", "5 use 2 0 1 0 8", "6 unuse 1 0 -1 0 8"]
    );
    assert_eq!(stack.postgres.value("SELECT concat_ws(' ', issued, used, last_serial) FROM holdfast.coupon"), "2 1 2");
}

#[test]
fn what_is_revoked_can_be_issued_again_under_a_new_serial() {
    let stack = Stack::start();
    let mut client = stack.connect();
    assert_eq!(client.ask("COUPON.REVOKE c u"), "-NOTFOUND no coupon 'c'");
    client.ok("COUPON.CREATE c 1");
    assert_eq!(client.ask("COUPON.REVOKE c u"), "[NOTISSUED]");
    client.ask("COUPON.ISSUE c u");
    assert_eq!(client.ask("COUPON.REVOKE c u"), "[REVOKED, 1, 1, 1-3]");
    assert_eq!(client.ask("COUPON.GET c u"), "[]");
    assert_eq!(client.ask("COUPON.REVOKE c u"), "[NOTISSUED]");
    assert_eq!(client.ask("COUPON.USE c u"), "[NOTISSUED]");
    assert_eq!(stack.backing().ask("HLEN coupon:users:c"), "0");
    assert_eq!(client.ask("COUPON.ISSUE c u"), "[ISSUED, 2, 0, 1-4]", "a serial is never used again");
    client.ask("COUPON.USE c u");
    assert_eq!(client.ask("COUPON.REVOKE c u"), "[USED, 2]");
    assert_eq!(client.ask("COUPON.REVOKE c u SERIAL 1"), "[NOTISSUED]");
    stack.wait_until_applied();
    let rows =
        stack.postgres.column("SELECT concat_ws(' ', serial, state, revoked_at IS NOT NULL) FROM holdfast.coupon_issue ORDER BY serial");
    assert_eq!(rows, ["1 revoked t", "2 used f"]);
    assert_eq!(stack.postgres.value("SELECT concat_ws(' ', issued, used, last_serial) FROM holdfast.coupon"), "1 1 2");
}

#[test]
fn the_newest_that_is_not_redeemed_is_revoked_and_makes_room_for_its_user() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 10 PERUSER 3");
    (0..3).for_each(|_| drop(client.ask("COUPON.ISSUE c u")));
    assert!(client.ask("COUPON.USE c u SERIAL 3").starts_with("[USED, 3, "));
    assert!(client.ask("COUPON.REVOKE c u").starts_with("[REVOKED, 2, 8, "));
    assert!(client.ask("COUPON.REVOKE c u SERIAL 1").starts_with("[REVOKED, 1, 9, "));
    assert_eq!(client.ask("COUPON.REVOKE c u SERIAL 3"), "[USED, 3]");
    assert!(client.ask("COUPON.ISSUE c u").starts_with("[ISSUED, 4, 8, "));
    assert!(client.ask("COUPON.ISSUE c u").starts_with("[ISSUED, 5, 7, "));
    assert_eq!(client.ask("COUPON.ISSUE c u"), "[ALREADY, 5]");
}

#[test]
fn a_coupon_is_altered_but_not_below_what_is_issued() {
    let stack = Stack::start();
    let mut client = stack.connect();
    assert_eq!(client.ask("COUPON.ALTER c TOTAL 3"), "-NOTFOUND no coupon 'c'");
    client.ok(&format!("COUPON.CREATE c 2 START 1000 END {FAR}"));
    client.ask("COUPON.ISSUE c u1");
    client.ask("COUPON.ISSUE c u2");
    assert_eq!(client.ask("COUPON.ISSUE c u3"), "[SOLDOUT]");
    assert_eq!(client.ask("COUPON.ALTER c TOTAL 1"), "-ERR invalid total: 2 of them are issued already");
    assert_eq!(client.ask("COUPON.ALTER c TOTAL 3"), "[OK, 1-4]");
    assert_eq!(client.ask("COUPON.ISSUE c u3"), "[ISSUED, 3, 0, 1-5]");
    assert_eq!(client.ask("COUPON.ALTER c END 1000"), "-ERR invalid end: it must be after the start");
    assert_eq!(client.ask(&format!("COUPON.ALTER c START {FAR}")), "-ERR invalid end: it must be after the start");
    assert_eq!(client.ask("COUPON.ALTER c START 0 END 2000"), "[OK, 1-6]");
    assert_eq!((client.field("COUPON.INFO c", "start"), client.field("COUPON.INFO c", "end")), ("nil".into(), "2000".into()));
    assert_eq!(client.ask("COUPON.ISSUE c u4"), "[ENDED, 2000]");
    assert_eq!(client.ask("COUPON.USE c u1"), "[ENDED, 2000]");
    assert_eq!(client.ask("COUPON.USE c u4"), "[NOTISSUED]");
    assert!(client.ask("COUPON.REVOKE c u1").starts_with("[REVOKED, 1, 1, "), "it can be taken back after its time");
    client.ok("COUPON.ALTER c END 0");
    assert!(client.ask("COUPON.USE c u2").starts_with("[USED, 2, "));
    assert!(client.ask("COUPON.ALTER c").starts_with("-ERR syntax error"));
    assert!(client.ask("COUPON.ALTER c TOTAL 0").starts_with("-ERR invalid total"));
    client.ok("COUPON.ALTER c TOTAL 9");
    let terms = "SELECT concat_ws(' ', total, issued, used, coalesce(start_ms, -1), coalesce(end_ms, -1)) FROM holdfast.coupon";
    assert_eq!(stack.postgres.value(terms), "9 2 1 -1 -1");
    assert_eq!(stack.postgres.value("SELECT sum(total_delta) FROM holdfast.coupon_ledger"), "9");
}

#[test]
fn a_deleted_coupon_is_gone_and_its_id_stays_taken() {
    let stack = Stack::start();
    let mut client = stack.connect();
    assert_eq!(client.ask("COUPON.DEL c"), "[NOTFOUND]");
    client.ok("COUPON.CREATE c 5");
    client.ask("COUPON.ISSUE c u");
    assert_eq!(client.ask("COUPON.DEL c"), "[OK, 1-3]");
    assert_eq!(client.ask("COUPON.DEL c"), "[NOTFOUND]");
    assert_eq!(client.ask("COUPON.CREATE c 5"), "[EXISTS]");
    for gone in ["ISSUE c v", "USE c u", "UNUSE c u", "REVOKE c u", "ALTER c TOTAL 9"] {
        assert_eq!(client.ask(&format!("COUPON.{gone}")), "-NOTFOUND no coupon 'c'", "{gone}");
    }
    assert_eq!(client.ask("COUPON.GET c u"), "[]");
    assert_eq!(client.field("COUPON.INFO c", "state"), "deleted");
    assert_eq!(client.ask("COUPON.SCAN 0"), "[0, []]");
    assert_eq!(stack.backing().ask("EXISTS coupon:users:c"), "0");
    assert_eq!(stack.postgres.value("SELECT state FROM holdfast.coupon"), "deleted");
    assert_eq!(stack.postgres.value("SELECT user_id || ' ' || state FROM holdfast.coupon_issue"), "u issued");
}

#[test]
fn coupons_are_scanned_with_what_is_left_of_each() {
    let stack = Stack::start();
    let mut client = stack.connect();
    for coupon in ["spring-1", "spring-2", "autumn"] {
        client.ok(&format!("COUPON.CREATE {coupon} 3"));
    }
    client.ask("COUPON.ISSUE spring-2 u");
    stack.backing().ask("HSET coupon:info:spring-x total abc");
    stack.backing().ask("SET coupon:info:spring-y text");
    let reply = client.ask("COUPON.SCAN 0 MATCH spring* COUNT 100");
    assert!(reply == "[0, [spring-1, 3, spring-2, 2]]" || reply == "[0, [spring-2, 2, spring-1, 3]]", "{reply}");
    assert!(client.ask("COUPON.SCAN x").starts_with("-ERR invalid cursor"));
}

#[test]
fn every_change_with_a_request_happens_once_and_repeats_its_reply() {
    let stack = Stack::start();
    let mut client = stack.connect();
    for (command, other) in [
        ("COUPON.CREATE c 10 PERUSER 5 REQUEST r1", "COUPON.CREATE c 11 PERUSER 5 REQUEST r1"),
        ("COUPON.ISSUE c u REQUEST r2", "COUPON.ISSUE c v REQUEST r2"),
        ("COUPON.ISSUE c u REQUEST r3", "COUPON.USE c u REQUEST r3"),
        ("COUPON.USE c u ORDER o REQUEST r4", "COUPON.USE c u REQUEST r4"),
        ("COUPON.UNUSE c u REQUEST r5", "COUPON.UNUSE c u SERIAL 1 REQUEST r5"),
        ("COUPON.REVOKE c u REQUEST r6", "COUPON.REVOKE c v REQUEST r6"),
        ("COUPON.ALTER c TOTAL 7 REQUEST r7", "COUPON.ALTER c TOTAL 8 REQUEST r7"),
        ("COUPON.DEL c REQUEST r8", "COUPON.DEL d REQUEST r8"),
    ] {
        let first = client.ask(command);
        assert!(first.starts_with('['), "{command}: {first}");
        assert_eq!(client.ask(&format!("{command} ACK postgres TIMEOUT 20000")), first, "{command}");
        assert!(client.ask(other).starts_with("-MISMATCH "), "{other}");
    }
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.coupon_ledger"), "8");
    let refused = client.ask("COUPON.USE gone u REQUEST r9");
    assert_eq!(refused, "-NOTFOUND no coupon 'gone'");
    client.ok("COUPON.CREATE gone 1");
    client.ask("COUPON.ISSUE gone u");
    assert!(client.ask("COUPON.USE gone u REQUEST r9").starts_with("[USED, 1, "), "a refusal is decided afresh");
}

#[test]
fn a_redis_that_lost_everything_is_given_coupons_states_and_replies() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok(&format!("COUPON.CREATE c 10 PERUSER 4 START 5 END {FAR}"));
    (0..4).for_each(|_| drop(client.ask("COUPON.ISSUE c u")));
    let used = client.ask("COUPON.USE c u SERIAL 2 ORDER o-1 REQUEST use");
    let revoked = client.ask("COUPON.REVOKE c u SERIAL 4 REQUEST revoke");
    client.ask("COUPON.USE c u SERIAL 3");
    let unused = client.ask("COUPON.UNUSE c u SERIAL 3 REQUEST unuse");
    let altered = client.ask("COUPON.ALTER c TOTAL 20 REQUEST alter");
    client.ok("COUPON.CREATE old 1");
    client.ask("COUPON.ISSUE old u");
    let deleted = client.ask("COUPON.DEL old REQUEST del");
    stack.wait_until_applied();
    let (held, info) = (client.ask("COUPON.GET c u"), stack.backing().ask("HGETALL coupon:info:c"));
    stack.backing().ask("FLUSHALL");
    assert_eq!(client.until_not("COUPON.GET c u", "-"), held);
    let sorted = |text: &str| {
        let mut words: Vec<_> = text.trim_matches(['[', ']']).split(", ").map(str::to_owned).collect();
        words.sort();
        words
    };
    assert_eq!(sorted(&stack.backing().ask("HGETALL coupon:info:c")), sorted(&info));
    for (command, reply) in [
        ("COUPON.USE c u SERIAL 2 ORDER o-1 REQUEST use", used),
        ("COUPON.REVOKE c u SERIAL 4 REQUEST revoke", revoked),
        ("COUPON.UNUSE c u SERIAL 3 REQUEST unuse", unused),
        ("COUPON.ALTER c TOTAL 20 REQUEST alter", altered),
        ("COUPON.DEL old REQUEST del", deleted),
    ] {
        assert_eq!(client.ask(command), reply, "{command}");
    }
    assert_eq!(client.ask("COUPON.CREATE old 1"), "[EXISTS]");
    assert_eq!(client.ask("COUPON.ISSUE old v"), "-NOTFOUND no coupon 'old'");
    assert!(client.ask("COUPON.ISSUE c u").starts_with("[ISSUED, 5, 16, "), "the serials go on");
}

#[test]
fn what_was_answered_and_not_yet_applied_survives_an_emptied_redis() {
    let mut stack = Stack::with_own_postgres();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 10 PERUSER 4");
    (0..4).for_each(|_| drop(client.ask("COUPON.ISSUE c u ACK postgres TIMEOUT 20000")));
    client.ok("COUPON.CREATE d 10");
    stack.wait_until_applied();
    stack.postgres.own.as_mut().unwrap().kill();
    let used = client.until_not("COUPON.USE c u SERIAL 2 ORDER o REQUEST r-1", "-");
    for (command, reply) in [
        ("COUPON.USE c u SERIAL 3", "[USED, 3, "),
        ("COUPON.UNUSE c u SERIAL 3", "[ISSUED, 3, "),
        ("COUPON.REVOKE c u SERIAL 4 ACK redis", "[REVOKED, 4, 7, "),
        ("COUPON.ISSUE c u", "[ISSUED, 5, 6, "),
        ("COUPON.ALTER c TOTAL 6 END 32503680000000 ACK redis", "[OK, "),
        ("COUPON.DEL d ACK redis", "[OK, "),
    ] {
        let answer = client.ask(command);
        assert!(answer.starts_with(reply), "{command}: {answer}");
    }
    let held = client.ask("COUPON.GET c u");
    stack.backing().ask("FLUSHALL");
    stack.postgres.own.as_mut().unwrap().restart();
    assert_eq!(client.until_not("COUPON.GET c u", "-"), held);
    assert_eq!(client.ask("COUPON.USE c u SERIAL 2 ORDER o REQUEST r-1"), used);
    assert_eq!(client.field("COUPON.INFO c", "end"), "32503680000000");
    assert_eq!(client.field("COUPON.INFO c", "remaining"), "2");
    assert_eq!(client.ask("COUPON.ISSUE d u"), "-NOTFOUND no coupon 'd'");
    assert!(client.ask("COUPON.REVOKE c u").starts_with("[REVOKED, 5, 3, "));
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
    let sums = "SELECT concat_ws(' ', total, issued, used, (SELECT concat_ws(' ', sum(total_delta), sum(issued_delta), sum(used_delta)) \
                FROM holdfast.coupon_ledger WHERE coupon_id = 'c')) FROM holdfast.coupon WHERE coupon_id = 'c'";
    assert_eq!(stack.postgres.value(sums), "6 3 1 6 3 1");
}
