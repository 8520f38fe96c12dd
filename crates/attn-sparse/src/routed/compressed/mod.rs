//! Compressed sparse and compressed heavy attention: raw keys near the query and compressed entries far from it, in one softmax.
//!
//! Every `m` tokens become one entry, a mean weighted for each feature by a softmax over learned gates and a bias of the place:
//!
//! ```text
//! heavy:    C_e = sum_{j in window e} w_j x_j                         w = softmax_j(gate_j + bias_{j mod m})
//! sparse:   C_e = sum_{j in window e - 1} w_j a_j + sum_{j in window e} w'_j b_j
//! ```
//!
//! where the sparse form has two series `a`, `b` a token and one softmax over the `2m` slots (`m` for the first entry). A query at
//! position `p` sees entries `e < floor((p + 1) / m)`: all of them in the heavy form (`m` is large), the `top_k` that a lightning
//! indexer over entries scores highest in the sparse form (`m` is small). With the raw keys of the last `window` positions and a sink
//! logit `b_h` that has no value:
//!
//! ```text
//! out_i = sum_{j in window(p)} e^(s_ij - L_i) v_j + sum_{e chosen} e^(s_ie - L_i) C_e      L_i = ln(sum e^s_ij + sum e^s_ie + e^b_h)
//! ```
//!
//! Given tensors ([`CompressedInputs`]), one vector a token is key and value of all heads, as in the paper. With `q`, `k` and `v` alone,
//! entries are means of each key/value head's keys and values (gates of 0), the indexer reads `index_dim` channels of `q` and of
//! the entries with weights of 1, chooses for each key/value group, and there are no sinks. Causality is strict.
//!
//! Cost of a query: `n / 2m` index scores (sparse) or attended entries (heavy), `top_k + window` attended keys. A stream keeps the
//! window, the entries, and the narrow keys of the indexer.
//!
//! Source: DeepSeek-V4 as in Hugging Face transformers, 2026.

mod attend;
mod attention;
mod entries;
mod given_stream;
mod gradients;
mod inputs;
mod pooling;
mod stream;

pub use given_stream::CompressedGivenStream;
pub use inputs::{CompressedGrads, CompressedInputs, CompressedOutputs, EntryIndexer};
pub use pooling::EntryPooling;

use attn_core::{AttnError, Result};

/// Sizes; see the module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CompressedAttention {
    /// Tokens of an entry, `m`.
    pub rate: usize,
    /// Last raw keys seen, the query's own included; at least 1.
    pub window: usize,
    /// Which entries are seen.
    pub entries: Entries,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
}

/// Which entries a query sees, and how they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entries {
    /// All, each of its own tokens: compressed heavy attention.
    Heavy,
    /// Those that an indexer scores highest, each of its own tokens and the ones before: compressed sparse attention.
    Sparse {
        /// Entries that a query sees.
        top_k: usize,
        /// Channels of the index where none is given; `None` is a quarter of `head_dim`.
        index_dim: Option<usize>,
    },
}

impl CompressedAttention {
    fn check(&self) -> Result<()> {
        let top_k = if let Entries::Sparse { top_k, .. } = self.entries { top_k } else { 1 };
        let sizes = [("rate", self.rate), ("window", self.window), ("top_k", top_k)];
        match sizes.iter().find(|(_, size)| *size == 0) {
            Some((name, _)) => Err(AttnError::value(*name, 0, "at least 1")),
            None => Ok(()),
        }
    }

    fn is_sparse(&self) -> bool {
        self.entries != Entries::Heavy
    }
}
