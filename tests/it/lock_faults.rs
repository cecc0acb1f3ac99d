//! LOCK: what is sent again, comes late, or is said while Redis is away, and what Redis and Postgres hold that is older than what was given out.

use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Client, Sidecar, Stack, wait_until};
use crate::locks::{acquire, metric, signal, size, token, waiters, waiting};
use crate::proxy::{Direction, Proxy};

/// A sidecar that reaches the stack's Redis through a proxy.
fn behind(stack: &Stack, marked: &'static [u8], flags: &[&str]) -> (Proxy, Sidecar) {
    let proxy = Proxy::start(stack.redis.port(), marked);
    let patient: &[&str] = if flags.contains(&"--reply-within-ms") { &[] } else { &["--reply-within-ms", "20000"] };
    let flags = [patient, flags].concat();
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

/// One is first in line, one does not wait, and one stands behind the first; of the three, Redis notes beside the lock only which came last.
#[test]
fn re_entries_whose_answers_are_lost_in_a_long_outage_count_once_each() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &[]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    let held = acquire(&mut client, "l", "OWNER o LEASE 600000");
    proxy.hold(Direction::Answers);
    let mut again = Vec::new();
    for (count_then, wait) in [(2, ""), (3, ""), (4, " WAIT 60000")] {
        again.push(waiting(&sidecar, &format!("LOCK.ACQUIRE l OWNER o LEASE 600000{wait}")));
        wait_until("it has run", || count(&mut redis, "l") == count_then);
    }
    proxy.cut();
    // Longer than it is remembered who acquired a lock that is not counted.
    thread::sleep(Duration::from_secs(6));
    proxy.release();
    for client in again {
        assert_eq!(token(&client.join().unwrap().1), held);
    }
    // One that was asked for by two names is given back once.
    wait_until("each counts once", || count(&mut redis, "l") == 4);
    thread::sleep(Duration::from_millis(500));
    for _ in 0..4 {
        assert_eq!(client.ask(&format!("LOCK.RELEASE l {held}")), "[RELEASED]");
    }
    assert_eq!(redis.ask("EXISTS l"), "0");
}

#[test]
fn a_re_entry_whose_client_has_gone_while_redis_was_away_is_given_back() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &["--reply-within-ms", "1000"]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    let held = acquire(&mut client, "l", "OWNER o LEASE 600000");
    let waiter = waiting(&sidecar, "LOCK.ACQUIRE l LEASE 600000 WAIT 60000");
    wait_until("somebody waits", || waiters(&mut client, "l") == 1);
    proxy.hold(Direction::Answers);
    let again = ["", " WAIT 2000"].map(|wait| waiting(&sidecar, &format!("LOCK.ACQUIRE l OWNER o LEASE 600000{wait}")));
    wait_until("both have run", || count(&mut redis, "l") == 3);
    proxy.cut();
    thread::sleep(Duration::from_secs(6));
    for client in again {
        let reply = client.join().unwrap().1;
        assert!(!reply.starts_with("[ACQUIRED"), "{reply}");
    }
    proxy.release();
    wait_until("what nobody got is given back", || count(&mut redis, "l") == 1);
    client.until(&format!("LOCK.RELEASE l {held}"), "[RELEASED]");
    assert!(token(&waiter.join().unwrap().1) > held);
}

#[test]
fn a_re_entry_that_came_while_redis_was_away_is_let_in_though_others_wait() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &[]);
    let (mut client, mut there) = (sidecar.connect(), sidecar.connect());
    let held = acquire(&mut client, "l", "OWNER o LEASE 600000");
    let waiter = waiting(&sidecar, "LOCK.ACQUIRE l LEASE 600000 WAIT 60000");
    wait_until("somebody waits", || waiters(&mut there, "l") == 1);
    proxy.hold(Direction::Answers);
    proxy.cut();
    // From now on nothing is even sent.
    wait_until("it is known", || there.ask("LOCK.INFO l").starts_with("-TRYAGAIN"));
    let again = waiting(&sidecar, "LOCK.ACQUIRE l OWNER o LEASE 600000 WAIT 60000");
    // Until its first try has been given up.
    thread::sleep(Duration::from_secs(4));
    proxy.release();
    assert_eq!(token(&again.join().unwrap().1), held);
    for _ in 0..2 {
        client.until(&format!("LOCK.RELEASE l {held}"), "[RELEASED]");
    }
    assert!(token(&waiter.join().unwrap().1) > held);
}

