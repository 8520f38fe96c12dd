//! What the rows of a batch have accumulated.

use crate::tiles::PANEL;
use attn_core::simd::{Select, Simd, SimdBase};
use attn_core::tile::exp2;
use std::f32::consts::LOG2_E;

/// Accumulator, reference and sum of each row.
#[derive(Default)]
pub(super) struct States {
    width: usize,
    /// `[rows, width]`, not yet divided.
    acc: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

/// What some rows get from one cell, lane by lane.
pub(super) struct Part<'a> {
    /// `[PANEL, width]`.
    pub(super) acc: &'a [f32],
    pub(super) max: [f32; PANEL],
    pub(super) sum: [f32; PANEL],
}

impl States {
    /// Rows that have seen nothing.
    pub(super) fn start(&mut self, n: usize, width: usize) {
        self.width = width;
        self.acc.clear();
        self.acc.resize(n * width, 0.0);
        self.max.clear();
        self.max.resize(n, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(n, 0.0);
    }

    /// The accumulator of a row, its reference and its sum.
    pub(super) fn row(&self, row: usize) -> (&[f32], (f32, f32)) {
        (&self.acc[row * self.width..][..self.width], (self.max[row], self.sum[row]))
    }

    /// Adds what the lanes got to their rows.
    #[inline(always)]
    pub(super) fn merge<S: Simd>(
        &mut self,
        simd: S,
        part: &Part<'_>,
        rows: impl Iterator<Item = usize> + Clone,
    ) {
        let mut before = [f32::NEG_INFINITY; PANEL];
        before.iter_mut().zip(rows.clone()).for_each(|(before, row)| *before = self.max[row]);
        let (mut after, mut kept, mut added) = (before, [0.0; PANEL], [0.0; PANEL]);
        for lane in (0..PANEL).step_by(S::f32s::LEN) {
            let of = |numbers: &[f32; PANEL]| S::f32s::from_slice(simd, &numbers[lane..lane + S::f32s::LEN]);
            let (old, new) = (of(&before), of(&part.max));
            let max = new.simd_gt(old).select(new, old);
            // Where nothing is seen yet, any finite reference does.
            let nothing = max.simd_eq(S::f32s::splat(simd, f32::NEG_INFINITY));
            let reference = nothing.select(S::f32s::splat(simd, 0.0), max);
            let lanes = lane..lane + S::f32s::LEN;
            max.store_slice(&mut after[lanes.clone()]);
            exp2(simd, (old - reference) * LOG2_E).store_slice(&mut kept[lanes.clone()]);
            exp2(simd, (new - reference) * LOG2_E).store_slice(&mut added[lanes]);
        }
        for (lane, row) in rows.enumerate() {
            let (kept, added, sum) = (kept[lane], added[lane], part.sum[lane]);
            // A part that weighs nothing adds nothing, even if it overflowed.
            if added == 0.0 && !sum.is_nan() {
                continue;
            }
            let acc = &mut self.acc[row * self.width..][..self.width];
            let part = &part.acc[lane * self.width..][..self.width];
            if kept == 0.0 && !self.sum[row].is_nan() {
                acc.iter_mut().zip(part).for_each(|(acc, part)| *acc = added * part);
                self.sum[row] = added * sum;
            } else {
                acc.iter_mut().zip(part).for_each(|(acc, part)| *acc = kept * *acc + added * part);
                self.sum[row] = kept * self.sum[row] + added * sum;
            }
            self.max[row] = after[lane];
        }
    }
}
