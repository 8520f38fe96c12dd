//! What blocks of keys get from stretches of keys that overlap them: stretch `c` holds keys `[c t, c t + l)`, block `b` keys
//! `[b l', (b + 1) l')`.
//!
//! Where `t` divides `l'`, all blocks but the first meet stretches at the same offsets: every place in the row of stretches is then
//! combined with those behind it, in vectors, and each block takes its own place.

use crate::select::largest::Largest;
use attn_core::simd::{Simd, SimdOp};
use std::ops::Range;

/// Sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Overlaps {
    /// Keys of a stretch, `l`.
    pub(super) len: usize,
    /// Keys from one stretch's start to the next one's, `t`.
    pub(super) stride: usize,
    /// Keys of a block, `l'`.
    pub(super) block: usize,
}

impl Overlaps {
    /// The stretches that overlap a block.
    fn stretches(&self, block: usize) -> Range<usize> {
        let (start, end) = (block * self.block, (block + 1) * self.block);
        let first = if start < self.len { 0 } else { (start - self.len) / self.stride + 1 };
        first..end.div_ceil(self.stride).max(first)
    }

    /// Keys that a stretch and a block which overlap have in common.
    fn common(&self, stretch: usize, block: usize) -> f32 {
        let (start, end) = (block * self.block, (block + 1) * self.block);
        ((stretch * self.stride + self.len).min(end) - (stretch * self.stride).max(start)) as f32
    }
}

/// A thread's scratch for one row.
#[derive(Default)]
pub(super) struct RowScores {
    /// Of each stretch.
    pub(super) x: Vec<f32>,
    /// Of each block that is open to choice.
    pub(super) blocks: Vec<f32>,
    pub(super) places: Vec<f32>,
    pub(super) largest: Largest,
}

/// `scores_b = add(.. add(0, x_c, common_cb) .., x_c', common_c'b)` over the stretches that overlap block `b`, in ascending order.
/// Stretches behind the last `x` count as 0, which must add nothing.
pub(super) struct OfBlocks<'a, F> {
    pub(super) overlaps: Overlaps,
    /// `x`, of each stretch.
    pub(super) x: &'a mut Vec<f32>,
    pub(super) blocks: Range<usize>,
    pub(super) add: F,
    /// Replaced: one of each block.
    pub(super) scores: &'a mut Vec<f32>,
    /// Scratch.
    pub(super) places: &'a mut Vec<f32>,
}

impl<F: Fn(f32, f32, f32) -> f32> SimdOp for OfBlocks<'_, F> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { overlaps, x, blocks, add, scores, places } = self;
        scores.clear();
        let alike = match overlaps.block.is_multiple_of(overlaps.stride) {
            // Those that begin before a stretch can have ended differ.
            true => overlaps.len.div_ceil(overlaps.block).clamp(blocks.start, blocks.end.max(blocks.start)),
            false => blocks.end,
        };
        for block in blocks.start..alike {
            let stretches = overlaps.stretches(block);
            let seen = x.iter().enumerate().take(stretches.end).skip(stretches.start);
            scores.push(seen.fold(0.0, |sum, (c, x)| add(sum, *x, overlaps.common(c, block))));
        }
        if alike >= blocks.end {
            return;
        }
        let (stretches, step) = (overlaps.stretches(alike), overlaps.block / overlaps.stride);
        let n_places = (blocks.end - alike - 1) * step + 1;
        let needed = stretches.start + n_places - 1 + stretches.len();
        x.resize(x.len().max(needed), 0.0);
        places.clear();
        places.resize(n_places, 0.0);
        simd.vectorize(
            #[inline(always)]
            || {
                for c in stretches.clone() {
                    let common = overlaps.common(c, alike);
                    places.iter_mut().zip(&x[c..]).for_each(|(sum, x)| *sum = add(*sum, *x, common));
                }
                scores.extend(places.iter().step_by(step));
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::simd::Isa;

    fn of_blocks(
        isa: Isa,
        overlaps: Overlaps,
        x: &[f32],
        blocks: &Range<usize>,
        add: impl Fn(f32, f32, f32) -> f32,
    ) -> Vec<f32> {
        // What is there before is replaced.
        let (mut scores, places) = (vec![1.0], &mut vec![2.0]);
        let (x, blocks) = (&mut x.to_vec(), blocks.clone());
        isa.run(OfBlocks { overlaps, x, blocks, add, scores: &mut scores, places });
        scores
    }

    #[test]
    fn blocks_get_what_each_of_their_keys_has() {
        for [len, stride, block] in
            [[32, 16, 64], [16, 16, 16], [64, 16, 16], [7, 3, 12], [5, 5, 10], [8, 3, 10]]
        {
            let overlaps = Overlaps { len, stride, block };
            for n in [0, 1, 5, 40] {
                let x: Vec<f32> = (0..n).map(|c| ((c * 7919 % 31) as f32).exp2()).collect();
                let n_blocks = (n * stride + len).div_ceil(block);
                for blocks in [0..n_blocks, 1..n_blocks, n_blocks..n_blocks] {
                    // A key at a time.
                    let key = |j: usize| -> Vec<f64> {
                        let of_key = |c: &usize| (c * stride..c * stride + len).contains(&j);
                        (0..n).filter(of_key).map(|c| f64::from(x[c])).collect()
                    };
                    let keys = |b: usize| b * block..(b + 1) * block;
                    let sum = |b: usize| keys(b).flat_map(key).sum::<f64>();
                    let most = |b: usize| keys(b).flat_map(key).fold(0.0, f64::max);
                    for isa in Isa::available() {
                        let add = |sum: f32, x: f32, common: f32| sum + common * x;
                        let scores = of_blocks(isa, overlaps, &x, &blocks, add);
                        assert_eq!(scores.len(), blocks.len());
                        for (got, b) in scores.iter().zip(blocks.clone()) {
                            let want = sum(b);
                            assert!(
                                (f64::from(*got) - want).abs() <= 1e-6 * want,
                                "{isa} {overlaps:?} {n} {b}"
                            );
                        }
                        let add = |most: f32, x: f32, _: f32| most.max(x);
                        let scores = of_blocks(isa, overlaps, &x, &blocks, add);
                        let want: Vec<f32> = blocks.clone().map(|b| most(b) as f32).collect();
                        assert_eq!(scores, want, "{isa} {overlaps:?} {n}");
                    }
                }
            }
        }
    }
}
