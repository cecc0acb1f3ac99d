//! The cases that are compared with another way of doing the same, in turns, with redis-benchmark as the load.

use std::cell::Cell;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::flow::{closed, load};
use crate::generator::Template;
use crate::haproxy::HaProxy;
use crate::harness::{Sidecar, wait_until};
use crate::redis_benchmark::Load;
use crate::report::Report;
use crate::rounds::{Contender, Relay, Round, in_turns};
use crate::stage::{PRODUCTS, Side, Stage, stopped};
use crate::wire::{command, send_all};
use crate::{PATIENT, locks, pgbench};

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
const MILLION: u64 = 1_000_000;
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

const SIDES: [(Side, &str); 2] = [(Side::Holdfast, "holdfast"), (Side::Direct, "direct")];

/// How long a round takes, and how many there are.
pub fn rounds(stage: &Stage) -> (Duration, usize) {
    if stage.is_short() { (Duration::from_millis(400), 5) } else { (Duration::from_millis(1500), 5) }
}

/// Stock against the direct script.
pub fn direct(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let case = CASES.iter().find(|case| case.slug == slug).unwrap();
    let contenders = SIDES
        .map(|(side, name)| by_count(stage, name, case.connections, case.pipeline, move |load| decrement(stage, side, case.product, load)));
    let all = in_turns(stage, rounds(stage).1, Relay::Held, &contenders)?;
    report.rounds(case.slug, &all);
    report.ratio(case.slug, all[0].ratio(&all[1], |sample| sample.rate));
    if let Some(slug) = case.redis_cpu {
        report.ratio(slug, all[1].ratio(&all[0], |sample| sample.redis));
    }
    Some(())
}

/// The direct script through HAProxy, against the direct script.
pub fn haproxy(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let proxy = match HaProxy::start(stage) {
        Ok(proxy) => proxy,
        Err(error) => {
            report.left_out(slug, &error);
            return Some(());
        }
    };
    stage.proxy.set(Some(proxy.process.0.id()));
    let pipeline = if slug == "haproxy-p16" { 16 } else { 1 };
    let through = by_count(stage, "haproxy", 50, pipeline, |load| decrement(stage, Side::Direct, HOT, Load { port: proxy.port, ..load }));
    let direct = by_count(stage, "direct", 50, pipeline, |load| decrement(stage, Side::Direct, HOT, load));
    let all = in_turns(stage, rounds(stage).1, Relay::Held, &[through, direct]);
    stage.proxy.set(None);
    let all = all?;
    report.rounds(slug, &all);
    report.comparison("direct through HAProxy / direct", all[0].ratio(&all[1], |sample| sample.rate));
    Some(())
}

/// A coupon against a lock an issue.
pub fn coupon(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let mut programs = Vec::new();
    for program in locks::programs() {
        match program {
            Ok(program) => programs.push(program),
            Err(error) => report.left_out(slug, &error),
        }
    }
    let time = if stage.is_short() { Duration::from_secs(1) } else { Duration::from_secs(3) };
    // Another sidecar on the same servers, which takes no lock.
    let (redis, postgres) = (stage.stack.redis.url(), &stage.stack.postgres.url);
    let eliding = Sidecar::with_settings(&redis, postgres, &[PATIENT, &["--coupon-lock", "elide"]].concat());
    wait_until("the other sidecar issues", || eliding.get("/readyz").0 == 200);
    let with_pipeline =
        |name: &str, pipeline, side, port| by_count(stage, name, 100, pipeline, move |load| issue(stage, side, Load { port, ..load }));
    let issuing = |name: &str, side, port| with_pipeline(name, 1, side, port);
    let mut contenders = vec![
        issuing("held", Side::Holdfast, stage.port(Side::Holdfast)),
        issuing("elide", Side::Holdfast, eliding.port),
        issuing("direct", Side::Direct, stage.port(Side::Direct)),
        // As clients send that share a connection among requests: no lock can be acquired so.
        with_pipeline("held, p16", 16, Side::Holdfast, stage.port(Side::Holdfast)),
    ];
    let ours = contenders.len();
    match pgbench::prepare(stage) {
        Ok(()) => contenders.push(Contender::new("for update", || pgbench::run_for(stage, 100, time))),
        Err(error) => report.left_out(slug, &error),
    }
    contenders.extend(programs.iter().map(|program| Contender::new(program.name, move || program.issue(stage, 100, time))));
    let all = in_turns(stage, rounds(stage).1, Relay::Held, &contenders)?;
    report.rounds(slug, &all);
    report.comparison("held / elide", all[0].ratio(&all[1], |sample| sample.rate));
    report.comparison("held / direct script without a lock", all[0].ratio(&all[2], |sample| sample.rate));
    if let Some(best) = all[ours..].iter().max_by(|a, b| a.median(|sample| sample.rate).total_cmp(&b.median(|sample| sample.rate))) {
        report.line(format_args!("    the best of the locks is that of {}", best.name));
        report.comparison("held with pipeline 16 / the best of the locks", all[3].ratio(best, |sample| sample.rate));
        report.comparison("elide / the best of the locks", all[1].ratio(best, |sample| sample.rate));
        report.ratio(slug, all[0].ratio(best, |sample| sample.rate));
    } else {
        report.ratio(slug, None);
    }
    Some(())
}

