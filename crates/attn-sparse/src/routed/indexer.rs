//! Indexers: scores of narrow queries against narrow keys, and what each row takes by them.
//!
//! ```text
//! I(i, j) = sum_h w_ih act(qI_ih . kI_j)
//! ```
//!
//! with `act` the identity or relu. A *list* is a choice shared by some query heads (a key/value group, or all heads); each
//! list has its own index heads. Scores are made for some rows against some keys at a time and never held as a whole.

use super::key_panels::{KeyPanels, PANEL, ScoreRows};
use attn_core::Element;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};

/// Panels scored at a time.
const TILE_PANELS: usize = 8;
/// Keys scored at a time.
const TILE: usize = TILE_PANELS * PANEL;
/// Rows of index heads scored at a time.
const ROWS: usize = 32;
/// Keys of a share, where rows are so few that the keys are shared among threads.
const SHARE: usize = 1 << 15;

/// Queries of an indexer.
pub(super) struct IndexQueries {
    /// Lists over all batch entries.
    pub(super) lists: usize,
    /// Index heads of a list.
    pub(super) heads: usize,
    /// Rows of queries.
    pub(super) rows: usize,
    /// Channels.
    pub(super) width: usize,
    /// `[lists, rows, heads, width]`.
    pub(super) data: Vec<f32>,
    /// `[lists, rows, heads]`; `None` is 1.
    pub(super) weights: Option<Vec<f32>>,
    /// Whether negative products count as 0.
    pub(super) relu: bool,
}

/// Takes scores row by row: which list and row, and how many keys it sees.
pub(super) trait RowSelector: Sync {
    /// What is known of a row so far.
    type State;

    /// Keys that a row sees: the first so many.
    fn visible(&self, row: usize) -> usize;

    /// What a row that needs no scores takes.
    fn without_scores(&self, row: usize) -> Option<Vec<usize>>;

    /// Before the first score.
    fn start(&self, row: usize) -> Self::State;

    /// Scores of the keys from `first` on, all visible; keys come in ascending order.
    fn take(&self, state: &mut Self::State, first: usize, scores: &[f32]);

    /// What the row takes, ascending.
    fn finish(&self, row: usize, state: Self::State) -> Vec<usize>;
}

/// The lists of all rows, `[lists, rows]`; `keys` gives those that a list is scored against.
pub(super) fn select<'k, E: Element, R: RowSelector>(
    queries: &IndexQueries,
    keys: impl Fn(usize) -> &'k KeyPanels<E> + Sync,
    selector: &R,
) -> Vec<Vec<usize>> {
    let n = queries.rows;
    let mut chosen: Vec<Vec<usize>> = vec![Vec::new(); queries.lists * n];
    let isa = Isa::current();
    let few = n * queries.lists < 16;
    let block = if few { 1 } else { (ROWS / queries.heads.max(1)).clamp(1, 16) };
    let blocks = n.div_ceil(block).max(1);
    let tasks = chosen.chunks_mut(n.max(1)).enumerate().flat_map(|(list, rows)| {
        rows.chunks_mut(block).enumerate().map(move |(at, rows)| (list * blocks + at, rows))
    });
    let run = |scratch: &mut Scratch, (at, chosen): (usize, &mut [Vec<usize>])| {
        let (list, first) = (at / blocks, at % blocks * block);
        let rows = Rows { queries, list, first, len: chosen.len(), isa };
        match few {
            true => rows.by_shares(keys(list), selector, chosen),
            false => rows.by_tiles(keys(list), selector, chosen, scratch),
        }
    };
    if few {
        // The threads share the keys instead.
        tasks.for_each(|task| run(&mut Scratch::default(), task));
    } else {
        // The last rows first: they see the most.
        let tasks: Vec<_> = tasks.collect();
        for_each_task(tasks.into_iter().rev(), Scratch::default, run);
    }
    chosen
}

#[derive(Default)]
struct Scratch {
    products: Vec<f32>,
    combined: Vec<f32>,
    wide: Vec<f32>,
}

/// Some rows of a list.
struct Rows<'a> {
    queries: &'a IndexQueries,
    list: usize,
    first: usize,
    len: usize,
    isa: Isa,
}

