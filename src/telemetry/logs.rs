//! Log lines, to stderr, as text or as JSON.

use std::fmt;
use std::io;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// What other crates may say at most, unless `log.level` names them: sqlx logs each statement, which would show what is sold.
const CRATES_AT_MOST: &str = "sqlx=warn,sqlx::query=off,hyper=warn,rustls=warn";

/// Why there are no logs.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot log: {}", self.0)
    }
}

impl std::error::Error for Error {}

/// Sends the log lines of this process to stderr from now on. Once a process.
pub fn init(log: &Log) -> Result<(), Error> {
    let filter = filter(&log.level).map_err(|error| Error(error.to_string()))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match log.format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    }
    .map_err(|error| Error(error.to_string()))
}

/// The filter for a level. Of two directives for the same target the later one counts, so the user's come last.
fn filter(level: &str) -> Result<EnvFilter, tracing_subscriber::filter::ParseError> {
    EnvFilter::builder().parse(format!("{CRATES_AT_MOST},{level}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_logged_only_for_who_asks() {
        assert!(filter("info").unwrap().to_string().contains("sqlx::query=off"));
        let asked = filter("info,sqlx::query=debug").unwrap().to_string();
        assert!(asked.contains("sqlx::query=debug") && !asked.contains("sqlx::query=off"), "{asked}");
    }
}
