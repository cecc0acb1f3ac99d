//! Documents that are made from the code must say what the code says. `UPDATE_DOCS=1 cargo test --test docs` writes them anew.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails shall end the test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use holdfast::command::describe;
use holdfast::command::table::TABLE;
use holdfast::config;
use holdfast::telemetry::metrics::{self, METRICS};

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

#[test]
fn the_readme_lists_the_commands() {
    check_section("README.md", "commands", &describe::markdown_table(TABLE, &["stock", "coupon", "lock", "holdfast"]));
}

#[test]
fn every_metric_that_is_measured_is_described() {
    let mut measured = BTreeMap::new();
    for (path, text) in sources() {
        for kind in ["counter", "gauge", "histogram"] {
            for call in text.split(&format!("{kind}!(\"")).skip(1) {
                let (name, rest) = call.split_once('"').unwrap();
                let line = rest.lines().next().unwrap();
                // Each label stands in quotes before its arrow.
                let before_arrows = line.match_indices(" => ").map(|(at, _)| &line[..at]);
                let labels: Vec<&str> = before_arrows.map(|before| before.rsplit('"').nth(1).unwrap()).collect();
                measured.insert(name.to_owned(), (kind, labels.join(" "), path.display().to_string()));
            }
        }
    }
    for metric in METRICS {
        let Some((kind, labels, path)) = measured.remove(metric.name) else { panic!("nothing measures {}", metric.name) };
        assert_eq!(format!("{:?}", metric.kind).to_lowercase(), kind, "{}: its kind in {path}", metric.name);
        assert_eq!(metric.labels.join(" "), labels, "{}: its labels in {path}", metric.name);
    }
    assert!(measured.is_empty(), "not in METRICS: {measured:?}");
}

#[test]
fn every_link_in_a_document_leads_somewhere() {
    for name in ["README.md", "README.ko.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        let text = fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name} cannot be read: {error}"));
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let file = if file.is_empty() { name } else { file };
            if file.contains("://") {
                continue;
            }
            assert!(path(file).exists(), "{name} links to {link}");
            if !heading.is_empty() {
                let there = fs::read_to_string(path(file)).unwrap();
                assert!(there.lines().filter(|line| line.starts_with('#')).any(|line| anchor(line) == heading), "{name} links to {link}");
            }
        }
    }
}

#[test]
fn every_guarantee_names_tests_that_exist() {
    let text = fs::read_to_string(path("ARCHITECTURE.md")).unwrap();
    let (_, rest) = text.split_once("\n## Guarantees\n").expect("a section Guarantees");
    let table = rest.split("\n## ").next().unwrap();
    let code: String =
        ["src", "tests/it", "tests/campaign"].iter().flat_map(|folder| rust_files(&path(folder))).map(|(_, text)| text).collect();
    let named: Vec<&str> = table.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() > 2).collect();
    assert!(named.len() > 20, "{named:?}");
    for test in named {
        assert!(code.contains(&format!("fn {test}(")), "there is no test {test}");
    }
}

/// The anchor of a heading.
fn anchor(line: &str) -> String {
    let text = line.trim_start_matches('#').trim().to_lowercase();
    text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_')).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The sources of the program, without their tests.
fn sources() -> impl Iterator<Item = (PathBuf, String)> {
    let product = |text: String| text.split("\n#[cfg(test)]").next().unwrap().to_owned();
    rust_files(&path("src")).into_iter().map(move |(path, text)| (path, product(text)))
}

fn rust_files(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
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

/// Checks what stands between `<!-- marker -->` and `<!-- /marker -->`, each on a line of its own, once.
fn check_section(name: &str, marker: &str, fresh: &str) {
    // Several tests may write to one document.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let path = path(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name} cannot be read: {error}"));
    let (begin, end) = (format!("<!-- {marker} -->\n"), format!("<!-- /{marker} -->"));
    let (head, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("{name} has no line <!-- {marker} -->"));
    let (section, tail) = rest.split_once(&end).unwrap_or_else(|| panic!("{name} has <!-- {marker} --> without {end}"));
    if section != fresh {
        update(&path, format!("{head}{begin}{fresh}{end}{tail}"));
    }
}

fn update(path: &Path, text: String) {
    assert!(std::env::var_os("UPDATE_DOCS").is_some(), "{} is stale: UPDATE_DOCS=1 cargo test --test docs writes it anew", path.display());
    fs::write(path, text).unwrap();
}
