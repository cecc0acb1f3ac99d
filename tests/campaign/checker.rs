//! Whether a history and what both backends hold at rest fit together. Knows the promises, and nothing of how they are kept.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use crate::history::{Operation, Outcome, Position, Record};

/// A row of `holdfast.stock_ledger`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StockRow {
    pub position: Position,
    /// The position it had when its client was answered, where it was saved from a lost Redis.
    pub origin: Option<Position>,
    /// Which product of the operation.
    pub i: usize,
    pub product: String,
    pub kind: String,
    pub delta: i64,
    pub after: i64,
    pub request: Option<String>,
}

impl StockRow {
    /// The operations that it stands for, by its column `runs`: only itself, if that is empty.
    pub fn one_by_one(self, runs: &str) -> Vec<Self> {
        if runs.is_empty() {
            return vec![self];
        }
        let mut after = self.after - self.delta;
        let deltas = runs.split(',').flat_map(|run| {
            let (places, delta) = run.split_once(':').unwrap();
            let (first, last) = places.split_once('-').unwrap_or((places, places));
            let length = last.parse::<usize>().unwrap() + 1 - first.parse::<usize>().unwrap();
            std::iter::repeat_n(delta.parse::<i64>().unwrap(), length)
        });
        let rows = (self.position.1..).zip(deltas).map(|(n, delta)| {
            after += delta;
            let kind = if delta < 0 { "decr" } else { "incr" }.to_owned();
            Self { position: (self.position.0, n), delta, after, kind, ..self.clone() }
        });
        rows.collect()
    }
}

/// A row of `holdfast.coupon_ledger`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CouponRow {
    pub position: Position,
    pub origin: Option<Position>,
    pub coupon: String,
    pub kind: String,
    pub user: String,
    pub serial: i64,
    pub remaining: i64,
    pub request: Option<String>,
}

/// One coupon, as one of the backends has it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Coupon {
    pub total: i64,
    pub issued: i64,
    pub per_user: i64,
    pub last_serial: i64,
    /// Serial and user of each issue.
    pub issues: BTreeSet<(i64, String)>,
}

/// What one of the backends holds at rest.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Side {
    pub stock: BTreeMap<String, i64>,
    pub coupons: BTreeMap<String, Coupon>,
}

/// Both backends at rest, and the ledger.
#[derive(Clone, Debug, Default)]
pub struct Books {
    pub stock_rows: Vec<StockRow>,
    pub coupon_rows: Vec<CouponRow>,
    pub redis: Side,
    pub postgres: Side,
    /// The differences that the reconciler has found: nobody has made any.
    pub drifts: Vec<String>,
    /// Whether what was answered may have been lost: where more died at a time than the promises cover.
    pub may_lose: bool,
}

/// Everything that is wrong; empty if nothing is.
pub fn check(history: &[Record], books: &Books) -> Vec<String> {
    let mut wrong = Vec::new();
    both_sides_agree(books, &mut wrong);
    ledger_adds_up(books, &mut wrong);
    coupons_add_up(books, &mut wrong);
    requests_are_once(books, &mut wrong);
    if !books.may_lose {
        accepted_are_there(history, books, &mut wrong);
    }
    refused_are_not_there(history, books, &mut wrong);
    rows_come_from_the_history(history, books, &mut wrong);
    positions_respect_time(history, &mut wrong);
    wrong.extend(books.drifts.iter().map(|drift| format!("what was on its way was taken for a difference: {drift}")));
    let failed = history.iter().filter(|record| matches!(record.outcome, Outcome::Failed(_)));
    wrong.extend(failed.map(|record| format!("no fault explains this answer: {record}")));
    wrong
}

/// The accepted operations that the ledger does not have, with the positions they were answered with.
pub fn lost<'a>(history: &'a [Record], books: &Books) -> Vec<(Position, &'a Record)> {
    let ledger = Ledger::of(books);
    let position = |record: &Record| match record.outcome {
        Outcome::Accepted { position, .. } if ledger.find(record).is_empty() => Some(position),
        _ => None,
    };
    history.iter().filter_map(|record| Some((position(record)?, record))).collect()
}

