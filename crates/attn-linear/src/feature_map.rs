//! Feature maps: the front end of kernelised attention.
//!
//! Attention with weights `phi(q) . phi(k)` is linear in the length. A map must not look at other rows.

use attn_core::simd::{Isa, Select, Simd, SimdBase, SimdOp};
use attn_core::tile::{MAX_LANES, exp2};
use attn_core::view::Rows;
use std::f32::consts::LOG2_E;
use std::fmt::Debug;

/// Turns rows of queries or keys into rows of features.
pub trait FeatureMap: Debug + Send + Sync {
    /// Width of the features of a row of `head_dim`.
    fn width(&self, head_dim: usize) -> usize;

    /// `rows [len, head_dim]` to `features [len, width]`, row-major.
    fn apply(&self, isa: Isa, rows: Rows<'_, f32>, features: &mut [f32]);

    /// The definition, for one row in f64.
    fn define(&self, row: &[f64]) -> Vec<f64>;
}

/// `elu(x) + 1`: `x + 1` for `x > 0`, `e^x` otherwise. Positive, so that all weights are.
///
/// Source: Katharopoulos et al. 2020, equation 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EluPlusOne;

impl FeatureMap for EluPlusOne {
    fn width(&self, head_dim: usize) -> usize {
        head_dim
    }

    fn apply(&self, isa: Isa, rows: Rows<'_, f32>, features: &mut [f32]) {
        isa.run(EluPlusOneRows(rows, features));
    }

    fn define(&self, row: &[f64]) -> Vec<f64> {
        row.iter().map(|x| if *x > 0.0 { x + 1.0 } else { x.exp() }).collect()
    }
}

struct EluPlusOneRows<'a>(Rows<'a, f32>, &'a mut [f32]);

impl SimdOp for EluPlusOneRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self(rows, features) = self;
        for (row, out) in rows.iter().zip(features.chunks_exact_mut(rows.width().max(1))) {
            let mut from = row.chunks_exact(S::f32s::LEN);
            let mut to = out.chunks_exact_mut(S::f32s::LEN);
            for (from, to) in from.by_ref().zip(to.by_ref()) {
                elu_plus_one(simd, S::f32s::from_slice(simd, from)).store_slice(to);
            }
            let (rest, to) = (from.remainder(), to.into_remainder());
            if rest.is_empty() {
                continue;
            }
            let mut lanes = [0.0; MAX_LANES];
            lanes[..rest.len()].copy_from_slice(rest);
            let lanes = &mut lanes[..S::f32s::LEN];
            elu_plus_one(simd, S::f32s::from_slice(simd, lanes)).store_slice(lanes);
            to.copy_from_slice(&lanes[..rest.len()]);
        }
    }
}

#[inline(always)]
fn elu_plus_one<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let positive = x.simd_gt(S::f32s::splat(simd, 0.0));
    // `exp2` sees no positive number, so it cannot overflow; NaN is not positive and passes through it.
    let below = positive.select(S::f32s::splat(simd, 0.0), x);
    positive.select(x + 1.0, exp2(simd, below * LOG2_E))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elu_plus_one_equals_its_definition_on_every_isa_and_width() {
        for isa in Isa::available() {
            for width in [1, 3, 4, 15, 16, 17, 40] {
                let (len, stride) = (5, width + 2);
                let data: Vec<f32> =
                    (0..len * stride).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.3).collect();
                let rows = Rows::new(&data, len, width, stride);
                let mut got = vec![f32::NAN; len * width];
                EluPlusOne.apply(isa, rows, &mut got);
                for (got, row) in got.chunks_exact(width).zip(rows.iter()) {
                    let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                    for (got, want) in got.iter().zip(EluPlusOne.define(&row)) {
                        // Rounding x log2(e) costs |x| 2^-24 in the exponent.
                        let error = (f64::from(*got) - want).abs();
                        assert!(error <= 2e-6 * want, "{isa} width {width}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn elu_plus_one_keeps_nan_and_reaches_its_limits() {
        for isa in Isa::available() {
            let data = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -1e30, 1e30];
            let mut got = [0.5; 7];
            EluPlusOne.apply(isa, Rows::new(&data, 1, 7, 7), &mut got);
            assert!(got[0].is_nan() && got[1].is_nan(), "{isa}");
            assert_eq!([got[2], got[3], got[5], got[6]], [f32::INFINITY, 0.0, 0.0, 1e30], "{isa}");
            assert!((got[4] - 1.0).abs() < 2e-7, "{isa}");
        }
    }
}
