//! The candidates of one query: keys that may be among its `k` best.
//!
//! With every score between two bounds, the true `k`-th largest is not below the `k`-th largest lower bound, `t`: a key whose
//! upper bound is below `t` is not among the `k` best. A key whose lower bound is above the upper ones of all but `k - 1` others
//! is. Only those between are scored again. While keys stream by, `t` is a lower bound of its final value.
//!
//! Where a good part of all keys lies between (many scores are equal, or nearly), bounds do not help: then all are scored exactly.

use super::exact::Exact;
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
    /// Length at which there are too many of them.
    crowd: usize,
    is_crowded: bool,
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
    /// For the `k` best of `n_keys`.
    pub(super) fn start(&mut self, k: usize, n_keys: usize) {
        (self.k, self.crowd) = (k, (n_keys / 8).max(8 * k + 512));
        self.restart();
    }

    /// Whether the bounds leave too much open: all keys have to be scored.
    pub(super) fn is_crowded(&self) -> bool {
        self.is_crowded
    }

    /// Forgets all keys.
    pub(super) fn restart(&mut self) {
        self.keys.clear();
        (self.full, self.is_crowded) = (2 * self.k + 64, false);
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
            if self.keys.len() >= self.crowd {
                self.keys.clear();
                (self.is_crowded, *threshold) = (true, f32::INFINITY);
            }
        }
    }

    /// Whether nothing was missed above a guessed threshold: `k` lower bounds reach it.
    pub(super) fn holds(&self, guess: f32) -> bool {
        guess == f32::MIN
            || self.is_crowded
            || self.keys.iter().filter(|key| key.lower >= guess).count() >= self.k
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

    /// The `k` best keys, ascending, in `chosen`; true scores are asked for where they matter. `wild` keys have
    /// no bounds: with them, all candidates are scored again.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(
        &mut self,
        simd: S,
        wild: &[u32],
        (x, exact): (&[f64], &mut Exact<'_>),
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
                    false => doubtful.push((exact.score(simd, x, key), key)),
                }
            }
            for key in wild {
                doubtful.push((exact.score(simd, x, *key), *key));
            }
            let mut best = Best::new(self.k - chosen.len());
            doubtful.into_iter().for_each(|(score, key)| best.offer(score, key));
            chosen.extend(best.finish());
        }
        chosen.sort_unstable();
    }
}

/// The `k` keys of largest score: NaN before all numbers, of equal scores the lower key; never -inf.
pub(super) struct Best {
    k: usize,
    kept: Vec<(f64, u32)>,
    /// No key that is not better is among them.
    worst: Option<(f64, u32)>,
}

impl Best {
    pub(super) fn new(k: usize) -> Self {
        Self { k, kept: Vec::new(), worst: None }
    }

    #[inline(always)]
    pub(super) fn offer(&mut self, score: f64, key: u32) {
        let is_better = self.worst.as_ref().is_none_or(|worst| better(&(score, key), worst).is_lt());
        if is_better && score != f64::NEG_INFINITY {
            self.kept.push((score, key));
            if self.kept.len() >= 2 * self.k + 64 {
                self.cut();
            }
        }
    }

    fn cut(&mut self) {
        if self.k > 0 && self.kept.len() >= self.k {
            self.worst = Some(*self.kept.select_nth_unstable_by(self.k - 1, better).1);
        }
        self.kept.truncate(self.k);
    }

    /// In no order.
    pub(super) fn finish(mut self) -> impl Iterator<Item = u32> {
        self.cut();
        self.kept.into_iter().map(|(_, key)| key)
    }
}

#[inline(always)]
fn better(a: &(f64, u32), b: &(f64, u32)) -> Ordering {
    let scores = match (a.0.is_nan(), b.0.is_nan()) {
        (false, false) => b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal),
        (a, b) => b.cmp(&a),
    };
    scores.then(a.1.cmp(&b.1))
}
