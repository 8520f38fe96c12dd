//! Block indexer: token scores of an indexer, their maximum over blocks of keys, and the best blocks.
//!
//! ```text
//! score(i, b) = max_{j in block b, j <= p} qI_i . kI_j
//! A(i)        = { j <= p : block(j) is one of the last local_blocks, or among the largest scores, top_k in all }
//! ```
//!
//! Unlike the lightning indexer there is neither relu nor a weighted sum: one index head chooses for each key/value group.
//! Given tensors `index_q` and `index_k` ([`BlockIndexerInputs`](super::BlockIndexerInputs)) are used as they are; without them
//! the index query of a group is the mean of its queries, over `index_dim` channels. With as many slots as blocks it is dense
//! causal attention.
//!
//! Cost of a query: `n / 2` index scores of `index_dim` channels, and `top_k * block_len` attended keys.
//!
//! Source: the indexer of MiniMax-M3 as in Hugging Face transformers, 2026.

use super::block_maxima::select_blocks;
use super::index_channels::{IndexKeys, work};
use super::indexer::RowSelector;
use super::router::{Router, list_bytes, pairs_up_to, visible};
use crate::block_mask::lists::{Slot, wide};
use crate::decider::Work;
use crate::select::largest::Largest;
use crate::{BlockMask, BlockSizes, Builder};
use attn_core::mask::{Align, Band};
use attn_core::simd::{Simd, SimdBase, SimdMask};
use attn_core::{AttnError, AttnShape, Growth, Result, StreamShape, TensorView};
use std::sync::Arc;

/// Blocks of `block_len` keys; a query sees `top_k` of them, the last `local_blocks` among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockIndexer {
    /// Keys of a block.
    pub block_len: usize,
    /// Blocks that a query sees.
    pub top_k: usize,
    /// Blocks that every query sees: its own and those before it.
    pub local_blocks: usize,
    /// Channels of the index where none is given; `None` is a quarter of `head_dim`.
    pub index_dim: Option<usize>,
}

/// The blocks with the largest maxima.
pub(super) struct LargestBlocks<'a> {
    pub(super) indexer: &'a BlockIndexer,
    pub(super) shape: &'a AttnShape,
}

impl RowSelector for LargestBlocks<'_> {
    /// The maximum of each block so far.
    type State = Vec<f32>;

    fn visible(&self, row: usize) -> usize {
        visible(self.shape, row)
    }

    fn takes_all(&self, row: usize) -> Option<usize> {
        Some(self.visible(row).div_ceil(self.indexer.block_len)).filter(|blocks| *blocks <= self.most())
    }

    fn most(&self) -> usize {
        self.indexer.top_k
    }

    fn start(&self, maxima: &mut Vec<f32>, row: usize, _: Option<f32>) {
        maxima.clear();
        maxima.resize(self.visible(row).div_ceil(self.indexer.block_len), f32::NEG_INFINITY);
    }

    #[inline(always)]
    fn take<S: Simd>(&self, simd: S, maxima: &mut Vec<f32>, first: usize, mut scores: &[f32]) {
        let len = self.indexer.block_len;
        let mut at = first;
        while !scores.is_empty() {
            let (block, rest) = scores.split_at((len - at % len).min(scores.len()));
            maxima[at / len] = larger(maxima[at / len], maximum(simd, block));
            at += block.len();
            scores = rest;
        }
    }

    fn merge(&self, maxima: &mut Vec<f32>, later: &Vec<f32>) {
        maxima.iter_mut().zip(later).for_each(|(max, x)| *max = larger(*max, *x));
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, _: usize, maxima: &mut Vec<f32>, list: Slot<'_>) -> bool {
        self.largest(simd, maxima, &mut Largest::default(), list);
        true
    }
}

impl LargestBlocks<'_> {
    /// The local blocks, and the largest of those before them.
    #[inline(always)]
    pub(super) fn largest<S: Simd>(
        &self,
        simd: S,
        maxima: &[f32],
        largest: &mut Largest,
        mut list: Slot<'_>,
    ) {
        let BlockIndexer { top_k, local_blocks, .. } = *self.indexer;
        let first_local = maxima.len() - local_blocks.min(maxima.len());
        let seen = |block: &usize| maxima[*block] > f32::NEG_INFINITY || maxima[*block].is_nan();
        let local: Vec<usize> = (first_local..maxima.len()).rev().filter(seen).take(top_k).collect();
        largest.start(top_k - local.len(), None);
        largest.take(simd, 0, &maxima[..first_local]);
        list.append(largest.finish(simd).unwrap_or_default());
        local.into_iter().rev().for_each(|block| list.append(&[block as u32]));
    }
}

