//! The program broken on purpose, for tests/sabotage. Built only with `--features sabotage`, where `SABOTAGE=no-chain` in the environment says
//! what it breaks; otherwise nothing is broken and nothing is asked. What is broken in a script is in `build.rs`.

/// Whether this run breaks `what`, and so must fail the tests that tests/sabotage names.
#[cfg(feature = "sabotage")]
pub fn breaks(what: &str) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<String>> = std::sync::LazyLock::new(|| std::env::var("SABOTAGE").ok());
    CHOSEN.as_deref() == Some(what)
}

/// Nothing is broken in a build without the feature.
#[cfg(not(feature = "sabotage"))]
pub const fn breaks(_: &str) -> bool {
    false
}
