//! A password, and a URL that may hold one, which are never shown.

use std::fmt;

use serde::Deserialize;
use url::Url;

/// Stands where a password is.
const MASK: &str = "***";

/// A password; empty where there is none.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Itself: for comparing, never for showing.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What stands for it; empty where there is none.
    pub const fn masked(&self) -> &'static str {
        if self.0.is_empty() { "" } else { MASK }
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.masked())
    }
}

/// A URL that may hold a password. Everything that shows it shows [`SecretUrl::masked`]; who connects takes
/// [`SecretUrl::expose`].
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The whole URL, with its password: for connecting, never for showing.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The URL without its password.
    pub fn masked(&self) -> String {
        let Ok(mut url) = Url::parse(&self.0) else { return MASK.into() };
        // Without an address it is not known what part of it is a password.
        if !url.has_authority() {
            return MASK.into();
        }
        if url.password().is_some() && url.set_password(Some(MASK)).is_err() {
            return MASK.into();
        }
        // Postgres's and Redis's URLs may carry the password behind the question mark, too.
        let is_secret = |name: &str| name.to_ascii_lowercase().contains("pass");
        if url.query_pairs().any(|(name, _)| is_secret(&name)) {
            let pairs: Vec<(String, String)> = url
                .query_pairs()
                .map(|(name, value)| (name.to_string(), if is_secret(&name) { MASK.into() } else { value.to_string() }))
                .collect();
            url.query_pairs_mut().clear().extend_pairs(pairs);
        }
        url.into()
    }
}

impl From<String> for SecretUrl {
    fn from(url: String) -> Self {
        Self(url)
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.masked())
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_is_ever_shown() {
        for (url, shown) in [
            ("redis://127.0.0.1:6379", "redis://127.0.0.1:6379"),
            ("redis://:s3cret@host:6379/0", "redis://:***@host:6379/0"),
            ("rediss://app:s3cret@host", "rediss://app:***@host"),
            ("postgres://app:s3cret@host/db?sslmode=require", "postgres://app:***@host/db?sslmode=require"),
            ("postgres://app@host/db?password=s3cret&sslmode=require", "postgres://app@host/db?password=***&sslmode=require"),
            ("postgres:///db?host=/var/run/postgresql", "postgres:///db?host=/var/run/postgresql"),
            ("s3cret", "***"),
        ] {
            let secret = SecretUrl::from(url.to_owned());
            assert_eq!(secret.masked(), shown);
            assert!(!format!("{secret:?} {secret}").contains("s3cret"));
            assert_eq!(secret.expose(), url);
        }
    }
}
