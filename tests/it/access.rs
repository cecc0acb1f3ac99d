//! Who gets in, what each may do, and that no secret gets out.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Database, PATIENCE, Sidecar, Stack, wait_until};
use crate::servers::RedisServer;

/// The password of every user here.
const PASSWORD: &str = "s3cret-canary";

/// A file that goes away with the test.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("holdfast-{name}-{}-{:?}", std::process::id(), std::thread::current().id()));
        let file = Self(path);
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.0, text).unwrap();
        assert!(Command::new("chmod").arg("600").arg(&self.0).status().unwrap().success());
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn hash() -> String {
    let sum = Command::new("sh").args(["-c", &format!("printf %s {PASSWORD} | sha256sum")]).output().unwrap();
    String::from_utf8(sum.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

/// What the server says to these inline commands until it closes, which the last of them or a limit must make it do.
fn until_closed(mut raw: TcpStream, request: &str) -> String {
    raw.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    raw.read_to_string(&mut answer).unwrap();
    answer
}

fn users() -> String {
    let hash = hash();
    format!(
        "# The services of the shop.\n\
         user shop on #{hash} ~shop-* +@stock -stock.del +info\n\
         user ops on #{hash} allkeys allchannels +@all\n\
         user gone off #{hash} +@all\n"
    )
}

#[test]
fn strangers_may_do_nothing_and_users_what_they_may() {
    let file = TempFile::new("users", &users());
    let stack = Stack::with_settings(&["--auth-users-file", file.path(), "--reply-within-ms", "20000"]);
    let said = |request: &str| until_closed(stack.sidecar.raw(), &format!("{request}\r\nQUIT\r\n"));
    for request in ["PING", "STOCK.GET a", "INFO", "CLIENT LIST", "COMMAND", "AUTH"] {
        let answer = said(request);
        let expected = if request == "AUTH" { "-ERR wrong number" } else { "-NOAUTH Authentication required.\r\n+OK\r\n" };
        assert!(answer.starts_with(expected), "{request}: {answer}");
    }
    assert!(said("HELLO 3").starts_with("-NOAUTH HELLO must be called with the client already authenticated"));
    let wrong = "-WRONGPASS invalid username-password pair or user is disabled.\r\n+OK\r\n";
    for request in [
        format!("AUTH {PASSWORD}"),
        format!("AUTH shop {PASSWORD}x"),
        format!("AUTH nobody {PASSWORD}"),
        format!("AUTH default {PASSWORD}"),
        format!("AUTH gone {PASSWORD}"),
        format!("AUTH SHOP {PASSWORD}"),
        "AUTH shop \"\"".to_owned(),
        format!("HELLO 3 AUTH shop {PASSWORD}x"),
        format!("HELLO 2 AUTH nobody {PASSWORD} SETNAME x"),
    ] {
        assert_eq!(said(&request), wrong, "{request}");
    }

    let mut ops = stack.sidecar.connect_as("ops", PASSWORD);
    assert_eq!(ops.ask("ACL WHOAMI"), "ops");
    ops.ok("STOCK.SET shop-mug 5");
    ops.ok("STOCK.SET cup 5");
    let mut shop = stack.sidecar.connect_as("shop", PASSWORD);
    assert!(shop.ask("STOCK.DECR shop-mug 1").starts_with("[OK, 4, "));
    for (request, why) in [
        ("STOCK.DECR cup 1", "-NOPERM No permissions to access a key"),
        ("STOCK.DECR shop-mug 1 cup 1", "-NOPERM No permissions to access a key"),
        ("STOCK.SCAN 0", "-NOPERM No permissions to access a key"),
        ("STOCK.DEL shop-mug", "-NOPERM User shop has no permissions to run the 'stock.del' command"),
        ("COUPON.INFO shop-c", "-NOPERM User shop has no permissions to run the 'coupon.info' command"),
        ("CLIENT LIST", "-NOPERM User shop has no permissions to run the 'client|list' command"),
        ("CONFIG GET *", "-NOPERM User shop has no permissions to run the 'config|get' command"),
        ("HOLDFAST.DEADLETTER LIST", "-NOPERM User shop has no permissions to run the 'holdfast.deadletter|list' command"),
    ] {
        assert_eq!(shop.ask(request), why, "{request}");
    }
    assert_eq!(ops.ask("STOCK.GET cup"), "5");
    assert!(ops.ask("CLIENT LIST").contains(" user=shop "));
    let metrics = stack.sidecar.get("/metrics").1;
    assert!(metrics.contains("holdfast_denied_total{what=\"id\"} 3") && metrics.contains("holdfast_auth_failures_total 9"), "{metrics}");
}

#[test]
fn strangers_may_say_little_for_a_short_time_and_guess_three_times() {
    let file = TempFile::new("limits", &users());
    let stack = Stack::with_settings(&["--auth-users-file", file.path(), "--auth-within-ms", "700"]);
    let guess = "AUTH shop x\r\n";
    let wrong = "-WRONGPASS invalid username-password pair or user is disabled.\r\n";
    assert_eq!(until_closed(stack.sidecar.raw(), &format!("{guess}{guess}{guess}PING\r\n")), wrong.repeat(3));
    // A right one in between starts the count anew.
    let right = format!("AUTH shop {PASSWORD}\r\n");
    let answer = until_closed(stack.sidecar.raw(), &format!("{guess}{guess}{right}{guess}{guess}PING\r\n{guess}"));
    assert_eq!(answer, format!("{}+OK\r\n{}+PONG\r\n{wrong}", wrong.repeat(2), wrong.repeat(2)));
    for (request, error) in [
        ("*11\r\n", "-ERR Protocol error: unauthenticated multibulk length\r\n"),
        ("*1\r\n$16385\r\n", "-ERR Protocol error: unauthenticated bulk length\r\n"),
    ] {
        assert_eq!(until_closed(stack.sidecar.raw(), request), error);
    }
    let began = std::time::Instant::now();
    assert_eq!(until_closed(stack.sidecar.raw(), "PING\r\nPI"), "-NOAUTH Authentication required.\r\n");
    assert!(began.elapsed().as_millis() >= 700 && began.elapsed() < PATIENCE);
    let metrics = stack.sidecar.get("/metrics").1;
    for (why, count) in [("auth_time", 1), ("auth_failures", 2), ("protocol_error", 2)] {
        assert!(metrics.contains(&format!("holdfast_closed_connections_total{{why=\"{why}\"}} {count}")), "{why}: {metrics}");
    }
    // Who is in stays.
    let mut client = stack.sidecar.connect_as("shop", PASSWORD);
    std::thread::sleep(std::time::Duration::from_millis(800));
    assert_eq!(client.ask("PING"), "PONG");
}

#[test]
fn what_strangers_may_send_is_set_and_never_more_than_what_others_may() {
    let file = TempFile::new("settable", &users());
    let known = format!("AUTH shop {PASSWORD}\r\n");
    let words = |count: usize| format!("*{count}\r\n");
    let word = |length: usize| format!("*1\r\n${length}\r\n");
    let of_a_stranger =
        ["-ERR Protocol error: unauthenticated multibulk length\r\n", "-ERR Protocol error: unauthenticated bulk length\r\n"];
    let of_all = ["+OK\r\n-ERR Protocol error: invalid multibulk length\r\n", "+OK\r\n-ERR Protocol error: invalid bulk length\r\n"];
    let more = ["--auth-args", "20", "--auth-bulk-kib", "32", "--limits-args", "20", "--limits-bulk-kib", "64"];
    let less = ["--auth-args", "100", "--auth-bulk-kib", "64", "--limits-args", "20", "--limits-bulk-kib", "1"];
    for (flags, strangers_kib, kib) in [(more, 32, 64), (less, 1, 1)] {
        let stack = Stack::with_settings(&[&["--auth-users-file", file.path(), "--auth-within-ms", "300"], &flags[..]].concat());
        let said = |request: &str| until_closed(stack.sidecar.raw(), request);
        // Too little is no error, but the client is late with the rest.
        assert_eq!(said(&words(20)), "");
        assert_eq!(said(&words(21)), of_a_stranger[0]);
        assert_eq!(said(&word(strangers_kib << 10)), "");
        assert_eq!(said(&word((strangers_kib << 10) + 1)), of_a_stranger[1]);
        assert_eq!(said(&format!("{known}{}", words(21))), of_all[0]);
        assert_eq!(said(&format!("{known}{}", word((kib << 10) + 1))), of_all[1]);
    }
    let stack = Stack::with_settings(&["--auth-users-file", file.path(), "--auth-request-kib", "1"]);
    let large = "*2\r\n$4\r\nPING\r\n$1024\r\n";
    assert_eq!(until_closed(stack.sidecar.raw(), large), "-ERR Protocol error: invalid bulk length\r\n");
}

#[test]
fn whoever_guesses_on_waits_longer_whatever_is_wrong_and_nobody_else_does() {
    let file = TempFile::new("guesses", &users());
    let stack = Stack::with_settings(&["--auth-users-file", file.path(), "--auth-delay-ms", "100", "--auth-failures", "2"]);
    let guess = |name: &str| {
        let began = std::time::Instant::now();
        let answer = until_closed(stack.sidecar.raw(), &format!("AUTH {name} x\r\nAUTH {name} y\r\nPING\r\n"));
        assert_eq!(answer, "-WRONGPASS invalid username-password pair or user is disabled.\r\n".repeat(2));
        began.elapsed().as_millis()
    };
    guess("shop");
    // The fourth waits; and so on, over connections and names.
    assert!(guess("nobody") >= 100);
    assert!(guess("shop") >= 200 + 300);
    assert!(guess("nobody") >= 400 + 500);
    let metrics = stack.sidecar.get("/metrics").1;
    assert!(metrics.contains("holdfast_auth_failures_total 8") && metrics.contains("holdfast_auth_delayed_total 5"), "{metrics}");
    // Meanwhile somebody else guesses for a second and a half, and who knows the password is let in at once.
    std::thread::scope(|scope| {
        let guessing = scope.spawn(|| guess("shop"));
        wait_until("the next one waits", || stack.sidecar.get("/metrics").1.contains("holdfast_auth_delayed_total 6"));
        assert_eq!(stack.sidecar.connect_as("shop", PASSWORD).ask("STOCK.GET shop-mug"), "nil");
        assert!(!guessing.is_finished());
        assert!(guessing.join().unwrap() >= 600 + 700);
    });
}

#[test]
fn whoever_guesses_without_waiting_for_answers_gains_nothing() {
    let file = TempFile::new("hasty", &users());
    let settings = ["--auth-users-file", file.path(), "--auth-delay-ms", "100", "--auth-within-ms", "20000", "--auth-failures", "1000"];
    let stack = Stack::with_settings(&settings);
    let count = |name: &str| count(&stack, name);
    let guess = |n: usize| {
        let mut raw = stack.sidecar.raw();
        raw.write_all(format!("AUTH shop {n}\r\n").as_bytes()).unwrap();
        raw
    };
    // Three are wrong at once, and the fourth is looked at; the others queue behind it.
    let began = Instant::now();
    let mut guessers: Vec<_> = (0..4).map(guess).collect();
    wait_until("those are looked at that need not wait", || count("holdfast_auth_failures_total") == 4);
    guessers.extend((4..7).map(guess));
    wait_until("the others wait", || count("holdfast_auth_queued_total") == 3);
    // What the right password waits for that comes behind them: 100, 200, 300, 400 ms.
    let answer = until_closed(stack.sidecar.raw(), &format!("AUTH shop {PASSWORD}\r\nQUIT\r\n"));
    assert_eq!(answer, "+OK\r\n+OK\r\n");
    assert!(began.elapsed() >= Duration::from_millis(1_000), "over many connections: {:?}", began.elapsed());
    drop(guessers);
    assert_eq!(count("holdfast_auth_failures_total"), 7);

    // The same in one go, over one connection: the answers come one by one, so each guess waits for the one before.
    let began = Instant::now();
    let guesses: String = (0..3).map(|n| format!("AUTH shop {n}\r\n")).collect();
    let answer = until_closed(stack.sidecar.raw(), &format!("{guesses}AUTH shop {PASSWORD}\r\nQUIT\r\n"));
    assert!(answer.ends_with("+OK\r\n+OK\r\n") && answer.matches("-WRONGPASS").count() == 3, "{answer}");
    assert!(began.elapsed() >= Duration::from_millis(500 + 600 + 700), "pipelined: {:?}", began.elapsed());
}

/// The number of a metric without labels; 0 where it has not been counted yet.
fn count(stack: &Stack, name: &str) -> u64 {
    let metrics = stack.sidecar.get("/metrics").1;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    line.map_or(0, |number| number.parse().unwrap())
}

#[test]
fn whose_turn_does_not_come_is_told_so_and_not_whether_it_was_right() {
    let file = TempFile::new("crowd", &users());
    // A turn is waited for half of this; the fifth wrong answer waits for two seconds, and its connection is closed before.
    let stack = Stack::with_settings(&["--auth-users-file", file.path(), "--auth-delay-ms", "1000", "--auth-within-ms", "1000"]);
    let guesses = "AUTH shop x\r\n".repeat(3);
    until_closed(stack.sidecar.raw(), &guesses);
    let guess = || until_closed(stack.sidecar.raw(), "AUTH shop x\r\n");
    let right = || until_closed(stack.sidecar.raw(), &format!("AUTH shop {PASSWORD}\r\nQUIT\r\n"));
    // Closed when its time is over, which is when the answer would come.
    guess();
    wait_until("the fifth is looked at", || {
        guess();
        count(&stack, "holdfast_auth_failures_total") == 5
    });
    let answer = right();
    assert!(answer.starts_with("-TRYAGAIN too many wrong passwords come from this address"), "{answer}");
    wait_until("who is right is let in", || right() == "+OK\r\n+OK\r\n");
    assert!(count(&stack, "holdfast_auth_refused_total") > 0);
}

#[test]
fn a_sighup_takes_over_the_users_and_drops_nobody_who_may_stay() {
    let file = TempFile::new("reload", &users());
    let mut stack = Stack::with_settings(&["--auth-users-file", file.path()]);
    let mut shop = stack.sidecar.connect_as("shop", PASSWORD);
    let mut ops = stack.sidecar.connect_as("ops", PASSWORD);
    ops.ok("STOCK.SET cup 5");
    let hangup = |stack: &mut Stack, logged: &str| {
        assert!(Command::new("kill").args(["-HUP", &stack.sidecar.pid().to_string()]).status().unwrap().success());
        stack.sidecar.wait_for_log(logged);
    };
    file.write("user shop on maybe\n");
    hangup(&mut stack, "line 1: rule 2 of the user shop is none that there is");
    assert_eq!((shop.ask("PING"), ops.ask("ACL WHOAMI")), ("PONG".into(), "ops".into()));

    let hash = hash();
    file.write(&format!("user shop on #{hash} allkeys +@read\nuser new on #{hash} +@all allkeys\n"));
    hangup(&mut stack, "users reloaded");
    assert!(shop.ask("STOCK.SET shop-mug 5").starts_with("-NOPERM User shop has no permissions to run the 'stock.set' command"));
    assert_eq!(shop.ask("STOCK.GET cup"), "5");
    assert!(ops.is_closed(), "the user ops is gone");
    assert_eq!(stack.sidecar.connect_as("new", PASSWORD).ask("ACL WHOAMI"), "new");
}

#[test]
fn a_sighup_ends_what_is_no_longer_permitted_also_of_those_who_say_nothing() {
    let hash = hash();
    let file = TempFile::new("rights", &format!("user watcher on #{hash} allkeys &stock:events:* &shop:* +@all\n"));
    let mut stack = Stack::with_settings(&["--auth-users-file", file.path()]);
    let open = |command: &str, confirmed: &str| {
        let mut raw = stack.sidecar.raw();
        raw.write_all(format!("AUTH watcher {PASSWORD}\r\n{command}\r\n").as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !String::from_utf8_lossy(&answer).ends_with(confirmed) {
            let mut chunk = [0; 512];
            let read = raw.read(&mut chunk).unwrap();
            assert!(read > 0, "{command}: {}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&chunk[..read]);
        }
        raw
    };
    let lost = [
        open("SUBSCRIBE stock:events:mug", "\r\n:1\r\n"),
        open("SUBSCRIBE shop:1 stock:events:mug", "\r\n:2\r\n"),
        open("PSUBSCRIBE stock:events:*", "\r\n:1\r\n"),
        open("MONITOR", "+OK\r\n+OK\r\n"),
    ];
    let kept = [open("SUBSCRIBE shop:1", "\r\n:1\r\n"), open("PSUBSCRIBE shop:*", "\r\n:1\r\n"), open("ACL WHOAMI", "\r\nwatcher\r\n")];
    file.write(&format!("user watcher on #{hash} allkeys &shop:* +@all -monitor\n"));
    assert!(Command::new("kill").args(["-HUP", &stack.sidecar.pid().to_string()]).status().unwrap().success());
    stack.sidecar.wait_for_log("users reloaded");
    for mut raw in lost {
        let mut rest = Vec::new();
        raw.read_to_end(&mut rest).unwrap();
    }
    for mut raw in kept {
        raw.write_all(b"PING\r\nQUIT\r\n").unwrap();
        let mut rest = String::new();
        raw.read_to_string(&mut rest).unwrap();
        assert!(rest.to_lowercase().contains("pong"), "{rest}");
    }
    let log = stack.sidecar.log();
    assert!(log.contains("closed=4"), "{log}");
    let metrics = stack.sidecar.get("/metrics").1;
    assert!(metrics.contains("holdfast_closed_connections_total{why=\"user_changed\"} 4"), "{metrics}");
    // Whose user is off is closed whatever it does.
    let gone = stack.sidecar.connect_as("watcher", PASSWORD);
    file.write(&format!("user watcher off #{hash} +@all\n"));
    assert!(Command::new("kill").args(["-HUP", &stack.sidecar.pid().to_string()]).status().unwrap().success());
    let mut gone = gone;
    wait_until("it is closed", || gone.is_closed());
}

#[test]
fn who_resets_is_a_stranger_again_and_who_has_no_password_is_let_in_with_any() {
    let hash = hash();
    let file = TempFile::new("reset", &format!("user shop on #{hash} ~shop-* +@stock\nuser guest on nopass ~* +stock.get\n"));
    let stack = Stack::with_settings(&["--auth-users-file", file.path(), "--reply-within-ms", "20000"]);
    let said = |request: &str| until_closed(stack.sidecar.raw(), &format!("{request}\r\nQUIT\r\n"));
    let (none, no_right) =
        ("-NOAUTH Authentication required.\r\n", "-NOPERM User guest has no permissions to run the 'stock.set' command\r\n");
    let wrong = "-WRONGPASS invalid username-password pair or user is disabled.\r\n";
    // What was AUTHed before a RESET counts no more, and one may be somebody else after it.
    let request =
        format!("AUTH shop {PASSWORD}\r\nSTOCK.GET shop-a\r\nRESET\r\nSTOCK.GET shop-a\r\nAUTH guest x\r\nSTOCK.GET a\r\nSTOCK.SET a 1");
    assert_eq!(said(&request), format!("+OK\r\n$-1\r\n+RESET\r\n{none}+OK\r\n$-1\r\n{no_right}+OK\r\n"));
    let request = format!("HELLO 3 AUTH shop {PASSWORD}\r\nRESET\r\nHELLO 3\r\nAUTH shop {PASSWORD}\r\nSTOCK.GET shop-a");
    let answer = said(&request);
    assert!(answer.contains("+RESET\r\n-NOAUTH HELLO must be called") && answer.ends_with("+OK\r\n$-1\r\n+OK\r\n"), "{answer}");
    // Any password will do for one that needs none, but no other name is served by it.
    for password in ["\"\"", "x", PASSWORD] {
        assert_eq!(said(&format!("AUTH guest {password}\r\nSTOCK.SET a 1")), format!("+OK\r\n{no_right}+OK\r\n"), "{password}");
    }
    assert_eq!(said("AUTH x"), format!("{wrong}+OK\r\n"), "default is off");
    assert_eq!(said("STOCK.GET a"), format!("{none}+OK\r\n"), "nobody is guest unasked");
}

#[test]
fn a_subscription_that_waits_behind_another_command_is_ended_by_what_is_taken_away_meanwhile() {
    let hash = hash();
    let operator = format!("user ops on #{hash} allkeys allchannels +@all\n");
    let file = TempFile::new("meanwhile", &format!("{operator}user watcher on #{hash} allkeys &stock:events:* +@all\n"));
    let mut stack = Stack::with_settings(&["--auth-users-file", file.path(), "--reply-within-ms", "20000"]);
    let mut ops = stack.sidecar.connect_as("ops", PASSWORD);
    ops.ok("STOCK.SET mug 5");
    let mut raw = stack.sidecar.raw();
    // While this is held, Postgres takes nothing, and the reply waits.
    stack.postgres.holding("BEGIN; LOCK TABLE holdfast.stock", || {
        let request = format!("AUTH watcher {PASSWORD}\r\nSTOCK.DECR mug 1 ACK postgres TIMEOUT 60000\r\nSUBSCRIBE stock:events:mug\r\n");
        raw.write_all(request.as_bytes()).unwrap();
        wait_until("the subscription waits", || ops.ask("CLIENT LIST").contains(" cmd=subscribe "));
        file.write(&format!("{operator}user watcher on #{hash} allkeys +@all\n"));
        assert!(Command::new("kill").args(["-HUP", &stack.sidecar.pid().to_string()]).status().unwrap().success());
        stack.sidecar.wait_for_log("users reloaded");
        assert!(ops.ask("CLIENT LIST").contains(" cmd=subscribe "), "it waits still");
    });
    let mut said = String::new();
    raw.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("+OK\r\n*3\r\n$2\r\nOK\r\n"), "{said}");
    assert_eq!(ops.ask("PUBSUB CHANNELS"), "[]");
}

#[test]
fn who_waits_for_a_lock_that_it_may_no_longer_have_does_not_get_it() {
    let hash = hash();
    let operator = format!("user ops on #{hash} allkeys allchannels +@all\n");
    let users = |rights: &[&str]| {
        let lines = rights.iter().enumerate().map(|(number, rights)| format!("user u{number} on #{hash} {rights}\n"));
        operator.clone() + &lines.collect::<String>()
    };
    let file = TempFile::new("waits", &users(&["allkeys +@lock", "~a-* +@lock", "allkeys +@lock", "allkeys +@all"]));
    let mut stack = Stack::with_settings(&["--auth-users-file", file.path(), "--reply-within-ms", "20000"]);
    let mut ops = stack.sidecar.connect_as("ops", PASSWORD);
    let reply = ops.ask("LOCK.ACQUIRE a-lock LEASE 600000");
    let token = reply.trim_matches(['[', ']']).split(", ").nth(1).unwrap().to_owned();
    let wait = |user: usize| {
        let mut raw = stack.sidecar.raw();
        raw.write_all(format!("AUTH u{user} {PASSWORD}\r\nLOCK.ACQUIRE a-lock LEASE 600000 WAIT 600000\r\n").as_bytes()).unwrap();
        raw
    };
    // The first two stand in line before the one that may stay.
    let lost: Vec<_> = [0, 1].map(wait).into();
    wait_until("they wait", || ops.field("LOCK.INFO a-lock", "waiters") == "2");
    let (mut stays, lost_too) = (wait(2), wait(3));
    wait_until("all of them wait", || ops.field("LOCK.INFO a-lock", "waiters") == "4");
    file.write(&users(&["allkeys +@lock -lock.acquire", "~b-* +@lock", "~a-* +@lock", "allkeys +@all -@lock"]));
    assert!(Command::new("kill").args(["-HUP", &stack.sidecar.pid().to_string()]).status().unwrap().success());
    stack.sidecar.wait_for_log("users reloaded");
    for mut raw in lost.into_iter().chain([lost_too]) {
        let mut said = String::new();
        raw.read_to_string(&mut said).unwrap();
        assert_eq!(said, "+OK\r\n");
    }
    wait_until("one still waits", || ops.field("LOCK.INFO a-lock", "waiters") == "1");
    assert_eq!(ops.ask(&format!("LOCK.RELEASE a-lock {token}")), "[RELEASED]");
    let mut won = [0; 24];
    stays.read_exact(&mut won).unwrap();
    assert_eq!(String::from_utf8_lossy(&won), "+OK\r\n*3\r\n$8\r\nACQUIRED\r\n$");
    let metrics = stack.sidecar.get("/metrics").1;
    assert!(metrics.contains("holdfast_closed_connections_total{why=\"user_changed\"} 3"), "{metrics}");
}

#[test]
fn a_public_address_needs_users_with_passwords() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_holdfast")).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = run(&["check-config", "--listen", "0.0.0.0:0"]);
    assert!(code == Some(64) && text.contains("name users with --auth-users-file"), "{code:?} {text}");
    let open = TempFile::new("open", "user default on nopass ~* +@all\n");
    let (code, text) = run(&["check-config", "--listen", "0.0.0.0:0", "--auth-users-file", open.path()]);
    assert!(code == Some(1) && text.contains("a user with nopass, while other machines can connect"), "{code:?} {text}");
    let (code, text) = run(&["serve", "--listen", "0.0.0.0:0", "--auth-users-file", open.path()]);
    assert!(code == Some(1) && text.contains("a user with nopass"), "{code:?} {text}");
    assert_eq!(run(&["check-config", "--listen", "0.0.0.0:0", "--auth-users-file", open.path(), "--insecure"]).0, Some(0));
    let good = TempFile::new("good", &users());
    assert_eq!(run(&["check-config", "--listen", "0.0.0.0:0", "--auth-users-file", good.path()]).0, Some(0));
    let (code, text) = run(&["check-config", "--auth-users-file", "/nonexistent"]);
    assert!(code == Some(1) && text.contains("auth.users_file /nonexistent: cannot be read"), "{code:?} {text}");
}

#[test]
fn a_planted_secret_is_shown_nowhere() {
    let config = TempFile::new("config", &format!("[auth]\nrequirepass = \"{PASSWORD}\"\n[log]\nlevel = \"trace\"\n"));
    let (redis, postgres) = (RedisServer::start(), Database::new(false));
    let mut backing = redis::Client::open(redis.url()).unwrap().get_connection().unwrap();
    redis::cmd("ACL").arg(&["SETUSER", "app", "on", &format!(">{PASSWORD}"), "+@all", "~*", "&*"]).exec(&mut backing).unwrap();
    // Every file and address that may have one.
    let redis_url = redis.url().replace("redis://", &format!("redis://app:{PASSWORD}@"));
    let postgres_url = postgres.url.replace("postgres@", &format!("postgres:{PASSWORD}@"));
    assert!(postgres_url.contains(PASSWORD), "{postgres_url}");
    let users = TempFile::new("planted", &format!("user shop on #{} +@stock ~*\n", hash()));
    let urls = TempFile::new("urls", &format!("[redis]\nurl = \"{redis_url}\"\n[postgres]\nurl = \"{postgres_url}\"\n"));
    let text = std::fs::read_to_string(urls.path()).unwrap() + &std::fs::read_to_string(config.path()).unwrap();
    config.write(&text);
    let sidecar = Sidecar::with_config(config.path(), &["--auth-users-file", users.path()]);
    let mut stack = Stack { sidecar, redis, postgres };
    stack.wait_until_ready();
    let mut watching = stack.sidecar.raw();
    watching.write_all(format!("AUTH {PASSWORD}\r\nMONITOR\r\n").as_bytes()).unwrap();
    let mut confirmed = [0; 10];
    watching.read_exact(&mut confirmed).unwrap();
    assert_eq!(&confirmed, b"+OK\r\n+OK\r\n");
    for request in [
        format!("AUTH {PASSWORD}\r\nQUIT\r\n"),
        format!("AUTH default {PASSWORD}x\r\nAUTH {PASSWORD} x\r\nQUIT\r\n"),
        format!("HELLO 3 AUTH default {PASSWORD} SETNAME {PASSWORD}\u{e9}\r\nQUIT\r\n"),
        format!("HELLO 9 AUTH default {PASSWORD}\r\nQUIT\r\n"),
        format!("AUTH a {PASSWORD} b\r\nQUIT\r\n"),
    ] {
        let answer = until_closed(stack.sidecar.raw(), &request);
        assert!(!answer.contains(PASSWORD), "{request}: {answer}");
    }
    let mut client = stack.sidecar.connect_as("default", PASSWORD);
    for request in [
        format!("CONFIG SET requirepass {PASSWORD}"),
        format!("ACL SETUSER a on >{PASSWORD}"),
        "CONFIG GET *".to_owned(),
        "INFO everything".to_owned(),
        "CLIENT LIST".to_owned(),
        "ACL LIST".to_owned(),
        "ACL GETUSER default".to_owned(),
        "SLOWLOG GET".to_owned(),
        "HOLDFAST.STATUS".to_owned(),
    ] {
        let answer = client.ask(&request);
        assert!(!answer.contains(PASSWORD) && !answer.contains(&hash()), "{request}: {answer}");
    }
    client.ask("ECHO last");
    let mut watched = String::new();
    while !watched.contains("\"ECHO\" \"last\"") {
        let mut chunk = [0; 4096];
        let read = watching.read(&mut chunk).unwrap();
        watched += &String::from_utf8_lossy(&chunk[..read]);
    }
    assert!(watched.contains("\"AUTH\" \"(redacted)\"") && watched.contains("\"HELLO\" \"(redacted)\""), "{watched}");
    assert!(!watched.contains(PASSWORD) && !watched.contains(&hash()), "{watched}");
    for path in ["/metrics", "/readyz?verbose", "/livez"] {
        assert!(!stack.sidecar.get(path).1.contains(PASSWORD), "{path}");
    }
    let shown = Command::new(env!("CARGO_BIN_EXE_holdfast")).args(["print-config", "--config", config.path()]).output().unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("requirepass = \"***\"") && !shown.contains(PASSWORD), "{shown}");
    wait_until("the audit is logged", || stack.sidecar.log().contains("CONFIG|SET"));
    let log = stack.sidecar.log();
    assert!(log.contains("ACL|SETUSER") && log.contains("wrong user or password"), "{log}");
    for secret in [PASSWORD, &hash()] {
        assert!(!log.contains(secret), "{log}");
    }
    let arguments = std::fs::read(format!("/proc/{}/cmdline", stack.sidecar.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&arguments).contains(PASSWORD));

    // What is wrong in the users file is named without it, and so are backends that refuse it.
    users.write(&format!("user shop on >{PASSWORD}\n"));
    assert!(Command::new("kill").args(["-HUP", &stack.sidecar.pid().to_string()]).status().unwrap().success());
    let log = stack.sidecar.wait_for_log("users are not reloaded");
    assert!(!log.contains(PASSWORD), "{log}");
    redis::cmd("ACL").arg(&["SETUSER", "app", "resetpass", ">another"]).exec(&mut backing).unwrap();
    redis::cmd("CLIENT").arg(&["KILL", "USER", "app"]).exec(&mut backing).unwrap();
    let log = stack.sidecar.wait_for_log("WRONGPASS");
    assert!(!log.contains(PASSWORD), "{log}");
    let answer = client.ask("HOLDFAST.STATUS") + &client.ask("STOCK.DECR a 1") + &stack.sidecar.get("/readyz?verbose").1;
    assert!(!answer.contains(PASSWORD), "{answer}");
}

#[test]
fn a_secret_in_the_address_of_a_backend_is_shown_nowhere_also_while_that_is_away() {
    let config = TempFile::new("backends", "[log]\nlevel = \"trace\"\n");
    let (server, postgres) = (RedisServer::start(), Database::new(true));
    let mut admin = redis::Client::open(server.url()).unwrap().get_connection().unwrap();
    let password = format!(">{PASSWORD}");
    redis::cmd("ACL").arg(&["SETUSER", "holdfast", "on", &password, "~*", "&*", "+@all"]).exec(&mut admin).unwrap();
    let redis_url = server.url().replace("redis://", &format!("redis://holdfast:{PASSWORD}@"));
    let postgres_url = postgres.url.replace("postgres://postgres@", &format!("postgres://postgres:{PASSWORD}@"));
    assert!(redis_url.contains(PASSWORD) && postgres_url.contains(PASSWORD));
    let sidecar = Sidecar::with_settings(&redis_url, &postgres_url, &["--config", config.path()]);
    let mut stack = Stack { sidecar, redis: server, postgres };
    stack.wait_until_ready();
    let mut client = stack.connect();
    client.ok("STOCK.SET mug 5 ACK postgres");
    let mut look = |stack: &Stack| {
        for request in [
            "STOCK.DECR mug 1",
            "STOCK.SET cup 1 ACK postgres TIMEOUT 100",
            "STOCK.GET mug",
            "STOCK.HISTORY mug",
            "STOCK.SYNC mug",
            "LOCK.ACQUIRE l",
            "HOLDFAST.STATUS",
            "HOLDFAST.DEADLETTER LIST",
            "INFO everything",
            "CONFIG GET *",
            "CLIENT LIST",
            "SLOWLOG GET",
        ] {
            let answer = client.ask(request);
            assert!(!answer.contains(PASSWORD), "{request}: {answer}");
        }
        for path in ["/metrics", "/readyz?verbose", "/livez"] {
            let body = stack.sidecar.get(path).1;
            assert!(!body.contains(PASSWORD), "{path}: {body}");
        }
    };
    look(&stack);
    stack.postgres.own.as_mut().unwrap().kill();
    wait_until("Postgres is away", || stack.sidecar.get("/readyz").1.contains("postgres degraded"));
    look(&stack);
    stack.redis.kill();
    wait_until("Redis is away", || stack.sidecar.get("/readyz").0 == 503);
    look(&stack);
    let log = stack.sidecar.log();
    assert!(log.len() > 1_000 && !log.contains(PASSWORD), "{log}");

    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_holdfast")).args(arguments).output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    let shown = run(&["print-config", "--redis-url", &redis_url, "--postgres-url", &postgres_url]);
    assert!(shown.contains("redis://") && shown.contains("postgres://") && !shown.contains(PASSWORD), "{shown}");
    // Addresses that are none, and one that cannot be reached.
    for (flag, url) in [
        ("--redis-url", format!("redis://holdfast:{PASSWORD}@127.0.0.1:port/")),
        ("--redis-url", format!("rredis://holdfast:{PASSWORD}@127.0.0.1/")),
        ("--redis-url", format!("redis://holdfast:{PASSWORD}@[::1/")),
        ("--postgres-url", format!("postgres://holdfast:{PASSWORD}@127.0.0.1:port/x")),
        ("--postgres-url", format!("postgres://holdfast:{PASSWORD}@127.0.0.1/x?sslmode=none")),
        ("--postgres-url", format!("postgres://holdfast:{PASSWORD}@127.0.0.1:1/x")),
    ] {
        for command in ["check-config", "migrate"] {
            let said = run(&[command, flag, &url]);
            assert!(!said.contains(PASSWORD), "{command} {url}: {said}");
        }
    }
}
