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
        let _ = encode::write_sint(&mut self.0, integer);
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

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}
