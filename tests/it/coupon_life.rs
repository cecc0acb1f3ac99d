//! COUPON: redeemed, given back, revoked, altered, deleted; and that all of it survives.

use std::time::Duration;

use crate::harness::{Sidecar, Stack, wait_until};
use crate::proxy::Proxy;

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
    assert_eq!(client.ask("COUPON.SCAN 0 COUNT 1000"), "[0, []]");
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
    stack.backing().ask_words(&["HSET", "coupon:info:spring-1 trial 7", "total", "3", "issued", "0"]);
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

/// Coupons as another program, or an older installation, has them in Postgres.
const ONLY_IN_POSTGRES: &str =
    "INSERT INTO holdfast.coupon (coupon_id, total, issued, used, per_user, last_serial) VALUES ('pg', 5, 3, 1, 2, 7);
    INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at, used_at, order_id, revoked_at) VALUES
    ('pg', 2, 'u1', 'used', now(), now(), 'o-1', NULL), ('pg', 4, 'u1', 'issued', now(), NULL, NULL, NULL),
    ('pg', 5, 'u2', 'issued', now(), NULL, NULL, NULL),
    ('pg', 7, 'u3', 'revoked', now(), NULL, NULL, now());
    INSERT INTO holdfast.coupon (coupon_id, total, per_user, state) VALUES ('gone', 5, 1, 'deleted'), ('idle', 5, 1, 'active')";

#[test]
fn a_coupon_that_only_postgres_has_is_loaded_on_its_first_use() {
    let stack = Stack::start();
    let mut client = stack.connect();
    stack.postgres.execute(ONLY_IN_POSTGRES);
    assert_eq!(client.ask("COUPON.CREATE pg 9"), "[EXISTS]", "Redis does not have it yet");
    assert_eq!(client.ask("COUPON.CREATE gone 9"), "[EXISTS]");
    assert_eq!(client.field("COUPON.INFO idle", "total"), "5");
    assert_eq!(client.ask("COUPON.ISSUE gone u"), "-NOTFOUND no coupon 'gone'");
    assert_eq!(client.ask("COUPON.ISSUE pg u1"), "[ALREADY, 4]");
    assert_eq!(client.ask("COUPON.ISSUE pg u3"), "[ISSUED, 8, 1, 1-1]");
    assert!(client.ask("COUPON.GET pg u1").contains("serial, 2, state, used"));
    assert_eq!(client.ask("COUPON.UNUSE pg u1"), "[ISSUED, 2, 1-2]");
    assert_eq!((client.field("COUPON.INFO pg", "issued"), client.field("COUPON.INFO pg", "used")), ("4".into(), "0".into()));
    // Taken away by hand, with and without what its users have.
    for keys in ["coupon:info:pg coupon:users:pg", "coupon:info:pg"] {
        stack.wait_until_applied();
        stack.backing().ask(&format!("DEL {keys}"));
        assert_eq!(client.ask("COUPON.ISSUE pg u1"), "[ALREADY, 4]");
        assert_eq!(
            client.ask("COUPON.USE pg u2 SERIAL 5"),
            format!("[{}]", if keys.contains("users") { "USED, 5, 1-3" } else { "ALREADY, 5" })
        );
    }
    assert_eq!(client.ask("COUPON.ISSUE nowhere u"), "-NOTFOUND no coupon 'nowhere'");
    assert_eq!(client.ask("COUPON.CREATE nowhere 3 ACK redis"), "[OK, 1-4]");
    assert_eq!(client.ask("COUPON.ISSUE nowhere u"), "[ISSUED, 1, 2, 1-5]");
    stack.wait_until_applied();
    assert_eq!(
        stack.postgres.value("SELECT concat_ws(' ', issued, used, last_serial) FROM holdfast.coupon WHERE coupon_id = 'pg'"),
        "4 1 8"
    );
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
}

