//! ACK replica, with a real one.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Stack, wait_until};
use crate::servers::RedisServer;

fn signal(server: &RedisServer, signal: &str) {
    assert!(Command::new("kill").args([signal, &server.pid().to_string()]).status().unwrap().success());
}

#[test]
fn ack_replica_waits_until_a_replica_has_it() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 100");
    client.ok("COUPON.CREATE spring 10");
    let began = Instant::now();
    let alone = client.ask("STOCK.DECR a 1 ACK replica");
    assert!(alone.starts_with("-PENDING 1-3 done in Redis, and not confirmed by a replica"), "{alone}");
    assert!(began.elapsed() >= Duration::from_millis(100), "it has its time: a replica may be connecting");
    let replica = RedisServer::start();
    replica.replicate(&stack.redis);
    wait_until("the replica is connected", || stack.backing().ask("INFO replication").contains("state=online"));
    wait_until("it confirms", || client.ask("STOCK.DECR a 1 ACK replica TIMEOUT 5000").starts_with("[OK, "));
    assert!(client.ask("COUPON.ISSUE spring u ACK replica TIMEOUT 20000").starts_with("[ISSUED, 1, 9, "));
    assert!(client.ask("STOCK.SET b 7 ACK REPLICA TIMEOUT 20000").starts_with("[OK, 7, "));
    // It hangs: what is sold now is not there.
    signal(&replica, "-STOP");
    for _ in 0..3 {
        let pending = client.ask("STOCK.DECR a 1 REQUEST r-1 ACK replica TIMEOUT 50");
        assert!(pending.starts_with("-PENDING "), "{pending}");
    }
    let others: Vec<_> = (0..20)
        .map(|_| {
            let mut client = stack.connect();
            std::thread::spawn(move || client.ask("STOCK.DECR b 1 REQUEST r-2 ACK replica TIMEOUT 25000"))
        })
        .collect();
    assert!(client.ask("STOCK.DECR a 1 ACK postgres").starts_with("[OK, "), "others do not wait for it");
    signal(&replica, "-CONT");
    let replies: Vec<String> = others.into_iter().map(|other| other.join().unwrap()).collect();
    assert!(replies.iter().all(|reply| reply.starts_with("[OK, 6, ") && *reply == replies[0]), "{replies:?}");
    assert!(client.ask("STOCK.DECR a 1 REQUEST r-1 ACK replica TIMEOUT 20000").starts_with("[OK, "), "a repeat waits for its own ACK");
}
