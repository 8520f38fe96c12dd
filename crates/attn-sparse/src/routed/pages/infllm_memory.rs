//! InfLLM: blocks by their representative keys, those that the queries after them scored highest.
//!
//! ```text
//! r_m     = 1/L sum_{t=1..L} q_{m+t} . k_m                   L = (local_blocks - 1) block_len
//! rep(B)  = the n_representatives keys of block B with the largest r
//! sim(i, B) = q_i . sum_{j in rep(B)} k_j
//! A(i)    = { j <= p : block(j) is one of the first init_blocks, of the last local_blocks, or among the most similar others,
//!             n_blocks in all }
//! ```
//!
//! A block is asked for once it has left the last `local_blocks`; the queries that scored its keys have then all been, so
//! causality is strict. Keys without queries after them (a cache whose queries are not at hand) have `r = 0`: then the first
//! keys of a block stand for it. The heads of a key/value group share representatives and choice, by the sum of their
//! queries; the authors sum over all heads. They also choose once for a chunk of queries; here each query chooses.
//! With as many slots as blocks it is dense causal attention.
//!
//! Source: Xiao, Zhang, Han, Xiao, Lin, Zhang, Liu, Sun, "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an
//! Efficient Context Memory", NeurIPS 2024.

use super::selector::TopPages;
use super::{Pages, growth, masked, work};
use crate::BlockMask;
use crate::decider::Work;
use crate::routed::indexer::{IndexQueries, select};
use crate::routed::key_panels::KeyPanels;
use crate::routed::router::{Router, causal_pairs};
use crate::routed::rows::rows_f32;
use crate::select::top_k;
use attn_core::{AttnError, AttnShape, Growth, Result, StreamShape, Target, TensorView};
use std::collections::VecDeque;

/// Blocks of keys with representatives.
///
/// Time of a decoding step: `O(n_kv / block_len * head_dim)` for the similarities and `n_blocks * block_len * (head_dim +
/// head_dim_v)` for attention, a query head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InfLlmMemory {
    /// Keys of a block.
    pub block_len: usize,
    /// Keys that stand for a block.
    pub n_representatives: usize,
    /// Blocks that a query sees.
    pub n_blocks: usize,
    /// First blocks, seen by every query.
    pub init_blocks: usize,
    /// Last blocks, the own one included, seen by every query; at least 2.
    pub local_blocks: usize,
}

impl Default for InfLlmMemory {
    /// Blocks of 128 keys with 4 representatives; the first one, the last 32, and 16 others.
    fn default() -> Self {
        Self { block_len: 128, n_representatives: 4, n_blocks: 49, init_blocks: 1, local_blocks: 32 }
    }
}

impl InfLlmMemory {
    fn pages(&self) -> Pages {
        let Self { block_len, n_blocks, init_blocks, local_blocks, .. } = *self;
        Pages { page_len: block_len, n_pages: n_blocks, first: init_blocks, last: local_blocks }
    }

    /// Checks that the forced blocks fit, and that queries score the keys of a block.
    ///
    /// # Errors
    /// [`AttnError::Value`] naming the size that is too small.
    pub fn check(&self) -> Result<()> {
        self.pages().check()?;
        if self.local_blocks < 2 {
            let expected = "at least 2, so that queries score the keys of a block";
            return Err(AttnError::value("local_blocks", self.local_blocks, expected));
        }
        if self.n_representatives == 0 {
            return Err(AttnError::value("n_representatives", 0, "at least 1"));
        }
        Ok(())
    }

    /// Queries that score a key, `L`.
    fn scoring(&self) -> usize {
        (self.local_blocks - 1) * self.block_len
    }
}

/// What is kept of the keys and queries, one series a batch entry and key/value head.
#[derive(Debug)]
pub struct Representatives {
    heads: Vec<Series>,
    n_heads_kv: usize,
    head_dim: usize,
    /// Keys appended.
    len: usize,
}

#[derive(Debug)]
struct Series {
    /// The sum of each block's representatives.
    sums: KeyPanels<f32>,
    /// Keys from the first block on that has no sum yet.
    open: VecDeque<f32>,
    /// Sums of all queries before each position from that block's start on: one more than positions whose queries have been.
    before: VecDeque<f64>,
    /// Positions whose queries have been, given or not.
    asked: usize,
}

impl Series {
    fn new(width: usize) -> Self {
        let before = std::iter::repeat_n(0.0, width).collect();
        Self { sums: KeyPanels::new(width), open: VecDeque::new(), before, asked: 0 }
    }

    /// Takes over the query at the next position; without one, or one that is not finite, nothing is added.
    fn ask(&mut self, q: Option<&[f32]>, width: usize) {
        let q = q.filter(|q| q.iter().all(|x| x.is_finite()));
        let last = self.before.len() - width;
        for c in 0..width {
            let sum = self.before[last + c] + q.map_or(0.0, |q| f64::from(q[c]));
            self.before.push_back(sum);
        }
        self.asked += 1;
    }

