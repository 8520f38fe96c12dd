//! A stretch of compressed keys for some rows of queries: weights relative to its own maximum, and on request the weighted sum
//! of its values. Stretches merge as partial softmax results do.

use crate::routed::key_panels::{KeyPanels, PANEL, ScoreRows};
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, exp2, product};
use std::ops::Range;

/// Values summed while they are in the cache.
const VALUES: usize = 2048;

/// See the module; `rows` are those of one key/value head, its query heads side by side.
#[derive(Debug, Default)]
pub(in crate::routed) struct Segment {
    /// `[rows, stride]`: scores in powers of two, then `2^(score - max)`.
    pub(in crate::routed) weights: Vec<f32>,
    pub(in crate::routed) stride: usize,
    /// `[rows]`; -inf for a row that sees nothing here.
    pub(in crate::routed) max: Vec<f32>,
    pub(in crate::routed) sum: Vec<f32>,
    /// `[rows, head_dim_v]`, if values are given.
    pub(in crate::routed) acc: Vec<f32>,
    wide: Vec<f32>,
}

/// Fills a segment.
pub(in crate::routed) struct Weigh<'a> {
    /// `[rows, width]`, times the scale and `log2 e`.
    pub(in crate::routed) q: &'a [f32],
    pub(in crate::routed) keys: &'a KeyPanels<f32>,
    pub(in crate::routed) panels: Range<usize>,
    /// Keys that each row sees, counted from the first panel's first.
    pub(in crate::routed) visible: &'a [usize],
    pub(in crate::routed) segment: &'a mut Segment,
    /// Values of the keys `[keys, head_dim_v]` from the first panel's first on, and their width.
    pub(in crate::routed) values: Option<(&'a [f32], usize)>,
}

impl SimdOp for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { q, keys, panels, visible, segment, values } = self;
        let rows = visible.len();
        segment.stride = panels.len() * PANEL;
        segment.weights.resize(rows * segment.stride, 0.0);
        segment.max.clear();
        segment.sum.clear();
        let (stride, wide) = (segment.stride, &mut segment.wide);
        ScoreRows { q, keys, panels, scores: &mut segment.weights, stride, wide }.eval(simd);
        let lanes = S::f32s::LEN;
        for (row, &n) in segment.weights.chunks_exact_mut(stride.max(1)).zip(visible) {
            row[n..].fill(f32::NEG_INFINITY);
            let row = &mut row[..n.next_multiple_of(PANEL)];
            let mut maxima = S::f32s::splat(simd, f32::NEG_INFINITY);
            for x in row.chunks_exact(lanes) {
                maxima = maxima.max(S::f32s::from_slice(simd, x));
            }
            let mut of_lane = [f32::NEG_INFINITY; 16];
            maxima.store_slice(&mut of_lane[..lanes]);
            let max = of_lane.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if max == f32::NEG_INFINITY {
                row.fill(0.0);
                segment.max.push(max);
                segment.sum.push(0.0);
                continue;
            }
            let (shift, mut sums) = (S::f32s::splat(simd, max), S::f32s::splat(simd, 0.0));
            for x in row.chunks_exact_mut(lanes) {
                let weight = exp2(simd, S::f32s::from_slice(simd, x) - shift);
                weight.store_slice(x);
                sums += weight;
            }
            let mut of_lane = [0.0; 16];
            sums.store_slice(&mut of_lane[..lanes]);
            segment.max.push(max);
            segment.sum.push(of_lane.iter().sum());
        }
        if rows > 0 {
            segment.weights.truncate(rows * stride);
        }
        let Some((values, width)) = values else { return };
        segment.acc.clear();
        segment.acc.resize(rows * width, 0.0);
        let n = visible.iter().copied().max().unwrap_or(0);
        for first in (0..n).step_by(VALUES) {
            let len = VALUES.min(n - first);
            let a = Lhs { data: &segment.weights[first..], row_stride: stride, col_stride: 1 };
            let b = Rhs { data: &values[first * width..], stride: width };
            let c = TileMut { data: &mut segment.acc, stride: width };
            product(simd, [rows, width, len], a, b, c, Start::Keep);
        }
    }
}
