//! Some queries at the distances of one segment.
// Indexed by constants once unrolled: then the sums stay in registers.
#![allow(clippy::needless_range_loop)]

use super::DISTANCES;
use super::segments::Group;
use attn_core::simd::{Simd, SimdBase, SimdFloat, SimdMask};
use attn_core::tile::{MAX_LANES, exp2};
use std::f32::consts::{LN_2, LOG2_E};

/// How far a score may exceed the reference before the sums are rescaled: `ln 2^8`.
const SLACK: f32 = 8.0 * LN_2;
/// Vectors of a value row that are added together.
const VECTORS: usize = 4;

/// `scores[a][r] = scale * q_a . k_r` for the keys of each query, and -inf behind them.
#[inline(always)]
pub(super) fn dots<S: Simd, const W: usize, const Q: usize>(
    simd: S,
    q: &[[f32; W]; Q],
    k: &[[f32; W]],
    group: Group<'_, Q>,
    scale: f32,
    scores: &mut [[f32; DISTANCES]; Q],
) {
    let lanes = S::f32s::LEN;
    // Of four keys each: a quarter of the lanes for one key.
    let mut sums = [[S::f32s::splat(simd, 0.0); DISTANCES / 4]; Q];
    for (at, four) in group.rows[0][..group.shared].iter().enumerate() {
        let [a, b, c, d] = *four;
        let ab = pairs(simd, dot(simd, q, &k[a as usize]), dot(simd, q, &k[b as usize]));
        let cd = pairs(simd, dot(simd, q, &k[c as usize]), dot(simd, q, &k[d as usize]));
        let four = pairs(simd, ab, cd);
        for query in 0..Q {
            sums[query][at] = four[query];
        }
    }
    for at in group.shared..group.rows[0].len() {
        for query in 0..Q {
            let q = std::array::from_ref(&q[query]);
            let [a, b, c, d] = group.rows[query][at];
            let ab = pairs(simd, dot(simd, q, &k[a as usize]), dot(simd, q, &k[b as usize]));
            let cd = pairs(simd, dot(simd, q, &k[c as usize]), dot(simd, q, &k[d as usize]));
            let [four] = pairs(simd, ab, cd);
            sums[query][at] = four;
        }
    }
    for query in 0..Q {
        for (sums, scores) in sums[query].chunks_exact(lanes / 4).zip(scores[query].chunks_exact_mut(lanes)) {
            let sums = match *sums {
                [a, b, c, d] => neighbours::<S>(neighbours::<S>(a, b), neighbours::<S>(c, d)),
                [a, b] => neighbours::<S>(a, b),
                _ => sums[0],
            };
            (sums * scale).store_slice(scores);
        }
        scores[query][group.len..].fill(f32::NEG_INFINITY);
    }
}

/// Partial sums of `q_a . k`, a vector of them for each query.
#[inline(always)]
fn dot<S: Simd, const W: usize, const Q: usize>(simd: S, q: &[[f32; W]; Q], k: &[f32; W]) -> [S::f32s; Q] {
    let lanes = S::f32s::LEN;
    let mut sums = [S::f32s::splat(simd, 0.0); Q];
    for (at, k) in k.chunks_exact(lanes).enumerate() {
        let k = S::f32s::from_slice(simd, k);
        for query in 0..Q {
            let q = S::f32s::from_slice(simd, &q[query][at * lanes..(at + 1) * lanes]);
            sums[query] = q.mul_add(k, sums[query]);
        }
    }
    sums
}

#[inline(always)]
fn pairs<S: Simd, const Q: usize>(simd: S, a: [S::f32s; Q], b: [S::f32s; Q]) -> [S::f32s; Q] {
    let mut sums = [S::f32s::splat(simd, 0.0); Q];
    for query in 0..Q {
        sums[query] = neighbours::<S>(a[query], b[query]);
    }
    sums
}

