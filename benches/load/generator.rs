//! Load of our own, for what redis-benchmark cannot do: send at a given rate, go on after an error, number each request.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio::task::{JoinSet, LocalSet};

use crate::rounds::{Latency, Round};
use crate::stage::{PRODUCTS, Stage, sku, stopped};
use crate::wire::{command, connect_many, frame, kind_of};

/// How long after the last request its reply may come.
const LAST_REPLIES: Duration = Duration::from_secs(10);

/// How much later a connection sends that has as much unanswered as it may, which is about a second's work: a tenth of it is answered by then. To try more
/// often would take the machine's time from the server, for a few commands each time.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// What is sent, again and again.
#[derive(Clone)]
pub struct Template {
    bytes: Vec<u8>,
    /// Where twelve digits are written over in place: with a product's number, and with one that never comes twice.
    products: Vec<usize>,
    request: Option<usize>,
    fresh: Rc<Cell<u64>>,
}

impl Template {
    /// A decrement by one, of one product or of all in turns, with these words at its end.
    pub fn decrement(stage: &Stage, many: bool, rest: &[&str]) -> Self {
        let product = if many { sku(0) } else { "hot".to_owned() };
        Self::new(stage, &[&["STOCK.DECR", &product, "1"], rest].concat())
    }

    /// The same with a REQUEST id of its own each.
    pub fn with_request(stage: &Stage, many: bool) -> Self {
        Self::decrement(stage, many, &["REQUEST", "r-000000000000"])
    }

    /// A reservation of one unit each of so many products, for an order of its own each, for so many ms.
    pub fn reserve(stage: &Stage, products: usize, ttl_ms: u64) -> Self {
        let (ttl_ms, product) = (ttl_ms.to_string(), sku(0));
        let items = std::iter::repeat_n([product.as_str(), "1"], products).flatten();
        Self::new(stage, &["STOCK.RESERVE", "r-000000000000", &ttl_ms].into_iter().chain(items).collect::<Vec<_>>())
    }

    fn new(stage: &Stage, words: &[&str]) -> Self {
        let bytes = command(words);
        let places = |of: &[u8]| -> Vec<usize> {
            let found = bytes.windows(of.len()).enumerate().filter(|(_, some)| *some == of);
            found.map(|(at, _)| at + of.len() - 12).collect()
        };
        let (products, request) = (places(b"sku-000000000000"), places(b"r-000000000000").first().copied());
        Self { products, request, fresh: Rc::clone(&stage.fresh), bytes }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let at = out.len();
        out.extend_from_slice(&self.bytes);
        let number = self.fresh.get() + 1;
        self.fresh.set(number);
        let mut digits = |place: usize, mut number: u64| {
            for digit in out[at + place..at + place + 12].iter_mut().rev() {
                *digit = b'0' + (number % 10) as u8;
                number /= 10;
            }
        };
        for (nth, place) in (0..).zip(&self.products) {
            // Scrambled, so that neighbours do not come one after the other.
            digits(*place, ((number + nth * 7_919).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20) % PRODUCTS);
        }
        if let Some(place) = self.request {
            digits(place, number);
        }
    }
}

/// What a generator has counted.
pub struct Tally {
    /// Replies that are a result, of an open loop those within its time. Refusals for lack of units are results too.
    pub operations: u64,
    /// Of all replies, errors too, in µs.
    pub latency: Histogram<u64>,
    pub errors: BTreeMap<String, u64>,
    /// What was not sent since too much was unanswered.
    pub withheld: u64,
    /// What was never answered.
    pub unanswered: u64,
}

impl Tally {
    fn new() -> Self {
        Self { operations: 0, latency: Histogram::new(3).unwrap(), errors: BTreeMap::new(), withheld: 0, unanswered: 0 }
    }

    /// Counts the complete replies; `since` says of each how long it took.
    fn take(&mut self, input: &mut Vec<u8>, mut since: impl FnMut() -> Duration) -> usize {
        let (mut at, mut count) = (0, 0);
        while let Some(length) = frame(&input[at..]) {
            let reply = &input[at..at + length];
            if reply.starts_with(b"*") {
                self.operations += 1;
            } else {
                *self.errors.entry(kind_of(reply)).or_default() += 1;
            }
            self.latency.record(u64::try_from(since().as_micros()).unwrap()).unwrap();
            (at, count) = (at + length, count + 1);
        }
        input.drain(..at);
        count
    }