#[test]
fn a_new_connection_that_answers_nothing_is_given_up() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"CLIENT\r\n$2\r\nID", &[]);
    let mut client = sidecar.connect();
    proxy.silence(1);
    proxy.cut();
    wait_until("the new connection is silent", || proxy.left_to_silence() == 0);
    client.until_not("LOCK.ACQUIRE l", "-TRYAGAIN");
}

#[test]
fn a_lock_that_was_passed_on_while_its_answer_was_lost_is_held_for_nobody_no_longer_than_redis_is_away() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &["--lock-max-turn-ms", "10000"]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    // Within the time for which it is known by the release, and longer; the next is still there, or has gone.
    for (away_ms, wait_ms) in [(1_500, 60_000), (4_000, 3_000), (7_000, 60_000), (7_000, 3_000)] {
        let (held, waiter, releasing) = loop {
            let held = acquire(&mut client, "l", "LEASE 600000");
            let waiter = waiting(&sidecar, &format!("LOCK.ACQUIRE l LEASE 600000 WAIT {wait_ms}"));
            wait_until("somebody waits", || waiters(&mut client, "l") == 1);
            proxy.hold(Direction::Answers);
            let releasing = waiting(&sidecar, &format!("LOCK.RELEASE l {held}"));
            let mut left = String::new();
            wait_until("it has been released", || {
                left = redis.ask("HKEYS l");
                !left.ends_with(&format!(":{held}]"))
            });
            if left != "[]" {
                break (held, waiter, releasing);
            }
            // Whoever waits was just trying by itself: then it is passed on to nobody.
            proxy.release();
            releasing.join().unwrap();
            let next = token(&waiter.join().unwrap().1);
            client.until(&format!("LOCK.RELEASE l {next}"), "[RELEASED]");
        };
        proxy.cut();
        thread::sleep(Duration::from_millis(away_ms));
        proxy.release();
        let released = releasing.join().unwrap().1;
        assert!(released == "[RELEASED]" || away_ms > 3_000 && released.starts_with("-INDOUBT "), "{away_ms}: {released}");
        let reply = waiter.join().unwrap().1;
        if wait_ms > away_ms {
            let next = token(&reply);
            assert!(next > held, "{away_ms}");
            client.until(&format!("LOCK.RELEASE l {next}"), "[RELEASED]");
        } else {
            assert!(!reply.starts_with("[ACQUIRED"), "{away_ms}: {reply}");
        }
        wait_until("nobody holds it", || redis.ask("EXISTS l") == "0");
    }
}

#[test]
fn an_extension_that_redis_comes_to_too_late_does_nothing() {
    let stack = Stack::with_settings(&["--reply-within-ms", "300"]);
    let (mut client, mut redis) = (stack.connect(), stack.backing());
    let held = acquire(&mut client, "l", "LEASE 30000");
    // From now on Redis knows the script.
    assert_eq!(client.ask(&format!("LOCK.EXTEND l {held} 30000")), "[EXTENDED, 30000]");
    signal(stack.redis.pid(), "-STOP");
    let reply = client.ask(&format!("LOCK.EXTEND l {held} 600000"));
    thread::sleep(Duration::from_millis(1_500));
    signal(stack.redis.pid(), "-CONT");
    assert!(reply.starts_with("-INDOUBT ") || reply.starts_with("-TRYAGAIN "), "{reply}");
    client.until_not(&format!("LOCK.CHECK l {held}"), "-");
    let lasts: u64 = redis.ask("PTTL l").parse().unwrap();
    assert!(lasts <= 30_000, "{lasts}");
}