/// Sums of neighbouring lanes, first those of `a`, then those of `b`.
#[inline(always)]
fn neighbours<S: Simd>(a: S::f32s, b: S::f32s) -> S::f32s {
    let (even, odd) = a.deinterleave(b);
    even + odd
}

/// Turns scores into weights in place, and brings the sums and the accumulator to a reference that they do not exceed by much.
#[inline(always)]
pub(super) fn weigh<S: Simd>(
    simd: S,
    scores: &mut [f32],
    max: &mut f32,
    sum: &mut [f32; MAX_LANES],
    acc: &mut [f32],
) {
    let lanes = S::f32s::LEN;
    let mut highest = S::f32s::splat(simd, f32::NEG_INFINITY);
    for scores in scores.chunks_exact(lanes) {
        highest = highest.max(S::f32s::from_slice(simd, scores));
    }
    if highest.simd_gt(S::f32s::splat(simd, *max + SLACK)).any_true() {
        raise(highest.as_slice(), max, sum, acc);
    }
    // Where nothing is seen yet, any finite reference does.
    let reference = S::f32s::splat(simd, if *max == f32::NEG_INFINITY { 0.0 } else { *max });
    let mut total = S::f32s::from_slice(simd, &sum[..lanes]);
    for scores in scores.chunks_exact_mut(lanes) {
        let weights = exp2(simd, (S::f32s::from_slice(simd, scores) - reference) * LOG2_E);
        weights.store_slice(scores);
        total += weights;
    }
    total.store_slice(&mut sum[..lanes]);
}

#[cold]
#[inline(never)]
fn raise(highest: &[f32], max: &mut f32, sum: &mut [f32; MAX_LANES], acc: &mut [f32]) {
    let new = highest.iter().fold(*max, |max, x| max.max(*x));
    let factor = (*max - new).exp();
    sum.iter_mut().chain(acc).for_each(|x| *x *= factor);
    *max = new;
}

/// `acc_a += sum_r weights[a][r] v_r` over the values of each query.
#[inline(always)]
pub(super) fn values<S: Simd, const W: usize, const Q: usize>(
    simd: S,
    v: &[[f32; W]],
    group: Group<'_, Q>,
    weights: &[[f32; DISTANCES]; Q],
    acc: &mut [[f32; W]; Q],
) {
    let (lanes, step) = (S::f32s::LEN, VECTORS * S::f32s::LEN);
    let rows = group.rows.map(<[[u32; 4]]>::as_flattened);
    let shared = group.len.min(4 * group.shared);
    for first in (0..W / step * step).step_by(step) {
        let columns = first..first + step;
        // From zero, and added once: sums of few numbers round less.
        let mut sums = [[S::f32s::splat(simd, 0.0); VECTORS]; Q];
        for (at, row) in rows[0][..shared].iter().enumerate() {
            let row = &v[*row as usize][columns.clone()];
            for query in 0..Q {
                add(simd, row, weights[query][at], &mut sums[query]);
            }
        }
        for at in shared..group.len {
            for query in 0..Q {
                let row = &v[rows[query][at] as usize][columns.clone()];
                add(simd, row, weights[query][at], &mut sums[query]);
            }
        }
        for query in 0..Q {
            let acc = &mut acc[query][columns.clone()];
            for n in 0..VECTORS {
                let acc = &mut acc[n * lanes..(n + 1) * lanes];
                (S::f32s::from_slice(simd, acc) + sums[query][n]).store_slice(acc);
            }
        }
    }
}

/// `sums += weight * row`.
#[inline(always)]
fn add<S: Simd>(simd: S, row: &[f32], weight: f32, sums: &mut [S::f32s; VECTORS]) {
    let (lanes, weight) = (S::f32s::LEN, S::f32s::splat(simd, weight));
    for n in 0..VECTORS {
        sums[n] = weight.mul_add(S::f32s::from_slice(simd, &row[n * lanes..(n + 1) * lanes]), sums[n]);
    }
}
