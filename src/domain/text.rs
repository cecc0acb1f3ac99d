//! Any bytes as one word of printable ASCII, for the outbox and for Postgres, where raw bytes may not stand.

use std::fmt::Write as _;

/// The words between single spaces. They are short: `str::split` takes longer to begin to look for each than to find it.
pub fn words(line: &str) -> Words<'_> {
    Words(Some(line))
}

/// See [`words`]. What is not looked through yet.
#[derive(Clone, Debug)]
pub struct Words<'a>(Option<&'a str>);

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let rest = self.0?;
        let (word, rest) = match rest.bytes().position(|byte| byte == b' ') {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        self.0 = rest;
        Some(word)
    }
}

/// Writes bytes outside `!`..`~`, and `%` itself, as `%XX`.
pub fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if (b'!'..=b'~').contains(&byte) && byte != b'%' {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// Undoes [`escape`] for what was text. What is not UTF-8 is replaced.
pub fn unescape(text: &str) -> String {
    String::from_utf8_lossy(&unescape_bytes(text)).into_owned()
}

/// Undoes [`escape`]; a `%` that begins no byte stays as it is.
pub fn unescape_bytes(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        let digits = behind.get(..2).filter(|_| byte == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(escaped) => {
                bytes.push(escaped);
                rest = &behind[2..];
            }
            None => {
                bytes.push(byte);
                rest = behind;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_split() {
        for line in ["", " ", "a", "a b", " a  상품 b ", "0 decr | sku-1 -1 9"] {
            assert_eq!(words(line).collect::<Vec<_>>(), line.split(' ').collect::<Vec<_>>());
        }
    }

    #[test]
    fn escaping_leaves_one_printable_word_and_can_be_undone() {
        for text in ["r-1", "a b%\u{e9}", "", "100% sure\n"] {
            let escaped = escape(text.as_bytes());
            assert!(escaped.bytes().all(|b| (b'!'..=b'~').contains(&b)), "{escaped}");
            assert_eq!(unescape(&escaped), text);
        }
        assert_eq!(escape("a b%\u{e9}".as_bytes()), "a%20b%25%C3%A9");
        assert_eq!(unescape("50%"), "50%");
    }
}
