//! How a time grows: the exponent `p` of `t = c n^p` over the largest lengths, with its 95 % interval.
//!
//! Ordinary least squares of `y = ln t` on `x = ln n` over `m` points:
//!
//! ```text
//! p = Σ (x − x̄)(y − ȳ) / Σ (x − x̄)²        s² = Σ (y − ȳ − p (x − x̄))² / (m − 2)
//! interval: p ± t(0.975, m − 2) √(s² / Σ (x − x̄)²)
//! ```
//!
//! The largest lengths only: at small ones constant costs and caches hide the growth.

use serde::Serialize;

/// Points that a fit uses if there are at most twice as many; with more, it uses the larger half.
const POINTS: usize = 4;

/// A fitted power law.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Growth {
    /// `p` in `t = c n^p`.
    pub exponent: f64,
    /// Half the width of its 95 % interval; `None` for two points, which leave no residual.
    pub margin: Option<f64>,
    /// Points used.
    pub points: usize,
    /// The smallest length used.
    pub from: usize,
}

/// Fits the largest of `points`, `(n, seconds)` in any order; `None` for fewer than two lengths.
pub fn growth(points: &[(usize, f64)]) -> Option<Growth> {
    let mut points: Vec<_> =
        points.iter().copied().filter(|&(n, t)| n > 0 && t > 0.0 && t.is_finite()).collect();
    points.sort_by_key(|(n, _)| *n);
    points.dedup_by_key(|(n, _)| *n);
    let largest = &points[points.len().saturating_sub(POINTS.max(points.len() / 2))..];
    let m = largest.len();
    if m < 2 {
        return None;
    }
    let logs: Vec<(f64, f64)> = largest.iter().map(|&(n, t)| ((n as f64).ln(), t.ln())).collect();
    let mean = |pick: fn(&(f64, f64)) -> f64| logs.iter().map(pick).sum::<f64>() / m as f64;
    let (x_mean, y_mean) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = logs.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    let exponent = logs.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum::<f64>() / spread;
    let residuals: f64 = logs.iter().map(|(x, y)| (y - y_mean - exponent * (x - x_mean)).powi(2)).sum();
    let margin = (m > 2).then(|| student_t(m - 2) * (residuals / (m - 2) as f64 / spread).sqrt());
    Some(Growth { exponent, margin, points: m, from: largest[0].0 })
}

/// The 97.5 % quantile of Student's t; from ten degrees of freedom on by its expansion around the normal quantile.
fn student_t(freedom: usize) -> f64 {
    const TABLE: [f64; 9] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262];
    let z: f64 = 1.959_964;
    let f = freedom as f64;
    let expansion =
        z + (z.powi(3) + z) / (4.0 * f) + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * f * f);
    TABLE.get(freedom - 1).copied().unwrap_or(expansion)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn law(exponent: f64, noise: &[f64]) -> Vec<(usize, f64)> {
        let point =
            |(i, e): (usize, &f64)| (1024 << i, 1e-6 * (1024f64 * 2f64.powi(i as i32)).powf(exponent) * e);
        noise.iter().enumerate().map(point).collect()
    }

    #[test]
    fn a_pure_power_law_is_found_exactly() {
        for exponent in [1.0, 1.5, 2.0] {
            let fit = growth(&law(exponent, &[1.0; 6])).unwrap();
            assert!((fit.exponent - exponent).abs() < 1e-12 && fit.margin.unwrap() < 1e-6, "{fit:?}");
            assert_eq!((fit.points, fit.from), (4, 4096));
        }
    }

    #[test]
    fn the_interval_is_that_of_the_textbook() {
        // x = 0, ln 2, 2 ln 2, 3 ln 2 with residuals +e, -e, -e, +e around slope 1: orthogonal to x, so p = 1.
        let fit = growth(&law(1.0, &[1.1, 1.0 / 1.1, 1.0 / 1.1, 1.1])).unwrap();
        assert!((fit.exponent - 1.0).abs() < 1e-12);
        let e = 1.1f64.ln();
        let spread = 5.0 * 2f64.ln().powi(2);
        assert!((fit.margin.unwrap() - 4.303 * (4.0 * e * e / 2.0 / spread).sqrt()).abs() < 1e-9);
    }

    #[test]
    fn small_lengths_do_not_count() {
        let mut points = law(2.0, &[1.0; 6]);
        points[0].1 = 7.0;
        points.reverse();
        assert!((growth(&points).unwrap().exponent - 2.0).abs() < 1e-12);
        assert_eq!(growth(&law(1.0, &[1.0; 11])).unwrap().points, 5);
    }

    #[test]
    fn two_points_have_no_interval_and_one_no_growth() {
        let fit = growth(&law(1.0, &[1.0; 2])).unwrap();
        assert_eq!((fit.margin, fit.points), (None, 2));
        assert_eq!(growth(&law(1.0, &[1.0])), None);
        assert_eq!(growth(&[(1024, 1.0), (1024, 2.0), (2048, f64::NAN)]), None);
    }

    #[test]
    fn quantiles_of_t_fall_towards_the_normal_one() {
        assert!((student_t(10) - 2.228).abs() < 0.01 && (student_t(30) - 2.042).abs() < 0.002);
        assert!((1..40).all(|f| student_t(f) > student_t(f + 1)));
    }
}
