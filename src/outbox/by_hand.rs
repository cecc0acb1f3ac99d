//! `holdfast rebuild`: a person says which side is right, where Redis and Postgres belong to different histories.

use tracing::{info, warn};
use uuid::Uuid;

use super::rebuild::Rebuild;
use crate::domain::{InboxMark, Side};
use crate::ledger::adopt::{self, Adoption};
use crate::ledger::{self, PgConnection};
use crate::limits::{REFILL_PAGE, RELAY_READ_ENTRIES_MAX};
use crate::store::meta::{self, Look};
use crate::store::stream::OutboxReader;
use crate::store::survey::{self, Walk};
use crate::store::{Connection, Partition};

/// Makes the other side as this one is, and opens Redis under the next epoch. Sidecars may run meanwhile: they sell on afterwards.
pub async fn rebuild(from: Side, redis_url: &str, postgres_url: &str, window_ms: i64) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut redis = Connection::open(redis_url).await.map_err(|error| text(&error))?;
    let mut postgres = ledger::connect(postgres_url).await.map_err(|error| text(&error))?;
    let partition = Partition::new(0, 0).0;
    let row = ledger::partition::load(&mut postgres, partition.id).await.map_err(|error| text(&error))?;
    let look = Look::at(&mut redis, row.applied).await.map_err(|error| text(&error))?;
    let owner = format!("holdfast rebuild {}", Uuid::new_v4().simple());
    match from {
        Side::Postgres => {
            let rebuild = Rebuild {
                partition: &partition,
                redis_url,
                postgres_url,
                redis: &mut redis,
                postgres: &mut postgres,
                owner: &owner,
                window_ms,
            };
            Box::pin(rebuild.run(&row, look.meta.as_ref(), "a person said that Postgres is right", true)).await
        }
        Side::Redis => {
            let Some(found) = look.meta else { return Err("this Redis holds nothing of Holdfast's: it cannot be the right side".into()) };
            // The outbox is what is removed first.
            let is_whole = look.newest.as_ref().is_some_and(|newest| newest.last.n == found.n);
            if !found.live && !found.adopted && !is_whole {
                return Err("filling this Redis was broken off, and it may lack anything: only --from postgres can be right".into());
            }
            adopt::rehearse(&mut postgres).await.map_err(|error| format!("an order's row is refused, see to that first: {error}"))?;
            let to = found.epoch.max(row.epoch) + 1;
            let taken = ledger::partition::take_epoch_to_rebuild(&mut postgres, partition.id, &row, to, redis.run_id(), &owner);
            let Some(epoch) = taken.await.map_err(|error| text(&error))? else {
                return Err("a sidecar is filling Redis from Postgres, or took the partition: look at HOLDFAST.STATUS and try again".into());
            };
            if !meta::fence_to_adopt(&mut redis, epoch).await.map_err(|error| text(&error))? {
                return Err("another process was faster: try again".into());
            }
            // Only now does nothing come after it.
            let fenced = Look::at(&mut redis, row.applied).await.map_err(|error| text(&error))?;
            let n = fenced.meta.map_or(found.n, |meta| meta.n);
            Box::pin(adopt(&mut redis, &mut postgres, redis_url, partition.id, epoch, n)).await
        }
    }
}

async fn adopt(
    redis: &mut Connection,
    postgres: &mut PgConnection,
    redis_url: &str,
    partition: u32,
    epoch: u64,
    n: u64,
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut adoption = Adoption::begin(postgres, partition, epoch, n).await.map_err(|error| text(&error))?;
    let mut reader = OutboxReader::open(redis_url).await.map_err(|error| text(&error))?;
    let mut after = crate::domain::Position::default();
    loop {
        let read = reader.read_after(after, RELAY_READ_ENTRIES_MAX, std::time::Duration::ZERO).await.map_err(|error| text(&error))?;
        let Some(last) = read.entries.last() else { break };
        after = last.last;
        adoption.history(&read.entries).await.map_err(|error| text(&error))?;
    }
    let deleted = survey::deleted(redis).await.map_err(|error| text(&error))?;
    for deleted in deleted.chunks(REFILL_PAGE) {
        let rows: Vec<_> = deleted
            .iter()
            .map(|(product, held)| adopt::Product {
                product: product.to_string(),
                available: 0,
                held: *held,
                low: None,
                frozen: None,
                deleted: true,
            })
            .collect();
        adoption.products(&rows).await.map_err(|error| text(&error))?;
    }
    let (mut walk, mut products, mut coupons, mut orders) = (Walk::new(), 0, 0, 0);
    while let Some(page) = walk.next(redis).await.map_err(|error| text(&error))? {
        for key in &page.unreadable {
            warn!(key, "holds what does not belong there, and was left out");
        }
        products += page.products.len();
        coupons += page.coupons.len();
        let rows: Vec<_> = page
            .products
            .into_iter()
            .map(|product| adopt::Product {
                product: product.product.to_string(),
                available: product.available,
                held: product.held,
                low: product.low,
                frozen: product.frozen,
                deleted: false,
            })
            .collect();
        adoption.products(&rows).await.map_err(|error| text(&error))?;
        orders += page.orders.len();
        let rows: Vec<_> = page.orders.into_iter().map(|(id, order)| (id.to_string(), order)).collect();
        adoption.orders(&rows).await.map_err(|error| text(&error))?;
        for (coupon, holders) in page.coupons {
            let issued = holders.into_iter().flat_map(|holder| {
                let user = holder.user;
                holder.coupons.into_iter().map(move |held| adopt::Issued {
                    user: user.clone(),
                    serial: held.serial,
                    state: held.state,
                    issued_at_ms: held.issued_at_ms,
                    order: held.order,
                })
            });
            let terms = adopt::Coupon {
                coupon: coupon.coupon.to_string(),
                total: coupon.total,
                issued: coupon.issued,
                used: coupon.used,
                serial: coupon.serial,
                per_user: coupon.per_user,
                start_ms: coupon.start_ms,
                end_ms: coupon.end_ms,
                deleted: coupon.deleted,
            };
            adoption.coupon(&terms, &issued.collect::<Vec<_>>()).await.map_err(|error| text(&error))?;
        }
    }
    let (applied, last_op) = adoption.end().await.map_err(|error| text(&error))?;
    if !meta::open(redis, epoch, applied, &last_op, InboxMark::default()).await.map_err(|error| text(&error))? {
        return Err("another process was faster: try again".into());
    }
    info!(epoch, %applied, products, coupons, orders, "postgres has what redis holds, and redis is open");
    Ok(())
}
