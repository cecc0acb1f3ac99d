//! Brings the schema `holdfast` up to this version.

use std::borrow::Cow;

use sqlx::PgConnection;
use sqlx::migrate::{MigrateError, Migrator};

use super::{Error, connection};

/// Where the migrations that have run are listed: in our own schema, so that another program's list in the same database is left alone.
const LIST: &str = "holdfast.migration";

fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("./migrations");
    migrator.dangerous_set_table_name(LIST);
    migrator
}

/// Runs the migrations that this Postgres lacks, under a lock, so that several sidecars may start at once. Returns the version that the
/// schema has afterwards. A user without the right to create tables can call it on a schema that is up to date. Errors with
/// [`Error::Unfit`] where the schema was changed by a newer Holdfast or by hand.
pub async fn migrate(url: &str) -> Result<i64, Error> {
    let mut migrator = migrator();
    let version = migrator.iter().map(|migration| migration.version).max().unwrap_or_default();
    let mut connection = connection::connect_to_migrate(url).await?;
    let exists = |name: &'static str| sqlx::query_scalar::<_, bool>(name);
    if exists("SELECT to_regclass('holdfast.migration') IS NOT NULL").fetch_one(&mut connection).await? {
        if up_to_date(&migrator, &mut connection).await? {
            return Ok(version);
        }
    } else if !exists("SELECT to_regnamespace('holdfast') IS NOT NULL").fetch_one(&mut connection).await? {
        migrator.create_schema(Cow::Borrowed("holdfast"));
    }
    migrator.run_direct(None, &mut connection, false).await.map_err(explain)?;
    Ok(version)
}

async fn up_to_date(migrator: &Migrator, connection: &mut PgConnection) -> Result<bool, Error> {
    let done: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("SELECT version, checksum FROM holdfast.migration WHERE success ORDER BY version").fetch_all(connection).await?;
    Ok(migrator.iter().map(|migration| (migration.version, migration.checksum.to_vec())).eq(done))
}

fn explain(error: MigrateError) -> Error {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error.into(),
        MigrateError::VersionMissing(version) => Error::Unfit(format!(
            "the schema holdfast has migration {version}, which this Holdfast does not know: it was upgraded by a newer one; run that version"
        )),
        MigrateError::VersionMismatch(version) => Error::Unfit(format!(
            "migration {version} in the schema holdfast is not the one of this Holdfast: run a released version, or a fresh database"
        )),
        other => Error::Unfit(format!("migrating the schema holdfast: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use sqlx::Connection;

    use super::*;
    use crate::ledger::connect;
    use crate::ledger::testing::{database, execute, number_of};

    #[tokio::test]
    async fn several_may_migrate_at_once_and_again() {
        let mut database = database().await;
        execute(&mut database.connection, "DROP SCHEMA holdfast CASCADE").await;
        let (one, two) = tokio::join!(migrate(&database.url), migrate(&database.url));
        let (newest, count) = (migrator().iter().map(|migration| migration.version).max().unwrap(), migrator().iter().count());
        assert_eq!((one, two, migrate(&database.url).await), (Ok(newest), Ok(newest), Ok(newest)));
        assert_eq!(number_of(&mut database.connection, "SELECT count(*) FROM holdfast.migration").await, i64::try_from(count).unwrap());
    }

    #[tokio::test]
    async fn a_user_without_rights_starts_on_a_schema_that_is_up_to_date() {
        let mut database = database().await;
        execute(
            &mut database.connection,
            "CREATE ROLE seller LOGIN; GRANT USAGE ON SCHEMA holdfast TO seller; GRANT SELECT ON ALL TABLES IN SCHEMA holdfast TO seller",
        )
        .await;
        let url = database.url.replace("postgres@", "seller@");
        assert!(migrate(&url).await.is_ok());
        let mut seller = connect(&url).await.unwrap();
        let refused = crate::ledger::partition::load(&mut seller, 5).await.unwrap_err();
        assert!(matches!(&refused, Error::Unfit(what) if what.contains("grant")), "{refused}");
        seller.close().await.unwrap();
        execute(&mut database.connection, "DROP OWNED BY seller; DROP ROLE seller").await;
    }

    #[tokio::test]
    async fn a_schema_of_a_newer_version_is_refused() {
        let mut database = database().await;
        execute(
            &mut database.connection,
            "INSERT INTO holdfast.migration (version, description, success, checksum, execution_time) VALUES (999, 'later', true, '', 0)",
        )
        .await;
        let error = migrate(&database.url).await.unwrap_err();
        assert!(error.to_string().contains("run that version"), "{error}");
    }
}
