//! How many instructions an operation takes in the parts that every request passes: codec, arguments, combiner, and the outbox's lines.
//!
//! Counted by callgrind, so that the machine and what else it does make no difference. Compared with benches/instructions.txt, which is
//! committed: more than a tenth worse is a failure; `UPDATE=1 make bench BENCH_ONLY=instructions` writes it anew. Another compiler makes
//! other code, so it is compared only where rustc is the same. Without valgrind nothing is counted, and that is said.
//!
//! The program runs itself under callgrind, each part with two numbers of turns: the difference is what the turns between cost, without
//! the start.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "as in tests: what fails shall end it")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use bytes::{Bytes, BytesMut};
use holdfast::command::table::TABLE;
use holdfast::command::{Args, Commands};
use holdfast::domain::change::{Operation, StockKind};
use holdfast::domain::{Grain, Id};
use holdfast::resp::{Encoder, Limits, Protocol, Reader, Reply, Request};
use holdfast::store::lane::Family as _;
use holdfast::store::stock::{Action, Stock, StockOp};

/// How much worse than the last commit's a count may be.
const WORSE_MAX: f64 = 1.10;
/// Of these turns the difference is taken.
const TURNS: [u64; 2] = [20, 120];
/// Says to the program that it is the one that is counted: the part, and how many turns.
const COUNTED: &str = "HOLDFAST_COUNTED";

/// A part, and how many operations a turn has.
struct Part {
    name: &'static str,
    operations: u64,
    run: fn(turns: u64),
}

const PARTS: &[Part] = &[
    Part { name: "requests read", operations: 16, run: read },
    Part { name: "replies written", operations: 16, run: write },
    Part { name: "replies written, of values", operations: 16, run: write_values },
    Part { name: "arguments matched", operations: 16, run: arguments },
    Part { name: "arguments matched, with REQUEST", operations: 16, run: arguments_with_request },
    Part { name: "combined, one product", operations: 512, run: combine_hot },
    Part { name: "combined, one product, a line a batch", operations: 512, run: combine_hot_by_batch },
    Part { name: "combined, 512 products", operations: 512, run: combine_many },
    Part { name: "outbox line read", operations: 1, run: line },
];

fn sku(number: u64) -> String {
    format!("sku-{number:012}")
}

/// A pipeline of 16, as it comes from a socket.
fn read(turns: u64) {
    let mut batch = Vec::new();
    for number in 0..16 {
        let product = sku(number);
        write!(as_text(&mut batch), "*3\r\n$10\r\nSTOCK.DECR\r\n${}\r\n{product}\r\n$1\r\n1\r\n", product.len()).unwrap();
    }
    let mut reader = Reader::default();
    for _ in 0..turns {
        reader.buffer.extend_from_slice(&batch);
        while let Some(request) = reader.next(Limits::KNOWN).unwrap() {
            black_box(request);
        }
    }
}

/// As a decrement is answered.
fn write(turns: u64) {
    for turn in 0..turns {
        let mut out = BytesMut::new();
        for number in 0..16 {
            let mut reply = Encoder::array(3);
            reply.bulk(b"OK").integer(1_000_000 - number).bulk(format!("1-{turn}").as_bytes());
            reply.done().encode(&mut out, Protocol::Resp2);
        }
        black_box(out);
    }
}

/// As most others are.
fn write_values(turns: u64) {
    for turn in 0..turns {
        let mut out = BytesMut::new();
        for number in 0..16 {
            let position = Reply::text(format!("1-{}", turn * 16 + number));
            let reply = Reply::Array(vec![Reply::word("OK"), Reply::Integer(1_000_000 - i64::try_from(number).unwrap()), position]);
            reply.encode(&mut out, Protocol::Resp2);
        }
        black_box(out);
    }
}

fn matched(turns: u64, words: &[String]) {
    let commands = Commands::new(TABLE);
    let words: Request = words.iter().collect();
    for _ in 0..turns * 16 {
        let words = words.clone();
        let (_, spec) = commands.find(&words).unwrap();
        let args = Args::parse(spec, words).unwrap();
        for (product, quantity) in args.pairs() {
            black_box((product, quantity));
        }
        black_box((args.request(), args.ack(), args.maybe_integer("timeout")));
    }
}

fn arguments(turns: u64) {
    matched(turns, &["STOCK.DECR".into(), sku(1), "1".into()]);
}

