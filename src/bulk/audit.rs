//! `holdfast audit`: whether the ledgers explain every number.

use std::io::Write;

use crate::ledger::audit::{Account, Audit};
use crate::ledger::{self, PgConnection};

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub products: u64,
    pub coupons: u64,
    pub differ: u64,
}

/// Compares every product and coupon with what the ledgers make of it, all at one moment; Holdfast may be selling. Writes a line for each that
/// differs, or for each at all where `all` is given. Errors with what went wrong, for people.
pub async fn audit(postgres_url: &str, all: bool, out: &mut impl Write) -> Result<Found, String> {
    let text = |error: ledger::Error| error.to_string();
    let mut connection: PgConnection = ledger::connect(postgres_url).await.map_err(text)?;
    let mut audit = Audit::take(&mut connection).await.map_err(text)?;
    let mut found = Found::default();
    let mut look = |accounts: &[Account]| {
        for account in accounts {
            let differs = !account.adds_up();
            found.differ += u64::from(differs);
            if all || differs {
                writeln!(out, "{}: {account}", if differs { "differs" } else { "ok" }).map_err(|error| error.to_string())?;
            }
        }
        Ok::<_, String>(accounts.len() as u64)
    };
    let (mut products, mut coupons) = (0, 0);
    let pages = audit.products().await.map_err(text)?;
    loop {
        match look(&audit.next_products(&pages).await.map_err(text)?)? {
            0 => break,
            count => products += count,
        }
    }
    let pages = audit.coupons().await.map_err(text)?;
    loop {
        match look(&audit.next_coupons(&pages).await.map_err(text)?)? {
            0 => break,
            count => coupons += count,
        }
    }
    audit.end().await.map_err(text)?;
    Ok(Found { products, coupons, ..found })
}
