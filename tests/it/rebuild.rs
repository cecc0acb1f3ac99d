//! A Redis that lost its data, all or some of it, is filled from Postgres, and nothing that was answered is lost.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::bulk::audit;
use crate::harness::{Stack, wait_until};

/// A loss may leave the first tries without an answer.
const LOADING: &str = "-";

/// While this is held nothing reaches Postgres.
pub const RELAYS_WAIT: &str = "BEGIN; SELECT * FROM holdfast.partition FOR UPDATE";

#[test]
fn an_emptied_redis_is_filled_from_postgres_and_goes_on() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100 LOW 7");
    client.ok("STOCK.SET b 5");
    client.ok("STOCK.SET gone 5");
    client.ok("STOCK.DEL gone");
    client.ok("COUPON.CREATE c 10 PERUSER 2 END 32503680000000");
    let plain = client.ask("STOCK.DECR a 3 REQUEST plain-id");
    let several = client.ask("STOCK.DECR a 1 b 2 REQUEST 017f22e2-79b0-7cc3-98c4-dc0c0c07398f");
    assert!(several.starts_with("-STALE "), "{several}");
    let several = client.ask("STOCK.DECR b 2 a 1 REQUEST %odd|id");
    let issued = client.ask("COUPON.ISSUE c u1 REQUEST issue-1");
    client.ask("COUPON.ISSUE c u1");
    client.ask("COUPON.ISSUE c u2");
    stack.wait_until_applied();
    for flush in ["FLUSHALL", "DEL holdfast:meta", "FLUSHDB"] {
        stack.backing().ask("HSET coupon:issue:other owner 1");
        stack.backing().ask(flush);
        assert_eq!(client.until_not("STOCK.GET a", LOADING), "96", "{flush}");
        assert_eq!(client.ask("STOCK.MGET b gone"), "[3, nil]");
        assert_eq!(client.field("STOCK.INFO a", "low"), "7");
        assert_eq!(client.ask("STOCK.DECR a 3 REQUEST plain-id"), plain, "a REQUEST is remembered");
        assert_eq!(client.ask("STOCK.DECR b 2 a 1 REQUEST %odd|id"), several);
        assert_eq!(client.ask("COUPON.ISSUE c u1 REQUEST issue-1"), issued);
        assert!(client.ask("STOCK.DECR a 4 REQUEST plain-id").starts_with("-MISMATCH "));
        assert_eq!(client.ask("COUPON.ISSUE c u1"), "[ALREADY, 2]");
        assert_eq!(client.field("COUPON.INFO c", "remaining"), "7");
        assert_eq!(client.field("COUPON.INFO c", "end"), "32503680000000");
        assert!(client.ask("COUPON.GET c u1").contains("serial, 2, state, issued"));
    }
    assert_eq!(client.ask("STOCK.DECR a 6"), "[OK, 90, 4-11]", "three epochs later");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock WHERE product_id = 'a'"), "90");
    assert_eq!(client.ask("HOLDFAST.AWAIT 4-11"), "[APPLIED, 4-11]");
    assert_eq!(client.ask("HOLDFAST.AWAIT 1-10"), "[APPLIED, 1-10]");
    assert_eq!(client.ask("HOLDFAST.AWAIT 1-11"), "[LOST, 1-11]");
    assert_eq!(stack.backing().ask("EXISTS coupon:issue:other"), "0", "flushed, and not ours to bring back");
}

