//! InfLLM-v2: block selection without parameters, by the probabilities of overlapping mean keys.
//!
//! ```text
//! K_c        = mean of keys [c t, c t + l), seen once it ends at p or before
//! importance = max over c that overlap block b of  sum_{heads of the kv group} softmax_c(s q_i . K_c)
//! A(i)       = { j <= p : block(j) is one of the first init_blocks, of the last local_blocks, or among the most important,
//!                top_k in all }
//! ```
//!
//! Own block first, then the first blocks, then the other local ones take slots before the rest. Queries that see no more than
//! `dense_len` keys see all of them; the authors ask that of the whole sequence, which would let its length reach back to
//! earlier queries. The heads of a key/value group share the choice. Causality is strict. With as many slots as blocks it is dense
//! causal attention.
//!
//! Cost of a query: `n / 2t` scores of width `head_dim`, and `top_k * block_len` attended keys.
//!
//! Source: MiniCPM Team, "MiniCPM4: Ultra-Efficient LLMs on End Devices", 2025.

use super::block_indexer::blocks;
use super::ended::{Ended, n_ended};
use super::key_panels::{KeyPanels, PANEL};
use super::nsa::{GroupProbabilities, Segment, Weigh};
use super::overlaps::{OfBlocks, Overlaps, RowScores};
use super::router::{Router, causal_pairs, list_bytes, pairs_up_to, visible};
use super::rows::rows_f32;
use crate::BlockMask;
use crate::decider::Work;
use crate::select::largest::LargestOf;
use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, Growth, Result, StreamShape, TensorView, softmax_scale_or_default};
use std::collections::VecDeque;

/// Rows of all heads of a group scored together.
const ROWS: usize = 8;

/// Sizes; see the module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InfLlm {
    /// Keys of a mean, `l`.
    pub mean_len: usize,
    /// Keys from one mean's start to the next one's, `t`.
    pub mean_stride: usize,
    /// Keys of a block.
    pub block_len: usize,
    /// Blocks that a query sees.
    pub top_k: usize,
    /// First blocks, seen by every query.
    pub init_blocks: usize,
    /// Last blocks, the own one included, seen by every query.
    pub local_blocks: usize,
    /// Queries that see no more keys attend all.
    pub dense_len: usize,
    /// Multiplies dot products with means; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for InfLlm {
    /// The authors' sizes.
    fn default() -> Self {
        Self {
            mean_len: 32,
            mean_stride: 16,
            block_len: 64,
            top_k: 64,
            init_blocks: 1,
            local_blocks: 32,
            dense_len: 8192,
            softmax_scale: None,
        }
    }
}

/// Means of stretches of keys, one series a batch entry and key/value head.
#[derive(Debug)]
pub struct KeyMeans {
    /// Means, and the sums of those that have begun and not ended.
    heads: Vec<(KeyPanels<f32>, VecDeque<Vec<f32>>)>,
    len: usize,
}

impl InfLlm {
    /// The blocks that take slots first; `own` is the last one.
    fn forced(&self, own: usize) -> Vec<usize> {
        let local = (0..=own).rev().take(self.local_blocks);
        let order = std::iter::once(own).chain((0..=own).take(self.init_blocks)).chain(local);
        let mut taken: Vec<usize> = Vec::new();
        for block in order {
            if taken.len() < self.top_k && !taken.contains(&block) {
                taken.push(block);
            }
        }
        taken
    }

    /// What a row takes that sees `n` keys and needs no scores.
    fn all_blocks(&self, n: usize) -> Option<Vec<usize>> {
        let blocks = n.div_ceil(self.block_len);
        (n <= self.dense_len || blocks <= self.top_k).then(|| (0..blocks).collect())
    }

    /// The forced blocks and the most important others of a row that sees `n` keys; `scratch.x` are the shares of the means.
    fn chosen(&self, n: usize, scratch: &mut RowScores) -> Vec<usize> {
        let own = (n - 1) / self.block_len;
        let mut taken = self.forced(own);
        // Between the first blocks and the local ones.
        let open = self.init_blocks..own.min((own + 1).saturating_sub(self.local_blocks));
        let overlaps = Overlaps { len: self.mean_len, stride: self.mean_stride, block: self.block_len };
        let RowScores { x, blocks: scores, places, largest } = scratch;
        // NaN stays.
        let add = |most: f32, x: f32, _: f32| if x > most || x.is_nan() { x } else { most };
        Isa::current().run(OfBlocks { overlaps, x, blocks: open.clone(), add, scores, places });
        let best = Isa::current().run(LargestOf { scores, k: self.top_k - taken.len(), largest });
        taken.extend(best.into_iter().map(|block| open.start + block as usize));
        taken.sort_unstable();
        taken
    }
}

impl Router for InfLlm {
    const NAME: &'static str = "infllm-v2";

    type Summary = KeyMeans;

    fn summary(&self, shape: &StreamShape) -> Result<KeyMeans> {
        let sizes = [
            ("mean_len", self.mean_len),
            ("mean_stride", self.mean_stride),
            ("block_len", self.block_len),
            ("top_k", self.top_k),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(AttnError::value(*name, 0, "at least 1"));
        }
        let head = || (KeyPanels::new(shape.head_dim), VecDeque::new());
        Ok(KeyMeans { heads: (0..shape.batch * shape.n_heads_kv).map(|_| head()).collect(), len: 0 })
    }

