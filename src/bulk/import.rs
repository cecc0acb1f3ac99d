//! `holdfast import`: sets every product of a CSV file, through the write script like any STOCK.SET, while others may be selling.
//!
//! Lines are sent in their order, a bounded number ahead of what Postgres has. Up to which line that is stands in `holdfast.import`, and
//! everything this process writes bears its name in the ledger: so an import that was stopped, however it was, finds out what it has done,
//! and sets nothing twice.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::csv::{Columns, LINE_MAX, Row};
use crate::config::Config;
use crate::domain::change::StockKind;
use crate::domain::{Id, Position};
use crate::ledger::{self, PgConnection};
use crate::limits::{IMPORT_AHEAD, IMPORT_AT_ONCE, IMPORT_LOOK_UP, IMPORT_NOTED_EVERY, IMPORT_REFUSED_SHOWN};
use crate::outbox::presence::Presence;
use crate::outbox::relay::Relay;
use crate::outbox::verify::Verifier;
use crate::outbox::weigh::weigh;
use crate::store::Partition;
use crate::store::lane::{Failure, Family as _, Lane, Waiter};
use crate::store::partition::State;
use crate::store::stock::{Action, Items, Stock, StockOp, StockOutcome};

/// How long an operation may take: nobody waits for a single one.
const WITHIN: Duration = Duration::from_secs(20);

/// What became of an import.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Lines whose products were set, by this run.
    pub set: u64,
    /// Lines that had been done before this run, and were not refused.
    pub before: u64,
    /// Lines that were refused, also by an earlier run; each was named on standard error.
    pub refused: u64,
}

