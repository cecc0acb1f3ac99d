//! Reads a write script's answer: a flat array of words and values.

use redis::Value;

use super::Error;

/// The values of a script's answer, taken one after the other.
pub struct Words(std::vec::IntoIter<Value>);

impl Words {
    /// An array's elements; anything else is not an answer of ours.
    pub fn new(value: Value) -> Result<Self, Error> {
        match value {
            Value::Array(values) => Ok(Self(values.into_iter())),
            other => Err(Error::Unexpected(format!("{other:?}"))),
        }
    }

    fn take(&mut self) -> Result<Value, Error> {
        self.0.next().ok_or_else(|| Error::Unexpected("the script's answer is too short".into()))
    }

    /// Takes the next value if it is this word.
    pub fn takes(&mut self, word: &str) -> bool {
        let is_it = matches!(self.0.as_slice().first(), Some(Value::BulkString(next)) if next == word.as_bytes());
        is_it && self.0.next().is_some()
    }

    /// The next value as text.
    pub fn text(&mut self) -> Result<String, Error> {
        match self.take()? {
            Value::BulkString(bytes) => String::from_utf8(bytes).map_err(|_| Error::Unexpected("text that is not UTF-8".into())),
            Value::SimpleString(text) => Ok(text),
            other => Err(Error::Unexpected(format!("{other:?} where text belongs"))),
        }
    }

    /// The next value as an integer, `None` for nil.
    pub fn maybe_integer(&mut self) -> Result<Option<i64>, Error> {
        match self.take()? {
            Value::Int(integer) => Ok(Some(integer)),
            Value::Nil => Ok(None),
            Value::BulkString(bytes) => {
                let integer = std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok());
                integer
                    .map(Some)
                    .ok_or_else(|| Error::Unexpected(format!("{:?} where an integer belongs", String::from_utf8_lossy(&bytes))))
            }
            other => Err(Error::Unexpected(format!("{other:?} where an integer belongs"))),
        }
    }

    /// The next value as an integer.
    pub fn integer(&mut self) -> Result<i64, Error> {
        self.maybe_integer()?.ok_or_else(|| Error::Unexpected("nil where an integer belongs".into()))
    }

    /// The next value as text, `None` for nil.
    pub fn maybe_text(&mut self) -> Result<Option<String>, Error> {
        match self.take()? {
            Value::Nil => Ok(None),
            Value::BulkString(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            other => Err(Error::Unexpected(format!("{other:?} where text belongs"))),
        }
    }

    /// The next value as it is.
    pub fn raw(&mut self) -> Result<Value, Error> {
        self.take()
    }
}
