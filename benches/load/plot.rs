//! The figures as a plot: a bar for each, as long as the part of its goal that is reached.

use std::fmt::Write as _;

use crate::goals::Bound;
use crate::report::Figure;

const ROW: f64 = 26.0;
const LABELS: f64 = 520.0;
const BARS: f64 = 420.0;
const NUMBERS: f64 = 210.0;
const TOP: f64 = 56.0;
/// What is longer is cut.
const PARTS_MAX: f64 = 2.0;

const REACHED: &str = "#2e7d5b";
const MISSED: &str = "#c0603a";

pub fn svg(figures: &[Figure]) -> String {
    let (width, height) = (LABELS + BARS + NUMBERS, ROW.mul_add(figures.len() as f64, TOP + 20.0));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"16\" y=\"24\" font-size=\"16\" font-weight=\"bold\">Holdfast: each figure against its goal</text>\n"
    );
    let goal = LABELS + BARS / PARTS_MAX;
    let _ = writeln!(svg, "<text x=\"{goal}\" y=\"44\" text-anchor=\"middle\">goal</text>");
    for (f, figure) in figures.iter().enumerate() {
        let y = ROW.mul_add(f as f64, TOP);
        let reached = figure.value.map_or(0.0, |value| figure.goal.reached(value));
        let (length, colour) = (reached.min(PARTS_MAX) / PARTS_MAX * BARS, if reached >= 1.0 { REACHED } else { MISSED });
        let value = figure.value.map_or("not measured".to_owned(), number);
        let (sign, bound) = match figure.goal.bound {
            Bound::AtLeast(bound) => ('≥', bound),
            Bound::AtMost(bound) => ('≤', bound),
        };
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n<rect x=\"{LABELS}\" y=\"{}\" width=\"{length:.1}\" height=\"{}\" \
             fill=\"{colour}\"/>\n<text x=\"{}\" y=\"{}\">{value} {} ({sign} {})</text>",
            LABELS - 8.0,
            y + 16.0,
            escaped(figure.goal.title),
            y + 3.0,
            ROW - 8.0,
            LABELS + BARS + 8.0,
            y + 16.0,
            figure.goal.unit,
            number(bound),
        );
    }
    let _ = writeln!(svg, "<line x1=\"{goal}\" y1=\"{}\" x2=\"{goal}\" y2=\"{}\" stroke=\"#222\"/>\n</svg>", TOP - 6.0, height - 14.0);
    svg
}

/// With as many decimals as say something.
fn number(value: f64) -> String {
    if value >= 1_000.0 {
        format!("{:.0} k", value / 1e3)
    } else if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{}", (value * 100.0).round() / 100.0)
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
