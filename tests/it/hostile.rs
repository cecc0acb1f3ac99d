//! What nobody should send.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use holdfast::tls::{Files, own_client};

use crate::crowd::memory_peak;
use crate::harness::{Sidecar, Stack};
use crate::tls::Authority;

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

/// Sends so many frames over connections that `exchange` makes: it is given what to send, and reads what is said to it.
fn bombard(stack: &Stack, total: u64, exchange: impl Fn(&[u8], &mut Random) + Sync) {
    let before = memory_peak(&stack.sidecar);
    let threads = 4;
    std::thread::scope(|scope| {
        for thread in 1..=threads {
            let exchange = &exchange;
            scope.spawn(move || {
                let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (thread << 32));
                let mut sent = 0;
                while sent < total / threads {
                    let mut bytes = Vec::new();
                    for _ in 0..=random.below(20) {
                        bytes.extend(frame(&mut random));
                        sent += 1;
                    }
                    exchange(&bytes, &mut random);
                }
            });
        }
    });
    let most = memory_peak(&stack.sidecar);
    eprintln!("{} MiB before, {} MiB at most with {total} frames", before >> 20, most >> 20);
    assert!(most < before + (64 << 20), "{before} bytes before, {most} bytes at most");
    assert!(!stack.sidecar.log().contains("panicked"));
}

/// Sends it all, closes that side, and reads what comes. The server may close in the middle, and is not to be waited for.
fn over_tcp(sidecar: &Sidecar, bytes: &[u8]) {
    let mut stream = sidecar.raw();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.take(1 << 20).read_to_end(&mut answer);
}

#[test]
fn hostile_frames_crash_nothing_and_take_no_memory() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 1000000");
    bombard(&stack, frames(), |bytes, _| over_tcp(&stack.sidecar, bytes));
    assert_eq!(client.ask("PING"), "PONG");
}

#[test]
fn hostile_frames_of_strangers_and_of_users_with_few_rights_change_nothing() {
    // The SHA-256 of "secret".
    let hash = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
    let users = std::env::temp_dir().join(format!("holdfast-hostile-{}", std::process::id()));
    std::fs::write(&users, format!("user ops on #{hash} allkeys +@all\nuser few on #{hash} ~nothing +@read +@connection\n")).unwrap();
    let stack = Stack::with_settings(&["--auth-users-file", users.to_str().unwrap(), "--auth-delay-ms", "0", "--reply-within-ms", "20000"]);
    let mut client = stack.sidecar.connect_as("ops", "secret");
    client.ok("STOCK.SET a 1000000");
    bombard(&stack, frames() / 4, |bytes, random| {
        let known = if random.below(2) == 0 { "AUTH few secret\r\n" } else { "" };
        over_tcp(&stack.sidecar, &[known.as_bytes(), bytes].concat());
    });
    assert_eq!(client.ask("STOCK.GET a"), "1000000");
    assert_eq!(stack.backing().ask("HGET holdfast:meta n"), "1");
    let _ = std::fs::remove_file(users);
}

#[test]
fn hostile_frames_within_tls_and_in_its_place_crash_nothing() {
    let authority = Authority::new("hostile");
    let (cert, key) = (authority.file("server.crt"), authority.file("server.key"));
    let stack = Stack::with_settings(&["--tls-cert-file", &cert, "--tls-key-file", &key, "--reply-within-ms", "20000"]);
    let files = Files { cert: cert.into(), key: key.into(), client_ca: None };
    let config = own_client(&files).unwrap();
    bombard(&stack, frames() / 8, |bytes, random| {
        if random.below(4) == 0 {
            return over_tcp(&stack.sidecar, bytes);
        }
        let stream = stack.sidecar.raw();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let session = rustls::ClientConnection::new(Arc::clone(&config), "localhost".try_into().unwrap()).unwrap();
        let mut tls = rustls::StreamOwned::new(session, stream);
        let _ = tls.write_all(bytes);
        // Now and then what is no record comes in the middle of them.
        if random.below(4) == 0 {
            let _ = tls.sock.write_all(bytes);
        }
        tls.conn.send_close_notify();
        let _ = tls.flush();
        let mut answer = Vec::new();
        let _ = tls.take(1 << 20).read_to_end(&mut answer);
    });
    let options = ["--tls", "--cacert", &authority.file("ca.crt"), "PING"];
    assert_eq!(stack.sidecar.cli(&options).0, "PONG\n");
}
