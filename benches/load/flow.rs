//! From clients to Postgres: how much for a while, how much for ever, and how much with a reply that waits for it.

use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::generator::{Closed, Gate, Tally, Template, status};
use crate::report::Report;
use crate::rounds::{Contender, Relay, in_turns, median};
use crate::stage::{Side, Stage, stopped};
use crate::wire::connect;

/// More than are ever sent.
const UNBOUNDED: u64 = u64::MAX;
/// Let grow so long, in seconds of what Postgres takes; so that the lag stays below 1 s.
const LAG_HIGH: f64 = 0.5;
const LAG_LOW: f64 = 0.25;

pub fn closed(stage: &Stage, connections: usize, pipeline: usize, time: Duration) -> Closed {
    Closed { port: stage.port(Side::Holdfast), connections, pipeline, time, at_most: UNBOUNDED }
}

/// Runs a closed loop.
pub fn load(stage: &Stage, closed: &Closed, template: &Template) -> (Tally, Duration) {
    stage.runtime.block_on(closed.run(template, &Rc::default()))
}

/// As fast as it goes, whatever Postgres has.
pub fn burst(_: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let time = Duration::from_secs(if stage.is_short() { 1 } else { 5 });
    for (many, what) in [(false, "one product"), (true, "10,000 products")] {
        let template = Template::with_request(stage, many);
        let before = stage.cpu();
        let (tally, took) = load(stage, &closed(stage, 50, 16, time), &template);
        let (lag, drain) = stage.drain();
        let used = stage.cpu().since(before);
        let each = |nanos: u64| nanos as f64 / 1e3 / tally.operations.max(1) as f64;
        report.line(format_args!(
            "burst           {what}, REQUEST ids, 50 connections, pipeline 16: {:.0}/s for {:.1} s; then Postgres was {lag:.0} changes behind, \
             and took {:.1} s for them ({:.0}/s); redis {:.2} µs, front {:.2}, back {:.2}, postgres {:.2}",
            tally.operations as f64 / took.as_secs_f64(),
            took.as_secs_f64(),
            drain.as_secs_f64(),
            lag / drain.as_secs_f64().max(0.001),
            each(used.redis),
            each(used.front),
            each(used.back),
            each(used.postgres),
        ));
        report.errors(&tally.errors);
        if stopped() {
            return None;
        }
    }
    Some(())
}

/// As fast as it goes while Postgres keeps up: clients are held back so that it is less than a second behind.
pub fn sustained(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let time = Duration::from_secs(if stage.is_short() { 5 } else { 60 });
    // Only for a while with REQUEST ids: as many as a minute's would fill the memory of them, which is bounded for each window.
    let plain = |many| Template::decrement(stage, many, &[]);
    let ways = [
        ("one product", plain(false), time),
        ("one product, REQUEST ids", Template::with_request(stage, false), time / 3),
        ("10,000 products", plain(true), time / 3),
    ];
    for (number, (what, template, time)) in ways.into_iter().enumerate() {
        let gate = Rc::new(Gate::default());
        let closed = closed(stage, 50, 16, time);
        let mut behind: f64 = 0.0;
        let (tally, took) = stage.runtime.block_on(async {
            let began = Instant::now();
            let control = async {
                let mut stream = connect(stage.port(Side::Holdfast)).await;
                let mut applied = Vec::new();
                loop {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    let lag: f64 = status(&mut stream, "lag").await.parse().unwrap();
                    // By what Postgres took of late.
                    let position = status(&mut stream, "applied").await;
                    let position: f64 = position.split('-').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0.0);
                    applied.push((Instant::now(), position));
                    let (from, to) = (applied[applied.len().saturating_sub(100)], applied[applied.len() - 1]);
                    let rate = (to.1 - from.1) / (to.0 - from.0).as_secs_f64();
                    let seconds = if lag == 0.0 { 0.0 } else { lag / rate };
                    if began.elapsed() > Duration::from_secs(1) {
                        behind = behind.max(seconds);
                    }
                    if seconds > LAG_HIGH {
                        gate.set(true);
                    } else if seconds < LAG_LOW {
                        gate.set(false);
                    }
                }
            };
            tokio::select! {
                done = closed.run(&template, &gate) => done,
                () = control => unreachable!(),
            }
        });
        // What Postgres did not have when it ended was not sustained.
        let (lag, _) = stage.drain();
        let rate = (tally.operations as f64 - lag) / took.as_secs_f64();
        let detail = format!("{what}, for {:.0} s, at most {behind:.2} s behind", took.as_secs_f64());
        if number == 0 {
            // What is further behind was not sustained.
            report.figure(slug, Some(if behind < 1.0 { rate } else { 0.0 }), &detail);
        } else {
            report.line(format_args!("    {slug}: {rate:.0} /s ({detail})"));
        }
        report.errors(&tally.errors);
        if stopped() {
            return None;
        }
    }
    Some(())
}

