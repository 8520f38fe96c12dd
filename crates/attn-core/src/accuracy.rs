//! How far an output is from the truth, and how sure a sample of rows makes us.
//!
//! With `e_r = |got_r - want_r|^2` and `w_r = |want_r|^2` over the sampled rows `r`, the relative L2 error is
//! estimated by the ratio `sqrt(sum e / sum w)`. Its 95 % interval is that of the ratio estimator with the sample
//! stratified by position: `var = sum_h (W_h^2 / n_h) s_h^2 / mean(w)^2`, where `s_h^2` is the variance of
//! `e_r - R w_r` inside stratum `h` of weight `W_h` (Cochran, Sampling Techniques, 1977, chapters 5 and 6).

use serde::{Deserialize, Serialize};

/// The error of one row against the truth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowError {
    /// Stratum the row was drawn from (its share of all rows is the same for all strata).
    pub stratum: usize,
    /// `|got - want|^2`.
    pub error_sq: f64,
    /// `|want|^2`.
    pub want_sq: f64,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// Cosine of the angle between both rows; 1 if both are zero, 0 if one is.
    pub cosine: f64,
}

impl RowError {
    /// Compares one row.
    pub fn new(stratum: usize, got: &[f64], want: &[f64]) -> Self {
        let sq = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        let pairs = || got.iter().zip(want);
        let (got_sq, want_sq) = (sq(got), sq(want));
        let dot: f64 = pairs().map(|(g, w)| g * w).sum();
        let cosine = match (got_sq == 0.0, want_sq == 0.0) {
            (true, true) => 1.0,
            (false, false) => dot / (got_sq * want_sq).sqrt(),
            _ => 0.0,
        };
        Self {
            stratum,
            error_sq: pairs().map(|(g, w)| (g - w) * (g - w)).sum(),
            want_sq,
            max_abs: pairs().map(|(g, w)| (g - w).abs()).fold(0.0, max_or_nan),
            cosine,
        }
    }
}

/// The error of an output, from a sample of its rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Rows compared.
    pub rows: usize,
    /// Relative L2 error.
    pub rel_l2: f64,
    /// Lower end of its 95 % confidence interval.
    pub rel_l2_low: f64,
    /// Upper end of its 95 % confidence interval.
    pub rel_l2_high: f64,
    /// Largest absolute difference in any row.
    pub max_abs: f64,
    /// Relative L2 error of the worst row.
    pub worst_row: f64,
    /// 5th percentile of the rows' cosines.
    pub cosine_p5: f64,
    /// Median of the rows' cosines.
    pub cosine_median: f64,
}

impl Accuracy {
    /// Summarises row errors; `None` without rows.
    pub fn of(rows: &[RowError]) -> Option<Self> {
        if rows.is_empty() {
            return None;
        }
        let (error_sq, want_sq) = rows.iter().fold((0.0, 0.0), |(e, w), r| (e + r.error_sq, w + r.want_sq));
        let ratio = if want_sq == 0.0 && error_sq == 0.0 { 0.0 } else { error_sq / want_sq };
        let spread = 1.96 * ratio_variance(rows, ratio).sqrt();
        let worst = rows.iter().map(|r| if r.error_sq == 0.0 { 0.0 } else { r.error_sq / r.want_sq });
        let mut cosines: Vec<f64> = rows.iter().map(|r| r.cosine).collect();
        cosines.sort_by(f64::total_cmp);
        let quantile = |p: f64| cosines[((cosines.len() - 1) as f64 * p).round() as usize];
        Some(Self {
            rows: rows.len(),
            rel_l2: ratio.sqrt(),
            rel_l2_low: (ratio - spread).max(0.0).sqrt(),
            rel_l2_high: (ratio + spread).sqrt(),
            max_abs: rows.iter().map(|r| r.max_abs).fold(0.0, max_or_nan),
            worst_row: worst.fold(0.0, max_or_nan).sqrt(),
            cosine_p5: quantile(0.05),
            cosine_median: quantile(0.5),
        })
    }
}

/// `f64::max` drops NaN; an error that is NaN must stay visible.
fn max_or_nan(a: f64, b: f64) -> f64 {
    if a.is_nan() || a >= b { a } else { b }
}

/// Variance of the stratified ratio estimate; strata with a single row borrow nothing and count as certain.
fn ratio_variance(rows: &[RowError], ratio: f64) -> f64 {
    let strata = 1 + rows.iter().map(|r| r.stratum).max().unwrap_or(0);
    let mean_want = rows.iter().map(|r| r.want_sq).sum::<f64>() / rows.len() as f64;
    if mean_want == 0.0 {
        return 0.0;
    }
    let mut residuals = vec![Vec::new(); strata];
    rows.iter().for_each(|r| residuals[r.stratum].push(r.error_sq - ratio * r.want_sq));
    residuals.retain(|r| !r.is_empty());
    let weight = 1.0 / residuals.len() as f64;
    let variance_of_mean = |r: &Vec<f64>| {
        let n = r.len() as f64;
        let mean = r.iter().sum::<f64>() / n;
        r.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0).max(1.0) / n
    };
    residuals.iter().map(|r| weight * weight * variance_of_mean(r)).sum::<f64>() / (mean_want * mean_want)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_have_no_error() {
        let row = RowError::new(0, &[1.0, 2.0], &[1.0, 2.0]);
        let a = Accuracy::of(&[row, row]).unwrap();
        assert_eq!((a.rel_l2, a.max_abs, a.worst_row, a.rel_l2_high), (0.0, 0.0, 0.0, 0.0));
        assert!((a.cosine_median - 1.0).abs() < 1e-15);
    }

    #[test]
    fn nan_is_not_hidden() {
        let a = Accuracy::of(&[RowError::new(0, &[f64::NAN, 2.0], &[1.0, 2.0])]).unwrap();
        assert!(a.rel_l2.is_nan() && a.max_abs.is_nan() && a.worst_row.is_nan());
    }

    #[test]
    fn the_interval_covers_the_truth_about_95_times_in_100() {
        // A population in four strata of 1000 rows whose errors differ by stratum; many small samples of it.
        let mut seed = 7u64;
        let mut uniform = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 11) as f64 / (1u64 << 53) as f64
        };
        let population: Vec<Vec<RowError>> = (0..4)
            .map(|stratum| {
                let row = |want: f64, error: f64| RowError {
                    stratum,
                    error_sq: want * error * error,
                    want_sq: want,
                    max_abs: 0.0,
                    cosine: 1.0,
                };
                (0..1000).map(|_| row(0.5 + uniform(), 0.02 * (1.0 + stratum as f64) * uniform())).collect()
            })
            .collect();
        let all: Vec<RowError> = population.iter().flatten().copied().collect();
        let truth = Accuracy::of(&all).unwrap().rel_l2;
        let covered = (0..1000)
            .filter(|_| {
                let draw = |s: &Vec<RowError>, u: f64| s[(u * s.len() as f64) as usize];
                let sample: Vec<_> = population
                    .iter()
                    .flat_map(|s| (0..32).map(|_| draw(s, uniform())).collect::<Vec<_>>())
                    .collect();
                let a = Accuracy::of(&sample).unwrap();
                a.rel_l2_low <= truth && truth <= a.rel_l2_high
            })
            .count();
        assert!((900..=985).contains(&covered), "covered {covered} of 1000");
    }
}
