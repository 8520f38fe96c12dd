//! Trainable selection: each query is routed to blocks or tokens.
//!
//! | variant | chooses | by |
//! |---|---|---|
//! | [`Moba`] | chunks, for each query head | the mean of a chunk's keys |
//! | [`Dsa`] | tokens, for all heads | a lightning indexer |
//! | [`BlockIndexer`] | blocks, for a key/value group | the largest token score in a block |
//! | [`InfLlm`] | blocks, for a key/value group | the largest probability of a mean key in a block |
//! | [`MagicPig`] | a sample of the tokens, for each query head | equal hashes |
//! | [`ArkVale`], [`DoubleSparsity`], [`InfLlmMemory`], [`Loki`] | pages or tokens | what is noted of them ([`PageScorer`]) |
//!
//! These are [`Router`]s, run by [`Routed`]. [`Nsa`] also chooses blocks for a key/value group, by the probabilities of
//! compressed blocks, and adds them to two other branches; [`CompressedAttention`] attends entries that stand for many tokens.

mod block_indexer;
mod block_maxima;
mod compressed;
mod decided;
mod dsa;
mod ended;
mod given_streams;
mod index_channels;
mod index_inputs;
mod indexer;
mod indexer_training;
mod infllm;
mod key_panels;
mod magic_pig;
mod moba;
mod nsa;
mod numbers;
mod overlaps;
mod pages;
mod router;
mod rows;
mod stream;

pub use block_indexer::BlockIndexer;
pub use compressed::{
    CompressedAttention, CompressedGivenStream, CompressedGrads, CompressedInputs, CompressedOutputs,
    Entries, EntryIndexer, EntryPooling,
};
pub use decided::Decided;
pub(crate) use decided::given_lists;
pub use dsa::Dsa;
pub use given_streams::{BlockIndexerStream, DsaStream, IndexedStream};
pub use index_channels::IndexKeys;
pub use index_inputs::{BlockIndexerInputs, DsaInputs};
pub use indexer_training::{IndexTarget, IndexerGrads};
pub use infllm::{InfLlm, KeyMeans};
pub use magic_pig::{HashedKeys, MagicPig};
pub use moba::{ChunkMeans, Moba};
pub use nsa::{CompressedKv, Nsa, NsaBranch, NsaGates, NsaGrads, NsaInputs, NsaOutputs, NsaStream};
pub use pages::{
    ArkVale, DoubleSparsity, InfLlmMemory, Loki, PageNotes, PageScorer, Pages, Representatives, Volume,
};
pub use router::{Routed, Router};
