//! Which blocks of keys each block of queries sees: the plan that patterns and selectors hand to the softmax engine.
//!
//! Queries come in blocks of `block_q` rows, keys in blocks of `block_kv`; the last of each may be shorter. For every
//! batch entry and head (either may be 1: shared by all) and every block of queries, the mask lists blocks of keys in
//! ascending order, compressed row by row (CSR): entries `row_ptr[r]..row_ptr[r + 1]` of `blocks` are those of row `r`.
//! A listed block is *full*, every pair seen, or *partial*: its pairs are asked one by one of the mask *inside*. A block
//! that is not listed is not seen.
//!
//! Masks compose (`and`, `or`), are read from the side of the keys (`transpose`), counted (`statistics`), stored (`to_bytes`)
//! and drawn ([`crate::Picture`]).
//!
//! Memory is `O(entries)`; nothing of size `n_q * n_kv` exists. Blocks of one query and one key are lists of tokens.
//!
//! Source of the idea: Child et al. 2019 (block layouts); Dong et al. 2024 (FlexAttention's full and partial blocks).

mod bits;
mod build;
mod columns;
mod compose;
mod flex_lists;
mod given;
pub(crate) mod lists;
mod rows;
mod statistics;
mod stored;
#[cfg(test)]
mod tests;

use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Result};
pub use build::Builder;
pub use columns::BlockColumns;
pub use flex_lists::{FlexLists, PaddedLists};
pub use statistics::{BlockStatistics, Spread};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Any mask that can be shared between threads and kept.
pub type SharedMask = Arc<dyn Mask + Send + Sync>;

/// Queries and keys of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Query rows of a block.
    pub q: usize,
    /// Keys of a block.
    pub kv: usize,
}

impl BlockSizes {
    /// `block` queries and as many keys.
    pub fn square(block: usize) -> Self {
        Self { q: block, kv: block }
    }

    pub(crate) fn check(self) -> Result<()> {
        for (name, size) in [("block_q", self.q), ("block_kv", self.kv)] {
            if size == 0 {
                return Err(AttnError::value(name, 0, "at least 1"));
            }
        }
        Ok(())
    }
}

/// See the module; made by a [`Builder`].
#[derive(Clone)]
pub struct BlockMask {
    shape: AttnShape,
    sizes: BlockSizes,
    /// Batch entries and heads that have lists of their own; 1 is shared by all. A head's list may serve a group of
    /// consecutive query heads.
    batch: usize,
    heads: usize,
    /// `[batch * heads * block rows + 1]`.
    row_ptr: Vec<usize>,
    /// Blocks of keys, ascending in each row.
    blocks: Vec<u32>,
    /// For each entry, whether its pairs are asked of `inside`.
    partial: Vec<bool>,
    inside: Option<SharedMask>,
}

impl fmt::Debug for BlockMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockMask")
            .field("shape", &self.shape)
            .field("sizes", &self.sizes)
            .field("batch", &self.batch)
            .field("heads", &self.heads)
            .field("blocks", &self.blocks.len())
            .field("partial", &self.partial.iter().filter(|p| **p).count())
            .finish_non_exhaustive()
    }
}

impl BlockMask {
    /// The problem it was made for.
    pub fn shape(&self) -> &AttnShape {
        &self.shape
    }

    /// Queries and keys of a block.
    pub fn sizes(&self) -> BlockSizes {
        self.sizes
    }

    /// Batch entries with lists of their own; 1 is shared by all.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Heads with lists of their own: 1, or each for as many consecutive query heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Blocks along the queries.
    pub fn n_block_rows(&self) -> usize {
        self.shape.n_q.div_ceil(self.sizes.q)
    }

    /// Blocks along the keys.
    pub fn n_block_cols(&self) -> usize {
        self.shape.n_kv.div_ceil(self.sizes.kv)
    }

    /// Listed blocks, over all lists.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The mask that decides the pairs of partial blocks.
    pub fn inside(&self) -> Option<&SharedMask> {
        self.inside.as_ref()
    }

    /// The list that serves a head.
    #[inline]
    fn list(&self, head: Head) -> usize {
        let batch = if self.batch == 1 { 0 } else { head.batch };
        batch * self.heads + head.head * self.heads / self.shape.n_heads_q.max(1)
    }

    #[inline]
    fn entries(&self, list: usize, block_row: usize) -> Range<usize> {
        let row = list * self.n_block_rows() + block_row;
        self.row_ptr[row]..self.row_ptr[row + 1]
    }

