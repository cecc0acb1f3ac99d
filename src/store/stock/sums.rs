//! Operations that are decided by their sum: each takes, gives or reads units of products that nothing else in its batch decides about.
//!
//! The script compares once a product (lua/include/sums.lua), and returns what was available before; from that every reply is worked out
//! here, by the rule that the script goes by. A product that is also part of an operation over several products, or of any other kind, is
//! left to the script with all its operations, so the two sections of a batch touch nothing in common and may be decided one after the
//! other. Those with a REQUEST are summed, too, since hardly any is known: where one is, the script does nothing, and all of the batch that
//! have one are left to it.
//!
//! In the outbox each has a line of its own, in the order of arrival; or each product has one ([`Grain::Batch`]), in the order of the
//! products, and positions follow that.

use std::collections::{HashMap, HashSet};
use std::io::Write as _;

use super::{Action, StockOp, StockOutcome};
use crate::domain::change::StockKind;
use crate::domain::quantity::TOTAL_MAX;
use crate::domain::{Grain, Id, Runs};
use crate::store::Error;
use crate::store::lane::Positions;
use crate::store::pack::Pack;
use crate::store::requests::{Request, RequestKeys};
use crate::store::words::Words;

/// How often reads of several products are looked at again, since one of them was left to the script. Each time at least one more is;
/// after that all are.
const PASSES_MAX: usize = 3;

/// How the products and the operations of a batch are divided.
pub struct Plan {
    /// For each operation that is summed the places of its products among the summed ones, from 0, in order.
    places: Vec<u32>,
    /// For each operation whether it is summed.
    summed: Vec<bool>,
    /// How many products are summed.
    products: usize,
    grain: Grain,
}

/// A batch's products, each once, and where each stands.
pub(super) struct Divided<'a> {
    pub plan: Plan,
    /// The summed products: first those that change, then those that are only read.
    pub summed: Vec<&'a Id>,
    /// Those that the script decides about one by one.
    pub decided: Vec<&'a Id>,
    /// For each item of each operation that is not summed, in order, its product's place among the decided ones, from 0.
    pub decided_places: Vec<u32>,
}

#[derive(Default)]
struct Product {
    decided: bool,
    place: Option<u32>,
}

/// The one product of an operation that can be summed, and by how much it moves.
fn summand(op: &StockOp) -> Option<(&Id, i64)> {
    match (op.action, op.items.as_slice()) {
        _ if op.upkeep.is_some() || op.order.is_some() => None,
        (Action::Change(StockKind::Decr), [(id, quantity)]) => Some((id, -quantity)),
        (Action::Change(StockKind::Incr), [(id, quantity)]) => Some((id, *quantity)),
        _ => None,
    }
}

/// The same where the operation has no identity of its own.
pub(super) fn part(op: &StockOp) -> Option<(&Id, i64)> {
    summand(op).filter(|_| op.request.is_none())
}

