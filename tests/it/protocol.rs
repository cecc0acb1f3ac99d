//! RESP on the wire: order, dialects, what clients send when they connect.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};

use crate::harness::{Stack, wait_until};

fn exchange(stack: &Stack, request: &str, bytes: usize) -> String {
    let mut raw = stack.sidecar.raw();
    raw.write_all(request.as_bytes()).unwrap();
    let mut answer = vec![0; bytes];
    raw.read_exact(&mut answer).unwrap();
    String::from_utf8(answer).unwrap()
}

/// Also where an issue waits for the coupon's lock, and what follows it needs no lock.
#[test]
fn a_pipeline_about_a_coupon_is_decided_in_order() {
    let stack = Stack::start();
    let expected = "*2\r\n$2\r\nOK\r\n$3\r\n1-1\r\n*4\r\n$6\r\nISSUED\r\n:1\r\n:4\r\n$3\r\n1-2\r\n*3\r\n$4\r\nUSED\r\n:1\r\n$3\r\n1-3\r\n\
                    *3\r\n$6\r\nISSUED\r\n:1\r\n$3\r\n1-4\r\n*4\r\n$7\r\nREVOKED\r\n:1\r\n:5\r\n$3\r\n1-5\r\n";
    let request = "COUPON.CREATE c 5\r\nCOUPON.ISSUE c u\r\nCOUPON.USE c u\r\nCOUPON.UNUSE c u\r\nCOUPON.REVOKE c u\r\n";
    assert_eq!(exchange(&stack, request, expected.len()), expected);
}

#[test]
fn a_pipeline_is_answered_in_order_and_sees_its_own_changes() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    let created = "*3\r\n$2\r\nOK\r\n:5\r\n$3\r\n1-2\r\n:5\r\n*3\r\n$2\r\nOK\r\n:4\r\n$3\r\n1-3\r\n";
    assert_eq!(exchange(&stack, "STOCK.SET new 5 ACK redis\r\nSTOCK.GET new\r\nSTOCK.DECR new 1\r\n", created.len()), created);
    let expected = "*3\r\n$2\r\nOK\r\n:9\r\n$3\r\n1-4\r\n:9\r\n+PONG\r\n*3\r\n$2\r\nOK\r\n:12\r\n$3\r\n1-5\r\n*2\r\n:12\r\n$-1\r\n";
    let request = "STOCK.DECR a 1\r\nSTOCK.GET a\r\nPING\r\nSTOCK.INCR a 3 ACK postgres TIMEOUT 20000\r\nSTOCK.MGET a b\r\n";
    assert_eq!(exchange(&stack, request, expected.len()), expected);
}

#[test]
fn a_deep_pipeline_is_answered_whole() {
    let stack = Stack::start();
    stack.connect().ok("STOCK.SET a 100000");
    let raw = stack.sidecar.raw();
    let writer = {
        let mut raw = raw.try_clone().unwrap();
        std::thread::spawn(move || raw.write_all(&b"*3\r\n$10\r\nSTOCK.DECR\r\n$1\r\na\r\n$1\r\n1\r\n".repeat(20_000)).unwrap())
    };
    let replies: Vec<String> =
        BufReader::new(raw).lines().map(Result::unwrap).filter(|line| line.starts_with(['*', '-'])).take(20_000).collect();
    writer.join().unwrap();
    // A machine that stalls for the deadline of 100 ms refuses some: every request has its answer all the same.
    let sold = replies.iter().filter(|reply| reply.starts_with('*')).count();
    let in_doubt = replies.iter().filter(|reply| reply.starts_with("-INDOUBT")).count();
    let left: usize = stack.connect().ask("STOCK.GET a").parse().unwrap();
    assert!((sold..=sold + in_doubt).contains(&(100_000 - left)), "{left} left, {sold} sold, {in_doubt} in doubt");
}