#[test]
fn what_was_answered_and_not_yet_applied_survives_an_emptied_redis() {
    let mut stack = Stack::with_own_postgres();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100 ACK postgres TIMEOUT 20000");
    client.ok("COUPON.CREATE c 10");
    stack.wait_until_applied();
    stack.postgres.own.as_mut().unwrap().kill();
    assert_eq!(client.until_not("STOCK.DECR a 3 REQUEST r-1", "-"), "[OK, 97, 1-3]");
    assert_eq!(client.ask("STOCK.DECR a 7"), "[OK, 90, 1-4]");
    assert_eq!(client.ask("STOCK.INCR a 1"), "[OK, 91, 1-5]");
    assert_eq!(client.ask("COUPON.ISSUE c u1"), "[ISSUED, 1, 9, 1-6]");
    assert_eq!(client.ask("STOCK.SET b 44 ACK redis"), "[OK, 44, 1-7]");
    assert!(client.ask("STOCK.DECR a 92").starts_with("[INSUFFICIENT, a, 91"));
    stack.backing().ask("FLUSHALL");
    let refused = client.ask("STOCK.DECR a 1");
    assert!(refused.starts_with("-TRYAGAIN ") || refused.starts_with("-LOADING "), "nothing is sold without Postgres: {refused}");
    stack.postgres.own.as_mut().unwrap().restart();
    assert_eq!(client.until_not("STOCK.GET a", LOADING), "91");
    assert_eq!(client.ask("STOCK.GET b"), "44");
    assert_eq!(client.ask("STOCK.DECR a 3 REQUEST r-1"), "[OK, 97, 1-3]", "the reply of then");
    assert_eq!(client.ask("COUPON.ISSUE c u1"), "[ALREADY, 1]");
    assert_eq!(client.ask("HOLDFAST.AWAIT 1-7"), "[APPLIED, 1-7]", "found by its origin");
    assert_eq!(client.ask("HOLDFAST.AWAIT 1-8"), "[LOST, 1-8]");
    assert_eq!(client.ask("STOCK.DECR a 1"), "[OK, 90, 2-8]");
    stack.wait_until_applied();
    let saved = "SELECT epoch || '-' || n || ' ' || origin_epoch || '-' || origin_n || ' ' || kind || ' ' || pg_delta || ' ' || available_after \
                 FROM holdfast.stock_ledger WHERE origin_n IS NOT NULL ORDER BY n";
    assert_eq!(stack.postgres.column(saved), ["2-3 1-3 decr -3 97", "2-4 1-4 decr -7 90", "2-5 1-5 incr 1 91", "2-7 1-7 set 44 44"]);
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock WHERE product_id = 'a'"), "90");
    assert!(client.ask("INFO holdfast").contains("holdfast_at_risk:0"));
}

#[test]
fn an_older_redis_is_filled_anew_and_loses_nothing() {
    let mut stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100");
    // With everysec, what is on disk may be a second behind.
    std::thread::sleep(Duration::from_millis(1_500));
    let copy = stack.redis.copy_of_data();
    for _ in 0..10 {
        client.ok("STOCK.DECR a 1");
    }
    stack.redis.kill();
    stack.redis.restart_from(&copy);
    std::fs::remove_dir_all(copy).unwrap();
    assert_eq!(client.until_not("STOCK.GET a", LOADING), "90");
    client.ok("STOCK.DECR a 1");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), "89");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'decr'"), "11");
}

