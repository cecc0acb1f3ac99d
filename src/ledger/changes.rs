//! What a run of outbox entries means for Postgres: the rows of the ledgers, and by how much each product and coupon moves. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Error;
use super::order::Orders;
use crate::domain::change::{Effect, Entry, Item, Operation, StockKind};
use crate::domain::coupon::{CouponChange, CouponStep, CouponTerms, NewTerms, Stepped};
use crate::domain::{InboxMark, OrderChange, Position, Runs, Side};

/// What an operation's ledger rows have in common.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub epoch: u64,
    pub n: u64,
    pub op: &'a str,
    pub k: u32,
    pub request: Option<&'a str>,
    pub digest: Option<&'a str>,
    pub at_ms: i64,
    /// What the caller was answered, where that is another place.
    pub origin: Option<Position>,
}

/// One row of `stock_ledger`.
pub(super) struct StockLine<'a> {
    pub place: Place<'a>,
    pub i: usize,
    pub kind: StockKind,
    pub item: &'a Item,
    /// By how much Postgres's available units move.
    pub pg_delta: i64,
    /// The order that it is of.
    pub order: Option<&'a OrderChange>,
    /// The operations that it stands for, where there are several.
    pub runs: Option<&'a Runs>,
}

impl StockLine<'_> {
    /// By how much the held units of its product move.
    pub fn held_delta(&self) -> i64 {
        self.order.map_or(0, |order| order.held_delta(self.kind, self.i))
    }
}

/// What the ledger's row says of a change that is about no product: one has to be there, so that the change is found.
pub(super) static NO_ITEM: Item = Item { product: String::new(), delta: 0, available: 0 };

/// One row of `coupon_ledger`.
pub(super) struct CouponLine<'a> {
    pub place: Place<'a>,
    pub coupon: &'a str,
    pub change: &'a CouponChange,
    /// By how much the total moves.
    pub total_delta: i64,
}

impl<'a> CouponLine<'a> {
    /// The row of a change out of the outbox, which says by how much the total moves.
    pub fn new(place: Place<'a>, coupon: &'a str, change: &'a CouponChange) -> Self {
        let [total_delta, ..] = change.moves();
        Self { place, coupon, change, total_delta }
    }
}

/// What became of a product's existence within the run: the last of them counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lifecycle {
    Set,
    /// When, in Unix ms.
    Deleted(i64),
}

/// By how much one product moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StockMove {
    pub delta: i64,
    /// By how much its held units move.
    pub held: i64,
    /// Whether some operation may have created it.
    pub created: bool,
    pub lifecycle: Option<Lifecycle>,
    /// The threshold afterwards; the outer `None` leaves it as it is.
    pub low: Option<Option<i64>>,
}

/// By how much one coupon moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CouponMove {
    pub issued: i64,
    pub used: i64,
    pub last_serial: i64,
    /// The lowest token that it was issued under, and the highest.
    pub tokens: Option<(i64, i64)>,
    /// Whether one of them was lower than one before it.
    pub is_overtaken: bool,
    /// By how much the total and the highest serial move beside the terms and the issues.
    pub total_by: i64,
    pub serial_by: i64,
    /// The terms that it is given.
    pub terms: NewTerms,
    pub deleted: bool,
}

impl CouponMove {
    fn issue_under(&mut self, token: i64) {
        let (lowest, highest) = self.tokens.unwrap_or((token, token));
        self.is_overtaken |= token < highest;
        self.tokens = Some((lowest.min(token), highest.max(token)));
    }

    fn alter(&mut self, terms: NewTerms) {
        if terms.total.is_some() {
            self.total_by = 0;
        }
        self.terms = NewTerms {
            total: terms.total.or(self.terms.total),
            start_ms: terms.start_ms.or(self.terms.start_ms),
            end_ms: terms.end_ms.or(self.terms.end_ms),
        };
    }
}

