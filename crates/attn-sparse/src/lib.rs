//! Sparse attention: deciders choose which pairs are attended, the exact tile engine attends them.
//!
//! | variant | a query at position `p` sees |
//! |---|---|
//! | [`ArkVale`] | the pages of keys whose enclosing volumes promise the largest scores |
//! | [`Axial`] | lines of a grid through it |
//! | [`BidirectionalSpans`] | keys up to itself, and all of its own span |
//! | [`BigBird`] | blocks: neighbours, first and last, random ones |
//! | [`BlockIndexer`] | the blocks with the largest token score of an indexer |
//! | [`BlockMask`] | what a list of blocks, a predicate or a dense mask says |
//! | [`ChunkedCausal`] | its own chunk of `chunk_len` positions, up to itself |
//! | [`CompressedAttention`] | its window, and entries that stand for many tokens: all, or those an indexer chooses |
//! | [`DilatedWindow`] | every `dilation`-th key near it |
//! | [`Documents`] | its own document |
//! | [`DoubleSparsity`] | the tokens whose products over a few channels are largest |
//! | [`Dsa`] | the tokens that a lightning indexer scores highest |
//! | [`ExactTopK`] | the `k` keys of largest score, exactly |
//! | [`FixedAttention`] | its own block and the last keys of the blocks before (Sparse Transformer) |
//! | [`FixedLayout`], [`VariableLayout`], [`BigBirdLayout`], [`LongformerLayout`], [`LocalLayout`] | blocks, as options say |
//! | [`FlexPrefill`] | columns and diagonals of blocks, or blocks by their means, by head |
//! | [`KvEviction`] | what a policy has not evicted yet: H2O, SnapKV, TOVA, StreamingLLM, key norms, ... |
//! | [`InfLlm`] | blocks by the probabilities of mean keys, first and last blocks |
//! | [`InfLlmMemory`] | the blocks whose representative keys fit best, first and last blocks |
//! | [`LocalBuckets`] | its own bucket of positions and the neighbouring ones |
//! | [`Loki`] | the tokens whose products along the keys' principal axes are largest |
//! | [`Longformer`] | a window and global tokens; global tokens see everything, also with projections of their own |
//! | [`LongNet`] | every `r`-th position of long segments, for several of both, merged |
//! | [`MagicPig`] | a sample of the tokens by hash tables, each weighing as many as it stands for |
//! | [`MInferenceBlockSparse`] | the best blocks by the means of blocks |
//! | [`Moba`] | its own chunk, and those whose mean key fits best |
//! | [`Neighborhood`] | a window of constant size in one, two or three dimensions |
//! | [`Nsa`] | compressed blocks, selected blocks and a window, summed with gates |
//! | [`Padded`] | keys inside the sequence |
//! | [`PerHead`] | by one pattern in some heads, by another in the others |
//! | [`PrefixLm`] | keys up to itself, and the prefix |
//! | [`Quest`] | the pages of keys whose bounds promise the largest scores |
//! | [`Reformer`] | keys whose hash sorts them near it, in several rounds |
//! | [`Routing`] | the keys nearest to the centroids that it is nearest to |
//! | [`Sinkhorn`] | its own bucket of positions, and mixtures of others |
//! | [`SinkWindow`] | the first `n_sinks` keys and the last `window`, itself included |
//! | [`SlidingTile`], [`Radial`], [`VideoHeads`] | tokens of a video near it in space and time |
//! | [`SlidingWindow`] | keys `p - left ..= p + right` |
//! | [`SpargeAttn`] | blocks by the mass of their means, and those whose rows are not alike |
//! | [`StridedAttention`] | a window and every `stride`-th key before (Sparse Transformer) |
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
mod decode;
mod longnet;
mod mass;
mod memory;
mod pairs;
mod parts;
mod patterns;
mod picture;
mod prefill;
mod profile;
mod registry;
mod residues;
mod routed;
mod score_rule;
mod scores;
pub mod select;
mod sorted;
mod store;

pub use attention::{BiasGrad, SparseAttention, SparseGrads};
pub use block_mask::{
    BlockColumns, BlockMask, BlockSizes, BlockStatistics, Builder, FlexLists, PaddedLists, SharedMask, Spread,
};
pub use decider::{Decider, Decision, Pattern, Promises, Work};
pub use decode::{
    EvictionPolicy, EvictionStream, Importance, KvEviction, Pooling, Quest, Share, Survivors, pyramid_budgets,
};
pub use longnet::{Branch, LongNet};
pub use mass::{Mass, RowMass};
pub use memory::Memory;
pub use parts::{Order, Part, Parted, PartedAttention};
pub use patterns::{
    Axial, AxisWindow, BidirectionalSpans, BigBird, BigBirdLayout, BlockLayout, ChunkedCausal, DilatedWindow,
    DocumentLayout, Documents, FixedAttention, FixedLayout, GlobalBlocks, GlobalProjections, GlobalTokens,
    HeadChoice, Intersection, LocalBuckets, LocalLayout, Longformer, LongformerLayout, Neighborhood, Padded,
    PerHead, PrefixLm, ProjectedGrads, Radial, SeenBlocks, SinkWindow, SlidingTile, SlidingWindow,
    SpanLayout, StridedAttention, Union, VariableLayout, VideoHeads, VideoKinds,
};
pub use picture::Picture;
pub use prefill::{
    ExactTopK, FlexPrefill, Lines, MInferenceBlockSparse, SpargeAttn, VerticalSlash, XAttention,
};
pub use registry::registry;
pub use residues::{Class, Residues};
pub use routed::{
    ArkVale, BlockIndexer, BlockIndexerInputs, BlockIndexerStream, ChunkMeans, CompressedAttention,
    CompressedGivenStream, CompressedGrads, CompressedInputs, CompressedKv, CompressedOutputs, Decided,
    DoubleSparsity, Dsa, DsaInputs, DsaStream, Entries, EntryIndexer, EntryPooling, HashedKeys, IndexKeys,
    IndexTarget, IndexedStream, IndexerGrads, InfLlm, InfLlmMemory, KeyMeans, Loki, MagicPig, Moba, Nsa,
    NsaBranch, NsaGates, NsaGrads, NsaInputs, NsaOutputs, NsaStream, PageNotes, PageScorer, Pages,
    Representatives, Routed, Router, Volume,
};
pub use score_rule::{Reads, ScoreRule, SharedScoreMod};
pub use sorted::{
    Hashing, Reformer, Routing, RoutingGrads, RoutingInputs, Sinkhorn, SinkhornGrads, SinkhornInputs,
    SinkhornKind,
};

/// Query heads over all batch entries.
fn heads(shape: &attn_core::AttnShape) -> u64 {
    (shape.batch * shape.n_heads_q) as u64
}
