//! More than Redis can do in time: what is too much is refused as it comes, and the rest is served and counted exactly.

use std::io::{BufRead, BufReader, Write as _};
use std::net::TcpStream;

use crate::harness::Stack;
use crate::locks::metric;

const PRODUCTS: usize = 16;
const UNITS: usize = 1_000_000;
const CONNECTIONS: usize = 40;
/// More than may be in flight: what comes after that finds the pace known.
const COMMANDS: usize = 1_500;

/// What came of the commands of one connection.
#[derive(Default)]
struct Tally {
    done: usize,
    /// Refused as they came, and at the end of their time.
    crowded: usize,
    late: usize,
    /// It is not known whether they were done.
    in_doubt: usize,
    others: Vec<String>,
}

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

/// Sends all of it at once, and reads the replies meanwhile.
fn pipeline(mut stream: TcpStream, command: &[u8]) -> Tally {
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    let all = command.repeat(COMMANDS);
    let sending = std::thread::spawn(move || stream.write_all(&all).unwrap());
    let mut tally = Tally::default();
    for _ in 0..COMMANDS {
        let reply = line(&mut replies);
        if let Some(elements) = reply.strip_prefix('*') {
            for _ in 0..elements.parse().unwrap() {
                if line(&mut replies).starts_with('$') {
                    line(&mut replies);
                }
            }
            tally.done += 1;
        } else if reply.contains("more operations wait for Redis") {
            tally.crowded += 1;
        } else if reply.starts_with("-TRYAGAIN ") {
            tally.late += 1;
        } else if reply.starts_with("-INDOUBT ") {
            tally.in_doubt += 1;
        } else {
            tally.others.push(reply);
        }
    }
    sending.join().unwrap();
    tally
}

#[test]
fn a_crowd_of_large_operations_is_refused_as_it_comes_and_the_rest_is_counted() {
    let stack = Stack::with_deadline(500);
    let mut client = stack.connect();
    let names: Vec<String> = (0..PRODUCTS).map(|number| format!("p-{number}")).collect();
    names.iter().for_each(|name| client.ok(&format!("STOCK.SET {name} {UNITS} ACK redis")));
    let mut command = format!("*{}\r\n$10\r\nSTOCK.DECR\r\n", 1 + 2 * PRODUCTS);
    names.iter().for_each(|name| command += &format!("${}\r\n{name}\r\n$1\r\n1\r\n", name.len()));
    let connections: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let (stream, command) = (stack.sidecar.raw(), command.clone());
            std::thread::spawn(move || pipeline(stream, command.as_bytes()))
        })
        .collect();
    let tallies: Vec<Tally> = connections.into_iter().map(|connection| connection.join().unwrap()).collect();
    let sum = |of: fn(&Tally) -> usize| tallies.iter().map(of).sum::<usize>();
    let (done, crowded, in_doubt) = (sum(|tally| tally.done), sum(|tally| tally.crowded), sum(|tally| tally.in_doubt));
    eprintln!("{done} done, {crowded} refused as they came, {} late, {in_doubt} in doubt", sum(|tally| tally.late));
    let others: Vec<&String> = tallies.iter().flat_map(|tally| &tally.others).collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(done > 0 && crowded > 0);
    let left = client.ask(&format!("STOCK.MGET {}", names.join(" ")));
    let sold = UNITS - left.trim_matches(['[', ']']).split(", ").next().unwrap().parse::<usize>().unwrap();
    assert!((done..=done + in_doubt).contains(&sold), "{sold} sold");
    assert_eq!(left, format!("[{}]", vec![(UNITS - sold).to_string(); PRODUCTS].join(", ")), "all of an operation or nothing");
    assert!(metric(&stack.sidecar, "holdfast_paused_reads_total{why=\"crowded\"}") > 0.0);
    // It is over, and once some were done as they came, as many small ones at once are none too many.
    (0..50).for_each(|_| client.ok("STOCK.DECR p-0 1"));
    let small = pipeline(stack.sidecar.raw(), b"*3\r\n$10\r\nSTOCK.DECR\r\n$3\r\np-0\r\n$1\r\n1\r\n");
    assert_eq!(small.done, COMMANDS);
}
