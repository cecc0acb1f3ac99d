//! redis-benchmark as the load: the program that everybody knows, and that does not know Holdfast.

use std::process::Command;
use std::time::Duration;

use crate::rounds::{Latency, Round};
use crate::wire::kind_of;

/// How often a round may begin again.
const ATTEMPTS: u64 = 5;

#[derive(Clone, Copy)]
pub struct Load {
    pub port: u16,
    pub connections: usize,
    pub pipeline: usize,
    /// `__rand_int__` in a word stands for twelve digits below this.
    pub range: u64,
}

impl Load {
    /// Sends so many of this command.
    pub fn run(&self, words: &[String], operations: u64) -> Round {
        let mut round = Round::default();
        loop {
            let output = Command::new("redis-benchmark")
                .args(["-p", &self.port.to_string(), "-c", &self.connections.to_string(), "-P", &self.pipeline.to_string()])
                .args(["-n", &operations.to_string(), "-r", &self.range.to_string(), "--precision", "3"])
                .args(words)
                .output()
                .unwrap_or_else(|error| panic!("redis-benchmark, of the package redis-tools: {error}"));
            if let Some((rate, latency)) = read(&String::from_utf8_lossy(&output.stdout)) {
                (round.operations, round.took, round.latency) = (operations, Duration::from_secs_f64(operations as f64 / rate), latency);
                return round;
            }
            // It ends at the first error reply: the round begins again.
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().find(|line| line.contains("rror")).unwrap_or("it said nothing").to_owned();
            *round.errors.entry(format!("redis-benchmark gave up: {}", kind_of(said.as_bytes()))).or_default() += 1;
            if round.errors.values().sum::<u64>() >= ATTEMPTS || crate::stage::stopped() {
                return round;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

/// The rate and the latencies in what it prints.
fn read(text: &str) -> Option<(f64, Latency)> {
    let rate = text.split_once("throughput summary: ")?.1.split(' ').next()?.parse().ok()?;
    let (_, distribution) = text.split_once("Latency by percentile distribution:")?;
    let (distribution, _) = distribution.split_once("Cumulative distribution")?;
    // 99.902% <= 1.975 milliseconds (cumulative count 199824)
    let rows: Vec<(f64, f64)> = distribution
        .lines()
        .filter_map(|line| {
            let (percent, rest) = line.split_once("% <= ")?;
            Some((percent.parse().ok()?, rest.split(' ').next()?.parse().ok()?))
        })
        .collect();
    let at = |percent: f64| rows.iter().find(|row| row.0 >= percent).or(rows.last()).map_or(0.0, |row| row.1);
    Some((rate, Latency { p50: at(50.0), p99: at(99.0), p999: at(99.9), max: at(100.0) }))
}
