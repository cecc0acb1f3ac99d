//! What the tests of this module share: a database of their own on a real server.

use std::sync::Arc;

use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgConnection};

#[path = "../../tests/it/servers.rs"]
mod servers;

pub use servers::{Postgres, RedisServer};

/// A database of one test, on the server that tests share.
pub struct Database {
    pub url: String,
    pub connection: PgConnection,
    _server: Arc<Postgres>,
}

/// Makes one, with our schema and the row of partition 0 under epoch 1.
pub async fn database() -> Database {
    let server = tokio::task::spawn_blocking(Postgres::shared).await.unwrap();
    let url = server.database().await;
    super::migrate(&url).await.unwrap();
    let mut connection = super::connect(&url).await.unwrap();
    let row = super::partition::load(&mut connection, 0).await.unwrap();
    super::partition::take_epoch(&mut connection, 0, &row, "run-1", 0).await.unwrap().unwrap();
    Database { url, connection, _server: server }
}

/// The rows of any query.
pub async fn rows<T: for<'r> FromRow<'r, PgRow> + Send + Unpin>(connection: &mut PgConnection, query: &'static str) -> Vec<T> {
    sqlx::query_as(query).fetch_all(connection).await.unwrap()
}

/// The one number that a query returns.
pub async fn number_of(connection: &mut PgConnection, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(connection).await.unwrap()
}

/// Runs a statement.
pub async fn execute(connection: &mut PgConnection, statement: &'static str) {
    sqlx::raw_sql(statement).execute(connection).await.unwrap();
}
