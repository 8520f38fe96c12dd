//! One score mod after another.

use super::{ScoreMod, ScoreTile};
use crate::mask::Pair;
use crate::{AttnShape, Result};

/// First `A`, then `B`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Then<A, B>(pub A, pub B);

impl<A: ScoreMod, B: ScoreMod> ScoreMod for Then<A, B> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.0.check(shape)?;
        self.1.check(shape)
    }

    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.1.apply(self.0.apply(score, at), at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.1.apply_f64(self.0.apply_f64(score, at), at)
    }

    #[inline(always)]
    fn derivative(&self, score: f32, at: Pair) -> f32 {
        self.1.derivative(self.0.apply(score, at), at) * self.0.derivative(score, at)
    }

    fn derivative_f64(&self, score: f64, at: Pair) -> f64 {
        self.1.derivative_f64(self.0.apply_f64(score, at), at) * self.0.derivative_f64(score, at)
    }

    fn has_derivative(&self) -> bool {
        self.0.has_derivative() && self.1.has_derivative()
    }

    #[inline(always)]
    fn is_identity(&self) -> bool {
        self.0.is_identity() && self.1.is_identity()
    }

    #[inline(always)]
    fn apply_tile(&self, mut tile: ScoreTile<'_>) {
        if !self.0.is_identity() {
            self.0.apply_tile(tile.reborrow());
        }
        if !self.1.is_identity() {
            self.1.apply_tile(tile);
        }
    }
}