#[test]
fn a_release_of_several_that_loses_its_answer_counts_once_over_an_outage() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &[]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    // Shorter and longer than a release is remembered that is not counted.
    for away_ms in [0, 1_500, 6_000] {
        let held = acquire(&mut client, "l", "OWNER o LEASE 600000");
        assert_eq!(acquire(&mut client, "l", "OWNER o LEASE 600000"), held);
        proxy.hold(Direction::Answers);
        let releasing = waiting(&sidecar, &format!("LOCK.RELEASE l {held}"));
        wait_until("it has run", || count(&mut redis, "l") == 1);
        proxy.cut();
        thread::sleep(Duration::from_millis(away_ms));
        proxy.release();
        let reply = releasing.join().unwrap().1;
        assert_eq!(reply, "[RELEASED]", "{away_ms}");
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
fn a_session_that_ends_while_redis_is_away_is_released_when_it_returns() {
    let stack = Stack::start();
    // By its lease alone it would be free far later.
    let (proxy, sidecar) = behind(&stack, b"", &["--lock-session-lease-ms", "60000"]);
    let mut redis = stack.backing();
    for away in [Duration::from_millis(800), Duration::from_millis(4_500)] {
        let mut session = sidecar.connect();
        acquire(&mut session, "l", "SESSION");
        proxy.hold(Direction::Requests);
        drop(session);
        thread::sleep(away);
        assert_eq!(redis.ask("EXISTS l"), "1", "{away:?}: it could not be released");
        proxy.release();
        let returned = Instant::now();
        wait_until("it is free", || redis.ask("EXISTS l") == "0");
        println!("away for {away:?}: free {:?} after that", returned.elapsed());
        assert!(returned.elapsed() < Duration::from_secs(10), "{away:?}");
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

/// How often Redis has refused to write for want of replicas.
fn refusals(redis: &mut Client) -> u64 {
    let info = redis.ask("INFO errorstats");
    let count =
        info.split("errorstat_NOREPLICAS:count=").nth(1).map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
    count.map_or(0, |count| count.parse().unwrap())
}

/// Has Redis refuse what writes, before it starts it, until [`take_writes`].
fn refuse_writes(redis: &mut Client) {
    assert_eq!(redis.ask("CONFIG SET min-replicas-to-write 1"), "OK");
}

fn take_writes(redis: &mut Client) {
    assert_eq!(redis.ask("CONFIG SET min-replicas-to-write 0"), "OK");
}

#[test]
fn what_has_run_and_is_refused_when_it_is_sent_again_has_run() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"holdfast:owner:{l}", &["--lock-max-turn-ms", "10000"]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    let field = |redis: &mut Client| redis.ask("HKEYS l");
    // Loses the answer once it `has_run`, and has Redis refuse it when it is sent again.
    let refused_again = |redis: &mut Client, command: &str, has_run: &dyn Fn(&mut Client) -> bool| {
        proxy.hold(Direction::Answers);
        let asking = waiting(&sidecar, command);
        wait_until("it has run", || has_run(redis));
        refuse_writes(redis);
        let before = (refusals(redis), proxy.passed());
        proxy.cut();
        proxy.release();
        wait_until("it is refused", || refusals(redis) > before.0 && proxy.passed() > before.1);
        thread::sleep(Duration::from_millis(50));
        take_writes(redis);
        asking.join().unwrap().1
    };
    for round in 0..size(3, 30) {
        let held = token(&refused_again(&mut redis, "LOCK.ACQUIRE l LEASE 600000", &|redis| redis.ask("EXISTS l") == "1"));
        assert!(field(&mut redis).ends_with(&format!(":{held}]")), "round {round}");
        let extend = format!("LOCK.EXTEND l {held} 3000000");
        let extended = refused_again(&mut redis, &extend, &|redis| redis.ask("PTTL l").parse::<u64>().unwrap() > 600_000);
        assert_eq!(extended, "[EXTENDED, 3000000]", "round {round}");
        let waiter = waiting(&sidecar, "LOCK.ACQUIRE l LEASE 600000 WAIT 60000");
        wait_until("somebody waits", || waiters(&mut client, "l") == 1);
        let before = field(&mut redis);
        let release = format!("LOCK.RELEASE l {held}");
        assert_eq!(refused_again(&mut redis, &release, &|redis| redis.ask("HKEYS l") != before), "[RELEASED]", "round {round}");
        let reply = waiter.join().unwrap().1;
        // It was just trying by itself, and refused.
        if reply.starts_with("-TRYAGAIN ") {
            assert_eq!(redis.ask("EXISTS l"), "0", "round {round}: it is held for nobody");
            continue;
        }
        let release = format!("LOCK.RELEASE l {}", token(&reply));
        assert_eq!(refused_again(&mut redis, &release, &|redis| redis.ask("EXISTS l") == "0"), "[RELEASED]", "round {round}");
    }
}

#[test]
fn a_redis_that_refuses_writes_for_a_while_is_said_and_nothing_stays_locked_by_it() {
    let stack = Stack::with_settings(&["--reply-within-ms", "20000", "--lock-session-lease-ms", "60000"]);
    let (mut client, mut redis) = (stack.connect(), stack.backing());
    let held = acquire(&mut client, "l", "OWNER o LEASE 600000");
    let mut session = stack.connect();
    acquire(&mut session, "of-a-session", "SESSION");
    let waiter = waiting(&stack.sidecar, "LOCK.ACQUIRE l LEASE 600000 WAIT 60000");
    wait_until("somebody waits", || waiters(&mut client, "l") == 1);
    refuse_writes(&mut redis);
    // Surely not done.
    let own = [format!("LOCK.EXTEND l {held} 3000000"), format!("LOCK.RELEASE l {held}")];
    for command in ["LOCK.ACQUIRE free", "LOCK.ACQUIRE l OWNER o", &own[0], &own[1]] {
        let reply = client.ask(command);
        assert!(reply.starts_with("-TRYAGAIN Redis refused: ") && reply.contains("NOREPLICAS"), "{command}: {reply}");
    }
    assert_eq!((redis.ask("EXISTS free").as_str(), count(&mut redis, "l")), ("0", 1));
    assert!(client.ask(&format!("LOCK.CHECK l {held}")).starts_with("[VALID, "));
    // What nobody else would end is tried again.
    drop(session);
    let before = refusals(&mut redis);
    wait_until("it is refused, and tried again", || refusals(&mut redis) >= before + 4);
    assert_eq!(redis.ask("EXISTS l of-a-session"), "2");
    take_writes(&mut redis);
    wait_until("the session's is free", || redis.ask("EXISTS of-a-session") == "0");
    assert_eq!((count(&mut redis, "l"), client.ask(&format!("LOCK.RELEASE l {held}")).as_str()), (1, "[RELEASED]"));
    let reply = waiter.join().unwrap().1;
    // It may just have tried by itself, and been refused.
    if !reply.starts_with("-TRYAGAIN ") {
        let passed = token(&reply);
        assert!(passed > held);
        assert_eq!(client.ask(&format!("LOCK.RELEASE l {passed}")), "[RELEASED]");
    }
    wait_until("nothing stays locked", || redis.ask("EXISTS l of-a-session") == "0");
}

#[test]
fn an_extension_that_was_never_sent_ends_no_session() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &["--reply-within-ms", "500", "--lock-session-lease-ms", "60000"]);
    let mut session = sidecar.connect();
    let held = token(&session.until_not("LOCK.ACQUIRE l SESSION", "-"));
    // Nobody listens there.
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    proxy.lead_to(nowhere);
    proxy.cut();
    session.until_not("LOCK.INFO l", "[");
    let refused = session.ask(&format!("LOCK.EXTEND l {held} 1000"));
    assert!(refused.starts_with("-TRYAGAIN "), "{refused}");
    thread::sleep(Duration::from_millis(1_500));
    proxy.lead_to(stack.redis.port());
    assert!(session.until_not(&format!("LOCK.CHECK l {held}"), "-").starts_with("[VALID, "));
    assert_eq!(metric(&sidecar, "holdfast_lock_lost_total"), 0.0);
}

