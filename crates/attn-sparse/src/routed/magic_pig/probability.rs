//! How likely a key is sampled, and what it weighs for that.
//!
//! ```text
//! p = 1 - theta / pi                        a bit is the same, theta the angle between query and centred key
//! u = P(at least 2 of L tables collide) = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L-1)
//! s' = s - ln u                             so that a key that is sampled with probability u weighs e^s / u
//! ```

use crate::routed::router::visible;
use attn_core::mask::Pair;
use attn_core::score::ScoreMod;
use attn_core::{AttnError, AttnShape, Result};
use std::f64::consts::PI;
use std::sync::Arc;

/// Smaller probabilities weigh as this one: no key is sampled by so small a chance.
const LEAST: f64 = 1e-37;

/// Codes of `bits` bits in `tables` tables.
#[derive(Debug, Clone, Copy)]
pub(super) struct Collisions {
    pub(super) bits: usize,
    pub(super) tables: usize,
}

impl Collisions {
    /// The probability that vectors at an angle of this cosine have equal codes in two tables at least.
    pub(super) fn probability(self, cos: f64) -> f64 {
        let p = 1.0 - cos.clamp(-1.0, 1.0).acos() / PI;
        let x = p.powi(self.bits as i32);
        let m = self.tables.saturating_sub(1) as f64;
        match m * x < 1e-4 {
            // The terms below would cancel.
            true => m * (m + 1.0) * x * x * (0.5 - (m - 1.0) * x / 3.0),
            false => 1.0 - (1.0 - x).powi(m as i32) * (1.0 + m * x),
        }
    }
}

/// Which keys are taken without sampling.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forced {
    /// First keys.
    pub(super) sinks: usize,
    /// Last keys, that at the query's position included.
    pub(super) window: usize,
    /// Queries that see no more keys take all.
    pub(super) all_up_to: usize,
}

impl Forced {
    /// Whether a query that sees `visible` keys takes key `j` in any case.
    pub(super) fn contain(&self, j: usize, visible: usize) -> bool {
        visible <= self.all_up_to || j < self.sinks || j + self.window >= visible
    }
}

/// `s - ln u` of sampled pairs; forced ones keep their score. The probability is a constant to the gradients.
pub(super) struct Weights {
    pub(super) shape: AttnShape,
    pub(super) forced: Forced,
    pub(super) collisions: Collisions,
    pub(super) softmax_scale: f32,
    /// Of each query, `[batch, n_heads_q, n_q]`: its norm, and its product with the centre of the keys.
    pub(super) queries: Vec<[f32; 2]>,
    /// Of each key/value head, the norms of the centred keys.
    pub(super) key_norms: Vec<Arc<Vec<f32>>>,
}

impl Weights {
    /// `-ln u` of a pair whose scaled score this is.
    fn bias(&self, score: f64, at: Pair) -> f64 {
        let s = &self.shape;
        if self.forced.contain(at.j, visible(s, at.i)) {
            return 0.0;
        }
        let [norm, centre] = self.queries[(at.batch * s.n_heads_q + at.head) * s.n_q + at.i].map(f64::from);
        let key_norm = f64::from(self.key_norms[at.batch * s.n_heads_kv + s.kv_head(at.head)][at.j]);
        let cos = (score / f64::from(self.softmax_scale) - centre) / (norm * key_norm);
        // A vector of length 0 agrees in every second bit.
        let cos = if cos.is_finite() { cos } else { 0.0 };
        -self.collisions.probability(cos).max(LEAST).ln()
    }
}

impl ScoreMod for Weights {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        let (own, given) = (&self.shape, shape);
        let axes = [
            ("batch", own.batch, given.batch),
            ("n_heads_q", own.n_heads_q, given.n_heads_q),
            ("n_heads_kv", own.n_heads_kv, given.n_heads_kv),
            ("n_q", own.n_q, given.n_q),
            ("n_kv", own.n_kv, given.n_kv),
        ];
        match axes.into_iter().find(|(_, own, given)| own != given) {
            Some((axis, own, given)) => Err(AttnError::shape("sampling weights", axis, given, own)),
            None => Ok(()),
        }
    }

    fn apply(&self, score: f32, at: Pair) -> f32 {
        score + self.bias(f64::from(score), at) as f32
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score + self.bias(score, at)
    }

    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: table by table, how likely it is that none, one or more have collided.
    #[test]
    fn two_collisions_at_least() {
        for (bits, tables) in [(0, 2), (1, 2), (4, 3), (10, 150), (9, 120), (12, 300)] {
            let collisions = Collisions { bits, tables };
            for cos in [-0.999, -0.7, -0.2, 0.0, 0.3, 0.9, 0.9999, 1.0] {
                let p = 1.0 - f64::acos(cos) / PI;
                let x = p.powi(bits as i32);
                let (mut none, mut one, mut want) = (1.0, 0.0, 0.0);
                for _ in 0..tables {
                    (none, one, want) = (none * (1.0 - x), none * x + one * (1.0 - x), want + one * x);
                }
                let got = collisions.probability(cos);
                assert!((got - want).abs() <= 1e-7 * want, "{bits} {tables} {cos}: {got}, want {want}");
            }
        }
    }
}
