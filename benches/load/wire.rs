//! As much of RESP as a load generator needs.

use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// A command as RESP.
pub fn command(words: &[&str]) -> Vec<u8> {
    let words_of = words.iter().map(|word| format!("${}\r\n{word}\r\n", word.len()));
    format!("*{}\r\n{}", words.len(), words_of.collect::<String>()).into_bytes()
}

/// The length of the reply that these bytes begin with, if it is complete.
pub fn frame(bytes: &[u8]) -> Option<usize> {
    let end = bytes.iter().position(|&byte| byte == b'\n')? + 1;
    let number = || std::str::from_utf8(&bytes[1..end - 2]).ok()?.parse::<i64>().ok();
    match bytes[0] {
        b'$' => {
            let length = usize::try_from(number()?).map_or(end, |length| end + length + 2);
            (length <= bytes.len()).then_some(length)
        }
        b'*' => (0..number()?).try_fold(end, |at, _| Some(at + frame(&bytes[at..])?)),
        _ => Some(end),
    }
}

/// An error reply with its numbers and ids left out, so that those of one kind count as one.
pub fn kind_of(reply: &[u8]) -> String {
    let reply = String::from_utf8_lossy(reply);
    let words = reply.split_whitespace().map(|word| {
        let id = word.trim_start_matches('\'').starts_with("hf-") || word.chars().any(|c| c.is_ascii_digit());
        if id { "#" } else { word }
    });
    words.collect::<Vec<_>>().join(" ")
}

pub async fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Many at once, from several addresses: those of the round before still take up ports of each.
pub async fn connect_many(port: u16, count: usize) -> Vec<TcpStream> {
    let mut streams = Vec::with_capacity(count);
    for number in 0..count {
        let socket = TcpSocket::new_v4().unwrap();
        let from = Ipv4Addr::new(127, 0, 0, 1 + u8::try_from(number / 1_000 % 100).unwrap());
        socket.bind((from, 0).into()).unwrap();
        let stream = socket.connect((Ipv4Addr::LOCALHOST, port).into()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        streams.push(stream);
        // A server that has not come to accept these would drop the next, which are then tried again only after a second.
        if number % 64 == 63 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    streams
}

/// Sends commands, and waits for every answer; none may be an error.
pub async fn send_all(port: u16, commands: impl Iterator<Item = Vec<u8>>) {
    let mut stream = connect(port).await;
    let mut commands = commands.peekable();
    while commands.peek().is_some() {
        let (mut out, mut missing) = (Vec::new(), 0);
        for command in commands.by_ref().take(500) {
            out.extend_from_slice(&command);
            missing += 1;
        }
        stream.write_all(&out).await.unwrap();
        let mut input = Vec::new();
        while missing > 0 {
            assert!(stream.read_buf(&mut input).await.unwrap() > 0, "the connection was closed");
            let mut at = 0;
            while let Some(length) = frame(&input[at..]) {
                assert!(!input[at..].starts_with(b"-"), "{}", String::from_utf8_lossy(&input[at..]));
                (at, missing) = (at + length, missing - 1);
            }
            input.drain(..at);
        }
    }
}
