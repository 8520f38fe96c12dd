//! The running softmax of a panel of queries, with queries in the vector lanes.
//!
//! Each tile of scores updates, lane by lane,
//!
//! ```text
//! m'  = max(m, max_j s_j)
//! l   <- e^(m - m') l   + sum_j e^(s_j - m')
//! acc <- e^(m - m') acc + sum_j e^(s_j - m') v_j
//! ```
//!
//! and at the end `out = acc / l`, `lse = m + ln l` (see `finish`). Exponentials are powers of two of `(s - m) log2 e`: the
//! difference comes first, so that scores of any size, f32's largest included, keep their digits.
//!
//! The reference `m` is moved only when a tile exceeds it by more than `ln 2^8` (lazy rescaling): until then the weights
//! are larger than 1 but far from overflow, and nothing has to be rescaled. Any reference will do that is near enough, so
//! after the first tile its maximum need not even be looked for: large sums of weights show that the reference is too low,
//! and are divided by themselves. Sources: Milakov and Gimelshein 2018; Dao 2023 (FlashAttention-2), Algorithm 1.
//!
//! A lane that has seen nothing keeps `m = -inf`, `l = 0`. NaN scores give NaN weights, hence a NaN row.

use crate::tiles::PANEL;
use attn_core::simd::{Select, Simd, SimdBase, SimdMask};
use attn_core::tile::{Bf16Dot, WeightRows, exp2, exp2_overflows};
use half::bf16;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// How far a score may exceed the reference before the sums are rescaled: `ln 2^8`.
const SLACK: f32 = 8.0 * LN_2;

/// Weights of a tile that sum to more move the reference.
const LARGE_SUM: f32 = 256.0;
/// Weights of a tile that sum to more may have overflowed.
const LOST_SUM: f32 = f32::from_bits(0x7f00_0000); // 2^127

/// Whether a tile's largest score is known before it is weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sought {
    /// It is looked for, and the reference moved where it lies too far above.
    InTile,
    /// The reference is what former tiles made it; the sum of the weights shows whether that was right. This saves a pass
    /// over the tile.
    Before,
}

impl Sought {
    /// The faster way, where exponentials overflow to infinity, and nowhere else.
    #[inline(always)]
    pub(super) fn first<S: Simd>(simd: S) -> Self {
        if exp2_overflows(simd) { Self::Before } else { Self::InTile }
    }
}

/// Running maximum and sum of the lanes of one panel.
#[derive(Debug, Clone)]
pub(super) struct OnlineSoftmax {
    /// The reference `m`.
    row_max: [f32; PANEL],
    /// The running sum `l`.
    row_sum: [f32; PANEL],
}

impl OnlineSoftmax {
    pub(super) fn new() -> Self {
        Self { row_max: [f32::NEG_INFINITY; PANEL], row_sum: [0.0; PANEL] }
    }

    /// Turns a tile of scores `[keys, PANEL]` into weights in place, and brings the sums and `acc [head_dim_v, PANEL]`
    /// to the new reference. Runs over the first `lanes` lanes, rounded up to whole vectors.
    ///
    /// Gives false, with nothing but the scores changed, if they lie too far above a reference that was not [`Sought`].
    #[must_use]
    #[inline(always)]
    pub(super) fn absorb<S: Simd>(
        &mut self,
        simd: S,
        scores: &mut [f32],
        acc: &mut [f32],
        lanes: usize,
        sought: Sought,
    ) -> bool {
        let width = S::f32s::LEN;
        let mut sums = [0.0; PANEL];
        let mut is_large = false;
        for lane in (0..lanes).step_by(width) {
            // Against a reference of its own, a lane that has seen nothing could lose all its weights.
            if sought == Sought::InTile || self.row_max[lane..lane + width].contains(&f32::NEG_INFINITY) {
                self.raise(simd, scores, acc, lane);
            }
            let column = |row: &[f32]| S::f32s::from_slice(simd, &row[lane..lane + width]);
            let reference = reference(simd, column(&self.row_max));
            let mut sum = S::f32s::splat(simd, 0.0);
            for row in scores.as_chunks_mut::<PANEL>().0 {
                let weight = exp2(simd, (column(row) - reference) * LOG2_E);
                weight.store_slice(&mut row[lane..lane + width]);
                sum += weight;
            }
            sum.store_slice(&mut sums[lane..lane + width]);
            is_large |= sum.simd_gt(S::f32s::splat(simd, LARGE_SUM)).any_true();
        }
        if sought == Sought::Before && is_large {
            if sums.iter().any(|sum| *sum >= LOST_SUM) {
                return false;
            }
            self.lower(&mut sums, scores, acc);
        }
        for lane in (0..lanes).step_by(width) {
            let column = |row: &[f32]| S::f32s::from_slice(simd, &row[lane..lane + width]);
            (column(&self.row_sum) + column(&sums)).store_slice(&mut self.row_sum[lane..lane + width]);
        }
        true
    }

