//! Indexers with given index queries, keys and weights.

use super::block_indexer::{BlockIndexer, LargestBlocks, blocks};
use super::block_maxima::select_blocks;
use super::dsa::{Dsa, LargestTokens, tokens};
use super::indexer::{IndexQueries, select};
use super::key_panels::{Panels, SampledPanels};
use super::router::visible;
use super::rows::rows_f32;
use crate::block_mask::lists::wide;
use crate::decider::Decision;
use attn_core::{AttnError, AttnShape, Result, TensorView};

/// What a lightning indexer is given.
#[derive(Debug, Clone, Copy)]
pub struct DsaInputs<'a> {
    /// `(batch, index heads, n_q, index_dim)`.
    pub index_q: TensorView<'a>,
    /// `(batch, 1, n_kv, index_dim)`: one series for all heads.
    pub index_k: TensorView<'a>,
    /// `[batch, index heads, n_q]`; the sign matters.
    pub index_w: &'a [f32],
}

/// What a block indexer is given.
#[derive(Debug, Clone, Copy)]
pub struct BlockIndexerInputs<'a> {
    /// `(batch, n_heads_kv, n_q, index_dim)`: one index head a key/value group.
    pub index_q: TensorView<'a>,
    /// `(batch, 1, n_kv, index_dim)`: one series for all heads.
    pub index_k: TensorView<'a>,
}

/// Checks a tensor's axes.
pub(super) fn check_axes(tensor: &str, found: [usize; 4], expected: [usize; 4]) -> Result<()> {
    for (a, axis) in ["batch", "heads", "length", "width"].into_iter().enumerate() {
        if found[a] != expected[a] {
            return Err(AttnError::shape(tensor, axis, found[a], expected[a]));
        }
    }
    Ok(())
}

/// The one series of keys of each batch entry.
pub(super) fn series(k: &TensorView<'_>) -> Vec<SampledPanels<f32>> {
    let [batch, _, n, width] = k.shape();
    let keys = |batch| {
        let mut keys = SampledPanels::new(width);
        let rows = rows_f32(k, batch, 0, 0..n);
        rows.chunks_exact(width.max(1)).for_each(|row| keys.push(row.iter().copied()));
        keys
    };
    (0..batch).map(keys).collect()
}

/// `(batch, heads, rows, width)` as `[batch * lists, rows, heads / lists, width]`.
pub(super) fn index_queries(
    q: &TensorView<'_>,
    lists: usize,
    weights: Option<&[f32]>,
    relu: bool,
) -> IndexQueries<f32> {
    let [batch, n_heads, rows, width] = q.shape();
    let heads = n_heads.checked_div(lists).unwrap_or(0);
    let mut data = vec![0.0; batch * n_heads * rows * width];
    let mut turned = weights.map(|_| vec![0.0; batch * n_heads * rows]);
    for head in 0..batch * n_heads {
        let wide = rows_f32(q, head / n_heads, head % n_heads, 0..rows);
        for row in 0..rows {
            let at = (head / heads * rows + row) * heads + head % heads;
            data[at * width..][..width].copy_from_slice(&wide[row * width..][..width]);
            if let (Some(turned), Some(weights)) = (&mut turned, weights) {
                turned[at] = weights[head * rows + row];
            }
        }
    }
    IndexQueries { lists: batch * lists, heads, rows, width, data, weights: turned, relu }
}

impl DsaInputs<'_> {
    pub(super) fn check(&self, dsa: &Dsa, shape: &AttnShape) -> Result<()> {
        dsa.check()?;
        let [_, heads, _, width] = self.index_q.shape();
        check_axes("index_q", self.index_q.shape(), [shape.batch, heads.max(1), shape.n_q, width.max(1)])?;
        check_axes("index_k", self.index_k.shape(), [shape.batch, 1, shape.n_kv, width])?;
        let n_weights = shape.batch * heads * shape.n_q;
        match self.index_w.len() {
            found if found != n_weights => Err(AttnError::shape("index_w", "elements", found, n_weights)),
            _ => Ok(()),
        }
    }
}

impl BlockIndexerInputs<'_> {
    pub(super) fn check(&self, indexer: &BlockIndexer, shape: &AttnShape) -> Result<()> {
        indexer.check()?;
        let width = self.index_q.shape()[3].max(1);
        check_axes("index_q", self.index_q.shape(), [shape.batch, shape.n_heads_kv, shape.n_q, width])?;
        check_axes("index_k", self.index_k.shape(), [shape.batch, 1, shape.n_kv, width])
    }
}

impl Dsa {
    /// What the given indexer chooses, the same for all heads. The index scores' scale does not matter.
    ///
    /// # Errors
    /// [`AttnError`] for tensors that do not fit `shape` or each other.
    pub fn decide_with(&self, shape: &AttnShape, x: &DsaInputs<'_>) -> Result<Decision> {
        x.check(self, shape)?;
        self.choose_given(shape, x, &series(&x.index_k))
    }

    /// What is chosen from the index keys of all tokens, `[batch]`.
    pub(super) fn choose_given(
        &self,
        shape: &AttnShape,
        x: &DsaInputs<'_>,
        keys: &[impl Panels<Number = f32>],
    ) -> Result<Decision> {
        let queries = index_queries(&x.index_q, 1, Some(x.index_w), true);
        let largest = LargestTokens { top_k: self.top_k, visible: |row| visible(shape, row) };
        Ok(tokens(shape, 1, select(&queries, |list| &keys[list], &largest))?.into())
    }
}

impl BlockIndexer {
    /// What the given indexer chooses, the same for the heads of a key/value group.
    ///
    /// # Errors
    /// [`AttnError`] for tensors that do not fit `shape` or each other.
    pub fn decide_with(&self, shape: &AttnShape, x: &BlockIndexerInputs<'_>) -> Result<Decision> {
        x.check(self, shape)?;
        self.choose_given(shape, x, &series(&x.index_k))
    }

    /// What is chosen from the index keys of all tokens, `[batch]`.
    pub(super) fn choose_given(
        &self,
        shape: &AttnShape,
        x: &BlockIndexerInputs<'_>,
        keys: &[impl Panels<Number = f32>],
    ) -> Result<Decision> {
        let queries = index_queries(&x.index_q, shape.n_heads_kv, None, false);
        let largest = LargestBlocks { indexer: self, shape };
        let chosen = select_blocks(&queries, |list| &keys[list / shape.n_heads_kv], &largest);
        Ok(Decision::by_lists(blocks(shape, self.block_len, shape.n_heads_kv, |at| wide(chosen.row(at)))?))
    }
}