impl Rows<'_> {
    fn by_tiles<E: Element, R: RowSelector>(
        &self,
        keys: &KeyPanels<E>,
        selector: &R,
        chosen: &mut [Vec<usize>],
        scratch: &mut Scratch,
    ) {
        let mut states: Vec<Option<R::State>> = Vec::with_capacity(self.len);
        let mut n_keys = 0;
        for (r, chosen) in chosen.iter_mut().enumerate() {
            let row = self.first + r;
            states.push(match selector.without_scores(row) {
                Some(all) => {
                    *chosen = all;
                    None
                }
                None => {
                    n_keys = n_keys.max(selector.visible(row));
                    Some(selector.start(row))
                }
            });
        }
        scratch.combined.resize(self.len * TILE, 0.0);
        for first in (0..n_keys).step_by(TILE) {
            let end = (first + TILE).min(n_keys);
            self.score(keys, first..end, scratch);
            for (r, state) in states.iter_mut().enumerate() {
                let seen = selector.visible(self.first + r).min(end).saturating_sub(first);
                if let Some(state) = state
                    && seen > 0
                {
                    selector.take(state, first, &scratch.combined[r * TILE..][..seen]);
                }
            }
        }
        for (r, (state, chosen)) in states.into_iter().zip(chosen).enumerate() {
            if let Some(state) = state {
                *chosen = selector.finish(self.first + r, state);
            }
        }
    }

    /// All scores of one row, shares of the keys in parallel.
    fn by_shares<E: Element, R: RowSelector>(
        &self,
        keys: &KeyPanels<E>,
        selector: &R,
        chosen: &mut [Vec<usize>],
    ) {
        if let Some(all) = selector.without_scores(self.first) {
            chosen[0] = all;
            return;
        }
        let n_keys = selector.visible(self.first);
        let mut scores = vec![0.0; n_keys];
        for_each_task(scores.chunks_mut(SHARE).enumerate(), Scratch::default, |scratch, (share, scores)| {
            scratch.combined.resize(TILE, 0.0);
            for (tile, scores) in scores.chunks_mut(TILE).enumerate() {
                let first = share * SHARE + tile * TILE;
                self.score(keys, first..first + scores.len(), scratch);
                scores.copy_from_slice(&scratch.combined[..scores.len()]);
            }
        });
        let mut state = selector.start(self.first);
        selector.take(&mut state, 0, &scores);
        chosen[0] = selector.finish(self.first, state);
    }

    /// Scores of some keys, which start with a panel, in `scratch.combined [rows, TILE]`.
    fn score<E: Element>(&self, keys: &KeyPanels<E>, range: std::ops::Range<usize>, scratch: &mut Scratch) {
        let IndexQueries { heads, width, rows, relu, .. } = *self.queries;
        let Scratch { products, combined, wide } = scratch;
        let head_rows =
            (self.list * rows + self.first) * heads..(self.list * rows + self.first + self.len) * heads;
        let q = &self.queries.data[head_rows.start * width..head_rows.end * width];
        let weights = self.queries.weights.as_ref().map(|weights| &weights[head_rows]);
        let plain = heads == 1 && weights.is_none();
        products.resize(if plain { 0 } else { self.len * heads * TILE }, 0.0);
        let scores = if plain { &mut *combined } else { &mut *products };
        let panels = range.start / PANEL..range.end.div_ceil(PANEL);
        self.isa.run(ScoreRows { q, keys, panels, scores, stride: TILE, wide });
        self.isa.run(Combine { products, combined, heads, weights, relu });
    }
}

/// `combined_j = sum_h w_h act(products_hj)`, in place where there is one head of weight 1.
struct Combine<'a> {
    products: &'a [f32],
    combined: &'a mut [f32],
    heads: usize,
    weights: Option<&'a [f32]>,
    relu: bool,
}

impl SimdOp for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let Self { products, combined, heads, weights, relu } = self;
        if products.is_empty() {
            if relu {
                // Written so that NaN stays.
                combined.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
            }
            return;
        }
        for (row, (to, of)) in
            combined.chunks_exact_mut(TILE).zip(products.chunks_exact(heads * TILE)).enumerate()
        {
            to.fill(0.0);
            for (h, products) in of.chunks_exact(TILE).enumerate() {
                let weight = weights.map_or(1.0, |weights| weights[row * heads + h]);
                if relu {
                    to.iter_mut()
                        .zip(products)
                        .for_each(|(to, x)| *to += weight * if *x < 0.0 { 0.0 } else { *x });
                } else {
                    to.iter_mut().zip(products).for_each(|(to, x)| *to += weight * x);
                }
            }
        }
    }
}
