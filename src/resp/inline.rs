//! Requests typed by hand or sent by probes: `PING\r\n`, with Redis's quoting.

use bytes::{BufMut as _, Bytes, BytesMut};

/// Splits a line into words as Redis does: `"..."` with `\n \r \t \b \a \xHH` escapes, `'...'` with `\'`, a closing quote ends the
/// word. `None` where quotes are unbalanced.
pub fn split(line: &[u8]) -> Option<Vec<Bytes>> {
    let mut words = Vec::new();
    let mut rest = line;
    loop {
        rest = rest.trim_ascii_start();
        if rest.is_empty() || rest[0] == 0 {
            return Some(words);
        }
        let (word, after) = word(rest)?;
        words.push(word);
        rest = after;
    }
}

/// Takes one word off the front; the line is not empty and does not start with a space.
fn word(line: &[u8]) -> Option<(Bytes, &[u8])> {
    let mut word = BytesMut::new();
    let mut at = 0;
    while let Some(&byte) = line.get(at) {
        match byte {
            b'"' | b'\'' => {
                at = quoted(line, at + 1, byte, &mut word)?;
                if line.get(at).is_some_and(|next| !next.is_ascii_whitespace()) {
                    return None;
                }
                break;
            }
            b' ' | b'\n' | b'\r' | b'\t' | 0 => break,
            _ => {
                word.put_u8(byte);
                at += 1;
            }
        }
    }
    Some((word.freeze(), &line[at..]))
}

/// Reads up to the closing quote and returns the place behind it.
fn quoted(line: &[u8], mut at: usize, quote: u8, word: &mut BytesMut) -> Option<usize> {
    loop {
        let byte = *line.get(at)?;
        if byte == quote {
            return Some(at + 1);
        }
        let escaped = line.get(at + 1).copied();
        match (byte, escaped) {
            (b'\\', Some(b'\'')) if quote == b'\'' => {
                word.put_u8(b'\'');
                at += 2;
            }
            (b'\\', Some(escaped)) if quote == b'"' => {
                if let Some(hex) = line.get(at + 2..at + 4).filter(|_| escaped == b'x').and_then(hex) {
                    word.put_u8(hex);
                    at += 4;
                    continue;
                }
                word.put_u8(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 8,
                    b'a' => 7,
                    other => other,
                });
                at += 2;
            }
            _ => {
                word.put_u8(byte);
                at += 1;
            }
        }
    }
}

fn hex(digits: &[u8]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(digits[0])? << 4 | digit(digits[1])?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Option<Vec<String>> {
        Some(split(line.as_bytes())?.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect())
    }

    #[test]
    fn words_are_split_as_redis_splits_them() {
        let rows: &[(&str, &[&str])] = &[
            ("", &[]),
            ("  \t ", &[]),
            ("PING", &["PING"]),
            ("  set  a \t b ", &["set", "a", "b"]),
            (r#"echo "a b\n\x41\q""#, &["echo", "a b\nAq"]),
            (r"echo 'it\'s \n'", &["echo", r"it's \n"]),
            (r#"echo "" ''"#, &["echo", "", ""]),
            (r#"a"b c""#, &["ab c"]),
            (r#""\xZZ""#, &["xZZ"]),
        ];
        for (line, expected) in rows {
            assert_eq!(words(line).as_deref(), Some(expected.iter().map(ToString::to_string).collect::<Vec<_>>().as_slice()), "{line}");
        }
    }

    #[test]
    fn unbalanced_quotes_are_refused() {
        for line in [r#"echo "a"#, "echo 'a", r#"echo "a"b"#, "'a'b", r#"""#, r#""\"#, r#""\x4"#] {
            assert_eq!(words(line), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn no_line_panics(line: Vec<u8>) {
            let _ = split(&line);
        }
    }
}