    /// The part of what was sent that was answered within a time, in percent.
    pub fn within(&self, time: Duration) -> f64 {
        let answered = self.latency.len() as f64;
        self.latency.percentile_below(u64::try_from(time.as_micros()).unwrap()) * answered / (answered + self.unanswered as f64)
    }

    pub fn into_round(self, took: Duration) -> Round {
        Round { operations: self.operations, took, latency: Latency::of(&self.latency), errors: self.errors }
    }
}

/// Lets a closed loop go, or holds it.
#[derive(Default)]
pub struct Gate {
    shut: Cell<bool>,
    opened: Notify,
}

impl Gate {
    pub fn set(&self, shut: bool) {
        self.shut.set(shut);
        if !shut {
            self.opened.notify_waiters();
        }
    }

    async fn pass(&self) {
        while self.shut.get() && !stopped() {
            // Looked at now and then, so that it ends when all does.
            let _ = tokio::time::timeout(Duration::from_millis(50), self.opened.notified()).await;
        }
    }
}

/// Closed loop: each connection sends so many, waits for all the replies, and sends the next, until the time or so many are over.
pub struct Closed {
    pub port: u16,
    pub connections: usize,
    pub pipeline: usize,
    pub time: Duration,
    pub at_most: u64,
}

impl Closed {
    pub async fn run(&self, template: &Template, gate: &Rc<Gate>) -> (Tally, Duration) {
        let streams = connect_many(self.port, self.connections).await;
        let began = Instant::now();
        let left = Rc::new(Cell::new(self.at_most));
        let (pipeline, time) = (self.pipeline, self.time);
        let each = streams.into_iter().map(|mut stream| {
            let (template, gate, left) = (template.clone(), Rc::clone(gate), Rc::clone(&left));
            async move {
                let mut tally = Tally::new();
                let (mut out, mut input) = (Vec::new(), Vec::with_capacity(16 << 10));
                while began.elapsed() < time && left.get() > 0 && !stopped() {
                    gate.pass().await;
                    left.set(left.get().saturating_sub(pipeline as u64));
                    out.clear();
                    (0..pipeline).for_each(|_| template.write(&mut out));
                    let sent = Instant::now();
                    stream.write_all(&out).await.unwrap();
                    let mut missing = pipeline;
                    while missing > 0 {
                        assert!(stream.read_buf(&mut input).await.unwrap() > 0, "the connection was closed");
                        missing -= tally.take(&mut input, || sent.elapsed());
                    }
                }
                tally
            }
        });
        let tally = all(each).await;
        (tally, began.elapsed())
    }
}

/// Open loop: sends at a rate whatever becomes of the replies, and counts the time for a reply from when the request was to be sent. So a
/// server that stands still is not spared the requests that a waiting client would not have sent.
pub struct Open {
    pub port: u16,
    pub connections: usize,
    /// Requests a second, of all connections, and how many of a connection are due at the same time.
    pub rate: f64,
    pub pipeline: usize,
    pub time: Duration,
    /// Of a connection; what is to be sent while so many are unanswered is not sent at all.
    pub unanswered_max: usize,
}

impl Open {
    pub async fn run(&self, template: &Template) -> Tally {
        let streams = connect_many(self.port, self.connections).await;
        // A peak of nothing is a failed one, and told as errors: it must not end the whole run.
        let between = Duration::from_secs_f64((self.connections * self.pipeline) as f64 / self.rate.max(1.0));
        let began = Instant::now();
        let (until, connections, pipeline, unanswered_max) = (began + self.time, self.connections, self.pipeline, self.unanswered_max);
        let each = streams.into_iter().enumerate().map(|(number, stream)| {
            // Connections take turns.
            let due = began + between.mul_f64(number as f64 / connections as f64);
            let schedule = Schedule { due, between, pipeline, until, unanswered_max };
            let shared = Rc::new(Shared { sent: RefCell::default(), over: Cell::new(false), withheld: Cell::new(0) });
            let (input, output) = stream.into_split();
            let template = template.clone();
            async move {
                let sending = send(output, template, Rc::clone(&shared), schedule);
                let receiving = receive(input, Rc::clone(&shared), until);
                let (_output, mut tally) = tokio::join!(sending, receiving);
                tally.withheld = shared.withheld.get();
                tally
            }
        });
        all(each).await
    }
}

/// What the two halves of a connection know.
struct Shared {
    /// When each unanswered request was to be sent.
    sent: RefCell<VecDeque<Instant>>,
    over: Cell<bool>,
    withheld: Cell<u64>,
}

