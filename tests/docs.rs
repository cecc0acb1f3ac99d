//! Documents that are made from the code must say what the code says. `UPDATE_DOCS=1 cargo test --test docs` writes them anew.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

use holdfast::config;
use holdfast::telemetry::metrics;

#[test]
fn the_example_file_is_fresh() {
    check_file("holdfast.example.toml", &config::example());
}

#[test]
fn the_readme_lists_the_settings() {
    check_section("README.md", "settings", &config::markdown_table());
}

#[test]
fn the_readme_lists_the_metrics() {
    check_section("README.md", "metrics", &metrics::markdown_table());
}

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Checks a whole file.
fn check_file(name: &str, fresh: &str) {
    let path = path(name);
    if fs::read_to_string(&path).ok().as_deref() != Some(fresh) {
        update(&path, fresh.to_owned());
    }
}

/// Checks what stands between `<!-- marker -->` and `<!-- /marker -->`. A document without these markers has no such section.
fn check_section(name: &str, marker: &str, fresh: &str) {
    let path = path(name);
    let Ok(text) = fs::read_to_string(&path) else { return };
    let (begin, end) = (format!("<!-- {marker} -->\n"), format!("<!-- /{marker} -->"));
    let Some((head, rest)) = text.split_once(&begin) else { return };
    let (section, tail) = rest.split_once(&end).unwrap_or_else(|| panic!("{name} has {begin} without {end}"));
    if section != fresh {
        update(&path, format!("{head}{begin}{fresh}{end}{tail}"));
    }
}

fn update(path: &Path, text: String) {
    assert!(std::env::var_os("UPDATE_DOCS").is_some(), "{} is stale: UPDATE_DOCS=1 cargo test --test docs writes it anew", path.display());
    fs::write(path, text).unwrap();
}
