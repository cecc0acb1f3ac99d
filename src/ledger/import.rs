//! How far `holdfast import` is with a file, so that one that was stopped goes on where it was.

use std::collections::HashSet;

use sqlx::PgConnection;

use super::{Error, from_bigint, to_bigint};

/// An import that was stopped, or a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// Up to which line, counted from 1, everything is here.
    pub lines: u64,
    /// The processes that wrote what stands behind it.
    pub instances: Vec<String>,
    /// The lines before it that Redis refused: their products were not set.
    pub refused: Vec<i64>,
}

/// Begins with the file of this digest, or goes on with it: `instance` will write, for as long as this connection lasts. One that was finished
/// begins anew. Errors with [`Error::Unfit`] where another process is at it.
pub async fn begin(connection: &mut PgConnection, digest: &str, name: &str, instance: &str) -> Result<Begun, Error> {
    let is_ours: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock(hashtextextended('holdfast.import ' || $1, 0))")
        .bind(digest)
        .fetch_one(&mut *connection)
        .await?;
    if !is_ours {
        return Err(Error::Unfit("another process imports this file: wait until it has ended".to_owned()));
    }
    let begun: Option<(i64, Vec<String>, Vec<i64>)> =
        sqlx::query_as("SELECT lines, instances, refused FROM holdfast.import WHERE digest = $1 AND done_at IS NULL")
            .bind(digest)
            .fetch_optional(&mut *connection)
            .await?;
    let (lines, instances, mut refused) = begun.unwrap_or_default();
    // What stands behind is tried again.
    refused.retain(|line| *line <= lines);
    let mut all = instances.clone();
    all.push(instance.to_owned());
    sqlx::query(
        "INSERT INTO holdfast.import (digest, name, instances) VALUES ($1, $2, $3) \
         ON CONFLICT (digest) DO UPDATE SET name = $2, instances = $3, lines = $4, refused = $5, done_at = NULL, \
         started_at = CASE WHEN $4 = 0 THEN now() ELSE import.started_at END",
    )
    .bind(digest)
    .bind(name)
    .bind(&all)
    .bind(lines)
    .bind(&refused)
    .execute(connection)
    .await?;
    Ok(Begun { lines: from_bigint(lines), instances, refused })
}

/// Notes that everything up to this line is here but for these lines, which Redis has refused since the last note, and whether that is all.
pub async fn reached(connection: &mut PgConnection, digest: &str, lines: u64, refused: &[i64], done: bool) -> Result<(), Error> {
    let query = "UPDATE holdfast.import SET lines = $2, done_at = CASE WHEN $3 THEN now() END, \
                 refused = CASE WHEN cardinality($4::bigint[]) > 0 THEN refused || $4 ELSE refused END WHERE digest = $1";
    sqlx::query(query).bind(digest).bind(to_bigint(lines)).bind(done).bind(refused).execute(connection).await?;
    Ok(())
}

/// Those of the products that one of these processes has changed.
pub async fn written(connection: &mut PgConnection, products: &[String], instances: &[String]) -> Result<HashSet<String>, Error> {
    let written = sqlx::query_scalar(
        "SELECT DISTINCT product_id FROM holdfast.stock_ledger WHERE product_id = ANY($1) AND split_part(op, ':', 1) = ANY($2)",
    );
    let written: Vec<String> = written.bind(products).bind(instances).fetch_all(connection).await?;
    Ok(written.into_iter().collect())
}