/// Imports the file. Returns when Redis and Postgres both have all of it. Errors with what went wrong, for people; the same call goes on then.
pub async fn import(config: &Config, file: &Path, shutdown: CancellationToken) -> Result<Imported, String> {
    let text = |error: ledger::Error| error.to_string();
    let (digest, lines) = summary(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let (redis_url, postgres_url) = (config.redis.url.expose(), config.postgres.url.expose());
    ledger::migrate(postgres_url).await.map_err(text)?;
    let mut postgres = ledger::connect(postgres_url).await.map_err(text)?;
    let instance = Uuid::new_v4().simple().to_string();
    let begun = ledger::import::begin(&mut postgres, &digest, &file.display().to_string(), &instance).await.map_err(text)?;

    let (partition, _receivers) = Partition::new(0, config.outbox.copies_bytes);
    let partition = Arc::new(partition.bounded(config.outbox.max_changes, config.outbox.max_bytes as u64));
    let window_ms = i64::try_from(config.idempotency.window.as_millis()).unwrap_or(i64::MAX);
    let name = format!("{instance}:{}", Stock::LANE);
    let lane = Lane::<Stock, Line>::new(Arc::clone(&partition), redis_url, name, window_ms, WITHIN, ());
    let work = CancellationToken::new();
    let relay = Relay {
        partition: Arc::clone(&partition),
        redis_url: redis_url.to_owned(),
        postgres_url: postgres_url.to_owned(),
        drain: config.shutdown_timeout / 2,
    };
    let verifier = Verifier::new(Arc::clone(&partition), redis_url, postgres_url, &instance, config.idempotency.window);
    let presence = Presence { partition: Arc::clone(&partition), postgres_url: postgres_url.to_owned(), instance, window_ms };
    let weighing = weigh(Arc::clone(&partition), redis_url.to_owned(), work.clone());
    let carrying = async {
        tokio::join!(
            Rc::clone(&lane).drive(work.clone()),
            relay.run(work.clone()),
            verifier.run(work.clone()),
            presence.run(work.clone()),
            weighing
        );
    };
    let feeding = async {
        let feed = Feed::new(file, lines, begun, digest, Arc::clone(&partition), Rc::clone(&lane), postgres)?;
        let done = shutdown.run_until_cancelled(Box::pin(feed.run())).await;
        work.cancel();
        done.unwrap_or_else(|| Err("stopped by a signal: run it again, and it goes on".to_owned()))
    };
    let ((), done) = tokio::join!(
        Box::pin(carrying),
        Box::pin(async {
            let done = feeding.await;
            work.cancel();
            done
        })
    );
    done
}

/// The file's digest, and how many lines it has.
fn summary(file: &Path) -> std::io::Result<(String, u64)> {
    let mut reader = BufReader::with_capacity(1 << 16, File::open(file)?);
    let (mut hash, mut lines, mut last) = (Sha256::new(), 0, b'\n');
    loop {
        let bytes = reader.fill_buf()?;
        let Some(end) = bytes.last() else { break };
        last = *end;
        hash.update(bytes);
        lines += bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
        let count = bytes.len();
        reader.consume(count);
    }
    let digest = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((digest, lines + u64::from(last != b'\n')))
}

/// A line that was sent, or that needs nothing.
#[derive(Clone, Copy)]
enum Flight {
    Sent,
    /// Redis has it, as the change at this position.
    Set(Position),
    /// Nothing is to be done, or it was done before.
    Over,
}

/// A line with its number; or what is wrong with it, before it is looked at.
type NumberedLine = (u64, Result<String, String>);

/// What the lines that are under way share.
#[derive(Default)]
struct UnderWay {
    /// Behind the last line of which everything before it is in Postgres.
    flights: RefCell<VecDeque<Flight>>,
    /// How many lines stand before them.
    passed: Cell<u64>,
    in_lane: Cell<usize>,
    again: RefCell<Vec<(u64, StockOp)>>,
    refused: RefCell<Vec<(u64, String)>>,
    /// Those that Redis has refused, until that is noted: what is wrong with the others is seen in the file.
    refused_by_redis: RefCell<Vec<i64>>,
    failed: RefCell<Option<String>>,
    wake: Notify,
}

impl UnderWay {
    fn settle(&self, line: u64, flight: Flight) {
        let at = usize::try_from(line - self.passed.get() - 1).unwrap_or(usize::MAX);
        if let Some(place) = self.flights.borrow_mut().get_mut(at) {
            *place = flight;
        }
    }

    fn refuse(&self, line: u64, why: String) {
        self.settle(line, Flight::Over);
        self.refused.borrow_mut().push((line, why));
    }

    fn refuse_by_redis(&self, line: u64, why: String) {
        self.refuse(line, why);
        self.refused_by_redis.borrow_mut().extend(i64::try_from(line));
    }
}

/// Waits for what becomes of a line.
struct Line {
    number: u64,
    under_way: Rc<UnderWay>,
}

impl Waiter<Stock> for Line {
    fn done(self, op: &StockOp, result: Result<StockOutcome, Failure>) {
        let under_way = &self.under_way;
        under_way.in_lane.set(under_way.in_lane.get() - 1);
        match result {
            Ok(StockOutcome::Done { position, .. }) => under_way.settle(self.number, Flight::Set(position)),
            Ok(StockOutcome::Frozen { reason, .. }) => under_way.refuse_by_redis(self.number, format!("the product is frozen: {reason}")),
            Ok(StockOutcome::Corrupt { .. }) => {
                under_way.refuse_by_redis(self.number, "the product's key in Redis holds something that is no number of units".to_owned());
            }
            Err(Failure::TryAgain(_) | Failure::Loading(_) | Failure::Crowded) => {
                under_way.again.borrow_mut().push((self.number, op.clone()));
            }
            other => *under_way.failed.borrow_mut() = Some(format!("line {}: it is not known whether it was set: {other:?}", self.number)),
        }
        under_way.wake.notify_one();
    }
}

/// Reads the file's lines and sends them.
struct Feed {
    reader: BufReader<File>,
    columns: Columns,
    /// How many lines were read.
    read: u64,
    ended: bool,
    /// A hash of each product, and the line it stood in.
    seen: HashMap<u64, u64>,
    begun: ledger::import::Begun,
    /// Up to which line everything is noted as being in Postgres.
    noted: u64,
    digest: String,
    partition: Arc<Partition>,
    lane: Rc<Lane<Stock, Line>>,
    postgres: PgConnection,
    under_way: Rc<UnderWay>,
    bar: ProgressBar,
    done: Imported,
}

impl Feed {
    fn new(
        file: &Path,
        lines: u64,
        begun: ledger::import::Begun,
        digest: String,
        partition: Arc<Partition>,
        lane: Rc<Lane<Stock, Line>>,
        postgres: PgConnection,
    ) -> Result<Self, String> {
        let reader = BufReader::new(File::open(file).map_err(|error| format!("{}: {error}", file.display()))?);
        // It draws only where standard error is a terminal.
        let bar = ProgressBar::new(lines);
        let style = "{wide_bar} {human_pos} of {human_len} lines, {per_sec}, {eta}";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Ok(Self {
            reader,
            columns: Columns::default(),
            read: 0,
            ended: false,
            seen: HashMap::new(),
            noted: begun.lines,
            begun,
            digest,
            partition,
            lane,
            postgres,
            under_way: Rc::default(),
            bar,
            done: Imported::default(),
        })
    }

    async fn run(mut self) -> Result<Imported, String> {
        let epoch = self.live().await?;
        if !self.begun.instances.is_empty() {
            // What an earlier run left in the outbox has to be in the ledger before that is asked.
            let head = self.partition.head().n;
            _ = self.partition.applied.subscribe().wait_for(|applied| applied.n >= head).await;
            self.pass_over().await?;
        }
        let mut noted = Instant::now();
        let mut applied = self.partition.applied.subscribe();
        loop {
            if let Some(failed) = self.under_way.failed.borrow_mut().take() {
                return Err(format!("{failed}; run it again, and it goes on"));
            }
            if self.partition.live_epoch().is_some_and(|now| now != epoch) {
                return Err("Redis was restarted or lost its data meanwhile: run it again, and it goes on".to_owned());
            }
            self.pass();
            self.tell();
            let over = self.ended && self.under_way.flights.borrow().is_empty();
            let is_full = self.under_way.passed.get() >= self.noted + IMPORT_AHEAD as u64 / 2;
            if over || is_full || noted.elapsed() >= IMPORT_NOTED_EVERY {
                self.note(over).await?;
                noted = Instant::now();
            }
            if over {
                self.bar.finish_and_clear();
                return Ok(self.done);
            }
            let again: Vec<_> = self.under_way.again.take();
            if !again.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
                again.into_iter().for_each(|(line, op)| self.send(line, op));
            }
            self.fill()?;
            tokio::select! {
                () = self.under_way.wake.notified() => {}
                _ = applied.changed() => {}
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
        }
    }

    /// Waits until Redis and Postgres fit together.
    async fn live(&self) -> Result<u64, String> {
        let mut state = self.partition.state.subscribe();
        loop {
            if let State::Live { epoch, .. } = &*state.borrow_and_update() {
                return Ok(*epoch);
            }
            if tokio::time::timeout(Duration::from_secs(10), state.changed()).await.is_err()
                && let State::Loading(why) | State::Rebuilding(why) = &*state.borrow()
            {
                self.bar.suspend(|| eprintln!("holdfast: waiting: {why}"));
            }
        }
    }

    /// Passes over what an earlier run has done.
    async fn pass_over(&mut self) -> Result<(), String> {
        let refused: HashSet<u64> = self.begun.refused.iter().filter_map(|line| u64::try_from(*line).ok()).collect();
        while self.read < self.begun.lines
            && let Some((number, line)) = self.next_line()?
        {
            // Its product has been set, and may not come again. What was refused is named again: this run reports on the whole file.
            match self.row(number, &line) {
                Ok(Some(row)) if refused.contains(&number) => {
                    let why = format!("product '{}' was refused when this import was begun, and is not set: STOCK.SET it", row.product);
                    self.under_way.refuse(number, why);
                    self.tell();
                }
                Ok(_) => self.done.before += 1,
                Err(why) => {
                    self.under_way.refuse(number, why);
                    self.tell();
                }
            }
            self.under_way.passed.set(number);
        }
        let last = self.begun.lines + IMPORT_AHEAD as u64;
        while self.read < last && !self.ended {
            let mut rows = Vec::new();
            while rows.len() < IMPORT_LOOK_UP && self.read < last {
                let Some((number, line)) = self.next_line()? else { break };
                rows.push((number, self.row(number, &line)));
            }
            let products: Vec<String> = rows.iter().filter_map(|(_, row)| Some(row.as_ref().ok()?.as_ref()?.product.to_string())).collect();
            let written = ledger::import::written(&mut self.postgres, &products, &self.begun.instances).await;
            let written: HashSet<String> = written.map_err(|error| error.to_string())?;
            for (number, row) in rows {
                let is_there = row.as_ref().is_ok_and(|row| row.as_ref().is_some_and(|row| written.contains(row.product.as_str())));
                if is_there {
                    self.done.before += 1;
                    self.under_way.flights.borrow_mut().push_back(Flight::Over);
                } else {
                    self.take(number, row);
                }
            }
        }
        Ok(())
    }

    /// Sends as many lines as may be under way.
    fn fill(&mut self) -> Result<(), String> {
        // An import that goes on looks up no more than that behind what was noted.
        let last = self.noted + IMPORT_AHEAD as u64;
        while !self.ended && self.under_way.in_lane.get() < IMPORT_AT_ONCE && self.read < last {
            let Some((number, line)) = self.next_line()? else { break };
            let row = self.row(number, &line);
            self.take(number, row);
        }
        Ok(())
    }

    fn take(&mut self, number: u64, row: Result<Option<Row>, String>) {
        self.under_way.flights.borrow_mut().push_back(Flight::Sent);
        match row {
            Ok(None) => self.under_way.settle(number, Flight::Over),
            Err(why) => self.under_way.refuse(number, why),
            Ok(Some(Row { product, available, low })) => {
                let items: Items = std::iter::once((product, available)).collect();
                self.send(number, StockOp { low, ..StockOp::new(Action::Change(StockKind::Set), items) });
            }
        }
    }

    fn send(&self, number: u64, op: StockOp) {
        self.under_way.in_lane.set(self.under_way.in_lane.get() + 1);
        self.lane.submit(op, Instant::now(), Line { number, under_way: Rc::clone(&self.under_way) });
    }

    /// The next line with its number; `None` at the end.
    fn next_line(&mut self) -> Result<Option<NumberedLine>, String> {
        let mut bytes = Vec::new();
        let limit = LINE_MAX as u64 + 2;
        let count = self.reader.by_ref().take(limit).read_until(b'\n', &mut bytes).map_err(|error| format!("reading the file: {error}"))?;
        if count == 0 {
            self.ended = true;
            return Ok(None);
        }
        self.read += 1;
        if count as u64 == limit && bytes.last() != Some(&b'\n') {
            self.reader.skip_until(b'\n').map_err(|error| format!("reading the file: {error}"))?;
            return Ok(Some((self.read, Err(format!("longer than {LINE_MAX} bytes")))));
        }
        while matches!(bytes.last(), Some(b'\n' | b'\r')) {
            bytes.pop();
        }
        if self.read == 1 && bytes.starts_with("\u{feff}".as_bytes()) {
            bytes.drain(..3);
        }
        Ok(Some((self.read, String::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned()))))
    }

    /// What a line asks for: nothing where it is empty or names the columns. Errors with what is wrong with it.
    fn row(&mut self, number: u64, line: &Result<String, String>) -> Result<Option<Row>, String> {
        let line = line.as_ref().map_err(Clone::clone)?;
        if line.is_empty() {
            return Ok(None);
        }
        if number == 1
            && let Some(columns) = Columns::of_header(line)?
        {
            self.columns = columns;
            return Ok(None);
        }
        let row = self.columns.row(line)?;
        match self.seen.insert(hash(&row.product), number) {
            None => Ok(Some(row)),
            Some(first) => {
                self.seen.insert(hash(&row.product), first);
                Err(format!("product '{}' stands in line {first} already", row.product))
            }
        }
    }

    /// Gives up the lines in front that Postgres has.
    fn pass(&mut self) {
        let applied = *self.partition.applied.borrow();
        let mut flights = self.under_way.flights.borrow_mut();
        while let Some(flight) = flights.front() {
            match flight {
                Flight::Set(position) if *position <= applied => self.done.set += 1,
                Flight::Over => {}
                Flight::Set(_) | Flight::Sent => break,
            }
            flights.pop_front();
            self.under_way.passed.set(self.under_way.passed.get() + 1);
        }
        self.bar.set_position(self.under_way.passed.get());
    }

    /// Names what was refused, as long as it is not very much.
    fn tell(&mut self) {
        for (line, why) in self.under_way.refused.take() {
            self.done.refused += 1;
            match self.done.refused {
                IMPORT_REFUSED_SHOWN => self.bar.suspend(|| eprintln!("line {line}: {why}\nand so on")),
                count if count < IMPORT_REFUSED_SHOWN => self.bar.suspend(|| eprintln!("line {line}: {why}")),
                _ => {}
            }
        }
    }

    async fn note(&mut self, done: bool) -> Result<(), String> {
        let lines = self.under_way.passed.get();
        let refused = self.under_way.refused_by_redis.take();
        let noting = ledger::import::reached(&mut self.postgres, &self.digest, lines, &refused, done);
        noting.await.map_err(|error| format!("{error}; run it again, and it goes on"))?;
        self.noted = lines;
        Ok(())
    }
}

fn hash(product: &Id) -> u64 {
    let mut hasher = DefaultHasher::new();
    product.as_bytes().hash(&mut hasher);
    hasher.finish()
}
