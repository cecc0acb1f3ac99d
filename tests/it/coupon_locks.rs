//! The lock under which a coupon is issued, shared with services that use Redisson: in turns, and with fencing tokens.
//!
//! The sizes are small; HOLDFAST_LOCKS=full makes them those of the promises.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::harness::{Client, PATIENCE, Sidecar, Stack, wait_until};
use crate::proxy::{Direction, Proxy};

/// So many in CI, so many where HOLDFAST_LOCKS=full asks for it.
fn size(short: usize, full: usize) -> usize {
    if std::env::var("HOLDFAST_LOCKS").is_ok_and(|size| size == "full") { full } else { short }
}

/// A metric's value, 0 where it is not there.
fn metric(sidecar: &Sidecar, name: &str) -> f64 {
    let (_, text) = sidecar.get("/metrics");
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap_or(0.0)
}

/// How often this sidecar's clients, and it itself, acquired a lock.
fn acquired(sidecar: &Sidecar) -> f64 {
    let (_, text) = sidecar.get("/metrics");
    let lines = text.lines().filter_map(|line| line.strip_prefix("holdfast_lock_acquired_total{")?.split(' ').nth(1)?.parse::<f64>().ok());
    lines.sum()
}

fn signal(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// Clients that each issue to one user after the other, until they are stopped.
struct Load {
    stop: Arc<AtomicBool>,
    issued: Arc<AtomicUsize>,
    /// The user that each waits for.
    users: Arc<Mutex<Vec<String>>>,
    clients: Vec<JoinHandle<Vec<(String, String)>>>,
}

impl Load {
    fn start(sidecar: &Sidecar, coupon: &'static str, clients: usize) -> Self {
        let (stop, issued) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let users = Arc::new(Mutex::new(vec![String::new(); clients]));
        let start = |number: usize| {
            let (mut client, stop, issued, users) = (sidecar.connect(), Arc::clone(&stop), Arc::clone(&issued), Arc::clone(&users));
            thread::spawn(move || {
                let mut replies = Vec::new();
                while !stop.load(SeqCst) {
                    let user = format!("u-{number}-{}", replies.len());
                    users.lock().unwrap()[number].clone_from(&user);
                    let reply = client.ask(&format!("COUPON.ISSUE {coupon} {user}"));
                    issued.fetch_add(1, SeqCst);
                    replies.push((user, reply));
                }
                replies
            })
        };
        Self { clients: (0..clients).map(start).collect(), stop, issued, users }
    }

    fn count(&self) -> usize {
        self.issued.load(SeqCst)
    }

    /// Every user with what was answered.
    fn end(self) -> Vec<(String, String)> {
        self.stop.store(true, SeqCst);
        self.clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    }
}

/// What a Java service does: the scripts of Redisson's RLock, and its channel.
struct Java {
    redis: Client,
    listening: Client,
    name: String,
}

const ACQUIRE: &str = "if redis.call('exists', KEYS[1]) == 0 then redis.call('hincrby', KEYS[1], ARGV[2], 1) \
    redis.call('pexpire', KEYS[1], ARGV[1]) return 'yes' end return 'no'";
const RELEASE: &str = "redis.call('del', KEYS[1]) redis.call('publish', KEYS[2], '0') return 'done'";

impl Java {
    fn new(stack: &Stack, coupon: &str) -> Self {
        let name = format!("coupon:issue:{coupon}");
        let mut listening = stack.backing();
        listening.send(&["SUBSCRIBE", &format!("redisson_lock__channel:{{{name}}}")]);
        listening.receive();
        Self { redis: stack.backing(), listening, name }
    }

    fn try_lock(&mut self) -> bool {
        self.redis.ask_words(&["EVAL", ACQUIRE, "1", &self.name, "60000", "5ad7e6c4:1"]) == "yes"
    }

    /// Waits as RLock does: a try, then a message before the next.
    fn lock(&mut self) {
        while !self.try_lock() {
            self.listening.receive();
        }
    }

    fn unlock(&mut self) {
        let channel = format!("redisson_lock__channel:{{{}}}", self.name);
        self.redis.ask_words(&["EVAL", RELEASE, "2", &self.name, &channel]);
    }
}

fn holder(redis: &mut Client, coupon: &str) -> String {
    redis.ask(&format!("HKEYS coupon:issue:{coupon}"))
}

#[test]
fn all_that_wait_are_issued_under_one_holding_and_its_token_reaches_postgres() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 1000000");
    assert!(client.ask("COUPON.ISSUE c first").starts_with("[ISSUED, 1, "));
    let mut redis = stack.backing();
    wait_until("it is given back when nobody issues", || holder(&mut redis, "c") == "[]");
    let before = acquired(&stack.sidecar);
    let load = Load::start(&stack.sidecar, "c", 20);
    wait_until("many are issued, and a turn has ended", || load.count() > 2_000 && acquired(&stack.sidecar) - before >= 2.0);
    let replies = load.end();
    let turns = acquired(&stack.sidecar) - before;
    assert!(replies.iter().all(|(_, reply)| reply.starts_with("[ISSUED, ")));
    assert!(turns >= 2.0 && turns * 10.0 < replies.len() as f64, "{} issues in {turns} turns", replies.len());
    stack.wait_until_applied();
    let tokens = "SELECT count(DISTINCT token) || ' ' || count(*) FILTER (WHERE token IS NULL) || ' ' || (max(token) = max(last_token)) \
                  FROM holdfast.coupon_ledger JOIN holdfast.coupon USING (coupon_id) WHERE kind = 'issue'";
    let said = stack.postgres.value(tokens);
    let distinct: f64 = said.split(' ').next().unwrap().parse().unwrap();
    assert!(distinct >= 2.0 && distinct <= turns + 1.0 && said.ends_with(" 0 true"), "{said} of {turns} turns");
    let backwards = "SELECT count(*) FROM (SELECT token < lag(token) OVER (ORDER BY n) AS less FROM holdfast.coupon_ledger \
                     WHERE kind = 'issue') t WHERE less";
    assert_eq!(stack.postgres.value(backwards), "0");
}