#[test]
fn a_stale_redis_that_comes_back_brings_what_its_outbox_still_holds() {
    let mut stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100");
    client.ok("COUPON.CREATE c 10");
    stack.wait_until_applied();
    let copy = stack.postgres.holding(RELAYS_WAIT, || {
        assert_eq!(client.ask("STOCK.DECR a 3 REQUEST r-1"), "[OK, 97, 1-3]");
        assert_eq!(client.ask("COUPON.ISSUE c u1 REQUEST i-1"), "[ISSUED, 1, 9, 1-4]");
        assert!(client.ask("STOCK.RESERVE o-1 600000 a 20").starts_with("[HELD, "));
        assert_eq!(client.ask("COUPON.ISSUE c again REQUEST i-2"), "[ISSUED, 2, 8, 1-6]");
        // With everysec, what is on disk may be a second behind.
        std::thread::sleep(Duration::from_millis(1_500));
        let copy = stack.redis.copy_of_data();
        // Then nobody has copies.
        stack.sidecar.kill();
        stack.redis.kill();
        copy
    });
    stack.redis.restart_empty();
    stack.restart_sidecar();
    let mut client = stack.connect();
    assert_eq!(client.ask("STOCK.GET a"), "100", "as far as Postgres knows");
    assert_eq!(client.ask("STOCK.DECR a 50"), "[OK, 50, 2-3]");
    assert_eq!(client.ask("COUPON.ISSUE c u2"), "[ISSUED, 1, 9, 2-4]");
    assert_eq!(client.ask("COUPON.ISSUE c quick"), "[ISSUED, 2, 8, 2-5]");
    stack.wait_until_applied();
    // This one only a copy has.
    stack.postgres.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE lock_not_available; END'; \
         CREATE TRIGGER wait BEFORE INSERT ON holdfast.coupon_ledger FOR EACH ROW WHEN (new.request_id = 'i-2' AND new.epoch = 2) \
         EXECUTE FUNCTION wait()",
    );
    assert_eq!(client.ask("COUPON.ISSUE c again REQUEST i-2"), "[ISSUED, 3, 7, 2-6]");
    stack.redis.kill();
    stack.redis.restart_from(&copy);
    std::fs::remove_dir_all(copy).unwrap();
    assert_eq!(client.until_not("STOCK.GET a", LOADING), "27");
    assert_eq!(client.ask("STOCK.DECR a 3 REQUEST r-1"), "[OK, 97, 1-3]", "the reply of then");
    assert_eq!(client.field("STOCK.ORDER o-1", "state"), "held");
    assert_eq!(client.until_not("COUPON.ISSUE c u2", LOADING), "[ALREADY, 1]");
    stack.wait_until_applied();
    let saved = "SELECT kind || ' ' || pg_delta || ' ' || origin_epoch || '-' || origin_n FROM holdfast.stock_ledger
                 WHERE origin_n IS NOT NULL ORDER BY n";
    assert_eq!(stack.postgres.column(saved), ["decr -3 1-3", "reserve -20 1-5"]);
    assert!(client.ask("COUPON.GET c again").contains("serial, 3, state, issued"), "as it was told last");
    // The serial is somebody else's by now: a person decides.
    assert_eq!(stack.postgres.column("SELECT substring(line FROM 'user=[^ ]+') FROM holdfast.dead_letter"), ["user=u1"]);
    let (said, code) = audit(&stack);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn what_still_stands_in_the_outbox_is_saved_where_meta_is_lost() {
    let mut stack = Stack::with_own_postgres();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100");
    stack.wait_until_applied();
    stack.postgres.own.as_mut().unwrap().kill();
    assert_eq!(client.until_not("STOCK.DECR a 3 REQUEST r-1", "-"), "[OK, 97, 1-2]");
    stack.sidecar.kill();
    stack.backing().ask("DEL holdfast:meta");
    stack.postgres.own.as_mut().unwrap().restart();
    stack.restart_sidecar();
    let mut client = stack.connect();
    assert_eq!(client.ask("STOCK.GET a"), "97");
    assert_eq!(client.ask("STOCK.DECR a 3 REQUEST r-1"), "[OK, 97, 1-2]");
    assert_eq!(client.ask("STOCK.DECR a 1"), "[OK, 96, 2-3]");
}

#[test]
fn a_rebuild_that_is_broken_off_and_begun_again_loses_nothing_of_the_outbox() {
    let mut stack = Stack::start();
    let (mut client, mut backing) = (stack.connect(), stack.backing());
    for product in ["refused", "good", "late"] {
        client.ok(&format!("STOCK.SET {product} 100"));
    }
    stack.wait_until_applied();
    stack.postgres.holding(RELAYS_WAIT, || {
        client.ok("STOCK.DECR refused 3");
        // More entries than are read at a time.
        (0..20).for_each(|_| client.ok("STOCK.DECR good 1"));
        client.ok("STOCK.DECR late 5");
        // Then nobody has copies.
        stack.sidecar.kill();
        backing.ask("DEL holdfast:meta");
    });
    // So what the outbox holds is saved by name: the first part, and the second not while somebody has its product.
    stack.postgres.execute("ALTER TABLE holdfast.stock ADD CHECK (product_id <> 'refused' OR available = 100)");
    let holds_late = "BEGIN; SELECT * FROM holdfast.stock WHERE product_id = 'late' FOR UPDATE";
    stack.postgres.holding(holds_late, || {
        stack.sidecar = crate::harness::Sidecar::start(&stack.redis.url(), &stack.postgres.url);
        stack.sidecar.wait_for_log("due to lock timeout");
    });
    let mut client = stack.connect();
    assert_eq!(client.until_not("STOCK.MGET refused good late", LOADING), "[100, 80, 95]");
    assert_eq!(stack.postgres.value("SELECT string_agg(kind || delta, ' ') FROM holdfast.dead_letter"), "decr-3");
    let saved = "SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'decr' AND origin_n IS NOT NULL";
    assert_eq!(stack.postgres.value(saved), "22", "each by name, and once");
    let (said, code) = audit(&stack);
    assert_eq!(code, Some(0), "{said}");
    // One that lacks anything by now is not taken for the right side.
    stack.sidecar.kill();
    let mut backing = stack.backing();
    backing.ask("HSET holdfast:meta state rebuild");
    backing.ask("DEL holdfast:outbox stock:product:good");
    let url = stack.postgres.url.clone();
    assert!(!by_hand(&stack, &url, "redis"));
    assert!(by_hand(&stack, &url, "postgres"));
    assert_eq!(backing.ask("GET stock:product:good"), "80");
}