#[test]
fn a_coupon_that_thousands_have_is_loaded_in_pieces_and_a_deleted_one_without_them() {
    let stack = Stack::start();
    let (mut client, mut redis) = (stack.connect(), stack.backing());
    stack.postgres.execute(
        "INSERT INTO holdfast.coupon (coupon_id, total, issued, used, per_user, last_serial, state) VALUES
         ('pg', 9000, 7001, 0, 2, 7001, 'active'), ('gone', 9000, 7001, 0, 1, 7001, 'deleted');
         INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at)
         SELECT coupon, n, 'u-' || n % 7000, 'issued', now() FROM generate_series(1, 7001) n, unnest(ARRAY['pg', 'gone']) coupon",
    );
    assert_eq!(client.ask("COUPON.CREATE pg 9"), "[EXISTS]");
    assert_eq!(client.until_not("COUPON.INFO gone", "-").split(", ").nth(3), Some("9000"));
    assert_eq!(client.ask("COUPON.ISSUE gone u-1"), "-NOTFOUND no coupon 'gone'");
    // What was left of a load that was broken off, by another's count.
    redis.ask("HSET coupon:users:pg{loading} somebody text");
    assert_eq!(client.until_not("COUPON.ISSUE pg u-1", "-TRYAGAIN"), "[ALREADY, 7001]");
    // Something else by that name.
    redis.ask("DEL coupon:info:pg");
    redis.ask("SET coupon:users:pg{loading} text");
    assert_eq!(client.until_not("COUPON.ISSUE pg u-1", "-TRYAGAIN"), "[ALREADY, 7001]");
    assert_eq!(redis.ask("HLEN coupon:users:pg"), "7000");
    assert_eq!((redis.ask("PTTL coupon:users:pg").as_str(), redis.ask("EXISTS coupon:users:pg{loading}").as_str()), ("-1", "0"));
    assert!(client.ask("COUPON.ISSUE pg u-2").starts_with("[ISSUED, 7002, 1998, "));
    assert!(client.ask("COUPON.USE pg u-6999").starts_with("[USED, 6999, "));
    assert!(client.ask("COUPON.ISSUE pg new").starts_with("[ISSUED, 7003, 1997, "));
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
}

#[test]
fn a_creation_finds_a_coupon_of_postgres_that_could_not_be_loaded() {
    let stack = Stack::start();
    let mut client = stack.connect();
    stack.postgres.execute(
        "INSERT INTO holdfast.coupon (coupon_id, total, issued, used, per_user, last_serial, state)
         VALUES ('pg', 9000, 5000, 0, 9000, 5000, 'active');
         INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at)
         SELECT 'pg', n, 'u', 'issued', now() FROM generate_series(1, 5000) n",
    );
    assert_eq!(client.ask("COUPON.CREATE pg 9"), "[EXISTS]");
}

#[test]
fn what_of_a_coupon_only_postgres_could_say_is_not_said_without_it() {
    let mut stack = Stack::with_own_postgres();
    let mut client = stack.connect();
    assert_eq!((client.ask("COUPON.INFO c"), client.ask("COUPON.GET c u")), ("nil".into(), "[]".into()));
    stack.postgres.own.as_mut().unwrap().kill();
    for command in ["COUPON.INFO d", "COUPON.GET d u"] {
        let reply = client.ask(command);
        assert!(reply.starts_with("-TRYAGAIN Redis does not have this coupon"), "{command}: {reply}");
    }
}

#[test]
fn what_users_had_under_a_key_that_was_left_is_not_taken_over_by_a_creation() {
    let stack = Stack::start();
    let mut client = stack.connect();
    stack.backing().ask_words(&["HSET", "coupon:users:c", "u", "7 issued 5 -", "v", "8 issued 5 -"]);
    for command in ["COUPON.CREATE c 5", "COUPON.ISSUE c u"] {
        client.send(&command.split(' ').collect::<Vec<_>>());
    }
    assert!(client.receive().starts_with("[OK, "));
    assert!(client.receive().starts_with("[ISSUED, 1, 4, "));
    assert_eq!(client.ask("COUPON.GET c v"), "[]");
    assert!(client.ask("COUPON.ISSUE c v").starts_with("[ISSUED, 2, 3, "));
}

/// What Redis is asked from now on.
struct Monitor(std::net::TcpStream);

impl Monitor {
    fn of(stack: &Stack) -> Self {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", stack.redis.port())).unwrap();
        stream.write_all(b"MONITOR\r\n").unwrap();
        assert_eq!(stream.read(&mut [0; 5]).unwrap(), 5);
        Self(stream)
    }

    /// How many requests so far contain all of these.
    fn count(mut self, stack: &Stack, what: &[&str]) -> usize {
        use std::io::Read as _;
        stack.backing().ask("ECHO that-is-all");
        let (mut text, mut some) = (Vec::new(), vec![0; 65536]);
        while !text.windows(11).any(|window| window == b"that-is-all") {
            let read = self.0.read(&mut some).unwrap();
            text.extend_from_slice(&some[..read]);
        }
        String::from_utf8_lossy(&text).lines().filter(|line| what.iter().all(|what| line.contains(what))).count()
    }
}

