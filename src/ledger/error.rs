//! What can go wrong with Postgres, told apart by what to do about it.

use sqlx::postgres::PgDatabaseError;

/// Why something on Postgres did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The connection broke, or never came about: whether a COMMIT that was under way happened is not known. Connect again and look.
    Connection(String),
    /// Nothing happened, and the same may work in a moment: a deadlock, a lock that was not to be had, a full disk.
    Transient {
        /// The SQLSTATE.
        code: String,
        message: String,
    },
    /// Nothing happened: Postgres refuses these very values, and will again.
    Data(String),
    /// Nothing happened: the entries do not continue what Postgres has. Says what was found.
    Broken(String),
    /// This Postgres, or the right to use it, is not as Holdfast needs it. Says what to change.
    Unfit(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connection(message) => write!(f, "connection to Postgres: {message}"),
            Self::Transient { code, message } => write!(f, "Postgres could not do it now: {message} ({code})"),
            Self::Data(message) => write!(f, "Postgres refuses a change: {message}"),
            Self::Broken(message) | Self::Unfit(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// Whether another session held a lock for longer than we wait.
    pub fn is_lock_timeout(&self) -> bool {
        matches!(self, Self::Transient { code, .. } if code == "55P03")
    }

    /// Whether Postgres ended a statement because it took too long.
    pub fn is_statement_timeout(&self) -> bool {
        matches!(self, Self::Transient { code, .. } if code == "57014")
    }

    fn from_database(error: &PgDatabaseError) -> Self {
        let code = error.code();
        let mut message = error.message().to_owned();
        if let Some(detail) = error.detail() {
            message = format!("{message}: {detail}");
        }
        match (code.get(..2).unwrap_or_default(), code) {
            ("08", _) | (_, "57P01" | "57P02" | "57P03" | "57P04" | "57P05") => Self::Connection(message),
            ("53", _) | (_, "40001" | "40P01" | "55P03" | "57014" | "25006") => Self::Transient { code: code.to_owned(), message },
            // A constraint, or what a trigger of the shop's own or the check of a view says.
            ("22" | "23" | "44", _) | (_, "P0001") => Self::Data(format!("{message} ({code})")),
            ("28", _) => Self::Unfit(format!("Postgres does not let us in: {message}; check the user and the password in postgres.url")),
            ("3D", _) => Self::Unfit(format!("{message}: create the database, or name another in postgres.url")),
            (_, "42501") => Self::Unfit(format!("{message}: grant the user of postgres.url its rights in the schema holdfast")),
            (_, "42P01" | "42703" | "3F000") => {
                Self::Unfit(format!("{message}: the schema holdfast is not there or too old; run `holdfast migrate`"))
            }
            _ => Self::Unfit(format!("Postgres refused: {message} ({code})")),
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(database) => match database.try_downcast_ref::<PgDatabaseError>() {
                Some(database) => Self::from_database(database),
                None => Self::Unfit(error.to_string()),
            },
            sqlx::Error::Configuration(what) => {
                let what = what.to_string();
                // The driver wraps it twice.
                let what = what.trim_start_matches("error with configuration: ");
                Self::Unfit(format!("postgres.url cannot be used: {what}; it looks like postgres://user:password@host:5432/database"))
            }
            sqlx::Error::Tls(what) => Self::Unfit(format!("TLS to Postgres: {what}; see sslmode and sslrootcert in postgres.url")),
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::ColumnNotFound(_) | sqlx::Error::RowNotFound => {
                Self::Unfit(format!("unexpected answer of Postgres: {error}"))
            }
            sqlx::Error::Encode(what) => Self::Data(what.to_string()),
            _ => Self::Connection(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_answer_of_postgres_leaves_the_outcome_unknown() {
        let cut = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        assert!(matches!(Error::from(cut), Error::Connection(_)));
        assert!(matches!(Error::from(sqlx::Error::Protocol("half a message".into())), Error::Connection(_)));
    }

    #[test]
    fn an_address_that_cannot_be_used_is_said_so() {
        let error = Error::from(sqlx::Error::Configuration("no host".into()));
        assert!(error.to_string().contains("postgres://user:password@host:5432/database"), "{error}");
    }
}