#[test]
fn a_turn_follows_another_without_a_release_as_long_as_nobody_waits() {
    // Each batch would have a turn of its own, or two of them one.
    let stack = Stack::with_settings(&["--lock-max-turn-ms", "0"]);
    stack.connect().ok("COUPON.CREATE c 1000000");
    let load = Load::start(&stack.sidecar, "c", 20);
    let most = "SELECT coalesce(max(issues), 0) > 60 FROM (SELECT count(*) AS issues FROM holdfast.coupon_ledger WHERE kind = 'issue' \
                GROUP BY token) AS holdings";
    wait_until("more is issued under a holding than 20 clients wait for at a time", || stack.postgres.value(most) == "true");
    assert!(load.end().iter().all(|(_, reply)| reply.starts_with("[ISSUED, ")));
}

#[test]
fn who_only_tries_for_the_lock_of_a_coupon_gets_it_too() {
    let stack = Stack::start();
    stack.connect().ok("COUPON.CREATE c 1000000");
    let load = Load::start(&stack.sidecar, "c", 10);
    let mut java = Java::new(&stack, "c");
    java.listening.send(&["UNSUBSCRIBE"]);
    wait_until("it is issued", || load.count() > 100);
    for _ in 0..3 {
        let began = Instant::now();
        while !java.try_lock() {
            assert!(began.elapsed() < PATIENCE, "it is never free");
            thread::sleep(Duration::from_millis(1));
        }
        java.unlock();
    }
    assert!(load.end().iter().all(|(_, reply)| reply.starts_with("[ISSUED, ")));
}

