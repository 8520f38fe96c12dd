//! Native sparse attention: compress, select, slide, and a gated sum.
//!
//! For a query at position `p = i + n_kv - n_q`, with gates `g` in `[0, 1]`, one a branch:
//!
//! ```text
//! out_i = g_c C_i + g_s S_i + g_w W_i
//! C_i   = softmax attention to the compressed keys and values of blocks [c t, c t + l) that end at p or before
//! S_i   = softmax attention to selected blocks [b l', (b + 1) l') of keys, j <= p
//! W_i   = softmax attention to the last w keys
//! ```
//!
//! Blocks are compressed by their mean, or are given compressed (by a trained network). Blocks are selected by the
//! probabilities `P_ic` of the compressed branch, each spread over the keys of its block:
//!
//! ```text
//! importance(i, b) = sum_{heads of the kv group} sum_c P_ic |[c t, c t + l) and [b l', (b + 1) l')| / t
//! ```
//!
//! the paper's sum over overlapping compressed blocks (equation 9), which is the block's own probability where
//! `l = t = l'`. A query's own block, the first and the previous one are always among the `n_selected`; they take slots in
//! that order. The heads of a key/value group share the choice. Causality is strict.
//!
//! Without given gates all branches count alike. Gradients flow through all three branches, through the means, and to the gates; not
//! through the choice. Special cases: `w >= n` with gates `(0, 0, 1)`, and as many slots as blocks with `(0, 1, 0)`, are dense
//! causal attention.
//!
//! Cost of a query: `n / 2t` compressed keys (scored twice in prefill), `n_selected l' + w` keys. Decoding reads the compressed
//! keys and values, the selected blocks and the window.
//!
//! Source: Yuan, Gao, Dai et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention", 2025.

mod attention;
mod branches;
mod compression;
mod gradients;
mod importance;
mod inputs;
mod segment;
mod stream;

pub use inputs::{CompressedKv, NsaBranch, NsaGates, NsaGrads, NsaInputs, NsaOutputs};
pub use stream::NsaStream;

use super::ended::n_ended;
use attn_core::{AttnError, Result};
pub(super) use importance::GroupProbabilities;
pub(super) use segment::{Segment, Weigh};

/// Sizes of the three branches; see the module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nsa {
    /// Keys of a compressed block, `l`.
    pub compress_len: usize,
    /// Keys from one compressed block's start to the next one's, `t`.
    pub compress_stride: usize,
    /// Keys of a selected block, `l'`.
    pub select_len: usize,
    /// Blocks that a query selects.
    pub n_selected: usize,
    /// Last keys seen, the query's own included; 0 leaves the branch out.
    pub window: usize,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

impl Default for Nsa {
    /// The paper's sizes.
    fn default() -> Self {
        Self {
            compress_len: 32,
            compress_stride: 16,
            select_len: 64,
            n_selected: 16,
            window: 512,
            softmax_scale: None,
        }
    }
}

impl Nsa {
    fn check(&self) -> Result<()> {
        let sizes = [
            ("compress_len", self.compress_len),
            ("compress_stride", self.compress_stride),
            ("select_len", self.select_len),
            ("n_selected", self.n_selected),
        ];
        match sizes.iter().find(|(_, size)| *size == 0) {
            Some((name, _)) => Err(AttnError::value(*name, 0, "at least 1")),
            None => Ok(()),
        }
    }

    /// Compressed blocks that end within the first `n` keys.
    fn n_complete(&self, n: usize) -> usize {
        n_ended(n, self.compress_len, self.compress_stride)
    }

    /// Branches that take part.
    fn n_branches(&self) -> usize {
        if self.window == 0 { 2 } else { 3 }
    }
}
