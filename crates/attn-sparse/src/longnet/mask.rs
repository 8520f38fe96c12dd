//! Who sees whom, and how often.

use super::Branch;
use attn_core::mask::{Mask, Pair};
use attn_core::score::ScoreMod;

/// Pairs that at least one branch sees.
#[derive(Debug, Clone)]
pub(super) struct LongNetMask {
    pub(super) branches: Vec<Branch>,
    pub(super) causal: bool,
    /// Position of query 0.
    pub(super) offset: isize,
}

impl LongNetMask {
    /// Branches that see the pair.
    fn copies(&self, pair: Pair) -> usize {
        match pair.i.checked_add_signed(self.offset) {
            Some(position) if !self.causal || pair.j <= position => {
                let at = (position, pair.j, pair.head);
                self.branches.iter().filter(|branch| branch.sees(at)).count()
            }
            _ => 0,
        }
    }
}

impl Mask for LongNetMask {
    fn sees(&self, pair: Pair) -> bool {
        self.copies(pair) > 0
    }
}

/// `s + ln c` for a pair that `c` branches see.
#[derive(Debug, Clone)]
pub(super) struct Copies(pub(super) LongNetMask);

impl ScoreMod for Copies {
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.apply_f64(f64::from(score), at) as f32
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score + (self.0.copies(at) as f64).ln()
    }

    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}
