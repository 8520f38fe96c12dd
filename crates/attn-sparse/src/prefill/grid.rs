//! Blocks of queries against blocks of keys: which can be seen, and how the chosen ones become a mask.
//!
//! Query `i` stands at position `p = i + n_kv - n_q`. A causal block of queries sees the blocks of keys up to that of its last
//! position.

use crate::block_mask::{BlockSizes, Builder};
use crate::decider::{Decision, Promises, Work};
use attn_core::mask::{Align, Band};
use attn_core::parallel::for_each_task;
use attn_core::{AttnError, AttnShape, Causality, Growth, Result, band_pairs};
use std::ops::Range;
use std::sync::Arc;

/// The blocks of a problem.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) shape: AttnShape,
    pub(crate) sizes: BlockSizes,
    pub(crate) causal: bool,
}

impl Grid {
    /// # Errors
    /// [`AttnError::Value`] for a block size of 0.
    pub(crate) fn new(shape: AttnShape, sizes: BlockSizes, causal: bool) -> Result<Self> {
        for (name, size) in [("block_q", sizes.q), ("block_kv", sizes.kv)] {
            if size == 0 {
                return Err(AttnError::value(name, 0, "at least 1"));
            }
        }
        Ok(Self { shape, sizes, causal })
    }

    /// Blocks of queries.
    pub(crate) fn n_rows(&self) -> usize {
        self.shape.n_q.div_ceil(self.sizes.q)
    }

    /// Blocks of keys.
    pub(crate) fn n_cols(&self) -> usize {
        self.shape.n_kv.div_ceil(self.sizes.kv)
    }

    /// Heads of all batch entries.
    pub(crate) fn n_lists(&self) -> usize {
        self.shape.batch * self.shape.n_heads_q
    }

    /// The list of keys' means that serves a list of queries' means.
    pub(crate) fn kv_list(&self, list: usize) -> usize {
        let heads = self.shape.n_heads_q;
        list / heads * self.shape.n_heads_kv + self.shape.kv_head(list % heads)
    }

    /// Positions of the first and the last query of a block.
    fn positions(&self, row: usize) -> (isize, isize) {
        let offset = self.shape.n_kv as isize - self.shape.n_q as isize;
        let last = ((row + 1) * self.sizes.q).min(self.shape.n_q) as isize - 1;
        ((row * self.sizes.q) as isize + offset, last + offset)
    }

    /// Blocks of keys that reach up to position `p`.
    fn up_to(&self, p: isize) -> usize {
        if !self.causal {
            self.n_cols()
        } else if p < 0 {
            0
        } else {
            (p as usize / self.sizes.kv + 1).min(self.n_cols())
        }
    }

    /// Blocks of keys, from the first on, that at least one query of the block sees.
    pub(crate) fn visible(&self, row: usize) -> usize {
        self.up_to(self.positions(row).1)
    }

    /// Blocks of keys, from the first on, that start no later than the block's first query; the first one is among them
    /// if any query sees it.
    pub(crate) fn started(&self, row: usize) -> usize {
        let (first, last) = self.positions(row);
        if last < 0 { self.up_to(last) } else { self.up_to(first.max(0)) }
    }

    /// Blocks of keys in which the queries of a block stand themselves.
    pub(crate) fn own(&self, row: usize) -> Range<usize> {
        let (first, last) = self.positions(row);
        let end = self.visible(row);
        if last < 0 { 0..0 } else { (first.max(0) as usize / self.sizes.kv).min(end)..end }
    }

    /// Lists of blocks, one for each block of queries of each head, chosen in parallel: `choose(list, rows, lists)` fills
    /// those of some consecutive rows, at most `rows_each`.
    pub(crate) fn choose<W>(
        &self,
        rows_each: usize,
        start: impl Fn() -> W + Sync,
        choose: impl Fn(&mut W, usize, Range<usize>, &mut [Vec<usize>]) + Sync,
    ) -> Vec<Vec<usize>> {
        let n_rows = self.n_rows();
        let mut lists = vec![Vec::new(); self.n_lists() * n_rows];
        let heads = lists.chunks_mut(n_rows.max(1)).enumerate();
        let tasks = heads.flat_map(|(list, rows)| {
            rows.chunks_mut(rows_each).enumerate().map(move |(at, rows)| (list, at * rows_each, rows))
        });
        for_each_task(tasks, start, |workspace, (list, first, rows)| {
            choose(workspace, list, first..first + rows.len(), rows);
        });
        lists
    }

    /// The mask of lists as [`Grid::choose`] gives them.
    pub(crate) fn decision(&self, lists: &[Vec<usize>]) -> Result<Decision> {
        let (heads, n_rows) = (self.shape.n_heads_q, self.n_rows());
        let builder = Builder::new(&self.shape, self.sizes).per_batch();
        // No heads: any number of lists serves.
        let mut builder = if heads > 0 { builder.per_head(heads) } else { builder };
        if self.causal {
            builder = builder.inside(Arc::new(Band::causal(&self.shape, Align::BottomRight)));
        }
        let row = |batch: usize, list: usize, row: usize| {
            lists.get((batch * heads + list) * n_rows + row).cloned().unwrap_or_default()
        };
        Ok(builder.from_rows(row)?.into())
    }
}

/// Pairs that a causal or bidirectional problem has, over all heads of all batch entries.
pub(crate) fn all_pairs(shape: &AttnShape, causal: bool) -> u64 {
    let band = Band { offset: 0, left: None, right: None };
    let band = if causal { Band::causal(shape, Align::BottomRight) } else { band };
    crate::heads(shape) * band_pairs(shape, &band)
}

/// What all variants promise whose choice is shared between queries: even if causal, later inputs take part in it. The growth is
/// that of time and, at most, of memory.
pub(crate) fn promises(causal: bool, time: Growth, memory: Growth) -> Promises {
    Promises {
        causality: if causal { Causality::Masked } else { Causality::Bidirectional },
        key_order_free: false,
        cross_lengths: true,
        time,
        memory,
        kept: None,
    }
}

/// Work of means of blocks scored against one another: the means, their products, the lists of `pairs`.
pub(crate) fn pooled_work(shape: &AttnShape, sizes: BlockSizes, causal: bool, pairs: u64) -> Work {
    let (rows, cols) = (shape.n_q.div_ceil(sizes.q.max(1)), shape.n_kv.div_ceil(sizes.kv.max(1)));
    let blocks = all_pairs(&AttnShape { n_q: rows, n_kv: cols, ..*shape }, causal && rows == cols);
    let lists = pairs / (sizes.q * sizes.kv).max(1) as u64;
    let means =
        (crate::heads(shape) as usize * rows + shape.batch * shape.n_heads_kv * cols) * shape.head_dim;
    Work {
        pairs,
        decision_flops: 2 * (blocks * shape.head_dim as u64)
            + 2 * (shape.q().iter().product::<usize>() as u64),
        decision_bytes: 4 * means as u64 + 16 * lists,
    }
}

/// 1, 0 or -1: what a scale does to an order.
pub(crate) fn sign(scale: f32) -> f32 {
    if scale > 0.0 {
        1.0
    } else if scale < 0.0 {
        -1.0
    } else {
        0.0
    }
}
