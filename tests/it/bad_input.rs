//! Every argument at its bounds and past them: the error, the connection kept, nothing changed.

use std::io::{Read as _, Write as _};

use crate::harness::Stack;

#[test]
fn bad_arguments_are_refused_by_name_and_change_nothing() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ok("COUPON.CREATE c 5");
    let long = "x".repeat(129);
    let ids: [&str; 9] = ["", " ", "a b", "a{b", "}", "a\tb", "a\r\nb", "a\0", &long];
    for bad in ids {
        for (words, what) in [
            (vec!["STOCK.SET", bad, "1"], "product"),
            (vec!["STOCK.DEL", bad], "product"),
            (vec!["STOCK.GET", bad], "product"),
            (vec!["STOCK.MGET", "a", bad], "product"),
            (vec!["STOCK.INFO", bad], "product"),
            (vec!["STOCK.INCR", bad, "1"], "product"),
            (vec!["STOCK.DECR", "a", "1", bad, "1"], "product"),
            (vec!["COUPON.CREATE", bad, "1"], "coupon"),
            (vec!["COUPON.ISSUE", bad, "u"], "coupon"),
            (vec!["COUPON.ISSUE", "c", bad], "user"),
            (vec!["COUPON.GET", "c", bad], "user"),
            (vec!["COUPON.INFO", bad], "coupon"),
        ] {
            let reply = client.ask_words(&words);
            assert!(reply.starts_with(&format!("-ERR invalid {what} id")), "{words:?}: {reply}");
        }
    }
    for bad in ["0", "-1", "+1", " 1", "1 ", "1e3", "0x1", "", "01", "1.0", "1000000000001", "9223372036854775808", "NaN", "１"] {
        for words in [vec!["STOCK.INCR", "a", bad], vec!["STOCK.DECR", "a", bad], vec!["STOCK.DECR", "a", "1", "b", bad]] {
            let reply = client.ask_words(&words);
            assert!(reply.starts_with("-ERR invalid quantity: a whole number from 1 to 1000000000000"), "{words:?}: {reply}");
        }
        if bad != "0" {
            assert!(client.ask_words(&["STOCK.SET", "a", bad]).starts_with("-ERR invalid quantity: a whole number from 0 to"), "{bad}");
        }
        assert!(client.ask_words(&["COUPON.CREATE", "new", bad]).starts_with("-ERR invalid total"), "{bad}");
        assert!(client.ask_words(&["COUPON.CREATE", "new", "1", "PERUSER", bad]).starts_with("-ERR invalid peruser"), "{bad}");
        assert!(client.ask_words(&["STOCK.DECR", "a", "1", "TIMEOUT", bad]).starts_with("-ERR invalid timeout"), "{bad}");
    }
    for (command, error) in [
        ("STOCK.SET a", "-ERR wrong number of arguments for 'stock.set' command"),
        ("STOCK.DECR a", "-ERR wrong number of arguments for 'stock.decr' command"),
        ("STOCK.DECR a 1 b", "-ERR wrong number of arguments for 'stock.decr' command"),
        ("STOCK.GET", "-ERR wrong number of arguments for 'stock.get' command"),
        ("STOCK.GET a b", "-ERR wrong number of arguments for 'stock.get' command"),
        ("STOCK.DECR a 1 ACK redis ACK redis", "-ERR syntax error"),
        ("STOCK.DECR a 1 REQUEST", "-ERR syntax error"),
        ("STOCK.SET a 1 FROB 1", "-ERR syntax error"),
        ("STOCK.DECR a 1 ACK disk", "-ERR invalid ack"),
        ("STOCK.DECR a 1 REQUEST hf-1", "-ERR invalid request id"),
        ("STOCK.DECR request 1", "-ERR invalid product id"),
        ("STOCK.SCAN x", "-ERR invalid cursor"),
        ("STOCK.SCAN 0 COUNT 0", "-ERR invalid count"),
        ("STOCK.FROB a 1", "-ERR unknown command 'STOCK.FROB', with args beginning with: 'a' '1' "),
        ("SELECT 1", "-ERR DB index is out of range"),
    ] {
        let reply = client.ask(command);
        assert!(reply.starts_with(error), "{command}: {reply}");
    }
    let long = "x".repeat(65);
    assert!(client.ask(&format!("STOCK.DECR a 1 REQUEST {long}")).starts_with("-ERR invalid request id"));
    assert!(client.ask_words(&["STOCK.DECR", "a", "1", "REQUEST", ""]).starts_with("-ERR invalid request id"));
    assert_eq!(client.ask("STOCK.GET a"), "10");
    assert_eq!(client.field("COUPON.INFO c", "issued"), "0");
    assert_eq!(client.ask("COUPON.INFO new"), "nil");
    assert_eq!(stack.backing().ask("HGET holdfast:meta n"), "2");
    let longest = "y".repeat(128);
    assert!(client.ask(&format!("STOCK.SET {longest} 1000000000000")).starts_with("[OK, 1000000000000, "));
    assert!(client.ask(&format!("STOCK.DECR {longest} 1 REQUEST {}", "z".repeat(64))).starts_with("[OK, 999999999999, "));
}

#[test]
fn a_protocol_error_closes_its_connection_and_no_other() {
    let stack = Stack::start();
    let mut other = stack.connect();
    for (bytes, error) in [
        (&b"*1\r\n$99999999999\r\n"[..], "-ERR Protocol error: invalid bulk length\r\n"),
        (b"*2147483648\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*1\r\n*1\r\n$4\r\nPING\r\n", "-ERR Protocol error: expected '$', got '*'\r\n"),
        (b"*1\r\n$-5\r\n", "-ERR Protocol error: invalid bulk length\r\n"),
        (b"PING \"unbalanced\r\n", "-ERR Protocol error: unbalanced quotes in request\r\n"),
    ] {
        let mut raw = stack.sidecar.raw();
        raw.write_all(b"PING\r\n").unwrap();
        raw.write_all(bytes).unwrap();
        let mut answer = String::new();
        raw.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("+PONG\r\n{error}"), "{}", String::from_utf8_lossy(bytes));
        assert_eq!(other.ask("PING"), "PONG");
    }
}

#[test]
fn garbage_never_ends_the_server() {
    let stack = Stack::start();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..300 {
        let mut raw = stack.sidecar.raw();
        let bytes: Vec<u8> =
            (0..random() % 200).map(|_| b"*$\r\n0123456789-+STOCK.DECRa \"'\0\xff"[usize::try_from(random() % 32).unwrap()]).collect();
        // The server may close in the middle.
        let _ = raw.write_all(&bytes);
        let _ = raw.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = raw.read_to_end(&mut answer);
    }
    assert_eq!(stack.connect().ask("PING"), "PONG");
    assert!(!stack.sidecar.log().contains("panicked"));
}
