//! One row at a time, where the threads share the keys: decoding.

use super::{IndexNumber, KeyPanels, Panels, RowSelector, Rows, SAMPLING, ScoreScratch, TILE};
use crate::block_mask::lists::{Slot, SlotRun};
use crate::select::largest::NthLargest;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use std::ops::Range;

/// Keys of a share, of which each is a task.
const SHARE: usize = 1 << 15;

impl<U: IndexNumber> Rows<'_, U> {
    /// What one row takes, shares of the keys in parallel.
    pub(super) fn by_shares<K: Panels<Number = U>, R: RowSelector>(
        &self,
        isa: Isa,
        keys: &K,
        selector: &R,
        chosen: &mut SlotRun<'_>,
    ) {
        if let Some(all) = selector.takes_all(self.first) {
            chosen.slot(0).append_range(0..all);
            return;
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
        let mut take = |guess: Option<f32>| {
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
            let Some((first, others)) = states.split_first_mut() else { return true };
            others.iter().for_each(|later| selector.merge(first, later));
            isa.run(Finish { selector, row: self.first, state: first, list: chosen.slot(0) })
        };
        if guess.is_none_or(|guess| !take(Some(guess))) {
            take(None);
        }
    }
}

/// A stretch of the scores of one row.
struct ScoreShare<'a, U> {
    rows: Rows<'a, U>,
    keys: &'a KeyPanels<U>,
    first: usize,
    scores: &'a mut [f32],
    scratch: &'a mut ScoreScratch,
}

impl<U: IndexNumber> SimdOp for ScoreShare<'_, U> {
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
struct TakeShare<'a, U, R: RowSelector> {
    rows: Rows<'a, U>,
    keys: &'a KeyPanels<U>,
    range: Range<usize>,
    selector: &'a R,
    state: &'a mut R::State,
    scratch: &'a mut ScoreScratch,
}

impl<U: IndexNumber, R: RowSelector> SimdOp for TakeShare<'_, U, R> {
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
    list: Slot<'a>,
}

impl<R: RowSelector> SimdOp for Finish<'_, R> {
    /// Whether its guess was right.
    type Output = bool;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> bool {
        let Self { selector, row, state, list } = self;
        simd.vectorize(
            #[inline(always)]
            || selector.finish(simd, row, state, list),
        )
    }
}
