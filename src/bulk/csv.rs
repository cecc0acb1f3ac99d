//! Products as lines of a CSV file: `product,available,low`, in the order that a first line may give. Pure.

use std::borrow::Cow;

use crate::command::spec::OPTION_WORDS;
use crate::domain::Id;
use crate::domain::quantity::{self, QUANTITY_MAX};

/// The longest line in bytes: an id twice as long as its bytes, where each is a quote, and two numbers.
pub const LINE_MAX: usize = 512;

/// The columns as export writes them.
pub const HEADER: &str = "product,available,low";

/// A product to be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub product: Id,
    pub available: i64,
    /// Threshold of the low-stock event.
    pub low: Option<i64>,
}

/// Which field has what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    product: usize,
    available: usize,
    low: Option<usize>,
}

impl Default for Columns {
    fn default() -> Self {
        Self { product: 0, available: 1, low: Some(2) }
    }
}

impl Columns {
    /// Reads a first line that names the columns; `None` where it is a product's. Others than those known are passed over. Errors with what is
    /// missing.
    pub fn of_header(line: &str) -> Result<Option<Self>, String> {
        let fields = fields(line)?;
        let place = |name: &str| fields.iter().position(|field| field.trim().eq_ignore_ascii_case(name));
        let Some(product) = place("product") else { return Ok(None) };
        let Some(available) = place("available") else { return Err("the header names no column 'available'".to_owned()) };
        Ok(Some(Self { product, available, low: place("low") }))
    }

    /// Reads a product's line; errors with what is wrong with it.
    pub fn row(&self, line: &str) -> Result<Row, String> {
        let fields = fields(line)?;
        let field = |place: usize| fields.get(place).map(AsRef::as_ref);
        let product = field(self.product).unwrap_or_default();
        let is_word = OPTION_WORDS.iter().any(|word| word.eq_ignore_ascii_case(product));
        if !Id::is_valid(product.as_bytes()) || is_word {
            return Err(
                "invalid product id: 1 to 128 bytes of UTF-8 without spaces, control characters, '{' or '}', and no option word".into()
            );
        }
        let number = |name: &str, text: &str| {
            quantity::parse(text.as_bytes(), 0, QUANTITY_MAX)
                .ok_or_else(|| format!("invalid {name} '{}': a whole number from 0 to {QUANTITY_MAX}", shown(text)))
        };
        let available = number("available", field(self.available).unwrap_or_default())?;
        let low = self.low.and_then(field).filter(|low| !low.is_empty());
        Ok(Row { product: Id::from(product), available, low: low.map(|low| number("low", low)).transpose()? })
    }
}

/// A few characters of what cannot be used.
fn shown(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_debug).collect()
}

/// A line's fields. One may be quoted, and then has its quotes twice.
fn fields(line: &str) -> Result<Vec<Cow<'_, str>>, String> {
    let mut fields = Vec::with_capacity(3);
    let mut rest = line;
    loop {
        let after = if let Some(quoted) = rest.strip_prefix('"') {
            let mut end = 0;
            loop {
                let Some(quote) = quoted[end..].find('"') else { return Err("a quote is not closed".to_owned()) };
                end += quote;
                if !quoted[end + 1..].starts_with('"') {
                    break;
                }
                end += 2;
            }
            let field = &quoted[..end];
            fields.push(if field.contains('"') { Cow::Owned(field.replace("\"\"", "\"")) } else { Cow::Borrowed(field) });
            &quoted[end + 1..]
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            fields.push(Cow::Borrowed(&rest[..end]));
            &rest[end..]
        };
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None if after.is_empty() => return Ok(fields),
            None => return Err("something stands between a closing quote and the next comma".to_owned()),
        }
    }
}

/// A field as it has to be written.
pub fn field(text: &str) -> Cow<'_, str> {
    match text.contains(['"', ',']) {
        true => Cow::Owned(format!("\"{}\"", text.replace('"', "\"\""))),
        false => Cow::Borrowed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(product: &str, available: i64, low: Option<i64>) -> Row {
        Row { product: Id::from(product), available, low }
    }

    #[test]
    fn every_id_is_read_as_it_was_written() {
        for id in ["sku-1", "a,b", "\"", "\"\"x,\"", "tasse-größe", ",", "a\"b"] {
            let line = format!("{},7,", field(id));
            assert_eq!(Columns::default().row(&line).unwrap(), row(id, 7, None), "{line}");
        }
        assert_eq!(Columns::default().row("a,0,3").unwrap(), row("a", 0, Some(3)));
        assert_eq!(Columns::default().row("a,5").unwrap(), row("a", 5, None));
    }

    #[test]
    fn a_header_gives_the_order_and_may_name_others() {
        let columns = Columns::of_header("name,Available,product").unwrap().unwrap();
        assert_eq!(columns.row("Mug,4,sku-1").unwrap(), row("sku-1", 4, None));
        assert_eq!(Columns::of_header(HEADER).unwrap(), Some(Columns::default()));
        assert_eq!(Columns::of_header("sku-1,4").unwrap(), None);
        assert!(Columns::of_header("product,units").is_err());
    }

    #[test]
    fn what_is_wrong_with_a_line_is_said() {
        for (line, why) in [
            ("", "invalid product id"),
            ("a b,1", "invalid product id"),
            ("ack,1", "invalid product id"),
            ("a", "invalid available ''"),
            ("a,-1", "invalid available '-1'"),
            ("a, 1", "invalid available ' 1'"),
            ("a,1000000000001", "invalid available"),
            ("a,1,x", "invalid low 'x'"),
            ("\"a,1", "a quote is not closed"),
            ("\"a\"b,1", "something stands between"),
        ] {
            let error = Columns::default().row(line).unwrap_err();
            assert!(error.starts_with(why), "{line}: {error}");
        }
    }
}
