//! Quest: attend the pages of the cache whose keys could score highest.
//!
//! Keys lie in pages of `page_len`. Of page `P` only the largest and the smallest value of each feature are looked at,
//! which bound the score of every key in it:
//!
//! ```text
//! U(q, P) = sum_c max(q_c max_{j in P} k_jc, q_c min_{j in P} k_jc)  >=  q . k_j   for every j in P
//! A(i)    = keys of the max(3, token_budget / page_len) pages with the largest U(q_i, .)
//! ```
//!
//! each query head for itself, ties to the lower page. With `q = q+ + q-` (its positive and its negative part) the bound
//! is one product, `U = [q+, q-] . [max, min]`, of all queries with all pages.
//!
//! Causal queries take the bounds of the keys up to their position: of complete pages, and of their own page as far as it
//! goes. So the choice is strictly causal, and a stream that meets the tokens one by one makes the same one.
//! [`Quest::keep_own`] takes the own page in any case, as decoding kernels do; the paper's evaluation does not.
//!
//! Decoding one token against `n` cached keys reads `n / page_len * 2 head_dim` bounds and `token_budget` keys and values,
//! instead of `n` of both: with pages of 16, a sixteenth. A prefill scores `n^2 / page_len` pairs of query and page.
//!
//! Source: Tang, Zhao, Zhu, Xiao, Kasikci, Han, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
//! ICML 2024.

mod bounds;
mod memory;
mod select;
#[cfg(test)]
mod tests;

use crate::{BlockSizes, Builder, Decider, Decision, Memory, Promises, Work};
use attn_core::mask::{Align, Band, SeeAll};
use attn_core::{AttnError, AttnShape, Causality, Growth, Qkv, Result, StreamShape, band_pairs};
use attn_flash::stream::Kept;
use memory::QuestMemory;
use select::{Pages, bounds_of_all, choose};
use std::sync::Arc;

/// Chooses pages by their bounds; see [the crate](crate).
///
/// Time of a decoding step: `O(n_kv / page_len * head_dim + token_budget * (head_dim + head_dim_v))` a query head; memory
/// `O(n_kv / page_len * head_dim)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quest {
    /// Keys of a page.
    pub page_len: usize,
    /// Keys that a query attends, in whole pages, three at least.
    pub token_budget: usize,
    /// A query takes the page that it stands in, whatever its bound.
    pub keep_own: bool,
    /// A query sees no key after its position.
    pub causal: bool,
}

impl Default for Quest {
    /// 64 pages of 16 keys, causal.
    fn default() -> Self {
        Self { page_len: 16, token_budget: 1024, keep_own: false, causal: true }
    }
}

impl Quest {
    /// Pages that a query takes, if it sees as many.
    pub fn n_pages(&self) -> usize {
        self.token_budget.checked_div(self.page_len).unwrap_or(0).max(3)
    }

    fn check(&self) -> Result<()> {
        if self.page_len == 0 {
            return Err(AttnError::value("page_len", 0, "at least 1"));
        }
        Ok(())
    }

    /// The bound `U` of every page for every query, `[batch, n_heads_q, n_q, n_pages]`, over all keys of the page.
    ///
    /// # Errors
    /// [`AttnError::Value`] for pages of length 0.
    pub fn page_bounds(&self, x: &Qkv<'_>) -> Result<Vec<f32>> {
        self.check()?;
        Ok(select::scores(self, x))
    }

    fn mask(&self, x: &Qkv<'_>, pages: &Pages) -> Result<Decision> {
        let shape = x.shape();
        if shape.rows() == 0 {
            return Ok(Decision::new(SeeAll));
        }
        let mut builder = Builder::new(&shape, BlockSizes { q: 1, kv: self.page_len })
            .per_batch()
            .per_head(shape.n_heads_q);
        if self.causal {
            builder = builder.inside(Arc::new(Band::causal(&shape, Align::BottomRight)));
        }
        let mask = builder.from_rows(|batch, head, row| pages.row(&shape, [batch, head, row]))?;
        Ok(Decision::by_lists(mask))
    }
}

impl Decider for Quest {
    const NAME: &'static str = "quest";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        self.check()?;
        let bounds = bounds_of_all(self, x.k(), !self.causal);
        self.mask(x, &choose(self, x, &bounds))
    }

    fn promises(&self) -> Promises {
        Promises {
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            key_order_free: false,
            cross_lengths: true,
            time: Growth::Quadratic,
            memory: Growth::Linear,
            kept: self.causal.then_some(Kept { sinks: 0, last: None }),
        }
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let budget = self.n_pages().saturating_mul(self.page_len);
        let heads = (shape.batch * shape.n_heads_q) as u64;
        let (pairs, scored) = if self.causal {
            let causal = Band::causal(shape, Align::BottomRight);
            let window = Band { left: Some(budget.saturating_sub(1)), ..causal };
            (band_pairs(shape, &window), band_pairs(shape, &causal))
        } else {
            let all = shape.n_q as u64 * shape.n_kv as u64;
            (all.min(shape.n_q as u64 * budget as u64), all)
        };
        let width = 2 * shape.head_dim as u64;
        let n_pages = shape.n_kv.div_ceil(self.page_len.max(1)) as u64;
        let bounds = (shape.batch * shape.n_heads_kv) as u64 * n_pages * width * 4;
        // A page number of the choice, then an entry of the mask.
        let lists = shape.rows() as u64 * n_pages.min(self.n_pages() as u64) * 9;
        Work {
            pairs: heads * pairs,
            decision_flops: heads * 2 * width * scored / self.page_len.max(1) as u64,
            decision_bytes: bounds + lists,
        }
    }

    fn memory(&self, shape: &StreamShape) -> Option<Box<dyn Memory>> {
        Some(Box::new(QuestMemory::new(*self, shape)))
    }
}