/// NaN wins and stays.
#[inline(always)]
fn larger(max: f32, x: f32) -> f32 {
    if x > max || x.is_nan() { x } else { max }
}

/// The largest score; NaN if one is NaN.
#[inline(always)]
fn maximum<S: Simd>(simd: S, scores: &[f32]) -> f32 {
    let mut max = S::f32s::splat(simd, f32::NEG_INFINITY);
    // NaN if one of them is; or, rarely, if infinite ones of both signs meet.
    let mut sum = S::f32s::splat(simd, 0.0);
    let vectors = scores.chunks_exact(S::f32s::LEN);
    let rest = vectors.remainder().iter().fold(f32::NEG_INFINITY, |max, x| larger(max, *x));
    for vector in vectors {
        let vector = S::f32s::from_slice(simd, vector);
        max = max.max(vector);
        sum += vector;
    }
    if sum.simd_eq(sum).all_true() {
        return larger(max.reduce_max(), rest);
    }
    scores.iter().fold(f32::NEG_INFINITY, |max, x| larger(max, *x))
}

impl BlockIndexer {
    pub(super) fn check(&self) -> Result<()> {
        for (name, number) in [("block_len", self.block_len), ("top_k", self.top_k)] {
            if number == 0 {
                return Err(AttnError::value(name, 0, "at least 1"));
            }
        }
        Ok(())
    }
}

/// Lists of blocks of keys, `chosen(i)` the `i`-th of `[batch, lists, rows]`, seen causally by `lists` groups of query heads.
pub(super) fn blocks(
    shape: &AttnShape,
    block_len: usize,
    lists: usize,
    chosen: impl Fn(usize) -> Vec<usize> + Sync,
) -> Result<BlockMask> {
    let causal = Arc::new(Band::causal(shape, Align::BottomRight));
    let builder = Builder::new(shape, BlockSizes { q: 1, kv: block_len }).per_batch().per_head(lists.max(1));
    builder.inside(causal).from_rows(|batch, list, row| chosen((batch * lists + list) * shape.n_q + row))
}

impl Router for BlockIndexer {
    const NAME: &'static str = "block-indexer";

    type Summary = IndexKeys;

    fn summary(&self, shape: &StreamShape) -> Result<IndexKeys> {
        self.check()?;
        IndexKeys::new(self.index_dim, shape)
    }

    fn append(&self, index: &mut IndexKeys, k: &TensorView<'_>) {
        index.append(k);
    }

    fn bytes(&self, index: &IndexKeys) -> usize {
        index.bytes()
    }

    fn choose(&self, index: &IndexKeys, q: &TensorView<'_>, shape: &AttnShape) -> Result<BlockMask> {
        let mut queries = index.queries_of_groups(q, shape, false);
        let (group, width) = (queries.heads, queries.width);
        if group > 1 {
            // The sum over a group chooses as its mean does.
            let summed = queries
                .data
                .chunks_exact(group * width)
                .flat_map(|heads| (0..width).map(move |c| heads.iter().skip(c).step_by(width).sum::<f32>()));
            (queries.data, queries.heads) = (summed.collect(), 1);
        }
        let (queries, largest) = (queries.rounded(), LargestBlocks { indexer: self, shape });
        let chosen = select_blocks(&queries, |list| &index.heads[list], &largest);
        blocks(shape, self.block_len, shape.n_heads_kv, |at| wide(chosen.row(at)))
    }

    fn entries(&self) -> usize {
        self.top_k
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let (flops, bytes) = work(self.index_dim, shape);
        Work {
            pairs: pairs_up_to(shape, self.block_len.saturating_mul(self.top_k)),
            decision_flops: flops / shape.group_size() as u64,
            decision_bytes: bytes + list_bytes(shape, shape.n_heads_kv, self.top_k),
        }
    }

    fn growth(&self) -> Growth {
        Growth::Quadratic
    }
}
