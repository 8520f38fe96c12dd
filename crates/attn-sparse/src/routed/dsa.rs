//! DeepSeek sparse attention: a lightning indexer scores every token, each query attends the best.
//!
//! ```text
//! I(i, j) = sum_h w_ih relu(qI_ih . kI_j)          A(i) = the top_k largest I(i, j) among j <= p
//! ```
//!
//! One key series `kI`, narrower than the keys, serves all heads, and so does the choice; positive factors common to a row
//! change nothing. Given tensors `index_q`, `index_k`, `index_w` ([`DsaInputs`]) the choice is as in the paper. Without them,
//! each key/value head chooses for its group of query heads, by `index_dim` channels of `q` and `k` and weights of 1. With
//! `top_k >= n` it is dense causal attention.
//!
//! Cost of a query: `n / 2` index scores of `index_dim` channels, and `top_k` attended keys. Decoding reads `2 index_dim` bytes a
//! cached token and head, and the chosen keys. Gradients flow through the chosen pairs; the paper trains the indexer apart,
//! towards the attention's own probabilities.
//!
//! Source: DeepSeek-AI, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", 2025.

use super::index_channels::{IndexKeys, work};
use super::indexer::{RowSelector, select};
use super::key_panels::SAMPLING;
use super::router::{Router, list_bytes, pairs_up_to, visible};
use crate::block_mask::lists::{Lists, Slot};
use crate::decider::Work;
use crate::select::largest::Largest;
use crate::{BlockMask, BlockSizes, Builder};
use attn_core::simd::Simd;
use attn_core::{AttnError, AttnShape, Growth, Result, StreamShape, TensorView};

/// Each query attends the `top_k` keys that an indexer scores highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dsa {
    /// Keys that a query sees.
    pub top_k: usize,
    /// Channels of the index where none is given; `None` is a quarter of `head_dim`.
    pub index_dim: Option<usize>,
}

impl Dsa {
    pub(super) fn check(&self) -> Result<()> {
        if self.top_k == 0 {
            return Err(AttnError::value("top_k", 0, "at least 1"));
        }
        Ok(())
    }
}

/// The largest scores of each row.
pub(super) struct LargestTokens<V> {
    pub(super) top_k: usize,
    /// Entries that a row sees.
    pub(super) visible: V,
}

impl<V: Fn(usize) -> usize + Sync> RowSelector for LargestTokens<V> {
    type State = Largest;

    fn visible(&self, row: usize) -> usize {
        (self.visible)(row)
    }

    fn takes_all(&self, row: usize) -> Option<usize> {
        Some(self.visible(row)).filter(|visible| *visible <= self.top_k)
    }

    fn most(&self) -> usize {
        self.top_k
    }

    /// Three standard deviations beyond the members that the sample has on average.
    fn rank_in_sample(&self, row: usize) -> Option<usize> {
        let share = self.top_k as f64 / SAMPLING as f64;
        (self.visible(row) > 4 * self.top_k).then(|| (share + 3.0 * share.sqrt() + 1.0).ceil() as usize)
    }

    fn start(&self, largest: &mut Largest, _: usize, guess: Option<f32>) {
        largest.start(self.top_k, guess);
    }

    #[inline(always)]
    fn take<S: Simd>(&self, simd: S, largest: &mut Largest, first: usize, scores: &[f32]) {
        largest.take(simd, first, scores);
    }

    fn merge(&self, largest: &mut Largest, later: &Largest) {
        largest.append(later);
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, _: usize, largest: &mut Largest, mut list: Slot<'_>) -> bool {
        let taken = largest.finish(simd);
        taken.iter().for_each(|taken| list.append(taken));
        taken.is_some()
    }
}

/// Lists of single keys, `[batch, lists, rows]`, each ascending, for `lists` groups of query heads.
pub(super) fn tokens(shape: &AttnShape, lists: usize, chosen: Lists) -> Result<BlockMask> {
    let builder = Builder::new(shape, BlockSizes::square(1)).per_batch().per_head(lists.max(1));
    builder.ascending_lists(chosen)
}

impl Router for Dsa {
    const NAME: &'static str = "dsa";

    type Summary = IndexKeys;

    fn summary(&self, shape: &StreamShape) -> Result<IndexKeys> {
        self.check()?;
        IndexKeys::new(self.index_dim, shape)
    }

    fn append(&self, index: &mut IndexKeys, k: &TensorView<'_>) {
        index.append(k);
    }

    fn bytes(&self, index: &IndexKeys) -> usize {
        index.bytes()
    }

    fn choose(&self, index: &IndexKeys, q: &TensorView<'_>, shape: &AttnShape) -> Result<BlockMask> {
        let queries = index.queries_of_groups(q, shape, true).rounded();
        let largest = LargestTokens { top_k: self.top_k, visible: |row| visible(shape, row) };
        let chosen = select(&queries, |list| &index.heads[list], &largest);
        tokens(shape, shape.n_heads_kv, chosen)
    }

    fn entries(&self) -> usize {
        self.top_k
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let (decision_flops, bytes) = work(self.index_dim, shape);
        let decision_bytes = bytes + list_bytes(shape, shape.n_heads_kv, self.top_k.min(shape.n_kv));
        Work { pairs: pairs_up_to(shape, self.top_k), decision_flops, decision_bytes }
    }

    fn growth(&self) -> Growth {
        Growth::Quadratic
    }
}