#[test]
fn a_drain_refuses_what_is_new_and_ends_the_server_once_postgres_has_the_rest() {
    let mut stack = Stack::with_settings(&["--reply-within-ms", "1000"]);
    let (mut client, mut operator) = (stack.connect(), stack.connect());
    client.ok("STOCK.SET a 10");
    let token = client.ask("LOCK.ACQUIRE l LEASE 60000").split(", ").nth(1).unwrap().to_owned();
    // While this is held, Postgres takes nothing.
    let position = stack.postgres.holding("BEGIN; LOCK TABLE holdfast.stock", || {
        client.ok("STOCK.DECR a 1");
        operator.send(&["HOLDFAST.DRAIN"]);
        let refused = "-LOADING Holdfast is draining: go on with another sidecar";
        wait_until("nothing new is begun", || client.ask("STOCK.DECR a 1 ACK redis") == refused);
        assert_eq!((client.ask("STOCK.GET a"), client.ask("PING")), (refused.into(), "PONG".into()));
        assert_eq!(stack.sidecar.get("/readyz").0, 503);
        // For longer than commands may take.
        std::thread::sleep(std::time::Duration::from_millis(2_000));
        assert_ne!(client.field("HOLDFAST.STATUS", "lag"), "0");
        // What was begun goes on.
        assert_eq!(client.ask("LOCK.ACQUIRE m"), refused);
        assert!(client.ask(&format!("LOCK.CHECK l {token}")).starts_with("[VALID, "));
        assert_eq!(client.ask(&format!("LOCK.EXTEND l {token} 5000")), "[EXTENDED, 5000]");
        assert_eq!(client.ask(&format!("LOCK.RELEASE l {token}")), "[RELEASED]");
        let position = client.field("HOLDFAST.STATUS", "position");
        assert!(client.ask(&format!("HOLDFAST.AWAIT {position} 1")).starts_with("[PENDING, "));
        position
    });
    assert_eq!(operator.receive(), format!("[OK, {position}]"));
    assert_eq!(stack.sidecar.ended(), Some(0));
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), stack.backing().ask("GET stock:product:a"));
}

#[test]
fn requests_that_come_a_byte_at_a_time_are_the_same() {
    let stack = Stack::start();
    let request = "*3\r\n$9\r\nSTOCK.SET\r\n$3\r\nmug\r\n$2\r\n10\r\n*3\r\n$10\r\nSTOCK.DECR\r\n$3\r\nmug\r\n$1\r\n4\r\nSTOCK.GET mug\r\n\
        *2\r\n$4\r\nECHO\r\n$6\r\na\r\n\r\nb\r\n*0\r\n\r\nSTOCK.GET \"mug\"\r\n*1\r\n$x\r\n";
    let said = |size: usize| {
        let mut raw = stack.sidecar.raw();
        for part in request.as_bytes().chunks(size) {
            raw.write_all(part).unwrap();
            // So that each is a segment of its own, and most are read by themselves.
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let mut answer = String::new();
        raw.read_to_string(&mut answer).unwrap();
        // Positions go on.
        answer.lines().filter(|line| !line.starts_with("1-")).map(|line| format!("{line}\n")).collect::<String>()
    };
    let whole = said(request.len());
    assert!(whole.contains(":6\n$6\na\n\nb\n:6\n-ERR Protocol error: invalid bulk length"), "{whole}");
    assert_eq!(said(1), whole);
    assert_eq!(said(3), whole);
}

#[test]
fn a_drain_that_postgres_does_not_follow_says_so_and_ends_the_server_all_the_same() {
    let mut stack = Stack::with_settings(&["--reply-within-ms", "1000", "--shutdown-timeout-ms", "1500"]);
    let (mut client, mut operator) = (stack.connect(), stack.connect());
    client.ok("STOCK.SET a 10 ACK postgres TIMEOUT 60000");
    let applied = client.field("HOLDFAST.STATUS", "applied");
    stack.postgres.holding("BEGIN; LOCK TABLE holdfast.stock", || {
        client.ok("STOCK.DECR a 1 ACK redis");
        assert_eq!(operator.ask("HOLDFAST.DRAIN"), format!("[PENDING, {applied}]"));
        assert!(stack.sidecar.ended().is_some());
    });
    // Nothing is lost by that: the next one carries it.
    stack.restart_sidecar();
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), "9");
}

