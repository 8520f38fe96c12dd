//! Indexers: scores of narrow queries against narrow keys, and what each row takes by them.
//!
//! ```text
//! I(i, j) = sum_h w_ih act(qI_ih . kI_j)
//! ```
//!
//! with `act` the identity or relu. A *list* is a choice shared by some query heads (a key/value group, or all heads); each
//! list has its own index heads. Scores are made for some rows against some keys at a time, taken while they are in the cache,
//! and never held as a whole.
//!
//! Where a row takes the largest scores, those of a sample of the keys come first: they say which scores need not be looked at.

mod shares;

use super::key_panels::{KeyPanels, PANEL, Panels, SAMPLING, ScoreRows};
use super::numbers::IndexNumber;
use crate::block_mask::lists::{Lists, Slot, SlotRun, Slots};
use crate::select::largest::nth_largest;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use std::ops::Range;

/// Keys scored at a time.
const TILE: usize = 4 * PANEL;
/// Rows of index heads scored at a time.
const ROWS: usize = 32;

/// Queries of an indexer.
pub(super) struct IndexQueries<U> {
    /// Lists over all batch entries.
    pub(super) lists: usize,
    /// Index heads of a list.
    pub(super) heads: usize,
    /// Rows of queries.
    pub(super) rows: usize,
    /// Channels.
    pub(super) width: usize,
    /// `[lists, rows, heads, units]`.
    pub(super) data: Vec<U>,
    /// `[lists, rows, heads]`; `None` is 1.
    pub(super) weights: Option<Vec<f32>>,
    /// Whether negative products count as 0.
    pub(super) relu: bool,
}

impl IndexQueries<f32> {
    /// Rounded to other numbers.
    pub(super) fn rounded<U: IndexNumber>(self) -> IndexQueries<U> {
        let Self { lists, heads, rows, width, data, weights, relu } = self;
        let data = data.chunks_exact(width.max(1)).flat_map(|row| U::pack(row.iter().copied())).collect();
        IndexQueries { lists, heads, rows, width, data, weights, relu }
    }
}

/// Takes scores row by row: which row, and how many keys it sees.
pub(super) trait RowSelector: Sync {
    /// What is known of a row so far.
    type State: Default + Send;

    /// Keys that a row sees: the first so many.
    fn visible(&self, row: usize) -> usize;

    /// A row that needs no scores takes everything: so many entries.
    fn takes_all(&self, row: usize) -> Option<usize>;

    /// Entries of any other row, at most.
    fn most(&self) -> usize;

    /// A row that wants to know beforehand about how large its scores will be: the score of that rank in the sample.
    fn rank_in_sample(&self, row: usize) -> Option<usize> {
        let _ = row;
        None
    }

    /// Before the first score; `guess` is the one asked for. The state may be that of another row before.
    fn start(&self, state: &mut Self::State, row: usize, guess: Option<f32>);

    /// Scores of the keys from `first` on, all visible; keys come in ascending order.
    fn take<S: Simd>(&self, simd: S, state: &mut Self::State, first: usize, scores: &[f32]);

    /// Takes over what another state of the same row and guess was offered, of later keys.
    fn merge(&self, state: &mut Self::State, later: &Self::State);

