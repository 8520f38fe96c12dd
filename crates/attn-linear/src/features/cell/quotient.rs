//! The quotient of sums: `o = N / den(D)`, with values taken relative to a reference `m`.
//!
//! With `N' = N - D m`, the sum of weighted `v - m`:
//!
//! ```text
//! o = N' / den + (D / den) m
//! ```
//!
//! Any `m` gives the same; one near the values makes `N'` small, so that nothing is lost where values hardly differ: a query that
//! sees one key gets exactly its value, and gradients by the weight of exactly 0. Backwards, `D / den` being 1 but for what
//! `den` has more than `D`:
//!
//! ```text
//! dN' = do / den      dD = ((do . m) rest - slope (do . N') / den) / den      rest = 1 - slope D / den,  slope = d den / d D
//! ```

use super::super::Normaliser;

/// The divisor of one row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Divisor {
    den: f32,
    /// `d den / d D`.
    slope: f32,
    /// `1 - slope D / den`, without the cancellation.
    rest: f32,
    /// `D / den`.
    ratio: f32,
}

impl Divisor {
    /// Of the sum of weights `d`; `p` are the query's features.
    #[inline(always)]
    pub(super) fn new(normaliser: Normaliser, d: f32, p: &[f32]) -> Self {
        let plus = |more: f32| {
            let den = d + more;
            Self { den, slope: 1.0, rest: more / den, ratio: if more == 0.0 { 1.0 } else { d / den } }
        };
        match normaliser {
            Normaliser::None | Normaliser::Rows => Self { den: 1.0, slope: 0.0, rest: 1.0, ratio: 0.0 },
            Normaliser::Plus(eps) => plus(eps),
            Normaliser::AtLeast(eps) if d < eps => Self { den: eps, slope: 0.0, rest: 1.0, ratio: d / eps },
            Normaliser::AtLeast(_) => plus(0.0),
            Normaliser::EachPlus(eps) => plus(eps * p.iter().sum::<f32>()),
        }
    }

    /// `o` of `n`, the sum of weighted `v - m`. Nothing seen, or seen with no weight at all: zeros.
    #[inline(always)]
    pub(super) fn divide(&self, n: &[f32], reference: &[f32], out: &mut [f32]) {
        let Self { den, ratio, .. } = *self;
        if den == 0.0 {
            return out.fill(0.0);
        }
        for ((o, n), m) in out.iter_mut().zip(n).zip(reference) {
            *o = n / den + ratio * m;
        }
    }

    /// From `d_out` to the gradients by `n`, into `d_n`, and by `D`: as a number of its own, and through the divisor alone.
    #[inline(always)]
    pub(super) fn back(&self, n: &[f32], reference: &[f32], d_out: &[f32], d_n: &mut [f32]) -> (f32, f32) {
        let Self { den, slope, rest, ratio } = *self;
        let inverse = if den == 0.0 { 0.0 } else { 1.0 / den };
        let (mut along, mut by_reference) = (0.0, 0.0);
        for (((d_n, d), n), m) in d_n.iter_mut().zip(d_out).zip(n).zip(reference) {
            *d_n = d * inverse;
            along += d * n;
            by_reference += d * m;
        }
        let along = along * inverse;
        if den == 0.0 {
            return (0.0, 0.0);
        }
        ((by_reference * rest - slope * along) * inverse, -(along + ratio * by_reference) * inverse)
    }
}