/// When a connection sends.
struct Schedule {
    due: Instant,
    between: Duration,
    pipeline: usize,
    until: Instant,
    unanswered_max: usize,
}

/// Wakes at a time to the microsecond. The runtime's timers know whole milliseconds: with them all connections would send at once, and late.
struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    #[allow(deprecated, reason = "an OwnedFd stays the descriptor that it is, and the crate's other way needs unsafe code")]
    fn new() -> Self {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC);
        Self(AsyncFd::new(timer.unwrap()).unwrap())
    }

    async fn until(&self, at: Instant) {
        loop {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let never = Timespec { tv_sec: 0, tv_nsec: 0 };
            let once = Itimerspec { it_interval: never, it_value: left.try_into().unwrap() };
            timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once).unwrap();
            self.0.readable().await.unwrap().clear_ready();
        }
    }
}

async fn send(mut output: OwnedWriteHalf, template: Template, shared: Rc<Shared>, mut schedule: Schedule) -> OwnedWriteHalf {
    let mut out = Vec::new();
    let mut pause = Duration::ZERO;
    let alarm = Alarm::new();
    while schedule.due < schedule.until && !stopped() {
        alarm.until(schedule.due + pause).await;
        let now = Instant::now();
        out.clear();
        pause = Duration::ZERO;
        {
            let mut sent = shared.sent.borrow_mut();
            while schedule.due <= now && schedule.due < schedule.until {
                let count = schedule.pipeline.min(schedule.unanswered_max.saturating_sub(sent.len()));
                for _ in 0..count {
                    template.write(&mut out);
                    sent.push_back(schedule.due);
                }
                if count < schedule.pipeline {
                    shared.withheld.set(shared.withheld.get() + (schedule.pipeline - count) as u64);
                    pause = FULL_PAUSE;
                }
                schedule.due += schedule.between;
            }
        }
        output.write_all(&out).await.unwrap();
    }
    shared.over.set(true);
    // Dropped, it would end the connection before the last replies.
    output
}

async fn receive(mut stream: OwnedReadHalf, shared: Rc<Shared>, until: Instant) -> Tally {
    let mut tally = Tally::new();
    let mut input = Vec::with_capacity(16 << 10);
    let mut last = Instant::now();
    loop {
        let unanswered = shared.sent.borrow().len();
        if shared.over.get() && (unanswered == 0 || last.elapsed() > LAST_REPLIES) {
            tally.unanswered = unanswered as u64;
            return tally;
        }
        // Woken now and then to see whether it is over.
        let Ok(read) = tokio::time::timeout(Duration::from_millis(100), stream.read_buf(&mut input)).await else { continue };
        assert!(read.unwrap() > 0, "the connection was closed");
        last = Instant::now();
        let in_time = tally.operations;
        tally.take(&mut input, || last.duration_since(shared.sent.borrow_mut().pop_front().unwrap()));
        if last > until {
            // Served once nothing is sent any more.
            tally.operations = in_time;
        }
    }
}

/// Runs all connections' loops to their end, and adds up what they have counted.
async fn all<F: Future<Output = Tally> + 'static>(each: impl Iterator<Item = F>) -> Tally {
    let (local, mut running) = (LocalSet::new(), JoinSet::new());
    each.for_each(|one| _ = running.spawn_local_on(one, &local));
    local
        .run_until(async {
            let mut sum = Tally::new();
            while let Some(one) = running.join_next().await {
                let one = one.unwrap();
                sum.operations += one.operations;
                sum.withheld += one.withheld;
                sum.unanswered += one.unanswered;
                sum.latency.add(one.latency).unwrap();
                one.errors.into_iter().for_each(|(word, count)| *sum.errors.entry(word).or_default() += count);
            }
            sum
        })
        .await
}

/// A field of the server's status, asked without blocking.
pub async fn status(stream: &mut TcpStream, field: &str) -> String {
    stream.write_all(b"HOLDFAST.STATUS\r\n").await.unwrap();
    let mut input = Vec::new();
    while frame(&input).is_none() {
        assert!(stream.read_buf(&mut input).await.unwrap() > 0, "the connection was closed");
    }
    let text = String::from_utf8_lossy(&input);
    let (_, rest) = text.split_once(&format!("{field}\r\n")).unwrap();
    let mut lines = rest.split("\r\n");
    // `:3`, or the length of a text and then the text.
    let first = lines.next().unwrap();
    first.strip_prefix(':').unwrap_or_else(|| lines.next().unwrap()).to_owned()
}