#[test]
fn issues_of_coupons_that_do_not_exist_leave_nothing_in_redis() {
    let stack = Stack::start();
    let (mut client, mut redis) = (stack.connect(), stack.backing());
    for number in 0..50 {
        let reply = client.ask(&format!("COUPON.ISSUE nowhere-{number} u"));
        assert_eq!(reply, format!("-NOTFOUND no coupon 'nowhere-{number}'"));
    }
    assert_eq!(redis.ask("KEYS *nowhere*"), "[]");
    // It exists by the time the next is asked for.
    for command in ["COUPON.ISSUE c u", "COUPON.CREATE c 5", "COUPON.ISSUE c u"] {
        client.send(&command.split(' ').collect::<Vec<_>>());
    }
    let replies = [client.receive(), client.receive(), client.receive()];
    assert_eq!(replies[0], "-NOTFOUND no coupon 'c'");
    assert!(replies[1].starts_with("[OK, ") && replies[2].starts_with("[ISSUED, 1, 4, "), "{replies:?}");
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.coupon_ledger WHERE kind = 'issue' AND token > 4294967296"), "1");
}

#[test]
fn a_java_service_stops_issuing_and_gets_its_turn_in_both_modes() {
    for mode in ["held", "elide"] {
        let stack = Stack::with_settings(&["--coupon-lock", mode, "--reply-within-ms", "20000"]);
        stack.connect().ok("COUPON.CREATE c 1000000");
        let load = Load::start(&stack.sidecar, "c", 10);
        let mut java = Java::new(&stack, "c");
        let mut redis = stack.backing();
        let (mut waits, mut resumed) = (Vec::new(), Vec::new());
        for round in 0..size(20, 200) {
            let before = load.count();
            let began = Instant::now();
            java.lock();
            waits.push(began.elapsed());
            let issued = redis.ask("HGET coupon:info:c issued");
            thread::sleep(Duration::from_millis(3));
            assert_eq!(redis.ask("HGET coupon:info:c issued"), issued, "{mode}, round {round}: issued under another's lock");
            let count = load.count();
            java.unlock();
            let unlocked = Instant::now();
            while load.count() == count && unlocked.elapsed() < Duration::from_secs(30) {
                thread::sleep(Duration::from_millis(1));
            }
            resumed.push(unlocked.elapsed());
            wait_until("issuing goes on", || load.count() > before + 10);
        }
        waits.sort();
        resumed.sort();
        // A turn takes 20 ms; and nobody polls for a quarter of a second.
        let (waited, resumed) = (waits[waits.len() / 2], resumed[resumed.len() / 2]);
        assert!(waited < Duration::from_millis(120) && resumed < Duration::from_millis(120), "{mode}: {waited:?} {resumed:?}");
        println!("{mode}: a Java service waits {:?} for its turn, {:?} at most", waits[waits.len() / 2], waits[waits.len() - 1]);
        assert!(load.end().iter().all(|(_, reply)| reply.starts_with("[ISSUED, ")));
    }
}

#[test]
fn two_sidecars_issue_in_turns_and_neither_starves() {
    let stack = Stack::start();
    let other = Sidecar::start(&stack.redis.url(), &stack.postgres.url);
    wait_until("the second sidecar issues", || other.get("/readyz").0 == 200);
    stack.connect().ok("COUPON.CREATE c 1000000");
    let loads = [Load::start(&stack.sidecar, "c", 8), Load::start(&other, "c", 8)];
    wait_until("both have issued", || loads.iter().all(|load| load.count() > size(300, 5_000)));
    let counts = loads.each_ref().map(Load::count);
    assert!(counts.iter().all(|count| count * 4 > counts.iter().sum::<usize>() / 2), "{counts:?}");
    let replies: Vec<_> = loads.into_iter().flat_map(Load::end).collect();
    // The users of both are the same: each is issued to once.
    let issued = replies.iter().filter(|(_, reply)| reply.starts_with("[ISSUED, ")).count();
    let users: BTreeSet<&str> = replies.iter().map(|(user, _)| user.as_str()).collect();
    assert_eq!(issued, users.len());
    stack.wait_until_applied();
    assert_eq!(
        stack.postgres.value("SELECT count(DISTINCT user_id) || ' ' || count(*) FROM holdfast.coupon_issue"),
        format!("{issued} {issued}")
    );
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
}

