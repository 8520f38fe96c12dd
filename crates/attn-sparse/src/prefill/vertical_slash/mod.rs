//! The vertical-slash pattern of MInference: some keys for all queries, some distances for all queries.
//!
//! From the probabilities of the last `last_q` queries, summed by key and by distance:
//!
//! ```text
//! V = the first `forced_vertical` keys and those of largest sum, `num_vertical` in all
//! D = the `forced_slash` shortest distances and those of largest sum, `num_slash` in all
//! A(i) = { j <= p : j in V or p - j in D }        p = i + n_kv - n_q
//! ```
//!
//! Exact to the token; the authors' kernel rounds distances to blocks of 64 and attends more. Each query head has lines of its
//! own. Always causal, not strictly: the last queries choose for all.
//!
//! The distances that the last queries attend are mostly single ones, a tenth of all at n = 65536 on the activations of a
//! language model, and touch nearly every tile. So the forward pass has two parts: tiles for `V` and for bands of distances, and
//! a kernel that goes along the others one by one.
//!
//! Source: Jiang, Li, Zhang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
//! Attention", 2024.

mod cut;
mod diagonals;
mod forward;
mod lines;
mod rows;
#[cfg(test)]
mod tests;

pub(crate) use forward::forward;
pub use lines::Lines;

use super::grid::promises;
use crate::decider::{Decider, Decision, Promises, Work};
use crate::scores::{HeadRows, QuerySums};
use crate::select::top_k_with;
use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, Growth, Qkv, Result, softmax_scale_or_default};

/// Keys and distances by the probabilities of the last queries. Time of the choice `O(last_q n)`; memory `O(n)` bits a head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VerticalSlash {
    /// Keys that all later queries see, the forced ones among them.
    pub num_vertical: usize,
    /// Distances at which all queries see, the forced ones among them.
    pub num_slash: usize,
    /// Keys at the start that are always among them.
    pub forced_vertical: usize,
    /// Shortest distances, from 0 on, that are always among them.
    pub forced_slash: usize,
    /// Last queries whose probabilities are summed.
    pub last_q: usize,
    /// Of the scores; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for VerticalSlash {
    /// 1000 keys, 6096 distances, the first 30 and the nearest 100 forced, 64 queries: the authors' settings.
    fn default() -> Self {
        Self {
            num_vertical: 1000,
            num_slash: 6096,
            forced_vertical: 30,
            forced_slash: 100,
            last_q: 64,
            softmax_scale: None,
        }
    }
}

impl Decider for VerticalSlash {
    const NAME: &'static str = "vertical-slash";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        if self.last_q == 0 {
            return Err(AttnError::value("last_q", 0, "at least 1"));
        }
        let (shape, isa) = (x.shape(), Isa::current());
        let scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        let last = shape.n_q.saturating_sub(self.last_q)..shape.n_q;
        let mut heads = vec![(Vec::new(), Vec::new()); shape.batch * shape.n_heads_q];
        for_each_task(
            heads.iter_mut().enumerate(),
            || (),
            |(), (list, (vertical, slash))| {
                let (batch, head) = (list / shape.n_heads_q, list % shape.n_heads_q);
                let q = HeadRows::of(x.q(), batch, head);
                let k = HeadRows::of(x.k(), batch, shape.kv_head(head));
                let sums = QuerySums::of(isa, q, k, last.clone(), scale);
                let forced = |count: usize| (0..count.min(shape.n_kv)).collect::<Vec<_>>();
                let (keys, distances) = (forced(self.forced_vertical), forced(self.forced_slash));
                *vertical = top_k_with(&sums.columns, self.num_vertical.max(keys.len()), &keys);
                *slash = top_k_with(&sums.diagonals, self.num_slash.max(distances.len()), &distances);
            },
        );
        Ok(Decision::by_lines(Lines::new(&shape, shape.batch, heads)?))
    }

    fn promises(&self) -> Promises {
        promises(true, Growth::Linear, Growth::Linear)
    }

    /// At most: keys and distances may meet.
    fn work(&self, shape: &AttnShape) -> Work {
        let heads = crate::heads(shape);
        let lines = self.num_vertical.max(self.forced_vertical) + self.num_slash.max(self.forced_slash);
        let last = (self.last_q.min(shape.n_q) * shape.head_dim) as u64;
        // Copies in f32 where rows are no whole vectors.
        let width = shape.head_dim.max(shape.head_dim_v).next_multiple_of(64);
        let rows = 2 * shape.batch * (shape.n_heads_q * shape.n_q + shape.n_heads_kv * shape.n_kv);
        Work {
            pairs: heads * (shape.n_q as u64) * (lines.min(shape.n_kv) as u64),
            decision_flops: heads * 4 * last * shape.n_kv as u64,
            decision_bytes: heads * (12 * shape.n_kv + 16 * lines) as u64 + (4 * rows * width) as u64,
        }
    }
}
