//! Scores to weights and gradients of scores, both in one pass over a tile with queries in the lanes.
//!
//! ```text
//! p  = 2^(s log2 e - lse log2 e)          w = f p             (f: dropout, else 1)
//! ds = p (f dp - delta)                   dr = ds * slope     (slope = softmax_scale * score_mod')
//! ```
//!
//! `s` is -inf where the query does not see the key, and `lse log2 e` is set to +inf for queries that see nothing: then `w`
//! and `dr` are exactly 0, whatever stands in the other numbers.

use attn_core::simd::{Select, Simd, SimdBase, SimdFloat};
use attn_core::tile::exp2;
use std::f32::consts::LOG2_E;
use std::ops::BitOr;

/// Queries of a tile: lanes of its rows.
pub(super) const LANES: usize = 64;

/// What the tile needs to know of its queries.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    /// `lse log2 e`; +inf for queries that see nothing and for lanes without a query.
    pub(super) reference: [f32; LANES],
    /// `dout . out - dlse`.
    pub(super) delta: [f32; LANES],
}

/// A tile, `[keys, LANES]` each.
pub(super) struct Tile<'a> {
    /// In: scores. Out: weights `w`.
    pub(super) scores: &'a mut [f32],
    /// In: `dp`. Out: `dr`.
    pub(super) grads: &'a mut [f32],
}

/// A tile whose scores are `softmax_scale * q.k`, without dropout. `CAREFUL` if some pairs are not seen.
#[inline(always)]
pub(super) fn weigh<S: Simd, const CAREFUL: bool>(
    simd: S,
    tile: Tile<'_>,
    lanes: usize,
    rows: &Rows,
    softmax_scale: f32,
) {
    let width = S::f32s::LEN;
    let (scores, grads) = (tile.scores.as_chunks_mut::<LANES>().0, tile.grads.as_chunks_mut::<LANES>().0);
    let [log2_e, scale, zero, minus_inf, inf] =
        [LOG2_E, softmax_scale, 0.0, f32::NEG_INFINITY, f32::INFINITY].map(|x| S::f32s::splat(simd, x));
    for lane in (0..lanes).step_by(width) {
        let column = |row: &[f32]| S::f32s::from_slice(simd, &row[lane..lane + width]);
        let reference = column(&rows.reference);
        let delta = column(&rows.delta) * scale;
        let dead = reference.simd_eq(inf);
        for (scores, grads) in scores.iter_mut().zip(&mut *grads) {
            let score = column(scores);
            let mut weight = exp2(simd, score.mul_sub(log2_e, reference));
            let mut grad = weight * column(grads).mul_sub(scale, delta);
            if CAREFUL {
                let hidden = score.simd_eq(minus_inf).bitor(dead);
                weight = hidden.select(zero, weight);
                grad = hidden.select(zero, grad);
            }
            weight.store_slice(&mut scores[lane..lane + width]);
            grad.store_slice(&mut grads[lane..lane + width]);
        }
    }
}

/// What else a tile may come with, `[keys, LANES]` each.
#[derive(Debug, Default)]
pub(super) struct Extras<'a> {
    /// `slope`; without it the softmax scale.
    pub(super) slopes: Option<&'a [f32]>,
    /// `f`.
    pub(super) factors: Option<&'a [f32]>,
    /// Gets the sum of `ds` over the queries added, `[keys]`.
    pub(super) key_sums: Option<&'a mut [f32]>,
}

/// Any tile.
#[inline(always)]
pub(super) fn weigh_all<S: Simd>(
    simd: S,
    tile: Tile<'_>,
    lanes: usize,
    rows: &Rows,
    softmax_scale: f32,
    mut extras: Extras<'_>,
) {
    let width = S::f32s::LEN;
    let (scores, grads) = (tile.scores.as_chunks_mut::<LANES>().0, tile.grads.as_chunks_mut::<LANES>().0);
    let [log2_e, scale, zero, one, minus_inf, inf] =
        [LOG2_E, softmax_scale, 0.0, 1.0, f32::NEG_INFINITY, f32::INFINITY].map(|x| S::f32s::splat(simd, x));
    for (key, (scores, grads)) in scores.iter_mut().zip(grads).enumerate() {
        let mut sum = zero;
        for lane in (0..lanes).step_by(width) {
            let column = |row: &[f32]| S::f32s::from_slice(simd, &row[lane..lane + width]);
            let extra = |rows: Option<&[f32]>| rows.map(|rows| column(&rows[key * LANES..]));
            let (score, reference) = (column(scores), column(&rows.reference));
            let hidden = score.simd_eq(minus_inf).bitor(reference.simd_eq(inf));
            let weight = hidden.select(zero, exp2(simd, score.mul_sub(log2_e, reference)));
            let factor = extra(extras.factors).unwrap_or(one);
            let grad = hidden.select(zero, weight * column(grads).mul_sub(factor, column(&rows.delta)));
            sum += grad;
            let grad = hidden.select(zero, grad * extra(extras.slopes).unwrap_or(scale));
            (weight * factor).store_slice(&mut scores[lane..lane + width]);
            grad.store_slice(&mut grads[lane..lane + width]);
        }
        if let Some(sums) = &mut extras.key_sums {
            let mut lanes = [0.0; attn_core::tile::MAX_LANES];
            sum.store_slice(&mut lanes[..width]);
            sums[key] += lanes.iter().sum::<f32>();
        }
    }
}
