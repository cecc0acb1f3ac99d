//! The decoder of the outbox: its id, its fields, its lines. What it takes is counted right, and is the same once it is written and read again.
#![no_main]

use holdfast_fuzz::domain::change::{Entry, Operation};
use libfuzzer_sys::fuzz_target;

// Three lines, its id, `first` and `before`, and the lines of its changes.
fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(4, |byte| *byte == b'\n');
    let mut part = || parts.next().unwrap_or_default();
    let (id, first, before, changes) = (part(), part(), part(), part());
    let fields: [(&[u8], &[u8]); 6] =
        [(b"first", first), (b"prev", b"-"), (b"op", b"i:stock:1"), (b"at", b"1700000000123"), (b"before", before), (b"changes", changes)];
    if let Ok(entry) = Entry::decode(id, fields.into_iter()) {
        let counts: u64 = entry.lines().map(|(_, line)| line.count()).sum();
        assert_eq!(entry.first_n + counts, entry.last.n + 1);
        // Of a line that stands for thousands, the first will do.
        for (n, operation) in entry.each().take(2_000) {
            assert!((entry.first_n..=entry.last.n).contains(&n) && operation.count() == 1);
            assert!(operation.products().count() + usize::from(operation.coupon().is_some()) > 0 || operation.to_string().contains("cancel"));
        }
    }
    for line in String::from_utf8_lossy(changes).split('\n') {
        if let Ok(operation) = Operation::decode(line) {
            let written = operation.to_string();
            assert_eq!(Operation::decode(&written).as_ref(), Ok(&operation), "{line:?} was written as {written:?}");
        }
    }
});