impl Plan {
    /// Divides a batch.
    pub(super) fn divide<'a>(ops: impl Iterator<Item = &'a StockOp> + Clone, grain: Grain) -> Divided<'a> {
        let mut indices: HashMap<&[u8], usize, foldhash::fast::RandomState> = HashMap::default();
        let (mut products, mut ids): (Vec<Product>, Vec<&Id>) = (Vec::new(), Vec::new());
        let (mut items, mut summed) = (Vec::new(), Vec::new());
        // Which products an order gives units back to is found out by the script, after the sums. What came later gets them, too.
        let mut may_have_risen = false;
        // What comes again in the same batch is known by then.
        let mut requests: HashSet<&[u8], foldhash::fast::RandomState> = HashSet::default();
        // A line for all of a batch has no place for a REQUEST. And where some had to be left to the script, it is not asked about others together:
        // one of them that is known would send all of them round once more.
        let is_alone = |op: &StockOp| op.request.as_ref().is_some_and(|request| request.alone);
        let may_look_up = grain == Grain::Operation && !ops.clone().any(is_alone);
        let (mut is_any_decided, mut is_any_read) = (false, false);
        let mut before: Option<(&Id, usize)> = None;
        for op in ops.clone() {
            let first = items.len();
            for (id, _) in &op.items {
                // Mostly it is the same once more.
                if let Some((known, index)) = before
                    && known == id
                {
                    items.push(index);
                    continue;
                }
                items.push(*indices.entry(id.as_bytes()).or_insert_with(|| {
                    products.push(Product::default());
                    ids.push(id);
                    ids.len() - 1
                }));
                before = items.last().map(|index| (id, *index));
            }
            let comes_again = op.request.as_ref().is_some_and(|request| !requests.insert(request.id.as_bytes()));
            let is_change = summand(op).is_some() && (op.request.is_none() || (may_look_up && !comes_again));
            let may_be_summed = !may_have_risen && (op.action == Action::Read || is_change);
            may_have_risen |= op.may_add_any_units();
            summed.push(may_be_summed);
            is_any_read |= op.action == Action::Read;
            if !may_be_summed {
                is_any_decided = true;
                items[first..].iter().for_each(|item| products[*item].decided = true);
            }
        }
        if !is_any_decided && !is_any_read {
            // In the order of first mention already.
            let places = items.into_iter().map(|index| u32::try_from(index).unwrap_or(u32::MAX)).collect();
            let plan = Plan { places, summed, products: ids.len(), grain };
            return Divided { plan, summed: ids, decided: Vec::new(), decided_places: Vec::new() };
        }
        leave_reads(ops.clone(), &items, &mut products);
        let mut divided = Divided {
            plan: Plan { places: Vec::with_capacity(items.len()), summed, products: 0, grain },
            summed: Vec::with_capacity(ids.len()),
            decided: Vec::new(),
            decided_places: Vec::new(),
        };
        // Those that change come first, in the order of first mention.
        let mut rest = items.as_slice();
        for op in ops.clone() {
            let (own, after) = rest.split_at(op.items.len());
            rest = after;
            if let [item] = own
                && op.action != Action::Read
                && !products[*item].decided
            {
                place(&mut products[*item], ids[*item], &mut divided.summed);
            }
        }
        let mut rest = items.as_slice();
        for (k, op) in ops.enumerate() {
            let (own, after) = rest.split_at(op.items.len());
            rest = after;
            let is_summed = divided.plan.summed[k] && own.iter().all(|item| !products[*item].decided);
            divided.plan.summed[k] = is_summed;
            let (known, places) = match is_summed {
                true => (&mut divided.summed, &mut divided.plan.places),
                false => (&mut divided.decided, &mut divided.decided_places),
            };
            places.extend(own.iter().map(|item| place(&mut products[*item], ids[*item], known)));
        }
        divided.plan.products = divided.summed.len();
        divided
    }

    /// Whether the operation at place k of the batch is summed.
    pub(super) fn is_summed(&self, k: usize) -> bool {
        self.summed[k]
    }
}

/// Leaves reads of several products to the script where one of the products is, and with them all their products.
fn leave_reads<'a>(ops: impl Iterator<Item = &'a StockOp> + Clone, items: &[usize], products: &mut [Product]) {
    for pass in 0..=PASSES_MAX {
        let (mut rest, mut any) = (items, false);
        for op in ops.clone() {
            let (own, after) = rest.split_at(op.items.len());
            rest = after;
            let is_left = |item: &usize| products[*item].decided;
            if own.len() > 1 && !own.iter().all(is_left) && (pass == PASSES_MAX || own.iter().any(is_left)) {
                own.iter().for_each(|item| products[*item].decided = true);
                any = true;
            }
        }
        if !any {
            return;
        }
    }
}

fn place<'a>(product: &mut Product, id: &'a Id, known: &mut Vec<&'a Id>) -> u32 {
    *product.place.get_or_insert_with(|| {
        known.push(id);
        u32::try_from(known.len() - 1).unwrap_or(u32::MAX)
    })
}

/// The units that are wanted and given of one product.
#[derive(Clone, Default)]
struct Sum {
    down: i64,
    up: i64,
    least: Option<i64>,
    /// With [`Grain::Batch`]: by which operations.
    runs: Runs,
}

impl Sum {
    /// Writes the one line of the product.
    fn write_to(&self, text: &mut Vec<u8>, id: &Id) {
        let kind = match (self.down, self.up) {
            (_, 0) => StockKind::Decr,
            (0, _) => StockKind::Incr,
            _ => StockKind::Mixed,
        };
        // Writing into memory cannot fail.
        let _ = write!(text, "{} {}", self.runs.first(), kind.as_str());
        if self.runs.count() > 1 {
            let _ = write!(text, " runs={}", self.runs);
        }
        text.extend_from_slice(b" | ");
        text.extend_from_slice(id.as_bytes());
        let _ = write!(text, " {}", self.up - self.down);
    }
}