#[test]
fn an_issue_under_a_token_of_before_is_refused_and_issued_under_a_new_one() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 1000000");
    let load = Load::start(&stack.sidecar, "c", 10);
    let mut redis = stack.backing();
    for _ in 0..size(20, 200) {
        // As if its lease had ended.
        wait_until("it is held", || redis.ask("DEL coupon:issue:c") == "1");
        let before = load.count();
        wait_until("it goes on", || load.count() > before + 20);
    }
    assert!(metric(&stack.sidecar, "holdfast_lock_fenced_total") >= size(5, 50) as f64);
    assert!(load.end().iter().all(|(_, reply)| reply.starts_with("[ISSUED, ")));
}

#[test]
fn what_stands_behind_an_issue_that_is_sent_back_comes_behind_it_again() {
    use std::io::{Read as _, Write as _};
    let stack = Stack::start();
    let (mut client, mut redis, mut pipeline) = (stack.connect(), stack.backing(), stack.sidecar.raw());
    client.ok("COUPON.CREATE c 1000000");
    for round in 0..size(100, 1_000) {
        assert!(client.ask(&format!("COUPON.ISSUE c a-{round}")).starts_with("[ISSUED, "));
        // As if its lease had ended, before the next batch.
        redis.ask("DEL coupon:issue:c");
        pipeline.write_all(format!("COUPON.ISSUE c b-{round}\r\nCOUPON.USE c b-{round}\r\n").as_bytes()).unwrap();
        let mut text = String::new();
        while text.matches('*').count() < 2 || !text.ends_with("\r\n") || !(text.contains("\r\nUSED") || text.contains("NOTISSUED")) {
            let mut some = [0; 256];
            let read = pipeline.read(&mut some).unwrap();
            assert_ne!(read, 0, "{text}");
            text.push_str(std::str::from_utf8(&some[..read]).unwrap());
        }
        assert!(text.contains("\r\nUSED\r\n"), "round {round}: {text}");
    }
    let fenced = metric(&stack.sidecar, "holdfast_lock_fenced_total");
    assert!(fenced >= size(5, 50) as f64, "{fenced}");
}

