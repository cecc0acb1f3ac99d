//! Writes the msgpack that a script unpacks.

use rmp::encode;

/// A buffer of msgpack. Writing into memory cannot fail, and no length here comes near the format's 2^32.
#[derive(Default)]
pub struct Pack(Vec<u8>);

impl Pack {
    /// An array of `len` elements, which are written next.
    pub fn array(&mut self, len: usize) -> &mut Self {
        let _ = encode::write_array_len(&mut self.0, u32::try_from(len).unwrap_or(u32::MAX));
        self
    }

    pub fn text(&mut self, text: &str) -> &mut Self {
        let _ = encode::write_str(&mut self.0, text);
        self
    }

    pub fn integer(&mut self, integer: i64) -> &mut Self {
        // One byte, as nearly all are.
        match i8::try_from(integer) {
            Ok(small @ -32..) => self.0.push(small.cast_unsigned()),
            _ => _ = encode::write_sint(&mut self.0, integer),
        }
        self
    }

    pub fn count(&mut self, count: usize) -> &mut Self {
        self.integer(i64::try_from(count).unwrap_or(i64::MAX))
    }

    /// `false`, for what is not there: Lua's nil would cut an array short.
    pub fn no(&mut self) -> &mut Self {
        let _ = encode::write_bool(&mut self.0, false);
        self
    }

    pub fn is(&mut self, so: bool) -> &mut Self {
        let _ = encode::write_bool(&mut self.0, so);
        self
    }

    /// Text whose bytes are known to be UTF-8.
    pub fn bytes(&mut self, text: &[u8]) -> &mut Self {
        let _ = encode::write_str_len(&mut self.0, u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(text);
        self
    }

    /// An array of `len` elements that were written before their number was known.
    pub fn array_of(len: usize, elements: Self) -> Self {
        let mut all = Self(Vec::with_capacity(elements.0.len() + 5));
        all.array(len).0.extend_from_slice(&elements.0);
        all
    }

    /// Elements of an array that were written apart.
    pub fn append(&mut self, elements: Self) -> &mut Self {
        self.0.extend_from_slice(&elements.0);
        self
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}
