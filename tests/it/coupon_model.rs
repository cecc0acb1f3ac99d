//! Every COUPON command in random sequences, against a plain model: each reply, and what Redis and Postgres hold in the end.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::harness::{Client, Stack, now_ms, scanned, seed};

/// Between what is long past and what is far away, in Unix ms.
const NOW: i64 = 1_900_000_000_000;

/// So many commands later other coupons come into play: some of them are deleted early.
const COUPONS_CHANGE_AFTER: u64 = 60;
const USERS: [&str; 4] = ["ann", "bob", "cid", "dan"];

/// The same numbers for the same seed.
struct Random {
    state: u64,
    commands: u64,
    /// In Unix ms; where it is given, coupons begin and end about then.
    now: Option<i64>,
}

impl Random {
    fn new(seed: u64) -> Self {
        Self { state: seed, commands: 0, now: None }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % bound
    }

    fn of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[usize::try_from(self.below(all.len() as u64)).unwrap()]
    }

    /// When a coupon begins or ends soon.
    fn soon(&mut self) -> Option<String> {
        let now = self.now.filter(|_| self.below(2) == 0)?;
        let mut time = || now + i64::try_from(self.below(40)).unwrap();
        let (start, end) = (time(), time());
        Some(match self.below(3) {
            0 => format!(" START {start}"),
            1 => format!(" END {end}"),
            _ => format!(" START {start} END {}", start + 1 + (end - now)),
        })
    }

    /// A random command.
    fn command(&mut self) -> String {
        self.commands += 1;
        let coupon = format!("c-{}", self.commands / COUPONS_CHANGE_AFTER * 2 + self.below(3));
        let user = self.of(&USERS);
        let serial = if self.below(3) == 0 { format!(" SERIAL {}", 1 + self.below(12)) } else { String::new() };
        match self.below(40) {
            0..4 => {
                let time = self.of(&["", " START 1000", " END 32503680000000", " START 32503680000000"]).to_owned();
                let time = self.soon().unwrap_or(time);
                let per_user = if self.below(4) == 0 { String::new() } else { format!(" PERUSER {}", 1 + self.below(3)) };
                format!("COUPON.CREATE {coupon} {}{per_user}{time}", 1 + self.below(12))
            }
            4..6 => {
                let time = self.of(&["", " END 0 START 0", " END 1000", " START 32503680000000", " END 0", " END 32503680000000"]);
                let time = self.soon().unwrap_or_else(|| time.to_owned());
                let total = if time.is_empty() || self.below(2) == 0 { format!(" TOTAL {}", 1 + self.below(15)) } else { String::new() };
                format!("COUPON.ALTER {coupon}{total}{time}")
            }
            6 if self.below(4) == 0 => format!("COUPON.DEL {coupon}"),
            6..17 => format!("COUPON.ISSUE {coupon} {user}"),
            17..24 => {
                let order = if self.below(2) == 0 { format!(" ORDER o-{}", self.below(9)) } else { String::new() };
                format!("COUPON.USE {coupon} {user}{serial}{order}")
            }
            24..29 => format!("COUPON.UNUSE {coupon} {user}{serial}"),
            29..35 => format!("COUPON.REVOKE {coupon} {user}{serial}"),
            35..38 => format!("COUPON.GET {coupon} {user}"),
            _ => format!("COUPON.INFO {coupon}"),
        }
    }
}

fn is_read(command: &str) -> bool {
    command.starts_with("COUPON.GET") || command.starts_with("COUPON.INFO")
}

#[derive(Clone, Debug, Default)]
struct Coupon {
    total: i64,
    per_user: usize,
    start: i64,
    end: i64,
    serial: i64,
    deleted: bool,
    /// By serial: the user, whether it was used, and for which order.
    held: BTreeMap<i64, (String, bool, Option<String>)>,
}

impl Coupon {
    fn issued(&self) -> i64 {
        i64::try_from(self.held.len()).unwrap()
    }

    fn remaining(&self) -> i64 {
        (self.total - self.issued()).max(0)
    }

    fn has_ended(&self, now: i64) -> bool {
        self.end > 0 && self.end <= now
    }

