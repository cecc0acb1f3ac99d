//! Holdfast from Rust, with the crate redis: `cargo run --release --example client` after `make run`.
//!
//! With a port and a protocol (2, 3, or 0 for the client's own choice) it is a client for the tests: each line of the standard input is a
//! command, its words in hexadecimal digits; the reply is printed as JSON. It logs in as `$CLIENT_USER`, if there is one.

#![allow(clippy::print_stdout, reason = "it is a program for a terminal")]

use std::error::Error;
use std::fmt::Write as _;
use std::io::{BufRead as _, Write as _};
use std::time::Duration;

use redis::{Client, Cmd, Connection, ConnectionLike as _, ErrorKind, IntoConnectionInfo as _, ProtocolVersion, RedisError, Value};

/// How long a reply may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends a change. Every try carries the same REQUEST, so that there is one effect at most.
fn change(client: &Client, words: &[&str]) -> Result<Value, Box<dyn Error>> {
    let request = uuid::Uuid::new_v4().to_string();
    let mut last: Box<dyn Error> = "not tried".into();
    for _ in 0..5 {
        let asked = client.get_connection().and_then(|mut connection| {
            let mut command = Cmd::new();
            command.arg(words).arg("REQUEST").arg(&request).query::<Value>(&mut connection)
        });
        match asked {
            Ok(reply) => return Ok(reply),
            Err(error) if error.code().is_some_and(|word| !matches!(word, "LOADING" | "TRYAGAIN" | "INDOUBT")) => return Err(error.into()),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

fn example(client: &Client) -> Result<(), Box<dyn Error>> {
    let replies = [["STOCK.SET", "rust-mug", "10"], ["STOCK.DECR", "rust-mug", "3"], ["STOCK.DECR", "rust-mug", "8"]];
    for (words, outcome) in replies.iter().zip(["OK", "OK", "INSUFFICIENT"]) {
        // A refusal is a reply, not an error: element 0 tells.
        let Value::Array(reply) = change(client, words)? else { return Err("not a list".into()) };
        let word: String = redis::from_redis_value(reply.into_iter().next().ok_or("an empty list")?)?;
        println!("{} {word}", words[0]);
        if word != outcome {
            return Err(format!("{word}, not {outcome}").into());
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [port, protocol] = &arguments[..] else {
        let port = arguments.first().map_or("6380", String::as_str);
        return example(&Client::open(format!("redis://127.0.0.1:{port}/"))?);
    };
    let info = format!("redis://127.0.0.1:{port}/").into_connection_info()?;
    let settings = match protocol.as_str() {
        "2" => info.redis_settings().clone().set_protocol(ProtocolVersion::RESP2),
        "3" => info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3),
        _ => info.redis_settings().clone(),
    };
    let settings = match (std::env::var("CLIENT_USER"), std::env::var("CLIENT_PASSWORD")) {
        (Ok(user), Ok(password)) => settings.set_username(user).set_password(password),
        _ => settings,
    };
    let client = Client::open(info.set_redis_settings(settings))?;
    let mut connection = match open(&client) {
        Ok(connection) => connection,
        Err(error) => {
            // It is not let in: that is the answer to whatever is asked.
            for _ in std::io::stdin().lock().lines() {
                println!("{}", refused(&error));
            }
            return Ok(());
        }
    };
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let said = match words[..] {
            ["pipeline", depth] => pipeline(&mut connection, depth.parse()?)?.to_string(),
            ["pool", size] => pool(&client, size.parse()?)?.to_string(),
            ["subscribe", channel] => quoted(&subscribe(&client, channel)?),
            _ => match command(&words)?.query::<Value>(&mut connection) {
                Ok(reply) => json(&reply),
                Err(error) => match error.code() {
                    Some(_) => refused(&error),
                    None => {
                        // A connection of this crate's own does not come back by itself.
                        connection = open(&client)?;
                        format!("{{\"lost\":{}}}", quoted(&error.to_string()))
                    }
                },
            },
        };
        println!("{said}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn refused(error: &RedisError) -> String {
    let word = match error.kind() {
        // So the crate has it, whose error is without the server's word.
        ErrorKind::AuthenticationFailed => "WRONGPASS",
        _ => error.code().unwrap_or_default(),
    };
    format!("{{\"error\":{}}}", quoted(&format!("{word} {}", error.detail().unwrap_or_default())))
}

fn open(client: &Client) -> Result<Connection, RedisError> {
    let connection = client.get_connection()?;
    connection.set_read_timeout(Some(PATIENCE))?;
    Ok(connection)
}

fn command(words: &[&str]) -> Result<Cmd, Box<dyn Error>> {
    let mut command = Cmd::new();
    for hex in words {
        let digits = if *hex == "." { "" } else { hex };
        let bytes: Result<Vec<u8>, _> = (0..digits.len() / 2).map(|at| u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16)).collect();
        command.arg(bytes?);
    }
    Ok(command)
}

fn pipeline(connection: &mut Connection, depth: usize) -> Result<bool, Box<dyn Error>> {
    let mut pipeline = redis::pipe();
    for _ in 0..depth {
        pipeline.cmd("STOCK.GET").arg("rust-mug");
    }
    let replies: Vec<i64> = pipeline.query(connection)?;
    Ok(replies.len() == depth)
}

fn pool(client: &Client, size: usize) -> Result<bool, Box<dyn Error>> {
    let all: Result<Vec<Connection>, _> = (0..size).map(|_| open(client)).collect();
    let mut good = true;
    for mut connection in all? {
        good &= matches!(connection.req_command(redis::cmd("STOCK.GET").arg("rust-mug"))?, Value::Int(_));
    }
    Ok(good)
}

/// The first message.
fn subscribe(client: &Client, channel: &str) -> Result<String, Box<dyn Error>> {
    let mut connection = open(client)?;
    let mut subscription = connection.as_pubsub();
    subscription.subscribe(channel)?;
    let message = subscription.get_message()?.get_payload()?;
    subscription.unsubscribe(channel)?;
    Ok(message)
}

fn json(value: &Value) -> String {
    let list = |values: &[Value]| values.iter().map(json).collect::<Vec<_>>().join(",");
    match value {
        Value::Nil => "null".to_owned(),
        Value::Int(number) => number.to_string(),
        Value::Boolean(is_so) => is_so.to_string(),
        Value::Okay => quoted("OK"),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => quoted(text),
        Value::BulkString(bytes) => quoted(&String::from_utf8_lossy(bytes)),
        Value::Array(values) | Value::Set(values) => format!("[{}]", list(values)),
        Value::Map(pairs) => {
            let shown: Vec<String> = pairs.iter().map(|(name, value)| format!("{}:{}", json(name), json(value))).collect();
            format!("{{{}}}", shown.join(","))
        }
        Value::ServerError(error) => {
            format!("{{\"error\":{}}}", quoted(&format!("{} {}", error.code(), error.details().unwrap_or_default())))
        }
        other => quoted(&format!("{other:?}")),
    }
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => _ = write!(out, "\\u{:04x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out + "\""
}
