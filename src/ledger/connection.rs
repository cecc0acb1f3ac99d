//! One connection to Postgres.
//!
//! Whoever owns one never drops a future that has a transaction open and then goes on with the same connection: what the server
//! made of it would not be known. A future is given up only together with its connection.

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};

use super::Error;
use crate::limits::{
    LEDGER_CONNECT_TIMEOUT, LEDGER_IDLE_IN_TRANSACTION_TIMEOUT, LEDGER_LOCK_TIMEOUT, LEDGER_SILENCE_MAX, LEDGER_STATEMENT_TIMEOUT,
    MIGRATION_LOCK_TIMEOUT,
};

/// Connects to the primary and bounds in the server what a statement, a lock and an open transaction may take. Errors with
/// [`Error::Unfit`] and what to change where this Postgres could lose what it has committed or cannot be written to.
pub async fn connect(url: &str) -> Result<PgConnection, Error> {
    let statement = millis(LEDGER_STATEMENT_TIMEOUT);
    open(url, "holdfast", statement, millis(LEDGER_LOCK_TIMEOUT)).await
}

/// Connects for a migration, which may take as long as it takes.
pub(super) async fn connect_to_migrate(url: &str) -> Result<PgConnection, Error> {
    open(url, "holdfast migrate", "0".to_owned(), millis(MIGRATION_LOCK_TIMEOUT)).await
}

fn millis(duration: std::time::Duration) -> String {
    format!("{}ms", duration.as_millis())
}

async fn open(url: &str, application: &str, statement_timeout: String, lock_timeout: String) -> Result<PgConnection, Error> {
    // The driver takes any scheme.
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return Err(sqlx::Error::Configuration("it is not the address of a Postgres".into()).into());
    }
    let options = url.parse::<PgConnectOptions>()?.application_name(application).disable_statement_logging();
    let opening = async {
        let mut connection = options.connect().await?;
        // Set by a query and not by startup options, which PgBouncer refuses.
        let (synchronous_commit, in_recovery, ..): (String, bool, String, String, String) = sqlx::query_as(
            "SELECT current_setting('synchronous_commit'), pg_is_in_recovery(), set_config('statement_timeout', $1, false), \
             set_config('lock_timeout', $2, false), set_config('idle_in_transaction_session_timeout', $3, false)",
        )
        .bind(statement_timeout)
        .bind(lock_timeout)
        .bind(millis(LEDGER_IDLE_IN_TRANSACTION_TIMEOUT))
        .fetch_one(&mut connection)
        .await?;
        if in_recovery {
            return Err(Error::Unfit(
                "this Postgres is a standby and cannot be written to: give postgres.url the address of the primary".into(),
            ));
        }
        if synchronous_commit == "off" {
            return Err(Error::Unfit(
                "this Postgres has synchronous_commit off and may lose what it has committed: set it to on (or local, remote_write, \
                 remote_apply) for the server, or with ALTER ROLE for the user of postgres.url"
                    .into(),
            ));
        }
        Ok(connection)
    };
    match tokio::time::timeout(LEDGER_CONNECT_TIMEOUT, opening).await {
        Ok(opened) => opened,
        Err(_) => Err(Error::Connection(format!("no answer within {} s", LEDGER_CONNECT_TIMEOUT.as_secs()))),
    }
}

/// Asks Postgres whether it is there. After an error the connection is of no use any more.
pub async fn ping(connection: &mut PgConnection) -> Result<(), Error> {
    match tokio::time::timeout(LEDGER_SILENCE_MAX, connection.ping()).await {
        Ok(answered) => Ok(answered?),
        Err(_) => Err(Error::Connection(format!("no answer within {} s", LEDGER_SILENCE_MAX.as_secs()))),
    }
}

/// Who has a transaction open on the tables that the relay locks, for the log after a lock was not to be had: one text each,
/// with the pid, the application and since how many seconds.
pub async fn blockers(connection: &mut PgConnection) -> Result<Vec<String>, Error> {
    let texts = sqlx::query_scalar(
        "SELECT format('pid %s (%s, %s) for %s s', a.pid, coalesce(nullif(a.application_name, ''), 'unnamed'), a.state, \
         extract(epoch FROM now() - a.xact_start)::bigint) \
         FROM pg_stat_activity a WHERE a.pid <> pg_backend_pid() AND a.pid IN (SELECT l.pid FROM pg_locks l \
         WHERE l.granted AND l.relation IN ('holdfast.partition'::regclass, 'holdfast.stock'::regclass, 'holdfast.coupon'::regclass)) \
         ORDER BY a.xact_start LIMIT 5",
    );
    Ok(texts.fetch_all(connection).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Position;
    use crate::ledger::apply;
    use crate::ledger::testing::{database, execute};

    #[tokio::test]
    async fn a_postgres_that_forgets_commits_is_refused() {
        let database = database().await;
        let forgetful = format!("{}&options[synchronous_commit]=off", database.url);
        let error = connect(&forgetful).await.unwrap_err();
        assert!(error.to_string().contains("set it to on"), "{error}");
    }

    #[tokio::test]
    async fn what_cannot_be_reached_says_why() {
        let database = database().await;
        for (url, what) in [
            ("postgres://127.0.0.1:1/x".to_owned(), "connection to Postgres"),
            ("redis://127.0.0.1".to_owned(), "postgres.url cannot be used"),
            (database.url.replace("/test_", "/nothing_"), "create the database"),
        ] {
            let error = connect(&url).await.unwrap_err();
            assert!(error.to_string().contains(what), "{url}: {error}");
        }
    }

    #[tokio::test]
    async fn a_lock_that_is_not_to_be_had_is_given_up_and_its_holder_named() {
        let mut database = database().await;
        let mut holder = connect(&database.url).await.unwrap();
        execute(&mut holder, "SET application_name = 'report'; BEGIN; SELECT * FROM holdfast.partition FOR UPDATE").await;
        let operations = vec![crate::domain::change::Operation::decode("0 set | a 1 1").unwrap()];
        let last = Position::new(1, 1);
        let entry = crate::domain::change::Entry { last, first_n: 1, prev: "-".into(), op: "i:stock:1".into(), at_ms: 0, operations };
        let error = apply(&mut database.connection, 0, std::slice::from_ref(&entry)).await.unwrap_err();
        assert!(error.is_lock_timeout(), "{error}");
        let blockers = blockers(&mut database.connection).await.unwrap();
        assert!(blockers.len() == 1 && blockers[0].contains("(report, idle in transaction) for"), "{blockers:?}");
        execute(&mut holder, "COMMIT").await;
        assert_eq!(apply(&mut database.connection, 0, &[entry]).await.unwrap().operations, 1);
        ping(&mut database.connection).await.unwrap();
    }
}
