//! Streams whose indexers are given: decoding with trained index queries and keys.
//!
//! Beside the cache of keys and values lie the index keys of all tokens; each piece brings those of its own tokens. What a
//! stream gives does not depend on how tokens are cut into pieces.

use super::block_indexer::BlockIndexer;
use super::dsa::Dsa;
use super::index_inputs::{BlockIndexerInputs, DsaInputs};
use super::key_panels::KeyPanels;
use super::router::rows_apart;
use super::rows::rows_f32;
use super::stream::cache_of;
use crate::decider::Decision;
use attn_core::{
    AttnError, AttnShape, OutMut, Qkv, Result, StreamShape, TensorView, softmax_scale_or_default,
};
use attn_flash::cache::KvCache;
use attn_flash::engine::{Problem, attend_any};
use std::fmt;

/// A stream of an indexer `I` whose index queries and keys are given: the cache of keys and values, and beside it the index keys.
pub struct IndexedStream<I> {
    indexer: I,
    shape: StreamShape,
    softmax_scale: f32,
    cache: KvCache,
    /// One series a batch entry, once their width is known.
    keys: Vec<KeyPanels<f32>>,
}

impl<I: fmt::Debug> fmt::Debug for IndexedStream<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = f.debug_struct("IndexedStream");
        words.field("indexer", &self.indexer).field("len", &self.len()).finish_non_exhaustive()
    }
}

impl<I> IndexedStream<I> {
    fn start(indexer: I, shape: StreamShape, softmax_scale: Option<f32>) -> Result<Self> {
        let softmax_scale = softmax_scale_or_default(softmax_scale, shape.head_dim)?;
        Ok(Self { indexer, shape, softmax_scale, cache: cache_of(shape)?, keys: Vec::new() })
    }

    fn append_chosen(
        &mut self,
        x: Qkv<'_>,
        index_k: &TensorView<'_>,
        out: OutMut<'_>,
        choose: impl FnOnce(&AttnShape, &[KeyPanels<f32>]) -> Result<Decision>,
    ) -> Result<()> {
        let [batch, _, n, width] = index_k.shape();
        match self.keys.first() {
            None => self.keys = (0..batch).map(|_| KeyPanels::new(width)).collect(),
            Some(keys) if keys.width() != width => {
                return Err(AttnError::shape("index_k", "width", width, keys.width()));
            }
            _ => {}
        }
        x.check_out(&out)?;
        self.cache.append(*x.k(), *x.v())?;
        for (batch, keys) in self.keys.iter_mut().enumerate() {
            let rows = rows_f32(index_k, batch, 0, 0..n);
            rows.chunks_exact(width.max(1)).for_each(|row| keys.push(row.iter().copied()));
        }
        let (k, v) = self.cache.views()?;
        let problem = Problem::cached(*x.q(), k, v, None)?;
        let shape = problem.shape();
        if shape.rows() == 0 {
            return Ok(());
        }
        let decision = choose(&shape, &self.keys)?;
        let block = decision.block_of_lists();
        attend_any(problem, out, None, &rows_apart(decision.mask(), block, self.softmax_scale, &shape))
    }

    /// Tokens appended.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Whether nothing has been appended.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.cache.bytes() + self.keys.iter().map(KeyPanels::bytes).sum::<usize>()
    }
}

/// A stream of [`Dsa`] with a given indexer.
///
/// Each appended token costs `O(n_kv index_heads index_dim)` for the scores and `O(top_k (head_dim + head_dim_v))` a query
/// head.
pub type DsaStream = IndexedStream<Dsa>;

/// A stream of [`BlockIndexer`] with a given indexer.
///
/// Each appended token costs `O(n_kv index_dim)` for the scores of a key/value group and `O(top_k block_len (head_dim +
/// head_dim_v))` a query head.
pub type BlockIndexerStream = IndexedStream<BlockIndexer>;

impl Dsa {
    /// An empty stream; `softmax_scale` is the attention's, `None` for `1/sqrt(head_dim)`.
    ///
    /// # Errors
    /// [`AttnError`] for settings or head counts that do not fit.
    pub fn stream(&self, shape: StreamShape, softmax_scale: Option<f32>) -> Result<DsaStream> {
        self.check()?;
        IndexedStream::start(*self, shape, softmax_scale)
    }
}

impl DsaStream {
    /// Appends tokens with their index queries, keys and weights; writes what the tokens attend.
    ///
    /// # Errors
    /// [`AttnError`] for tensors that do not fit the stream or each other; nothing has then been appended.
    pub fn append(&mut self, x: Qkv<'_>, index: &DsaInputs<'_>, out: OutMut<'_>) -> Result<()> {
        let dsa = self.indexer;
        self.shape.check(&x)?;
        index.check(&dsa, &x.shape())?;
        self.append_chosen(x, &index.index_k, out, |shape, keys| dsa.choose_given(shape, index, keys))
    }
}

impl BlockIndexer {
    /// An empty stream; `softmax_scale` is the attention's, `None` for `1/sqrt(head_dim)`.
    ///
    /// # Errors
    /// [`AttnError`] for settings or head counts that do not fit.
    pub fn stream(&self, shape: StreamShape, softmax_scale: Option<f32>) -> Result<BlockIndexerStream> {
        self.check()?;
        IndexedStream::start(*self, shape, softmax_scale)
    }
}

impl BlockIndexerStream {
    /// Appends tokens with their index queries and keys; writes what the tokens attend.
    ///
    /// # Errors
    /// [`AttnError`] for tensors that do not fit the stream or each other; nothing has then been appended.
    pub fn append(&mut self, x: Qkv<'_>, index: &BlockIndexerInputs<'_>, out: OutMut<'_>) -> Result<()> {
        let indexer = self.indexer;
        self.shape.check(&x)?;
        index.check(&indexer, &x.shape())?;
        self.append_chosen(x, &index.index_k, out, |shape, keys| indexer.choose_given(shape, index, keys))
    }
}
