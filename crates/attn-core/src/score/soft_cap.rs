//! Logit soft caps.

use super::ScoreMod;
use super::tanh::tanh;
use crate::mask::Pair;
use crate::{AttnError, Result};

/// `c * tanh(s / c)`: keeps logits inside `(-c, c)`.
///
/// Source: Bello et al. 2016 (pointer logits); Gemma 2, 2024.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftCap(f32);

impl SoftCap {
    /// # Errors
    /// [`AttnError::Value`] unless `cap` is positive and finite.
    pub fn new(cap: f32) -> Result<Self> {
        if cap.is_finite() && cap > 0.0 {
            return Ok(Self(cap));
        }
        Err(AttnError::value("softcap", cap, "a positive finite number"))
    }
}

impl ScoreMod for SoftCap {
    #[inline(always)]
    fn apply(&self, score: f32, _: Pair) -> f32 {
        self.0 * tanh(score / self.0)
    }

    fn apply_f64(&self, score: f64, _: Pair) -> f64 {
        let cap = f64::from(self.0);
        cap * (score / cap).tanh()
    }

    #[inline(always)]
    fn derivative(&self, score: f32, _: Pair) -> f32 {
        let tanh = tanh(score / self.0);
        1.0 - tanh * tanh
    }

    fn derivative_f64(&self, score: f64, _: Pair) -> f64 {
        (score / f64::from(self.0)).cosh().powi(-2)
    }
}
