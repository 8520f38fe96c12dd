//! How large the blocks of the backward pass are.

use super::weights::LANES;
use crate::engine::problem::Problem;
use attn_core::mask::{Head, Mask};
use std::ops::Range;

/// Block sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    /// Keys of a tile.
    pub(super) block_kv: usize,
    /// Keys whose rows and gradients stay in the second-level cache while queries pass by.
    pub(super) span: usize,
    /// How many times larger blocks are where few of their pairs are seen: what a meeting costs beside its pairs is then worth
    /// it again.
    spread: usize,
}

/// Blocks of rows of which the mask is asked how much they see.
const SAMPLES: usize = 8;

/// The share of the keys in the spans of some rows, evenly spread over heads and sequences.
fn share_seen<M: Mask + ?Sized>(problem: &Problem<'_>, mask: &M) -> f64 {
    let n_heads = problem.shape().n_heads_q.max(1);
    let (mut seen, mut all) = (0, 0);
    for x in 0..SAMPLES {
        let sequence = x * problem.n_sequences() / SAMPLES;
        let (n_q, n_kv) = (problem.q_range(sequence).len(), problem.kv_range(sequence).len());
        if n_q == 0 || n_kv == 0 {
            continue;
        }
        // Later rows come with later samples, whatever the head.
        let first = x * n_q.saturating_sub(LANES) / (SAMPLES - 1);
        let head = Head { batch: sequence, head: x * 5 % n_heads };
        let spans = mask.spans(head, first..(first + LANES).min(n_q), n_kv);
        seen += spans.iter().map(Range::len).sum::<usize>();
        all += n_kv;
    }
    if all == 0 { 1.0 } else { seen as f64 / all as f64 }
}

impl Tiles {
    /// Measured choice.
    pub(super) fn auto<M: Mask + ?Sized>(problem: &Problem<'_>, mask: &M) -> Self {
        let shape = problem.shape();
        let spread = match share_seen(problem, mask) {
            ..0.15 => 4,
            ..0.3 => 2,
            _ => 1,
        };
        // Rows of k and v and their gradients take 512 KiB, twice as much where most are not touched.
        let span = (1 << 16) / (shape.head_dim + shape.head_dim_v) * usize::min(spread, 2);
        Self { block_kv: 64, span: (span / 64 * 64).clamp(64, 1024), spread }
    }

    /// Rows of a block of a sequence of `n`: few enough blocks that their meetings are a short list, enough of them to keep
    /// threads busy.
    pub(super) fn block(self, n: usize) -> usize {
        let least = if n <= 2048 { 256 } else { 512 };
        let most = n.div_ceil(8).next_multiple_of(least);
        n.div_ceil(32).next_multiple_of(least).max((least * self.spread).min(most)).max(least)
    }
}