/// One sidecar holds the coupon's lock, its next batch is on its way, and it is stopped for twice the lease, while another issues, to some
/// of the same users. What then arrives late is refused by its token: by Redis; where that is switched off, by Postgres.
#[test]
fn a_holder_that_was_stopped_issues_nothing_late() {
    let by_postgres = holdfast::sabotage::breaks("no-coupon-token");
    let rounds = size(3, 200);
    let stack = Stack::start();
    let proxy = Proxy::start(stack.redis.port(), b"");
    let stopped = Sidecar::start(&proxy.redis_url(), &stack.postgres.url);
    wait_until("the second sidecar issues", || stopped.get("/readyz").0 == 200);
    let (mut client, mut redis) = (stack.connect(), stack.backing());
    client.ok("COUPON.CREATE c 100000000");
    let load = Load::start(&stopped, "c", 20);
    let mut elsewhere = BTreeMap::new();
    let by_token = "SELECT count(*) FROM holdfast.dead_letter WHERE reason LIKE '%fencing token%'";
    let refused = || match by_postgres {
        true => stack.postgres.value(by_token).parse().unwrap(),
        false => metric(&stopped, "holdfast_lock_fenced_total"),
    };
    let mut stops = 0;
    // What is kept back may have been a release: then there is nothing to refuse, and it is stopped once more.
    while stops < rounds || (refused() * 2.0 < rounds as f64 && stops < 10 * rounds) {
        stops += 1;
        let before = load.count();
        wait_until("it issues", || load.count() > before + 100);
        // Until what is kept back is a batch, and not an acquisition: the lock is held then, and nothing more arrives.
        wait_until("a batch of the holder is on its way", || {
            proxy.hold(Direction::Requests);
            let (count, held) = (load.count(), holder(&mut redis, "c") != "[]");
            thread::sleep(Duration::from_millis(20));
            let stuck = held && load.count() == count && holder(&mut redis, "c") != "[]";
            if !stuck {
                proxy.release();
            }
            stuck
        });
        signal(stopped.pid(), "-STOP");
        let began = Instant::now();
        let waiting = load.users.lock().unwrap().clone();
        for user in waiting.iter().step_by(2) {
            let reply = client.ask(&format!("COUPON.ISSUE c {user}"));
            // It may have been issued before, and only the reply be kept back.
            if reply.starts_with("[ALREADY, ") {
                continue;
            }
            assert!(reply.starts_with("[ISSUED, "), "{reply}");
            elsewhere.insert(user.clone(), reply);
        }
        thread::sleep(Duration::from_secs(2).saturating_sub(began.elapsed()));
        signal(stopped.pid(), "-CONT");
        proxy.release();
    }
    let before = load.count();
    wait_until("it goes on", || load.count() > before + 100);
    let fenced = metric(&stopped, "holdfast_lock_fenced_total");
    let mut replies = load.end();
    replies.retain(|(user, reply)| !(reply.starts_with("[ALREADY, ") && elsewhere.contains_key(user)));
    replies.extend(elsewhere);
    let serial = |reply: &str| reply.split(", ").nth(1).unwrap().parse::<u64>().unwrap();
    let serials: BTreeSet<u64> = replies.iter().map(|(_, reply)| serial(reply)).collect();
    let users: BTreeSet<&str> = replies.iter().map(|(user, _)| user.as_str()).collect();
    assert!(replies.iter().all(|(_, reply)| reply.starts_with("[ISSUED, ")));
    assert_eq!((serials.len(), users.len()), (replies.len(), replies.len()), "no serial and no user twice");
    stack.wait_until_applied();
    let letters: usize = stack.postgres.value(by_token).parse().unwrap();
    let all: usize = stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter").parse().unwrap();
    let issued = stack.postgres.value("SELECT count(DISTINCT user_id) || ' ' || count(*) FROM holdfast.coupon_issue");
    println!("{stops} stops: {} issued, {fenced} refused by Redis, {letters} by Postgres", replies.len());
    assert_eq!(letters, all);
    assert_eq!(issued, format!("{0} {0}", replies.len() - letters));
    if by_postgres {
        assert!(letters * 2 >= rounds && fenced == 0.0, "{letters} {fenced}");
    } else {
        assert!(fenced * 2.0 >= rounds as f64 && letters == 0, "{fenced} {letters}");
    }
}

#[test]
fn a_killed_holder_keeps_others_out_no_longer_than_its_lease() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("COUPON.CREATE c 1000000");
    for _ in 0..size(2, 20) {
        let mut killed = Sidecar::start(&stack.redis.url(), &stack.postgres.url);
        wait_until("the second sidecar issues", || killed.get("/readyz").0 == 200);
        let _clients: Vec<_> = (0..8)
            .map(|number| {
                let mut client = killed.raw();
                use std::io::Write as _;
                let users = (0..2_000).map(|user| format!("COUPON.ISSUE c k-{}-{number}-{user}\r\n", killed.pid()));
                client.write_all(users.collect::<String>().as_bytes()).unwrap();
                client
            })
            .collect();
        let mut redis = stack.backing();
        wait_until("it holds the lock", || holder(&mut redis, "c") != "[]");
        killed.kill();
        let began = Instant::now();
        assert!(client.ask(&format!("COUPON.ISSUE c after-{}", killed.pid())).starts_with("[ISSUED, "));
        assert!(began.elapsed() < Duration::from_millis(1_500), "{:?}", began.elapsed());
    }
}

