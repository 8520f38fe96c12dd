//! The candidates of one query: keys that may be among its `k` best.
//!
//! With every score between two bounds, the true `k`-th largest is not below the `k`-th largest lower bound, `t`: a key whose
//! upper bound is below `t` is not among the `k` best. A key whose lower bound is above the upper ones of all but `k - 1` others
//! is. Only those between are scored again. While keys stream by, `t` is a lower bound of its final value.

use crate::select::largest::reached_by;
use crate::select::rank::{ordered, score_of_key};
use attn_core::simd::Simd;
use std::cmp::Ordering;
use std::ops::RangeInclusive;

/// See the module.
#[derive(Debug, Clone, Default)]
pub(super) struct Candidates {
    keys: Vec<Candidate>,
    k: usize,
    /// Length at which the candidates are cut.
    full: usize,
    ordered: Vec<u32>,
}

/// A key, and the bounds of its score.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    lower: f32,
    upper: f32,
    key: u32,
}

impl Candidates {
    pub(super) fn start(&mut self, k: usize) {
        self.k = k;
        self.restart();
    }

    /// Forgets all keys.
    pub(super) fn restart(&mut self) {
        self.keys.clear();
        self.full = 2 * self.k + 64;
    }

    /// Adds a key; `threshold` rises when it can.
    #[inline(always)]
    pub(super) fn push<S: Simd>(
        &mut self,
        simd: S,
        [lower, upper]: [f32; 2],
        key: usize,
        threshold: &mut f32,
    ) {
        self.keys.push(Candidate { lower, upper, key: key as u32 });
        if self.keys.len() >= self.full {
            *threshold = threshold.max(self.cut(simd));
            self.full = self.full.max(2 * self.keys.len());
        }
    }

    /// Whether nothing was missed above a guessed threshold: `k` lower bounds reach it.
    pub(super) fn holds(&self, guess: f32) -> bool {
        guess == f32::MIN || self.keys.iter().filter(|key| key.lower >= guess).count() >= self.k
    }

    /// Drops keys that are not among the `k` best for sure; returns the upper bound that the others reach.
    #[inline(always)]
    fn cut<S: Simd>(&mut self, simd: S) -> f32 {
        if self.k == 0 || self.keys.len() < self.k {
            return f32::MIN;
        }
        let (least, _) = self.reached_by(simd, |key| key.lower, self.k..=self.k + self.k / 16);
        self.keys.retain(|key| key.upper >= least);
        least
    }

    /// A bound that as many of the candidates reach as `wanted` says, or the next more, and how many.
    #[inline(always)]
    fn reached_by<S: Simd>(
        &mut self,
        simd: S,
        bound: impl Fn(&Candidate) -> f32,
        wanted: RangeInclusive<usize>,
    ) -> (f32, usize) {
        self.ordered.clear();
        self.ordered.extend(self.keys.iter().map(|key| ordered(bound(key))));
        let (least, n) = reached_by(simd, &self.ordered, wanted);
        (score_of_key(least), n)
    }

    /// The lower bound from which a key is among the `k` best for sure.
    #[inline(always)]
    fn sure<S: Simd>(&mut self, simd: S) -> f32 {
        // At most `k` upper bounds reach it, and its own is one of them.
        match self.reached_by(simd, |key| key.upper, (self.k - self.k / 8).max(1)..=self.k) {
            (least, n) if n <= self.k => least,
            _ => f32::INFINITY,
        }
    }

    /// The `k` best keys, ascending, in `chosen`; `exact(key)` is the true score, asked for where it matters. `wild` keys have
    /// no bounds: with them, all candidates are scored again.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(
        &mut self,
        simd: S,
        wild: &[u32],
        mut exact: impl FnMut(u32) -> f64,
        chosen: &mut Vec<u32>,
    ) {
        chosen.clear();
        if self.k == 0 {
            return;
        }
        self.cut(simd);
        if wild.is_empty() && self.keys.len() <= self.k {
            chosen.extend(self.keys.iter().map(|key| key.key));
        } else {
            let sure = if wild.is_empty() { self.sure(simd) } else { f32::INFINITY };
            let mut doubtful = Vec::with_capacity(self.keys.len() + wild.len());
            for Candidate { lower, key, .. } in self.keys.iter().copied() {
                match lower >= sure {
                    true => chosen.push(key),
                    false => doubtful.push((exact(key), key)),
                }
            }
            doubtful.extend(wild.iter().map(|key| (exact(*key), *key)));
            let open = self.k - chosen.len();
            chosen.extend(best(doubtful, open));
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