    /// The blocks of keys that a block of queries sees, ascending, and whether each is partial.
    pub fn row(&self, head: Head, block_row: usize) -> impl Iterator<Item = (usize, bool)> + '_ {
        let entries = self.entries(self.list(head), block_row);
        let (blocks, partial) = (&self.blocks[entries.clone()], &self.partial[entries]);
        blocks.iter().zip(partial).map(|(block, partial)| (*block as usize, *partial))
    }

    /// Rows of queries of a block.
    pub fn block_rows(&self, block_row: usize) -> Range<usize> {
        let first = block_row * self.sizes.q;
        first..(first + self.sizes.q).min(self.shape.n_q)
    }

    /// Keys of a block.
    pub fn block_keys(&self, block: usize) -> Range<usize> {
        let first = block * self.sizes.kv;
        first..(first + self.sizes.kv).min(self.shape.n_kv)
    }

    /// The place of a block among the entries of its row.
    #[inline]
    fn find(&self, list: usize, block_row: usize, block: usize) -> Option<usize> {
        let entries = self.entries(list, block_row);
        let place = self.blocks[entries.clone()].binary_search(&(block as u32)).ok()?;
        Some(entries.start + place)
    }

    /// Whether the pair is seen inside a partial block.
    #[inline]
    fn inside_sees(&self, pair: Pair) -> bool {
        self.inside.as_ref().is_none_or(|inside| inside.sees(pair))
    }

    /// Whether rows list single keys.
    pub(crate) fn rows_are_apart(&self) -> bool {
        self.sizes.q == 1 && self.sizes.kv == 1
    }

    /// Pairs that are seen, over all heads of all batch entries; partial blocks are asked pair by pair.
    pub fn n_pairs(&self) -> u64 {
        let s = &self.shape;
        let heads = (0..s.batch).flat_map(|batch| (0..s.n_heads_q).map(move |head| Head { batch, head }));
        heads.map(|head| (0..self.n_block_rows()).map(|row| self.pairs_of_row(head, row)).sum::<u64>()).sum()
    }

    fn pairs_of_row(&self, head: Head, block_row: usize) -> u64 {
        let rows = self.block_rows(block_row);
        let pairs = |(block, partial): (usize, bool)| {
            let keys = self.block_keys(block);
            if !partial {
                return (rows.len() * keys.len()) as u64;
            }
            let seen = |i: usize| keys.clone().filter(|&j| self.inside_sees(head.pair(i, j))).count() as u64;
            rows.clone().map(seen).sum()
        };
        self.row(head, block_row).map(pairs).sum()
    }
}

impl Mask for BlockMask {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        let (made, s) = (&self.shape, shape);
        if s.batch == 0 {
            return Ok(()); // no pair is asked of it, and there is no sequence to have a length
        }
        let axes = [
            ("batch", s.batch, made.batch, self.batch == 1),
            ("n_heads_q", s.n_heads_q, made.n_heads_q, self.heads == 1),
            ("n_q", s.n_q, made.n_q, false),
            ("n_kv", s.n_kv, made.n_kv, false),
        ];
        for (axis, needed, made, shared) in axes {
            if needed != made && !shared {
                return Err(AttnError::shape("block mask", axis, made, needed));
            }
        }
        self.inside.as_ref().map_or(Ok(()), |inside| inside.check(shape))
    }

    fn sees(&self, pair: Pair) -> bool {
        let head = Head { batch: pair.batch, head: pair.head };
        let found = self.find(self.list(head), pair.i / self.sizes.q, pair.j / self.sizes.kv);
        found.is_some_and(|entry| !self.partial[entry] || self.inside_sees(pair))
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        self.spans_of(head, rows, n_kv)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        self.cover_of(head, rows, keys)
    }

    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        self.hide_pairs(head, rows, j..j + 1, scores, 0);
    }

    fn hide_tile(
        &self,
        head: Head,
        rows: Range<usize>,
        keys: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        self.hide_pairs(head, rows, keys, scores, stride);
    }

    fn sees_spans(&self, head: Head, rows: Range<usize>) -> bool {
        self.spans_are_full(head, rows)
    }

    fn is_shared_by(&self, batch: usize, heads: Range<usize>) -> bool {
        let (first, last) = (heads.start, heads.end.saturating_sub(1));
        let list = |head| self.list(Head { batch, head });
        let inside = || self.inside.as_ref().is_none_or(|inside| inside.is_shared_by(batch, heads.clone()));
        heads.len() <= 1 || list(first) == list(last) && inside()
    }
}
