//! Exact top-k: each query attends the `k` keys of largest score, `A(i)` = the `k` largest `softmax_scale * q_i . k_j` over the
//! visible `j`; of equal scores the lower `j`.
//!
//! Scores are compared as sums in f64 of the products of the inputs, so that the choice is the same on every machine. Not all
//! of them are computed so: a first stage puts every score between two proven bounds, in a quarter of the time of f32 where
//! the CPU multiplies bytes (`approximate`), and only keys that the bounds leave in doubt are scored again (`candidates`).
//! A threshold guessed from a sample of the keys, and checked in the end, keeps most of the others from being looked at
//! (`guess`).
//!
//! The choice is most of the time, whatever the length: its products alone are half (f32) or an eighth (bytes) of exact
//! attention's.
//!
//! Strictly causal with `causal`, and a stream keeps all keys. Gradients flow through the chosen scores alone.
//!
//! Source: Gupta, Dar, Goodman, Ciprut, Berant, "Memory-efficient Transformers via Top-k Attention", 2021; Zhao et al.,
//! "Explicit Sparse Transformer: Concentrated Attention Through Explicit Selection", 2019.

mod approximate;
mod candidates;
mod exact;
mod guess;
mod rows;
#[cfg(test)]
mod tests;

use super::grid::{all_pairs, sign};
use crate::block_mask::lists::Lists;
use crate::block_mask::{BlockSizes, Builder};
use crate::decider::{Decider, Decision, Promises, Work};
use crate::scores::HeadRows;
use approximate::{Keys, Stage};
use attn_core::mask::{Align, Band};
use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::{AttnShape, Causality, Growth, Qkv, Result, softmax_scale_or_default};
use attn_flash::stream::Kept;
use guess::Guess;
use rows::{BLOCK, TopRows};

/// The `top_k` keys of largest score of each query. Time of the choice `O(n_q n_kv head_dim)`, of attention
/// `O(n_q top_k head_dim)`; memory `O(n_q top_k + n_kv head_dim)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExactTopK {
    /// No key after the query is a candidate.
    pub causal: bool,
    /// Keys of each query.
    pub top_k: usize,
    /// Of the scores; only its sign matters for the choice. `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl ExactTopK {
    /// Chosen keys of each query of each head, ascending.
    fn lists(&self, x: &Qkv<'_>, stage: Stage, sign: f32) -> Vec<Vec<u32>> {
        let (shape, isa) = (x.shape(), Isa::current());
        let group = shape.group_size();
        let mut lists = vec![Vec::new(); shape.rows()];
        let of_groups = lists.chunks_mut((group * shape.n_q).max(1)).enumerate();
        for (kv_list, lists) in of_groups {
            let (batch, kv_head) = (kv_list / shape.n_heads_kv, kv_list % shape.n_heads_kv);
            let keys = Keys::new(isa, HeadRows::of(x.k(), batch, kv_head), stage);
            let guess = Guess::new(isa, &keys, self.top_k);
            let heads = lists.chunks_mut(shape.n_q).enumerate();
            let tasks = heads.flat_map(|(head, rows)| {
                rows.chunks_mut(BLOCK).enumerate().map(move |(at, rows)| (head, at * BLOCK, rows))
            });
            for_each_task(tasks, rows::Workspace::default, |workspace, (head, first, lists)| {
                let q = HeadRows::of(x.q(), batch, kv_head * group + head);
                let rows = first..first + lists.len();
                let &Self { causal, top_k, .. } = self;
                let (keys, guess) = (&keys, guess.as_ref());
                isa.run(TopRows { q, keys, guess, rows, causal, top_k, sign, workspace, lists });
            });
        }
        lists
    }
}

impl Default for ExactTopK {
    /// 64 keys, bidirectional.
    fn default() -> Self {
        Self { causal: false, top_k: 64, softmax_scale: None }
    }
}

impl Decider for ExactTopK {
    const NAME: &'static str = "topk";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        let shape = x.shape();
        let sign = sign(softmax_scale_or_default(self.softmax_scale, shape.head_dim)?);
        if self.top_k >= shape.n_kv || shape.rows() == 0 {
            let all = Band { offset: 0, left: None, right: None };
            return Ok(Decision::new(if self.causal {
                Band::causal(&shape, Align::BottomRight)
            } else {
                all
            }));
        }
        let lists = self.lists(x, Stage::fastest(Isa::current(), shape.head_dim), sign);
        let builder = Builder::new(&shape, BlockSizes::square(1)).per_batch();
        let builder = if shape.n_heads_q > 0 { builder.per_head(shape.n_heads_q) } else { builder };
        Ok(builder.ascending_lists(Lists::of(&lists))?.into())
    }

    fn promises(&self) -> Promises {
        Promises {
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            key_order_free: !self.causal,
            cross_lengths: true,
            time: Growth::Quadratic,
            memory: Growth::Linear,
            kept: self.causal.then_some(Kept { sinks: 0, last: None }),
        }
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let keys = self.top_k.min(shape.n_kv) as u64;
        let rows = crate::heads(shape) * shape.n_q as u64;
        Work {
            pairs: rows * keys,
            decision_flops: 2 * all_pairs(shape, self.causal) * shape.head_dim as u64,
            decision_bytes: 9 * rows * keys + (shape.n_kv * (shape.head_dim + 4)) as u64,
        }
    }
}