#[test]
fn a_drain_goes_on_although_the_operator_leaves() {
    let mut stack = Stack::with_settings(&["--reply-within-ms", "1000"]);
    let (mut client, mut operator) = (stack.connect(), stack.connect());
    client.ok("STOCK.SET a 10");
    stack.postgres.holding("BEGIN; LOCK TABLE holdfast.stock", || {
        client.ok("STOCK.DECR a 1 ACK redis");
        operator.send(&["HOLDFAST.DRAIN"]);
        wait_until("nothing new is begun", || client.ask("STOCK.GET a").starts_with("-LOADING "));
        drop(operator);
        assert_eq!(client.ask("PING"), "PONG");
    });
    assert_eq!(stack.sidecar.ended(), Some(0));
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), "9");
}

#[test]
fn hello_3_turns_maps_into_maps() {
    let stack = Stack::start();
    stack.connect().ok("STOCK.SET a 10");
    let resp3 = "HELLO 3\r\nSTOCK.INFO a\r\nSTOCK.GET b\r\nHELLO 2\r\nSTOCK.GET b\r\n";
    let mut raw = stack.sidecar.raw();
    raw.write_all(resp3.as_bytes()).unwrap();
    raw.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    raw.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("%7\r\n$6\r\nserver\r\n$5\r\nredis\r\n"), "{answer}");
    assert!(answer.contains("%8\r\n$7\r\nproduct\r\n$1\r\na\r\n$9\r\navailable\r\n:10\r\n"), "{answer}");
    assert!(answer.contains("\r\n_\r\n*14\r\n$6\r\nserver"), "{answer}");
    assert!(answer.ends_with("\r\n$-1\r\n"), "{answer}");
}

#[test]
fn what_the_common_clients_send_first_is_answered() {
    let stack = Stack::start();
    let mut client = stack.connect();
    for (command, reply) in [
        ("CLIENT SETNAME app", "OK"),
        ("CLIENT GETNAME", "app"),
        ("CLIENT SETINFO LIB-NAME redis-py", "OK"),
        ("CLIENT SETINFO LIB-VER 8.1.0", "OK"),
        ("SELECT 0", "OK"),
        ("ECHO hi", "hi"),
        ("CLUSTER NODES", "-ERR This instance has cluster support disabled"),
        ("CONFIG GET databases", "[databases, 1]"),
    ] {
        assert_eq!(client.ask(command), reply, "{command}");
    }
    let maintenance = client.ask("CLIENT MAINT_NOTIFICATIONS ON moving-endpoint-type internal-ip");
    assert!(maintenance.starts_with("-ERR unknown subcommand"), "{maintenance}");
    assert!(client.ask("SENTINEL MASTERS").starts_with("-ERR unknown command 'SENTINEL', with args beginning with: 'MASTERS' "));
    assert!(client.ask("CLIENT INFO").contains("name=app") && client.ask("CLIENT LIST").contains("lib-name=redis-py"));
    assert!(client.ask("CLIENT LIST TYPE normal").contains("name=app"));
    assert_eq!(client.ask("CLIENT LIST TYPE pubsub"), "");
    let info = client.ask("INFO");
    for line in [
        "redis_version:7.2",
        "loading:0",
        "role:master",
        "cluster_enabled:0",
        "holdfast_version:",
        "holdfast_state:live",
        "holdfast_at_risk:0",
    ] {
        assert!(info.contains(line), "{line} is not in {info}");
    }
    let count: usize = client.ask("COMMAND COUNT").parse().unwrap();
    assert_eq!(client.ask("COMMAND LIST").split(", ").count(), count);
    assert!(client.ask("COMMAND INFO stock.decr").starts_with("[[stock.decr, -3, [write"));
    assert!(client.ask("COMMAND DOCS stock.decr").contains("Takes units off one or more products"));
    assert_eq!(client.ask("RESET"), "RESET");
    assert_eq!(client.ask("CLIENT GETNAME"), "nil");
}

#[test]
fn a_client_that_leaves_in_the_middle_does_not_stop_its_command() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    for _ in 0..5 {
        let mut raw = stack.sidecar.raw();
        raw.write_all(b"STOCK.DECR a 1\r\n").unwrap();
        drop(raw);
    }
    client.until("STOCK.GET a", "5");
}
