//! One query at the distances of one segment.

use super::{DISTANCES, Segment};
use attn_core::simd::{Simd, SimdBase, SimdFloat, SimdMask};
use attn_core::tile::{MAX_LANES, exp2};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// How far a score may exceed the reference before the sums are rescaled: `ln 2^8`.
const SLACK: f32 = 8.0 * LN_2;
/// Vectors of a value row that are added together.
const VECTORS: usize = 4;

/// The rows of a query's keys among those from its farthest to its nearest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Along<'a> {
    behind: &'a [u32],
    /// Rows before the first key of all.
    lost: u32,
}

impl<'a> Along<'a> {
    /// Of a query at `position`, with the range of the keys; `None` if it sees none of them.
    #[inline(always)]
    pub(super) fn of(segment: &'a Segment, position: isize) -> Option<(Self, Range<usize>)> {
        let end = usize::try_from(position + 1).ok()?.checked_sub(segment.nearest)?;
        if end == 0 {
            return None;
        }
        let position = position as usize;
        if position >= segment.farthest {
            return Some((Self { behind: &segment.behind, lost: 0 }, position - segment.farthest..end));
        }
        let lost = (segment.farthest - position) as u32;
        let seen = segment.behind.partition_point(|row| *row >= lost);
        Some((Self { behind: &segment.behind[..seen], lost }, 0..end))
    }

    #[inline(always)]
    pub(super) fn len(self) -> usize {
        self.behind.len()
    }

    #[inline(always)]
    fn row(self, behind: u32) -> usize {
        (behind - self.lost) as usize
    }
}

/// `scores[r] = scale * q . k_r` for the keys of a query, and -inf up to the next whole vector.
#[inline(always)]
pub(super) fn dots<S: Simd, const W: usize>(
    simd: S,
    q: &[f32; W],
    k: &[[f32; W]],
    along: Along<'_>,
    scale: f32,
    scores: &mut [f32; DISTANCES],
) {
    let lanes = S::f32s::LEN;
    for (behind, scores) in along.behind.chunks(lanes).zip(scores.chunks_exact_mut(lanes)) {
        let n = behind.len();
        let mut filled = [0; MAX_LANES];
        let behind = if n == lanes {
            behind
        } else {
            // The last one again, for want of others.
            filled.fill(behind[n - 1]);
            filled[..n].copy_from_slice(behind);
            &filled[..lanes]
        };
        let mut sums = [S::f32s::splat(simd, 0.0); MAX_LANES / 4];
        for (sum, four) in sums.iter_mut().zip(behind.as_chunks::<4>().0) {
            let [a, b, c, d] = *four;
            let (a, b) = (dot(simd, q, &k[along.row(a)]), dot(simd, q, &k[along.row(b)]));
            let (c, d) = (dot(simd, q, &k[along.row(c)]), dot(simd, q, &k[along.row(d)]));
            *sum = neighbours::<S>(neighbours::<S>(a, b), neighbours::<S>(c, d));
        }
        let [a, b, c, d] = sums;
        let sums = match lanes {
            4 => a,
            8 => neighbours::<S>(a, b),
            _ => neighbours::<S>(neighbours::<S>(a, b), neighbours::<S>(c, d)),
        };
        (sums * scale).store_slice(scores);
        scores[n..].fill(f32::NEG_INFINITY);
    }
}

/// Partial sums of `q . k`.
#[inline(always)]
fn dot<S: Simd, const W: usize>(simd: S, q: &[f32; W], k: &[f32; W]) -> S::f32s {
    let mut sum = S::f32s::splat(simd, 0.0);
    for (q, k) in q.chunks_exact(S::f32s::LEN).zip(k.chunks_exact(S::f32s::LEN)) {
        sum = S::f32s::from_slice(simd, q).mul_add(S::f32s::from_slice(simd, k), sum);
    }
    sum
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

/// `acc += sum_r weights[r] v_r` over the values of a query.
#[inline(always)]
pub(super) fn values<S: Simd, const W: usize>(
    simd: S,
    v: &[[f32; W]],
    along: Along<'_>,
    weights: &[f32],
    acc: &mut [f32; W],
) {
    let lanes = S::f32s::LEN;
    for (group, acc) in acc.chunks_exact_mut(VECTORS * lanes).enumerate() {
        let columns = group * VECTORS * lanes..(group + 1) * VECTORS * lanes;
        // Two accumulators: one alone would wait for itself.
        let mut sums = [[S::f32s::splat(simd, 0.0); VECTORS]; 2];
        for (sum, acc) in sums[0].iter_mut().zip(acc.chunks_exact(lanes)) {
            *sum = S::f32s::from_slice(simd, acc);
        }
        let (twos, rest) = along.behind.as_chunks::<2>();
        for (two, weights) in twos.iter().zip(weights.as_chunks::<2>().0) {
            for ((behind, weight), sums) in two.iter().zip(weights).zip(&mut sums) {
                add(simd, &v[along.row(*behind)][columns.clone()], *weight, sums);
            }
        }
        if let [behind] = rest {
            add(simd, &v[along.row(*behind)][columns], weights[along.len() - 1], &mut sums[0]);
        }
        let [even, odd] = sums;
        for ((even, odd), acc) in even.into_iter().zip(odd).zip(acc.chunks_exact_mut(lanes)) {
            (even + odd).store_slice(acc);
        }
    }
}

#[inline(always)]
fn add<S: Simd>(simd: S, row: &[f32], weight: f32, sums: &mut [S::f32s; VECTORS]) {
    let weight = S::f32s::splat(simd, weight);
    for (sum, row) in sums.iter_mut().zip(row.chunks_exact(S::f32s::LEN)) {
        *sum = weight.mul_add(S::f32s::from_slice(simd, row), *sum);
    }
}
