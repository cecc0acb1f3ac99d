//! How fast it is, beside the usual ways.
//!
//! `make bench`, `BENCH=short make bench` for a minute, `BENCH_ONLY=hot-p16,many-p16 make bench` for some cases by name. Starts a Redis, a
//! Postgres and the release build of its own, on loopback, and stops them in the end.
//!
//! Contenders run in rounds, A B A B, and Postgres catches up between them. Shown are medians over the rounds, and the median of the ratios
//! of each round: other work on the machine strikes both.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "as in tests: what fails shall end it, and the table goes to stdout"
)]

#[path = "../../tests/it/harness.rs"]
mod harness;
#[path = "../../tests/it/servers.rs"]
mod servers;

mod cases;
mod cpu;
mod goals;
mod redis_benchmark;
mod report;
mod rounds;
mod stage;
mod wire;

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use report::Report;
use stage::{Length, STOP, Stage, stopped};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let length = match std::env::var("BENCH").as_deref() {
        Ok("short") => Length::Short,
        Ok("full") | Err(_) => Length::Full,
        Ok(other) => {
            eprintln!("BENCH={other}: must be short or full");
            return ExitCode::FAILURE;
        }
    };
    let all: Vec<&str> = cases::slugs().collect();
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    let only: Vec<&str> = only.split([',', ' ']).filter(|name| !name.is_empty()).collect();
    if let Some(unknown) = only.iter().find(|name| !all.contains(name)) {
        eprintln!("BENCH_ONLY={unknown}: there are {}", all.join(", "));
        return ExitCode::FAILURE;
    }
    heed_signals();
    let began = Instant::now();
    let mut report = Report::default();
    // Time enough for each reply: redis-benchmark ends at the first error, and a machine that stalls must not stop it.
    let stage = Stage::start(length, &["--reply-within-ms", "20000"]);
    report.line(stage.machine());
    report.head();
    for slug in all.iter().filter(|slug| only.is_empty() || only.contains(slug)) {
        if cases::run(slug, &stage, &mut report).is_none() {
            break;
        }
    }
    drop(stage);
    report.line(format_args!("\nTook {} s.", began.elapsed().as_secs()));
    let broken = report.broken();
    if length == Length::Short && !broken.is_empty() {
        report.line(format_args!("FAILED: less than half of the goal: {}", broken.join(", ")));
        return ExitCode::FAILURE;
    }
    if stopped() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn heed_signals() {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut terminate, mut interrupt) = (signal(SignalKind::terminate()).unwrap(), signal(SignalKind::interrupt()).unwrap());
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            STOP.store(true, Ordering::Relaxed);
        });
    });
}
