//! An index made of queries and keys themselves, where no trained indexer is given: every few channels of both,
//! rounded to bf16.
//!
//! A trained indexer has its own narrow projections. Without them the index keeps `index_dim` channels, evenly spread (so
//! that all frequencies of a rotary embedding are among them); the dot product over them stands for that over all.

use super::indexer::IndexQueries;
use super::key_panels::SampledPanels;
use super::numbers::PairOfBf16;
use super::rows::rows_f32;
use attn_core::{AttnError, AttnShape, Result, StreamShape, TensorView};

/// Narrow keys, one series a batch entry and key/value head.
#[derive(Debug)]
pub struct IndexKeys {
    pub(super) heads: Vec<SampledPanels<PairOfBf16>>,
    width: usize,
    head_dim: usize,
}

/// Channels of an index over `head_dim` channels: as asked for, else a quarter of them.
fn width(index_dim: Option<usize>, head_dim: usize) -> usize {
    index_dim.unwrap_or(head_dim.div_ceil(4)).min(head_dim)
}

impl IndexKeys {
    pub(super) fn new(index_dim: Option<usize>, shape: &StreamShape) -> Result<Self> {
        let width = width(index_dim, shape.head_dim);
        if width == 0 {
            return Err(AttnError::value("index_dim", 0, "at least 1"));
        }
        let heads = (0..shape.batch * shape.n_heads_kv).map(|_| SampledPanels::new(width)).collect();
        Ok(Self { heads, width, head_dim: shape.head_dim })
    }

    fn channel(&self, c: usize) -> usize {
        c * self.head_dim / self.width
    }

    pub(super) fn append(&mut self, k: &TensorView<'_>) {
        let [_, n_heads, n, head_dim] = k.shape();
        let channels: Vec<usize> = (0..self.width).map(|c| self.channel(c)).collect();
        for (head, keys) in self.heads.iter_mut().enumerate() {
            for row in rows_f32(k, head / n_heads, head % n_heads, 0..n).chunks_exact(head_dim) {
                keys.push(channels.iter().map(|c| row[*c]));
            }
        }
    }

    /// Appends a key to one series: that of a batch entry and key/value head.
    pub(super) fn push(&mut self, head: usize, row: &[f32]) {
        let channels: Vec<usize> = (0..self.width).map(|c| self.channel(c)).collect();
        self.heads[head].push(channels.iter().map(|c| row[*c]));
    }

    pub(super) fn bytes(&self) -> usize {
        self.heads.iter().map(SampledPanels::bytes).sum()
    }

    /// A list a key/value head, whose index heads are the query heads of its group.
    pub(super) fn queries_of_groups(
        &self,
        q: &TensorView<'_>,
        s: &AttnShape,
        relu: bool,
    ) -> IndexQueries<f32> {
        let (group, lists) = (s.group_size(), s.batch * s.n_heads_kv);
        let mut data = vec![0.0; lists * s.n_q * group * self.width];
        for head in 0..s.batch * s.n_heads_q {
            let rows = rows_f32(q, head / s.n_heads_q, head % s.n_heads_q, 0..s.n_q);
            for (i, row) in rows.chunks_exact(s.head_dim).enumerate() {
                let at = (head / group * s.n_q + i) * group + head % group;
                for (c, to) in data[at * self.width..][..self.width].iter_mut().enumerate() {
                    *to = row[self.channel(c)];
                }
            }
        }
        IndexQueries { lists, heads: group, rows: s.n_q, width: self.width, data, weights: None, relu }
    }
}

/// Multiply-adds and bytes of such an index.
pub(super) fn work(index_dim: Option<usize>, s: &AttnShape) -> (u64, u64) {
    let width = width(index_dim, s.head_dim) as u64;
    let flops = 2 * crate::heads(s) * super::router::causal_pairs(s) * width;
    (flops, 2 * (s.batch * s.n_heads_kv * s.n_kv) as u64 * width)
}