    /// Puts what the row takes where it belongs, ascending; not if it was given a guess that was wrong, then it returns false.
    fn finish<S: Simd>(&self, simd: S, row: usize, state: &mut Self::State, list: Slot<'_>) -> bool;
}

/// The lists of all rows, `[lists, rows]`; `keys` gives those that a list is scored against.
pub(super) fn select<'k, K: Panels + 'k, R: RowSelector>(
    queries: &IndexQueries<K::Number>,
    keys: impl Fn(usize) -> &'k K + Sync,
    selector: &R,
) -> Lists {
    let n = queries.rows;
    let mut slots = slots(queries, selector);
    let isa = Isa::current();
    let few = n * queries.lists < 16;
    let block = if few { 1 } else { (ROWS / queries.heads.max(1)).max(1) };
    let rows = |run: &SlotRun<'_>| Rows { queries, list: run.first / n, first: run.first % n };
    let tasks = slots.runs(n, block);
    if few {
        // The threads share the keys instead.
        for mut run in tasks {
            let rows = rows(&run);
            rows.by_shares(isa, keys(rows.list), selector, &mut run);
        }
    } else {
        // The last rows first: they see the most.
        for_each_task(tasks.into_iter().rev(), Scratch::default, |scratch, mut run| {
            let rows = rows(&run);
            isa.run(ByTiles { rows, keys: keys(rows.list), selector, chosen: &mut run, scratch });
        });
    }
    slots.close()
}

/// Room for the lists of all rows, `[lists, rows]`.
pub(super) fn slots<U, R: RowSelector>(queries: &IndexQueries<U>, selector: &R) -> Slots {
    let most = |row: usize| selector.takes_all(row).unwrap_or(selector.most());
    Slots::new((0..queries.lists).flat_map(|_| (0..queries.rows).map(most)))
}

#[derive(Default)]
struct Scratch<T> {
    /// Of each row.
    states: Vec<T>,
    scores: ScoreScratch,
}

#[derive(Default)]
struct ScoreScratch {
    /// `[rows, heads, TILE]`.
    products: Vec<f32>,
    /// `[rows, TILE]`.
    combined: Vec<f32>,
    wide: Vec<f32>,
    /// `[rows, sample]`.
    sample: Vec<f32>,
    keys: Vec<u32>,
}

/// Rows of a list from `first` on.
#[derive(Clone, Copy)]
struct Rows<'a, U> {
    queries: &'a IndexQueries<U>,
    list: usize,
    first: usize,
}

/// Some rows against the keys that they see, tile by tile.
struct ByTiles<'a, 'c, K: Panels, R: RowSelector> {
    rows: Rows<'a, K::Number>,
    keys: &'a K,
    selector: &'a R,
    chosen: &'a mut SlotRun<'c>,
    scratch: &'a mut Scratch<R::State>,
}

impl<K: Panels, R: RowSelector> SimdOp for ByTiles<'_, '_, K, R> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { rows, keys, selector, chosen, scratch } = self;
        simd.vectorize(
            #[inline(always)]
            || {
                let mut open = 0..0;
                for r in 0..chosen.len() {
                    match selector.takes_all(rows.first + r) {
                        Some(all) => chosen.slot(r).append_range(0..all),
                        None if open.is_empty() => open = r..r + 1,
                        None => open.end = r + 1,
                    }
                }
                let guesses = match keys.sample() {
                    Some(sample) => rows.guesses(simd, sample, selector, open.clone(), &mut scratch.scores),
                    None => vec![None; open.len()],
                };
                let wrong = rows.pass(simd, keys.all(), selector, (open.clone(), &guesses), chosen, scratch);
                for r in wrong {
                    rows.pass(simd, keys.all(), selector, (r..r + 1, &[None]), chosen, scratch);
                }
            },
        );
    }
}