/// The REQUESTs of one bucket, as lua/include/sums.lua takes them.
struct Asked {
    /// Where in KEYS the bucket stands.
    key: usize,
    /// The least and the greatest time of a UUIDv7, in ms; 0 of other ids, which have buckets of their own.
    least_ms: i64,
    most_ms: i64,
    count: usize,
    each: Pack,
}

/// Writes what lua/include/sums.lua takes: `false` where nothing is summed.
pub(super) fn write<'a>(
    batch: &mut Pack,
    divided: &Divided<'a>,
    ops: impl Iterator<Item = &'a StockOp>,
    requests: &mut RequestKeys,
    generation: i64,
) {
    let plan = &divided.plan;
    if plan.products == 0 {
        batch.no();
        return;
    }
    let mut sums: Vec<Sum> = Vec::with_capacity(plan.products);
    let (mut text, mut each, mut count, mut number) = (Vec::new(), Pack::default(), 0_usize, itoa::Buffer::new());
    let mut ks = Pack::default();
    let mut before: Option<(&Id, i64, std::ops::Range<usize>)> = None;
    let mut asked: Vec<Asked> = Vec::new();
    let mut places = plan.places.iter();
    for (k, op) in ops.enumerate().filter(|(k, _)| plan.summed[*k]) {
        let Some((id, delta)) = summand(op) else {
            places.by_ref().take(op.items.len()).for_each(drop);
            continue;
        };
        let place = places.next().map_or(0, |place| *place as usize);
        if place >= sums.len() {
            sums.resize(place + 1, Sum::default());
        }
        let sum = &mut sums[place];
        let word: &[u8] = if op.action == Action::Change(StockKind::Decr) {
            sum.down -= delta;
            sum.least = Some(sum.least.map_or(-delta, |least| least.min(-delta)));
            b" decr"
        } else {
            sum.up += delta;
            b" incr"
        };
        if let Some(request) = &op.request {
            let moved = sum.up - sum.down;
            let asked = bucket_of(&mut asked, requests.place(request, generation), request);
            asked.count += 1;
            asked.each.text(&request.id.escaped()).text(&request.digest).count(count + 1).count(place + 1).integer(moved);
        }
        each.count(place + 1).integer(delta);
        if plan.grain == Grain::Batch {
            ks.count(k);
            sum.runs.push(u32::try_from(k).unwrap_or(u32::MAX), delta);
        } else {
            if count > 0 {
                text.push(b'\n');
            }
            text.extend_from_slice(number.format(k).as_bytes());
            let begins = text.len();
            // Mostly it is what stands in the line before.
            if let Some((known, by, line)) = &before
                && *known == id
                && *by == delta
                && op.request.is_none()
            {
                text.extend_from_within(line.clone());
                count += 1;
                continue;
            }
            text.extend_from_slice(word);
            if let Some(request) = &op.request {
                let _ = write!(text, " request={} digest={}", request.id.escaped(), request.digest);
            }
            text.extend_from_slice(b" | ");
            text.extend_from_slice(id.as_bytes());
            text.push(b' ');
            text.extend_from_slice(number.format(delta).as_bytes());
            before = op.request.is_none().then_some((id, delta, begins..text.len()));
        }
        count += 1;
    }
    if plan.grain == Grain::Batch {
        for (place, (sum, id)) in sums.iter().zip(&divided.summed).enumerate() {
            if place > 0 {
                text.push(b'\n');
            }
            sum.write_to(&mut text, id);
        }
    }
    batch.array(10).count(plan.products).count(sums.len()).array(sums.len());
    for sum in &sums {
        batch.integer(sum.down);
    }
    if sums.iter().any(|sum| sum.up > 0) {
        batch.array(sums.len());
        for sum in &sums {
            batch.integer(sum.up);
        }
    } else {
        batch.no();
    }
    batch.array(sums.len());
    for sum in &sums {
        // Where units are given, too, even the smallest may fit later.
        batch.integer(if sum.up > 0 { 0 } else { sum.least.unwrap_or(0) });
    }
    let pairs = Pack::array_of(count * 2, each);
    batch.count(count).bytes(&text).bytes(&pairs.into_bytes());
    match plan.grain {
        Grain::Operation => batch.no(),
        Grain::Batch => batch.bytes(&Pack::array_of(count, ks).into_bytes()),
    };
    if asked.is_empty() {
        batch.no();
        return;
    }
    batch.array(asked.len());
    for Asked { key, least_ms, most_ms, count, each } in asked {
        batch.array(4).count(key).integer(least_ms).integer(most_ms).array(count * 5).append(each);
    }
}