/// One row of `coupon_issue`: what became of it within the run. Times in Unix ms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Issue<'a> {
    pub user: &'a str,
    /// When it was issued, if within the run: then there is no row yet.
    pub issued_ms: Option<i64>,
    /// The first step, and the last.
    pub first: CouponStep,
    pub last: CouponStep,
    /// When the last step was.
    pub at_ms: i64,
    pub order: Option<&'a str>,
}

/// All that a run of entries changes. The maps are sorted, so that every transaction locks in the same order.
#[derive(Default)]
pub(super) struct Changes<'a> {
    pub stock_lines: Vec<StockLine<'a>>,
    pub stock: BTreeMap<&'a str, StockMove>,
    pub orders: Orders<'a>,
    pub coupon_lines: Vec<CouponLine<'a>>,
    pub created: Vec<(&'a str, CouponTerms)>,
    /// By coupon and serial.
    pub issues: BTreeMap<(&'a str, i64), Issue<'a>>,
    pub coupons: BTreeMap<&'a str, CouponMove>,
    /// Products that were set before Redis heard of their deletion. It will take them away, and has to hear that they exist again.
    pub revived: BTreeSet<&'a str>,
    /// Why products are frozen from here on; `None`: no longer.
    pub frozen: BTreeMap<&'a str, Option<&'a str>>,
    /// Up to where Redis has the inbox now.
    pub mark: Option<InboxMark>,
}

/// What Postgres has of the products that are set in a run of entries: where Redis did not have one, or is still to hear that it was deleted,
/// that gives way to what was set.
#[derive(Debug, Default)]
pub(super) struct Created {
    pub products: HashMap<String, Known>,
    /// Up to where Redis has the inbox before the run.
    pub mark: InboxMark,
}

/// One of them.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Its available units, with those that Redis has moved by and Postgres owes.
    pub units: i64,
    /// Its rows of the inbox behind the mark, in their order: by how much each moves it, `None` for a creation or a deletion.
    pub ahead: Vec<(InboxMark, Option<i64>)>,
}

impl Known {
    /// Whether Redis at `mark` is still to hear of its creation or deletion.
    fn is_replaced_after(&self, mark: InboxMark) -> bool {
        self.ahead.iter().any(|(row, delta)| *row > mark && delta.is_none())
    }

    /// By how much the inbox will move what Redis has at `mark`. What stands before a creation or a deletion moves nothing any more.
    fn ahead_of(&self, mark: InboxMark) -> i64 {
        let behind = self.ahead.iter().filter(|(row, _)| *row > mark).rev();
        behind.map_while(|(_, delta)| *delta).fold(0, i64::saturating_add)
    }
}

impl<'a> Changes<'a> {
    /// Gathers what the entries change, in their order. Errors with [`Error::Data`] where the sum of a product's changes passes what a
    /// 64-bit integer holds.
    ///
    /// A product that was created where Redis had none, or that was set where another program had deleted it, has just what was set, whatever
    /// Postgres has of it: every change before it in the outbox is in Postgres by then. What the inbox is still to bring to Redis comes on
    /// top, on both sides.
    pub fn gather(entries: impl IntoIterator<Item = &'a Entry>, created: &Created) -> Result<Self, Error> {
        let mut changes = Self::default();
        for entry in entries {
            for (n, operation) in entry.lines() {
                let remembered = operation.remembered.as_ref();
                let place = Place {
                    epoch: entry.last.epoch,
                    n,
                    op: &entry.op,
                    k: operation.k,
                    request: remembered.map(|remembered| remembered.request.as_str()),
                    digest: remembered.map(|remembered| remembered.digest.as_str()),
                    at_ms: entry.at_ms,
                    origin: None,
                };
                changes.add(place, operation, created)?;
            }
        }
        Ok(changes)
    }

