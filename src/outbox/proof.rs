//! Whether the outbox continues what Postgres has.

use crate::domain::Position;
use crate::domain::change::Entry;
use crate::ledger::{self, PartitionRow};

/// Looks at the place in the outbox up to which Postgres has it: `there` is the entry at the applied position, `after` the next one, `last`
/// the newest one where there is neither. The entry at the applied position may be missing where the outbox was rebuilt; the next one's
/// predecessor then tells. An empty outbox has nothing to carry, and whatever comes must continue the row. Errors with what was found.
pub(super) fn continues(row: &PartitionRow, there: Option<Entry>, after: Option<Entry>, last: Option<Position>) -> Result<(), String> {
    if let Some(last) = last {
        return Err(format!(
            "redis went back: Postgres has everything up to {}, but the outbox ends at {last} without it; it must be rebuilt from Postgres",
            row.applied
        ));
    }
    let entries: Vec<Entry> = there.into_iter().chain(after).collect();
    ledger::apply::continuation(row, &entries).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outbox_continues_the_row_or_says_why_not() {
        let row = PartitionRow { epoch: 2, applied: Position::new(1, 3), last_op: "i:stock:3".into(), owner: None };
        let entry = |position, first_n, prev: &str, op: &str| {
            let operation = crate::domain::change::Operation::decode("0 incr | a 1 1").unwrap();
            Some(Entry { last: position, first_n, prev: prev.into(), op: op.into(), at_ms: 0, operations: vec![operation] })
        };
        let there = entry(Position::new(1, 3), 3, "i:stock:2", "i:stock:3");
        let after = entry(Position::new(2, 4), 4, "i:stock:3", "j:stock:1");
        assert_eq!(continues(&row, there.clone(), after.clone(), None), Ok(()));
        assert_eq!(continues(&row, there, None, None), Ok(()));
        assert_eq!(continues(&row, None, after.clone(), None), Ok(()), "rebuilt: the chain is proof enough");
        assert_eq!(continues(&row, None, None, None), Ok(()), "empty");
        assert!(continues(&row, None, None, Some(Position::new(1, 2))).unwrap_err().contains("went back"));
        assert!(continues(&row, entry(Position::new(1, 3), 3, "i:stock:2", "x:stock:1"), after, None).unwrap_err().contains("fork"));
        assert!(continues(&row, None, entry(Position::new(2, 9), 9, "j:stock:1", "j:stock:2"), None).unwrap_err().contains("gap"));
        let new = PartitionRow { epoch: 1, applied: Position::default(), last_op: "-".into(), owner: None };
        assert_eq!(continues(&new, None, entry(Position::new(1, 1), 1, "-", "i:stock:1"), None), Ok(()));
        assert!(continues(&new, None, entry(Position::new(1, 2), 2, "i:stock:1", "i:stock:2"), None).unwrap_err().contains("gap"));
    }
}
