//! Every STOCK command, from eight clients at once, against a plain model.
//!
//! The clients send one command each and wait for all replies: a round. A command that was accepted has a position, so afterwards the
//! whole history is replayed in the order of positions, with the expiries that the ledger has in between, and every reply must be the
//! model's. A refusal or a read has no position: it must be what the model says at some point of its round. What HISTORY tells is a stretch of
//! what became of the product. Sidecars are killed in between, and what got no answer is sent again under its REQUEST id. Now and then
//! somebody changes units in Redis by hand while nobody else does anything; then SYNC has to find just that, and at all other times nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::Rng as _;
use proptest::test_runner::{RngAlgorithm, TestRng};

use crate::harness::{Client, Sidecar, Stack, now_ms, scanned, seed, wait_until};
use crate::reconcile::NEVER;

const CLIENTS: usize = 8;
const PRODUCTS: [&str; 5] = ["a", "b", "c", "d", "e"];
/// Of so many rounds one loses its sidecar.
const KILL_EVERY: usize = 400;
/// In one of so many rounds units are changed by hand.
const TAMPER_EVERY: usize = 800;
/// More than is corrected without a person.
const TOO_MANY: i64 = 500;

/// How many commands; `HOLDFAST_TEST_STEPS` says otherwise.
fn steps() -> usize {
    std::env::var("HOLDFAST_TEST_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(100_000)
}

type Place = (u64, u64);

fn place(text: &str) -> Option<Place> {
    let (epoch, n) = text.split_once('-')?;
    Some((epoch.parse().ok()?, n.parse().ok()?))
}

/// One command and what became of it.
#[derive(Clone, Debug)]
struct Step {
    round: usize,
    words: Vec<String>,
    reply: String,
    from_ms: i64,
    to_ms: i64,
    /// By how many units the product was changed by hand before it.
    tampered: i64,
}

impl Step {
    /// The position in its reply, and the reply without it.
    fn position(&self) -> Option<(Place, String)> {
        let inner = self.reply.strip_prefix('[')?.strip_suffix(']')?;
        let (rest, last) = inner.rsplit_once(", ")?;
        Some((place(last)?, format!("[{rest}]")))
    }

    /// What a reply without a position of its own says, and where it was read, if it is an INFO.
    fn said(&self) -> (&str, Option<Place>) {
        if self.reply.starts_with(FROZEN) {
            return (FROZEN, None);
        }
        let info = if self.words[0] == "INFO" { self.reply.split_once(", position, ") } else { None };
        info.map_or((self.reply.as_str(), None), |(said, read)| (said, read.split(',').next().and_then(place)))
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Order {
    state: &'static str,
    expires: i64,
    items: Vec<(String, i64)>,
    at: Place,
}

/// Why is not the model's affair.
const FROZEN: &str = "-FROZEN";

#[derive(Clone, Debug, Default)]
struct Model {
    units: BTreeMap<String, i64>,
    held: BTreeMap<String, i64>,
    low: BTreeMap<String, i64>,
    frozen: BTreeSet<String>,
    orders: HashMap<String, Order>,
    /// What HISTORY is to say of each product, the oldest first, but for when it was.
    past: HashMap<String, Vec<(Place, String)>>,
}

/// What the model says to a command.
#[derive(Clone, Debug, PartialEq)]
enum Answer {
    /// The reply without its position.
    Accepted(String),
    /// A reply that says where the order became what it is.
    Again(String, Place),
    Refused(String),
}

fn pairs(words: &[String]) -> Vec<(String, i64)> {
    let mut items: Vec<(String, i64)> = Vec::new();
    for pair in words.chunks(2) {
        let Some(units) = pair.get(1).and_then(|units| units.parse::<i64>().ok()) else { break };
        match items.iter_mut().find(|(product, _)| *product == pair[0]) {
            Some((_, sum)) => *sum += units,
            None => items.push((pair[0].clone(), units)),
        }
    }
    items
}

fn option<'a>(words: &'a [String], name: &str) -> Option<&'a str> {
    words.iter().position(|word| word == name).map(|at| words[at + 1].as_str())
}

impl Model {
    fn lacks(&self, items: &[(String, i64)]) -> Option<String> {
        items.iter().find_map(|(product, wanted)| match self.units.get(product) {
            _ if self.frozen.contains(product) => Some(FROZEN.into()),
            None => Some(format!("-NOTFOUND no product '{product}'")),
            Some(available) if available < wanted => Some(format!("[INSUFFICIENT, {product}, {available}]")),
            Some(_) => None,
        })
    }

    fn taken(&self, order: &str, now: i64) -> Option<String> {
        let order = self.orders.get(order)?;
        let state = if order.state == "held" && order.expires <= now { "expired" } else { order.state };
        Some(if order.items.is_empty() { "[CANCELLED]".into() } else { format!("[EXISTS, {state}]") })
    }

    /// What the command comes to at a moment. `held`: the time that a reply names.
    fn answer(&self, words: &[String], now: i64, named: Option<&str>) -> Answer {
        use Answer::{Accepted, Again, Refused};
        let shown = |units: Option<&i64>| units.map_or_else(|| "nil".to_owned(), i64::to_string);
        let left = |items: &[(String, i64)]| {
            items.iter().map(|(product, units)| (self.units[product] - units).to_string()).collect::<Vec<_>>().join(", ")
        };
        let held = || format!("[HELD, {}]", named.unwrap_or_default());
        let known = |order: &str| self.orders.get(order).map(|order| (order, order.state == "held" && order.expires <= now));
        if matches!(words[0].as_str(), "SET" | "DEL" | "INCR") && self.frozen.contains(&words[1]) {
            return Refused(FROZEN.into());
        }
        match words[0].as_str() {
            "SYNC" => Refused("[]".into()),
            "UNFREEZE" if self.units.contains_key(&words[1]) || self.frozen.contains(&words[1]) => Accepted("[OK]".into()),
            "UNFREEZE" => Refused(format!("-NOTFOUND no product '{}'", words[1])),
            "GET" => Refused(shown(self.units.get(&words[1]))),
            "MGET" => {
                Refused(format!("[{}]", words[1..].iter().map(|product| shown(self.units.get(product))).collect::<Vec<_>>().join(", ")))
            }
            "INFO" => Refused(self.units.get(&words[1]).map_or_else(
                || "nil".into(),
                |available| {
                    let (held, low) = (self.held.get(&words[1]).copied().unwrap_or_default(), shown(self.low.get(&words[1])));
                    format!("[product, {}, available, {available}, held, {held}, low, {low}", words[1])
                },
            )),
            "SET" => Accepted(format!("[OK, {}]", words[2])),
            "DEL" => {
                if self.units.contains_key(&words[1]) {
                    Accepted("[OK]".into())
                } else {
                    Refused("[NOTFOUND]".into())
                }
            }
            "INCR" => match self.units.get(&words[1]) {
                Some(available) => Accepted(format!("[OK, {}]", available + words[2].parse::<i64>().unwrap())),
                None => Refused(format!("-NOTFOUND no product '{}'", words[1])),
            },
            "DECR" => {
                let items = pairs(&words[1..]);
                if let Some(taken) = option(words, "ORDER").and_then(|order| self.taken(order, now)) {
                    return Refused(taken);
                }
                self.lacks(&items).map_or_else(|| Accepted(format!("[OK, {}]", left(&items))), Refused)
            }
            "RESERVE" => {
                let items = pairs(&words[3..]);
                let refused = self.taken(&words[1], now).or_else(|| self.lacks(&items));
                refused.map_or_else(|| Accepted(held()), Refused)
            }
            "ORDER" => Refused(known(&words[1]).map_or_else(
                || "nil".into(),
                |(order, due)| {
                    let items: Vec<_> = order.items.iter().map(|(product, units)| format!("{product}, {units}")).collect();
                    let (order, state, expires) = (&words[1], if due { "expired" } else { order.state }, order.expires);
                    format!("[order, {order}, state, {state}, expires_at_ms, {expires}, items, [{}]]", items.join(", "))
                },
            )),
            "CONFIRM" => match known(&words[1]) {
                None => Refused("[NOTFOUND]".into()),
                Some((_, true)) => Refused("[EXPIRED]".into()),
                Some((order, _)) => match order.state {
                    "held" => Accepted("[CONFIRMED]".into()),
                    "confirmed" => Again("[CONFIRMED]".into(), order.at),
                    other => Refused(format!("[{}]", other.to_uppercase())),
                },
            },
            "CANCEL" => match known(&words[1]) {
                None => Accepted("[CANCELLED]".into()),
                Some((_, true)) => Refused("[EXPIRED]".into()),
                Some((order, _)) => match order.state {
                    "held" | "confirmed" => Accepted("[CANCELLED]".into()),
                    "cancelled" => Again("[CANCELLED]".into(), order.at),
                    other => Refused(format!("[{}]", other.to_uppercase())),
                },
            },
            "EXTEND" => match known(&words[1]) {
                None => Refused("[NOTFOUND]".into()),
                Some((_, true)) => Refused("[EXPIRED]".into()),
                Some((order, _)) if order.state == "held" => Accepted(held()),
                Some((order, _)) => Refused(format!("[{}]", order.state.to_uppercase())),
            },
            other => panic!("{other}"),
        }
    }

    /// What SYNC says of a product of which so many units were changed by hand.
    fn tampered(&self, product: &str, by: i64) -> String {
        let (units, action) = (self.units[product], if by == TOO_MANY { "frozen" } else { "corrected" });
        format!(
            "[[product, {product}, redis, {}, postgres, {units}, in_flight, 0, drift, {by}, action, {action}, measure, available]]",
            units + by
        )
    }

    /// Whether a step of a scan may have found this: it reads the units of what it finds at one moment.
    fn has(&self, scan: &str) -> bool {
        scanned(scan).is_some_and(|(_, found)| found.iter().all(|(product, units)| self.units.get(product) == Some(units)))
    }

    fn give_back(&mut self, order: &Order) {
        for (product, units) in &order.items {
            if let Some(available) = self.units.get_mut(product) {
                *available += units;
            }
        }
    }

    fn hold(&mut self, items: &[(String, i64)], sign: i64) {
        items.iter().for_each(|(product, units)| *self.held.entry(product.clone()).or_default() += sign * units);
    }

    /// Makes a change of these products, and notes it as their past.
    fn note(&mut self, at: Place, kind: &str, of: (Option<&str>, Option<&str>), products: &[String], change: impl FnOnce(&mut Self)) {
        let numbers = |model: &Self, product| [&model.units, &model.held].map(|all| all.get(product).copied().unwrap_or_default());
        let before: Vec<_> = products.iter().map(|product| numbers(self, product)).collect();
        change(self);
        let (order, request) = (of.0.unwrap_or("nil"), of.1.unwrap_or("nil"));
        for (product, [units, held]) in products.iter().zip(before) {
            let [available, now_held] = numbers(self, product);
            let (delta, held) = (available - units, now_held - held);
            let text = format!("kind, {kind}, delta, {delta}, available, {available}, held, {held}, order, {order}, request, {request}");
            self.past.entry(product.clone()).or_default().push((at, text));
        }
    }

    /// Carries out what was accepted at a place.
    fn accept(&mut self, words: &[String], at: Place, named: Option<&str>) {
        let products = |items: Vec<(String, i64)>| items.into_iter().map(|(product, _)| product).collect();
        let (order, products): (Option<&str>, Vec<String>) = match words[0].as_str() {
            "DECR" => (option(words, "ORDER"), products(pairs(&words[1..]))),
            "RESERVE" => (Some(&words[1]), products(pairs(&words[3..]))),
            "EXTEND" | "CONFIRM" | "CANCEL" => {
                (Some(&words[1]), self.orders.get(&words[1]).map(|order| products(order.items.clone())).unwrap_or_default())
            }
            _ => (None, vec![words[1].clone()]),
        };
        let kind = match words[0].as_str() {
            "DEL" => "delete".to_owned(),
            "DECR" if order.is_some() => "sell".to_owned(),
            word => word.to_lowercase(),
        };
        self.note(at, &kind, (order, option(words, "REQUEST")), &products, |model| model.apply(words, at, named));
    }

    fn expire(&mut self, order: &str, at: Place) {
        let products: Vec<String> = self.orders[order].items.iter().map(|(product, _)| product.clone()).collect();
        self.note(at, "expire", (Some(order), None), &products, |model| model.end(order, "expired", at));
    }

    /// What a SYNC did to a product that was changed by hand.
    fn repair(&mut self, product: &str, by: i64, at: Place) {
        let (kind, delta, available) = match by {
            TOO_MANY => ("freeze", 0, self.units[product] + by),
            by => ("correct", -by, self.units[product]),
        };
        if kind == "freeze" {
            self.frozen.insert(product.to_owned());
        }
        let text = format!("kind, {kind}, delta, {delta}, available, {available}, held, 0, order, nil, request, nil");
        self.past.entry(product.to_owned()).or_default().push((at, text));
    }

    fn apply(&mut self, words: &[String], at: Place, named: Option<&str>) {
        let take = |model: &mut Self, items: &[(String, i64)]| {
            items.iter().for_each(|(product, units)| *model.units.get_mut(product).unwrap() -= units);
        };
        match words[0].as_str() {
            "SET" => {
                self.units.insert(words[1].clone(), words[2].parse().unwrap());
                self.low.extend(option(words, "LOW").map(|low| (words[1].clone(), low.parse().unwrap())));
            }
            "DEL" => {
                self.units.remove(&words[1]);
                self.low.remove(&words[1]);
            }
            "UNFREEZE" => _ = self.frozen.remove(&words[1]),
            "INCR" => *self.units.get_mut(&words[1]).unwrap() += words[2].parse::<i64>().unwrap(),
            "DECR" => {
                let items = pairs(&words[1..]);
                take(self, &items);
                if let Some(order) = option(words, "ORDER") {
                    self.orders.insert(order.to_owned(), Order { state: "confirmed", expires: 0, items, at });
                }
            }
            "RESERVE" => {
                let items = pairs(&words[3..]);
                take(self, &items);
                self.hold(&items, 1);
                let expires = named.unwrap().parse().unwrap();
                self.orders.insert(words[1].clone(), Order { state: "held", expires, items, at });
            }
            "EXTEND" => {
                let order = self.orders.get_mut(&words[1]).unwrap();
                (order.expires, order.at) = (named.unwrap().parse().unwrap(), at);
            }
            "CONFIRM" => self.end(&words[1], "confirmed", at),
            "CANCEL" => self.end(&words[1], "cancelled", at),
            other => panic!("{other}"),
        }
    }

    fn end(&mut self, id: &str, state: &'static str, at: Place) {
        let order = self.orders.get(id).cloned().unwrap_or(Order { state: "none", expires: 0, items: Vec::new(), at });
        if order.state == "held" {
            self.hold(&order.items, -1);
        }
        if state != "confirmed" {
            self.give_back(&order);
        }
        self.orders.insert(id.to_owned(), Order { state, at, ..order });
    }
}

/// The time that a HELD names.
fn named(reply: &str) -> Option<&str> {
    reply.strip_prefix("[HELD, ")?.split([',', ']']).next()
}

/// Makes commands.
struct Commands {
    rng: TestRng,
    orders: u64,
    requests: u64,
    /// A position that was answered not long ago.
    position: String,
}

impl Commands {
    fn below(&mut self, limit: u64) -> u64 {
        self.rng.next_u64() % limit
    }

    fn product(&mut self) -> String {
        PRODUCTS[usize::try_from(self.below(PRODUCTS.len() as u64)).unwrap()].into()
    }

    /// One of the latest orders, or one that is not there yet.
    fn order(&mut self) -> String {
        let ago = self.below(10);
        format!("o{}", (self.orders + 2).saturating_sub(ago))
    }

    fn items(&mut self) -> Vec<String> {
        let count = 1 + self.below(3);
        (0..count).flat_map(|_| [self.product(), (1 + self.below(4)).to_string()]).collect()
    }

    fn next(&mut self, must_be_named: bool) -> Vec<String> {
        let word = |word: &str| word.to_owned();
        let ttl = [2, 15, 3_600_000][usize::try_from(self.below(3)).unwrap()].to_string();
        let mut words = match self.below(100) {
            0..6 => vec![word("GET"), self.product()],
            6..9 => vec![word("INFO"), self.product()],
            9..10 => vec![word("SCAN"), word("0"), word("COUNT"), word("1000")],
            10..13 => vec![word("MGET"), self.product(), self.product()],
            13..16 => {
                let set = vec![word("SET"), self.product(), self.below(40).to_string()];
                if self.below(2) == 0 { set } else { [set, vec![word("LOW"), self.below(9).to_string()]].concat() }
            }
            16..18 => vec![word("DEL"), self.product()],
            18..30 => vec![word("INCR"), self.product(), (1 + self.below(8)).to_string()],
            30..48 => [vec![word("DECR")], self.items()].concat(),
            48..55 => {
                self.orders += 1;
                [vec![word("DECR")], self.items(), vec![word("ORDER"), self.order()]].concat()
            }
            55..72 => {
                self.orders += 1;
                [vec![word("RESERVE"), self.order(), ttl], self.items()].concat()
            }
            72..80 => vec![word("CONFIRM"), self.order()],
            80..89 => vec![word("CANCEL"), self.order()],
            89..93 => vec![word("EXTEND"), self.order(), ttl],
            93..95 => vec![word("UNFREEZE"), self.product()],
            95..96 => {
                let mut history = vec![word("HISTORY"), self.product()];
                if self.below(2) == 0 {
                    history.extend([word("COUNT"), (1 + self.below(9)).to_string()]);
                }
                if self.below(3) == 0 {
                    history.extend([word("BEFORE"), self.position.clone()]);
                }
                history
            }
            96..97 if self.below(4) == 0 => {
                let mut sync = vec![word("SYNC"), self.product(), self.product()];
                sync.truncate(1 + usize::try_from(self.below(3)).unwrap());
                if self.below(2) == 0 {
                    sync.push(word("DRYRUN"));
                }
                sync
            }
            _ => vec![word("ORDER"), self.order()],
        };
        if matches!(words[0].as_str(), "GET" | "MGET" | "INFO" | "SCAN" | "ORDER" | "HISTORY" | "SYNC") {
            return words;
        }
        if matches!(words[0].as_str(), "SET" | "DEL" | "CANCEL" | "UNFREEZE") && self.below(20) > 0 {
            words.extend([word("ACK"), word("redis")]);
        }
        if must_be_named || self.below(4) == 0 {
            self.requests += 1;
            words.extend([word("REQUEST"), format!("r-{}", self.requests)]);
        }
        words
    }
}

fn sent(words: &[String]) -> Vec<String> {
    let mut sent = words.to_vec();
    sent[0] = format!("STOCK.{}", words[0]);
    sent
}

/// Waits until nothing moves that nobody asks for: every order has expired that soon will, and Postgres has all.
fn wait_until_quiet(stack: &Stack) {
    let due = format!("ZCOUNT stock:expiry -inf {}", now_ms() + 600_000);
    wait_until("everything has expired that will", || stack.backing().ask(&due) == "0");
    stack.wait_until_applied();
}

/// What Postgres has to be asked for is asked for again where it took too long, and nothing was changed.
fn by_postgres(client: &mut Client, words: &[String], mut reply: String) -> String {
    if matches!(words[0].as_str(), "SYNC" | "HISTORY") {
        wait_until("postgres has been asked", || {
            let is_answered = !reply.starts_with("-TRYAGAIN") && !reply.starts_with("-INDOUBT");
            if !is_answered {
                reply = client.ask_words(&sent(words));
            }
            is_answered
        });
    }
    reply
}

/// Changes a product by hand and has SYNC find it; `None` where none is there that can be.
fn tamper(stack: &Stack, client: &mut Client, round: usize) -> Option<Step> {
    wait_until_quiet(stack);
    let mut backing = stack.backing();
    let mut units = |product: &str| -> Option<i64> {
        let is_frozen = backing.ask(&format!("HEXISTS stock:frozen {product}")) != "0";
        backing.ask(&format!("GET stock:product:{product}")).parse().ok().filter(|_| !is_frozen)
    };
    let (product, units) = PRODUCTS.iter().find_map(|product| Some((*product, units(product)?)))?;
    let by = match round / TAMPER_EVERY % 3 {
        0 => TOO_MANY,
        1 if units > 0 => -1,
        _ => 3,
    };
    backing.ask(&format!("INCRBY stock:product:{product} {by}"));
    let words = vec!["SYNC".to_owned(), product.to_owned()];
    let from_ms = now_ms();
    let reply = client.ask_words(&sent(&words));
    let reply = by_postgres(client, &words, reply);
    if by == TOO_MANY {
        // Before anybody unfreezes it.
        backing.ask(&format!("DECRBY stock:product:{product} {by}"));
    }
    Some(Step { round, words, reply, from_ms, to_ms: now_ms(), tampered: by })
}

/// Runs the rounds; returns every command with its reply.
fn run(stack: &mut Stack) -> Vec<Step> {
    let mut commands = Commands {
        rng: TestRng::from_seed(RngAlgorithm::ChaCha, &seed(11).to_le_bytes().repeat(4)),
        orders: 0,
        requests: 0,
        position: "1-1".into(),
    };
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| stack.connect()).collect();
    let mut steps_done: Vec<Step> = Vec::new();
    let mut named_before: Vec<Step> = Vec::new();
    let mut answered: HashMap<String, String> = HashMap::new();
    for round in 0..steps() / CLIENTS {
        if round % TAMPER_EVERY == TAMPER_EVERY / 4 {
            steps_done.extend(tamper(stack, &mut clients[0], round));
            continue;
        }
        let dies = round % KILL_EVERY == KILL_EVERY - 1;
        let batch: Vec<Vec<String>> = clients
            .iter()
            .map(|_| {
                let repeats = !named_before.is_empty() && commands.below(12) == 0;
                let at = usize::try_from(commands.below(named_before.len().max(1) as u64)).unwrap();
                if repeats { named_before[at].words.clone() } else { commands.next(dies) }
            })
            .collect();
        let from_ms = now_ms();
        for (client, words) in clients.iter_mut().zip(&batch) {
            client.send(&sent(words));
        }
        if dies {
            stack.sidecar.kill();
            stack.sidecar = Sidecar::with_settings(&stack.redis.url(), &stack.postgres.url, NEVER);
            stack.wait_until_ready();
        }
        let mut replies: Vec<String> = clients.iter_mut().map(Client::receive).collect();
        if dies {
            clients = (0..CLIENTS).map(|_| stack.connect()).collect();
            for ((client, words), reply) in clients.iter_mut().zip(&batch).zip(&mut replies) {
                if reply.starts_with('-') && !reply.starts_with("-NOTFOUND") && !reply.starts_with("-MISMATCH") {
                    *reply = client.ask_words(&sent(words));
                }
            }
        }
        for ((client, words), reply) in clients.iter_mut().zip(&batch).zip(&mut replies) {
            *reply = by_postgres(client, words, std::mem::take(reply));
        }
        let to_ms = now_ms();
        for (words, reply) in batch.into_iter().zip(replies) {
            let step = Step { round, words, reply, from_ms, to_ms, tampered: 0 };
            if let Some((at, _)) = step.position() {
                commands.position = format!("{}-{}", at.0, at.1);
            }
            if let (Some(id), Some(_)) = (option(&step.words, "REQUEST"), step.position()) {
                if let Some(first) = answered.get(id) {
                    assert_eq!(step.reply, *first, "the same REQUEST, the same reply: {step:?}");
                    continue;
                }
                answered.insert(id.to_owned(), step.reply.clone());
                if named_before.len() < 64 {
                    named_before.push(step.clone());
                } else {
                    let at = usize::try_from(commands.below(64)).unwrap();
                    named_before[at] = step.clone();
                }
            }
            steps_done.push(step);
        }
    }
    steps_done
}

