//! The COUPON family: its operations as lua/coupon_write.lua takes them, and what it answers.

use std::collections::HashMap;

use super::copies::{CopiedBatch, Copy, Kept, Note};
use super::key_list::KeyList;
use super::lane::{Encoded, Family, Positions, Verdict};
use super::pack::Pack;
use super::requests::{self, Remembered, Request, RequestKeys};
use super::script::{self, Script};
use super::words::Words;
use super::{Error, keys};
use crate::domain::change::{CouponTerms, Effect, Operation};
use crate::domain::{Id, Position};

/// The keys of lua/coupon_write.lua before the coupons: meta, outbox.
const FIXED_KEYS: usize = 2;

/// What a COUPON operation does.
#[derive(Clone, Debug)]
pub enum Action {
    Create(CouponTerms),
    Issue { user: Id },
}

/// One COUPON operation.
#[derive(Clone, Debug)]
pub struct CouponOp {
    pub coupon: Id,
    pub action: Action,
    pub request: Option<Request>,
}

/// What became of a COUPON operation. Times in Unix ms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CouponOutcome {
    Created {
        position: Position,
    },
    Exists,
    Issued {
        serial: i64,
        remaining: i64,
        position: Position,
    },
    /// The user is at the limit; their latest serial.
    Already {
        serial: i64,
    },
    SoldOut,
    NotStarted {
        start_ms: i64,
    },
    Ended {
        end_ms: i64,
    },
    Absent,
    /// A key of this coupon holds something of another type.
    Corrupt,
    Remembered(Remembered),
}

/// See [`Family`].
pub struct Coupon;

impl Family for Coupon {
    const LANE: &'static str = "coupon";
    const SCRIPT: &'static Script = &script::COUPON_WRITE;
    type Op = CouponOp;
    type Outcome = CouponOutcome;
    type Plan = ();

    fn changes(_: &CouponOp) -> bool {
        true
    }

    fn request(op: &CouponOp) -> Option<&Request> {
        op.request.as_ref()
    }

    fn weight(op: &CouponOp) -> (usize, usize) {
        let user = if let Action::Issue { user } = &op.action { user.as_bytes().len() } else { 0 };
        let (keys, bytes) = op.request.as_ref().map_or((0, 0), Request::weight);
        (3 + keys, 160 + 4 * op.coupon.as_bytes().len() + 3 * user + bytes)
    }

    fn encode<'a>(ops: impl Iterator<Item = &'a CouponOp> + Clone, generation: i64) -> Encoded<()> {
        let mut places: HashMap<&Id, usize> = HashMap::new();
        let mut coupons: Vec<(&Id, Vec<&Id>)> = Vec::new();
        for op in ops.clone() {
            let place = *places.entry(&op.coupon).or_insert_with(|| {
                coupons.push((&op.coupon, Vec::new()));
                coupons.len()
            });
            if let Action::Issue { user } = &op.action {
                coupons[place - 1].1.push(user);
            }
        }
        let mut requests = RequestKeys::after(FIXED_KEYS + 3 * coupons.len());
        let mut batch = Pack::default();
        batch.array(3).array(coupons.len());
        for (coupon, _) in &coupons {
            batch.text(coupon.as_str());
        }
        batch.array(coupons.len());
        for (_, users) in &coupons {
            batch.array(users.len());
            for user in users {
                batch.text(user.as_str());
            }
        }
        batch.array(ops.clone().count());
        for (k, op) in ops.enumerate() {
            let place = places.get(&op.coupon).copied().unwrap_or_default();
            match &op.action {
                Action::Create(terms) => {
                    batch.array(8).text("create").text(&line(k, op)).count(place);
                    requests.write(&mut batch, op.request.as_ref(), generation);
                    batch.integer(terms.total).integer(terms.per_user);
                    batch.integer(terms.start_ms.unwrap_or(0)).integer(terms.end_ms.unwrap_or(0));
                }
                Action::Issue { user } => {
                    batch.array(5).text("issue").text(&line(k, op)).count(place);
                    requests.write(&mut batch, op.request.as_ref(), generation);
                    batch.text(user.as_str());
                }
            }
        }
        let mut keys = KeyList::default();
        for (coupon, _) in coupons {
            [keys::coupon_lock(coupon), keys::coupon_info(coupon), keys::coupon_users(coupon)].iter().for_each(|key| keys.push(&[key]));
        }
        requests.into_keys().iter().for_each(|key| keys.push(&[key]));
        Encoded { keys, batch: batch.into_bytes(), plan: () }
    }

    fn read<'a>(
        (): &(),
        ops: impl Iterator<Item = &'a CouponOp>,
        words: &mut Words,
        positions: &mut Positions,
    ) -> Result<Vec<Verdict<CouponOutcome>>, Error> {
        ops.map(|op| decided(op, words, positions)).collect()
    }

    fn note(_: &CouponOp, outcome: &CouponOutcome) -> Option<Note> {
        let (position, serial, remaining) = match outcome {
            CouponOutcome::Created { position } => (*position, 0, 0),
            CouponOutcome::Issued { serial, remaining, position } => (*position, *serial, *remaining),
            _ => return None,
        };
        Some(Note { serial, remaining, ..Note::at(position) })
    }

    fn keep(batch: &mut CopiedBatch, k: u32, op: CouponOp, note: Note) {
        let action = match op.action {
            Action::Issue { user } => Action::Issue { user: user.detached() },
            create @ Action::Create(_) => create,
        };
        let op = CouponOp { coupon: op.coupon.detached(), action, request: op.request.map(Request::detached) };
        batch.copies.push(Copy { k, kept: Kept::Coupon(op), note });
    }

    fn replayed(op: &CouponOp, line: &Operation, position: Position) -> Option<CouponOutcome> {
        match (&op.action, &line.effect) {
            (Action::Create(_), Effect::CouponCreate { .. }) => Some(CouponOutcome::Created { position }),
            (Action::Issue { .. }, Effect::CouponIssue { serial, remaining, .. }) => {
                Some(CouponOutcome::Issued { serial: *serial, remaining: *remaining, position })
            }
            _ => None,
        }
    }

    fn is_same(op: &CouponOp, line: &Operation) -> bool {
        match (&op.action, &line.effect) {
            (Action::Create(asked), Effect::CouponCreate { coupon, terms }) => op.coupon.as_str() == coupon && asked == terms,
            (Action::Issue { user: asked }, Effect::CouponIssue { coupon, user, .. }) => {
                op.coupon.as_str() == coupon && asked.as_str() == user
            }
            _ => false,
        }
    }

    fn remembered(remembered: Remembered) -> CouponOutcome {
        CouponOutcome::Remembered(remembered)
    }
}

