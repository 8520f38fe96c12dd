//! Decay weights: powers of two of differences of cumulative log decays.
//!
//! Sums of decays are kept in f64, in units of `ln 2`: a difference of two of them is then exact to `1e-16` of the sum,
//! however strong the decays before. A difference `x` is split into `x = h + l` with `h` its nearest f32, and
//! `2^x = 2^h (1 + l ln 2)`, so that the weight's relative error is that of [`exp2`] for every size of `x`.
//!
//! A decay below [`FORGOTTEN`] counts as that: its weight is 0 in f32, and sums stay finite for -inf.

use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::{MAX_LANES, exp2};
use std::f64::consts::{LN_2, LOG2_E};

/// The strongest decay of one write, in units of `ln 2`.
const FORGOTTEN: f64 = -1e4;

/// A cumulative decay down to this may be divided out of a key (`2^40`, far from overflow); in units of `ln 2`.
pub(super) const LIMIT: f64 = 40.0;

/// Running sums of the rows of `log_decay [writes, width]`, in units of `ln 2`.
#[inline(always)]
pub(super) fn cumulate(log_decay: &[f32], width: usize, sums: &mut [f64]) {
    for at in 0..log_decay.len() {
        let g = f64::from(log_decay[at]) * LOG2_E;
        let g = if g < FORGOTTEN { FORGOTTEN } else { g };
        sums[at] = g + if at < width { 0.0 } else { sums[at - width] };
    }
}

/// `out = 2^x`, element by element.
#[inline(always)]
pub(super) fn powers<S: Simd>(simd: S, x: &[f64], out: &mut [f32]) {
    let out = &mut out[..x.len()];
    let mut pieces = x.chunks_exact(S::f32s::LEN);
    let mut outs = out.chunks_exact_mut(S::f32s::LEN);
    for (x, out) in pieces.by_ref().zip(outs.by_ref()) {
        power(simd, x, out);
    }
    let (rest, out) = (pieces.remainder(), outs.into_remainder());
    if !rest.is_empty() {
        let (mut padded, mut power_of) = ([0.0; MAX_LANES], [0.0; MAX_LANES]);
        padded[..rest.len()].copy_from_slice(rest);
        power(simd, &padded[..S::f32s::LEN], &mut power_of[..S::f32s::LEN]);
        out.copy_from_slice(&power_of[..rest.len()]);
    }
}

/// One vector of [`powers`].
#[inline(always)]
fn power<S: Simd>(simd: S, x: &[f64], out: &mut [f32]) {
    let (mut high, mut low) = ([0.0f32; MAX_LANES], [0.0f32; MAX_LANES]);
    for ((h, l), x) in high.iter_mut().zip(&mut low).zip(x) {
        *h = *x as f32;
        *l = ((*x - f64::from(*h)) * LN_2) as f32;
    }
    let high = exp2(simd, S::f32s::from_slice(simd, &high[..S::f32s::LEN]));
    let low = S::f32s::from_slice(simd, &low[..S::f32s::LEN]);
    high.mul_add(low, high).store_slice(out);
}

/// `out = 2^x - 1` for `x <= 0`, accurate also where the weight is close to 1: adding `(2^x - 1) s` to a state forgets at
/// the right rate even where `2^x` rounded to f32 would not.
#[inline(always)]
pub(super) fn losses<S: Simd>(simd: S, x: &[f64], out: &mut [f32]) {
    powers(simd, x, out);
    for (out, x) in out.iter_mut().zip(x) {
        let y = x * LN_2;
        // Degree 5 at |y| <= 1/16: the next term is below 1e-10 of the sum.
        let near = y * (1.0 + y / 2.0 * (1.0 + y / 3.0 * (1.0 + y / 4.0 * (1.0 + y / 5.0))));
        *out = if y > -0.0625 { near as f32 } else { *out - 1.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::simd::{Isa, SimdOp};

    struct All<'a>(&'a [f64], &'a mut [f32], &'a mut [f32]);

    impl SimdOp for All<'_> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            powers(simd, self.0, self.1);
            losses(simd, self.0, self.2);
        }
    }

    #[test]
    fn weights_and_losses_are_accurate_for_every_size() {
        let mut x: Vec<f64> = (0..4001).map(|i| -f64::from(i) * 0.031).collect();
        x.extend((0..70).map(|i| -(-f64::from(i)).exp2()));
        for isa in Isa::available() {
            let (mut weights, mut lost) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            isa.run(All(&x, &mut weights, &mut lost));
            for ((x, weight), lost) in x.iter().zip(&weights).zip(&lost) {
                let want = x.exp2();
                let error = (f64::from(*weight) - want).abs();
                assert!(error <= 3e-7 * want, "{isa}: 2^{x} = {weight}");
                let want = (x * LN_2).exp_m1();
                // Next to 1 the weight's own error is that of the loss.
                let error = (f64::from(*lost) - want).abs();
                assert!(
                    error <= 2e-7 * want.abs() || (want < -0.06 && error < 4e-7),
                    "{isa}: 2^{x} - 1 = {lost}"
                );
            }
        }
    }

    #[test]
    fn sums_stay_finite_when_everything_is_forgotten() {
        let mut sums = [0.0; 4];
        cumulate(&[-1.0, f32::NEG_INFINITY, -1.0, 0.0], 2, &mut sums);
        assert_eq!(sums, [-LOG2_E, FORGOTTEN, -2.0 * LOG2_E, FORGOTTEN]);
    }
}
