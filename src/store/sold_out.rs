//! What a sold-out product's buyers are told without asking Redis.
//!
//! When Redis has refused somebody for want of units, others who want as many are refused from a note of that, for some milliseconds. A
//! note only ever refuses, so it cannot oversell; it can be late in noticing new units, by its age at most. An operation of this sidecar
//! that may add units drops the note at once, and none is taken while such an operation is under way: so a client that adds units and
//! then takes some, in one pipeline, gets them. What carries a REQUEST is never answered from here, since Redis may remember its reply.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::Id;
use crate::limits;
use crate::sabotage::breaks;

/// See the module. Shared by the threads that serve clients.
pub struct SoldOut {
    /// How long a note counts; zero switches all of this off.
    lasts: Duration,
    notes: Mutex<Notes>,
    /// Whether any of them may refuse, so that what sells well needs no lock.
    some_refuse: AtomicBool,
}

type Notes = HashMap<Id, Note, foldhash::fast::RandomState>;

#[derive(Clone, Copy, Debug)]
enum Note {
    /// So many units were available when Redis was asked, as far as this process knows.
    Had { available: i64, until: Instant },
    /// So many operations that may add units are under way; all are over by then.
    MayRise { pending: u32, until: Instant },
    /// The last of them has been answered: what Redis was asked before that no longer counts.
    Rose { at: Instant },
}

impl SoldOut {
    /// `lasts`: how long a note counts; zero for never.
    pub fn new(lasts: Duration) -> Self {
        Self { lasts, notes: Mutex::default(), some_refuse: AtomicBool::new(false) }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody is refused from here.
    pub fn refuses_nobody(&self) -> bool {
        !self.some_refuse.load(Ordering::Relaxed)
    }

    /// What was available moments before `asked`, if it is less than `wanted`.
    pub fn refuses(&self, product: &Id, wanted: i64, asked: Instant) -> Option<i64> {
        if self.refuses_nobody() {
            return None;
        }
        match self.notes().get(product) {
            Some(Note::Had { available, until }) if *available < wanted && asked < *until => Some(*available),
            _ => None,
        }
    }

    /// Something that may add units of these products goes to Redis, and is over by `until`.
    pub fn may_rise<'a>(&self, products: impl Iterator<Item = &'a Id>, until: Instant) {
        if self.lasts.is_zero() || breaks("stale-notes") {
            return;
        }
        let (now, mut notes) = (Instant::now(), self.notes());
        for product in products {
            let note = match notes.get(product) {
                Some(Note::MayRise { pending, until: other }) if now < *other => {
                    Note::MayRise { pending: pending + 1, until: until.max(*other) }
                }
                _ => Note::MayRise { pending: 1, until },
            };
            // As many as there are operations under way, which the lanes bound.
            match notes.get_mut(product) {
                Some(known) => *known = note,
                None => _ = notes.insert(product.detached(), note),
            }
        }
    }

