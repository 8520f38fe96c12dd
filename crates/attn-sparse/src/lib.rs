//! Sparse attention: deciders choose which pairs are attended, the exact tile engine attends them.
//!
//! | variant | a query at position `p` sees |
//! |---|---|
//! | [`SlidingWindow`] | keys `p - left ..= p + right` |
//! | [`SinkWindow`] | the first `n_sinks` keys and the last `window`, itself included |
//! | [`ChunkedCausal`] | its own chunk of `chunk_len` positions, up to itself |
//!
//! A variant is a [`Decider`]: its choice and its words. Most are a [`Pattern`], known from the shape alone. Everything
//! else, from the log-sum-exp to gradients and streaming, is shared ([`SparseAttention`]).
//! What a decider chooses is a mask, usually a [`BlockMask`].

mod attention;
mod block_mask;
mod decider;
mod patterns;
mod registry;
mod routed;
pub mod select;

pub use attention::SparseAttention;
pub use block_mask::{BlockMask, BlockSizes, Builder, SharedMask};
pub use decider::{Decider, Decision, Pattern, Promises, Work};
pub use patterns::{ChunkedCausal, SinkWindow, SlidingWindow};
pub use registry::registry;
pub use routed::{BlockIndexer, BlockIndexerInputs, ChunkMeans, Decided, Dsa, DsaInputs, IndexKeys, Moba, Routed, Router};

/// Query heads over all batch entries.
fn heads(shape: &attn_core::AttnShape) -> u64 {
    (shape.batch * shape.n_heads_q) as u64
}