/// A hot product against Postgres alone.
pub fn for_update(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    if let Err(error) = pgbench::prepare(stage) {
        report.left_out(slug, &error);
        return Some(());
    }
    let ours = by_count(stage, "holdfast", 100, 1, |load| decrement(stage, Side::Holdfast, HOT, load));
    let time = rounds(stage).0.max(Duration::from_secs(if stage.is_short() { 1 } else { 2 }));
    let theirs = Contender::new("for update", || pgbench::run_for(stage, 100, time));
    let all = in_turns(stage, rounds(stage).1, Relay::Held, &[ours, theirs])?;
    report.rounds(slug, &all);
    report.ratio(slug, all[0].ratio(&all[1], |sample| sample.rate));
    Some(())
}

/// What a round sends, and to whom; how many is said when it is run.
struct Work {
    words: Vec<String>,
    load: Load,
    /// Keys that nobody needs after it.
    forget: Option<String>,
}

fn decrement(stage: &Stage, side: Side, product: &str, load: Load) -> Work {
    let text = match side {
        Side::Holdfast => format!("STOCK.DECR {product} 1"),
        Side::Direct => format!("EVALSHA {} 2 direct:{product} direct:outbox 1", stage.direct_stock),
    };
    let port = if load.port == 0 { stage.port(side) } else { load.port };
    Work { words: text.split(' ').map(str::to_owned).collect(), load: Load { port, ..load }, forget: None }
}

fn issue(stage: &Stage, side: Side, load: Load) -> Work {
    let coupon = stage.create_coupon(side);
    let text = match side {
        Side::Holdfast => format!("COUPON.ISSUE {coupon} user-__rand_int__"),
        Side::Direct => {
            format!("EVALSHA {} 3 direct:{coupon} direct:{coupon}:users direct:outbox user-__rand_int__", stage.direct_coupon)
        }
    };
    let forget = (side == Side::Direct).then(|| format!("UNLINK direct:{coupon} direct:{coupon}:users"));
    // So many users that hardly any comes twice.
    let load = Load { range: 100_000_000_000, ..load };
    Work { words: text.split(' ').map(str::to_owned).collect(), load, forget }
}

/// A contender that redis-benchmark makes the load of. It is told how many to send and not how long, so the rate is tried out first, and
/// each round goes by the one before.
fn by_count<'a>(stage: &'a Stage, name: &str, connections: usize, pipeline: usize, work: impl Fn(Load) -> Work + 'a) -> Contender<'a> {
    let time = rounds(stage).0.as_secs_f64();
    let rate = Rc::new(Cell::new(0.0));
    let send = Rc::new(move |operations: u64| {
        let work = work(Load { port: 0, connections, pipeline, range: PRODUCTS });
        let round = work.load.run(&work.words, operations);
        if let Some(forget) = work.forget {
            stage.stack.backing().ask(&forget);
        }
        round
    });
    let learn = {
        let rate = Rc::clone(&rate);
        move |round: &Round| {
            if round.operations > 0 {
                rate.set(round.operations as f64 / round.took.as_secs_f64());
            }
        }
    };
    let try_out = {
        let (send, learn) = (Rc::clone(&send), learn.clone());
        move || learn(&send(20_000))
    };
    let run = move || {
        let round = send((rate.get() * time).max(10_000.0) as u64);
        learn(&round);
        round
    };
    Contender::new(name, run).tried_out(try_out)
}

