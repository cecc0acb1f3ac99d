//! What nobody should send.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::time::Duration;

use crate::crowd::memory;
use crate::harness::Stack;

/// Frames in a test run; CI's nightly mode sends a million.
fn frames() -> u64 {
    std::env::var("HOLDFAST_HOSTILE_FRAMES").ok().and_then(|number| number.parse().ok()).unwrap_or(40_000)
}

/// Xorshift: the same frames in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }
}

const NUMBERS: &[&str] = &[
    "0",
    "1",
    "2",
    "3",
    "7",
    "-1",
    "-2",
    "-0",
    "+1",
    "01",
    " 1",
    "1e3",
    "1023",
    "1024",
    "1025",
    "65535",
    "65536",
    "65537",
    "1048576",
    "1048577",
    "2147483647",
    "2147483648",
    "4294967295",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "",
    "x",
    "99999999999999999999999999999999999999",
];

const WORDS: &[&[u8]] = &[
    b"STOCK.DECR",
    b"stock.get",
    b"COUPON.ISSUE",
    b"HELLO",
    b"CLIENT",
    b"INFO",
    b"COMMAND",
    b"DOCS",
    b"SUBSCRIBE",
    b"MONITOR",
    b"AUTH",
    b"REQUEST",
    b"ORDER",
    b"ACK",
    b"TIMEOUT",
    b"3",
    b"2",
    b"1",
    b"-1",
    b"",
    b"a",
    b"{",
    b"\0",
    b"\r\n",
    b"\xff\xfe",
    b"*",
    b"9999999999999999",
    b"LIST",
    b"KILL",
    b"SETNAME",
    b"EVAL",
    b"PING",
    b"ECHO",
    b"STOCK.MGET",
    b"RESET",
    b"CONFIG",
    b"GET",
    b"ACL",
    b"SLOWLOG",
];

/// One frame: well made, nearly well made, or nothing of the kind.
fn frame(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    match random.below(8) {
        0 => bytes.extend((0..random.below(120)).map(|_| u8::try_from(random.below(256)).unwrap())),
        1 => bytes.extend(format!("*{}\r\n", random.pick(NUMBERS)).bytes()),
        2 => bytes.extend(format!("*1\r\n${}\r\nPING\r\n", random.pick(NUMBERS)).bytes()),
        3 => bytes.extend(b"*1\r\n".repeat(usize::try_from(random.below(2_000)).unwrap())),
        4 => {
            for _ in 0..random.below(6) {
                bytes.extend_from_slice(random.pick::<&[u8]>(WORDS));
                bytes.push(*random.pick(b"  \t\"'\\"));
            }
            bytes.extend_from_slice(b"\r\n");
        }
        _ => {
            let words: Vec<&[u8]> = (0..=random.below(6)).map(|_| *random.pick(WORDS)).collect();
            bytes.extend(format!("*{}\r\n", words.len()).bytes());
            for word in words {
                bytes.extend(format!("${}\r\n", word.len()).bytes());
                bytes.extend_from_slice(word);
                bytes.extend_from_slice(b"\r\n");
            }
            if random.below(3) == 0 {
                let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
                match random.below(3) {
                    0 => bytes[at] ^= 1 << random.below(8),
                    1 => bytes.truncate(at),
                    _ => bytes.insert(at, u8::try_from(random.below(256)).unwrap()),
                }
            }
        }
    }
    bytes
}

#[test]
fn hostile_frames_crash_nothing_and_take_no_memory() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 1000000");
    let before = memory(&stack.sidecar);
    let (threads, total) = (4, frames());
    std::thread::scope(|scope| {
        for thread in 1..=threads {
            let sidecar = &stack.sidecar;
            scope.spawn(move || {
                let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (thread << 32));
                let mut sent = 0;
                while sent < total / threads {
                    let mut stream = sidecar.raw();
                    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
                    let mut bytes = Vec::new();
                    for _ in 0..=random.below(20) {
                        bytes.extend(frame(&mut random));
                        sent += 1;
                    }
                    // It may close in the middle, and is not to be waited for.
                    let _ = stream.write_all(&bytes);
                    let _ = stream.shutdown(Shutdown::Write);
                    let mut answer = Vec::new();
                    let _ = stream.take(1 << 20).read_to_end(&mut answer);
                }
            });
        }
    });
    let after = memory(&stack.sidecar);
    eprintln!("{} MiB before, {} MiB after {total} frames", before >> 20, after >> 20);
    assert!(after < before + (64 << 20), "{before} bytes before, {after} bytes after");
    assert_eq!(client.ask("PING"), "PONG");
    assert!(!stack.sidecar.log().contains("panicked"));
}
