//! The cases that are compared with one script call an operation, straight to the same Redis.

use std::cell::Cell;
use std::time::Duration;

use crate::redis_benchmark::Load;
use crate::report::Report;
use crate::rounds::{Contender, in_turns};
use crate::stage::{PRODUCTS, Side, Stage};

struct Case {
    slug: &'static str,
    product: &'static str,
    connections: usize,
    pipeline: usize,
    /// Whether Redis's CPU time is a case too.
    redis_cpu: Option<&'static str>,
}

const HOT: &str = "hot";
const MANY: &str = "sku-__rand_int__";
/// Has no units.
const SOLD_OUT: &str = "none";

const CASES: &[Case] = &[
    Case { slug: "hot-p16", product: HOT, connections: 50, pipeline: 16, redis_cpu: Some("hot-p16-redis-cpu") },
    Case { slug: "many-p16", product: MANY, connections: 50, pipeline: 16, redis_cpu: Some("many-p16-redis-cpu") },
    Case { slug: "hot-p1", product: HOT, connections: 50, pipeline: 1, redis_cpu: None },
    Case { slug: "many-p1", product: MANY, connections: 50, pipeline: 1, redis_cpu: None },
    Case { slug: "many-p1-c200", product: MANY, connections: 200, pipeline: 1, redis_cpu: None },
    Case { slug: "soldout-p16", product: SOLD_OUT, connections: 50, pipeline: 16, redis_cpu: None },
];

pub fn slugs() -> impl Iterator<Item = &'static str> {
    CASES.iter().map(|case| case.slug)
}

/// How long a round takes, and how many there are.
pub fn rounds(stage: &Stage) -> (Duration, usize) {
    if stage.is_short() { (Duration::from_millis(400), 3) } else { (Duration::from_millis(1500), 5) }
}

/// Runs one. `None` when told to stop.
pub fn run(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let case = CASES.iter().find(|case| case.slug == slug)?;
    let sides = [(Side::Holdfast, "holdfast"), (Side::Direct, "direct")];
    let contenders = sides.map(|(side, name)| contender(stage, name, stage.port(side), words(stage, side, case.product), case));
    let (_, rounds) = rounds(stage);
    let all = in_turns(stage, rounds, &contenders)?;
    report.rounds(case.slug, &all);
    report.ratio(case.slug, all[0].ratio(&all[1], |sample| sample.rate));
    if let Some(slug) = case.redis_cpu {
        report.ratio(slug, all[1].ratio(&all[0], |sample| sample.redis));
    }
    Some(())
}

fn contender<'a>(stage: &'a Stage, name: &str, port: u16, words: Vec<String>, case: &'a Case) -> Contender<'a> {
    let (time, _) = rounds(stage);
    let rate = Cell::new(None);
    let run = move || {
        let load = Load { port, connections: case.connections, pipeline: case.pipeline, range: PRODUCTS, words: &words };
        // redis-benchmark is told how many, not how long; the first time this is tried out.
        let known = rate.get().unwrap_or_else(|| {
            let trial = load.run(20_000);
            trial.operations as f64 / trial.took.as_secs_f64().max(0.01)
        });
        let round = load.run((known * time.as_secs_f64()).max(10_000.0) as u64);
        if round.operations > 0 {
            rate.set(Some(round.operations as f64 / round.took.as_secs_f64()));
        }
        round
    };
    Contender { name: name.to_owned(), run: Box::new(run) }
}

/// The words of one operation.
pub fn words(stage: &Stage, side: Side, product: &str) -> Vec<String> {
    let text = match side {
        Side::Holdfast => format!("STOCK.DECR {product} 1"),
        Side::Direct => format!("EVALSHA {} 2 direct:{product} direct:outbox 1", stage.direct_stock),
    };
    text.split(' ').map(str::to_owned).collect()
}
