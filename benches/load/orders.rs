//! What orders cost: held, beside a sale without one, and expired, beside sales that go on.

use std::time::{Duration, Instant};

use crate::cases::rounds;
use crate::flow::{closed, load};
use crate::generator::{Closed, Open, Template};
use crate::report::Report;
use crate::rounds::{Contender, Latency, Relay, in_turns};
use crate::stage::{Side, Stage, stopped};

/// Nobody expires anything while another has the right to.
const NOBODY_SWEEPS: &str = "SET holdfast:sweeper nobody";
/// Sales a second while orders expire: about what a shop has in a sale.
const SALES: f64 = 2_000.0;

/// A reservation of five products against a sale of one to an order, of 10,000; against sales without one, which are summed up; and against such
/// a sale where each comes alone.
pub fn reserve(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let time = rounds(stage).0;
    let ways = [
        ("reserve-5", Template::reserve(stage, 5, 3_600_000)),
        ("decr-order", Template::decrement(stage, true, &["ORDER", "r-000000000000"])),
        ("decr-request", Template::with_request(stage, true)),
        ("decr", Template::decrement(stage, true, &[])),
    ];
    let contenders = ways.map(|(name, template)| {
        Contender::new(name, move || {
            let (tally, took) = load(stage, &closed(stage, 50, 16, time), &template);
            tally.into_round(took)
        })
    });
    let alone =
        [("reserve-5", Template::reserve(stage, 5, 3_600_000)), ("decr", Template::decrement(stage, true, &[]))].map(|(name, template)| {
            Contender::new(name, move || {
                let (tally, took) = load(stage, &closed(stage, 1, 1, time), &template);
                tally.into_round(took)
            })
        });
    let all = in_turns(stage, rounds(stage).1, Relay::Held, &contenders)?;
    report.rounds(slug, &all);
    report.ratio(slug, all[0].ratio(&all[1], |sample| sample.redis));
    let one_by_one = in_turns(stage, rounds(stage).1, Relay::Held, &alone)?;
    report.rounds("reserve-cost, alone", &one_by_one);
    report.ratio("reserve-cost-alone", one_by_one[0].ratio(&one_by_one[1], |sample| sample.redis));
    report.comparison("Redis CPU, RESERVE of 5 / DECR REQUEST of one, summed", all[0].ratio(&all[2], |sample| sample.redis));
    report.comparison("Redis CPU, RESERVE of 5 / DECR of one, summed", all[0].ratio(&all[3], |sample| sample.redis));
    Some(())
}

/// A hundred thousand orders whose time has passed, at once.
pub fn expire(_: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let orders = if stage.is_short() { 20_000 } else { 100_000 };
    let mut redis = stage.stack.backing();
    while redis.ask(&format!("{NOBODY_SWEEPS} NX")) != "OK" {
        redis.ask("DEL holdfast:sweeper");
    }
    let making = Closed { at_most: orders, ..closed(stage, 50, 16, Duration::from_secs(120)) };
    let (tally, _) = load(stage, &making, &Template::reserve(stage, 1, 1));
    report.errors(&tally.errors);
    stage.drain();
    let due: f64 = redis.ask("ZCARD stock:expiry").parse().unwrap();
    let open = |seconds| Open {
        port: stage.port(Side::Holdfast),
        connections: 50,
        rate: SALES,
        pipeline: 1,
        time: Duration::from_secs(seconds),
        unanswered_max: usize::MAX,
    };
    let sale = Template::decrement(stage, false, &[]);
    let alone = Latency::of(&stage.runtime.block_on(open(3).run(&sale)).latency);
    redis.ask("DEL holdfast:sweeper");
    let began = Instant::now();
    let watching = std::thread::spawn(move || {
        while redis.ask("ZCARD stock:expiry") != "0" && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(20));
        }
        began.elapsed()
    });
    let tally = stage.runtime.block_on(open(if stage.is_short() { 3 } else { 10 }).run(&sale));
    let took = watching.join().unwrap();
    stage.drain();
    if stopped() {
        return None;
    }
    report.errors(&tally.errors);
    let latency = Latency::of(&tally.latency);
    report.figure("expire-100k", Some(took.as_secs_f64() * 100_000.0 / due), &format!("{due:.0} orders in {:.2} s", took.as_secs_f64()));
    let detail = format!("of {SALES:.0} sales a second; {:.2} ms before", alone.p99);
    report.figure("expire-p99", Some(latency.p99), &detail);
    Some(())
}