    fn state(&self, now: i64) -> &'static str {
        match self {
            _ if self.deleted => "deleted",
            _ if self.start > now => "notstarted",
            _ if self.has_ended(now) => "ended",
            _ if self.remaining() == 0 => "soldout",
            _ => "open",
        }
    }

    /// The user's serials, and whether each was used; only the one asked for, where one is.
    fn of(&self, user: &str, serial: Option<i64>) -> Vec<(i64, bool)> {
        let theirs = self.held.iter().filter(|(number, (holder, ..))| holder == user && serial.is_none_or(|serial| serial == **number));
        theirs.map(|(number, (_, used, _))| (*number, *used)).collect()
    }
}

#[derive(Clone, Debug, Default)]
struct Model {
    coupons: BTreeMap<String, Coupon>,
}

/// What a command comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expected {
    /// Accepted: the reply without its position.
    Done(String),
    /// The whole reply.
    Said(String),
}

impl Model {
    fn apply(&mut self, command: &str) -> Expected {
        self.apply_at(command, NOW)
    }

    fn apply_at(&mut self, command: &str, now: i64) -> Expected {
        let words: Vec<&str> = command.split(' ').collect();
        let (name, id) = (words[0], words[1]);
        let option = |name: &str| words.iter().position(|word| *word == name).map(|at| words[at + 1]);
        let number = |name: &str| option(name).map(|text| text.parse::<i64>().unwrap());
        let said = |text: String| Expected::Said(text);
        let missing = || said(format!("-NOTFOUND no coupon '{id}'"));
        if name == "COUPON.CREATE" {
            if self.coupons.contains_key(id) {
                return said("[EXISTS]".into());
            }
            let coupon = Coupon {
                total: words[2].parse().unwrap(),
                per_user: usize::try_from(number("PERUSER").unwrap_or(1)).unwrap(),
                start: number("START").unwrap_or(0),
                end: number("END").unwrap_or(0),
                ..Coupon::default()
            };
            self.coupons.insert(id.into(), coupon);
            return Expected::Done("[OK".into());
        }
        if name == "COUPON.INFO" {
            let time = |ms: i64| if ms == 0 { "nil".to_owned() } else { ms.to_string() };
            let shown = self.coupons.get(id).map(|coupon| {
                let used = coupon.held.values().filter(|(_, used, _)| *used).count();
                format!(
                    "[coupon, {id}, total, {}, issued, {}, used, {used}, remaining, {}, peruser, {}, start, {}, end, {}, state, {}",
                    coupon.total,
                    coupon.issued(),
                    coupon.remaining(),
                    coupon.per_user,
                    time(coupon.start),
                    time(coupon.end),
                    coupon.state(now)
                )
            });
            return said(shown.unwrap_or_else(|| "nil".into()));
        }
        let found = self.coupons.get_mut(id).filter(|coupon| !coupon.deleted);
        let Some(coupon) = found else {
            return match name {
                "COUPON.DEL" => said("[NOTFOUND]".into()),
                "COUPON.GET" => said("[]".into()),
                _ => missing(),
            };
        };
        if name == "COUPON.DEL" {
            coupon.deleted = true;
            return Expected::Done("[OK".into());
        }
        if name == "COUPON.ALTER" {
            let (total, start, end) = (number("TOTAL"), number("START").unwrap_or(coupon.start), number("END").unwrap_or(coupon.end));
            if total.is_some_and(|total| total < coupon.issued()) {
                return said(format!("-ERR invalid total: {} of them are issued already", coupon.issued()));
            }
            if (option("START").is_some() || option("END").is_some()) && end > 0 && end <= start {
                return said("-ERR invalid end: it must be after the start".into());
            }
            (coupon.total, coupon.start, coupon.end) = (total.unwrap_or(coupon.total), start, end);
            return Expected::Done("[OK".into());
        }
        let (user, serial, ended) = (words[2], number("SERIAL"), coupon.has_ended(now));
        let theirs = coupon.of(user, serial);
        let unused = || theirs.iter().filter(|(_, used)| !used).map(|(serial, _)| *serial);
        let used = || theirs.iter().filter(|(_, used)| *used).map(|(serial, _)| *serial);
        match name {
            "COUPON.GET" => {
                let one = |(serial, used): &(i64, bool)| {
                    let order = coupon.held[serial].2.clone().unwrap_or_else(|| "nil".into());
                    format!("[serial, {serial}, state, {}, order, {order}]", if *used { "used" } else { "issued" })
                };
                said(format!("[{}]", theirs.iter().map(one).collect::<Vec<_>>().join(", ")))
            }
            "COUPON.ISSUE" if coupon.start > now => said(format!("[NOTSTARTED, {}]", coupon.start)),
            "COUPON.ISSUE" if ended => said(format!("[ENDED, {}]", coupon.end)),
            "COUPON.ISSUE" if theirs.len() >= coupon.per_user => said(format!("[ALREADY, {}]", theirs[theirs.len() - 1].0)),
            "COUPON.ISSUE" if coupon.remaining() == 0 => said("[SOLDOUT]".into()),
            "COUPON.ISSUE" => {
                coupon.serial += 1;
                coupon.held.insert(coupon.serial, (user.into(), false, None));
                Expected::Done(format!("[ISSUED, {}, {}", coupon.serial, coupon.remaining()))
            }
            "COUPON.USE" => match (unused().next(), used().next_back()) {
                (Some(_), _) if ended => said(format!("[ENDED, {}]", coupon.end)),
                (Some(serial), _) => {
                    coupon.held.insert(serial, (user.into(), true, option("ORDER").map(String::from)));
                    Expected::Done(format!("[USED, {serial}"))
                }
                (None, Some(serial)) => said(format!("[ALREADY, {serial}]")),
                (None, None) => said("[NOTISSUED]".into()),
            },
            "COUPON.UNUSE" => match (used().next_back(), unused().next()) {
                (Some(serial), _) => {
                    coupon.held.insert(serial, (user.into(), false, None));
                    Expected::Done(format!("[ISSUED, {serial}"))
                }
                (None, Some(_)) => said("[NOTUSED]".into()),
                (None, None) => said("[NOTISSUED]".into()),
            },
            "COUPON.REVOKE" => match (unused().next_back(), used().next_back()) {
                (Some(serial), _) => {
                    coupon.held.remove(&serial);
                    Expected::Done(format!("[REVOKED, {serial}, {}", coupon.remaining()))
                }
                (None, Some(serial)) => said(format!("[USED, {serial}]")),
                (None, None) => said("[NOTISSUED]".into()),
            },
            other => panic!("{other}"),
        }
    }
}

