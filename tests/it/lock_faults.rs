//! LOCK: what is sent again, comes late, or is said while Redis is away, and what Redis and Postgres hold that is older than what was given out.

use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Client, Sidecar, Stack, wait_until};
use crate::locks::{acquire, size, token, waiting};
use crate::proxy::{Direction, Proxy};

/// A sidecar that reaches the stack's Redis through a proxy.
fn behind(stack: &Stack, marked: &'static [u8], flags: &[&str]) -> (Proxy, Sidecar) {
    let proxy = Proxy::start(stack.redis.port(), marked);
    let flags = [&["--reply-within-ms", "20000"], flags].concat();
    let sidecar = Sidecar::with_settings(&proxy.redis_url(), &stack.postgres.url, &flags);
    let mut client = sidecar.connect();
    wait_until("it serves locks", || client.ask("LOCK.INFO nothing") == "nil");
    // From now on Redis knows the scripts: each goes by its hash, once.
    let held = acquire(&mut client, "first", "");
    for command in [format!("LOCK.EXTEND first {held} 60000"), format!("LOCK.RELEASE first {held}")] {
        assert!(!client.ask(&command).starts_with("[LOST"));
    }
    (proxy, sidecar)
}

/// How often the lock was acquired and not released yet.
fn count(redis: &mut Client, name: &str) -> u32 {
    let reply = redis.ask(&format!("HVALS {name}"));
    reply.trim_matches(['[', ']']).parse().unwrap_or(0)
}

#[test]
fn two_re_entries_whose_answers_are_lost_at_once_count_once_each() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &[]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    for round in 0..size(5, 50) {
        let held = acquire(&mut client, "l", "OWNER o LEASE 600000");
        proxy.hold(Direction::Answers);
        let again = [(); 3].map(|()| waiting(&sidecar, "LOCK.ACQUIRE l OWNER o LEASE 600000"));
        wait_until("all have run", || count(&mut redis, "l") == 4);
        proxy.cut();
        proxy.release();
        for client in again {
            assert_eq!(token(&client.join().unwrap().1), held, "round {round}");
        }
        assert_eq!(count(&mut redis, "l"), 4, "round {round}");
        for _ in 0..4 {
            assert_eq!(client.ask(&format!("LOCK.RELEASE l {held}")), "[RELEASED]", "round {round}");
        }
        assert_eq!(redis.ask("EXISTS l"), "0", "round {round}");
    }
}

#[test]
fn a_release_of_several_that_loses_its_answer_counts_once_over_an_outage() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &[]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    // Shorter and longer than it is sent again.
    for (away_ms, known) in [(0, true), (1_500, true), (4_500, false)] {
        let held = acquire(&mut client, "l", "OWNER o LEASE 600000");
        assert_eq!(acquire(&mut client, "l", "OWNER o LEASE 600000"), held);
        proxy.hold(Direction::Answers);
        let releasing = waiting(&sidecar, &format!("LOCK.RELEASE l {held}"));
        wait_until("it has run", || count(&mut redis, "l") == 1);
        proxy.cut();
        thread::sleep(Duration::from_millis(away_ms));
        proxy.release();
        let reply = releasing.join().unwrap().1;
        assert!(if known { reply == "[RELEASED]" } else { reply.starts_with("-INDOUBT ") }, "{away_ms}: {reply}");
        wait_until("it serves locks", || client.ask(&format!("LOCK.CHECK l {held}")).starts_with("[VALID, "));
        assert_eq!(count(&mut redis, "l"), 1, "{away_ms}");
        assert_eq!(client.ask(&format!("LOCK.RELEASE l {held}")), "[RELEASED]");
        assert_eq!(redis.ask("EXISTS l"), "0");
    }
}

#[test]
fn what_was_sent_over_a_connection_that_was_given_up_never_runs_later() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"redisson_lock_token:{l}", &[]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    for round in 0..size(5, 50) {
        // An acquisition is kept back, sent again, and released. Then the first arrives.
        proxy.hold_old();
        let first = waiting(&sidecar, "LOCK.ACQUIRE l LEASE 600000 WAIT 60000");
        thread::sleep(Duration::from_millis(20));
        proxy.cut_clients();
        let held = token(&first.join().unwrap().1);
        assert_eq!(client.ask(&format!("LOCK.RELEASE l {held}")), "[RELEASED]", "round {round}");
        proxy.release();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(redis.ask("EXISTS l"), "0", "round {round}: taken for nobody");

        // The same for a lease, which is shortened meanwhile.
        let held = acquire(&mut client, "l", "LEASE 20000");
        proxy.hold_old();
        let first = waiting(&sidecar, &format!("LOCK.EXTEND l {held} 600000"));
        thread::sleep(Duration::from_millis(20));
        proxy.cut_clients();
        assert_eq!(first.join().unwrap().1, "[EXTENDED, 600000]");
        assert_eq!(client.ask(&format!("LOCK.EXTEND l {held} 30000")), "[EXTENDED, 30000]");
        proxy.release();
        thread::sleep(Duration::from_millis(20));
        let lasts: u64 = redis.ask("PTTL l").parse().unwrap();
        assert!(lasts <= 30_000, "round {round}: {lasts}");
        assert_eq!(client.ask(&format!("LOCK.RELEASE l {held}")), "[RELEASED]");
    }
}