#[test]
fn saving_for_longer_than_until_the_lease_is_renewed_does_not_break_a_rebuild_off() {
    let mut stack = Stack::start();
    let (mut client, mut backing) = (stack.connect(), stack.backing());
    client.ok("STOCK.SET a 1000");
    stack.wait_until_applied();
    stack.postgres.holding(RELAYS_WAIT, || {
        (0..200).for_each(|_| client.ok("STOCK.DECR a 1"));
        stack.sidecar.kill();
        backing.ask("DEL holdfast:meta");
    });
    // A dozen transactions, one behind the other, each with a lock on the partition's row.
    stack.postgres.execute(
        "CREATE FUNCTION holdfast.slowly() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
         CREATE TRIGGER slowly AFTER INSERT ON holdfast.stock_ledger FOR EACH STATEMENT EXECUTE FUNCTION holdfast.slowly()",
    );
    stack.restart_sidecar();
    assert_eq!(stack.connect().ask("STOCK.GET a"), "800");
    let log = stack.sidecar.log();
    assert_eq!(log.matches("filling redis from postgres").count(), 1, "{log}");
}

#[test]
fn what_another_sidecar_answered_before_the_loss_is_taken_off_once() {
    let mut stack = Stack::with_own_postgres();
    let other = crate::harness::Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    wait_until("the other is ready", || other.get("/readyz").0 == 200);
    let (mut client, mut others) = (stack.connect(), other.connect());
    client.ok("STOCK.SET a 100");
    stack.wait_until_applied();
    stack.postgres.own.as_mut().unwrap().kill();
    assert!(client.until_not("STOCK.DECR a 3", "-").starts_with("[OK, 97, "));
    assert!(others.until_not("STOCK.DECR a 20", "-").starts_with("[OK, 77, "));
    stack.backing().ask("FLUSHALL");
    stack.postgres.own.as_mut().unwrap().restart();
    client.until_not("STOCK.GET a", LOADING);
    others.until_not("STOCK.GET a", LOADING);
    client.until("STOCK.GET a", "77");
    others.until("STOCK.GET a", "77");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), "77");
    assert_eq!(stack.postgres.value("SELECT count(*) || ' ' || sum(pg_delta) FROM holdfast.stock_ledger WHERE kind = 'decr'"), "2 -23");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
}

#[test]
fn a_rebuild_of_many_products_is_quick_and_shows_how_far_it_is() {
    let products: usize = std::env::var("HOLDFAST_TEST_PRODUCTS").map_or(10_000, |products| products.parse().unwrap());
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET first 1");
    let insert = format!(
        "SET holdfast.writer = 'holdfast'; \
         INSERT INTO holdfast.stock (product_id, available) SELECT 'sku-' || i, i FROM generate_series(1, {products}) i"
    );
    stack.postgres.execute(&insert);
    stack.backing().ask("FLUSHALL");
    let began = Instant::now();
    client.until_not("STOCK.GET sku-77", LOADING);
    eprintln!("{products} products: {:?}", began.elapsed());
    assert_eq!(client.ask("STOCK.GET sku-77"), "77");
    assert_eq!(client.ask(&format!("STOCK.GET sku-{products}")), products.to_string());
    let log = stack.sidecar.log();
    assert!(log.contains("redis is filled and open"), "{log}");
}

