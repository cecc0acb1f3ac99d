//! Many clients at once: idle ones, ones that never read, ones that say one byte at a time.
//!
//! `HOLDFAST_CROWD` says how many are idle; a tenth of it never reads, another tenth trickles. 10,000 are what the README promises; they
//! need some 25,000 file descriptors in all, half of them here.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{Sidecar, Stack, wait_until};

/// What an idle connection may take of the sidecar's memory.
const IDLE_BYTES_MAX: u64 = 12 * 1024;

/// How many idle clients there are.
fn crowd() -> usize {
    std::env::var("HOLDFAST_CROWD").ok().and_then(|number| number.parse().ok()).unwrap_or(1_000)
}

/// The sidecar's memory, in bytes.
pub fn memory(sidecar: &Sidecar) -> u64 {
    status(sidecar, "VmRSS:")
}

/// The most that it ever was.
pub fn memory_peak(sidecar: &Sidecar) -> u64 {
    status(sidecar, "VmHWM:")
}

fn status(sidecar: &Sidecar, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", sidecar.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// How many commands the sidecar has answered.
fn answered(stack: &Stack) -> u64 {
    let stats = stack.connect().ask("INFO stats");
    let line = stats.lines().find_map(|line| line.strip_prefix("total_commands_processed:")).unwrap();
    line.trim().parse().unwrap()
}

/// A client that has said hello, as a library's pool does, and waits.
fn idle(sidecar: &Sidecar) -> TcpStream {
    let mut stream = sidecar.raw();
    stream.write_all(b"HELLO 3\r\nCLIENT SETINFO LIB-NAME crowd\r\nPING\r\n").unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"+PONG\r\n") {
        let mut chunk = [0; 512];
        let read = stream.read(&mut chunk).unwrap();
        assert!(read > 0, "closed");
        answer.extend_from_slice(&chunk[..read]);
    }
    stream
}

/// A client that asks for much and reads nothing.
fn deaf(sidecar: &Sidecar, requests: usize) -> TcpStream {
    let mut stream = sidecar.raw();
    stream.write_all("COMMAND DOCS\r\n".repeat(requests).as_bytes()).unwrap();
    stream
}

/// Waits until none of the deaf is answered any more; returns the most memory that was taken meanwhile.
fn until_nothing_moves(stack: &Stack) -> u64 {
    let (mut most, mut before) = (memory(&stack.sidecar), 0);
    wait_until("the deaf are not answered any more", || {
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(400) {
            most = most.max(memory(&stack.sidecar));
            std::thread::sleep(Duration::from_millis(5));
        }
        // Those are the commands that looking takes.
        let moved = answered(stack) - std::mem::replace(&mut before, answered(stack));
        moved <= 8
    });
    most
}

#[test]
fn clients_that_do_not_read_take_bounded_memory_get_all_once_they_read_and_are_closed_in_the_end() {
    let stack = Stack::with_settings(&["--limits-stall-ms", "15000"]);
    let (clients, requests) = (50, 200);
    let mut one = deaf(&stack.sidecar, 1);
    let mut length = 0;
    let mut chunk = vec![0; 1 << 20];
    one.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    while let Ok(read) = one.read(&mut chunk) {
        length += read;
    }
    let before = memory(&stack.sidecar);
    let mut deaf: Vec<_> = (0..clients).map(|_| deaf(&stack.sidecar, requests)).collect();
    let most = until_nothing_moves(&stack);
    eprintln!("{} MiB before, {} MiB at most, a reply has {length} bytes", before >> 20, most >> 20);
    assert!(most < before + (80 << 20), "{} MiB before, {} MiB with {clients} that do not read", before >> 20, most >> 20);
    let mut reading = deaf.pop().unwrap();
    let mut read = 0;
    while read < length * requests {
        read += reading.read(&mut chunk).unwrap();
    }
    assert_eq!(read, length * requests);
    reading.write_all(b"PING\r\n").unwrap();
    reading.read_exact(&mut chunk[..7]).unwrap();
    assert_eq!(&chunk[..7], b"+PONG\r\n");
    wait_until("those that take nothing are closed", || {
        stack.sidecar.get("/metrics").1.contains(&format!("holdfast_closed_connections_total{{why=\"stalled\"}} {}", deaf.len()))
    });
}

/// The 99th percentile of how long clients wait that do as clients should, in one window.
fn p99(stack: &Stack) -> Duration {
    let mut took: Vec<Duration> = std::thread::scope(|scope| {
        let buyers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = stack.connect();
                    let ask = |client: &mut crate::harness::Client| {
                        let began = Instant::now();
                        client.ok("STOCK.DECR a 1");
                        began.elapsed()
                    };
                    (0..1_000).map(|_| ask(&mut client)).collect::<Vec<_>>()
                })
            })
            .collect();
        buyers.into_iter().flat_map(|buyer| buyer.join().unwrap()).collect()
    });
    took.sort();
    took[took.len() * 99 / 100]
}

fn median(mut of: Vec<Duration>) -> Duration {
    of.sort();
    of[of.len() / 2]
}

/// Below this nothing is said about the server: it is what the machine's timers and its scheduler leave open.
const P99_FLOOR: Duration = Duration::from_millis(1);

#[test]
fn idle_connections_are_cheap_and_those_that_trickle_hold_up_nobody() {
    let settings = ["--max-clients", "20000", "--reply-within-ms", "20000"];
    let (stack, without) = (Stack::with_settings(&settings), Stack::with_settings(&settings));
    let tenth = crowd() / 10;
    for stack in [&stack, &without] {
        stack.connect().ok("STOCK.SET a 1000000");
    }
    // So that the crowd alone is what comes after it.
    p99(&stack);
    let before = memory(&stack.sidecar);
    let sitting: Vec<_> = (0..crowd()).map(|_| idle(&stack.sidecar)).collect();
    let each = memory(&stack.sidecar).saturating_sub(before) / sitting.len() as u64;
    assert!(each <= IDLE_BYTES_MAX, "{each} bytes an idle connection");

    let silent: Vec<_> = (0..tenth).map(|_| deaf(&stack.sidecar, 50)).collect();
    let mut trickling: Vec<_> = (0..tenth).map(|_| stack.sidecar.raw()).collect();
    let (over, paused) = (AtomicBool::new(false), AtomicBool::new(false));
    let (alone, among) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let request = b"*3\r\n$10\r\nSTOCK.MGET\r\n$1\r\na\r\n$1\r\nb\r\n";
            for byte in request.iter().cycle() {
                while paused.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if over.load(Ordering::Relaxed) {
                    break;
                }
                for stream in &mut trickling {
                    stream.write_all(&[*byte]).unwrap();
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        // One window of each after the other: whatever else the machine does is in both.
        let windows = (0..9).map(|_| {
            paused.store(true, Ordering::Relaxed);
            let alone = p99(&without);
            paused.store(false, Ordering::Relaxed);
            (alone, p99(&stack))
        });
        let (alone, among): (Vec<_>, Vec<_>) = windows.unzip();
        over.store(true, Ordering::Relaxed);
        (median(alone), median(among))
    });
    eprintln!("{} idle: {each} bytes each; p99 {alone:?} alone, {among:?} among them", sitting.len());
    assert!(among <= (alone * 2).max(P99_FLOOR), "p99 {alone:?} alone, {among:?} among the crowd");
    assert_eq!((sitting.len(), silent.len(), trickling.len()), (crowd(), tenth, tenth));
}
