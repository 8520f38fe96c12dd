//! The largest index score in each block of keys, with rows of queries in the vector lanes.
//!
//! `S^T = K Q^T` for 32 rows: then the maximum over a block is a vector operation a key, and nothing is compared across lanes.
//!
//! Time: the product, and `O(n_kv)` vector operations for 32 rows. Memory: the maxima of 32 rows a thread.

use super::block_indexer::LargestBlocks;
use super::indexer::{IndexQueries, RowSelector, select, slots};
use super::key_panels::{KeyPanels, PANEL, Panels};
use super::numbers::{IndexNumber, Left, Right};
use crate::block_mask::lists::{Lists, SlotRun};
use crate::select::largest::Largest;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Select, Simd, SimdBase, SimdMask, SimdOp};
use attn_core::tile::{TileMut, transpose};
use attn_core::view::Rows;
use std::ops::Range;

/// Rows in the lanes.
const LANES: usize = 32;

/// The blocks of all rows, `[lists, rows]`; `keys` gives those that a list is scored against.
pub(super) fn select_blocks<'k, K: Panels + 'k>(
    queries: &IndexQueries<K::Number>,
    keys: impl Fn(usize) -> &'k K + Sync,
    blocks: &LargestBlocks<'_>,
) -> Lists {
    let (n, isa) = (queries.rows, Isa::current());
    let is_plain = queries.heads == 1 && queries.weights.is_none() && !queries.relu;
    if !is_plain || n < LANES / 2 {
        return select(queries, keys, blocks);
    }
    let mut slots = slots(queries, blocks);
    // The last rows first: they see the most.
    for_each_task(slots.runs(n, LANES).into_iter().rev(), Scratch::default, |scratch, mut run| {
        let keys = keys(run.first / n).all();
        let q = &queries.data[run.first * keys.units()..][..run.len() * keys.units()];
        isa.run(Panel { q, first: run.first % n, keys, blocks, chosen: &mut run, scratch });
    });
    slots.close()
}

#[derive(Default)]
struct Scratch<U> {
    /// `[units, LANES]`.
    q: Vec<U>,
    wide: Vec<f32>,
    /// `[PANEL, LANES]`.
    scores: Vec<f32>,
    /// `[blocks, LANES]`, and turned.
    maxima: Vec<f32>,
    turned: Vec<f32>,
    largest: Largest,
}

/// Some rows from `first` on, side by side.
struct Panel<'a, 'b, 'c, U> {
    /// `[rows, units]`.
    q: &'a [U],
    first: usize,
    keys: &'a KeyPanels<U>,
    blocks: &'a LargestBlocks<'b>,
    chosen: &'a mut SlotRun<'c>,
    scratch: &'a mut Scratch<U>,
}

impl<U: IndexNumber> SimdOp for Panel<'_, '_, '_, U> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { q, first, keys, blocks, chosen, scratch } = self;
        let Scratch { q: q_t, wide, scores, maxima, turned, largest } = scratch;
        let (units, n_rows, block) = (keys.units(), chosen.len(), blocks.indexer.block_len);
        let visible = |lane: usize| blocks.visible(first + lane);
        let mut needs_scores = false;
        for lane in 0..n_rows {
            match blocks.takes_all(first + lane) {
                Some(all) => chosen.slot(lane).append_range(0..all),
                None => needs_scores = true,
            }
        }
        if !needs_scores {
            return;
        }
        let n_keys = visible(n_rows - 1).min(keys.len());
        let n_blocks = n_keys.div_ceil(block);
        q_t.resize(units * LANES, U::default());
        for (lane, row) in q.chunks_exact(units.max(1)).enumerate() {
            row.iter().enumerate().for_each(|(unit, x)| q_t[unit * LANES + lane] = *x);
        }
        scores.resize(PANEL * LANES, 0.0);
        maxima.clear();
        maxima.resize(n_blocks * LANES, f32::NEG_INFINITY);
        simd.vectorize(
            #[inline(always)]
            || {
                for start in (0..n_keys).step_by(PANEL) {
                    let n = PANEL.min(n_keys - start);
                    let a = Left { data: keys.panel(start / PANEL), row_stride: 1, col_stride: PANEL };
                    let (b, c) =
                        (Right { data: q_t, stride: LANES }, TileMut { data: scores, stride: LANES });
                    U::product(simd, [n, LANES, units], a, b, c, wide);
                    for lane in (0..n_rows).filter(|lane| visible(*lane) < start + n) {
                        let hidden = visible(lane).max(start) - start..n;
                        hidden.for_each(|key| scores[key * LANES + lane] = f32::NEG_INFINITY);
                    }
                    let mut key = start;
                    while key < start + n {
                        let end = ((key / block + 1) * block).min(start + n);
                        let scores = &scores[(key - start) * LANES..(end - start) * LANES];
                        take_maxima(simd, scores, &mut maxima[key / block * LANES..][..LANES]);
                        key = end;
                    }
                }
                turned.resize(LANES * n_blocks, 0.0);
                transpose(simd, Rows::new(maxima, n_blocks, LANES, LANES), 1.0, turned, n_blocks);
                for lane in (0..n_rows).filter(|lane| blocks.takes_all(first + lane).is_none()) {
                    let maxima = &turned[lane * n_blocks..][..visible(lane).div_ceil(block)];
                    blocks.largest(simd, maxima, largest, chosen.slot(lane));
                }
            },
        );
    }
}