/// Runs `holdfast rebuild` and returns whether it worked.
fn by_hand(stack: &Stack, postgres_url: &str, from: &str) -> bool {
    let command = Command::new(env!("CARGO_BIN_EXE_holdfast"))
        .args(["rebuild", "--from", from, "--redis-url", &stack.redis.url(), "--postgres-url", postgres_url])
        .stderr(Stdio::null())
        .status();
    command.unwrap().success()
}

#[test]
fn a_postgres_from_a_backup_catches_up_or_waits_for_a_person() {
    let mut stack = Stack::with_own_postgres();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100");
    client.ok("COUPON.CREATE c 9 PERUSER 2");
    client.ok("STOCK.SET e 20");
    for order in ["undone", "forgotten"] {
        assert!(client.ask(&format!("STOCK.RESERVE {order} 600000 e 2")).starts_with("[HELD, "));
    }
    client.ok("STOCK.DECR a 10 ACK postgres TIMEOUT 20000");
    stack.sidecar.kill();
    let backups = ["near", "far", "wrong"].map(|name| stack.postgres.copy(name));
    stack.restart_sidecar();
    let mut client = stack.connect();
    client.ok("STOCK.DECR a 5");
    client.ok("STOCK.SET b 7 LOW 3");
    assert!(client.ask("COUPON.ISSUE c u1").starts_with("[ISSUED, 1, "));
    client.ask("COUPON.ISSUE c u1");
    client.ok("STOCK.SET d 9");
    for order in ["paid", "open", "gone"] {
        assert!(client.ask(&format!("STOCK.RESERVE {order} 600000 d 2")).starts_with("[HELD, "));
    }
    for order in ["paid", "forgotten"] {
        assert!(client.ask(&format!("STOCK.CONFIRM {order}")).starts_with("[CONFIRMED, "));
    }
    assert!(client.ask("STOCK.CANCEL undone").starts_with("[CANCELLED, "));
    client.ok("STOCK.DEL b");
    client.ok("STOCK.SET b 7 LOW 3");
    client.ok("STOCK.DEL d");
    client.ok("STOCK.DECR a 1");
    stack.wait_until_applied();
    stack.sidecar.kill();

    // What Postgres lacks still stands in the outbox: nobody has to do anything.
    stack.postgres.url = backups[0].clone();
    stack.restart_sidecar();
    stack.wait_until_applied();
    let units = "SELECT product_id || ' ' || available FROM holdfast.stock ORDER BY 1";
    assert_eq!(stack.postgres.column(units), ["a 84", "b 7", "d 0", "e 18"]);
    stack.sidecar.kill();
    // As if its time in Redis were over.
    stack.backing().ask("DEL stock:order:forgotten");

    // It does not: a person has to say which side is right.
    let newest = stack.backing().ask("HGET holdfast:meta id");
    stack.backing().ask(&format!("XTRIM holdfast:outbox MINID = {newest}"));
    let by_redis = (
        vec!["a 84", "b 7", "d 0", "e 18"],
        "2",
        vec!["forgotten expired", "gone cancelled", "open held", "paid confirmed", "undone cancelled"],
    );
    let by_postgres = (vec!["a 89", "e 16"], "0", vec!["forgotten held", "undone held"]);
    for (url, from, (units_then, issued, orders)) in [(&backups[1], "redis", by_redis), (&backups[2], "postgres", by_postgres)] {
        stack.postgres.url.clone_from(url);
        stack.sidecar = crate::harness::Sidecar::start(&stack.redis.url(), url);
        wait_until("the reason is said", || stack.sidecar.get("/readyz").1.contains("holdfast rebuild --from redis"));
        let mut client = stack.connect();
        assert!(client.ask("STOCK.DECR a 1").starts_with("-LOADING "));
        if from == "redis" {
            // What is broken off is not done the other way round.
            stack.postgres.execute("ALTER TABLE holdfast.stock_order ADD CONSTRAINT none CHECK (state <> 'confirmed')");
            assert!(!by_hand(&stack, url, from));
            wait_until("it is said", || stack.sidecar.get("/readyz").1.contains("was broken off: run it again"));
            assert!(stack.backing().ask("GET stock:product:a").ends_with("84"));
            stack.postgres.execute("ALTER TABLE holdfast.stock_order DROP CONSTRAINT none");
        }
        // What broke off has its right for a while.
        wait_until("it is done by hand", || by_hand(&stack, url, from));
        stack.wait_until_ready();
        let left = client.until_not("STOCK.GET a", "-");
        if from == "redis" {
            assert!(client.ask("STOCK.CANCEL gone").starts_with("[CANCELLED, "));
        }
        client.ok("STOCK.INCR a 1");
        client.ok("STOCK.DECR a 1");
        stack.wait_until_applied();
        assert_eq!(stack.postgres.column(units), units_then, "from {from}");
        assert!(units_then[0].ends_with(&left));
        let explained = "SELECT count(*) FROM holdfast.stock s WHERE available <> \
                         (SELECT sum(pg_delta) FROM holdfast.stock_ledger l WHERE l.product_id = s.product_id)";
        assert_eq!(stack.postgres.value(explained), "0", "the ledger explains what there is");
        assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.coupon_issue"), issued);
        assert_eq!(client.field("COUPON.INFO c", "issued"), issued);
        assert_eq!(stack.postgres.column("SELECT order_id || ' ' || state FROM holdfast.stock_order ORDER BY 1"), orders);
        if from == "redis" {
            assert_eq!(
                stack.postgres.value("SELECT held FROM holdfast.stock WHERE product_id = 'd'"),
                "2",
                "it is deleted, and owes the rest"
            );
        }
        let (said, code) = audit(&stack);
        assert_eq!(code, Some(0), "from {from}: {said}");
        stack.sidecar.kill();
        let newest = stack.backing().ask("HGET holdfast:meta id");
        stack.backing().ask(&format!("XTRIM holdfast:outbox MINID = {newest}"));
    }
}

