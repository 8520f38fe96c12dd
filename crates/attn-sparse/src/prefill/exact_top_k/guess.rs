//! A first threshold from a sample of the keys, so that few keys ever pass that are not among the best.
//!
//! Of every [`STEP`]-th key the `r` largest lower bounds are about those of the `STEP r` best of all keys. With
//!
//! ```text
//! r = m + 3 sqrt(r)        m = k / STEP, the best keys that a sample is expected to hold
//! ```
//!
//! the `r`-th largest is hardly ever above the `k`-th largest of all keys, three standard deviations of a count away. It stays a
//! guess: [`Candidates::holds`](super::candidates::Candidates::holds) says whether it was right.
//!
//! The sample's bounds are not kept: their maxima over buckets stand for them, whose `r`-th largest is no larger.

use super::approximate::{GROUP, Keys, Queries, Scored};
use crate::scores::PANEL;
use crate::select::largest::nth_largest;
use attn_core::simd::{Isa, Simd};

/// From one key of the sample to the next.
const STEP: usize = 8;

/// The sample of a head, and where in it the threshold stands.
pub(super) struct Guess<'a> {
    sample: Keys<'a>,
    rank: usize,
    n_buckets: usize,
}

/// A thread's scratch.
#[derive(Default)]
pub(super) struct GuessWork {
    /// `[n_buckets, PANEL]`.
    maxima: Vec<f32>,
    lane: Vec<f32>,
    ordered: Vec<u32>,
}

impl<'a> Guess<'a> {
    /// For the `k` best of `keys`; `None` where there are too few of them for a guess.
    pub(super) fn new(isa: Isa, keys: &Keys<'a>, k: usize) -> Option<Self> {
        let expected = k as f64 / STEP as f64;
        let root = (3.0 + (9.0 + 4.0 * expected).sqrt()) / 2.0;
        let rank = (root * root).ceil() as usize;
        let n_buckets = 4 * rank.next_multiple_of(8);
        let enough = k > 0 && keys.rows.len() / STEP >= 2 * n_buckets;
        enough.then(|| Self { sample: keys.every(isa, STEP), rank, n_buckets })
    }

    /// Thresholds of queries that see the first `n_keys` keys at least, `f32::MIN` if those are too few.
    #[inline(always)]
    pub(super) fn thresholds<S: Simd>(
        &self,
        simd: S,
        queries: &Queries,
        n_keys: usize,
        scored: &mut Scored,
        work: &mut GuessWork,
    ) -> [f32; PANEL] {
        let n = n_keys.div_ceil(STEP);
        let mut thresholds = [f32::MIN; PANEL];
        if n < 2 * self.n_buckets {
            return thresholds;
        }
        let GuessWork { maxima, lane: bounds, ordered } = work;
        maxima.clear();
        maxima.resize(self.n_buckets * PANEL, f32::MIN);
        for first in (0..n).step_by(GROUP) {
            let group = first..(first + GROUP).min(n);
            scored.set(simd, &self.sample, group.clone(), queries, &[f32::INFINITY; PANEL]);
            for (at, key) in group.enumerate() {
                if !self.sample.is_wild(key) {
                    let maxima = &mut maxima[key % self.n_buckets * PANEL..][..PANEL];
                    scored.raise_to_lower(&self.sample, at, maxima);
                }
            }
        }
        for (lane, threshold) in thresholds.iter_mut().enumerate() {
            bounds.clear();
            bounds.extend(maxima[lane..].iter().step_by(PANEL));
            *threshold = nth_largest(simd, bounds, self.rank, ordered).unwrap_or(f32::MIN);
        }
        thresholds
    }
}