impl Model {
    /// What a scan finds.
    fn scanned(&self) -> BTreeMap<String, i64> {
        let there = self.coupons.iter().filter(|(_, coupon)| !coupon.deleted);
        there.map(|(id, coupon)| (id.clone(), coupon.remaining())).collect()
    }

    /// What a command comes to at the times of a round at which that may differ, with the coupon as it is then.
    fn outcomes(&self, command: &str, (from, to): (i64, i64)) -> Vec<(Expected, Option<Coupon>)> {
        let id = command.split(' ').nth(1).unwrap();
        let coupon = self.coupons.get(id);
        let turns = coupon.map_or([from, to], |coupon| [coupon.start.clamp(from, to), coupon.end.clamp(from, to)]);
        let outcome = |now| {
            let mut alone = Self { coupons: coupon.map(|coupon| (id.to_owned(), coupon.clone())).into_iter().collect() };
            let expected = alone.apply_at(command, now);
            (expected, alone.coupons.remove(id))
        };
        [from, turns[0], turns[1], to].map(outcome).into()
    }

    /// Whether that is its reply to a command that changes nothing in this round.
    fn would_say(&self, command: &str, reply: &str, round: (i64, i64)) -> bool {
        if let Some(coupon) = command.strip_prefix("COUPON.SCAN ") {
            return self.coupons.get(coupon).is_some_and(|coupon| !coupon.deleted && coupon.remaining().to_string() == reply);
        }
        self.outcomes(command, round).iter().any(|(expected, _)| *expected == Expected::Said(reply.to_owned()))
    }
}