/// What is in the outbox while nobody sells: Postgres is kept from it while it is filled.
pub fn relay(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    relay_of(slug, stage, report, if stage.is_short() { 100_000 } else { 1_000_000 })
}

/// The same where a row of the ledger is all that a batch did to a product: so many that it takes several transactions.
pub fn relay_by_batch(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    relay_of(slug, stage, report, if stage.is_short() { 2_000_000 } else { 4_000_000 })
}

fn relay_of(slug: &str, stage: &Stage, report: &mut Report, changes: u64) -> Option<()> {
    for (many, what, goal) in [(false, "one product", true), (true, "10,000 products", false)] {
        let rounds = if stage.is_short() || !goal { 1 } else { 3 };
        let mut rates = Vec::new();
        for _ in 0..rounds {
            rates.push(drain_rate(stage, many, changes, report)?);
        }
        let least = rates.iter().copied().fold(f64::MAX, f64::min);
        let most = rates.iter().copied().fold(0.0, f64::max);
        let detail = format!("{changes} changes of {what}, {least:.0}-{most:.0}");
        let rate = median(rates);
        if goal {
            report.figure(slug, rate, &detail);
        } else {
            report.line(format_args!("    {slug}: {:.0} /s ({detail})", rate.unwrap_or(0.0)));
        }
    }
    Some(())
}

fn drain_rate(stage: &Stage, many: bool, changes: u64, report: &mut Report) -> Option<f64> {
    let errors = stage.relay_held(|| fill(stage, many, changes));
    report.errors(&errors);
    if stopped() {
        return None;
    }
    // The relay tries again after a pause, and its last transaction is a small one: what is between tells how fast it is.
    let mut client = stage.stack.connect();
    let (mut begin, mut end) = (None, (Instant::now(), changes as f64));
    loop {
        let lag: f64 = client.field("HOLDFAST.STATUS", "lag").trim_matches(']').parse().unwrap();
        let now = Instant::now();
        if begin.is_none() && lag < changes as f64 * 0.98 {
            begin = Some((now, lag));
        }
        if lag < end.1 {
            end = (now, lag);
        }
        if lag < changes as f64 * 0.02 || stopped() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    stage.drain();
    let begin = begin?;
    Some((begin.1 - end.1) / (end.0 - begin.0).as_secs_f64())
}

/// Decrements so many units.
pub fn fill(stage: &Stage, many: bool, changes: u64) -> std::collections::BTreeMap<String, u64> {
    let load = Closed { at_most: changes, ..closed(stage, 10, 50, Duration::from_secs(120)) };
    stage.runtime.block_on(load.run(&Template::decrement(stage, many, &[]), &Rc::default())).0.errors
}

/// Replies that wait until Postgres has the change.
pub fn ack(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let (time, rounds) = if stage.is_short() { (Duration::from_secs(1), 3) } else { (Duration::from_secs(2), 5) };
    let contenders = [(false, "one product"), (true, "10,000")].map(|(many, name)| {
        let template = Template::decrement(stage, many, &["ACK", "postgres"]);
        let run = move || {
            let (tally, took) = load(stage, &closed(stage, 100, 1, time), &template);
            tally.into_round(took)
        };
        Contender::new(name, run)
    });
    let all = in_turns(stage, rounds, Relay::Beside, &contenders)?;
    report.rounds(slug, &all);
    report.figure(slug, Some(all[0].median(|sample| sample.rate)), "one product");
    report.figure("ack-postgres-p99", Some(all[0].median(|sample| sample.latency.p99)), "one product");
    Some(())
}
