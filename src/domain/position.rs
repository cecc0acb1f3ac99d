//! A change's place in its partition.

use std::fmt;

/// `<epoch>-<n>`: n counts the accepted operations of a partition, across epochs; the epoch says under whose right to
/// write they were accepted. Ordered as operations took effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub epoch: u64,
    pub n: u64,
}

impl Position {
    pub const fn new(epoch: u64, n: u64) -> Self {
        Self { epoch, n }
    }

    /// `<epoch>-<n>`, without an allocation.
    pub fn text(self) -> PositionText {
        let (mut digits, mut text, mut len) = (itoa::Buffer::new(), [0; 41], 0);
        let mut put = |part: &[u8]| {
            text[len..len + part.len()].copy_from_slice(part);
            len += part.len();
        };
        put(digits.format(self.epoch).as_bytes());
        put(b"-");
        put(digits.format(self.n).as_bytes());
        PositionText { text, len }
    }

    /// Parses `<epoch>-<n>`, both strict decimals below 2^53.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let dash = bytes.iter().position(|&b| b == b'-')?;
        let number = |part| super::quantity::parse(part, 0, super::quantity::TOTAL_MAX).and_then(|n| u64::try_from(n).ok());
        Some(Self { epoch: number(&bytes[..dash])?, n: number(&bytes[dash + 1..])? })
    }
}

/// A position as it is written.
pub struct PositionText {
    text: [u8; 41],
    len: usize,
}

impl PositionText {
    pub fn as_bytes(&self) -> &[u8] {
        &self.text[..self.len]
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_order_by_epoch_then_n_and_round_trip() {
        let position = Position::parse(b"7-1042").unwrap();
        assert_eq!(position, Position::new(7, 1042));
        assert_eq!(position.to_string(), "7-1042");
        assert_eq!(position.text().as_bytes(), b"7-1042");
        assert_eq!(Position::new(u64::MAX, u64::MAX).text().as_bytes().len(), 41);
        assert!(position < Position::new(8, 1));
        for bad in ["", "-", "7", "7-", "-1", "7-1-2", "a-1", "7-01", "7-+1"] {
            assert_eq!(Position::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
