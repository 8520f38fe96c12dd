//! The block-sparse pattern of MInference: means of blocks of queries against means of blocks of keys.
//!
//! ```text
//! S_uv = mean_{i in u} q_i . mean_{j in v} k_j        row block u attends its top_k blocks v, causal inside
//! ```
//!
//! In the causal form a block of keys is a candidate if it starts no later than the block of queries; the diagonal block is
//! one like any other. Not strictly causal: a mean is over the whole block.
//!
//! Source: Jiang, Li, Zhang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
//! Attention", 2024.

use super::grid::{Grid, pooled_work, promises, sign};
use crate::block_mask::BlockSizes;
use crate::decider::{Decider, Decision, Promises, Work};
use crate::scores::{BlockMeans, PANEL, Turned, pooled_rows};
use crate::select::top_k;
use attn_core::simd::Isa;
use attn_core::{AttnShape, Growth, Qkv, Result, softmax_scale_or_default};

/// The `top_k` best blocks of keys of each block of queries. Time `O(n top_k block_kv)` for attention and `O((n / block)^2)`
/// for the choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MInferenceBlockSparse {
    /// No key after the query is attended.
    pub causal: bool,
    /// Queries and keys of a block.
    pub sizes: BlockSizes,
    /// Blocks of keys of each block of queries.
    pub top_k: usize,
    /// Of the scores; only its sign matters. `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for MInferenceBlockSparse {
    /// Causal, 100 blocks of 64 keys for every 64 queries, as in the paper.
    fn default() -> Self {
        Self { causal: true, sizes: BlockSizes::square(64), top_k: 100, softmax_scale: None }
    }
}

/// Scores of blocks by their means: for each block of queries, `choose(list, row, scores)` is given those of the first
/// `visible(row)` blocks of keys and lists what it takes.
pub(super) fn choose_by_means(
    grid: &Grid,
    isa: Isa,
    (q, k): (&BlockMeans, &BlockMeans),
    visible: impl Fn(usize) -> usize + Sync,
    choose: impl Fn(usize, usize, &mut [f32]) -> Vec<usize> + Sync,
) -> Vec<Vec<usize>> {
    let turned: Vec<Turned> =
        (0..grid.shape.batch * grid.shape.n_heads_kv).map(|list| Turned::of(k, list)).collect();
    grid.choose(PANEL, Vec::new, |scores, list, rows, lists| {
        let most = rows.clone().map(&visible).max().unwrap_or(0);
        let queries = &q.head(list)[rows.start * q.width()..rows.end * q.width()];
        isa.run(pooled_rows(queries, &turned[grid.kv_list(list)], most, scores));
        for (at, (row, list_of_row)) in rows.zip(lists).enumerate() {
            *list_of_row = choose(list, row, &mut scores[at * most..][..visible(row)]);
        }
    })
}

impl Decider for MInferenceBlockSparse {
    const NAME: &'static str = "minference-block-sparse";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        let grid = Grid::new(x.shape(), self.sizes, self.causal)?;
        let sign = sign(softmax_scale_or_default(self.softmax_scale, x.shape().head_dim)?);
        let isa = Isa::current();
        let means = (&BlockMeans::of(isa, x.q(), self.sizes.q), &BlockMeans::of(isa, x.k(), self.sizes.kv));
        let lists = choose_by_means(
            &grid,
            isa,
            means,
            |row| grid.started(row),
            |_, _, scores| {
                scores.iter_mut().for_each(|score| *score *= sign);
                top_k(scores, self.top_k)
            },
        );
        grid.decision(&lists)
    }

    /// Time grows with the larger part, attention or choice, at a million keys.
    fn promises(&self) -> Promises {
        let choice = (1 << 20) / self.sizes.q.saturating_mul(self.sizes.kv).max(1);
        let attention = 4 * self.top_k.saturating_mul(self.sizes.kv).min(1 << 20);
        let time = if choice > attention { Growth::Quadratic } else { Growth::Linear };
        promises(self.causal, time, Growth::Linear)
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let keys = self.top_k.saturating_mul(self.sizes.kv).min(shape.n_kv);
        let rows = (shape.batch * shape.n_heads_q * shape.n_q) as u64;
        pooled_work(shape, self.sizes, self.causal, rows * keys as u64)
    }
}
