//! What compressed attention is given, and what it gives.

use super::{CompressedAttention, Entries, EntryPooling};
use crate::routed::index_inputs::check_axes;
use attn_core::{AttnError, Result, TensorView};

/// One vector a token is key and value of all heads.
#[derive(Debug, Clone, Copy)]
pub struct CompressedInputs<'a> {
    /// `(batch, n_heads_q, n, head_dim)`.
    pub q: TensorView<'a>,
    /// Keys and values of the window, `(batch, 1, n, head_dim)`.
    pub kv_raw: TensorView<'a>,
    /// What entries are made of.
    pub compress: EntryPooling<'a>,
    /// Sink logits `[n_heads_q]`.
    pub sinks: Option<&'a [f32]>,
    /// The indexer of the sparse form.
    pub indexer: Option<EntryIndexer<'a>>,
    /// Entries that were chosen before, `[batch, n]`, each ascending; instead of an indexer.
    pub chosen: Option<&'a [Vec<usize>]>,
}

/// A lightning indexer over entries.
#[derive(Debug, Clone, Copy)]
pub struct EntryIndexer<'a> {
    /// `(batch, index heads, n, index_dim)`.
    pub q: TensorView<'a>,
    /// What the index keys are made of, as entries are.
    pub compress: EntryPooling<'a>,
    /// `[batch, index heads, n]`; the sign matters.
    pub w: &'a [f32],
}

impl CompressedInputs<'_> {
    pub(super) fn check(&self, attention: &CompressedAttention) -> Result<()> {
        attention.check()?;
        let [batch, heads, n, width] = self.q.shape();
        check_axes("kv_raw", self.kv_raw.shape(), [batch, 1, n, width])?;
        if heads == 0 || width == 0 {
            return Err(AttnError::shape("q", "heads", heads, "at least 1, of a width of at least 1"));
        }
        if let Some(sinks) = self.sinks
            && sinks.len() != heads
        {
            return Err(AttnError::shape("sinks", "n_heads_q", sinks.len(), heads));
        }
        if let Some(chosen) = self.chosen
            && chosen.len() != batch * n
        {
            return Err(AttnError::shape("chosen", "rows", chosen.len(), batch * n));
        }
        if let Some(index) = &self.indexer {
            let [_, index_heads, _, index_width] = index.q.shape();
            check_axes("index_q", index.q.shape(), [batch, index_heads.max(1), n, index_width.max(1)])?;
            if index.w.len() != batch * index_heads * n {
                return Err(AttnError::shape("index_w", "elements", index.w.len(), batch * index_heads * n));
            }
        }
        match (attention.entries, self.indexer.is_some() || self.chosen.is_some()) {
            (Entries::Heavy, true) => {
                Err(AttnError::value("indexer", "given", "nothing: all entries are seen"))
            }
            (Entries::Sparse { .. }, false) => {
                Err(AttnError::Missing { name: "index_q".into(), found: "no indexer and no choice".into() })
            }
            _ => Ok(()),
        }
    }
}

/// The result, in f32.
#[derive(Debug, Clone)]
pub struct CompressedOutputs {
    /// `[batch, n_heads_q, n, head_dim]`.
    pub out: Vec<f32>,
    /// With the sinks, `[batch, n_heads_q, n]`.
    pub lse: Vec<f32>,
    /// Entries, `[batch, n / rate, head_dim]`.
    pub compressed: Vec<f32>,
    /// Entries that were chosen, `[batch, n]`, each ascending; empty in the heavy form.
    pub chosen: Vec<Vec<usize>>,
}

/// Gradients, row-major, each as long as its input.
#[derive(Debug, Clone)]
pub struct CompressedGrads {
    /// Of the queries.
    pub q: Vec<f32>,
    /// Of the raw keys and values.
    pub kv_raw: Vec<f32>,
    /// Of what entries are made of.
    pub compress_kv: Vec<f32>,
    /// Of the gates.
    pub compress_gate: Vec<f32>,
    /// Of the bias.
    pub position_bias: Vec<f32>,
    /// Of the sinks; empty without.
    pub sinks: Vec<f32>,
}
