//! What was found: printed as it comes, and kept for the file and the plot.

use std::fmt::Display;
use std::fs;

use crate::goals::{Goal, RATIO, SHORT_PART};
use crate::plot;
use crate::rounds::{Rounds, Sample};
use crate::tools::made;

/// A figure that has a goal.
pub struct Figure {
    pub goal: &'static Goal,
    /// `None` where nothing could be measured.
    pub value: Option<f64>,
}

#[derive(Default)]
pub struct Report {
    text: String,
    pub figures: Vec<Figure>,
}

impl Report {
    pub fn line(&mut self, line: impl Display) {
        println!("{line}");
        self.text.push_str(&format!("{line}\n"));
    }

    /// The head of a table of rounds.
    pub fn head(&mut self) {
        self.line(format_args!(
            "{:<16}{:<13}{:>9} {:>19}{:>8}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}{:>8}{:>8}{:>9}{:>8}",
            "",
            "",
            "per s",
            "min-max",
            "p50 ms",
            "p99 ms",
            "p99.9",
            "max",
            "redis µs",
            "front",
            "back",
            "postgr.",
            "load",
            "lag",
            "drain s"
        ));
    }

    /// What its columns are.
    pub fn legend(&mut self) {
        self.line(
            "per s: the median of the rounds, then the least and the most. µs of CPU an operation, until Postgres has all: of Redis, of the \
             sidecar's threads for clients (front; or of a proxy) and of its others (back: the relay), of Postgres, of what makes the load. \
             others: how many cores other programs took of the machine meanwhile; the figures of a busy machine say little. lag: changes \
             that Postgres did not have when a round ended, and drain: how long it took to get them; the most of the rounds.",
        );
    }

    /// A line for each contender of a case.
    pub fn rounds(&mut self, slug: &str, all: &[Rounds]) {
        for (r, rounds) in all.iter().enumerate() {
            let name = if r == 0 { slug } else { "" };
            let between = format!("{:.0}-{:.0}", rounds.least(|sample| sample.rate), rounds.most(|sample| sample.rate));
            let column = |figure: fn(&Sample) -> f64| format!("{:.2}", rounds.median(figure));
            self.line(format_args!(
                "{name:<16}{:<13}{:>9.0} {between:>19}{:>8}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}{:>8}{:>8}{:>8}{:>9.0}{:>8.2}",
                rounds.name,
                rounds.median(|sample| sample.rate),
                column(|sample| sample.latency.p50),
                column(|sample| sample.latency.p99),
                column(|sample| sample.latency.p999),
                column(|sample| sample.latency.max),
                column(|sample| sample.redis),
                column(|sample| sample.front + sample.proxy),
                column(|sample| sample.back),
                column(|sample| sample.postgres),
                column(|sample| sample.load),
                column(|sample| sample.others),
                rounds.most(|sample| sample.lag),
                rounds.most(|sample| sample.drain),
            ));
            self.errors(&rounds.errors);
        }
    }

    pub fn errors(&mut self, errors: &std::collections::BTreeMap<String, u64>) {
        for (error, count) in errors {
            self.line(format_args!("      {count} x {error}"));
        }
    }

    /// What could not be measured, and why.
    pub fn left_out(&mut self, slug: &str, why: &str) {
        self.line(format_args!("    {slug}: LEFT OUT: {why}"));
    }

    /// A ratio that has no goal.
    pub fn comparison(&mut self, what: &str, spread: Option<[f64; 3]>) {
        match spread {
            Some([median, least, most]) => self.line(format_args!("    {what}: {median:.2} x ({least:.2}-{most:.2})")),
            None => self.line(format_args!("    {what}: not measured")),
        }
    }

    /// A ratio that has a goal: median, least and most.
    pub fn ratio(&mut self, slug: &str, spread: Option<[f64; 3]>) {
        let detail = spread.map(|[_, least, most]| format!("{least:.2}-{most:.2}"));
        self.figure(slug, spread.map(|spread| spread[0]), &detail.unwrap_or_default());
    }

    /// A figure that has a goal.
    pub fn figure(&mut self, slug: &str, value: Option<f64>, detail: &str) {
        let goal = Goal::of(slug).unwrap_or_else(|| panic!("{slug} has no goal"));
        let said = value.map_or("not measured".to_owned(), |value| format!("{value:.2} {}", goal.unit));
        let flag = if value.is_some_and(|value| goal.reached(value) >= 1.0) { "" } else { "  MISSED" };
        self.line(format_args!("    {slug}: {said} ({detail}), goal {}{flag}", goal.bound_text()));
        self.figures.push(Figure { goal, value });
    }

    /// What a short run fails by.
    pub fn broken(&self) -> Vec<&'static str> {
        let is_broken =
            |figure: &&Figure| figure.goal.unit == RATIO && figure.value.is_none_or(|value| figure.goal.reached(value) < SHORT_PART);
        self.figures.iter().filter(is_broken).map(|figure| figure.goal.slug).collect()
    }

    /// Those that miss their goals, in one place.
    pub fn missed(&mut self) {
        let is_missed = |figure: &&Figure| figure.value.is_none_or(|value| figure.goal.reached(value) < 1.0);
        let missed: Vec<String> = self.figures.iter().filter(is_missed).map(|figure| figure.goal.slug.to_owned()).collect();
        let (all, missed) = (self.figures.len(), if missed.is_empty() { "none".to_owned() } else { missed.join(", ") });
        self.line(format_args!("Of {all} goals missed: {missed}"));
    }

    /// Keeps the table and the plot under this name.
    pub fn save(&mut self, name: &str) {
        let (text, plot) = (made().join(format!("{name}.txt")), made().join(format!("{name}.svg")));
        self.line(format_args!("Kept in {} and {}", text.display(), plot.display()));
        fs::write(text, &self.text).unwrap();
        fs::write(plot, plot::svg(&self.figures)).unwrap();
    }
}