    fn append(&self, means: &mut KeyMeans, k: &TensorView<'_>) {
        let [_, n_heads, n, width] = k.shape();
        let ended = |n: usize| n_ended(n, self.mean_len, self.mean_stride);
        for (head, (panels, open)) in means.heads.iter_mut().enumerate() {
            let rows = rows_f32(k, head / n_heads, head % n_heads, 0..n);
            for (i, row) in rows.chunks_exact(width).enumerate() {
                let position = means.len + i;
                if position.is_multiple_of(self.mean_stride) {
                    open.push_back(vec![0.0; width]);
                }
                for sum in open.iter_mut() {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
                if ended(position + 1) > ended(position)
                    && let Some(sum) = open.pop_front()
                {
                    panels.push(sum.iter().map(|x| x / self.mean_len as f32));
                }
            }
        }
        means.len += n;
    }

    fn bytes(&self, means: &KeyMeans) -> usize {
        let open = |open: &VecDeque<Vec<f32>>| open.iter().map(|sum| 4 * sum.capacity()).sum::<usize>();
        means.heads.iter().map(|(panels, sums)| panels.bytes() + open(sums)).sum()
    }

    fn choose(&self, means: &KeyMeans, q: &TensorView<'_>, shape: &AttnShape) -> Result<BlockMask> {
        let (s, isa, group) = (*shape, Isa::current(), shape.group_size());
        let factor = softmax_scale_or_default(self.softmax_scale, s.head_dim)? * std::f32::consts::LOG2_E;
        let ended = Ended::of(self.mean_len, self.mean_stride, shape);
        let mut lists: Vec<Vec<usize>> = vec![Vec::new(); s.batch * s.n_heads_kv * s.n_q];
        let len = (ROWS / group).max(1);
        let tasks = lists.chunks_mut(s.n_q.max(1)).enumerate().flat_map(|(head, lists)| {
            lists.chunks_mut(len).enumerate().map(move |(block, lists)| (head, block * len, lists))
        });
        for_each_task(tasks, <(Segment, RowScores)>::default, |(segment, scratch), (head, first, lists)| {
            let (batch, kv_head) = (head / s.n_heads_kv, head % s.n_heads_kv);
            let last = visible(&s, first + lists.len() - 1);
            if self.all_blocks(last).is_none() {
                // [rows, group, head_dim]
                let mut q_rows = vec![0.0; lists.len() * group * s.head_dim];
                for h in 0..group {
                    let rows = rows_f32(q, batch, kv_head * group + h, first..first + lists.len());
                    for (row, from) in rows.chunks_exact(s.head_dim).enumerate() {
                        let to = &mut q_rows[(row * group + h) * s.head_dim..][..s.head_dim];
                        to.iter_mut().zip(from).for_each(|(to, x)| *to = x * factor);
                    }
                }
                let seen: Vec<usize> =
                    (0..lists.len() * group).map(|row| ended.visible(first + row / group)).collect();
                let n = seen.last().copied().unwrap_or(0);
                let (keys, panels) = (&means.heads[head].0, 0..n.div_ceil(PANEL));
                isa.run(Weigh { q: &q_rows, keys, panels, visible: &seen, segment, values: None });
            }
            for (row, list) in lists.iter_mut().enumerate() {
                let n = visible(&s, first + row);
                *list = self.all_blocks(n).unwrap_or_else(|| {
                    let segments = std::slice::from_ref(&*segment);
                    let (rows, n_seen) = (row * group..(row + 1) * group, ended.visible(first + row));
                    isa.run(GroupProbabilities { segments, rows, n: n_seen, shares: &mut scratch.x });
                    self.chosen(n, scratch)
                });
            }
        });
        blocks(shape, self.block_len, s.n_heads_kv, |at| lists[at].clone())
    }

    fn entries(&self) -> usize {
        self.top_k.max(self.dense_len.div_ceil(self.block_len))
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let scores = crate::heads(shape) * causal_pairs(shape) / self.mean_stride as u64;
        let means =
            shape.batch * shape.n_heads_kv * shape.n_kv.div_ceil(self.mean_stride) * shape.head_dim * 4;
        let seen = self.block_len.saturating_mul(self.top_k);
        Work {
            pairs: pairs_up_to(shape, seen).max(pairs_up_to(shape, self.dense_len.min(seen))),
            decision_flops: 2 * scores * shape.head_dim as u64,
            decision_bytes: means as u64 + list_bytes(shape, shape.n_heads_kv, self.top_k),
        }
    }

    fn growth(&self) -> Growth {
        // At a million keys, in units of the width: what is attended is linear, scores of means are not.
        let (attended, scores) =
            (4 * self.block_len.saturating_mul(self.top_k), (1 << 20) / self.mean_stride);
        match scores / attended.max(1) {
            0 => Growth::Linear,
            1..=6 => Growth::SubQuadratic,
            _ => Growth::Quadratic,
        }
    }
}