#[test]
fn a_release_that_was_never_sent_is_not_done_later() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &["--reply-within-ms", "500"]);
    let (mut client, mut redis) = (sidecar.connect(), stack.backing());
    let held = token(&client.until_not("LOCK.ACQUIRE l OWNER o LEASE 600000", "-"));
    assert_eq!(token(&client.until_not("LOCK.ACQUIRE l OWNER o LEASE 600000", "-")), held);
    let release = format!("LOCK.RELEASE l {held}");
    let returned = |client: &mut Client, redis: &mut Client, after: &str| {
        assert!(client.until_not(&format!("LOCK.CHECK l {held}"), "-").starts_with("[VALID, "), "{after}");
        // What had waited for it would have run by now.
        thread::sleep(Duration::from_millis(500));
        assert_eq!(count(redis, "l"), 2, "{after}");
    };
    // Nobody listens there.
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    proxy.lead_to(nowhere);
    proxy.cut();
    client.until_not("LOCK.INFO l", "[");
    for _ in 0..3 {
        let refused = client.ask(&release);
        assert!(refused.starts_with("-TRYAGAIN "), "{refused}");
    }
    proxy.lead_to(stack.redis.port());
    returned(&mut client, &mut redis, "a cut link");
    // It goes to a Redis that cannot write any more, and is there again only after its client has gone.
    redis.ask("REPLICAOF 127.0.0.1 1");
    for _ in 0..3 {
        let refused = client.ask(&release);
        assert!(refused.starts_with("-TRYAGAIN ") || refused.starts_with("-INDOUBT "), "{refused}");
    }
    redis.ask("REPLICAOF NO ONE");
    returned(&mut client, &mut redis, "a replica");
    assert_eq!(client.ask(&release), "[RELEASED]");
    assert_eq!(count(&mut redis, "l"), 1);
}

