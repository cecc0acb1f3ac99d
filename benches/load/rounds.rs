//! Rounds of several contenders in turns, A B A B, so that whatever else the machine does strikes all of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::cpu::Cpu;
use crate::stage::{Stage, stopped};

/// What one round came to.
#[derive(Default)]
pub struct Round {
    /// None where it failed.
    pub operations: u64,
    pub took: Duration,
    pub latency: Latency,
    pub errors: BTreeMap<String, u64>,
}

/// Quantiles of the time for a reply, in ms.
#[derive(Clone, Copy, Default)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Latency {
    /// Of a histogram of µs.
    pub fn of(micros: &Histogram<u64>) -> Self {
        let at = |quantile| micros.value_at_quantile(quantile) as f64 / 1e3;
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: micros.max() as f64 / 1e3 }
    }
}

/// What is shown of a round: rates and costs.
pub struct Sample {
    pub rate: f64,
    pub latency: Latency,
    /// CPU time an operation, in µs. Of the servers it is counted until Postgres has everything, since that too is the operation's doing.
    pub redis: f64,
    pub front: f64,
    pub back: f64,
    pub postgres: f64,
    pub proxy: f64,
    pub load: f64,
    /// How many cores others took of the machine: where it is much, the round is of little worth.
    pub others: f64,
    /// Changes that Postgres did not have when the round ended, and how many seconds it took to get them.
    pub lag: f64,
    pub drain: f64,
}

/// What the relay does during a round.
#[derive(Clone, Copy)]
pub enum Relay {
    /// It waits: the outbox is written, and carried to Postgres when the round is over.
    Held,
    Beside,
}

/// Somebody who takes part.
pub struct Contender<'a> {
    name: String,
    /// Servers of its own.
    stage: Option<&'a Stage>,
    /// What comes before the rounds, and does not count.
    try_out: Option<Box<dyn Fn() + 'a>>,
    run: Box<dyn Fn() -> Round + 'a>,
}

impl<'a> Contender<'a> {
    pub fn new(name: impl Into<String>, run: impl Fn() -> Round + 'a) -> Self {
        Self { name: name.into(), stage: None, try_out: None, run: Box::new(run) }
    }

    /// On other servers than the others.
    pub fn on(self, stage: &'a Stage) -> Self {
        Self { stage: Some(stage), ..self }
    }

    pub fn tried_out(self, try_out: impl Fn() + 'a) -> Self {
        Self { try_out: Some(Box::new(try_out)), ..self }
    }
}

/// All rounds of a contender; one that failed is missing.
pub struct Rounds {
    pub name: String,
    pub samples: Vec<Option<Sample>>,
    pub errors: BTreeMap<String, u64>,
}

/// `None` when told to stop.
pub fn in_turns(stage: &Stage, rounds: usize, relay: Relay, contenders: &[Contender<'_>]) -> Option<Vec<Rounds>> {
    let new = |contender: &Contender<'_>| Rounds { name: contender.name.clone(), samples: Vec::new(), errors: BTreeMap::new() };
    let mut all: Vec<Rounds> = contenders.iter().map(new).collect();
    contenders.iter().filter_map(|contender| contender.try_out.as_ref()).for_each(|try_out| try_out());
    stage.drain();
    for _ in 0..rounds {
        for (contender, rounds) in contenders.iter().zip(&mut all) {
            let stage = contender.stage.unwrap_or(stage);
            let (began, before) = (Instant::now(), stage.cpu());
            let run = || {
                let round = (contender.run)();
                (round, stage.cpu().since(before))
            };
            let (round, during) = match relay {
                Relay::Held => stage.relay_held(run),
                Relay::Beside => run(),
            };
            let others = during.others() as f64 / began.elapsed().as_nanos() as f64;
            let (lag, drain) = stage.drain();
            let mut used = stage.cpu().since(before);
            used.load = during.load;
            if stopped() {
                return None;
            }
            rounds.samples.push(Sample::of(&round, used, others, lag, drain));
            round.errors.into_iter().for_each(|(word, count)| *rounds.errors.entry(word).or_default() += count);
            stage.stack.backing().ask("UNLINK direct:outbox");
        }
    }
    Some(all)
}

impl Sample {
    fn of(round: &Round, used: Cpu, others: f64, lag: f64, drain: Duration) -> Option<Self> {
        if round.operations == 0 {
            return None;
        }
        let operations = round.operations as f64;
        let micros = |nanos: u64| nanos as f64 / 1e3 / operations;
        Some(Self {
            rate: operations / round.took.as_secs_f64(),
            latency: round.latency,
            redis: micros(used.redis),
            front: micros(used.front),
            back: micros(used.back),
            postgres: micros(used.postgres),
            proxy: micros(used.proxy),
            load: micros(used.load),
            others,
            lag,
            drain: drain.as_secs_f64(),
        })
    }
}

impl Rounds {
    /// The median of a figure over the rounds; 0 where all failed.
    pub fn median(&self, figure: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().flatten().map(figure)).unwrap_or(0.0)
    }

    pub fn most(&self, figure: impl Fn(&Sample) -> f64) -> f64 {
        self.samples.iter().flatten().map(figure).fold(0.0, f64::max)
    }

    pub fn least(&self, figure: impl Fn(&Sample) -> f64) -> f64 {
        self.samples.iter().flatten().map(figure).reduce(f64::min).unwrap_or(0.0)
    }

    /// The ratios of a figure to that of another contender's same round: median, least and most.
    pub fn ratio(&self, other: &Self, figure: impl Fn(&Sample) -> f64) -> Option<[f64; 3]> {
        let pairs = self.samples.iter().zip(&other.samples).filter_map(|(ours, theirs)| Some((ours.as_ref()?, theirs.as_ref()?)));
        spread(pairs.map(|(ours, theirs)| figure(ours) / figure(theirs)))
    }
}

/// Median, least and most.
pub fn spread(values: impl IntoIterator<Item = f64>) -> Option<[f64; 3]> {
    let values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
    let least = values.iter().copied().reduce(f64::min)?;
    let most = values.iter().copied().reduce(f64::max)?;
    Some([median(values)?, least, most])
}

pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
