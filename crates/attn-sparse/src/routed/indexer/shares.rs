//! One row at a time, where the threads share the keys: decoding.

use super::{KeyNumber, KeyPanels, Panels, RowSelector, Rows, SAMPLING, ScoreScratch, TILE};
use crate::select::largest::NthLargest;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use std::ops::Range;

/// Keys of a share, of which each is a task.
const SHARE: usize = 1 << 15;

impl Rows<'_> {
    /// What one row takes, shares of the keys in parallel.
    pub(super) fn by_shares<K: Panels, R: RowSelector>(&self, isa: Isa, keys: &K, selector: &R) -> Vec<u32> {
        if let Some(all) = selector.without_scores(self.first) {
            return all;
        }
        let n_keys = selector.visible(self.first);
        let guess = keys.sample().zip(selector.rank_in_sample(self.first)).and_then(|(keys, rank)| {
            let mut scores = vec![0.0; n_keys.div_ceil(SAMPLING).min(keys.len())];
            let shares = scores.chunks_mut(SHARE / SAMPLING).enumerate();
            for_each_task(shares, ScoreScratch::default, |scratch, (share, scores)| {
                let first = share * (SHARE / SAMPLING);
                isa.run(ScoreShare { rows: *self, keys, first, scores, scratch });
            });
            isa.run(NthLargest { scores: &scores, rank })
        });
        let take = |guess: Option<f32>| {
            let mut states: Vec<R::State> = Vec::new();
            states.resize_with(n_keys.div_ceil(SHARE), R::State::default);
            for_each_task(states.iter_mut().enumerate(), ScoreScratch::default, |scratch, (share, state)| {
                selector.start(state, self.first, guess);
                let keys_of = share * SHARE..((share + 1) * SHARE).min(n_keys);
                isa.run(TakeShare {
                    rows: *self,
                    keys: keys.all(),
                    range: keys_of,
                    selector,
                    state,
                    scratch,
                });
            });
            let (first, others) = states.split_first_mut()?;
            others.iter().for_each(|later| selector.merge(first, later));
            isa.run(Finish { selector, row: self.first, state: first })
        };
        guess.and_then(|guess| take(Some(guess))).or_else(|| take(None)).unwrap_or_default()
    }
}

/// A stretch of the scores of one row.
struct ScoreShare<'a, E> {
    rows: Rows<'a>,
    keys: &'a KeyPanels<E>,
    first: usize,
    scores: &'a mut [f32],
    scratch: &'a mut ScoreScratch,
}

impl<E: KeyNumber> SimdOp for ScoreShare<'_, E> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { rows, keys, first, scores, scratch } = self;
        for (tile, scores) in scores.chunks_mut(TILE).enumerate() {
            let first = first + tile * TILE;
            rows.score(simd, keys, 0..1, first..first + scores.len(), scratch);
            scores.copy_from_slice(&scratch.combined[..scores.len()]);
        }
    }
}

/// One row takes the scores of a stretch of keys.
struct TakeShare<'a, E, R: RowSelector> {
    rows: Rows<'a>,
    keys: &'a KeyPanels<E>,
    range: Range<usize>,
    selector: &'a R,
    state: &'a mut R::State,
    scratch: &'a mut ScoreScratch,
}

impl<E: KeyNumber, R: RowSelector> SimdOp for TakeShare<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { rows, keys, range, selector, state, scratch } = self;
        simd.vectorize(
            #[inline(always)]
            || {
                for first in range.clone().step_by(TILE) {
                    let end = (first + TILE).min(range.end);
                    rows.score(simd, keys, 0..1, first..end, scratch);
                    selector.take(simd, state, first, &scratch.combined[..end - first]);
                }
            },
        );
    }
}

/// What a row takes in the end.
struct Finish<'a, R: RowSelector> {
    selector: &'a R,
    row: usize,
    state: &'a mut R::State,
}

impl<R: RowSelector> SimdOp for Finish<'_, R> {
    type Output = Option<Vec<u32>>;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> Option<Vec<u32>> {
        let Self { selector, row, state } = self;
        simd.vectorize(
            #[inline(always)]
            || selector.finish(simd, row, state),
        )
    }
}