#[test]
fn what_a_session_may_hold_after_it_was_told_of_its_loss_is_released() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &["--reply-within-ms", "500", "--lock-session-lease-ms", "1000"]);
    let (mut session, mut redis) = (sidecar.connect(), stack.backing());
    let held = token(&session.until_not("LOCK.ACQUIRE l SESSION", "-"));
    // It is given far more than anybody waits here, and whether it was is not known before its lease may have ended.
    proxy.hold(Direction::Answers);
    let reply = session.ask(&format!("LOCK.EXTEND l {held} 3000000"));
    assert!(reply.starts_with("-INDOUBT "), "{reply}");
    wait_until("it has run", || redis.ask("PTTL l").parse::<i64>().unwrap() > 2_000_000);
    wait_until("it is lost", || metric(&sidecar, "holdfast_lock_lost_total") == 1.0);
    proxy.release();
    wait_until("it is free", || redis.ask("EXISTS l") == "0");
    assert_eq!(session.until_not(&format!("LOCK.CHECK l {held}"), "-"), "[LOST]");
}

#[test]
fn a_release_that_redis_refuses_for_a_moment_leaves_who_waits_in_line() {
    let stack = Stack::with_settings(&["--reply-within-ms", "20000", "--lock-max-turn-ms", "10000"]);
    let (mut client, mut redis) = (stack.connect(), stack.backing());
    // Whoever waits also looks by itself, and is refused: the moment has to be between two looks.
    wait_until("the release alone is refused", || {
        let held = acquire(&mut client, "l", "LEASE 600000");
        let release = format!("LOCK.RELEASE l {held}");
        let waiter = waiting(&stack.sidecar, "LOCK.ACQUIRE l LEASE 600000 WAIT 60000");
        wait_until("somebody waits", || waiters(&mut client, "l") == 1);
        thread::sleep(Duration::from_millis(30));
        refuse_writes(&mut redis);
        let refused = client.ask(&release);
        assert!(refused.starts_with("-TRYAGAIN Redis refused: "), "{refused}");
        // Long enough for whatever it has set off.
        thread::sleep(Duration::from_millis(50));
        take_writes(&mut redis);
        let waits = waiters(&mut client, "l") == 1;
        assert_eq!(client.ask(&release), "[RELEASED]");
        let reply = waiter.join().unwrap().1;
        if waits {
            assert_eq!(client.ask(&format!("LOCK.RELEASE l {}", token(&reply))), "[RELEASED]");
        }
        waits
    });
}