#[test]
fn what_a_session_was_given_by_hand_outlasts_its_renewals_and_not_its_longest_hold() {
    let stack = Stack::with_settings(&["--lock-session-lease-ms", "1000", "--lock-max-hold-ms", "60000", "--reply-within-ms", "20000"]);
    let (mut session, mut redis) = (stack.connect(), stack.backing());
    let held = acquire(&mut session, "l", "SESSION");
    assert_eq!(session.ask(&format!("LOCK.EXTEND l {held} 30000")), "[EXTENDED, 30000]");
    // Several renewals.
    thread::sleep(Duration::from_millis(1_500));
    let lasts: u64 = redis.ask("PTTL l").parse().unwrap();
    assert!(lasts > 20_000, "{lasts}");
    let reply = session.ask(&format!("LOCK.EXTEND l {held} 600000"));
    let given: u64 = reply.trim_matches(['[', ']']).split(", ").nth(1).unwrap().parse().unwrap();
    assert!(given < 60_000 && redis.ask("PTTL l").parse::<u64>().unwrap() < 60_000, "{reply}");
    // Shorter than a renewal would come.
    let held = acquire(&mut session, "m", "SESSION");
    assert_eq!(session.ask(&format!("LOCK.EXTEND m {held} 1000")), "[EXTENDED, 1000]");
    thread::sleep(Duration::from_millis(2_000));
    assert!(session.ask(&format!("LOCK.CHECK m {held}")).starts_with("[VALID, "));
}

#[test]
fn a_session_that_ends_while_redis_is_away_is_released_when_it_returns_or_with_its_lease() {
    let stack = Stack::start();
    let lease = Duration::from_secs(6);
    let (proxy, sidecar) = behind(&stack, b"", &["--lock-session-lease-ms", "6000"]);
    let mut redis = stack.backing();
    // Within the time for which a release is sent again, and longer.
    for away in [Duration::from_millis(800), Duration::from_millis(4_500)] {
        let mut session = sidecar.connect();
        acquire(&mut session, "l", "SESSION");
        let began = Instant::now();
        proxy.hold(Direction::Requests);
        drop(session);
        thread::sleep(away);
        assert_eq!(redis.ask("EXISTS l"), "1", "{away:?}: it could not be released");
        proxy.release();
        wait_until("it is free", || redis.ask("EXISTS l") == "0");
        let freed = began.elapsed();
        println!("away for {away:?}: free after {freed:?}");
        assert!(freed < lease + Duration::from_secs(1), "{away:?}: {freed:?}");
        assert!(away > Duration::from_secs(3) || freed < lease / 2, "{away:?}: {freed:?}");
    }
}

#[test]
fn tokens_grow_over_a_marker_that_is_older_in_the_same_redis() {
    let stack = Stack::start();
    let (mut client, mut redis) = (stack.connect(), stack.backing());
    let mut last = 0;
    let older = redis.ask("HGET holdfast:lock token");
    let changes = [format!("HSET holdfast:lock token {}", older.parse().unwrap_or(0_u64)), "HDEL holdfast:lock token".to_owned()];
    for change in [&changes[0], &changes[1], &changes[0]] {
        for _ in 0..3 {
            let next = acquire(&mut client, "l", "");
            assert!(next > last, "{change}: {next} after {last}");
            last = next;
            assert_eq!(client.ask(&format!("LOCK.RELEASE l {next}")), "[RELEASED]");
        }
        redis.ask(change);
        redis.ask("DEL redisson_lock_token:{l}");
    }
    let next = acquire(&mut client, "l", "");
    assert!(next > last, "{next} after {last}");
}

#[test]
fn tokens_grow_over_a_redis_that_is_older_and_over_a_postgres_that_is() {
    let mut stack = Stack::start();
    let mut last = 0;
    let mut next = |stack: &Stack, when: &str| {
        let mut client = stack.connect();
        let next = token(&client.until_not("LOCK.ACQUIRE l", "-"));
        assert!(next > last, "{when}: {next} after {last}");
        last = next;
        client.until(&format!("LOCK.RELEASE l {next}"), "[RELEASED]");
    };
    for round in 0..size(2, 10) {
        next(&stack, "before");
        let older = stack.redis.copy_of_data();
        (0..5).for_each(|_| next(&stack, "meanwhile"));
        stack.redis.kill();
        stack.redis.restart_from(&older);
        next(&stack, "an older Redis");
        // With one that knows it from before, and with one that has just been started.
        for restarted in [false, true] {
            let epoch = stack.postgres.value("SELECT epoch FROM holdfast.lock");
            stack.backing().ask("FLUSHALL");
            next(&stack, "an empty Redis");
            stack.postgres.execute(&format!("UPDATE holdfast.lock SET epoch = {epoch}"));
            match restarted {
                true => stack.restart_sidecar(),
                false => _ = stack.backing().ask("CLIENT KILL TYPE normal"),
            }
            next(&stack, &format!("an older Postgres, round {round}"));
        }
    }
}