/// A GET's reply without the times, an INFO's without where it was read.
fn without_times(reply: &str) -> String {
    let reply = reply.split(", lock, ").next().unwrap();
    let mut parts = reply.split(", issued_at_ms, ");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |all, part| all + &part[part.find(',').unwrap()..])
}

/// The reply of an accepted change without its position, and the position's n.
fn accepted(reply: &str) -> Option<(String, u64)> {
    let (rest, position) = reply.strip_suffix(']')?.rsplit_once(", ")?;
    let n = position.strip_prefix("1-")?.parse().ok()?;
    Some((rest.to_owned(), n))
}

/// What both sides hold of each coupon is what the model says.
fn both_sides_are_as(model: &Model, stack: &Stack) {
    stack.wait_until_applied();
    let mut client = stack.connect();
    assert_eq!(client.scan("COUPON"), model.scanned());
    for (id, coupon) in &model.coupons {
        let used = coupon.held.values().filter(|(_, used, _)| *used).count();
        let expected = format!("{} {} {used} {}", coupon.total, coupon.issued(), coupon.serial);
        let row = format!("SELECT concat_ws(' ', total, issued, used, last_serial) FROM holdfast.coupon WHERE coupon_id = '{id}'");
        assert_eq!(stack.postgres.value(&row), expected, "{id}");
        let mut field = |name| client.field(&format!("COUPON.INFO {id}"), name);
        assert_eq!(
            (field("total"), field("issued"), field("used")),
            (coupon.total.to_string(), coupon.issued().to_string(), used.to_string())
        );
        assert_eq!(field("state") == "deleted", coupon.deleted);
        let rows = format!(
            "SELECT concat_ws(' ', serial, user_id, state, order_id) FROM holdfast.coupon_issue \
             WHERE coupon_id = '{id}' AND state <> 'revoked' ORDER BY serial"
        );
        let held = coupon.held.iter().map(|(serial, (user, used, order))| {
            let (state, order) =
                (if *used { "used" } else { "issued" }, order.as_ref().map_or_else(String::new, |order| format!(" {order}")));
            format!("{serial} {user} {state}{order}")
        });
        assert_eq!(stack.postgres.column(&rows), held.collect::<Vec<_>>(), "{id}");
    }
    let sums = "SELECT count(*) FROM holdfast.coupon c JOIN (SELECT coupon_id, sum(total_delta) AS total, sum(issued_delta) AS issued, \
                sum(used_delta) AS used FROM holdfast.coupon_ledger GROUP BY coupon_id) l USING (coupon_id) \
                WHERE c.total <> l.total OR c.issued <> l.issued OR c.used <> l.used";
    assert_eq!(stack.postgres.value(sums), "0", "the ledger explains every number");
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter"), "0");
}

#[test]
fn every_reply_in_a_random_sequence_is_the_models() {
    let stack = Stack::start();
    let mut clients: Vec<Client> = (0..4).map(|_| stack.connect()).collect();
    let (mut model, mut random) = (Model::default(), Random::new(0x9e37_79b9_7f4a_7c15));
    // By REQUEST: the command, and the reply of its first execution.
    let mut requests: Vec<(String, Option<String>)> = Vec::new();
    for step in 0..4_000_u32 {
        let at = usize::try_from(random.below(4)).unwrap();
        if !requests.is_empty() && random.below(5) == 0 {
            let number = usize::try_from(random.below(requests.len() as u64)).unwrap();
            let (command, first) = requests[number].clone();
            let reply = clients[at].ask(&format!("{command} ACK redis REQUEST r-{number}"));
            match first {
                Some(first) => assert_eq!(reply, first, "step {step}: {command} again"),
                // A refusal is decided afresh.
                None => check(&mut model, &command, &reply, step, Some(&mut requests[number].1)),
            }
            continue;
        }
        let command = random.command();
        if step % 500 == 0 {
            assert_eq!(clients[at].scan("COUPON"), model.scanned(), "step {step}");
        }
        if is_read(&command) || random.below(2) == 0 {
            let options = if is_read(&command) { "" } else { " ACK redis" };
            let reply = clients[at].ask(&format!("{command}{options}"));
            check(&mut model, &command, &reply, step, None);
        } else {
            let reply = clients[at].ask(&format!("{command} ACK redis REQUEST r-{}", requests.len()));
            let mut first = None;
            check(&mut model, &command, &reply, step, Some(&mut first));
            requests.push((command, first));
        }
    }
    assert!(requests.iter().filter(|(_, first)| first.is_some()).count() > 300);
    both_sides_are_as(&model, &stack);
}