    /// One of these operations has been answered.
    pub fn rose<'a>(&self, products: impl Iterator<Item = &'a Id>) {
        if self.lasts.is_zero() || breaks("stale-notes") {
            return;
        }
        let mut notes = self.notes();
        for product in products {
            let note = match notes.get(product) {
                Some(Note::MayRise { pending, until }) if *pending > 1 => Note::MayRise { pending: pending - 1, until: *until },
                _ => Note::Rose { at: Instant::now() },
            };
            Self::put(&mut notes, product, note);
        }
    }

    /// Units of this product came back with an answer: what Redis was asked before that no longer counts.
    pub fn dropped(&self, product: &str) {
        if self.lasts.is_zero() {
            return;
        }
        let (product, mut notes) = (Id::from(product), self.notes());
        if !matches!(notes.get(&product), Some(Note::MayRise { .. })) {
            Self::put(&mut notes, &product, Note::Rose { at: Instant::now() });
        }
    }

    /// Redis, asked at `asked`, had so many units, too few for somebody.
    pub fn had(&self, product: &Id, available: i64, asked: Instant) {
        let now = Instant::now();
        let until = asked + self.lasts;
        if until <= now {
            return;
        }
        let mut notes = self.notes();
        let is_older = match notes.get(product) {
            Some(Note::MayRise { until, .. }) => now < *until,
            Some(Note::Rose { at }) => asked <= *at,
            Some(Note::Had { until: other, .. }) => until < *other,
            None => false,
        };
        if !is_older {
            Self::put(&mut notes, product, Note::Had { available, until });
            self.some_refuse.store(true, Ordering::Relaxed);
        }
    }

    /// Redis, asked at `asked`, had so many units of a product, or had no such product: what is noted of it is put right.
    pub fn saw(&self, product: &Id, available: Option<i64>, asked: Instant) {
        if self.refuses_nobody() {
            return;
        }
        let mut notes = self.notes();
        let Some(Note::Had { available: noted, until }) = notes.get_mut(product) else { return };
        if asked + self.lasts < *until {
            return;
        }
        match available {
            Some(available) => (*noted, *until) = (available, asked + self.lasts),
            None => _ = notes.remove(product),
        }
    }

    /// Forgets what refuses.
    pub fn clear(&self) {
        let mut notes = self.notes();
        notes.retain(|_, note| !matches!(note, Note::Had { .. }));
        self.some_refuse.store(false, Ordering::Relaxed);
    }

    /// Removes what no longer counts. Called now and then.
    pub fn purge(&self) {
        let (now, lasts, mut notes) = (Instant::now(), self.lasts, self.notes());
        notes.retain(|_, note| match note {
            Note::Had { until, .. } | Note::MayRise { until, .. } => now < *until,
            Note::Rose { at } => now < *at + lasts,
        });
        if notes.is_empty() {
            notes.shrink_to(limits::SOLD_OUT_NOTES_KEPT);
        }
        let some_refuse = notes.values().any(|note| matches!(note, Note::Had { .. }));
        self.some_refuse.store(some_refuse, Ordering::Relaxed);
    }

    fn put(notes: &mut Notes, product: &Id, note: Note) {
        if let Some(known) = notes.get_mut(product) {
            *known = note;
        } else if notes.len() < limits::SOLD_OUT_NOTES_MAX {
            notes.insert(product.detached(), note);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LASTS: Duration = Duration::from_secs(60);

    #[test]
    fn a_refusal_is_repeated_to_those_who_want_as_many_and_for_its_time_only() {
        let (notes, now, product) = (SoldOut::new(LASTS), Instant::now(), Id::from("a"));
        assert_eq!(notes.refuses(&product, 1, Instant::now()), None);
        notes.had(&product, 2, now);
        assert_eq!(notes.refuses(&product, 3, Instant::now()), Some(2));
        assert_eq!(notes.refuses(&product, 2, Instant::now()), None, "it may fit");
        assert_eq!(notes.refuses(&Id::from("b"), 3, Instant::now()), None);
        notes.clear();
        assert_eq!(notes.refuses(&product, 3, Instant::now()), None);
        let short = SoldOut::new(Duration::from_millis(1));
        short.had(&product, 0, Instant::now());
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(short.refuses(&product, 1, Instant::now()), None, "it is over");
    }

    #[test]
    fn what_may_add_units_drops_the_note_and_keeps_older_answers_out() {
        let (notes, now, product) = (SoldOut::new(LASTS), Instant::now(), Id::from("a"));
        notes.had(&product, 0, now);
        notes.may_rise([&product].into_iter(), now + LASTS);
        notes.may_rise([&product].into_iter(), now);
        assert_eq!(notes.refuses(&product, 1, Instant::now()), None);
        notes.had(&product, 0, now);
        assert_eq!(notes.refuses(&product, 1, Instant::now()), None, "the answer may be from before");
        notes.rose([&product].into_iter());
        notes.had(&product, 0, Instant::now());
        assert_eq!(notes.refuses(&product, 1, Instant::now()), None, "another one is under way");
        notes.rose([&product].into_iter());
        notes.had(&product, 0, now);
        assert_eq!(notes.refuses(&product, 1, Instant::now()), None, "the answer is from before");
        std::thread::sleep(Duration::from_millis(1));
        notes.had(&product, 0, Instant::now());
        assert_eq!(notes.refuses(&product, 1, Instant::now()), Some(0));
        let over = SoldOut::new(LASTS);
        over.may_rise([&product].into_iter(), now);
        over.had(&product, 0, now);
        assert_eq!(over.refuses(&product, 1, Instant::now()), Some(0));
    }

    #[test]
    fn switched_off_it_knows_nothing() {
        let (notes, now, product) = (SoldOut::new(Duration::ZERO), Instant::now(), Id::from("a"));
        notes.had(&product, 0, now);
        notes.may_rise([&product].into_iter(), now + LASTS);
        assert!(notes.notes().is_empty());
    }

    #[test]
    fn what_was_seen_since_puts_the_note_right() {
        let (notes, now, product) = (SoldOut::new(LASTS), Instant::now(), Id::from("a"));
        notes.had(&product, 5, now);
        notes.saw(&product, Some(0), now);
        assert_eq!(notes.refuses(&product, 10, Instant::now()), Some(0));
        notes.saw(&product, Some(100), now);
        assert_eq!(notes.refuses(&product, 10, Instant::now()), None);
        notes.had(&product, 3, now + Duration::from_secs(1));
        notes.saw(&product, Some(100), now);
        assert_eq!(notes.refuses(&product, 10, Instant::now()), Some(3), "what was asked before does not count");
        notes.saw(&product, None, now + Duration::from_secs(2));
        assert_eq!(notes.refuses(&product, 10, Instant::now()), None, "it was deleted");
    }

    #[test]
    fn it_is_bounded_purged_and_never_forgets_what_may_rise() {
        let (notes, now) = (SoldOut::new(LASTS), Instant::now());
        let id = |n: usize| Id::from(format!("p-{n}").as_str());
        (0..limits::SOLD_OUT_NOTES_MAX + 5).for_each(|n| notes.had(&id(n), 0, now));
        assert_eq!(notes.notes().len(), limits::SOLD_OUT_NOTES_MAX);
        let rising = id(limits::SOLD_OUT_NOTES_MAX + 7);
        notes.may_rise([&rising].into_iter(), now + LASTS);
        notes.clear();
        notes.had(&rising, 0, now);
        assert_eq!((notes.refuses(&rising, 1, Instant::now()), notes.notes().len()), (None, 1));
        let short = SoldOut::new(Duration::from_millis(1));
        short.had(&rising, 0, Instant::now());
        short.may_rise([&id(1)].into_iter(), Instant::now());
        std::thread::sleep(Duration::from_millis(2));
        assert!(!short.refuses_nobody());
        short.purge();
        assert!(short.refuses_nobody() && short.notes().is_empty());
    }

    #[test]
    fn what_may_rise_refuses_nobody() {
        let (notes, now, product) = (SoldOut::new(LASTS), Instant::now(), Id::from("a"));
        notes.may_rise([&product].into_iter(), now + LASTS);
        assert!(notes.refuses_nobody());
        notes.purge();
        notes.rose([&product].into_iter());
        assert!(notes.refuses_nobody());
        notes.had(&product, 0, Instant::now() + Duration::from_millis(1));
        assert!(!notes.refuses_nobody());
        notes.purge();
        assert!(!notes.refuses_nobody());
    }
}
