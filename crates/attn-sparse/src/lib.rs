//! Sparse attention: deciders choose which pairs are attended, the exact tile engine attends them.
//!
//! | variant | a query at position `p` sees |
//! |---|---|
//! | [`SlidingWindow`] | keys `p - left ..= p + right` |
//! | [`SinkWindow`] | the first `n_sinks` keys and the last `window`, itself included |
//! | [`ChunkedCausal`] | its own chunk of `chunk_len` positions, up to itself |
//! | [`Longformer`] | a window and global tokens; global tokens see everything, also with projections of their own |
//! | [`BigBird`] | blocks: neighbours, first and last, random ones |
//! | [`FixedLayout`], [`VariableLayout`], [`BigBirdLayout`], [`LongformerLayout`], [`LocalLayout`] | blocks, as options say |
//! | [`StridedAttention`] | a window and every `stride`-th key before (Sparse Transformer) |
//! | [`FixedAttention`] | its own block and the last keys of the blocks before (Sparse Transformer) |
//! | [`Neighborhood`] | a window of constant size in one, two or three dimensions |
//!
//! A variant is a [`Decider`]: its choice and its words. Most are a [`Pattern`], known from the shape alone. Everything
//! else, from the log-sum-exp to gradients and streaming, is shared ([`SparseAttention`]).
//! What a decider chooses is a mask, usually a [`BlockMask`].

mod attention;
mod block_mask;
mod decider;
mod parts;
mod patterns;
mod registry;

pub use attention::SparseAttention;
pub use block_mask::{BlockMask, BlockSizes, Builder, SharedMask};
pub use decider::{Decider, Decision, Pattern, Promises, Work};
pub use parts::{Order, Part, Parted, PartedAttention};
pub use patterns::{
    AxisWindow, BigBird, BigBirdLayout, BlockLayout, ChunkedCausal, FixedAttention, FixedLayout,
    GlobalBlocks, GlobalProjections, GlobalTokens, LocalLayout, Longformer, LongformerLayout, Neighborhood,
    ProjectedGrads, SinkWindow, SlidingWindow, StridedAttention, VariableLayout,
};
pub use registry::registry;

/// Query heads over all batch entries.
fn heads(shape: &attn_core::AttnShape) -> u64 {
    (shape.batch * shape.n_heads_q) as u64
}