    /// Sums the representatives of all blocks whose scoring queries have been.
    fn settle(&mut self, settings: &InfLlmMemory, width: usize) {
        let (len, scoring) = (settings.block_len, settings.scoring());
        while self.asked >= (self.sums.len() + 1) * len + scoring {
            let keys: Vec<f32> = self.open.drain(..len * width).collect();
            let score = |at: usize| -> f32 {
                let (first, end) = ((at + 1) * width, (at + 1 + scoring) * width);
                let key = &keys[at * width..][..width];
                let sum =
                    (0..width).map(|c| f64::from(key[c]) * (self.before[end + c] - self.before[first + c]));
                sum.sum::<f64>() as f32
            };
            let scores: Vec<f32> = (0..len).map(score).collect();
            let mut sum = vec![0.0; width];
            for at in top_k(&scores, settings.n_representatives) {
                sum.iter_mut().zip(&keys[at * width..]).for_each(|(sum, x)| *sum += x);
            }
            self.sums.push(sum.into_iter());
            self.before.drain(..len * width);
        }
    }

    fn bytes(&self) -> usize {
        self.sums.bytes() + 4 * self.open.capacity() + 8 * self.before.capacity()
    }
}

/// Sums of the queries of a key/value group, `[rows, head_dim]`.
fn summed(q: &TensorView<'_>, batch: usize, kv_head: usize, n_heads_kv: usize) -> Vec<f32> {
    let [_, heads, n, width] = q.shape();
    let group = heads / n_heads_kv.max(1);
    let mut sum = vec![0.0; n * width];
    for head in kv_head * group..(kv_head + 1) * group {
        let rows = rows_f32(q, batch, head, 0..n);
        sum.iter_mut().zip(rows).for_each(|(sum, x)| *sum += x);
    }
    sum
}

impl Router for InfLlmMemory {
    const NAME: &'static str = "infllm";

    type Summary = Representatives;

    fn summary(&self, shape: &StreamShape) -> Result<Representatives> {
        self.check()?;
        let heads = (0..shape.batch * shape.n_heads_kv).map(|_| Series::new(shape.head_dim)).collect();
        Ok(Representatives { heads, n_heads_kv: shape.n_heads_kv, head_dim: shape.head_dim, len: 0 })
    }

    fn append(&self, summary: &mut Representatives, k: &TensorView<'_>) {
        let [_, n_heads, n, _] = k.shape();
        for (head, series) in summary.heads.iter_mut().enumerate() {
            series.open.extend(rows_f32(k, head / n_heads, head % n_heads, 0..n));
        }
        summary.len += n;
    }

    fn observe(&self, summary: &mut Representatives, q: &TensorView<'_>) {
        let (width, n_kv, n_heads_kv) = (summary.head_dim, summary.len, summary.n_heads_kv);
        // More queries than keys: the first ones stand before all keys.
        let skipped = q.shape()[2].saturating_sub(n_kv);
        let first = n_kv.saturating_sub(q.shape()[2]);
        for (head, series) in summary.heads.iter_mut().enumerate() {
            let queries = summed(q, head / n_heads_kv, head % n_heads_kv, n_heads_kv);
            let queries = &queries[skipped * width..];
            for position in series.asked..n_kv {
                let at = position.checked_sub(first);
                series.ask(at.map(|at| &queries[at * width..][..width]), width);
                series.settle(self, width);
            }
            // A long prompt leaves no buffer of its own behind.
            series.open.shrink_to(2 * series.open.len());
            series.before.shrink_to(2 * series.before.len());
        }
    }

    fn bytes(&self, summary: &Representatives) -> usize {
        summary.heads.iter().map(Series::bytes).sum()
    }

    fn choose(&self, summary: &Representatives, q: &TensorView<'_>, shape: &AttnShape) -> Result<BlockMask> {
        let (s, width) = (*shape, shape.head_dim);
        let lists = s.batch * s.n_heads_kv;
        let of_list = |list: usize| summed(q, list / s.n_heads_kv, list % s.n_heads_kv, s.n_heads_kv);
        let data = (0..lists).flat_map(of_list).collect();
        let queries = IndexQueries { lists, heads: 1, rows: s.n_q, width, data, weights: None, relu: false };
        let selector = TopPages { pages: self.pages(), all_up_to: 0, shape };
        let chosen = select(&queries, |list| &summary.heads[list].sums, &selector);
        masked(&self.pages(), shape, s.n_heads_kv, chosen)
    }

    fn entries(&self) -> usize {
        self.pages().n_pages
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let groups = (shape.batch * shape.n_heads_kv) as u64;
        let scores = groups * causal_pairs(shape) / self.block_len.max(1) as u64;
        let mut work = work(&self.pages(), shape, 0, (scores, shape.head_dim as u64), shape.n_heads_kv);
        // Keys and sums of queries that are still asked.
        let open = (self.local_blocks * self.block_len).min(shape.n_kv + self.block_len) as u64;
        work.decision_bytes += groups * open * shape.head_dim as u64 * 12;
        work
    }

    fn growth(&self) -> Growth {
        growth(&self.pages(), 64)
    }

    /// Queries choose what later ones see.
    fn target(&self) -> Target {
        Target::SoftmaxApproximately
    }
}
