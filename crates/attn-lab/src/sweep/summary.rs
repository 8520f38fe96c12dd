//! What the points of a variant say together: how its time grows, and from where on it is worth having.

use super::case::Row;
use super::crossover::{Crossover, crossover};
use super::fit::{Growth, growth};
use std::collections::BTreeMap;

/// The exact kernel that the others are held against.
pub const YARDSTICK: &str = "flash";

/// One variant over all lengths.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Summary {
    /// The variant.
    pub variant: String,
    /// Growth of its time; `None` for fewer than two lengths.
    pub growth: Option<Growth>,
    /// Where it overtakes the yardstick.
    pub crossover: Crossover,
}

/// Summaries in the order in which variants first appear.
pub fn summarise(rows: &[Row]) -> Vec<Summary> {
    let curve = |variant: &str| -> BTreeMap<usize, f64> {
        let own = rows.iter().filter(|row| row.case.variant == variant);
        own.filter_map(|row| Some((row.case.n, row.measured()?.seconds.median))).collect()
    };
    let yardstick = curve(YARDSTICK);
    variants(rows)
        .into_iter()
        .map(|variant| {
            let own = curve(variant);
            let points: Vec<_> = own.iter().map(|(n, t)| (*n, *t)).collect();
            let crossover =
                if variant == YARDSTICK { Crossover::Yardstick } else { crossover(&own, &yardstick) };
            Summary { variant: variant.into(), growth: growth(&points), crossover }
        })
        .collect()
}

/// The variants of `rows`, each once, in order of appearance.
pub fn variants(rows: &[Row]) -> Vec<&str> {
    let mut all: Vec<&str> = Vec::new();
    for row in rows {
        if !all.contains(&row.case.variant.as_str()) {
            all.push(&row.case.variant);
        }
    }
    all
}

/// The lengths of `rows`, ascending.
pub fn lengths(rows: &[Row]) -> Vec<usize> {
    let mut all: Vec<usize> = rows.iter().map(|row| row.case.n).collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::super::case::examples::{not_run, row};
    use super::*;

    #[test]
    fn rows_that_were_not_run_count_nowhere() {
        let mut rows = Vec::new();
        for n in [1000usize, 2000, 4000, 8000] {
            rows.push(row("flash", n, 1e-9 * (n * n) as f64, 1e-7));
            rows.push(row("band", n, 3e-6 * n as f64, 0.1));
        }
        rows.push(not_run("flash", 16000));
        rows.push(not_run("slow", 16000));
        let all = summarise(&rows);
        assert_eq!(all.iter().map(|s| s.variant.as_str()).collect::<Vec<_>>(), ["flash", "band", "slow"]);
        assert_eq!(all[0].crossover, Crossover::Yardstick);
        assert!((all[0].growth.unwrap().exponent - 2.0).abs() < 1e-9);
        assert_eq!(all[1].crossover, Crossover::At(3000));
        assert!(all[2].growth.is_none() && all[2].crossover == Crossover::Unknown);
        assert_eq!(lengths(&rows), [1000, 2000, 4000, 8000, 16000]);
    }
}