/// `maxima[lane] = max(maxima[lane], scores[.., lane])` of `scores [keys, LANES]`; NaN wins.
#[inline(always)]
fn take_maxima<S: Simd>(simd: S, scores: &[f32], maxima: &mut [f32]) {
    for first in (0..LANES).step_by(S::f32s::LEN) {
        let lanes: Range<usize> = first..first + S::f32s::LEN;
        let mut max = S::f32s::splat(simd, f32::NEG_INFINITY);
        // NaN if one of them is; or, rarely, if infinite ones of both signs meet.
        let mut sum = S::f32s::splat(simd, 0.0);
        for row in scores.chunks_exact(LANES) {
            let row = S::f32s::from_slice(simd, &row[lanes.clone()]);
            max = max.max(row);
            sum += row;
        }
        let before = S::f32s::from_slice(simd, &maxima[lanes.clone()]);
        if !sum.simd_eq(sum).all_true() {
            // One NaN after another, each of which stays.
            max = S::f32s::splat(simd, f32::NEG_INFINITY);
            for row in scores.chunks_exact(LANES) {
                max = larger::<S>(max, S::f32s::from_slice(simd, &row[lanes.clone()]));
            }
        }
        larger::<S>(before, max).store_slice(&mut maxima[lanes]);
    }
}

/// The larger of two numbers; NaN wins.
#[inline(always)]
fn larger<S: Simd>(max: S::f32s, x: S::f32s) -> S::f32s {
    // Only a NaN is not equal to itself; one that is there already is not replaced by a number.
    let number = x.simd_eq(x);
    number.select(x.simd_gt(max).select(x, max), x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routed::BlockIndexer;
    use attn_core::AttnShape;

    /// Side by side as one by one: with NaN, infinities and ties, blocks that are no part of a panel, and rows that see nothing yet.
    #[test]
    fn rows_side_by_side_take_what_each_takes_alone() {
        for (block_len, top_k, local_blocks, n_q, n_kv) in [
            (16, 4, 1, 70, 70),
            (24, 3, 2, 40, 200),
            (64, 2, 0, 33, 300),
            (7, 5, 9, 65, 60),
            (128, 1, 1, 20, 400),
        ] {
            let indexer = BlockIndexer { block_len, top_k, local_blocks, index_dim: None };
            let shape = AttnShape { n_q, n_kv, ..AttnShape::square(1, 1, 8) };
            let number = |x: usize| match x * 7919 % 1013 {
                0..4 => f32::NAN,
                4..6 => f32::INFINITY,
                6..8 => f32::NEG_INFINITY,
                y => (y % 5) as f32 - 2.0,
            };
            let mut keys = KeyPanels::<f32>::new(3);
            (0..n_kv).for_each(|key| keys.push((0..3).map(|c| number(key * 3 + c + 5000))));
            let data = (0..n_q * 3).map(|x| (x * 31 % 7) as f32 - 3.0).collect();
            let queries =
                IndexQueries { lists: 1, heads: 1, rows: n_q, width: 3, data, weights: None, relu: false };
            let blocks = LargestBlocks { indexer: &indexer, shape: &shape };
            for isa in Isa::available() {
                let run =
                    || (select_blocks(&queries, |_| &keys, &blocks), select(&queries, |_| &keys, &blocks));
                let (together, alone) = attn_core::simd::with_isa(isa, run).unwrap();
                assert_eq!(together, alone, "{isa} {indexer:?}");
            }
        }
    }
}