fn bucket_of<'a>(asked: &'a mut Vec<Asked>, key: usize, request: &Request) -> &'a mut Asked {
    let stamp_ms = i64::try_from(request.stamp_ms()).unwrap_or(0);
    let at = asked.iter().position(|bucket| bucket.key == key).unwrap_or_else(|| {
        asked.push(Asked { key, least_ms: stamp_ms, most_ms: stamp_ms, count: 0, each: Pack::default() });
        asked.len() - 1
    });
    let bucket = &mut asked[at];
    bucket.least_ms = bucket.least_ms.min(stamp_ms);
    bucket.most_ms = bucket.most_ms.max(stamp_ms);
    bucket
}

/// What the script found of one product, and what has become of it since.
#[derive(Clone, Debug, Default)]
struct Standing {
    value: Option<i64>,
    corrupt: bool,
    frozen: Option<String>,
}

impl Standing {
    /// Moves it by `delta`, and says what is available then. Errors with why it does not move.
    fn moved(&mut self, delta: i64) -> Result<i64, StockOutcome> {
        if self.corrupt {
            return Err(StockOutcome::Corrupt { item: 0 });
        }
        if let Some(reason) = &self.frozen {
            return Err(StockOutcome::Frozen { item: 0, reason: reason.clone() });
        }
        let Some(value) = self.value else { return Err(StockOutcome::Absent { item: 0 }) };
        let after = value + delta;
        if after < 0 {
            return Err(StockOutcome::Short { item: 0, available: value });
        }
        if after > TOTAL_MAX {
            return Err(StockOutcome::Over { item: 0, available: value });
        }
        self.value = Some(after);
        Ok(after)
    }
}

/// Works out what became of the summed operations. Errors where the script accepted another number of them.
pub(super) struct Worked {
    standings: Vec<Standing>,
    before: Positions,
    accepted: u64,
    taken: u64,
    /// With [`Grain::Batch`] for each product how many accepted operations stand in front of its next one.
    ahead: Vec<u64>,
    at: usize,
}

impl Worked {
    /// Reads the script's answer; moves `positions` behind the summed operations.
    pub(super) fn read<'a>(
        plan: &Plan,
        ops: impl Iterator<Item = &'a StockOp>,
        words: &mut Words,
        positions: &mut Positions,
    ) -> Result<Self, Error> {
        let answer = words.text()?;
        let mut worked = Self { standings: Vec::new(), before: positions.clone(), accepted: 0, taken: 0, ahead: Vec::new(), at: 0 };
        if plan.products == 0 {
            return Ok(worked);
        }
        let unexpected = || Error::Unexpected(format!("sums {:?}", answer.get(..answer.len().min(100))));
        let mut found = answer.split(' ');
        worked.accepted = found.next().and_then(|count| count.parse().ok()).ok_or_else(unexpected)?;
        worked.standings.reserve(plan.products);
        for word in found {
            let (is_frozen, word) = word.strip_prefix('!').map_or((false, word), |word| (true, word));
            let mut standing = Standing::default();
            match word {
                "-" => {}
                "?" => standing.corrupt = true,
                number => standing.value = Some(number.parse().map_err(|_| unexpected())?),
            }
            if is_frozen {
                standing.frozen = Some(words.text()?);
            }
            worked.standings.push(standing);
        }
        if worked.standings.len() != plan.products {
            return Err(unexpected());
        }
        positions.skip(worked.accepted);
        if plan.grain == Grain::Batch {
            worked.ahead = ahead(plan, ops, worked.standings.clone());
        }
        Ok(worked)
    }

    /// What became of the next summed operation.
    pub(super) fn next(&mut self, plan: &Plan, op: &StockOp) -> StockOutcome {
        let places = &plan.places[self.at..self.at + op.items.len()];
        self.at += op.items.len();
        let Some((_, delta)) = summand(op) else {
            let standings = || places.iter().map(|place| &self.standings[*place as usize]);
            if let Some(item) = standings().position(|standing| standing.corrupt) {
                return StockOutcome::Corrupt { item };
            }
            return StockOutcome::Values(standings().map(|standing| standing.value).collect());
        };
        let place = places[0] as usize;
        let after = match self.standings[place].moved(delta) {
            Ok(after) => after,
            Err(refused) => return refused,
        };
        let ahead = match self.ahead.get_mut(place) {
            Some(ahead) => std::mem::replace(ahead, *ahead + 1),
            None => self.taken,
        };
        self.taken += 1;
        StockOutcome::Done { available: smallvec::smallvec![after], position: self.before.behind(ahead) }
    }

    /// Checks that it came to what the script accepted.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.taken == self.accepted {
            return Ok(());
        }
        Err(Error::Unexpected(format!("sums that come to {} operations, where the script came to {}", self.taken, self.accepted)))
    }
}