impl<U: IndexNumber> Rows<'_, U> {
    /// For each of the rows `open`, the score of the sample that it asks for.
    #[inline(always)]
    fn guesses<S: Simd, R: RowSelector>(
        &self,
        simd: S,
        sample: &KeyPanels<U>,
        selector: &R,
        open: Range<usize>,
        scratch: &mut ScoreScratch,
    ) -> Vec<Option<f32>> {
        let every = |row: usize| selector.visible(row).div_ceil(SAMPLING);
        let ranks: Vec<_> = open.clone().map(|r| selector.rank_in_sample(self.first + r)).collect();
        let last = ranks.iter().rposition(Option::is_some);
        let n_keys = last.map_or(0, |last| every(self.first + open.start + last)).min(sample.len());
        let mut scores = std::mem::take(&mut scratch.sample);
        scores.resize(open.len() * n_keys, 0.0);
        for first in (0..n_keys).step_by(TILE) {
            let end = (first + TILE).min(n_keys);
            self.score(simd, sample, open.clone(), first..end, scratch);
            for (scores, tile) in scores.chunks_exact_mut(n_keys).zip(scratch.combined.chunks_exact(TILE)) {
                scores[first..end].copy_from_slice(&tile[..end - first]);
            }
        }
        // A plain loop: a closure would be compiled without the vectors of `simd`.
        let mut guesses = vec![None; ranks.len()];
        for (at, (scores, rank)) in scores.chunks_exact(n_keys.max(1)).zip(ranks).enumerate() {
            let seen = every(self.first + open.start + at).min(n_keys);
            if let Some(rank) = rank {
                guesses[at] = nth_largest(simd, &scores[..seen], rank, &mut scratch.keys);
            }
        }
        scratch.sample = scores;
        guesses
    }

    /// Takes the scores of the rows `open`; gives those whose guess was wrong.
    #[inline(always)]
    fn pass<S: Simd, R: RowSelector>(
        &self,
        simd: S,
        keys: &KeyPanels<U>,
        selector: &R,
        (open, guesses): (Range<usize>, &[Option<f32>]),
        chosen: &mut SlotRun<'_>,
        scratch: &mut Scratch<R::State>,
    ) -> Vec<usize> {
        let Scratch { states, scores: scratch } = scratch;
        states.resize_with(states.len().max(open.len()), R::State::default);
        for ((r, guess), state) in open.clone().zip(guesses).zip(&mut *states) {
            selector.start(state, self.first + r, *guess);
        }
        let n_keys = open.clone().map(|r| selector.visible(self.first + r)).max().unwrap_or(0);
        for first in (0..n_keys).step_by(TILE) {
            let end = (first + TILE).min(n_keys);
            self.score(simd, keys, open.clone(), first..end, scratch);
            let tiles = scratch.combined.chunks_exact(TILE);
            for ((r, state), scores) in open.clone().zip(&mut *states).zip(tiles) {
                let seen = selector.visible(self.first + r).min(end).saturating_sub(first);
                selector.take(simd, state, first, &scores[..seen]);
            }
        }
        let mut wrong = Vec::new();
        for (r, state) in open.zip(states) {
            if !selector.finish(simd, self.first + r, state, chosen.slot(r)) {
                wrong.push(r);
            }
        }
        wrong
    }

    /// Scores of the rows `open` and some keys, which start with a panel, in `scratch.combined [rows, TILE]`.
    #[inline(always)]
    fn score<S: Simd>(
        &self,
        simd: S,
        keys: &KeyPanels<U>,
        open: Range<usize>,
        range: Range<usize>,
        scratch: &mut ScoreScratch,
    ) {
        let IndexQueries { heads, width, rows, relu, .. } = *self.queries;
        let units = U::units(width);
        let ScoreScratch { products, combined, wide, .. } = scratch;
        let first = self.list * rows + self.first;
        let head_rows = (first + open.start) * heads..(first + open.end) * heads;
        let q = &self.queries.data[head_rows.start * units..head_rows.end * units];
        let weights = self.queries.weights.as_ref().map(|weights| &weights[head_rows]);
        let plain = heads == 1 && weights.is_none();
        combined.resize(combined.len().max(open.len() * TILE), 0.0);
        products.resize(if plain { 0 } else { products.len().max(open.len() * heads * TILE) }, 0.0);
        let scores = if plain { &mut *combined } else { &mut *products };
        let panels = range.start / PANEL..range.end.div_ceil(PANEL);
        ScoreRows { q, keys, panels, scores, stride: TILE, wide }.eval(simd);
        let (products, n_keys) = (products.as_slice(), range.len());
        combine(products, &mut combined[..open.len() * TILE], [heads, n_keys], weights, relu);
    }
}

/// `combined_j = sum_h w_h act(products_hj)`, in place where there is one head of weight 1.
#[inline(always)]
fn combine(
    products: &[f32],
    combined: &mut [f32],
    [heads, n_keys]: [usize; 2],
    weights: Option<&[f32]>,
    relu: bool,
) {
    // Written so that NaN stays.
    let act = |x: f32| if relu && x < 0.0 { 0.0 } else { x };
    if products.is_empty() {
        if relu {
            let rows = combined.chunks_exact_mut(TILE);
            rows.for_each(|row| row[..n_keys].iter_mut().for_each(|x| *x = act(*x)));
        }
        return;
    }
    for (row, (to, of)) in
        combined.chunks_exact_mut(TILE).zip(products.chunks_exact(heads * TILE)).enumerate()
    {
        to.fill(0.0);
        for (h, products) in of.chunks_exact(TILE).enumerate() {
            let weight = weights.map_or(1.0, |weights| weights[row * heads + h]);
            to[..n_keys].iter_mut().zip(products).for_each(|(to, x)| *to += weight * act(*x));
        }
    }
}