/// A lock for which somebody waits.
struct Awaited {
    name: String,
    held: u64,
    waiter: thread::JoinHandle<(Client, String)>,
}

/// Acquires locks through the stack's own sidecar for which clients of the other one wait then: each of them has looked, and wants to hear of it.
fn awaited(stack: &Stack, sidecar: &Sidecar) -> Vec<Awaited> {
    let (mut client, mut there) = (stack.connect(), sidecar.connect());
    let names: Vec<String> = (0..10).map(|number| format!("awaited-{number}")).collect();
    let tokens: Vec<u64> = names.iter().map(|name| acquire(&mut client, name, "LEASE 600000")).collect();
    let waits: Vec<_> = names.iter().map(|name| waiting(sidecar, &format!("LOCK.ACQUIRE {name} LEASE 600000 WAIT 60000"))).collect();
    wait_until("all wait", || names.iter().all(|name| waiters(&mut there, name) == 1));
    thread::sleep(Duration::from_millis(200));
    names.into_iter().zip(tokens).zip(waits).map(|((name, held), waiter)| Awaited { name, held, waiter }).collect()
}

#[test]
fn a_subscription_that_hangs_keeps_no_line_from_looking() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &[]);
    let mut client = stack.connect();
    proxy.hold_subscribers();
    let awaited = awaited(&stack, &sidecar);
    for Awaited { name, held, .. } in &awaited {
        assert_eq!(client.ask(&format!("LOCK.RELEASE {name} {held}")), "[RELEASED]");
    }
    let released = Instant::now();
    for Awaited { name, held, waiter } in awaited {
        assert!(token(&waiter.join().unwrap().1) > held, "{name}");
    }
    // By looking: a quarter of a second. One time-out after the other it would be ten seconds.
    println!("all had theirs {:?} after the release", released.elapsed());
    assert!(released.elapsed() < Duration::from_secs(3), "{:?}", released.elapsed());
}

#[test]
fn a_subscription_that_hangs_ends_no_session() {
    let stack = Stack::start();
    let (proxy, sidecar) = behind(&stack, b"", &["--lock-session-lease-ms", "1000"]);
    let (mut client, mut session, mut redis) = (stack.connect(), sidecar.connect(), stack.backing());
    let kept = acquire(&mut session, "kept", "SESSION");
    // A line that is left, to be forgotten while the subscription hangs.
    let held = acquire(&mut client, "left", "LEASE 600000");
    let waiter = waiting(&sidecar, "LOCK.ACQUIRE left LEASE 600000 WAIT 60000");
    wait_until("that sidecar listens", || redis.ask("PUBSUB NUMSUB redisson_lock__channel:{left}").ends_with(" 1]"));
    assert_eq!(client.ask(&format!("LOCK.RELEASE left {held}")), "[RELEASED]");
    let (mut waiter, reply) = waiter.join().unwrap();
    assert_eq!(waiter.ask(&format!("LOCK.RELEASE left {}", token(&reply))), "[RELEASED]");
    thread::sleep(Duration::from_secs(4));
    proxy.hold_subscribers();
    let _awaited = awaited(&stack, &sidecar);
    // It is forgotten five seconds after it was left; then a lease ends.
    thread::sleep(Duration::from_secs(5));
    assert!(session.ask(&format!("LOCK.CHECK kept {kept}")).starts_with("[VALID, "));
    assert_eq!(metric(&sidecar, "holdfast_lock_lost_total"), 0.0);
}
