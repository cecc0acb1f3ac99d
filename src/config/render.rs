//! The settings as text: the example file, the README's table, what `print-config` shows.

use std::fmt::Write as _;

use super::settings::{SETTINGS, Setting};

const EXAMPLE_HEAD: &str = "\
# Holdfast's settings, each with its default. Take the # away from what you change.
#
# A flag overrides an environment variable, which overrides this file, which overrides the default.
# Holdfast reads this file where it is told of it: `holdfast serve --config holdfast.toml`, or HOLDFAST_CONFIG=holdfast.toml.
# `holdfast check-config` checks it, `holdfast print-config` shows what stands in the end, and where it came from.
";

/// `holdfast.example.toml`: every setting with its meaning and default, commented out.
pub fn example() -> String {
    sections(EXAMPLE_HEAD.into(), |out, setting| {
        let (_, name) = setting.section_and_name();
        let file = setting.file_variable().map(|variable| format!(", or a file named by {variable}")).unwrap_or_default();
        _ = writeln!(out, "\n# {}", setting.doc);
        _ = writeln!(out, "# Must be {}.", setting.permitted());
        let flag = setting.flag().map_or_else(|| "Variable".into(), |flag| format!("Flag --{flag}, variable"));
        _ = writeln!(out, "# {flag} {}{file}.", setting.variable());
        _ = writeln!(out, "#{name} = {}", setting.toml_value(setting.default));
    })
}

/// The settings as a table in Markdown, for the README.
pub fn markdown_table() -> String {
    let mut table = String::from("| TOML | flag | variable | default | |\n|---|---|---|---|---|\n");
    for setting in SETTINGS {
        let doc = setting.doc.replace('|', "\\|");
        let doc = doc.trim_end_matches('.');
        _ = writeln!(
            table,
            "| `{}` | {} | `{}` | {} | {doc}: {}. |",
            setting.key,
            setting.flag().map(|flag| format!("`--{flag}`")).unwrap_or_default(),
            setting.variable(),
            if setting.default.is_empty() { String::new() } else { format!("`{}`", setting.default) },
            setting.permitted()
        );
    }
    table
}

/// Writes every setting with `write`, under the heading of its section.
pub(super) fn sections(mut out: String, mut write: impl FnMut(&mut String, &'static Setting)) -> String {
    let mut current = "";
    for setting in SETTINGS {
        let (section, _) = setting.section_and_name();
        if section != current {
            _ = writeln!(out, "\n[{section}]");
            current = section;
        }
        write(&mut out, setting);
    }
    out
}
