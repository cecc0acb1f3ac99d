//! Latency at a load that it can bear, and what is left of it under one that it cannot. With the settings as they are by default.

use std::time::Duration;

use crate::flow::{closed, load};
use crate::generator::{Open, Template};
use crate::report::Report;
use crate::rounds::{Latency, Relay};
use crate::stage::{Side, Stage, stopped};

/// The time in which every command is to be answered.
const IN_TIME: Duration = Duration::from_millis(100);
/// With so many connections, each of which sends so many at a time: the peak is taken, and the load is made, in the same way.
const CONNECTIONS: usize = 50;
const PIPELINE: usize = 16;
/// Under overload: so many that what they send is refused by the server, and does not wait in the sockets.
const MANY_CONNECTIONS: usize = 500;

/// What it can, by clients that wait for their replies.
fn peak(stage: &Stage, connections: usize, pipeline: usize, many: bool) -> f64 {
    let time = Duration::from_secs(if stage.is_short() { 1 } else { 3 });
    let (tally, took) = load(stage, &closed(stage, connections, pipeline, time), &Template::decrement(stage, many, &[]));
    tally.operations as f64 / took.as_secs_f64()
}

/// At half the peak.
pub fn half_peak(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let seconds = if stage.is_short() { 3 } else { 10 };
    for (pipeline, is_goal) in [(PIPELINE, true), (1, false)] {
        let peak = peak(stage, CONNECTIONS, pipeline, false);
        stage.drain();
        let open = Open {
            port: stage.port(Side::Holdfast),
            connections: CONNECTIONS,
            rate: peak / 2.0,
            pipeline,
            time: Duration::from_secs(seconds),
            unanswered_max: usize::MAX,
        };
        let tally = stage.runtime.block_on(open.run(&Template::decrement(stage, false, &[])));
        stage.drain();
        if stopped() {
            return None;
        }
        report.line(format_args!(
            "{slug:<16}{CONNECTIONS} connections, one product, {pipeline} at a time, {:.0}/s for {seconds} s ({:.0}/s served) of a peak of \
             {peak:.0}/s; {} unanswered",
            peak / 2.0,
            tally.operations as f64 / seconds as f64,
            tally.unanswered
        ));
        report.errors(&tally.errors);
        let latency = Latency::of(&tally.latency);
        let p50 = format!("p50 {:.2} ms", latency.p50);
        if is_goal {
            report.figure("half-peak-p99", Some(latency.p99), &p50);
            report.figure("half-peak-p999", Some(latency.p999), &p50);
            report.figure("half-peak-max", Some(latency.max), &p50);
        } else {
            report.line(format_args!("    {p50}, p99 {:.2} ms, p99.9 {:.2} ms, max {:.2} ms", latency.p99, latency.p999, latency.max));
        }
    }
    Some(())
}

/// At ten times the peak, or as much as one thread can send. Over 10,000 products: of one, more can be sold than sent. Peak and overload alike
/// without the relay, whose Postgres takes a core of its own, and beside it.
pub fn overload(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let (kept, in_time) = stage.relay_held(|| overloaded(slug, Relay::Held, stage, report))?;
    stage.drain();
    report.figure(slug, Some(kept), "of the peak");
    report.figure("overload-in-time", Some(in_time.0), &in_time.1);
    let (kept, in_time) = overloaded(slug, Relay::Beside, stage, report)?;
    report.line(format_args!("    {kept:.1} % of the peak, {:.1} % in time ({})", in_time.0, in_time.1));
    Some(())
}

/// What is kept of the peak, and how much is answered in time, in percent.
fn overloaded(slug: &str, relay: Relay, stage: &Stage, report: &mut Report) -> Option<(f64, (f64, String))> {
    // The more that waits, the more goes at once: the peak is that of the longest pipelines.
    let peak = peak(stage, MANY_CONNECTIONS, PIPELINE, true).max(peak(stage, CONNECTIONS, 8 * PIPELINE, true));
    let how = match relay {
        Relay::Held => "held",
        Relay::Beside => {
            stage.drain();
            "running"
        }
    };
    let seconds = if stage.is_short() { 2 } else { 5 };
    let open = Open {
        port: stage.port(Side::Holdfast),
        connections: MANY_CONNECTIONS,
        rate: peak * 10.0,
        pipeline: PIPELINE,
        time: Duration::from_secs(seconds),
        // Of all, a second's work: ten times of what can be answered in time. Of a connection, what the server takes before it stops to read.
        unanswered_max: ((peak / MANY_CONNECTIONS as f64) as usize).clamp(PIPELINE, 1_000),
    };
    let tally = stage.runtime.block_on(open.run(&Template::decrement(stage, true, &[])));
    if stopped() {
        return None;
    }
    let sent = tally.latency.len() + tally.unanswered;
    let per_second = |count: u64| count as f64 / seconds as f64;
    report.line(format_args!(
        "{slug:<16}relay {how}: {MANY_CONNECTIONS} connections, 10,000 products, peak {peak:.0}/s; {:.1} times as much was to be sent, {:.1} times was; \
         {:.0}/s served; {} unanswered",
        per_second(sent + tally.withheld) / peak,
        per_second(sent) / peak,
        per_second(tally.operations),
        tally.unanswered
    ));
    report.errors(&tally.errors);
    let latency = Latency::of(&tally.latency);
    let detail = format!("p50 {:.0} ms, p99 {:.0} ms, by the generator's clock, from when it was to be sent", latency.p50, latency.p99);
    Some((100.0 * per_second(tally.operations) / peak, (tally.within(IN_TIME), detail)))
}
