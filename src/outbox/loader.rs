//! Finds in Postgres the products and the coupons that Redis does not have, when they are first used.
//!
//! What Redis does not have cannot change meanwhile. So what Postgres has of it, once Postgres has every change up to where it
//! was missed, is what Redis has to be given; the script gives it only if it is still absent, and was not deleted since.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::domain::Id;
use crate::domain::coupon::CouponTerms;
use crate::ledger::coupon::HeldRow;
use crate::ledger::{self, PgConnection};
use crate::limits;
use crate::store::Partition;
use crate::store::coupon::{Held, field};
use crate::store::partition::{CouponUser, Found, FoundCoupon, LoadRequest, Wanted};

/// See the module.
pub struct Loader {
    partition: Arc<Partition>,
    postgres_url: String,
    requests: mpsc::Receiver<LoadRequest>,
    connection: Option<PgConnection>,
}

impl Loader {
    pub fn new(partition: Arc<Partition>, postgres_url: &str, requests: mpsc::Receiver<LoadRequest>) -> Self {
        Self { partition, postgres_url: postgres_url.to_owned(), requests, connection: None }
    }

    /// Answers until `cancel`.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut applied = self.partition.applied.subscribe();
        let (mut batch, mut waiting) = (Vec::new(), Vec::new());
        // Whoever asks first has no time to wait for a connection.
        self.connection = ledger::connect(&self.postgres_url).await.ok();
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                count = self.requests.recv_many(&mut batch, limits::LOAD_BATCH_MAX), if waiting.len() < limits::LOADS_MAX => {
                    if count == 0 {
                        return;
                    }
                    let now = Instant::now();
                    waiting.extend(batch.drain(..).map(|request| (now, request)));
                }
                // The sender lives as long as the partition.
                _ = applied.changed(), if !waiting.is_empty() => {}
                () = tokio::time::sleep(limits::LOAD_WITHIN), if !waiting.is_empty() => {}
            }
            // Who asked has given up by the end of this time.
            waiting.retain(|(since, _)| since.elapsed() < limits::LOAD_WITHIN);
            let n = applied.borrow_and_update().n;
            let mut ready: Vec<LoadRequest> = waiting
                .extract_if(.., |(_, request)| request.absent_at <= n)
                .map(|(_, request)| request)
                .take(limits::LOAD_BATCH_MAX)
                .collect();
            if let Err(error) = self.answer(&mut ready).await {
                warn!(%error, "cannot look up in postgres what redis does not have");
                self.connection = None;
            }
        }
    }

    async fn answer(&mut self, batch: &mut Vec<LoadRequest>) -> Result<(), ledger::Error> {
        if batch.is_empty() {
            return Ok(());
        }
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(ledger::connect(&self.postgres_url).await?),
        };
        let mut products = Vec::new();
        for request in batch.drain(..) {
            match request.wanted {
                Wanted::Product(product, answer) => products.push((product, answer)),
                Wanted::Coupon(coupon, answer) => match coupon_of(connection, &coupon).await? {
                    // Whoever has given up does not hear it.
                    Ok(found) => _ = answer.send(found),
                    Err(why) => warn!(%coupon, why, "a coupon is not given to redis"),
                },
                Wanted::Exists(coupon, answer) => {
                    let row = ledger::coupon::load(connection, coupon.as_str()).await?;
                    _ = answer.send(row.map(|_| ()));
                }
                Wanted::Users(coupon, behind, answer) => match users_of(connection, &coupon, behind.as_str()).await? {
                    Ok((users, _)) => _ = answer.send(Some(users)),
                    Err(why) => warn!(%coupon, why, "a coupon is not given to redis"),
                },
            }
        }
        let ids: Vec<String> = products.iter().map(|(product, _)| product.to_string()).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let Some((at, rows)) = ledger::stock::expected(connection, self.partition.id, &ids, None).await? else { return Ok(()) };
        for ((_, answer), row) in products.into_iter().zip(rows) {
            let found = |units: i64| Found { available: units.max(0), mark: at.mark, n: at.n, low: row.low, frozen: row.frozen };
            _ = answer.send(row.units.map(found));
        }
        Ok(())
    }
}

/// A coupon with the first who have it; or why it cannot be loaded.
async fn coupon_of(connection: &mut PgConnection, coupon: &Id) -> Result<Result<Option<FoundCoupon>, &'static str>, ledger::Error> {
    let Some(row) = ledger::coupon::load(connection, coupon.as_str()).await? else { return Ok(Ok(None)) };
    let is_deleted = row.state == "deleted";
    let users = if is_deleted { Ok((Vec::new(), false)) } else { users_of(connection, coupon, "").await? };
    let (users, more) = match users {
        Ok(users) => users,
        Err(why) => return Ok(Err(why)),
    };
    Ok(Ok(Some(FoundCoupon {
        terms: CouponTerms { total: row.total, per_user: row.per_user, start_ms: row.start_ms, end_ms: row.end_ms },
        issued: row.issued,
        used: row.used,
        last_serial: row.last_serial,
        is_deleted,
        users,
        more,
    })))
}

/// The first who have a coupon behind the user `behind`, as many as go through one script, and whether there are more; or why that cannot be.
async fn users_of(
    connection: &mut PgConnection,
    coupon: &Id,
    behind: &str,
) -> Result<Result<(Vec<CouponUser>, bool), &'static str>, ledger::Error> {
    let (held, more) = ledger::coupon::held(connection, coupon.as_str(), behind, limits::LOAD_USERS_MAX).await?;
    if held.is_empty() && more {
        return Ok(Err("one user has too many of it for one script: `holdfast rebuild --from postgres` gives it to Redis"));
    }
    let line =
        |row: &HeldRow| Held { serial: row.serial, state: row.state.clone(), issued_at_ms: row.issued_at_ms, order: row.order.clone() };
    let of_one = |rows: &[HeldRow]| Some((Id::from(rows.first()?.user.as_str()), field(&rows.iter().map(line).collect::<Vec<_>>())));
    Ok(Ok((held.chunk_by(|a, b| a.user == b.user).filter_map(of_one).collect(), more)))
}
