//! The score of a token with itself, as the engine is given it.
//!
//! Beside a score of -5e4 an f32 keeps two digits behind the point, too few for the weights of a token that sees itself in
//! several rounds and nothing else. Any score that is out of reach of all others gives the same weights: keys have unit length,
//! so that no other score is below `-softmax_scale max |q|`.

use super::Reformer;
use crate::sorted::rows::{head_norms, heads};
use attn_core::Qkv;

/// What is below the lowest score by this much has no weight in f32: `e^-128 < 2^-149`.
const OUT_OF_REACH: f32 = 128.0;

/// The score to use, and what it stands for.
#[derive(Debug, Clone, Copy)]
pub(super) struct SelfScore {
    pub(super) used: f32,
    /// Added to log-sum-exps below `below`.
    shift: f32,
    below: f32,
}

impl SelfScore {
    pub(super) fn new(config: &Reformer, x: &Qkv<'_>, softmax_scale: f32) -> Self {
        let as_is = Self { used: config.self_logit, shift: 0.0, below: f32::NEG_INFINITY };
        if !config.shared_qk {
            return as_is;
        }
        let longest = heads(&x.shape()).into_iter().map(|at| head_norms(x.q(), at)).fold(0.0, f32::max);
        let lowest = -softmax_scale.abs() * longest;
        let used = lowest - OUT_OF_REACH;
        if !(config.self_logit.is_finite() && used.is_finite() && config.self_logit < used) {
            return as_is;
        }
        Self { used, shift: config.self_logit - used, below: lowest - OUT_OF_REACH / 2.0 }
    }

    /// The log-sum-exp with the score that was asked for.
    pub(super) fn of(&self, lse: f32) -> f32 {
        if lse < self.below { lse + self.shift } else { lse }
    }
}
