//! Sparse attention: deciders choose which pairs are attended, the exact tile engine attends them.
//!
//! | variant | a query at position `p` sees |
//! |---|---|
//! | [`BidirectionalSpans`] | keys up to itself, and all of its own span |
//! | [`BlockIndexer`] | the blocks with the largest token score of an indexer |
//! | [`BlockMask`] | what a list of blocks, a predicate or a dense mask says |
//! | [`ChunkedCausal`] | its own chunk of `chunk_len` positions, up to itself |
//! | [`CompressedAttention`] | its window, and entries that stand for many tokens: all, or those an indexer chooses |
//! | [`DilatedWindow`] | every `dilation`-th key near it |
//! | [`Documents`] | its own document |
//! | [`Dsa`] | the tokens that a lightning indexer scores highest |
//! | [`ExactTopK`] | the `k` keys of largest score, exactly |
//! | [`FlexPrefill`] | columns and diagonals of blocks, or blocks by their means, by head |
//! | [`LocalBuckets`] | its own bucket of positions and the neighbouring ones |
//! | [`LongNet`] | every `r`-th position of long segments, for several of both, merged |
//! | [`MInferenceBlockSparse`] | the best blocks by the means of blocks |
//! | [`Moba`] | its own chunk, and those whose mean key fits best |
//! | [`Nsa`] | compressed blocks, selected blocks and a window, summed with gates |
//! | [`Padded`] | keys inside the sequence |
//! | [`PerHead`] | by one pattern in some heads, by another in the others |
//! | [`PrefixLm`] | keys up to itself, and the prefix |
//! | [`SinkWindow`] | the first `n_sinks` keys and the last `window`, itself included |
//! | [`SlidingWindow`] | keys `p - left ..= p + right` |
//! | [`SpargeAttn`] | blocks by the mass of their means, and those whose rows are not alike |
//! | [`Union`], [`Intersection`] | what either of two patterns sees, or both |
//! | [`VerticalSlash`] | keys and distances that the last queries attend |
//! | [`XAttention`] | blocks that hold a share of the mass on antidiagonals |
//!
//! A variant is a [`Decider`]: its choice and its words. Most are a [`Pattern`], known from the shape alone. Everything
//! else, from the log-sum-exp to gradients and streaming, is shared ([`SparseAttention`]).
//! Deciders that choose row by row from a summary of the keys are a [`Router`], run by [`Routed`].
//! What a decider chooses is a mask, usually a [`BlockMask`].

mod attend;
mod attention;
mod block_mask;
mod decider;
mod longnet;
mod pairs;
mod patterns;
mod prefill;
mod registry;
mod residues;
mod routed;
mod score_rule;
mod scores;
pub mod select;

pub use attention::{BiasGrad, SparseAttention, SparseGrads};
pub use block_mask::{BlockMask, BlockSizes, Builder, FlexLists, PaddedLists, SharedMask};
pub use decider::{Decider, Decision, Pattern, Promises, Work};
pub use longnet::{Branch, LongNet};
pub use patterns::{
    BidirectionalSpans, ChunkedCausal, DilatedWindow, DocumentLayout, Documents, HeadChoice, Intersection,
    LocalBuckets, Padded, PerHead, PrefixLm, SinkWindow, SlidingWindow, SpanLayout, Union,
};
pub use prefill::{
    ExactTopK, FlexPrefill, Lines, MInferenceBlockSparse, SpargeAttn, VerticalSlash, XAttention,
};
pub use registry::registry;
pub use residues::{Class, Residues};
pub use routed::{
    BlockIndexer, BlockIndexerInputs, ChunkMeans, CompressedAttention, CompressedGrads, CompressedInputs,
    CompressedKv, CompressedOutputs, Decided, Dsa, DsaInputs, Entries, EntryIndexer, IndexKeys, Moba, Nsa,
    NsaBranch, NsaGates, NsaGrads, NsaInputs, NsaOutputs, Pooling, Routed, Router,
};
pub use score_rule::{Reads, ScoreRule, SharedScoreMod};

/// Query heads over all batch entries.
fn heads(shape: &attn_core::AttnShape) -> u64 {
    (shape.batch * shape.n_heads_q) as u64
}
