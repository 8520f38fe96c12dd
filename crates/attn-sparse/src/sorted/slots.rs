//! Who sees whom among rows that were gathered into groups.
//!
//! A group is a head of the engine's problem: some gathered queries and some gathered keys. Each slot carries the position of
//! the token that stands in it. A query at position `p` sees a key at position `t` iff both slots are filled and, where the
//! mask is causal, `t <= p`; where buckets count, they must be equal too. A memory key is seen by every query.

use super::repeats::Repeats;
use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::score::{ScoreMod, ScoreTile};
use std::ops::Range;

/// The position of a slot that nothing stands in.
pub(super) const NOBODY: i32 = i32::MAX;

/// The position of a key that every query sees.
pub(super) const MEMORY: i32 = i32::MIN;

/// A number for each slot: that of row `i` of a group is `numbers[batch * entry + head * group + i]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lane<'a> {
    pub(super) numbers: &'a [i32],
    pub(super) entry: usize,
    pub(super) group: usize,
}

impl<'a> Lane<'a> {
    #[inline(always)]
    fn at(&self, head: Head, row: usize) -> i32 {
        self.numbers[head.batch * self.entry + head.head * self.group + row]
    }

    #[inline(always)]
    fn rows(&self, head: Head, rows: &Range<usize>) -> &'a [i32] {
        &self.numbers[head.batch * self.entry + head.head * self.group + rows.start..][..rows.len()]
    }
}

/// Visibility inside groups, and what happens to the score of a token with itself and of a pair that is met repeatedly.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slots<'a> {
    /// Positions of queries.
    pub(super) q: Lane<'a>,
    /// Positions of keys.
    pub(super) k: Lane<'a>,
    /// Whether later keys are hidden.
    pub(super) causal: bool,
    /// What replaces the score of a token with itself.
    pub(super) self_logit: Option<f32>,
    /// Buckets of queries and keys, which must be equal.
    pub(super) buckets: Option<[Lane<'a>; 2]>,
    /// How often a pair is met, whose logarithm is taken off its score.
    pub(super) repeats: Option<Repeats<'a>>,
}

/// Smallest and largest number.
fn extent(numbers: &[i32]) -> (i32, i32) {
    numbers.iter().fold((i32::MAX, i32::MIN), |(min, max), &x| (min.min(x), max.max(x)))
}

impl Mask for Slots<'_> {
    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        let head = Head { batch: p.batch, head: p.head };
        let (q, k) = (self.q.at(head, p.i), self.k.at(head, p.j));
        let seen = q != NOBODY && k != NOBODY && !(self.causal && k > q);
        seen && self.buckets.is_none_or(|[of_q, of_k]| of_q.at(head, p.i) == of_k.at(head, p.j))
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let last = self.q.rows(head, &rows).iter().copied().filter(|q| *q != NOBODY).max();
        let Some(last) = last else { return Vec::new() };
        let keys = self.k.rows(head, &(0..n_kv));
        let seen = |k: &i32| *k != NOBODY && !(self.causal && *k > last);
        match (keys.iter().position(seen), keys.iter().rposition(seen)) {
            (Some(first), Some(last)) => std::iter::once(first..last + 1).collect(),
            _ => Vec::new(),
        }
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (of_rows, of_keys) = (self.q.rows(head, &rows), self.k.rows(head, &keys));
        let (first_q, last_q) = extent(of_rows);
        let (first_k, last_k) = extent(of_keys);
        if first_q == NOBODY || first_k == NOBODY {
            return Cover::Empty;
        }
        let filled = last_q != NOBODY && last_k != NOBODY;
        if self.causal && filled && first_k > last_q {
            return Cover::Empty;
        }
        let same_bucket = self.buckets.is_none_or(|[of_q, of_k]| {
            let (q, k) = (extent(of_q.rows(head, &rows)), extent(of_k.rows(head, &keys)));
            q == k && q.0 == q.1
        });
        if filled && same_bucket && !(self.causal && last_k > first_q) { Cover::Full } else { Cover::Partial }
    }

    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let k = self.k.at(head, j);
        if k == NOBODY {
            return scores[..rows.len()].fill(f32::NEG_INFINITY);
        }
        for (score, &q) in scores.iter_mut().zip(self.q.rows(head, &rows)) {
            let hidden = (q == NOBODY) | (self.causal & (k > q));
            *score = if hidden { f32::NEG_INFINITY } else { *score };
        }
        if let Some([of_q, of_k]) = self.buckets {
            let k = of_k.at(head, j);
            for (score, &q) in scores.iter_mut().zip(of_q.rows(head, &rows)) {
                *score = if q == k { *score } else { f32::NEG_INFINITY };
            }
        }
    }
}

impl Slots<'_> {
    /// Whether a query stands in its own key's slot.
    #[inline(always)]
    fn is_self(&self, p: Pair) -> bool {
        let head = Head { batch: p.batch, head: p.head };
        self.q.at(head, p.i) == self.k.at(head, p.j)
    }

    /// What is taken off the score of a pair.
    #[inline(always)]
    fn log_count(&self, p: Pair) -> f64 {
        let head = Head { batch: p.batch, head: p.head };
        let (q, k) = (self.q.at(head, p.i), self.k.at(head, p.j));
        match &self.repeats {
            Some(repeats) if q != NOBODY && k != NOBODY => {
                f64::from(repeats.count(p.batch, q as usize, k as usize)).ln()
            }
            _ => 0.0,
        }
    }
}

impl ScoreMod for Slots<'_> {
    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        let score = self.self_logit.filter(|_| self.is_self(at)).unwrap_or(score);
        if self.repeats.is_some() { score - self.log_count(at) as f32 } else { score }
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        let fixed = self.self_logit.filter(|_| self.is_self(at)).map(f64::from);
        fixed.unwrap_or(score) - self.log_count(at)
    }

    #[inline(always)]
    fn derivative(&self, _: f32, at: Pair) -> f32 {
        if self.self_logit.is_some() && self.is_self(at) { 0.0 } else { 1.0 }
    }

    fn is_identity(&self) -> bool {
        self.self_logit.is_none() && self.repeats.is_none()
    }

    fn apply_tile(&self, tile: ScoreTile<'_>) {
        let ScoreTile { head, rows, keys, scores, stride } = tile;
        for (j, row) in keys.zip(scores.chunks_mut(stride)) {
            if let Some(fixed) = self.self_logit {
                let k = self.k.at(head, j);
                for (score, &q) in row.iter_mut().zip(self.q.rows(head, &rows)) {
                    *score = if q == k { fixed } else { *score };
                }
            }
            if self.repeats.is_some() {
                for (score, i) in row.iter_mut().zip(rows.clone()) {
                    *score -= self.log_count(head.pair(i, j)) as f32;
                }
            }
        }
    }
}