/// What waits for Postgres unless it is told otherwise.
const AWAITED: [&str; 4] = ["SET", "DEL", "CANCEL", "UNFREEZE"];

/// Checks what a HISTORY told: a stretch of the product's past without a gap, as long as it was to be, and no older than it had to be.
/// `next_round`: from where on nothing had happened yet. `in_postgres`: whether somebody had been told that Postgres has it.
fn check_history(step: &Step, past: &[(Place, String)], next_round: Place, in_postgres: impl Fn(Place) -> bool) {
    let before = option(&step.words, "BEFORE").and_then(place).unwrap_or((u64::MAX, 0));
    let count = option(&step.words, "COUNT").map_or(20, |count| count.parse().unwrap());
    assert!(step.reply.starts_with('['), "{step:?}");
    let told: Vec<(Place, &str)> = step
        .reply
        .split("[position, ")
        .skip(1)
        .map(|row| {
            let (at, rest) = row.split_once(", ").unwrap();
            (place(at).unwrap(), rest.split_once(", at_ms, ").unwrap().0)
        })
        .collect();
    let shown = told.first().map_or(0, |(newest, _)| past.partition_point(|(at, _)| at <= newest));
    let expected: Vec<(Place, &str)> = past[..shown].iter().rev().take(count).map(|(at, text)| (*at, text.as_str())).collect();
    assert_eq!(told, expected, "{step:?}");
    assert!(told.first().is_none_or(|(newest, _)| *newest < before && *newest < next_round), "{step:?}");
    let missing = past[shown..].iter().find(|(at, _)| *at < before && in_postgres(*at));
    assert_eq!(missing, None, "{step:?}");
}