    fn add(&mut self, place: Place<'a>, operation: &'a Operation, created: &Created) -> Result<(), Error> {
        match &operation.effect {
            Effect::Stock { kind, items, detail } => {
                self.mark = self.mark.max(detail.mark);
                let order = detail.order.as_deref();
                if let Some(order) = order {
                    self.orders.add(place, *kind, items, order);
                }
                if items.is_empty() {
                    self.stock_lines.push(StockLine { place, i: 0, kind: *kind, item: &NO_ITEM, pg_delta: 0, order, runs: None });
                }
                for (i, item) in items.iter().enumerate() {
                    let mark = self.mark.unwrap_or(created.mark);
                    let known = created.products.get(&item.product).filter(|_| *kind == StockKind::Set);
                    let replaced = known.is_some_and(|known| known.is_replaced_after(mark));
                    if replaced {
                        self.revived.insert(&item.product);
                    }
                    let before = known.filter(|_| detail.created || replaced).map(|known| {
                        let moved = self.stock.get(item.product.as_str()).map_or(0, |moved| moved.delta);
                        known.units.saturating_add(moved).saturating_sub(known.ahead_of(mark))
                    });
                    let pg_delta = match before {
                        Some(before) => item.available.saturating_sub(before),
                        None if kind.moves_both() => item.delta,
                        None => detail.pg.unwrap_or(0),
                    };
                    let line = StockLine { place, i, kind: *kind, item, pg_delta, order, runs: detail.runs.as_deref() };
                    self.move_stock(&line, detail.low)?;
                    if *kind == StockKind::Freeze || detail.short.is_some() {
                        self.frozen.insert(&item.product, Some(detail.reason.as_deref().unwrap_or("its units do not add up")));
                    } else if *kind == StockKind::Unfreeze {
                        self.frozen.insert(&item.product, None);
                    }
                    self.stock_lines.push(line);
                }
            }
            Effect::Coupon { coupon, change } => {
                self.coupon_lines.push(CouponLine::new(place, coupon, change));
                self.move_coupon(coupon, change, place.at_ms);
            }
        }
        Ok(())
    }

    /// Moves a coupon, and what a user has of it.
    pub fn move_coupon(&mut self, coupon: &'a str, change: &'a CouponChange, at_ms: i64) {
        if let CouponChange::Create(terms) = change {
            return self.created.push((coupon, terms.clone()));
        }
        let moved = self.coupons.entry(coupon).or_default();
        match change {
            CouponChange::Create(_) => {}
            CouponChange::Alter { terms, .. } => moved.alter(*terms),
            CouponChange::Delete => moved.deleted = true,
            CouponChange::Mend { moved: Side::Redis, .. } => {}
            CouponChange::Mend { moved: Side::Postgres, by, .. } => {
                moved.issued += by.issued;
                moved.used += by.used;
                moved.total_by += by.total;
                moved.serial_by += by.serial;
            }
            CouponChange::Step(Stepped { step, user, serial, order, token, .. }) => {
                token.iter().for_each(|token| moved.issue_under(*token));
                moved.issued += step.issued();
                moved.used += step.used();
                moved.last_serial = moved.last_serial.max(*serial);
                let issue = self.issues.entry((coupon, *serial)).or_insert(Issue {
                    user,
                    issued_ms: (*step == CouponStep::Issue).then_some(at_ms),
                    first: *step,
                    last: *step,
                    at_ms,
                    order: None,
                });
                (issue.last, issue.at_ms, issue.order) = (*step, at_ms, order.as_deref());
            }
        }
    }

