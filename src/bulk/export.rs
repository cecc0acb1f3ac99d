//! `holdfast export`: every product with its units, as import reads them.

use std::io::Write;

use super::csv;
use crate::domain::Position;
use crate::ledger;
use crate::ledger::refill::Snapshot;

/// Writes every product, as Redis has it at one position. Returns how many there are, and the position: what was sold after it is not in it.
/// Errors with what went wrong, for people.
pub async fn export(postgres_url: &str, partition: u32, out: &mut impl Write) -> Result<(u64, Position), String> {
    let text = |error: ledger::Error| error.to_string();
    let mut connection = ledger::connect(postgres_url).await.map_err(text)?;
    let mut snapshot = Snapshot::take(&mut connection, partition).await.map_err(text)?;
    let mut count = 0;
    let write = |error: std::io::Error| error.to_string();
    writeln!(out, "{}", csv::HEADER).map_err(write)?;
    let pages = snapshot.products().await.map_err(text)?;
    loop {
        let products: Vec<ledger::refill::Product> = snapshot.next(&pages).await.map_err(text)?;
        if products.is_empty() {
            break;
        }
        for product in &products {
            let low = product.low.map_or_else(String::new, |low| low.to_string());
            writeln!(out, "{},{},{low}", csv::field(&product.product), snapshot.expected(product)).map_err(write)?;
        }
        count += products.len() as u64;
    }
    out.flush().map_err(write)?;
    let applied = snapshot.applied;
    snapshot.end().await.map_err(text)?;
    Ok((count, applied))
}
