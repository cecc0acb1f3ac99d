//! The keys of one script call, close together.

/// Keys in their order.
#[derive(Debug, Default)]
pub struct KeyList {
    text: String,
    ends: Vec<usize>,
}

impl KeyList {
    /// Appends the key that these parts make.
    pub fn push(&mut self, parts: &[&str]) {
        parts.iter().for_each(|part| self.text.push_str(part));
        self.ends.push(self.text.len());
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).map(|i| &self.text[if i == 0 { 0 } else { self.ends[i - 1] }..self.ends[i]])
    }
}