/// Replies to what one client has sent over one connection.
fn replies<const N: usize>(client: &mut Client) -> [String; N] {
    [(); N].map(|()| client.receive())
}

#[test]
fn what_stands_behind_an_issue_that_waits_comes_behind_it_in_both_modes() {
    for mode in ["held", "elide"] {
        let stack = Stack::with_settings(&["--coupon-lock", mode, "--reply-within-ms", "20000"]);
        let (mut client, mut other) = (stack.connect(), stack.connect());
        client.ok("COUPON.CREATE c 1000000");
        let mut java = Java::new(&stack, "c");
        for round in 0..size(20, 200) {
            assert!(client.ask(&format!("COUPON.ISSUE c old-{round}")).starts_with("[ISSUED, "));
            java.lock();
            // In one batch, and in one that follows.
            for command in ["COUPON.ISSUE c u-", "COUPON.USE c u-", "COUPON.ISSUE c v-"] {
                client.send(&format!("{command}{round}").split(' ').collect::<Vec<_>>());
            }
            thread::sleep(Duration::from_millis(round as u64 % 12));
            for command in [
                "COUPON.REVOKE c v-{} ACK redis",
                "COUPON.ALTER c END 1 ACK redis",
                "COUPON.USE c old-{}",
                "COUPON.ALTER c END 0 ACK redis",
            ] {
                client.send(&command.replace("{}", &round.to_string()).split(' ').collect::<Vec<_>>());
            }
            // Another client's do not wait for that.
            assert_eq!(other.ask("COUPON.USE c nobody"), "[NOTISSUED]", "{mode}, round {round}");
            assert!(other.ask("COUPON.ALTER c TOTAL 1000000 ACK redis").starts_with("[OK, "), "{mode}, round {round}");
            // All of it is tried again meanwhile, in one batch.
            thread::sleep(Duration::from_millis(20));
            java.unlock();
            let replies: [String; 7] = replies(&mut client);
            for (reply, word) in replies.iter().zip(["[ISSUED, ", "[USED, ", "[ISSUED, ", "[REVOKED, ", "[OK, ", "[ENDED, ", "[OK, "]) {
                assert!(reply.starts_with(word), "{mode}, round {round}: {replies:?}");
            }
        }
        assert_eq!(metric(&stack.sidecar, "holdfast_lock_fenced_total"), 0.0, "{mode}: another's lock is not one that was lost");
    }
}

#[test]
fn an_issue_that_waits_holds_up_nothing_of_other_users_over_the_same_connection() {
    for mode in ["held", "elide"] {
        let stack = Stack::with_settings(&["--coupon-lock", mode, "--reply-within-ms", "500"]);
        let mut client = stack.connect();
        client.ok("COUPON.CREATE c 1000000");
        assert!(client.until_not("COUPON.ISSUE c had", "-").starts_with("[ISSUED, "));
        let mut java = Java::new(&stack, "c");
        java.lock();
        let commands = ["ISSUE c u", "USE c had", "USE c u", "UNUSE c had", "REVOKE c had ACK redis"];
        for command in commands {
            client.send(&format!("COUPON.{command}").split(' ').collect::<Vec<_>>());
        }
        let replies: [String; 5] = replies(&mut client);
        for (reply, word) in replies.iter().zip(["-TRYAGAIN the lock ", "[USED, ", "", "[ISSUED, ", "[REVOKED, "]) {
            assert!(reply.starts_with(word), "{mode}: {replies:?}");
        }
        assert!(!replies[2].starts_with("[USED, "), "{mode}: {replies:?}");
        java.unlock();
    }
}

