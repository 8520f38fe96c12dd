//! The tables' contents: which columns there are, and how a row fills them.

use super::units;
use crate::sweep::case::{Outcome, Row};
use crate::sweep::crossover::Crossover;
use crate::sweep::fit::Growth;
use crate::sweep::gate::Gate;
use crate::sweep::summary::{Summary, YARDSTICK};

/// A table: a header and rows of the same width.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// Names of the columns.
    pub header: Vec<&'static str>,
    /// Their contents.
    pub rows: Vec<Vec<String>>,
}

/// The figures of one row, behind length and variant.
const FIGURES: [&str; 9] = [
    "time (p20-p80)",
    "tokens/s",
    "GFLOP/s",
    "of peak",
    "extra mem",
    "peak RSS",
    "rel. L2 [95 %]",
    "worst row",
    "cos p5 / median",
];

/// All points, grouped by length.
pub fn points(rows: &[Row]) -> Table {
    let mut header = vec!["n", "variant"];
    header.extend(FIGURES);
    let mut last = None;
    let rows = rows.iter().map(|row| {
        let first_of_length = last.replace(row.case.n) != Some(row.case.n);
        let n = if first_of_length { units::length(row.case.n) } else { String::new() };
        let mut cells = vec![n, row.case.variant.clone()];
        cells.extend(figures(row));
        cells
    });
    Table { rows: rows.collect(), header }
}

fn figures(row: &Row) -> Vec<String> {
    let m = match &row.outcome {
        Outcome::Measured(m) => m,
        Outcome::NotRun { reason, .. } => return padded(format!("not run ({reason})")),
        Outcome::Failed { reason } => return padded(format!("failed: {reason}")),
    };
    let memory = |bytes: Option<u64>| bytes.map_or("-".into(), units::bytes);
    let e = &m.error;
    vec![
        format!("{} ({})", units::time(m.seconds.median), units::spread(m.seconds.p20, m.seconds.p80)),
        units::count(m.tokens_s),
        units::three(m.gflops),
        format!("{:.0} %", 100.0 * m.share_of_peak),
        memory(m.extra_bytes),
        memory(m.peak_rss_bytes),
        format!(
            "{} [{}, {}]",
            units::error(e.rel_l2),
            units::error(e.rel_l2_low),
            units::error(e.rel_l2_high)
        ),
        e.worst_row.map_or("-".into(), units::error),
        format!("{} / {}", units::cosine(e.cosine_p5), units::cosine(e.cosine_median)),
    ]
}

fn padded(first: String) -> Vec<String> {
    let mut cells = vec![first];
    cells.resize(FIGURES.len(), String::new());
    cells
}

/// One row a variant: growth, crossover, and where it stands at the largest length measured.
pub fn summaries(summaries: &[Summary], rows: &[Row]) -> Table {
    let header =
        vec!["variant", "time grows as", "faster than flash", "largest n", "time there", "rel. L2 there"];
    let line = |s: &Summary| {
        let own = rows.iter().filter(|row| row.case.variant == s.variant && row.measured().is_some());
        let largest = own.max_by_key(|row| row.case.n).and_then(|row| Some((row.case.n, row.measured()?)));
        let of_largest = |show: fn(&crate::sweep::case::Measurement) -> String| {
            largest.map_or("-".into(), |(_, m)| show(m))
        };
        vec![
            s.variant.clone(),
            s.growth.as_ref().map_or("-".into(), growth),
            crossover(&s.crossover),
            largest.map_or("-".into(), |(n, _)| units::length(n)),
            of_largest(|m| units::time(m.seconds.median)),
            of_largest(|m| units::error(m.error.rel_l2)),
        ]
    };
    Table { rows: summaries.iter().map(line).collect(), header }
}

fn growth(growth: &Growth) -> String {
    let margin = growth.margin.map_or("no interval".into(), |margin| format!("± {margin:.2}"));
    let Growth { exponent, points, from, .. } = growth;
    format!("n^{exponent:.2} ({margin}; {points} points from {})", units::length(*from))
}

fn crossover(crossover: &Crossover) -> String {
    match crossover {
        Crossover::Yardstick => "is the yardstick".into(),
        Crossover::Always(n) => format!("at every length, from {}", units::length(*n)),
        Crossover::At(n) => format!("from about n = {}", units::about_length(*n)),
        Crossover::NotUpTo(n) => format!("not within the measured range (to {})", units::length(*n)),
        Crossover::Unknown => format!("unknown: no length with both it and {YARDSTICK}"),
    }
}

/// The quality gate.
pub fn gate(gate: &Gate) -> Table {
    let header = vec!["n", "exact loss", "layer removed", "window instead", "bytes predicted"];
    let loss = |x: f64| format!("{x:.4}");
    let mut rows: Vec<Vec<String>> = (gate.rows.iter())
        .map(|row| {
            let losses = [row.exact_loss, row.removed_loss, row.window_loss].map(loss);
            [vec![units::length(row.n)], losses.to_vec(), vec![row.targets.to_string()]].concat()
        })
        .collect();
    rows.extend(gate.missing.iter().map(|n| {
        let why = "not computed (too long for the text, the time or the model)".to_string();
        vec![units::length(*n), why, String::new(), String::new(), String::new()]
    }));
    Table { rows, header }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::case::examples::{not_run, row};
    use crate::sweep::summary::summarise;

    #[test]
    fn tables_are_rectangular_and_say_what_was_not_run() {
        let rows = [row("flash", 1024, 0.5, 1e-7), not_run("naive", 1024), row("flash", 2048, 2.0, 1e-7)];
        let points = points(&rows);
        assert!(points.rows.iter().all(|row| row.len() == points.header.len()));
        assert_eq!((points.rows[0][0].as_str(), points.rows[1][0].as_str()), ("1k", ""));
        assert_eq!(points.rows[1][2], "not run (predicted 41 min)");
        let summary = summaries(&summarise(&rows), &rows);
        assert!(summary.rows.iter().all(|row| row.len() == summary.header.len()));
        assert!(summary.rows[0][1].starts_with("n^2.00"), "{:?}", summary.rows[0]);
        assert_eq!(summary.rows[1][1], "-");
    }
}
