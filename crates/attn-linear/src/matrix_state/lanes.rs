//! Rows in vectors: their sums, each lane first and then across the lanes, and multiples.

use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::MAX_LANES;

/// `a . b`, not yet summed across the lanes.
#[inline(always)]
pub(super) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> S::f32s {
    let (mut a, mut b) = (a.chunks_exact(S::f32s::LEN), b.chunks_exact(S::f32s::LEN));
    let mut lanes = S::f32s::splat(simd, 0.0);
    for (a, b) in a.by_ref().zip(b.by_ref()) {
        lanes = S::f32s::from_slice(simd, a).mul_add(S::f32s::from_slice(simd, b), lanes);
    }
    let (a, b) = (a.remainder(), b.remainder());
    if a.is_empty() {
        return lanes;
    }
    let mut rest = [0.0; MAX_LANES];
    rest.iter_mut().zip(a.iter().zip(b)).for_each(|(rest, (a, b))| *rest = a * b);
    lanes + S::f32s::from_slice(simd, &rest[..S::f32s::LEN])
}

/// The sum of whole vectors, not yet summed across the lanes.
#[inline(always)]
pub(super) fn sum<S: Simd>(simd: S, x: &[f32]) -> S::f32s {
    let vectors = x.chunks_exact(S::f32s::LEN);
    vectors.fold(S::f32s::splat(simd, 0.0), |sum, x| sum + S::f32s::from_slice(simd, x))
}

/// The sum across the lanes, halving them.
#[inline(always)]
pub(super) fn across<S: Simd>(_: S, x: S::f32s) -> f32 {
    let mut lanes = [0.0f32; MAX_LANES];
    x.store_slice(&mut lanes[..S::f32s::LEN]);
    let mut half = S::f32s::LEN / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `x <- by x`.
#[inline(always)]
pub(super) fn scale<S: Simd>(simd: S, by: f32, x: &mut [f32]) {
    let by_all = S::f32s::splat(simd, by);
    let mut vectors = x.chunks_exact_mut(S::f32s::LEN);
    for x in vectors.by_ref() {
        (by_all * S::f32s::from_slice(simd, x)).store_slice(x);
    }
    vectors.into_remainder().iter_mut().for_each(|x| *x *= by);
}

/// `x <- x + loss x`.
#[inline(always)]
pub(super) fn lose<S: Simd>(simd: S, loss: f32, x: &mut [f32]) {
    let all = S::f32s::splat(simd, loss);
    let mut vectors = x.chunks_exact_mut(S::f32s::LEN);
    for x in vectors.by_ref() {
        let old = S::f32s::from_slice(simd, x);
        all.mul_add(old, old).store_slice(x);
    }
    vectors.into_remainder().iter_mut().for_each(|x| *x += loss * *x);
}

/// `x <- x + loss o x`.
#[inline(always)]
pub(super) fn lose_each<S: Simd>(simd: S, loss: &[f32], x: &mut [f32]) {
    let loss = &loss[..x.len()];
    let (mut vectors, mut losses) = (x.chunks_exact_mut(S::f32s::LEN), loss.chunks_exact(S::f32s::LEN));
    for (x, loss) in vectors.by_ref().zip(losses.by_ref()) {
        let old = S::f32s::from_slice(simd, x);
        S::f32s::from_slice(simd, loss).mul_add(old, old).store_slice(x);
    }
    vectors.into_remainder().iter_mut().zip(losses.remainder()).for_each(|(x, loss)| *x += loss * *x);
}

/// `out <- out + x`.
#[inline(always)]
pub(super) fn add<S: Simd>(simd: S, x: &[f32], out: &mut [f32]) {
    let mut outs = out.chunks_exact_mut(S::f32s::LEN);
    let mut xs = x.chunks_exact(S::f32s::LEN);
    for (out, x) in outs.by_ref().zip(xs.by_ref()) {
        (S::f32s::from_slice(simd, out) + S::f32s::from_slice(simd, x)).store_slice(out);
    }
    outs.into_remainder().iter_mut().zip(xs.remainder()).for_each(|(out, x)| *out += x);
}

/// `out <- out + by x`.
#[inline(always)]
pub(super) fn add_scaled<S: Simd>(simd: S, by: f32, x: &[f32], out: &mut [f32]) {
    let all = S::f32s::splat(simd, by);
    let mut outs = out.chunks_exact_mut(S::f32s::LEN);
    let mut xs = x.chunks_exact(S::f32s::LEN);
    for (out, x) in outs.by_ref().zip(xs.by_ref()) {
        all.mul_add(S::f32s::from_slice(simd, x), S::f32s::from_slice(simd, out)).store_slice(out);
    }
    outs.into_remainder().iter_mut().zip(xs.remainder()).for_each(|(out, x)| *out += by * x);
}

/// `out <- out + x o y`.
#[inline(always)]
pub(super) fn add_product<S: Simd>(simd: S, x: &[f32], y: &[f32], out: &mut [f32]) {
    let y = &y[..out.len()];
    let mut outs = out.chunks_exact_mut(S::f32s::LEN);
    let (mut xs, mut ys) = (x.chunks_exact(S::f32s::LEN), y.chunks_exact(S::f32s::LEN));
    for ((out, x), y) in outs.by_ref().zip(xs.by_ref()).zip(ys.by_ref()) {
        let (x, y) = (S::f32s::from_slice(simd, x), S::f32s::from_slice(simd, y));
        x.mul_add(y, S::f32s::from_slice(simd, out)).store_slice(out);
    }
    let rest = outs.into_remainder().iter_mut().zip(xs.remainder()).zip(ys.remainder());
    rest.for_each(|((out, x), y)| *out += x * y);
}

/// `a . b` in f64.
#[inline(always)]
pub(super) fn dot_f64(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0f64; MAX_LANES];
    let (mut a, mut b) = (a.chunks_exact(MAX_LANES), b.chunks_exact(MAX_LANES));
    for (a, b) in a.by_ref().zip(b.by_ref()) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += f64::from(*a) * f64::from(*b));
    }
    let rest = a.remainder().iter().zip(b.remainder());
    sums.iter_mut().zip(rest).for_each(|(sum, (a, b))| *sum += f64::from(*a) * f64::from(*b));
    let mut half = MAX_LANES / 2;
    while half > 0 {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
        half /= 2;
    }
    sums[0]
}