#[test]
fn every_reply_is_the_models() {
    let mut stack = Stack::with_settings(NEVER);
    let steps = run(&mut stack);
    wait_until_quiet(&stack);
    // Where each accepted command took effect, and where orders expired. An order that is confirmed again is answered where it became so,
    // which may be another client's command.
    let mut events: BTreeMap<Place, Option<usize>> = BTreeMap::new();
    let (mut expired, mut repaired): (HashMap<Place, String>, HashMap<Place, &Step>) = (HashMap::new(), HashMap::new());
    let mut tampered = steps.iter().filter(|step| step.tampered != 0);
    let (mut kinds, mut requests): (HashMap<Place, String>, HashMap<Place, String>) = (HashMap::new(), HashMap::new());
    for row in stack.postgres.column(
        "SELECT epoch || '-' || n || ' ' || kind || ' ' || coalesce(order_id, '') || ' ' || coalesce(request_id, '') FROM holdfast.stock_ledger WHERE i = 0 ORDER BY epoch, n",
    ) {
        let words: Vec<_> = row.split(' ').collect();
        let at = place(words[0]).unwrap();
        if words[1] == "expire" {
            expired.insert(at, words[2].to_owned());
            events.insert(at, None);
        }
        if matches!(words[1], "correct" | "freeze") {
            repaired.insert(at, tampered.next().expect("nobody had changed anything"));
            events.insert(at, None);
        }
        kinds.insert(at, words[1].to_owned());
        requests.insert(at, words[3].to_owned());
    }
    for (i, step) in steps.iter().enumerate() {
        let Some((at, _)) = step.position() else { continue };
        let word = match kinds[&at].as_str() {
            "delete" => "DEL".to_owned(),
            "sell" => "DECR".to_owned(),
            kind => kind.to_uppercase(),
        };
        // Who does it again is answered the same position.
        if step.words[0] == word && option(&step.words, "REQUEST").unwrap_or_default() == requests[&at] {
            let other = events.entry(at).or_insert(Some(i));
            assert!(other.is_some(), "{step:?}: an expiry is nobody's command");
        }
    }
    assert!(tampered.next().is_none(), "every change by hand was repaired once");
    let strangers: Vec<_> = requests.iter().filter(|(at, _)| !events.contains_key(at)).collect();
    let strangers: Vec<_> = strangers
        .iter()
        .map(|(at, id)| (at, id, &kinds[at], steps.iter().find(|step| option(&step.words, "REQUEST") == Some(id))))
        .collect();
    assert!(strangers.is_empty(), "in the ledger, and nobody was answered so: {strangers:?}");
    assert!(expired.len() > 100 || steps.len() < 10_000, "{} orders expired", expired.len());

    // Between which places each round lies.
    let rounds = steps.last().unwrap().round + 1;
    let (mut highest, mut lowest) = (vec![(0, 0); rounds + 1], vec![(u64::MAX, 0); rounds + 1]);
    for (at, i) in &events {
        if let Some(i) = i {
            let round = steps[*i].round;
            highest[round + 1] = highest[round + 1].max(*at);
            lowest[round] = lowest[round].min(*at);
        }
    }
    for round in 0..rounds {
        highest[round + 1] = highest[round + 1].max(highest[round]);
    }
    for round in (0..rounds).rev() {
        lowest[round] = lowest[round].min(lowest[round + 1]);
    }
    let mut model = Model::default();
    let (mut histories, mut waiting): (Vec<usize>, Vec<usize>) = (0..steps.len())
        .rev()
        .filter(|i| steps[*i].position().is_none_or(|(at, _)| events[&at] != Some(*i)))
        .partition(|i| steps[*i].words[0] == "HISTORY");
    // A SYNC that repairs something says what was before that.
    waiting.retain(|i| steps[*i].tampered == 0);
    let mut open: Vec<usize> = Vec::new();
    let mut places = std::iter::once((0, 0)).chain(events.keys().copied()).peekable();
    let mut refusals = 0;
    while let Some(at) = places.next() {
        match events.get(&at) {
            None => {}
            Some(None) => {
                if let Some(id) = expired.get(&at) {
                    assert_eq!(model.orders[id].state, "held", "{id} expired at {at:?}");
                    model.expire(id, at);
                } else {
                    let step = repaired[&at];
                    assert_eq!(step.reply, model.tampered(&step.words[1], step.tampered));
                    model.repair(&step.words[1], step.tampered, at);
                }
            }
            Some(Some(i)) => {
                let step = &steps[*i];
                let reply = step.position().unwrap().1;
                let said = [step.from_ms, step.to_ms].map(|now| model.answer(&step.words, now, named(&step.reply)));
                assert!(said.contains(&Answer::Accepted(reply)), "{step:?}: the model says {said:?}");
                model.accept(&step.words, at, named(&step.reply));
            }
        }
        // What waits for a state, from the first that its round may have seen.
        while waiting.last().is_some_and(|i| highest[steps[*i].round] <= at) {
            open.extend(waiting.pop());
        }
        open.retain(|i| {
            let step = &steps[*i];
            let is_scan = step.words[0] == "SCAN";
            let said =
                if is_scan { Vec::new() } else { [step.from_ms, step.to_ms].map(|now| model.answer(&step.words, now, None)).to_vec() };
            let is_it = (is_scan && model.has(&step.reply))
                || said.iter().any(|answer| match answer {
                    Answer::Refused(text) => step.said().0 == text && step.said().1.is_none_or(|read| read == at),
                    Answer::Again(text, at) => step.position() == Some((*at, text.clone())),
                    Answer::Accepted(_) => false,
                });
            refusals += usize::from(is_it);
            let is_over = places.peek().is_none_or(|next| *next >= lowest[step.round + 1]);
            assert!(is_it || !is_over, "{step:?}: the model says {said:?} at {at:?}");
            !is_it
        });
    }
    assert!(open.is_empty() && waiting.is_empty());
    assert!(refusals > steps.len() / 10, "{refusals} of {} were refusals or reads", steps.len());
    let frozen = steps.iter().filter(|step| step.reply.starts_with(FROZEN)).count();
    assert!(
        (frozen > 10 && repaired.len() > 5) || steps.len() < 20_000,
        "{frozen} found a product frozen, {} were repaired",
        repaired.len()
    );

    // What a reply that waited for Postgres has said is to be told from then on.
    let mut in_postgres: BTreeMap<Place, usize> = BTreeMap::new();
    for (at, i) in &events {
        let step = i.map(|i| &steps[i]);
        if let Some(step) = step.filter(|step| AWAITED.contains(&step.words[0].as_str()) && option(&step.words, "ACK").is_none()) {
            in_postgres.insert(*at, step.round);
        }
    }
    assert!(histories.len() > steps.len() / 200 || steps.len() < 20_000, "{} of {}", histories.len(), steps.len());
    while let Some(i) = histories.pop() {
        let step = &steps[i];
        let past = model.past.get(&step.words[1]).map(Vec::as_slice).unwrap_or_default();
        check_history(step, past, lowest[step.round + 1], |at| in_postgres.get(&at).is_some_and(|round| *round < step.round));
    }

    let mut client = stack.connect();
    assert_eq!(client.scan("STOCK"), model.units);
    for product in PRODUCTS {
        let (units, held) = (model.units.get(product), model.held.get(product).copied().unwrap_or_default());
        assert_eq!(client.ask(&format!("STOCK.GET {product}")), units.map_or_else(|| "nil".into(), i64::to_string));
        let numbers = [units.copied(), Some(held), model.low.get(product).copied()].into_iter().flatten();
        // Orders may hold units of what was deleted.
        let row = format!(
            "SELECT concat_ws(' ', CASE WHEN deleted_at IS NULL THEN available END, held, low) FROM holdfast.stock \
             WHERE product_id = '{product}' UNION ALL SELECT '0' LIMIT 1"
        );
        assert_eq!(stack.postgres.value(&row), numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(" "), "{product}");
        let in_redis = stack.backing().ask(&format!("HGET stock:held {product}"));
        assert_eq!(in_redis, if held == 0 { "nil".into() } else { held.to_string() }, "{product}");
    }
    for product in PRODUCTS {
        let past = model.past.get(product).map(Vec::as_slice).unwrap_or_default();
        let mut words = ["HISTORY", product, "COUNT", "1000", "BEFORE", "4000000000-1"].map(str::to_owned).to_vec();
        loop {
            let (from_ms, reply) = (now_ms(), client.ask_words(&sent(&words)));
            let step = Step { round: rounds, words: words.clone(), reply, from_ms, to_ms: now_ms(), tampered: 0 };
            check_history(&step, past, (u64::MAX, 0), |_| true);
            let Some((_, oldest)) = step.reply.rsplit_once("[position, ") else { break };
            words[5] = oldest.split(',').next().unwrap().to_owned();
        }
    }
    let frozen: Vec<String> = model.frozen.iter().cloned().collect();
    assert_eq!(stack.postgres.column("SELECT product_id FROM holdfast.stock WHERE frozen IS NOT NULL ORDER BY 1"), frozen);
    assert_eq!(stack.backing().ask("HLEN stock:frozen"), frozen.len().to_string());
    let states: HashMap<String, String> = stack
        .postgres
        .column("SELECT order_id || ' ' || state FROM holdfast.stock_order")
        .iter()
        .map(|row| row.split_once(' ').map(|(order, state)| (order.to_owned(), state.to_owned())).unwrap())
        .collect();
    assert_eq!(states.len(), model.orders.len());
    let differ: Vec<_> = model.orders.iter().filter(|(id, order)| states[*id] != order.state).collect();
    assert!(differ.is_empty(), "{differ:?}");
}