fn both_sides_agree(books: &Books, wrong: &mut Vec<String>) {
    let products: BTreeSet<&String> = books.redis.stock.keys().chain(books.postgres.stock.keys()).collect();
    for product in products {
        let (redis, postgres) = (books.redis.stock.get(product), books.postgres.stock.get(product));
        if redis != postgres {
            wrong.push(format!("{product}: Redis has {redis:?}, Postgres {postgres:?}"));
        }
        if [redis, postgres].into_iter().flatten().any(|available| *available < 0) {
            wrong.push(format!("{product}: below zero, Redis {redis:?}, Postgres {postgres:?}"));
        }
    }
    let coupons: BTreeSet<&String> = books.redis.coupons.keys().chain(books.postgres.coupons.keys()).collect();
    for coupon in coupons {
        let (Some(redis), Some(postgres)) = (books.redis.coupons.get(coupon), books.postgres.coupons.get(coupon)) else {
            wrong.push(format!("{coupon}: only one side has this coupon"));
            continue;
        };
        let terms = |side: &Coupon| (side.total, side.issued, side.per_user, side.last_serial);
        if terms(redis) != terms(postgres) {
            wrong.push(format!(
                "{coupon}: (total, issued, per user, last serial) Redis {:?}, Postgres {:?}",
                terms(redis),
                terms(postgres)
            ));
        }
        let differ: Vec<_> = redis.issues.symmetric_difference(&postgres.issues).take(10).collect();
        if !differ.is_empty() {
            wrong.push(format!("{coupon}: only one side has these issues: {differ:?}"));
        }
    }
}

fn ledger_adds_up(books: &Books, wrong: &mut Vec<String>) {
    let mut sums: BTreeMap<&String, i64> = BTreeMap::new();
    for row in &books.stock_rows {
        *sums.entry(&row.product).or_default() += row.delta;
        if row.after < 0 {
            wrong.push(format!("oversold: {row:?}"));
        }
    }
    for (product, available) in &books.postgres.stock {
        let sum = sums.get(product).copied().unwrap_or(0);
        if sum != *available {
            wrong.push(format!("{product}: its ledger sums to {sum}, but {available} are available"));
        }
    }
}

fn coupons_add_up(books: &Books, wrong: &mut Vec<String>) {
    for (name, coupon) in &books.postgres.coupons {
        let mut users: HashMap<&String, i64> = HashMap::new();
        coupon.issues.iter().for_each(|(_, user)| *users.entry(user).or_default() += 1);
        let most = users.iter().max_by_key(|(_, count)| **count);
        if most.is_some_and(|(_, count)| *count > coupon.per_user) {
            wrong.push(format!("{name}: {most:?} were issued to one user, who may have {}", coupon.per_user));
        }
        let issued = i64::try_from(coupon.issues.len()).unwrap();
        if issued != coupon.issued || issued > coupon.total {
            wrong.push(format!("{name}: {issued} issues, {} counted, {} there are", coupon.issued, coupon.total));
        }
        let ledger: Vec<i64> =
            books.coupon_rows.iter().filter(|row| row.coupon == *name && row.kind == "issue").map(|row| row.serial).collect();
        let serials: BTreeSet<i64> = ledger.iter().copied().collect();
        let issued: BTreeSet<i64> = coupon.issues.iter().map(|(serial, _)| *serial).collect();
        if serials.len() != ledger.len() || serials != issued {
            wrong.push(format!("{name}: {} issues in the ledger with {} serials, {} issues", ledger.len(), serials.len(), issued.len()));
        }
    }
}

fn requests_are_once(books: &Books, wrong: &mut Vec<String>) {
    let stock = books.stock_rows.iter().map(|row| (&row.request, row.position));
    let coupons = books.coupon_rows.iter().map(|row| (&row.request, row.position));
    let mut first: HashMap<&String, Position> = HashMap::new();
    for (request, position) in stock.chain(coupons) {
        let Some(request) = request else { continue };
        let known = *first.entry(request).or_insert(position);
        if known != position {
            wrong.push(format!("REQUEST {request} has two changes: {known:?} and {position:?}"));
        }
    }
}

/// The ledger's changes by position.
struct Ledger<'a> {
    stock: HashMap<Position, Vec<&'a StockRow>>,
    coupons: HashMap<Position, Vec<&'a CouponRow>>,
}