fn check(model: &mut Model, command: &str, reply: &str, step: u32, first: Option<&mut Option<String>>) {
    match model.apply(command) {
        Expected::Said(expected) => assert_eq!(without_times(reply), expected, "step {step}: {command}"),
        Expected::Done(expected) => {
            let (said, _) = accepted(reply).unwrap_or_else(|| panic!("step {step}: {command}: {reply}, expected {expected}"));
            assert_eq!(said, expected, "step {step}: {command}");
            if let Some(first) = first {
                *first = Some(reply.to_owned());
            }
        }
    }
}

#[test]
fn what_many_clients_were_told_at_once_is_one_history_of_the_model() {
    let stack = Stack::start();
    let told: HashMap<u64, (String, String)> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8_u64)
            .map(|number| {
                let mut client = stack.connect();
                scope.spawn(move || {
                    let mut random = Random::new(0x1234_5678_9abc_def0 + number);
                    let mut told = Vec::new();
                    for i in 0..600 {
                        let command = random.command();
                        if is_read(&command) {
                            continue;
                        }
                        let whole = format!("{command} ACK redis REQUEST c-{number}-{i}");
                        let reply = client.ask(&whole);
                        if let Some((said, n)) = accepted(&reply) {
                            assert_eq!(client.ask(&whole), reply, "{whole}");
                            told.push((n, (command, said)));
                        }
                    }
                    told
                })
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    let mut model = Model::default();
    for n in 1..=told.len() as u64 {
        let (command, said) = told.get(&n).unwrap_or_else(|| panic!("nobody was told of change {n}"));
        assert_eq!(model.apply(command), Expected::Done(said.clone()), "change {n}: {command}");
    }
    assert!(told.len() > 200, "{}", told.len());
    both_sides_are_as(&model, &stack);
}

/// How many commands; `HOLDFAST_TEST_STEPS` says otherwise.
fn steps() -> usize {
    std::env::var("HOLDFAST_TEST_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(100_000)
}

/// Of so many rounds one loses its sidecar.
const KILL_EVERY: usize = 400;

/// The reply without its position, and the position as epoch and n.
fn placed(reply: &str) -> Option<((u64, u64), String)> {
    let (rest, position) = reply.strip_suffix(']')?.rsplit_once(", ")?;
    let (epoch, n) = position.split_once('-')?;
    Some(((epoch.parse().ok()?, n.parse().ok()?), rest.to_owned()))
}

/// Eight clients send a command each and wait for all replies: a round. What was accepted has a position: in that order the model has to
/// say the same, at some time of its round. A refusal or a read has to be what it says at some point of its round. Coupons begin and end in
/// between.
#[test]
fn every_reply_of_clients_at_once_is_the_models_though_sidecars_are_killed() {
    let mut stack = Stack::start();
    let mut clients: Vec<Client> = (0..8).map(|_| stack.connect()).collect();
    let (mut model, mut random) = (Model::default(), Random::new(seed(0x0dd0_5eed_cafe_f00d)));
    let mut answered: HashMap<String, String> = HashMap::new();
    let (mut named, mut at, mut kills) = (Vec::<String>::new(), (0, 0), 0);
    for round in 0..steps() / clients.len() {
        let dies = round % KILL_EVERY == KILL_EVERY - 1;
        let mut batch: Vec<String> = Vec::new();
        let from = now_ms();
        random.now = Some(from);
        for _ in &clients {
            let command = random.command();
            batch.push(match random.below(12) {
                _ if random.below(200) == 0 => "COUPON.SCAN 0 COUNT 1000".to_owned(),
                0 if !named.is_empty() => named[usize::try_from(random.below(named.len() as u64)).unwrap()].clone(),
                _ if is_read(&command) => command,
                chance if dies || chance < 6 => format!("{command} ACK redis REQUEST m-{round}-{}", batch.len()),
                _ if random.below(60) == 0 => command,
                _ => format!("{command} ACK redis"),
            });
        }
        let is_scanned = batch.iter().any(|command| command.starts_with("COUPON.SCAN"));
        let before = if is_scanned { model.scanned() } else { BTreeMap::new() };
        for (client, command) in clients.iter_mut().zip(&batch) {
            client.send(&command.split(' ').collect::<Vec<_>>());
        }
        if dies {
            kills += 1;
            stack.sidecar.kill();
            stack.restart_sidecar();
        }
        let mut replies: Vec<String> = clients.iter_mut().map(Client::receive).collect();
        if dies {
            clients = (0..8).map(|_| stack.connect()).collect();
            for ((client, command), reply) in clients.iter_mut().zip(&batch).zip(&mut replies) {
                if reply.starts_with('-') && !reply.starts_with("-NOTFOUND") && !reply.starts_with("-ERR invalid") {
                    *reply = client.ask(command);
                }
            }
        }
        let times = (from, now_ms());
        let mut accepted = BTreeMap::new();
        let (mut others, mut scans): (Vec<(String, String)>, Vec<BTreeSet<String>>) = (Vec::new(), Vec::new());
        for (command, reply) in batch.iter().zip(&replies) {
            if command.starts_with("COUPON.SCAN") {
                let (cursor, found) = scanned(reply).unwrap_or_else(|| panic!("{reply}"));
                others.extend(found.iter().map(|(coupon, remaining)| (format!("COUPON.SCAN {coupon}"), remaining.to_string())));
                scans.extend((cursor == "0").then(|| found.into_iter().map(|(coupon, _)| coupon).collect()));
                continue;
            }
            let (plain, request) = match command.split_once(" ACK redis") {
                Some((plain, request)) => (plain, request.strip_prefix(" REQUEST ")),
                None => (command.as_str(), None),
            };
            let Some((place, said)) = placed(reply).filter(|_| !is_read(plain)) else {
                others.push((plain.to_owned(), without_times(reply)));
                continue;
            };
            if let Some(request) = request {
                if let Some(first) = answered.get(request) {
                    assert_eq!(reply, first, "the same REQUEST, the same reply: {command}");
                    continue;
                }
                answered.insert(request.to_owned(), reply.clone());
                if named.len() < 64 {
                    named.push(command.clone());
                } else {
                    named[usize::try_from(random.below(64)).unwrap()].clone_from(command);
                }
            }
            assert!(accepted.insert(place, (plain, said)).is_none(), "two changes at {place:?}");
        }
        for (place, (command, said)) in accepted {
            assert!(place > at, "round {round}: {command} at {place:?} after {at:?}");
            assert!(place.0 > at.0 || place.1 == at.1 + 1, "round {round}: nobody was told of what is between {at:?} and {place:?}");
            others.retain(|(other, reply)| !model.would_say(other, reply, times));
            let outcomes = model.outcomes(command, times);
            let said = Expected::Done(said);
            let Some((_, coupon)) = outcomes.iter().find(|(expected, _)| *expected == said) else {
                panic!("round {round}, {place:?}: {command}: {said:?}, expected one of {outcomes:?}");
            };
            model.coupons.extend(coupon.clone().map(|coupon| (command.split(' ').nth(1).unwrap().to_owned(), coupon)));
            at = place;
        }
        others.retain(|(other, reply)| !model.would_say(other, reply, times));
        assert!(others.is_empty(), "round {round}: at no point of it {others:?}");
        let after = if scans.is_empty() { BTreeMap::new() } else { model.scanned() };
        for found in scans {
            let all = before.keys().filter(|coupon| after.contains_key(*coupon));
            all.for_each(|coupon| assert!(found.contains(coupon), "round {round}: {coupon} was there all the time, and is not found"));
        }
    }
    println!("{} changes, {} coupons, {kills} kills", at.1, model.coupons.len());
    both_sides_are_as(&model, &stack);
}
