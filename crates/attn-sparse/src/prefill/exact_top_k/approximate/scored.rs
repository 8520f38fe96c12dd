//! Scores of a group of keys, between their bounds.

use super::{GROUP, Keys, Queries, SLACK, Stage, quads};
use crate::scores::PANEL;
use attn_core::simd::{Simd, SimdBase, SimdMask};
use attn_core::tile::{ByteDot, ByteFactors, Rhs, Start, TileMut, product};
use std::ops::Range;

/// Scores of a group of keys for a panel of queries.
pub(in super::super) struct Scored {
    /// `[GROUP, PANEL]`, by stage.
    f32: Vec<f32>,
    i32: Vec<i32>,
    /// Widened keys.
    widened: Vec<f32>,
    /// What a sum of bytes stands for; 1 in f32.
    unit: [f32; PANEL],
    /// No score is further from the truth (up to the common shift).
    error: [f32; PANEL],
    /// Lanes whose upper bound reaches the lane's threshold, for each key, and perhaps some that hardly do not.
    pub(in super::super) reached: [u32; GROUP],
}

impl Default for Scored {
    fn default() -> Self {
        let len = GROUP * PANEL;
        Self {
            f32: vec![0.0; len],
            i32: vec![0; len],
            widened: Vec::new(),
            unit: [1.0; PANEL],
            error: [0.0; PANEL],
            reached: [0; GROUP],
        }
    }
}

impl Scored {
    /// Scores `range`, the first keys of a group.
    #[inline(always)]
    pub(in super::super) fn set<S: Simd>(
        &mut self,
        simd: S,
        keys: &Keys<'_>,
        range: Range<usize>,
        queries: &Queries,
        thresholds: &[f32; PANEL],
    ) {
        let (group, width) = (&keys.groups[range.start / GROUP], keys.rows.width());
        let roundings = match keys.stage {
            Stage::F32 => 2.0 * width as f64 + 8.0,
            Stage::Bytes(_) => 16.0,
        };
        let [scored, lost] = [group.scored, group.lost].map(f64::from);
        let by_norm = (SLACK * (lost + roundings * 2f64.powi(-24) * scored)) as f32;
        let by_lost = (SLACK * scored) as f32;
        for (lane, error) in self.error.iter_mut().enumerate() {
            *error = queries.norm[lane] * by_norm + queries.lost[lane] * by_lost + queries.rest[lane];
        }
        match keys.stage {
            Stage::F32 => {
                let lhs = keys.rows.lhs(simd, range.clone(), &mut self.widened);
                let b = Rhs { data: &queries.turned, stride: PANEL };
                let c = TileMut { data: &mut self.f32, stride: PANEL };
                product(simd, [range.len(), PANEL, width], lhs, b, c, Start::Zero);
                self.compare(simd, range.len(), thresholds);
            }
            Stage::Bytes(dot) => {
                for (unit, scale) in self.unit.iter_mut().zip(&queries.scale) {
                    *unit = scale * group.scale;
                }
                let n_quads = quads(width);
                let factors = ByteFactors {
                    a: &keys.codes[range.start * n_quads..],
                    b: &queries.codes,
                    quads: n_quads,
                    start: &queries.start,
                    least: &self.least(thresholds),
                };
                dot.product(factors, &mut self.i32, &mut self.reached[..range.len()]);
            }
        }
    }

    /// Sums of bytes below are too small for `thresholds`.
    #[inline(always)]
    fn least(&self, thresholds: &[f32; PANEL]) -> [i32; ByteDot::COLUMNS] {
        let mut least = [0; ByteDot::COLUMNS];
        for lane in 0..PANEL {
            let sum = (thresholds[lane] - self.error[lane]) / self.unit[lane].max(f32::MIN_POSITIVE);
            // Below by the rounding of the line above, and of the conversion.
            let below = sum - sum.abs() * 2f32.powi(-20) - 3.0;
            least[lane] = if sum < i32::MAX as f32 { below as i32 } else { i32::MAX };
        }
        least
    }

    #[inline(always)]
    fn compare<S: Simd>(&mut self, simd: S, n_keys: usize, thresholds: &[f32; PANEL]) {
        let step = S::f32s::LEN;
        for (row, reached) in self.f32.chunks_exact(PANEL).zip(&mut self.reached[..n_keys]) {
            *reached = 0;
            for first in (0..PANEL).step_by(step) {
                let of = |row: &[f32]| S::f32s::from_slice(simd, &row[first..first + step]);
                let upper = of(row) + of(&self.error);
                *reached |= (upper.simd_ge(of(thresholds)).to_bitmask() as u32) << first;
            }
        }
    }

    /// Bounds of a score.
    #[inline(always)]
    pub(in super::super) fn bounds(&self, keys: &Keys<'_>, key: usize, lane: usize) -> [f32; 2] {
        let at = key * PANEL + lane;
        let score = match keys.stage {
            Stage::F32 => self.f32[at],
            Stage::Bytes(_) => self.i32[at] as f32 * self.unit[lane],
        };
        [score - self.error[lane], score + self.error[lane]]
    }

    /// Raises `least [PANEL]` to a key's lower bounds.
    #[inline(always)]
    pub(in super::super) fn raise_to_lower(&self, keys: &Keys<'_>, key: usize, least: &mut [f32]) {
        let (floats, bytes) = (&self.f32[key * PANEL..][..PANEL], &self.i32[key * PANEL..][..PANEL]);
        let least = &mut least[..PANEL];
        for lane in 0..PANEL {
            let score = match keys.stage {
                Stage::F32 => floats[lane],
                Stage::Bytes(_) => bytes[lane] as f32 * self.unit[lane],
            };
            least[lane] = least[lane].max(score - self.error[lane]);
        }
    }
}
