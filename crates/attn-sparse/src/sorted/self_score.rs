//! The score of a token with itself, as the engine is given it.
//!
//! Beside a score of -5e4 an f32 keeps two digits behind the point, too few for the weights of a token that sees itself in
//! several rounds (or of a cluster) and nothing else. Any score that is out of reach of all others gives the same weights.

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
    /// For the score `asked` where no other one is below `lowest`.
    pub(super) fn new(asked: f32, lowest: f32) -> Self {
        let used = lowest - OUT_OF_REACH;
        if !(asked.is_finite() && used.is_finite() && asked < used) {
            return Self { used: asked, shift: 0.0, below: f32::NEG_INFINITY };
        }
        Self { used, shift: asked - used, below: lowest - OUT_OF_REACH / 2.0 }
    }

    /// The log-sum-exp with the score that was asked for.
    pub(super) fn of(&self, lse: f32) -> f32 {
        if lse < self.below { lse + self.shift } else { lse }
    }
}
