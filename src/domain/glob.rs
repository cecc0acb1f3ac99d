//! Patterns, as Redis matches them: `* ? [abc] [^a] [a-z] \x`.

/// Whether the text matches. Takes at most pattern times text steps, however many stars there are; letters match in either case
/// where `any_case` is set.
pub fn matches(pattern: &[u8], text: &[u8], any_case: bool) -> bool {
    let mut steps = usize::MAX;
    matches_within(pattern, text, any_case, &mut steps).unwrap_or(false)
}

/// The same for so many steps, each a byte of the pattern that is looked at, which are taken off; `None` where they do not suffice.
pub fn matches_within(pattern: &[u8], text: &[u8], any_case: bool, steps: &mut usize) -> Option<bool> {
    let (mut p, mut t) = (0, 0);
    // Where to go on if what follows the last star does not fit: a star that took one byte more.
    let mut retry = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            if p + 1 == pattern.len() {
                return Some(true);
            }
            *steps = steps.checked_sub(1)?;
            retry = Some((p, t));
            p += 1;
            continue;
        }
        let (fits, width) = one(&pattern[p.min(pattern.len())..], text[t], any_case);
        *steps = steps.checked_sub(width)?;
        if fits {
            p += width;
            t += 1;
            continue;
        }
        let Some((star, taken)) = retry else { return Some(false) };
        retry = Some((star, taken + 1));
        p = star + 1;
        t = taken + 1;
    }
    Some(pattern[p.min(pattern.len())..].iter().all(|&b| b == b'*'))
}

/// What every text that matches begins with, as far as it is easily seen.
pub fn prefix(pattern: &[u8]) -> &[u8] {
    let end = pattern.iter().position(|byte| b"*?[\\".contains(byte)).unwrap_or(pattern.len());
    &pattern[..end]
}

/// Matches one byte against the front of the pattern; returns whether it fits and how much of the pattern that was.
fn one(pattern: &[u8], byte: u8, any_case: bool) -> (bool, usize) {
    let same = |a: u8| if any_case { a.eq_ignore_ascii_case(&byte) } else { a == byte };
    match pattern {
        [] => (false, 1),
        [b'?', ..] => (true, 1),
        [b'\\', escaped, ..] => (same(*escaped), 2),
        [b'[', rest @ ..] => {
            let (matched, width) = class(rest, byte, any_case);
            (matched, 1 + width)
        }
        [literal, ..] => (same(*literal), 1),
    }
}

/// Matches one byte against `...]`; returns whether it fits and the length, the bracket included. An open class ends the pattern.
fn class(rest: &[u8], byte: u8, any_case: bool) -> (bool, usize) {
    let fold = |b: u8| if any_case { b.to_ascii_lowercase() } else { b };
    let negated = rest.first() == Some(&b'^');
    let mut at = usize::from(negated);
    let mut found = false;
    loop {
        match &rest[at.min(rest.len())..] {
            [] => break,
            [b']', ..] => {
                at += 1;
                break;
            }
            [b'\\', escaped, ..] => {
                found |= fold(*escaped) == fold(byte);
                at += 2;
            }
            [low, b'-', high, ..] => {
                let (low, high) = (fold(*low).min(fold(*high)), fold(*low).max(fold(*high)));
                found |= (low..=high).contains(&fold(byte));
                at += 3;
            }
            [literal, ..] => {
                found |= fold(*literal) == fold(byte);
                at += 1;
            }
        }
    }
    (found != negated, at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_match_as_in_redis() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("h?llo", "hello", true),
            ("h?llo", "hllo", false),
            ("h*llo", "heeeello", true),
            ("h[ae]llo", "hallo", true),
            ("h[ae]llo", "hillo", false),
            ("h[^e]llo", "hallo", true),
            ("h[^e]llo", "hello", false),
            ("h[a-b]llo", "hbllo", true),
            ("h[b-a]llo", "hallo", true),
            (r"h\*llo", "h*llo", true),
            (r"h\*llo", "hello", false),
            ("maxmem*", "maxmemory-policy", true),
            ("a*b*c", "aXbXbXc", true),
            ("[a", "a", true),
            ("a", "", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes(), false), expected, "{pattern} {text}");
        }
        assert!(matches(b"MAX*", b"maxmemory", true));
        assert!(!matches(b"MAX*", b"maxmemory", false));
    }

    #[test]
    fn many_stars_take_no_exponential_time() {
        assert!(!matches("a*".repeat(100).as_bytes(), "a".repeat(99).as_bytes(), false));
        assert!(!matches(format!("{}b", "*a".repeat(100)).as_bytes(), "a".repeat(10_000).as_bytes(), false));
    }

    #[test]
    fn steps_are_counted_and_do_not_pass_what_was_allowed() {
        let taken = |pattern: &str, text: &str| {
            let mut steps = 1_000_000;
            matches_within(pattern.as_bytes(), text.as_bytes(), false, &mut steps).map(|matched| (matched, 1_000_000 - steps))
        };
        assert_eq!(
            taken("stock:*", &format!("stock:{}", "x".repeat(1_000))),
            Some((true, 6)),
            "what is behind the last star is not looked at"
        );
        assert_eq!(taken("stock:*", "coupon:x"), Some((false, 1)));
        assert_eq!(taken("[abc]", "b"), Some((true, 5)));
        let (pattern, text) = (format!("*{}b", "a".repeat(100)), "a".repeat(200));
        assert!(taken(&pattern, &text).is_some_and(|(matched, steps)| !matched && steps > 10_000));
        let mut few = 100;
        assert_eq!(matches_within(pattern.as_bytes(), text.as_bytes(), false, &mut few), None);
    }

    #[test]
    fn what_matches_begins_with_the_prefix() {
        for (pattern, expected) in [("abc", "abc"), ("ab*c", "ab"), ("a?c", "a"), ("a[b]", "a"), (r"a\*b", "a"), ("*", ""), ("", "")] {
            assert_eq!(prefix(pattern.as_bytes()), expected.as_bytes(), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn no_pattern_panics(pattern: Vec<u8>, text: Vec<u8>) {
            matches(&pattern, &text, true);
        }
    }
}
