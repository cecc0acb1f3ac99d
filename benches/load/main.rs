//! How fast it is, beside the usual ways.
//!
//! `make bench`, `BENCH=short make bench` for a minute, `BENCH_ONLY=hot-p16,many-p16 make bench` for some cases by name. Starts a Redis, a
//! Postgres and the release build of its own, on loopback, and stops them in the end.
//!
//! Contenders run in rounds, A B A B, and Postgres catches up between them. Shown are medians over the rounds, and the median of the ratios
//! of each round: other work on the machine strikes both. The table and a plot of the figures against their goals are kept under
//! target/bench. A short run fails where a ratio is below half of its goal.
//!
//! - [`goals`]: what each figure is to be, the one place where that stands
//! - [`cases`]: comparisons by redis-benchmark ([`redis_benchmark`]) with the direct script, [`haproxy`], [`locks`], [`pgbench`]
//! - [`flow`], [`orders`], [`pressure`], [`memory`]: figures of Holdfast alone, by a load [`generator`] of our own
//! - [`stage`], [`cpu`], [`rounds`]: the servers, what they take, and the turns; [`tools`], [`wire`]: what the others share
//! - [`report`], [`plot`]: the table and the plot

#![allow(
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
mod flow;
mod generator;
mod goals;
mod haproxy;
mod locks;
mod memory;
mod orders;
mod pgbench;
mod plot;
mod pressure;
mod redis_benchmark;
mod report;
mod rounds;
mod stage;
mod tools;
mod wire;

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use report::Report;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use stage::{Length, STOP, Stage, stopped};
use tokio::signal::unix::{SignalKind, signal};

/// Is measured by the program of that name, benches/instructions.rs.
const INSTRUCTIONS: &str = "instructions";

/// The servers of a case.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Servers {
    /// See [`PATIENT`].
    Patient,
    /// As they are by default.
    Usual,
    /// With room in the outbox for what is sold while the relay is held.
    Roomy,
    /// With a row of the ledger for all that a batch does to a product.
    ByBatch,
    /// That nobody has used before.
    Unused,
}

/// Time enough for each reply, and room enough in the outbox: redis-benchmark ends at the first error, and neither a machine that stalls nor
/// a burst shall stop it. And for ten thousand connections.
pub const PATIENT: &[&str] = &["--reply-within-ms", "20000", "--outbox-max-mib", "8192", "--max-clients", "12000"];

/// What is measured, under the name that `BENCH_ONLY` knows.
struct Case {
    slug: &'static str,
    /// Whether a short run has it.
    short: bool,
    servers: Servers,
    run: fn(&str, &Stage, &mut Report) -> Option<()>,
}

const fn case(slug: &'static str, short: bool, servers: Servers, run: fn(&str, &Stage, &mut Report) -> Option<()>) -> Case {
    Case { slug, short, servers, run }
}

/// In the order in which they run.
const CASES: &[Case] = &[
    case("hot-p16", true, Servers::Patient, cases::direct),
    case("many-p16", true, Servers::Patient, cases::direct),
    case("hot-p1", true, Servers::Patient, cases::direct),
    case("many-p1", true, Servers::Patient, cases::direct),
    case("many-p1-c200", true, Servers::Patient, cases::direct),
    case("soldout-p16", true, Servers::Patient, cases::direct),
    case("haproxy-p1", false, Servers::Patient, cases::haproxy),
    case("haproxy-p16", false, Servers::Patient, cases::haproxy),
    case("coupon-locks", false, Servers::Patient, cases::coupon),
    case("for-update", true, Servers::Patient, cases::for_update),
    case("connections-10k", false, Servers::Patient, cases::connections),
    case("products-1m", false, Servers::Patient, cases::products),
    case("import", false, Servers::Patient, cases::import),
    case("ack-postgres", true, Servers::Usual, flow::ack),
    case("reserve-cost", true, Servers::Patient, orders::reserve),
    case("expire", false, Servers::Usual, orders::expire),
    case("burst", false, Servers::Usual, flow::burst),
    case("relay-alone", false, Servers::Usual, flow::relay),
    case("sustained", false, Servers::Usual, flow::sustained),
    case("half-peak", false, Servers::Usual, pressure::half_peak),
    case("overload", false, Servers::Roomy, pressure::overload),
    case("relay-batch", false, Servers::ByBatch, flow::relay_by_batch),
    case("sustained-batch", false, Servers::ByBatch, flow::sustained),
    case("memory", true, Servers::Unused, memory::run),
];

fn main() -> ExitCode {
    let length = match std::env::var("BENCH").as_deref() {
        Ok("short") => Length::Short,
        Ok("full") | Err(_) => Length::Full,
        Ok(other) => {
            eprintln!("BENCH={other}: must be short or full");
            return ExitCode::FAILURE;
        }
    };
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    let only: Vec<&str> = only.split([',', ' ']).filter(|name| !name.is_empty()).collect();
    if only == [INSTRUCTIONS] {
        return ExitCode::SUCCESS;
    }
    if let Some(unknown) = only.iter().find(|name| **name != INSTRUCTIONS && CASES.iter().all(|case| case.slug != **name)) {
        let all: Vec<&str> = CASES.iter().map(|case| case.slug).chain([INSTRUCTIONS]).collect();
        eprintln!("BENCH_ONLY={unknown}: there are {}", all.join(", "));
        return ExitCode::FAILURE;
    }
    let wanted = |case: &&Case| if only.is_empty() { case.short || length == Length::Full } else { only.contains(&case.slug) };
    heed_signals();
    allow_many_files();
    let began = Instant::now();
    let mut report = Report::default();
    run(CASES.iter().filter(wanted), length, &mut report);
    report.line("");
    report.legend();
    report.line(format_args!("\nTook {} s.", began.elapsed().as_secs()));
    report.missed();
    let broken = report.broken();
    let failed = length == Length::Short && !broken.is_empty();
    if failed {
        report.line(format_args!("FAILED: less than half of the goal: {}", broken.join(", ")));
    }
    if stopped() {
        return ExitCode::FAILURE;
    }
    // What some cases say does not replace what a whole run has said.
    report.save(match (only.is_empty(), length) {
        (false, _) => "some",
        (true, Length::Short) => "short",
        (true, Length::Full) => "full",
    });
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Each on its servers, until told to stop.
fn run<'a>(cases: impl Iterator<Item = &'a Case>, length: Length, report: &mut Report) {
    let mut running: Option<(Servers, Stage)> = None;
    for case in cases {
        if running.as_ref().is_none_or(|(servers, _)| *servers != case.servers) {
            let is_first = running.is_none();
            // The ones before end first.
            drop(running.take());
            let flags = match case.servers {
                Servers::Patient => PATIENT,
                Servers::Roomy => &["--outbox-max-mib", "8192", "--outbox-max-changes", "20000000"],
                Servers::ByBatch => &["--ledger-detail", "batch"],
                Servers::Usual | Servers::Unused => &[],
            };
            let stage = Stage::start(length, flags);
            if is_first {
                report.line(stage.machine());
                report.head();
            }
            if case.servers != Servers::Unused {
                stage.create_products();
            }
            running = Some((case.servers, stage));
        }
        let Some((_, stage)) = &running else { return };
        let began = Instant::now();
        if stopped() || (case.run)(case.slug, stage, report).is_none() {
            return;
        }
        report.line(format_args!("    ({:.0} s)", began.elapsed().as_secs_f64()));
    }
}

/// For ten thousand connections. The servers inherit it.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
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
