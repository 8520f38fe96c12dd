//! Exponentials of vectors, accurate where scans need them to be.
//!
//! A slow decay is a number so near 1 that its rounding would change how long a state remembers; scans therefore work
//! with the loss `1 - e^g`, which is accurate for any `g <= 0`.

use attn_core::simd::{Select, Simd, SimdBase, SimdFloat};
use attn_core::tile::exp2;
use std::f32::consts::LOG2_E;

/// `e^x` for `x <= 88`; 0 for -inf.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    exp2(simd, x * LOG2_E)
}

/// `1 - e^g` for `g <= 0`, relative error about 1e-6 however small `g` is. Beyond -0.4 by `exp`, within it by the series.
#[inline(always)]
pub(crate) fn loss<S: Simd>(simd: S, g: S::f32s) -> S::f32s {
    let one = S::f32s::splat(simd, 1.0);
    // 1 - e^g = -g (1 + g/2 (1 + g/3 (1 + ...))); the eighth term of 0.4 is 2e-8 of the first.
    let series = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
        .into_iter()
        .fold(one, |sum, n: f32| sum.mul_add(g * (1.0 / n), one));
    let near = g.simd_gt(S::f32s::splat(simd, -0.4));
    // A far `g` may be -inf: the series is then not looked at.
    near.select(-g * series, one - exp(simd, g))
}

/// `e^g` for `g <= 0`, exactly 1 at 0.
#[inline(always)]
pub(crate) fn kept<S: Simd>(simd: S, g: S::f32s) -> S::f32s {
    S::f32s::splat(simd, 1.0) - loss(simd, g)
}

/// `1 / (1 + e^-x)`, with full relative accuracy on both sides.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = S::f32s::splat(simd, 1.0);
    let positive = x.simd_gt(S::f32s::splat(simd, 0.0));
    let e = exp(simd, positive.select(-x, x));
    positive.select(one, e) / (one + e)
}

/// `ln(1 + e^x)`.
pub(crate) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + e^-x)`, the definition.
pub(crate) fn sigmoid64(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::simd::{Isa, SimdOp};

    struct All<'a>(&'a [f32], &'a mut [f32], &'a mut [f32]);

    impl SimdOp for All<'_> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            let outs = self.1.chunks_exact_mut(S::f32s::LEN).zip(self.2.chunks_exact_mut(S::f32s::LEN));
            for (x, (l, s)) in self.0.chunks_exact(S::f32s::LEN).zip(outs) {
                let x = S::f32s::from_slice(simd, x);
                loss(simd, x).store_slice(l);
                sigmoid(simd, x).store_slice(s);
            }
        }
    }

    #[test]
    fn both_are_accurate_relative_to_themselves() {
        for isa in Isa::available() {
            let mut xs: Vec<f32> = (0..8000).map(|i| -(i as f32) * 0.01).collect();
            xs.extend((0..160).map(|i| -(-(i as f32) * 0.25).exp()));
            let (mut losses, mut sigmoids) = (vec![0.0; xs.len()], vec![0.0; xs.len()]);
            isa.run(All(&xs, &mut losses, &mut sigmoids));
            for ((x, l), s) in xs.iter().zip(&losses).zip(&sigmoids) {
                let want = -f64::from(*x).exp_m1();
                assert!((f64::from(*l) - want).abs() <= 1e-6 * want, "{isa}: 1 - e^{x} = {l}, not {want}");
                let want = sigmoid64(f64::from(*x));
                // The exponent is rounded: |x| 2^-24.
                assert!((f64::from(*s) - want).abs() <= 6e-6 * want, "{isa}: sigmoid {x} = {s}, not {want}");
            }
        }
    }

    #[test]
    fn edges_are_exact() {
        let mut xs = [0.0; 16];
        xs[..4].copy_from_slice(&[f32::NEG_INFINITY, f32::NAN, -1e30, 0.0]);
        for isa in Isa::available() {
            let (mut losses, mut sigmoids) = ([7.0; 16], [7.0; 16]);
            isa.run(All(&xs, &mut losses, &mut sigmoids));
            assert_eq!((losses[0], losses[2], losses[3]), (1.0, 1.0, 0.0), "{isa}");
            assert_eq!((sigmoids[0], sigmoids[2]), (0.0, 0.0), "{isa}");
            assert!((sigmoids[3] - 0.5).abs() < 1e-7, "{isa}");
            assert!(losses[1].is_nan() && sigmoids[1].is_nan(), "{isa}");
        }
    }
}