    fn move_stock(&mut self, line: &StockLine<'a>, low: Option<i64>) -> Result<(), Error> {
        let held = line.held_delta();
        let may_move_nothing = !line.kind.moves_both() || line.order.is_some();
        if may_move_nothing && line.pg_delta == 0 && held == 0 {
            return Ok(());
        }
        let moved = self.stock.entry(&line.item.product).or_default();
        moved.held = moved.held.saturating_add(held);
        moved.delta = moved.delta.checked_add(line.pg_delta).ok_or_else(|| {
            Error::Data(format!(
                "the changes of product '{}' up to {}-{} add up to more than 2^63",
                line.item.product, line.place.epoch, line.place.n
            ))
        })?;
        match line.kind {
            StockKind::Set => {
                moved.created = true;
                moved.lifecycle = Some(Lifecycle::Set);
                moved.low = low.map(Some).or(moved.low);
            }
            StockKind::Delete => {
                moved.lifecycle = Some(Lifecycle::Deleted(line.place.at_ms));
                moved.low = Some(None);
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(lines: &[&str]) -> Entry {
        let operations: Vec<_> = lines.iter().map(|line| Operation::decode(line).unwrap()).collect();
        let last = Position::new(1, operations.len() as u64);
        Entry { last, first_n: 1, prev: "-".into(), op: "i:stock:1".into(), at_ms: 1_700_000_000_000, operations }
    }

    #[test]
    fn a_product_moves_by_the_sum_and_lives_or_not_by_the_last_word() {
        let entry = entry(&[
            "0 set low=5 | a 10 10",
            "1 decr | a -3 7 b -1 4",
            "2 delete | a -7 0",
            "3 set | a 2 2",
            "4 delete | b -4 0",
            "5 init | c 9 9",
            "6 set low=1 | d 1 1",
            "7 set | d 1 2",
        ]);
        let changes = Changes::gather([&entry], &Created::default()).unwrap();
        let deleted = Some(Lifecycle::Deleted(1_700_000_000_000));
        let expected = [
            ("a", StockMove { delta: 2, created: true, lifecycle: Some(Lifecycle::Set), low: Some(None), ..StockMove::default() }),
            ("b", StockMove { delta: -5, lifecycle: deleted, low: Some(None), ..StockMove::default() }),
            ("d", StockMove { delta: 2, created: true, lifecycle: Some(Lifecycle::Set), low: Some(Some(1)), ..StockMove::default() }),
        ];
        assert_eq!(changes.stock, BTreeMap::from(expected));
        let lines: Vec<_> = changes.stock_lines.iter().map(|line| (line.place.n, line.i, line.pg_delta)).collect();
        assert_eq!(lines[..4], [(1, 0, 10), (2, 0, -3), (2, 1, -1), (3, 0, -7)]);
        assert_eq!(lines[5..7], [(5, 0, -4), (6, 0, 0)], "Postgres has what it gave to Redis");
    }

    #[test]
    fn a_creation_leaves_what_was_set_whatever_postgres_has() {
        let entry = entry(&["0 decr | a -3 7", "1 set new=1 | a 5 5", "2 incr | a 1 6", "3 set new=1 | b 4 4"]);
        let known = Known { units: 50, ahead: Vec::new() };
        let created = Created { products: HashMap::from([("a".to_owned(), known)]), mark: InboxMark::default() };
        let changes = Changes::gather([&entry], &created).unwrap();
        let deltas: Vec<_> = changes.stock_lines.iter().map(|line| line.pg_delta).collect();
        assert_eq!(deltas, [-3, 5 - 47, 1, 4]);
        assert_eq!(50 + changes.stock["a"].delta, 6);
    }

    #[test]
    fn a_creation_does_not_count_what_the_inbox_still_brings_to_redis() {
        let mark = |id| InboxMark { xid: 7, id };
        let entry = entry(&["0 set new=1 | a 5 5", "1 inbox inbox=7:2 | a 3 8", "2 delete | a -8 0", "3 set new=1 | a 1 1"]);
        let pg_deltas = |ahead| {
            let created = Created { products: HashMap::from([("a".to_owned(), Known { units: 50, ahead })]), mark: mark(1) };
            let changes = Changes::gather([&entry], &created).unwrap();
            changes.stock_lines.iter().map(|line| line.pg_delta).collect::<Vec<_>>()
        };
        assert_eq!(pg_deltas(Vec::new()), [-45, 0, -8, 4]);
        assert_eq!(pg_deltas(vec![(mark(2), Some(3)), (mark(3), Some(-1))]), [5 - 50 + 2, 0, -8, 1 - (50 - 43 - 8) - 1]);
        assert_eq!(pg_deltas(vec![(mark(2), Some(3)), (mark(3), None)]), [-45, 0, -8, 4], "what came before a creation is in it");
    }

    #[test]
    fn a_product_that_is_set_before_redis_hears_of_its_deletion_is_revived_with_just_what_was_set() {
        let mark = |id| InboxMark { xid: 7, id };
        let entry = entry(&["0 set | a 10 20", "1 decr | a -3 17", "2 set | b 1 2", "3 inbox inbox=7:2 | a -17 0", "4 set new=1 | a 4 4"]);
        let ahead = vec![(mark(2), None), (mark(3), Some(5))];
        let known = |units, ahead| Known { units, ahead };
        let products = HashMap::from([("a".to_owned(), known(0, ahead)), ("b".to_owned(), known(1, vec![(mark(4), Some(1))]))]);
        let changes = Changes::gather([&entry], &Created { products, mark: mark(1) }).unwrap();
        let deltas: Vec<_> = changes.stock_lines.iter().map(|line| line.pg_delta).collect();
        assert_eq!(deltas, [20 + 5, -3, 1, 0, 4 - 22 + 5]);
        assert_eq!(changes.revived, BTreeSet::from(["a"]));
    }

    #[test]
    fn a_coupon_moves_by_its_issues_and_keeps_the_highest_serial() {
        let entry = entry(&[
            "0 coupon.create coupon=c total=3 peruser=1 |",
            "1 coupon.issue coupon=c user=u serial=7 remaining=2 |",
            "2 coupon.issue coupon=c user=v serial=8 remaining=1 |",
        ]);
        let changes = Changes::gather([&entry], &Created::default()).unwrap();
        assert_eq!(changes.coupons, BTreeMap::from([("c", CouponMove { issued: 2, last_serial: 8, ..CouponMove::default() })]));
        assert_eq!((changes.created.len(), changes.issues.len(), changes.coupon_lines.len()), (1, 2, 3));
    }

    #[test]
    fn what_becomes_of_a_coupon_in_one_run_is_its_last_step() {
        let entry = entry(&[
            "0 coupon.issue coupon=c user=u serial=1 remaining=9 |",
            "1 coupon.use coupon=c user=u order=o serial=1 remaining=9 |",
            "2 coupon.unuse coupon=c user=v serial=7 remaining=9 |",
            "3 coupon.revoke coupon=c user=v serial=7 remaining=10 |",
            "4 coupon.alter coupon=c total=5 end=9 remaining=4 by=-5 |",
            "5 coupon.alter coupon=c end=0 remaining=4 by=0 |",
            "6 coupon.delete coupon=c |",
        ]);
        let changes = Changes::gather([&entry], &Created::default()).unwrap();
        let terms = NewTerms { total: Some(5), start_ms: None, end_ms: Some(0) };
        assert_eq!(changes.coupons["c"], CouponMove { last_serial: 7, terms, deleted: true, ..CouponMove::default() });
        let at_ms = 1_700_000_000_000;
        let first = Issue { user: "u", issued_ms: Some(at_ms), first: CouponStep::Issue, last: CouponStep::Use, at_ms, order: Some("o") };
        let second = Issue { user: "v", issued_ms: None, first: CouponStep::Unuse, last: CouponStep::Revoke, at_ms, order: None };
        assert_eq!(changes.issues, BTreeMap::from([(("c", 1), first), (("c", 7), second)]));
        assert_eq!(changes.coupon_lines.iter().map(|line| line.total_delta).collect::<Vec<_>>(), [0, 0, 0, 0, -5, 0, 0]);
    }

    #[test]
    fn a_sum_that_no_integer_holds_is_refused() {
        let entry = entry(&["0 incr | a 9223372036854775807 1", "1 incr | a 1 2"]);
        assert!(matches!(Changes::gather([&entry], &Created::default()), Err(Error::Data(_))));
    }
}
