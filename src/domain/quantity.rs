//! Numbers of units.

/// The largest quantity that one command may name.
pub const QUANTITY_MAX: i64 = 1_000_000_000_000;

/// The largest total a product may reach: the last integer that Lua's doubles and JavaScript's numbers hold exactly.
pub const TOTAL_MAX: i64 = (1 << 53) - 1;

const _: () = assert!(QUANTITY_MAX < TOTAL_MAX);

/// Parses a strict decimal integer: digits only, no leading zero, sign, space or exponent. `None` where it is not one, or
/// is outside `min..=max`.
pub fn parse(bytes: &[u8], min: i64, max: i64) -> Option<i64> {
    let first = *bytes.first()?;
    if bytes.len() > 19 || (first == b'0' && bytes.len() > 1) {
        return None;
    }
    let mut value: i64 = 0;
    for &byte in bytes {
        if !byte.is_ascii_digit() {
            return None;
        }
        value = value.checked_mul(10)?.checked_add(i64::from(byte - b'0'))?;
    }
    (min..=max).contains(&value).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_strict_decimals_in_range_are_quantities() {
        assert_eq!(parse(b"1", 1, QUANTITY_MAX), Some(1));
        assert_eq!(parse(b"1000000000000", 1, QUANTITY_MAX), Some(QUANTITY_MAX));
        assert_eq!(parse(b"0", 0, QUANTITY_MAX), Some(0));
        for bad in [
            "0",
            "",
            "+1",
            " 1",
            "1 ",
            "1e3",
            "-1",
            "0x1",
            "01",
            "1.0",
            "1000000000001",
            "9223372036854775808",
            "99999999999999999999",
            "NaN",
            "１",
        ] {
            assert_eq!(parse(bad.as_bytes(), 1, QUANTITY_MAX), None, "{bad:?}");
        }
    }
}