/// The last piece of a load, and issues to those who have the coupon by it, go in one batch.
#[test]
fn nobody_is_issued_a_coupon_twice_while_it_is_loaded_in_pieces() {
    let stack = Stack::start();
    stack.postgres.execute(
        "INSERT INTO holdfast.coupon (coupon_id, total, issued, used, per_user, last_serial, state)
         SELECT 'pg-' || c, 9000, 4000, 0, 1, 4000, 'active' FROM generate_series(1, 20) c;
         INSERT INTO holdfast.coupon_issue (coupon_id, serial, user_id, state, issued_at)
         SELECT 'pg-' || c, n, 'u-' || n, 'issued', now() FROM generate_series(1, 4000) n, generate_series(1, 20) c",
    );
    for mode in ["elide", "held"] {
        let proxy = Proxy::start(stack.redis.port(), b"");
        let sidecar =
            Sidecar::with_settings(&proxy.redis_url(), &stack.postgres.url, &["--coupon-lock", mode, "--reply-within-ms", "5000"]);
        wait_until("it issues", || sidecar.get("/readyz").0 == 200);
        // So that what is asked for meanwhile gathers behind every batch.
        proxy.slow_down(Duration::from_millis(2));
        // Each asks once: what a client sends behind what the coupon is loaded for waits for that, and would not come behind the last piece.
        let mut clients: Vec<Vec<Client>> = (0..8).map(|_| (0..50).map(|_| sidecar.connect()).collect()).collect();
        for coupon in 1..=size(5, 20) {
            stack.backing().ask(&format!("DEL coupon:info:pg-{coupon} coupon:users:pg-{coupon}"));
            thread::scope(|scope| {
                for (number, clients) in clients.iter_mut().enumerate() {
                    scope.spawn(move || {
                        let users = number * 500 + 1..;
                        for (user, client) in users.clone().zip(clients.iter_mut()) {
                            client.send(&format!("COUPON.ISSUE pg-{coupon} u-{user}").split(' ').collect::<Vec<_>>());
                            thread::sleep(Duration::from_millis(2));
                        }
                        for (user, client) in users.zip(clients) {
                            let reply = client.receive();
                            assert!(reply.starts_with("[ALREADY, ") || reply.starts_with("-TRYAGAIN "), "user {user}: {reply}");
                        }
                    });
                }
            });
            assert_eq!(stack.backing().ask(&format!("HGET coupon:info:pg-{coupon} issued")), "4000", "{mode}");
        }
    }
}

#[test]
fn thousands_that_wait_for_one_coupon_neither_refuse_nor_delay_another() {
    use std::io::Write as _;
    for mode in ["elide", "held"] {
        let stack = Stack::with_settings(&["--coupon-lock", mode, "--reply-within-ms", "20000", "--threads", "1"]);
        let (mut client, mut redis) = (stack.connect(), stack.backing());
        for coupon in ["a", "b"] {
            client.ok(&format!("COUPON.CREATE {coupon} 1000000"));
        }
        let mut java = Java::new(&stack, "a");
        java.lock();
        let many: Vec<_> = (0..6)
            .map(|number| {
                let mut many = stack.sidecar.raw();
                many.write_all((0..1_000).map(|user| format!("COUPON.ISSUE a u-{number}-{user}\r\n")).collect::<String>().as_bytes())
                    .unwrap();
                many
            })
            .collect();
        wait_until("thousands wait", || {
            let list = client.ask("CLIENT LIST");
            let waiting = list.split(" oll=").skip(1).map(|rest| rest.split(' ').next().unwrap().parse::<usize>().unwrap());
            waiting.sum::<usize>() >= 6_000
        });
        let mut longest = Duration::ZERO;
        for user in 0..200 {
            let began = Instant::now();
            let reply = client.ask(&format!("COUPON.ISSUE b u-{user}"));
            longest = longest.max(began.elapsed());
            assert!(reply.starts_with("[ISSUED, "), "{mode}: {reply}");
        }
        println!("{mode}: the longest of another coupon's issues took {longest:?}");
        assert!(longest < Duration::from_secs(1), "{mode}: {longest:?}");
        assert_eq!(redis.ask("HGET coupon:info:a issued"), "0");
        java.unlock();
        wait_until("all are issued once it is free", || redis.ask("HGET coupon:info:a issued") == "6000");
        drop(many);
    }
}
