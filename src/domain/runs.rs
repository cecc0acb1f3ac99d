//! Which operations of a batch one line stands for that sums up a product's.

use smallvec::SmallVec;

/// What a line of the outbox, and a row of the ledger, stands for where the operation has no identity of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Grain {
    /// One operation.
    #[default]
    Operation,
    /// All that one batch did to one product.
    Batch,
}

/// Neighbours in their batch that moved the product by the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    last: u32,
    delta: i64,
}

/// The places in their batch of operations on one product, in order, and by how much each moved it. Written `0-15:-1,17:-3`: those at 0
/// to 15 took 1 unit each, the one at 17 took 3. Never empty where it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs(SmallVec<[Run; 1]>);

impl Runs {
    /// Reads what [`Display`](std::fmt::Display) writes; `None` for anything else, or where its sum passes what a 64-bit integer holds.
    pub fn parse(text: &str) -> Option<Self> {
        let run = |text: &str| {
            let (places, delta) = text.split_once(':')?;
            let (first, last) = places.split_once('-').unwrap_or((places, places));
            let run = Run { first: first.parse().ok()?, last: last.parse().ok()?, delta: delta.parse().ok()? };
            (run.first <= run.last).then_some(run)
        };
        let runs = text.split(',').map(run).collect::<Option<SmallVec<[Run; 1]>>>()?;
        let in_order = runs.iter().zip(runs.iter().skip(1)).all(|(run, next)| run.last < next.first);
        let runs = Self(runs);
        let total = runs.0.iter().try_fold(0_i64, |total, run| total.checked_add(run.delta.checked_mul(run.length())?));
        (in_order && total.is_some()).then_some(runs)
    }

    /// Takes in the operation at place `k`, behind all of those that are in it, which moved the product by `delta`.
    pub fn push(&mut self, k: u32, delta: i64) {
        match self.0.last_mut() {
            Some(run) if run.delta == delta && run.last.checked_add(1) == Some(k) => run.last = k,
            _ => self.0.push(Run { first: k, last: k, delta }),
        }
    }

    /// The first place.
    pub fn first(&self) -> u32 {
        self.0.first().map_or(0, |run| run.first)
    }

    /// How many operations there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|run| u64::from(run.last - run.first) + 1).sum()
    }

    /// By how much all of them moved the product.
    pub fn total(&self) -> i64 {
        self.0.iter().map(|run| run.delta * run.length()).sum()
    }

    /// The place of each, and by how much it moved the product.
    pub fn each(&self) -> impl Iterator<Item = (u32, i64)> {
        self.0.iter().flat_map(|run| (run.first..=run.last).map(|k| (k, run.delta)))
    }
}

impl Run {
    fn length(&self) -> i64 {
        i64::from(self.last - self.first) + 1
    }
}

impl std::fmt::Display for Runs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, Run { first, last, delta }) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match first == last {
                true => write!(f, "{first}:{delta}")?,
                false => write!(f, "{first}-{last}:{delta}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_is_written_and_read() {
        let mut runs = Runs::default();
        for (k, delta) in [(0, -1), (1, -1), (2, -3), (4, -3), (5, 7), (6, 7)] {
            runs.push(k, delta);
        }
        assert_eq!(runs.to_string(), "0-1:-1,2:-3,4:-3,5-6:7");
        assert_eq!(Runs::parse(&runs.to_string()), Some(runs.clone()));
        assert_eq!((runs.first(), runs.count(), runs.total()), (0, 6, 6));
        assert_eq!(runs.each().collect::<Vec<_>>(), [(0, -1), (1, -1), (2, -3), (4, -3), (5, 7), (6, 7)]);
    }

    #[test]
    fn nothing_else_is_read() {
        for bad in ["", "1", ":1", "1:", "x:1", "1-0:1", "1:1,1:1", "2:1,1:1", "1-3:1,3:1", "1:1,", "-1:1", "0-4:9223372036854775807"] {
            assert_eq!(Runs::parse(bad), None, "{bad:?}");
        }
    }
}
