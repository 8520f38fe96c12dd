//! From which length on a variant is faster than exact attention.
//!
//! Only lengths at which both were measured count. Between the last length where the variant was slower and the next
//! one both times are taken as power laws, and the crossing is where they meet: linear interpolation of
//! `ln t_variant − ln t_exact` in `ln n`.

use serde::Serialize;
use std::collections::BTreeMap;

/// Where a variant overtakes the yardstick.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Crossover {
    /// It is the yardstick.
    Yardstick,
    /// Faster at every measured length, the smallest of which is given.
    Always(usize),
    /// Faster from about this length on.
    At(usize),
    /// Not faster at the largest length where both were measured, which is given.
    NotUpTo(usize),
    /// At no length were both measured.
    Unknown,
}

/// Compares two curves of `(n, seconds)`.
pub fn crossover(variant: &BTreeMap<usize, f64>, yardstick: &BTreeMap<usize, f64>) -> Crossover {
    // (n, ln ratio), ascending; negative: the variant is faster.
    let ratios: Vec<(usize, f64)> =
        variant.iter().filter_map(|(&n, t)| Some((n, (t / yardstick.get(&n)?).ln()))).collect();
    let Some(&(largest, last)) = ratios.last() else { return Crossover::Unknown };
    if last >= 0.0 {
        return Crossover::NotUpTo(largest);
    }
    let Some(slower) = ratios.iter().rposition(|(_, ratio)| *ratio >= 0.0) else {
        return Crossover::Always(ratios[0].0);
    };
    let ((n0, r0), (n1, r1)) = (ratios[slower], ratios[slower + 1]);
    let (x0, x1) = ((n0 as f64).ln(), (n1 as f64).ln());
    Crossover::At((x0 + (x1 - x0) * r0 / (r0 - r1)).exp().round() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(usize, f64)]) -> BTreeMap<usize, f64> {
        points.iter().copied().collect()
    }

    #[test]
    fn a_linear_law_meets_a_quadratic_one_where_algebra_says() {
        let lengths = [1000, 2000, 4000, 8000];
        let exact = lengths.map(|n| (n, 1e-9 * (n * n) as f64));
        let linear = lengths.map(|n| (n, 3e-6 * n as f64));
        assert_eq!(crossover(&curve(&linear), &curve(&exact)), Crossover::At(3000));
    }

    #[test]
    fn only_common_lengths_count_and_nothing_is_extrapolated() {
        let exact = curve(&[(1000, 1.0), (2000, 4.0)]);
        assert_eq!(
            crossover(&curve(&[(1000, 0.5), (2000, 1.0), (4000, 99.0)]), &exact),
            Crossover::Always(1000)
        );
        assert_eq!(
            crossover(&curve(&[(1000, 3.0), (2000, 4.1), (4000, 6.0)]), &exact),
            Crossover::NotUpTo(2000)
        );
        assert_eq!(crossover(&curve(&[(4000, 1.0)]), &exact), Crossover::Unknown);
    }

    #[test]
    fn a_variant_that_wins_and_loses_counts_from_its_last_loss() {
        let exact = curve(&[(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0)]);
        let wavering = curve(&[(1, 0.5), (2, 2.0), (4, 0.5), (8, 0.5)]);
        assert!(matches!(crossover(&wavering, &exact), Crossover::At(3)));
    }
}
