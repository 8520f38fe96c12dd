//! Mixture of block attention: each query chooses chunks of keys by the mean of their keys.
//!
//! ```text
//! own(p) = floor(p / chunk_len)          gate(i, c) = q_i . mean_{j in chunk c} k_j      for c < own(p)
//! A(i)   = { j <= p : chunk(j) = own(p), or chunk(j) among the top_k - 1 largest gates }
//! ```
//!
//! The own chunk is always seen, up to the query itself, and counts among the `top_k`, as in the authors' code. Chunks are
//! chosen by each query head for itself. A past chunk's mean is complete, hence causality is strict. With as many slots as
//! chunks it is dense causal attention.
//!
//! Cost of a query: `n / (2 chunk_len)` gates of width `head_dim`, and `top_k * chunk_len` attended keys.
//!
//! Source: Lu, Jiang, Liu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025. FlashMoBA (2025) is the
//! same with smaller chunks.

use super::key_panels::{KeyPanels, PANEL, ScoreRows};
use super::router::{Router, causal_pairs, list_bytes, pairs_up_to, visible};
use super::rows::rows_f32;
use crate::decider::Work;
use crate::select::top_k_with;
use crate::{BlockMask, BlockSizes, Builder};
use attn_core::mask::{Align, Band};
use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, Growth, Result, StreamShape, TensorView};
use std::sync::Arc;

/// Queries scored together.
const ROWS: usize = 16;

/// Chunks of `chunk_len` keys; a query sees `top_k` of them, its own included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moba {
    /// Keys of a chunk.
    pub chunk_len: usize,
    /// Chunks that a query sees, its own included; at least 1.
    pub top_k: usize,
}

/// Means of the complete chunks, and the sum of the last one.
#[derive(Debug)]
pub struct ChunkMeans {
    /// One a batch entry and key/value head.
    heads: Vec<(KeyPanels<f32>, Vec<f32>)>,
    len: usize,
}

impl Router for Moba {
    const NAME: &'static str = "moba";

    type Summary = ChunkMeans;

    fn summary(&self, shape: &StreamShape) -> Result<ChunkMeans> {
        for (name, number) in [("chunk_len", self.chunk_len), ("top_k", self.top_k)] {
            if number == 0 {
                return Err(AttnError::value(name, 0, "at least 1"));
            }
        }
        let head = || (KeyPanels::new(shape.head_dim), vec![0.0; shape.head_dim]);
        Ok(ChunkMeans { heads: (0..shape.batch * shape.n_heads_kv).map(|_| head()).collect(), len: 0 })
    }

    fn append(&self, means: &mut ChunkMeans, k: &TensorView<'_>) {
        let [_, n_heads, n, width] = k.shape();
        for (head, (panels, sum)) in means.heads.iter_mut().enumerate() {
            let rows = rows_f32(k, head / n_heads, head % n_heads, 0..n);
            for (at, row) in rows.chunks_exact(width).enumerate() {
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                if (means.len + at + 1).is_multiple_of(self.chunk_len) {
                    panels.push(sum.iter().map(|sum| sum / self.chunk_len as f32));
                    sum.fill(0.0);
                }
            }
        }
        means.len += n;
    }

    fn bytes(&self, means: &ChunkMeans) -> usize {
        means.heads.iter().map(|(panels, sum)| panels.bytes() + 4 * sum.capacity()).sum()
    }

    fn choose(&self, means: &ChunkMeans, q: &TensorView<'_>, shape: &AttnShape) -> Result<BlockMask> {
        let s = *shape;
        let mut lists: Vec<Vec<usize>> = vec![Vec::new(); s.rows()];
        let isa = Isa::current();
        let blocks = s.n_q.div_ceil(ROWS).max(1);
        let tasks = lists.chunks_mut(s.n_q.max(1)).enumerate().flat_map(|(head, lists)| {
            lists.chunks_mut(ROWS).enumerate().map(move |(block, lists)| (head * blocks + block, lists))
        });
        for_each_task(
            tasks,
            || (Vec::new(), Vec::new()),
            |(scores, wide), (at, lists)| {
                let (head, first) = (at / blocks, at % blocks * ROWS);
                let (batch, head) = (head / s.n_heads_q, head % s.n_heads_q);
                let keys = &means.heads[batch * s.n_heads_kv + s.kv_head(head)].0;
                let q = rows_f32(q, batch, head, first..first + lists.len());
                let own = |row: usize| (visible(&s, first + row).max(1) - 1) / self.chunk_len;
                let n_panels = own(lists.len() - 1).div_ceil(PANEL);
                let stride = n_panels * PANEL;
                // Who sees no more chunks than it has slots for needs no gates.
                if own(lists.len() - 1) >= self.top_k {
                    scores.resize(ROWS * stride, 0.0);
                    isa.run(ScoreRows { q: &q, keys, panels: 0..n_panels, scores, stride, wide });
                }
                for (row, list) in lists.iter_mut().enumerate() {
                    let own = own(row);
                    if visible(&s, first + row) == 0 {
                        continue;
                    }
                    *list = match own < self.top_k {
                        true => (0..own).collect(),
                        false => top_k_with(&scores[row * stride..][..own], self.top_k - 1, &[]),
                    };
                    list.push(own);
                }
            },
        );
        let causal = Arc::new(Band::causal(shape, Align::BottomRight));
        let builder = Builder::new(shape, BlockSizes { q: 1, kv: self.chunk_len }).per_batch();
        builder.per_head(s.n_heads_q.max(1)).inside(causal).from_rows(|batch, head, row| {
            lists.get((batch * s.n_heads_q + head) * s.n_q + row).cloned().unwrap_or_default()
        })
    }

    fn entries(&self) -> usize {
        self.top_k
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let gates = crate::heads(shape) * causal_pairs(shape) / self.chunk_len as u64;
        let means = shape.batch * shape.n_heads_kv * shape.n_kv.div_ceil(self.chunk_len) * shape.head_dim * 4;
        Work {
            pairs: pairs_up_to(shape, self.chunk_len.saturating_mul(self.top_k)),
            decision_flops: 2 * gates * shape.head_dim as u64,
            decision_bytes: means as u64 + list_bytes(shape, shape.n_heads_q, self.top_k),
        }
    }

    fn growth(&self) -> Growth {
        // Gates grow as n^2 / chunk_len; with chunks of hundreds of keys they are the smaller part at a million.
        let (gates, keys) = ((1 << 20) / self.chunk_len, self.chunk_len.saturating_mul(self.top_k));
        if gates < keys { Growth::Linear } else { Growth::Quadratic }
    }
}
