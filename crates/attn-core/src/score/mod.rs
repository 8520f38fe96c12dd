//! What happens to a score between `softmax_scale * q.k` and the mask: soft cap, biases, the user's closure.
//!
//! Order of the operator: scale, then the score mod, then the mask. A score of -inf hides its pair exactly as a
//! mask does.
//!
//! | score mod | new score |
//! |---|---|
//! | [`SoftCap`] | `c * tanh(s / c)` |
//! | [`Alibi`] | `s - slope_h * abs(j - p)`, with the query at position `p = i + offset` |
//! | [`Bias`] | `s + bias[b, h, i, j]`, broadcast |
//! | [`RelativeBias`] | `s + table[h, clamp(j - p)]` |
//! | [`T5Bias`] | `s + table[bucket(j - p), h]` |
//! | [`ScoreFn`], [`ScoreFnWithDerivative`] | the user's closure |
//!
//! They chain with [`Then`]; `None` leaves scores alone. The cap comes before biases, so that a bias of -inf stays
//! -inf. [`BiasIndex`] says where the gradient of a bias belongs.

mod alibi;
mod bias;
mod closure;
mod distance;
mod relative;
mod soft_cap;
mod t5;
mod tanh;
#[cfg(test)]
mod tests;
mod then;

pub use alibi::Alibi;
pub use bias::{Bias, BiasIndex};
pub use closure::{ScoreFn, ScoreFnWithDerivative};
pub use relative::RelativeBias;
pub use soft_cap::SoftCap;
pub use t5::{T5Bias, T5Buckets};
pub use then::Then;

use crate::mask::{Head, Pair};
use crate::{AttnShape, Result};
use std::ops::Range;

/// A function of a scaled score and of where it stands.
pub trait ScoreMod: Sync {
    /// Checks that the score mod serves a problem of this shape: engines ask before anything else. One without tensors
    /// serves all.
    ///
    /// # Errors
    /// [`crate::AttnError`] naming the tensor that was made for another shape.
    fn check(&self, shape: &AttnShape) -> Result<()> {
        let _ = shape;
        Ok(())
    }

    /// The new score, as the kernels compute it.
    fn apply(&self, score: f32, at: Pair) -> f32;

    /// The definition in f64, for the oracle.
    fn apply_f64(&self, score: f64, at: Pair) -> f64;

    /// `d apply(score) / d score`, for the backward pass.
    fn derivative(&self, score: f32, at: Pair) -> f32;

    /// The same in f64, for the oracle.
    fn derivative_f64(&self, score: f64, at: Pair) -> f64 {
        f64::from(self.derivative(score as f32, at))
    }

    /// Whether [`ScoreMod::derivative`] is known; a backward pass through one that is not is an error.
    fn has_derivative(&self) -> bool {
        true
    }

    /// True if `apply` returns the score as it is; the kernel then skips it.
    #[inline(always)]
    fn is_identity(&self) -> bool {
        false
    }

    /// [`ScoreMod::apply`] to every score of a tile.
    #[inline(always)]
    fn apply_tile(&self, tile: ScoreTile<'_>) {
        let ScoreTile { head, rows, keys, scores, stride } = tile;
        for (j, row) in keys.zip(scores.chunks_mut(stride)) {
            if let (Ok(lanes), 32) = (<&mut [f32; 32]>::try_from(&mut *row), rows.len()) {
                // On a copy and of known length: only so does the compiler use vectors.
                let mut new = *lanes;
                for (lane, score) in new.iter_mut().enumerate() {
                    *score = self.apply(*score, head.pair(rows.start + lane, j));
                }
                *lanes = new;
            } else {
                for (score, i) in row.iter_mut().zip(rows.clone()) {
                    *score = self.apply(*score, head.pair(i, j));
                }
            }
        }
    }
}

/// Scores of some rows and keys of a head: that of row `i` and key `j` is
/// `scores[(j - keys.start) * stride + i - rows.start]`.
#[derive(Debug)]
pub struct ScoreTile<'a> {
    /// The head.
    pub head: Head,
    /// Query rows, at most `stride`.
    pub rows: Range<usize>,
    /// Key rows.
    pub keys: Range<usize>,
    /// Key by key; the last may end with its last row.
    pub scores: &'a mut [f32],
    /// From one key to the next.
    pub stride: usize,
}

impl ScoreTile<'_> {
    /// The same tile for a shorter time.
    #[inline(always)]
    pub fn reborrow(&mut self) -> ScoreTile<'_> {
        let (rows, keys) = (self.rows.clone(), self.keys.clone());
        ScoreTile { head: self.head, rows, keys, scores: &mut *self.scores, stride: self.stride }
    }
}

impl<T: ScoreMod + ?Sized> ScoreMod for &T {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        (**self).check(shape)
    }

    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        (**self).apply(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        (**self).apply_f64(score, at)
    }

    #[inline(always)]
    fn derivative(&self, score: f32, at: Pair) -> f32 {
        (**self).derivative(score, at)
    }

    fn derivative_f64(&self, score: f64, at: Pair) -> f64 {
        (**self).derivative_f64(score, at)
    }

    fn has_derivative(&self) -> bool {
        (**self).has_derivative()
    }

    #[inline(always)]
    fn is_identity(&self) -> bool {
        (**self).is_identity()
    }

    #[inline(always)]
    fn apply_tile(&self, tile: ScoreTile<'_>) {
        (**self).apply_tile(tile);
    }
}

/// `None` leaves scores alone.
impl<C: ScoreMod> ScoreMod for Option<C> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.as_ref().map_or(Ok(()), |score_mod| score_mod.check(shape))
    }

    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.as_ref().map_or(score, |score_mod| score_mod.apply(score, at))
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.as_ref().map_or(score, |score_mod| score_mod.apply_f64(score, at))
    }

    #[inline(always)]
    fn derivative(&self, score: f32, at: Pair) -> f32 {
        self.as_ref().map_or(1.0, |score_mod| score_mod.derivative(score, at))
    }

    fn derivative_f64(&self, score: f64, at: Pair) -> f64 {
        self.as_ref().map_or(1.0, |score_mod| score_mod.derivative_f64(score, at))
    }

    fn has_derivative(&self) -> bool {
        self.as_ref().is_none_or(ScoreMod::has_derivative)
    }

    #[inline(always)]
    fn is_identity(&self) -> bool {
        self.as_ref().is_none_or(ScoreMod::is_identity)
    }

    #[inline(always)]
    fn apply_tile(&self, tile: ScoreTile<'_>) {
        if let Some(score_mod) = self {
            score_mod.apply_tile(tile);
        }
    }
}

/// Leaves scores alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unchanged;

impl ScoreMod for Unchanged {
    #[inline(always)]
    fn apply(&self, score: f32, _: Pair) -> f32 {
        score
    }

    fn apply_f64(&self, score: f64, _: Pair) -> f64 {
        score
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }

    #[inline(always)]
    fn is_identity(&self) -> bool {
        true
    }
}