#[test]
fn a_pipeline_that_uses_an_absent_coupon_loads_it_once() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 1");
    stack.postgres.execute("INSERT INTO holdfast.coupon (coupon_id, total, per_user) VALUES ('pg', 25, 1)");
    let monitor = Monitor::of(&stack);
    (0..40).for_each(|number| client.send(&["COUPON.ISSUE", "pg", &format!("u-{number}")]));
    let replies: Vec<String> = (0..40).map(|_| client.receive()).collect();
    assert_eq!(replies.iter().filter(|reply| reply.starts_with("[ISSUED, ")).count(), 25, "{replies:?}");
    assert_eq!(monitor.count(&stack, &["EVALSHA", "coupon:info:pg", "init"]), 1);
}

#[test]
fn what_a_client_sends_behind_an_issue_for_which_the_coupon_is_loaded_comes_behind_it() {
    let rounds = 100;
    let stack = Stack::start();
    stack.postgres.execute(&format!(
        "INSERT INTO holdfast.coupon (coupon_id, total, per_user) SELECT 'pg-' || n, 25, 1 FROM generate_series(0, {rounds}) n"
    ));
    // So that what is sent meanwhile finds each of the requests that a load takes under way.
    let proxy = Proxy::start(stack.redis.port(), b"");
    let sidecar = Sidecar::with_settings(&proxy.redis_url(), &stack.postgres.url, &["--reply-within-ms", "20000"]);
    wait_until("it sells", || sidecar.get("/readyz").0 == 200);
    let (mut client, mut others) = (sidecar.connect(), sidecar.connect());
    proxy.slow_down(Duration::from_millis(2));
    std::thread::scope(|scope| {
        let (over, is_over) = std::sync::mpsc::channel::<()>();
        // A batch is always under way, so that the load waits for the next one, and what comes behind it goes with it.
        scope.spawn(move || {
            let mut user = 0;
            while is_over.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                user += 1;
                others.ask(&format!("COUPON.USE pg-0 u-{user}"));
            }
        });
        for round in 1..=rounds {
            client.send(&["COUPON.ISSUE", &format!("pg-{round}"), "u"]);
            std::thread::sleep(Duration::from_micros(250) * round);
            client.send(&["COUPON.USE", &format!("pg-{round}"), "u"]);
            let replies = [client.receive(), client.receive()];
            assert!(replies[0].starts_with("[ISSUED, 1, ") && replies[1].starts_with("[USED, 1, "), "round {round}: {replies:?}");
        }
        drop(over);
    });
}

#[test]
fn many_clients_that_use_an_absent_coupon_at_once_load_it_once_and_a_pipeline_sees_its_own_creation() {
    let stack = Stack::start();
    stack.postgres.execute("INSERT INTO holdfast.coupon (coupon_id, total, per_user) VALUES ('pg', 25, 1)");
    let replies: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..40)
            .map(|number| {
                let mut client = stack.connect();
                scope.spawn(move || client.ask(&format!("COUPON.ISSUE pg u-{number}")))
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(replies.iter().filter(|reply| reply.starts_with("[ISSUED, ")).count(), 25, "{replies:?}");
    assert_eq!(replies.iter().filter(|reply| *reply == "[SOLDOUT]").count(), 15, "{replies:?}");
    let mut client = stack.connect();
    for round in 0..20 {
        for command in [format!("COUPON.CREATE n-{round} 5 ACK redis"), format!("COUPON.ISSUE n-{round} u")] {
            client.send(&command.split(' ').collect::<Vec<_>>());
        }
        assert!(client.receive().starts_with("[OK, "));
        assert!(client.receive().starts_with("[ISSUED, 1, 4, "), "round {round}");
    }
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
}

#[test]
fn a_coupon_is_not_created_while_postgres_cannot_say_whether_there_is_one() {
    let mut stack = Stack::with_own_postgres();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 5");
    stack.postgres.own.as_mut().unwrap().kill();
    let refused = client.ask("COUPON.CREATE d 5 ACK redis");
    assert!(refused.starts_with("-TRYAGAIN Redis does not have this coupon"), "{refused}");
    assert!(client.ask("COUPON.ISSUE c u").starts_with("[ISSUED, 1, "), "what Redis has is issued");
    stack.postgres.own.as_mut().unwrap().restart();
    let created = client.until_not("COUPON.CREATE d 5 ACK redis", "-TRYAGAIN");
    assert!(created.starts_with("[OK, "), "{created}");
}