impl<'a> Ledger<'a> {
    fn of(books: &'a Books) -> Self {
        let (mut stock, mut coupons): (HashMap<_, Vec<_>>, HashMap<_, Vec<_>>) = Default::default();
        for row in &books.stock_rows {
            [Some(row.position), row.origin].into_iter().flatten().for_each(|position| stock.entry(position).or_default().push(row));
        }
        for row in &books.coupon_rows {
            [Some(row.position), row.origin].into_iter().flatten().for_each(|position| coupons.entry(position).or_default().push(row));
        }
        Self { stock, coupons }
    }

    /// What the ledger has at the position that this operation was answered with: how often all of it is there, as it was answered.
    fn find(&self, record: &Record) -> Vec<String> {
        let Outcome::Accepted { values, position } = &record.outcome else { return Vec::new() };
        let mut found = Vec::new();
        let (stock, coupons) = (self.stock.get(position), self.coupons.get(position));
        let items = match &record.operation {
            Operation::Decr(items) => items.iter().map(|(product, quantity)| (product, -quantity)).collect(),
            Operation::Incr(product, quantity) => vec![(product, *quantity)],
            Operation::Issue { coupon, user } => {
                for row in coupons.into_iter().flatten() {
                    let answered = row.origin.is_some() || *values == [row.serial, row.remaining];
                    let same = row.coupon == *coupon && row.user == *user && row.kind == "issue" && row.request == record.request;
                    found.extend((same && answered).then(|| format!("{row:?}")));
                }
                return found;
            }
        };
        let rows: Vec<&&StockRow> = stock.into_iter().flatten().collect();
        let expected = |at: usize, (product, delta): &(&String, i64)| {
            let fits = |row: &StockRow| {
                let answered = row.origin.is_some() || values.get(at) == Some(&row.after);
                row.i == at && row.product == **product && row.delta == *delta && row.request == record.request && answered
            };
            rows.iter().filter(|row| fits(row)).count()
        };
        let times: Vec<usize> = items.iter().enumerate().map(|(at, item)| expected(at, item)).collect();
        let once = times.iter().copied().min().unwrap_or(0);
        if times.iter().all(|count| *count == once) && rows.len() == once * items.len() {
            found.extend((0..once).map(|_| format!("{rows:?}")));
        }
        found
    }
}

fn accepted_are_there(history: &[Record], books: &Books, wrong: &mut Vec<String>) {
    let ledger = Ledger::of(books);
    for record in history.iter().filter(|record| record.is_accepted()) {
        let found = ledger.find(record);
        if found.len() != 1 {
            let Outcome::Accepted { position, .. } = &record.outcome else { continue };
            let there = (ledger.stock.get(position), ledger.coupons.get(position));
            wrong.push(format!("{} times in the ledger: {record}\n        there is {there:?}", found.len()));
        }
    }
}

fn requests_of(books: &Books) -> HashSet<&String> {
    let stock = books.stock_rows.iter().filter_map(|row| row.request.as_ref());
    stock.chain(books.coupon_rows.iter().filter_map(|row| row.request.as_ref())).collect()
}

fn refused_are_not_there(history: &[Record], books: &Books, wrong: &mut Vec<String>) {
    let requests = requests_of(books);
    for record in history {
        if matches!(record.outcome, Outcome::Refused(_)) && record.request.as_ref().is_some_and(|request| requests.contains(request)) {
            wrong.push(format!("refused, and in the ledger: {record}"));
        }
    }
}

/// What the ledger has, somebody has asked for.
fn rows_come_from_the_history(history: &[Record], books: &Books, wrong: &mut Vec<String>) {
    let asked: HashSet<&String> = history.iter().filter_map(|record| record.request.as_ref()).collect();
    wrong
        .extend(requests_of(books).difference(&asked).map(|request| format!("nobody sent the REQUEST {request}, and it is in the ledger")));
    let nameless = |kinds: &[&str]| {
        let stock = books.stock_rows.iter().filter(|row| row.i == 0 && row.request.is_none() && kinds.contains(&row.kind.as_str())).count();
        stock + books.coupon_rows.iter().filter(|row| row.request.is_none() && kinds.contains(&row.kind.as_str())).count()
    };
    let rows = nameless(&["decr", "incr", "issue"]);
    let without = |wanted: fn(&Record) -> bool| history.iter().filter(|record| record.request.is_none() && wanted(record)).count();
    let (accepted, unknown) = (without(Record::is_accepted), without(|record| record.outcome == Outcome::Unknown));
    if rows > accepted + unknown || (rows < accepted && !books.may_lose) {
        wrong.push(format!("{rows} changes without a REQUEST in the ledger; {accepted} were accepted and {unknown} are not known"));
    }
}