    /// Moves the references of lanes whose weights of the tile, which sum to `sums`, are large, and brings everything there.
    #[cold]
    fn lower(&mut self, sums: &mut [f32; PANEL], weights: &mut [f32], acc: &mut [f32]) {
        let mut factors = [1.0f32; PANEL];
        for (lane, factor) in factors.iter_mut().enumerate().filter(|(lane, _)| sums[*lane] > LARGE_SUM) {
            let old = self.row_max[lane];
            self.row_max[lane] = old + sums[lane].ln();
            *factor = (old - self.row_max[lane]).exp();
        }
        let rows = weights.as_chunks_mut().0.iter_mut().chain(acc.as_chunks_mut().0);
        for row in rows.chain([sums, &mut self.row_sum]) {
            row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
        }
    }

    /// As [`OnlineSoftmax::absorb`], with the weights rounded to bf16, in `pairs [keys / 2, PANEL]`. The sums are those of
    /// the rounded weights.
    ///
    /// The maximum is not looked for: weights beyond the slack show that it has risen.
    #[inline(always)]
    pub(super) fn absorb_rounded<S: Simd>(
        &mut self,
        simd: S,
        dot: Bf16Dot,
        scores: &[f32],
        pairs: &mut [u32],
        acc: &mut [f32],
        lanes: usize,
    ) {
        let most = bf16::from_f32_const(256.0);
        for lane in (0..lanes).step_by(S::f32s::LEN) {
            let lanes = lane..lane + S::f32s::LEN;
            // Against a reference of its own, a lane that has seen nothing could lose all its weights.
            if self.row_max[lanes.clone()].contains(&f32::NEG_INFINITY) {
                self.raise(simd, scores, acc, lane);
            }
            if !self.weigh_rounded(simd, dot, scores, pairs, lanes.clone(), most) {
                self.raise(simd, scores, acc, lane);
                self.weigh_rounded(simd, dot, scores, pairs, lanes, WeightRows::ANY);
            }
        }
    }

    #[inline(always)]
    fn weigh_rounded<S: Simd>(
        &mut self,
        simd: S,
        dot: Bf16Dot,
        scores: &[f32],
        pairs: &mut [u32],
        lanes: Range<usize>,
        most: bf16,
    ) -> bool {
        let mut references = [0.0; PANEL];
        let max = S::f32s::from_slice(simd, &self.row_max[lanes.clone()]);
        reference(simd, max).store_slice(&mut references[lanes.clone()]);
        let (reference, sums) = (&references, &mut self.row_sum);
        dot.weights(WeightRows { scores, pairs, reference, sums, most, stride: PANEL }, lanes)
    }

    /// Moves the reference of the vector of lanes from `lane` on, if the scores exceed it by too much.
    #[inline(always)]
    fn raise<S: Simd>(&mut self, simd: S, scores: &[f32], acc: &mut [f32], lane: usize) {
        let width = S::f32s::LEN;
        let column = |row: &[f32]| S::f32s::from_slice(simd, &row[lane..lane + width]);
        // Four running maxima: one alone would wait for itself.
        let (fours, rest) = scores.as_chunks::<PANEL>().0.as_chunks::<4>();
        let mut maxima = [S::f32s::splat(simd, f32::NEG_INFINITY); 4];
        for rows in fours {
            maxima = std::array::from_fn(|r| maxima[r].max(column(&rows[r])));
        }
        let [a, b, c, d] = maxima;
        let tile_max = rest.iter().fold(a.max(b).max(c.max(d)), |max, row| max.max(column(row)));

        let old = column(&self.row_max);
        if tile_max.simd_gt(old + SLACK).any_true() {
            let new = old.max(tile_max);
            let factor = exp2(simd, (old - reference(simd, new)) * LOG2_E);
            (column(&self.row_sum) * factor).store_slice(&mut self.row_sum[lane..lane + width]);
            for row in acc.as_chunks_mut::<PANEL>().0 {
                (column(row) * factor).store_slice(&mut row[lane..lane + width]);
            }
            new.store_slice(&mut self.row_max[lane..lane + width]);
        }
    }

    /// The reference (-inf for a lane that has seen nothing) and the sum of a lane.
    pub(super) fn state(&self, lane: usize) -> (f32, f32) {
        (self.row_max[lane], self.row_sum[lane])
    }
}

/// `m`, and 0 for lanes that have seen nothing, so that `-inf - reference` stays -inf.
#[inline(always)]
fn reference<S: Simd>(simd: S, max: S::f32s) -> S::f32s {
    let nothing = max.simd_eq(S::f32s::splat(simd, f32::NEG_INFINITY));
    nothing.select(S::f32s::splat(simd, 0.0), max)
}
