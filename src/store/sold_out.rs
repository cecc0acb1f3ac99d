//! What a sold-out product's buyers are told without asking Redis.
//!
//! When Redis has refused somebody for want of units, others who want as many are refused from a note of that, for some milliseconds. A
//! note only ever refuses, so it cannot oversell; it can be late in noticing new units, by its age at most. An operation of this sidecar
//! that may add units drops the note at once, and none is taken while such an operation is under way: so a client that adds units and
//! then takes some, in one pipeline, gets them. What carries a REQUEST is never answered from here, since Redis may remember its reply.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::domain::Id;
use crate::limits;

/// See the module. Used by one thread only.
pub struct SoldOut {
    /// How long a note counts; zero switches all of this off.
    lasts: Duration,
    notes: RefCell<HashMap<Id, Note, foldhash::fast::RandomState>>,
}

#[derive(Clone, Copy, Debug)]
enum Note {
    /// So many units were available when Redis was asked.
    Had { available: i64, until: Instant },
    /// Something that may add units is under way.
    MayRise { until: Instant },
}

impl Note {
    const fn until(self) -> Instant {
        match self {
            Self::Had { until, .. } | Self::MayRise { until } => until,
        }
    }
}

impl SoldOut {
    /// `lasts`: how long a note counts; zero for never.
    pub fn new(lasts: Duration) -> Self {
        Self { lasts, notes: RefCell::default() }
    }

    /// What was available moments ago, if it is less than `wanted`.
    pub fn refuses(&self, product: &Id, wanted: i64) -> Option<i64> {
        let notes = self.notes.borrow();
        if notes.is_empty() {
            return None;
        }
        match notes.get(product) {
            Some(Note::Had { available, until }) if *available < wanted && Instant::now() < *until => Some(*available),
            _ => None,
        }
    }

    /// Something that may add units of these products goes to Redis, and is over by `until`.
    pub fn may_rise<'a>(&self, products: impl Iterator<Item = &'a Id>, until: Instant) {
        if self.lasts.is_zero() {
            return;
        }
        for product in products {
            let until = match self.notes.borrow().get(product) {
                Some(Note::MayRise { until: other }) => until.max(*other),
                _ => until,
            };
            self.put(product, Note::MayRise { until });
        }
    }

    /// Redis, asked at `asked`, had so many units, too few for somebody.
    pub fn had(&self, product: &Id, available: i64, asked: Instant) {
        let now = Instant::now();
        let until = asked + self.lasts;
        let may_rise = || matches!(self.notes.borrow().get(product), Some(Note::MayRise { until }) if now < *until);
        if now < until && !may_rise() {
            self.put(product, Note::Had { available, until });
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.notes.borrow_mut().clear();
    }

    fn put(&self, product: &Id, note: Note) {
        let mut notes = self.notes.borrow_mut();
        if let Some(known) = notes.get_mut(product) {
            *known = note;
            return;
        }
        if notes.len() >= limits::SOLD_OUT_NOTES_MAX {
            let now = Instant::now();
            notes.retain(|_, note| now < note.until());
            if notes.len() >= limits::SOLD_OUT_NOTES_MAX {
                match note {
                    // Refusing less is always right.
                    Note::Had { .. } => return,
                    // This must be known. Without notes that refuse there is room, for there are never so many operations under way.
                    Note::MayRise { .. } => notes.retain(|_, note| matches!(note, Note::MayRise { .. })),
                }
            }
        }
        notes.insert(product.detached(), note);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LASTS: Duration = Duration::from_secs(60);

    #[test]
    fn a_refusal_is_repeated_to_those_who_want_as_many_and_for_its_time_only() {
        let (notes, now, product) = (SoldOut::new(LASTS), Instant::now(), Id::from("a"));
        assert_eq!(notes.refuses(&product, 1), None);
        notes.had(&product, 2, now);
        assert_eq!(notes.refuses(&product, 3), Some(2));
        assert_eq!(notes.refuses(&product, 2), None, "it may fit");
        assert_eq!(notes.refuses(&Id::from("b"), 3), None);
        notes.clear();
        assert_eq!(notes.refuses(&product, 3), None);
        let short = SoldOut::new(Duration::from_millis(1));
        short.had(&product, 0, Instant::now());
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(short.refuses(&product, 1), None, "it is over");
    }

    #[test]
    fn what_may_add_units_drops_the_note_and_keeps_older_answers_out() {
        let (notes, now, product) = (SoldOut::new(LASTS), Instant::now(), Id::from("a"));
        notes.had(&product, 0, now);
        notes.may_rise([&product].into_iter(), now + LASTS);
        notes.may_rise([&product].into_iter(), now);
        assert_eq!(notes.refuses(&product, 1), None);
        notes.had(&product, 0, now);
        assert_eq!(notes.refuses(&product, 1), None, "the answer may be from before");
        let over = SoldOut::new(LASTS);
        over.may_rise([&product].into_iter(), now);
        over.had(&product, 0, now);
        assert_eq!(over.refuses(&product, 1), Some(0));
    }

    #[test]
    fn switched_off_it_knows_nothing() {
        let (notes, now, product) = (SoldOut::new(Duration::ZERO), Instant::now(), Id::from("a"));
        notes.had(&product, 0, now);
        notes.may_rise([&product].into_iter(), now + LASTS);
        assert!(notes.notes.borrow().is_empty());
    }

    #[test]
    fn it_is_bounded_and_never_forgets_what_may_rise() {
        let (notes, now) = (SoldOut::new(LASTS), Instant::now());
        let id = |n: usize| Id::from(format!("p-{n}").as_str());
        (0..limits::SOLD_OUT_NOTES_MAX + 5).for_each(|n| notes.had(&id(n), 0, now));
        assert_eq!(notes.notes.borrow().len(), limits::SOLD_OUT_NOTES_MAX);
        notes.may_rise([&id(limits::SOLD_OUT_NOTES_MAX + 7)].into_iter(), now + LASTS);
        notes.had(&id(limits::SOLD_OUT_NOTES_MAX + 7), 0, now);
        assert_eq!(notes.refuses(&id(limits::SOLD_OUT_NOTES_MAX + 7), 1), None);
    }
}
