//! The candidates of one query: keys that may be among its `k` best.
//!
//! With every score known up to `error`, the true `k`-th largest is within `error` of the `k`-th largest known one, `t`. A key
//! known to be above `t + 2 error` is among the `k` best, one below `t - 2 error` is not; only those between are scored again.
//! While scores stream by, `t` is a lower bound of its final value.

use crate::select::rank::{index_of, rank, score_of};
use std::cmp::Ordering;

/// See the module.
#[derive(Debug, Clone, Default)]
pub(super) struct Candidates {
    /// Ranks of approximate scores, in no order.
    ranks: Vec<u64>,
    k: usize,
    error: f32,
    /// Length at which the candidates are cut.
    full: usize,
}

impl Candidates {
    pub(super) fn start(&mut self, k: usize, error: f32) {
        self.ranks.clear();
        (self.k, self.error, self.full) = (k, error, 2 * k + 64);
    }

    /// Adds a key; `threshold` rises when it can.
    pub(super) fn push(&mut self, score: f32, key: usize, threshold: &mut f32) {
        self.ranks.push(rank(score, key as u32));
        if self.ranks.len() >= self.full {
            *threshold = self.cut();
            self.full = (2 * self.ranks.len()).max(2 * self.k + 64);
        }
    }

    /// Drops the keys that are not among the `k` best for sure; returns the score below which they are.
    fn cut(&mut self) -> f32 {
        if self.k == 0 || self.ranks.len() <= self.k {
            return f32::MIN;
        }
        let (_, kth, _) = self.ranks.select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
        let lowest = (score_of(*kth) - 2.0 * self.error).next_down();
        let mut kept = self.k;
        for at in self.k..self.ranks.len() {
            if score_of(self.ranks[at]) >= lowest {
                self.ranks.swap(kept, at);
                kept += 1;
            }
        }
        self.ranks.truncate(kept);
        lowest
    }

    /// The `k` best keys, ascending, in `chosen`; `exact(key)` is the true score, asked for where it matters. `wild` keys have
    /// no approximate score: with them, all candidates are scored again.
    pub(super) fn finish(&mut self, wild: &[u32], mut exact: impl FnMut(u32) -> f64, chosen: &mut Vec<u32>) {
        chosen.clear();
        if self.k == 0 {
            return;
        }
        self.cut();
        if wild.is_empty() && self.ranks.len() <= self.k {
            chosen.extend(self.ranks.iter().map(|rank| index_of(*rank)));
        } else {
            let sure = match self.ranks.get(self.k - 1) {
                // After the cut, the k-th largest stands at its place.
                Some(kth) if wild.is_empty() => (score_of(*kth) + 2.0 * self.error).next_up(),
                _ => f32::INFINITY,
            };
            let mut doubtful = Vec::new();
            for rank in &self.ranks {
                if score_of(*rank) > sure {
                    chosen.push(index_of(*rank));
                } else {
                    doubtful.push(index_of(*rank));
                }
            }
            doubtful.extend(wild);
            let scored = doubtful.into_iter().map(|key| (exact(key), key)).collect();
            let open = self.k - chosen.len();
            chosen.extend(best(scored, open));
        }
        chosen.sort_unstable();
    }
}

/// The `k` keys of largest score, in no order: NaN before all numbers, of equal scores the lower key; never -inf.
pub(super) fn best(mut scored: Vec<(f64, u32)>, k: usize) -> impl Iterator<Item = u32> {
    scored.retain(|(score, _)| *score != f64::NEG_INFINITY);
    if k > 0 && scored.len() > k {
        scored.select_nth_unstable_by(k - 1, better);
    }
    scored.truncate(k);
    scored.into_iter().map(|(_, key)| key)
}

fn better(a: &(f64, u32), b: &(f64, u32)) -> Ordering {
    let scores = match (a.0.is_nan(), b.0.is_nan()) {
        (false, false) => b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal),
        (a, b) => b.cmp(&a),
    };
    scores.then(a.1.cmp(&b.1))
}
