//! The user's own score functions.

use super::ScoreMod;
use crate::mask::Pair;

/// A closure `(score, pair) -> score`, compiled into the kernel. Its derivative is not known; for a backward pass use
/// [`ScoreFnWithDerivative`].
#[derive(Debug, Clone, Copy)]
pub struct ScoreFn<F>(pub F);

impl<F: Fn(f32, Pair) -> f32 + Sync> ScoreMod for ScoreFn<F> {
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        (self.0)(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        f64::from((self.0)(score as f32, at))
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        f32::NAN
    }

    fn has_derivative(&self) -> bool {
        false
    }
}

/// A closure `(score, pair) -> score` and its derivative with respect to the score, `(score, pair) -> slope`.
#[derive(Debug, Clone, Copy)]
pub struct ScoreFnWithDerivative<F, D>(pub F, pub D);

impl<F, D> ScoreMod for ScoreFnWithDerivative<F, D>
where
    F: Fn(f32, Pair) -> f32 + Sync,
    D: Fn(f32, Pair) -> f32 + Sync,
{
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        (self.0)(score, at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        f64::from((self.0)(score as f32, at))
    }

    #[inline(always)]
    fn derivative(&self, score: f32, at: Pair) -> f32 {
        (self.1)(score, at)
    }
}
