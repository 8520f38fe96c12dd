//! Sums over vectors: each lane first, then across the lanes.

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