/// A million products against one.
pub fn products(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let names = |number: u64| format!("m-{number:012}");
    let began = Instant::now();
    let sets = (0..MILLION).map(|number| command(&["STOCK.SET", &names(number), "1000000000", "ACK", "redis"]));
    stage.runtime.block_on(send_all(stage.port(Side::Holdfast), sets.take_while(|_| !stopped())));
    let sent = began.elapsed();
    let (lag, drain) = stage.drain();
    report.line(format_args!(
        "    1,000,000 products set in {:.1} s, of which Postgres had all but {lag} by then, and the rest {:.1} s later",
        sent.as_secs_f64(),
        drain.as_secs_f64()
    ));
    for (pipeline, goal) in [(1, Some(slug)), (16, None)] {
        let million = by_count(stage, "1,000,000", 50, pipeline, |load| {
            decrement(stage, Side::Holdfast, "m-__rand_int__", Load { range: MILLION, ..load })
        });
        let one = by_count(stage, "1", 50, pipeline, |load| decrement(stage, Side::Holdfast, HOT, load));
        let all = in_turns(stage, rounds(stage).1, Relay::Held, &[million, one])?;
        let name = if goal.is_some() { slug.to_owned() } else { "  pipeline 16".to_owned() };
        report.rounds(&name, &all);
        let ratio = all[0].ratio(&all[1], |sample| sample.rate);
        match goal {
            Some(slug) => report.ratio(slug, ratio),
            None => report.comparison("with pipeline 16", ratio),
        }
    }
    Some(())
}

/// What a million imported products leave of the rates: that of one product, and that over ten thousand, which Redis then finds among so many
/// more. In turns with servers that have not got them.
pub fn import(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let products = if stage.is_short() { MILLION / 10 } else { MILLION };
    let lines = (0..products).map(|product| format!("imported-{product:07},1000000000\n"));
    let file = std::env::temp_dir().join(format!("holdfast-bench-{}.csv", std::process::id()));
    std::fs::write(&file, std::iter::once("product,available\n".to_owned()).chain(lines).collect::<String>()).unwrap();
    let began = Instant::now();
    let done = Command::new(env!("CARGO_BIN_EXE_holdfast"))
        .arg("import")
        .arg(&file)
        .args(["--redis-url", &stage.stack.redis.url(), "--postgres-url", &stage.stack.postgres.url])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let took = began.elapsed().as_secs_f64();
    std::fs::remove_file(&file).unwrap();
    if stopped() {
        return None;
    }
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    stage.drain();
    report.figure("import-1m", Some(took * MILLION as f64 / products as f64), &format!("{products} products in {took:.1} s"));

    let without = Stage::start(stage.length, PATIENT);
    without.create_products();
    let mut rate = |product, names: [&str; 2]| {
        let sale = |stage, name: &str| by_count(stage, name, 50, 16, move |load| decrement(stage, Side::Holdfast, product, load));
        let contenders = [sale(stage, names[0]), sale(&without, names[1]).on(&without)];
        // The noise of a round is as large as what is looked for.
        let all = in_turns(stage, 2 * rounds(stage).1 + 1, Relay::Held, &contenders)?;
        report.rounds(slug, &all);
        all[0].ratio(&all[1], |sample| sample.rate)
    };
    let one = rate(HOT, ["hot, imported", "hot, without"])?;
    let many = rate(MANY, ["many, imported", "many, without"])?;
    report.ratio(slug, Some(one));
    report.comparison("10,000 products, with the import / without", Some(many));
    Some(())
}

/// Ten thousand connections against one. Both with a pipeline, so that it is not the sockets that are compared; the single connection's is
/// so long that it is never idle, the others' so short that not more is under way than the server lets wait. And against fifty with the
/// same pipeline, which tells what their number alone costs.
pub fn connections(slug: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let time = rounds(stage).0;
    let template = Template::decrement(stage, false, &[]);
    let contender = |name: &str, connections, pipeline| {
        let template = template.clone();
        let run = move || {
            let (tally, took) = load(stage, &closed(stage, connections, pipeline, time), &template);
            tally.into_round(took)
        };
        Contender::new(name, run)
    };
    let all = [
        contender("10,000, p4", 10_000, 4),
        contender("10,000, p1", 10_000, 1),
        contender("50, p4", 50, 4),
        contender("50, p1", 50, 1),
        contender("1, p1000", 1, 1_000),
    ];
    let all = in_turns(stage, rounds(stage).1, Relay::Held, &all)?;
    report.rounds(slug, &all);
    let rate = |a: usize, b: usize| all[a].ratio(&all[b], |sample| sample.rate);
    report.ratio(slug, rate(0, 4));
    report.comparison("10,000 connections / 50, both with pipeline 4", rate(0, 2));
    report.comparison("10,000 connections / 50, both without a pipeline", rate(1, 3));
    Some(())
}