/// For each product how many accepted operations its first one has in front of it, where those of a product stand together.
fn ahead<'a>(plan: &Plan, ops: impl Iterator<Item = &'a StockOp>, mut standings: Vec<Standing>) -> Vec<u64> {
    let mut counts = vec![0; standings.len()];
    let mut places = plan.places.as_slice();
    for (_, op) in ops.enumerate().filter(|(k, _)| plan.summed[*k]) {
        let (own, rest) = places.split_at(op.items.len());
        places = rest;
        if let (Some((_, delta)), [place]) = (summand(op), own) {
            counts[*place as usize] += u64::from(standings[*place as usize].moved(delta).is_ok());
        }
    }
    let mut all = 0;
    counts.iter_mut().for_each(|count| all += std::mem::replace(count, all));
    counts
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

    use super::*;
    use crate::domain::change::{Effect, Entry, Operation};
    use crate::domain::{Position, RequestId};
    use crate::ledger::testing::RedisServer;
    use crate::store::lane::{Family as _, Verdict};
    use crate::store::requests::{self, Remembered};
    use crate::store::stock::{Items, Stock};
    use crate::store::stream::OutboxReader;
    use crate::store::stream::testing::send;
    use crate::store::{Connection, keys, meta, script};

    /// What is known of one product by a model that decides one operation after the other.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Model {
        value: Option<i64>,
        corrupt: bool,
        frozen: bool,
    }

    type Models = BTreeMap<String, Model>;

    /// What a model knows, with the REQUESTs and what they were answered.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Known {
        models: Models,
        requests: BTreeMap<String, String>,
    }

    impl Known {
        /// Decides an operation as commands.md says; `n` counts the accepted ones.
        fn decide(&mut self, op: &StockOp, n: &mut u64) -> StockOutcome {
            let Some(request) = &op.request else { return decide(&mut self.models, op, n) };
            if let Some(text) = self.requests.get(&request.id.escaped()) {
                return StockOutcome::Remembered(Remembered::Known(text.clone()));
            }
            let outcome = decide(&mut self.models, op, n);
            if let StockOutcome::Done { available, position } = &outcome {
                let text = format!("{} {}", request.digest, requests::reply("OK", available, *position));
                // Of what is gone there is nothing to say.
                let text = if op.action == Action::Change(StockKind::Delete) { format!("{} OK {position}", request.digest) } else { text };
                self.requests.insert(request.id.escaped(), text);
            }
            outcome
        }
    }

    fn decide(models: &mut Models, op: &StockOp, n: &mut u64) -> StockOutcome {
        let model = |id: &Id| models.get(id.as_str()).cloned().unwrap_or_default();
        if let Some(item) = op.items.iter().position(|(id, _)| model(id).corrupt)
            && op.items.iter().take(item).all(|(id, quantity)| refusal(op.action, &model(id), *quantity, 0).is_none())
        {
            return StockOutcome::Corrupt { item };
        }
        if op.action == Action::Read {
            return StockOutcome::Values(op.items.iter().map(|(id, _)| model(id).value).collect());
        }
        for (item, (id, quantity)) in op.items.iter().enumerate() {
            if let Some(refused) = refusal(op.action, &model(id), *quantity, item) {
                return refused;
            }
        }
        *n += 1;
        let mut available = smallvec::SmallVec::new();
        for (id, quantity) in &op.items {
            let model = models.entry(id.to_string()).or_default();
            let before = model.value.unwrap_or(0);
            let after = match op.action {
                Action::Change(StockKind::Decr) => before - quantity,
                Action::Change(StockKind::Incr) => before + quantity,
                Action::Change(StockKind::Delete) => 0,
                _ => *quantity,
            };
            model.value = (op.action != Action::Change(StockKind::Delete)).then_some(after);
            available.push(after);
        }
        StockOutcome::Done { available, position: Position::new(1, *n) }
    }

    fn unplaced(outcome: StockOutcome) -> StockOutcome {
        match outcome {
            StockOutcome::Done { available, .. } => StockOutcome::Done { available, position: Position::default() },
            StockOutcome::Remembered(Remembered::Known(text)) => {
                StockOutcome::Remembered(Remembered::Known(text.rsplit_once(' ').unwrap().0.to_owned()))
            }
            other => other,
        }
    }

    fn refusal(action: Action, model: &Model, quantity: i64, item: usize) -> Option<StockOutcome> {
        let Action::Change(kind) = action else { return None };
        if model.frozen {
            return Some(StockOutcome::Frozen { item, reason: "look".into() });
        }
        match (kind, model.value) {
            (StockKind::Set, _) => None,
            (_, None) => Some(StockOutcome::Absent { item }),
            (StockKind::Decr, Some(available)) if available < quantity => Some(StockOutcome::Short { item, available }),
            (StockKind::Incr, Some(available)) if available + quantity > TOTAL_MAX => Some(StockOutcome::Over { item, available }),
            _ => None,
        }
    }

    /// `now_ms`: the time in the ids that have one.
    fn operation(now_ms: u64) -> impl Strategy<Value = StockOp> {
        let product = prop_oneof![6 => Just("a"), 3 => Just("b"), 2 => Just("c"), 1 => Just("d"), 1 => Just("bad"), 1 => Just("blank"), 1 => Just("icy")];
        let kind = prop_oneof![
            8 => Just(Action::Change(StockKind::Decr)),
            3 => Just(Action::Change(StockKind::Incr)),
            3 => Just(Action::Read),
            1 => Just(Action::Change(StockKind::Set)),
            1 => Just(Action::Change(StockKind::Delete)),
        ];
        let quantity = prop_oneof![8 => 1..20_i64, 1 => Just(1_000_000_000_000)];
        let shape = (kind, proptest::collection::vec((product, quantity), 1..4), any::<bool>(), 0..8_u8, 0..2_000_u32);
        shape.prop_map(move |(action, all, several, named, id)| {
            let mut items = Items::new();
            for (product, quantity) in all {
                if !items.iter().any(|(known, _): &(Id, i64)| known.as_str() == product) {
                    items.push((Id::from(product), quantity));
                }
            }
            if !several || !matches!(action, Action::Read | Action::Change(StockKind::Decr)) {
                items.truncate(1);
            }
            let mut op = StockOp::new(action, items);
            if named == 0 && action != Action::Read {
                let id = match id % 4 {
                    0 => format!("00000000-0000-7000-8000-{id:012x}"),
                    1 => format!("{:08x}-{:04x}-7000-8000-{id:012x}", now_ms >> 16, now_ms & 0xffff),
                    _ => format!("r-{id}"),
                };
                let id = RequestId::parse(Bytes::from(id)).unwrap();
                op.request = Some(Box::new(Request::new(id, "d".into())));
            }
            op
        })
    }

    /// Batches of every mixture come to what a model comes to that decides one operation after the other, in replies, in Redis and in
    /// what is told to Postgres.
    #[tokio::test]
    async fn a_batch_comes_to_what_its_operations_come_to_one_by_one() {
        batches_come_to_what_their_operations_come_to(Grain::Operation).await;
    }

    /// The same where one line stands for all that a batch does to a product.
    #[tokio::test]
    async fn a_batch_with_a_line_a_product_comes_to_what_its_operations_come_to_one_by_one() {
        batches_come_to_what_their_operations_come_to(Grain::Batch).await;
    }

    async fn batches_come_to_what_their_operations_come_to(grain: Grain) {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        let mut reader = OutboxReader::open(&server.url()).await.unwrap();
        meta::attach(&mut connection, None, 1).await.unwrap();
        let run_id = connection.run_id().to_owned();
        let mut known = Known::default();
        for (product, value) in [("a", "40"), ("b", "3"), ("c", "9007199254740990"), ("icy", "500"), ("bad", "7x"), ("blank", " 5")] {
            send(&mut connection, &["SET", &format!("stock:product:{product}"), value]).await;
            let model = Model { value: value.parse().ok(), corrupt: ["bad", "blank"].contains(&product), frozen: false };
            known.models.insert(product.into(), model);
        }
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let (mut n, mut at, mut sums, mut rest, mut lines) = (0_u64, Position::default(), 0, 0, 0);
        let (mut looked_up, mut looked_up_alone) = (0, 0);
        let now_ms = u64::try_from(connection.time_ms().await.unwrap()).unwrap();
        for counter in 1..=3_000_u32 {
            let batch = proptest::collection::vec(operation(now_ms), 1..24);
            let mut ops = batch.new_tree(&mut runner).unwrap().current();
            let is_known =
                |known: &Known, op: &StockOp| op.request.as_ref().is_some_and(|request| known.requests.contains_key(&request.id.escaped()));
            let first = Stock::encode(ops.iter(), 5, grain);
            let asked = || ops.iter().enumerate().filter(|(k, op)| op.request.is_some() && first.plan.is_summed(*k));
            let is_refused = asked().any(|(_, op)| is_known(&known, op));
            looked_up += if is_refused { 0 } else { asked().count() };
            if is_refused {
                looked_up_alone += 1;
                ops.iter_mut().for_each(Stock::leave_alone);
            }
            let encoded = Stock::encode(ops.iter(), 5, grain);
            let summed: Vec<bool> = (0..ops.len()).map(|k| encoded.plan.is_summed(k)).collect();
            sums += summed.iter().filter(|is_summed| **is_summed).count();
            rest += summed.iter().filter(|is_summed| !**is_summed).count();
            // Nothing is frozen in every other batch: only then all may be decided at once.
            let is_frozen = counter % 2 == 0;
            let freeze: &[&str] = if is_frozen { &["HSET", keys::FROZEN, "icy", "look"] } else { &["HDEL", keys::FROZEN, "icy"] };
            send(&mut connection, freeze).await;
            known.models.get_mut("icy").unwrap().frozen = is_frozen;
            // One after the other in the order of arrival, but for the positions.
            let (mut arriving, mut counted) = (known.clone(), n);
            let in_order: Vec<_> = ops.iter().map(|op| unplaced(arriving.decide(op, &mut counted))).collect();
            let before = n;
            // Positions: what is summed takes effect first.
            let mut expected: Vec<Option<StockOutcome>> = vec![None; ops.len()];
            for section in [true, false] {
                for (k, op) in ops.iter().enumerate().filter(|(k, _)| summed[*k] == section) {
                    expected[k] = Some(known.decide(op, &mut n));
                }
            }
            if grain == Grain::Batch {
                place_by_product(&encoded.plan, &ops, &mut expected, before);
            }
            assert_eq!(expected.iter().flatten().cloned().map(unplaced).collect::<Vec<_>>(), in_order);
            assert_eq!(known.models, arriving.models);
            assert!(known.requests.keys().eq(arriving.requests.keys()));
            let batch_number = counter.to_string();
            // Without a window of REQUEST ids to fit, since their buckets are named by the clock.
            let window = "9999999999999999";
            let mut answers = Vec::new();
            for encoded in [is_refused.then_some(&first), Some(&encoded)].into_iter().flatten() {
                let all_keys: Vec<&str> = [keys::META, keys::OUTBOX].into_iter().chain(encoded.keys.iter()).collect();
                let args: [&[u8]; 10] = [
                    b"1",
                    run_id.as_bytes(),
                    b"0",
                    b"9999999999999",
                    b"i:stock",
                    batch_number.as_bytes(),
                    b"0",
                    window.as_bytes(),
                    b"0",
                    &encoded.batch,
                ];
                let mut words = Words::new(connection.run(&script::STOCK_WRITE, &all_keys, &args).await.unwrap()).unwrap();
                answers.push((words.text().unwrap(), words));
            }
            let (word, mut words) = answers.pop().unwrap();
            assert_eq!(word, "ok");
            assert!(answers.iter().all(|(word, _)| word == "requests"), "what is known is left to the script alone");
            (0..2).for_each(|_| _ = words.raw().unwrap());
            assert_eq!(words.integer().unwrap(), i64::try_from(before).unwrap());
            let mut positions = Positions::after(Position::new(1, before));
            let verdicts = Stock::read(&encoded.plan, ops.iter(), &mut words, &mut positions).unwrap();
            let outcomes: Vec<_> =
                verdicts.into_iter().map(|verdict| if let Verdict::Decided(outcome) = verdict { Some(outcome) } else { None }).collect();
            assert_eq!(outcomes, expected, "{ops:#?}");
            // The entry says the same.
            let entries = reader.read_after(at, 10, std::time::Duration::ZERO).await.unwrap().entries;
            assert_eq!(entries.len(), usize::from(n > before));
            for entry in &entries {
                let of_sums = entry.operations.iter().filter(|line| summed[line.k as usize]);
                let products: Vec<&str> = of_sums.flat_map(Operation::products).collect();
                let different = products.iter().collect::<std::collections::BTreeSet<_>>().len();
                assert!(grain == Grain::Operation || products.len() == different, "one line a product: {products:?}");
                lines += products.len();
            }
            let told: Vec<(u64, Operation)> = entries.iter().flat_map(Entry::each).collect();
            at = Position::new(u64::from(n > 0), n);
            let mut told: Vec<_> = told.iter().map(|(n, operation)| (operation.k, *n, &operation.effect)).collect();
            told.sort_unstable_by_key(|(k, ..)| *k);
            let accepted = (0..).zip(expected.iter().flatten()).filter_map(|(k, outcome)| match outcome {
                StockOutcome::Done { available, position } => Some((k, position.n, available.to_vec())),
                _ => None,
            });
            let told: Vec<_> = told
                .into_iter()
                .map(|(k, n, effect)| match effect {
                    Effect::Stock { items, .. } => (k, n, items.iter().map(|item| item.available).collect::<Vec<_>>()),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(told, accepted.collect::<Vec<_>>());
            for (product, model) in known.models.iter().filter(|(_, model)| !model.corrupt) {
                let value = connection.send(redis::cmd("GET").arg(format!("stock:product:{product}"))).await.unwrap();
                assert_eq!(redis::from_redis_value::<Option<i64>>(value).unwrap(), model.value, "{product} after {ops:?}");
            }
            // Garbage of every kind.
            let (bad, blank) = [("7x", " 5"), ("", "5 "), ("-1", " 5 "), ("1e3", "5  5")][counter as usize % 4];
            send(&mut connection, &["MSET", "stock:product:bad", bad, "stock:product:blank", blank]).await;
            // So that there is always something to sell.
            if known.models["a"].value.is_none_or(|value| value < 5) {
                known.models.get_mut("a").unwrap().value = Some(60);
                send(&mut connection, &["SET", "stock:product:a", "60"]).await;
            }
        }
        assert!(sums > 2_000 && rest > 2_000, "{sums} summed, {rest} not");
        assert!(lines > 500, "{lines} lines");
        let enough = |count: usize| grain == Grain::Batch || count > 100;
        assert!(
            enough(looked_up) && enough(looked_up_alone),
            "{looked_up} looked up together, {looked_up_alone} batches that could not be"
        );
    }

    /// The positions of what is summed, where those of a product stand together.
    fn place_by_product(plan: &Plan, ops: &[StockOp], expected: &mut [Option<StockOutcome>], mut n: u64) {
        let mut places = plan.places.iter();
        let mut summed: Vec<(u32, usize)> = Vec::new();
        for (k, op) in ops.iter().enumerate().filter(|(k, _)| plan.summed[*k]) {
            let own: Vec<u32> = places.by_ref().take(op.items.len()).copied().collect();
            summed.push((own[0], k));
        }
        summed.sort_unstable();
        for (_, k) in summed {
            if let Some(StockOutcome::Done { position, .. }) = &mut expected[k] {
                n += 1;
                position.n = n;
            }
        }
    }
}
