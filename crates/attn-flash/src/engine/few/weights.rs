//! From scores to weights: scales of stored rows, and the softmax that is carried along.

use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::{MAX_LANES, exp2};
use attn_core::view::Rows;
use std::f32::consts::LOG2_E;

/// Running maximum and sum of one query, as in `online_softmax`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    pub(super) max: f32,
    pub(super) sum: f32,
}

impl Running {
    /// `m`, or 0 before anything was seen.
    fn reference(&self) -> f32 {
        if self.max == f32::NEG_INFINITY { 0.0 } else { self.max }
    }
}

/// Turns the scores of one query into weights, and brings its sum and accumulator to the new reference.
#[inline(always)]
pub(super) fn weigh<S: Simd>(simd: S, scores: &mut [f32], running: &mut Running, acc: &mut [f32]) {
    let mut max = S::f32s::splat(simd, f32::NEG_INFINITY);
    each_vector(
        simd,
        scores,
        #[inline(always)]
        |scores| {
            max = scores.max_precise(max);
            scores
        },
    );
    let max = max.reduce_max_precise();
    if max > running.max {
        let moved = Running { max, ..*running };
        let factor = if running.sum == 0.0 { 0.0 } else { (running.max - moved.reference()).exp() };
        running.sum *= factor;
        let factor = S::f32s::splat(simd, factor);
        for acc in acc.chunks_exact_mut(S::f32s::LEN) {
            (S::f32s::from_slice(simd, acc) * factor).store_slice(acc);
        }
        running.max = max;
    }
    let reference = S::f32s::splat(simd, running.reference());
    let mut sum = S::f32s::splat(simd, 0.0);
    each_vector(
        simd,
        scores,
        #[inline(always)]
        |scores| {
            let weight = exp2(simd, (scores - reference) * LOG2_E);
            sum += weight;
            weight
        },
    );
    running.sum += sum.reduce_sum();
}

/// Replaces scores by what `change` makes of them, a vector at a time; the last one is filled up with -inf.
#[inline(always)]
fn each_vector<S: Simd>(simd: S, scores: &mut [f32], mut change: impl FnMut(S::f32s) -> S::f32s) {
    let mut vectors = scores.chunks_exact_mut(S::f32s::LEN);
    for scores in &mut vectors {
        change(S::f32s::from_slice(simd, scores)).store_slice(scores);
    }
    let rest = vectors.into_remainder();
    if !rest.is_empty() {
        let mut padded = [f32::NEG_INFINITY; MAX_LANES];
        padded[..rest.len()].copy_from_slice(rest);
        let padded = &mut padded[..S::f32s::LEN];
        change(S::f32s::from_slice(simd, padded)).store_slice(padded);
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}

/// What stored rows are to be multiplied with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scales<'a> {
    /// `[blocks, 1]`.
    pub(super) scales: Rows<'a, f32>,
    pub(super) block: usize,
    pub(super) first: usize,
}

impl Scales<'_> {
    /// Multiplies `numbers[i]` with the scale of row `row + i`.
    #[inline(always)]
    pub(super) fn apply(self, row: usize, numbers: &mut [f32]) {
        let first = self.first + row;
        let dense = self.scales.data().get(first..first + numbers.len());
        if let Some(scales) = dense
            && self.block == 1
            && self.scales.stride() == 1
        {
            numbers.iter_mut().zip(scales).for_each(|(x, scale)| *x *= scale);
            return;
        }
        for (i, x) in numbers.iter_mut().enumerate() {
            *x *= self.scales.row((first + i) / self.block)[0];
        }
    }
}