/// What was answered before another was sent took effect before it.
fn positions_respect_time(history: &[Record], wrong: &mut Vec<String>) {
    let position = |record: &Record| match record.outcome {
        Outcome::Accepted { position, .. } => Some(position),
        _ => None,
    };
    let mut accepted: Vec<(Position, &Record)> = history.iter().filter_map(|record| Some((position(record)?, record))).collect();
    accepted.sort_by_key(|(position, _)| *position);
    for two in accepted.windows(2).filter(|two| two[0].0 == two[1].0) {
        wrong.push(format!("two operations at one position:\n    {}\n    {}", two[0].1, two[1].1));
    }
    // From the last position down: the earliest end of those behind.
    let mut earliest: Option<(Duration, &Record)> = None;
    for (_, record) in accepted.iter().rev() {
        if let Some((end, later)) = earliest.filter(|(end, _)| *end < record.began()) {
            wrong.push(format!("answered after {end:?}, before the next was sent, but with a later position:\n    {later}\n    {record}"));
        }
        if earliest.is_none_or(|(end, _)| record.ended() < end) {
            earliest = Some((record.ended(), record));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Try;

    fn record(operation: Operation, request: Option<&str>, ms: (u64, u64), outcome: Outcome) -> Record {
        let at = Duration::from_millis;
        let tries = vec![Try { sent: at(ms.0), ended: at(ms.1), said: String::new() }];
        Record { client: 0, operation, request: request.map(str::to_owned), tries, outcome }
    }

    fn decr(product: &str, request: Option<&str>, ms: (u64, u64), after: i64, n: u64) -> Record {
        let outcome = Outcome::Accepted { values: vec![after], position: (1, n) };
        record(Operation::Decr(vec![(product.into(), 1)]), request, ms, outcome)
    }

    fn row(product: &str, kind: &str, delta: i64, after: i64, request: Option<&str>, n: u64) -> StockRow {
        let request = request.map(str::to_owned);
        StockRow { position: (1, n), origin: None, i: 0, product: product.into(), kind: kind.into(), delta, after, request }
    }

    /// Two units of `a` sold out of ten, and a coupon of which one is issued.
    fn sound() -> (Vec<Record>, Books) {
        let issue = Operation::Issue { coupon: "c".into(), user: "u".into() };
        let history = vec![
            decr("a", Some("r"), (0, 10), 9, 2),
            decr("a", None, (20, 30), 8, 3),
            record(issue, Some("s"), (40, 50), Outcome::Accepted { values: vec![1, 4], position: (1, 5) }),
            record(Operation::Incr("a".into(), 1), Some("t"), (60, 70), Outcome::Refused("TRYAGAIN".into())),
            record(Operation::Incr("a".into(), 1), Some("v"), (60, 70), Outcome::Unknown),
        ];
        let coupon = |kind: &str, serial, request: Option<&str>, n| CouponRow {
            position: (1, n),
            origin: None,
            coupon: "c".into(),
            kind: kind.into(),
            user: if serial > 0 { "u".into() } else { String::new() },
            serial,
            remaining: 5 - serial,
            request: request.map(str::to_owned),
        };
        let side = Side {
            stock: [("a".into(), 8)].into(),
            coupons: [("c".into(), Coupon { total: 5, issued: 1, per_user: 1, last_serial: 1, issues: [(1, "u".into())].into() })].into(),
        };
        let books = Books {
            stock_rows: vec![row("a", "set", 10, 10, None, 1), row("a", "decr", -1, 9, Some("r"), 2), row("a", "decr", -1, 8, None, 3)],
            coupon_rows: vec![coupon("create", 0, None, 4), coupon("issue", 1, Some("s"), 5)],
            redis: side.clone(),
            postgres: side,
            drifts: Vec::new(),
            may_lose: false,
        };
        (history, books)
    }

    fn found(break_it: impl FnOnce(&mut Vec<Record>, &mut Books)) -> String {
        let (mut history, mut books) = sound();
        break_it(&mut history, &mut books);
        check(&history, &books).join("\n")
    }

    #[test]
    fn what_is_sound_passes() {
        assert_eq!(found(|_, _| {}), "");
    }

    #[test]
    fn a_lost_change_is_found() {
        let lost = found(|_, books| {
            books.stock_rows.remove(1);
        });
        assert!(lost.contains("0 times in the ledger") && lost.contains("sums to 9"), "{lost}");
        let elsewhere = found(|_, books| books.stock_rows[1].position = (2, 2));
        assert!(elsewhere.contains("0 times in the ledger"), "{elsewhere}");
    }

    #[test]
    fn a_change_saved_under_another_position_is_found_by_its_origin() {
        assert_eq!(found(|_, books| (books.stock_rows[1].position, books.stock_rows[1].origin) = ((2, 9), Some((1, 2)))), "");
    }

    #[test]
    fn a_change_that_happened_twice_is_found() {
        let again = found(|_, books| {
            books.stock_rows.push(row("a", "decr", -1, 7, Some("r"), 6));
        });
        assert!(again.contains("REQUEST r has two changes"), "{again}");
        let nameless = found(|_, books| books.stock_rows.push(row("a", "decr", -1, 7, None, 6)));
        assert!(nameless.contains("2 changes without a REQUEST"), "{nameless}");
        let twice = found(|history, _| history[1].outcome = Outcome::Accepted { values: vec![9], position: (1, 2) });
        assert!(twice.contains("two operations at one position"), "{twice}");
    }

    #[test]
    fn a_wrong_reply_is_found() {
        let wrong = found(|history, _| history[0].outcome = Outcome::Accepted { values: vec![8], position: (1, 2) });
        assert!(wrong.contains("0 times in the ledger"), "{wrong}");
    }

    #[test]
    fn a_refusal_that_happened_is_found() {
        let refused = found(|_, books| books.stock_rows.push(row("a", "incr", 1, 9, Some("t"), 6)));
        assert!(refused.contains("refused, and in the ledger"), "{refused}");
        let unknown = found(|_, books| {
            books.stock_rows.push(row("a", "incr", 1, 9, Some("v"), 6));
            (books.redis.stock, books.postgres.stock) = ([("a".into(), 9)].into(), [("a".into(), 9)].into());
        });
        assert_eq!(unknown, "", "what is not known may have happened");
    }

    #[test]
    fn an_answer_that_no_fault_explains_is_found() {
        assert!(found(|history, _| history[3].outcome = Outcome::Failed("-FROZEN".into())).contains("no fault explains"));
    }

    #[test]
    fn a_request_that_nobody_sent_is_found() {
        assert!(found(|_, books| books.stock_rows.push(row("a", "incr", 1, 9, Some("x"), 6))).contains("nobody sent"));
    }

    #[test]
    fn sides_that_differ_and_what_is_oversold_are_found() {
        assert!(found(|_, books| books.redis.stock = [("a".into(), 9)].into()).contains("Redis has Some(9), Postgres Some(8)"));
        assert!(found(|_, books| books.redis.stock.clear()).contains("Redis has None"));
        assert!(found(|_, books| books.stock_rows[2].after = -1).contains("oversold"));
    }

    #[test]
    fn a_coupon_that_was_issued_too_often_is_found() {
        let often = found(|_, books| {
            for side in [&mut books.redis, &mut books.postgres] {
                let coupon = side.coupons.get_mut("c").unwrap();
                coupon.issues.insert((2, "u".into()));
                (coupon.issued, coupon.last_serial) = (2, 2);
            }
        });
        assert!(often.contains("were issued to one user") && often.contains("in the ledger with"), "{often}");
    }

    #[test]
    fn an_order_that_goes_back_in_time_is_found() {
        let back = found(|history, _| {
            history[0].tries[0].sent = Duration::from_millis(40);
            history[0].tries[0].ended = Duration::from_millis(45);
        });
        assert!(back.contains("with a later position"), "{back}");
    }
}