/// What the script says of an operation.
fn decided(op: &CouponOp, words: &mut Words, positions: &mut Positions) -> Result<Verdict<CouponOutcome>, Error> {
    let word = words.text()?;
    let outcome = match word.as_str() {
        "ok" => match op.action {
            Action::Create(_) => CouponOutcome::Created { position: positions.take() },
            Action::Issue { .. } => {
                CouponOutcome::Issued { serial: words.integer()?, remaining: words.integer()?, position: positions.take() }
            }
        },
        "exists" => CouponOutcome::Exists,
        "already" => CouponOutcome::Already { serial: words.integer()? },
        "soldout" => CouponOutcome::SoldOut,
        "early" => CouponOutcome::NotStarted { start_ms: words.integer()? },
        "ended" => CouponOutcome::Ended { end_ms: words.integer()? },
        "absent" => CouponOutcome::Absent,
        "corrupt" => CouponOutcome::Corrupt,
        "locked" => {
            let (holder, remaining_ms) = (words.text()?, words.integer()?);
            let lock = keys::coupon_lock(&op.coupon);
            return Ok(Verdict::Again(format!("the lock '{lock}' is held by '{holder}' for {remaining_ms} ms more; nothing was changed")));
        }
        other => return requests::verdict(other, words, CouponOutcome::Remembered),
    };
    Ok(Verdict::Decided(outcome))
}

/// What a user has of a coupon (serial, state, when it was issued in Unix ms), as lua/coupon_write.lua keeps it: one line each.
pub fn field(coupons: &[(i64, String, i64)]) -> String {
    let lines: Vec<String> = coupons.iter().map(|(serial, state, issued_at_ms)| format!("{serial} {state} {issued_at_ms} -")).collect();
    lines.join("\n")
}

/// The operation's line in the outbox: whole for a creation, up to what only the script knows for an issue.
fn line(k: usize, op: &CouponOp) -> String {
    let kind = if matches!(op.action, Action::Create(_)) { "coupon.create" } else { "coupon.issue" };
    let mut line = format!("{k} {kind}");
    if let Some(request) = &op.request {
        request.write_to(&mut line);
    }
    line.push_str(&format!(" coupon={}", op.coupon));
    match &op.action {
        Action::Create(terms) => {
            line.push_str(&format!(" total={} peruser={}", terms.total, terms.per_user));
            for (name, time) in [("start", terms.start_ms), ("end", terms.end_ms)] {
                if let Some(time) = time {
                    line.push_str(&format!(" {name}={time}"));
                }
            }
            line.push_str(" |");
        }
        Action::Issue { user } => line.push_str(&format!(" user={user}")),
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_can_be_read_back() {
        let terms = CouponTerms { total: 10, per_user: 1, start_ms: None, end_ms: Some(7) };
        let create = CouponOp { coupon: Id::from("c"), action: Action::Create(terms.clone()), request: None };
        assert_eq!(Operation::decode(&line(0, &create)).unwrap().effect, Effect::CouponCreate { coupon: "c".into(), terms });
        let issue = CouponOp { coupon: Id::from("c"), action: Action::Issue { user: Id::from("u") }, request: None };
        let whole = line(2, &issue) + " serial=3 remaining=7 |";
        let effect = Effect::CouponIssue { coupon: "c".into(), user: "u".into(), serial: 3, remaining: 7 };
        assert_eq!(Operation::decode(&whole).unwrap().effect, effect);
    }
}