fn arguments_with_request(turns: u64) {
    matched(turns, &["STOCK.DECR".into(), sku(1), "1".into(), "REQUEST".into(), "r-000000000001".into()]);
}

/// A batch of decrements of so many products.
fn combined(turns: u64, products: u64, grain: Grain) {
    let product = |number: u64| Id::parse(Bytes::from(sku(number % products))).unwrap();
    let operation = |number| StockOp::new(Action::Change(StockKind::Decr), vec![(product(number), 1)]);
    let operations: Vec<StockOp> = (0..512).map(operation).collect();
    for _ in 0..turns {
        black_box(Stock::encode(operations.iter(), 0, grain));
    }
}

fn combine_hot(turns: u64) {
    combined(turns, 1, Grain::Operation);
}

fn combine_many(turns: u64) {
    combined(turns, 512, Grain::Operation);
}

fn combine_hot_by_batch(turns: u64) {
    combined(turns, 1, Grain::Batch);
}

fn line(turns: u64) {
    for _ in 0..turns {
        black_box(Operation::decode(black_box("0 decr | sku-000000000001 -1 999999")).unwrap());
    }
}

/// Lets text be written to bytes.
fn as_text(bytes: &mut Vec<u8>) -> impl std::fmt::Write {
    struct Text<'a>(&'a mut Vec<u8>);
    impl std::fmt::Write for Text<'_> {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            self.0.extend_from_slice(text.as_bytes());
            Ok(())
        }
    }
    Text(bytes)
}

fn main() -> ExitCode {
    if let Ok(counted) = std::env::var(COUNTED) {
        let (part, turns) = counted.split_once(' ').unwrap();
        (PARTS[part.parse::<usize>().unwrap()].run)(turns.parse().unwrap());
        return ExitCode::SUCCESS;
    }
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    if !only.is_empty() && !only.split([',', ' ']).any(|name| name == "instructions") {
        return ExitCode::SUCCESS;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("instructions: LEFT OUT: valgrind is not installed");
        return ExitCode::SUCCESS;
    }
    let rustc = rustc();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt");
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    let (by, before) = parse(&committed);
    let comparable = by == rustc;
    println!("Instructions an operation, by callgrind, {rustc}");
    if !comparable && !committed.is_empty() {
        println!("The committed counts are of {by}: not compared.");
    }
    let (mut worse, mut text) = (Vec::new(), format!("{rustc}\n"));
    for (number, part) in PARTS.iter().enumerate() {
        let [few, many] = TURNS.map(|turns| count(number, turns));
        let each = (many - few) as f64 / ((TURNS[1] - TURNS[0]) * part.operations) as f64;
        let _ = writeln!(text, "{}: {each:.0}", part.name);
        let change = before.get(part.name).filter(|_| comparable).map(|before| each / before);
        let said = change.map_or(String::new(), |change| format!("{:+.1} %", (change - 1.0) * 100.0));
        println!("  {:<34}{each:>9.0}  {said}", part.name);
        if change.is_some_and(|change| change > WORSE_MAX) {
            worse.push(part.name);
        }
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, text).unwrap();
        println!("Written to {}", file.display());
        return ExitCode::SUCCESS;
    }
    if worse.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("FAILED: more than a tenth worse: {}. Make it better, or write the counts anew with UPDATE=1.", worse.join(", "));
    ExitCode::FAILURE
}

/// What callgrind counts of so many turns of a part.
fn count(part: usize, turns: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().unwrap())
        .env(COUNTED, format!("{part} {turns}"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let collected = said.split_once("Collected : ").and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    collected.unwrap_or_else(|| panic!("no count in what callgrind said: {said}"))
}

/// The compiler and the kind of processor that the counts are of: those in use here.
fn rustc() -> String {
    let program = std::env::var_os("RUSTC").map_or_else(|| PathBuf::from("rustc"), PathBuf::from);
    let output = Command::new(program).arg("--version").output().unwrap();
    format!("{} {}", String::from_utf8_lossy(&output.stdout).trim(), std::env::consts::ARCH)
}

/// The compiler and the counts in the committed file.
fn parse(text: &str) -> (&str, BTreeMap<&str, f64>) {
    let (by, counts) = text.split_once('\n').unwrap_or_default();
    (by, counts.lines().filter_map(|line| line.split_once(": ")).filter_map(|(name, count)| Some((name, count.parse().ok()?))).collect())
}