#[test]
fn what_two_sidecars_answered_is_saved_in_the_order_in_which_it_took_effect() {
    let stack = Stack::start();
    let other = crate::harness::Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    wait_until("the other is ready", || other.get("/readyz").0 == 200);
    let (mut client, mut others) = (stack.connect(), other.connect());
    client.ok("STOCK.SET a 5");
    stack.wait_until_applied();
    stack.postgres.holding(RELAYS_WAIT, || {
        // Each builds on what the other has answered just before.
        others.ok("STOCK.SET a 100 ACK redis");
        client.ok("STOCK.DECR a 40");
        others.ok("STOCK.INCR a 1");
        assert!(others.ask("COUPON.CREATE c 9 ACK redis").starts_with("[OK, "));
        assert!(client.ask("COUPON.ISSUE c u").starts_with("[ISSUED, 1, 8, "));
        stack.backing().ask("FLUSHALL");
    });
    client.until("STOCK.GET a", "61");
    assert_eq!(others.until_not("COUPON.ISSUE c u", LOADING), "[ALREADY, 1]");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available || ' ' || coalesce(frozen, '-') FROM holdfast.stock"), "61 -");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
}

#[test]
fn no_sidecar_goes_on_without_what_another_answered_and_redis_lost() {
    let mut stack = Stack::start();
    let other = crate::harness::Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    wait_until("the other is ready", || other.get("/readyz").0 == 200);
    stack.connect().ok("STOCK.SET a 100");
    stack.wait_until_applied();
    let mut others = other.connect();
    stack.postgres.holding(RELAYS_WAIT, || {
        others.ok("STOCK.DECR a 1");
        // With everysec, what is on disk may be a second behind.
        std::thread::sleep(Duration::from_millis(1_500));
        let copy = stack.redis.copy_of_data();
        for _ in 0..5 {
            others.ok("STOCK.DECR a 10");
        }
        stack.sidecar.kill();
        stack.redis.kill();
        stack.redis.restart_from(&copy);
        std::fs::remove_dir_all(copy).unwrap();
        // The one that looks first has never seen the last five.
        stack.sidecar = crate::harness::Sidecar::start(&stack.redis.url(), &stack.postgres.url);
        std::thread::sleep(Duration::from_millis(500));
    });
    stack.wait_until_ready();
    let mut client = stack.connect();
    assert_eq!(client.until_not("STOCK.GET a", LOADING), "49");
    assert_eq!(others.until_not("STOCK.GET a", LOADING), "49");
    assert!(client.ask("STOCK.DECR a 50").starts_with("[INSUFFICIENT, a, 49"));
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), "49");
}
