//! Attention with linear biases.

use super::ScoreMod;
use super::distance::Distance;
use crate::mask::{Pair, check_fits};
use crate::{AttnError, AttnShape, Result};

/// Attention with linear biases: `s - slope_h * |i + offset - j|`, nearer keys first on both sides.
///
/// Source: Press, Smith, Lewis, 2021.
#[derive(Debug, Clone, PartialEq)]
pub struct Alibi {
    slopes: Vec<f32>,
    /// `n_heads_q`, or 0 if all batch entries share the slopes.
    batch_stride: usize,
    distance: Distance,
}

impl Alibi {
    /// `slopes [n_heads_q]` or `[batch, n_heads_q]`; `offset` is the position of query 0 on the key axis.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for another number of slopes; [`AttnError::Value`] for distances beyond 2^29.
    pub fn new(slopes: Vec<f32>, shape: &AttnShape, offset: isize) -> Result<Self> {
        let heads = shape.n_heads_q;
        let shared = slopes.len() == heads;
        if !shared && Some(slopes.len()) != heads.checked_mul(shape.batch) {
            let expected = format!("{heads}, or {heads} for each of {} batch entries", shape.batch);
            return Err(AttnError::shape("alibi_slopes", "n_heads_q", slopes.len(), expected));
        }
        let batch_stride = if shared { 0 } else { heads };
        Ok(Self { slopes, batch_stride, distance: Distance::new(shape, offset)? })
    }

    /// The paper's slopes: a geometric sequence for powers of two, else that of the power below followed by
    /// every other slope of the power above.
    pub fn default_slopes(n_heads: usize) -> Vec<f32> {
        let geometric = |n: usize| (1..=n).map(move |h| (-8.0 * h as f32 / n as f32).exp2());
        if n_heads == 0 {
            return Vec::new();
        }
        let below = 1 << n_heads.ilog2();
        geometric(below).chain(geometric(2 * below).step_by(2)).take(n_heads).collect()
    }

    #[inline(always)]
    fn slope(&self, at: Pair) -> f32 {
        self.slopes[at.batch * self.batch_stride + at.head]
    }
}

impl ScoreMod for Alibi {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        check_fits("alibi_slopes", self.slopes.len(), &[self.batch_stride, 1, 0, 0], shape)
    }

    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        score - self.slope(at) * self.distance.of(at).abs() as f32
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score - f64::from(self.slope(at)) * f64::from(self.distance.of(at).abs())
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}
