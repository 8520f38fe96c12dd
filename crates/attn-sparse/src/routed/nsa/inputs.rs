//! What native sparse attention is given, and what it gives.

use super::Nsa;
use crate::routed::index_inputs::check_axes;
use attn_core::{AttnError, AttnShape, Qkv, Result, TensorView};

/// Gates of the branches, `[batch, n_heads_q, n_q]` each.
#[derive(Debug, Clone, Copy)]
pub struct NsaGates<'a> {
    /// Of the compressed branch.
    pub compress: &'a [f32],
    /// Of the selected branch.
    pub select: &'a [f32],
    /// Of the window; needed unless there is none.
    pub window: Option<&'a [f32]>,
}

/// Compressed blocks made elsewhere; those that end after a query's position are not seen.
#[derive(Debug, Clone, Copy)]
pub struct CompressedKv<'a> {
    /// `(batch, n_heads_kv, blocks, head_dim)`.
    pub k: TensorView<'a>,
    /// `(batch, n_heads_kv, blocks, head_dim_v)`.
    pub v: TensorView<'a>,
}

/// Everything that a call reads.
#[derive(Debug, Clone, Copy)]
pub struct NsaInputs<'a> {
    /// Queries, keys and values.
    pub qkv: Qkv<'a>,
    /// `None`: all branches count alike.
    pub gates: Option<NsaGates<'a>>,
    /// `None`: means of blocks.
    pub compressed: Option<CompressedKv<'a>>,
    /// Blocks that were selected before, `[batch, n_heads_kv, n_q]`, each ascending; `None` selects.
    pub selected: Option<&'a [Vec<usize>]>,
}

impl<'a> NsaInputs<'a> {
    /// Queries, keys and values alone.
    pub fn new(qkv: Qkv<'a>) -> Self {
        Self { qkv, gates: None, compressed: None, selected: None }
    }

    pub(super) fn check(&self, nsa: &Nsa) -> Result<()> {
        nsa.check()?;
        let s = self.qkv.shape();
        if let Some(gates) = &self.gates {
            let window = match (gates.window, nsa.window) {
                (None, 0) => s.rows(),
                (Some(_), 0) => {
                    return Err(AttnError::value("gate_window", "given", "nothing, as there is no window"));
                }
                (window, _) => window.map_or(0, <[f32]>::len),
            };
            let lens = [("gate_compress", gates.compress.len()), ("gate_select", gates.select.len())];
            for (name, len) in lens.into_iter().chain([("gate_window", window)]) {
                if len != s.rows() {
                    return Err(AttnError::shape(name, "elements", len, s.rows()));
                }
            }
        }
        if let Some(CompressedKv { k, v }) = &self.compressed {
            let blocks = k.shape()[2].max(nsa.n_complete(s.n_kv));
            check_axes("k_compress", k.shape(), [s.batch, s.n_heads_kv, blocks, s.head_dim])?;
            check_axes("v_compress", v.shape(), [s.batch, s.n_heads_kv, blocks, s.head_dim_v])?;
        }
        let rows = s.batch * s.n_heads_kv * s.n_q;
        match self.selected {
            Some(lists) if lists.len() != rows => {
                Err(AttnError::shape("selected", "rows", lists.len(), rows))
            }
            _ => Ok(()),
        }
    }
}

/// The result and its parts, in f32: outputs `[batch, n_heads_q, n_q, head_dim_v]`, log-sum-exps `[batch, n_heads_q, n_q]`.
#[derive(Debug, Clone)]
pub struct NsaOutputs {
    /// The gated sum.
    pub out: Vec<f32>,
    /// The compressed branch.
    pub compress: NsaBranch,
    /// The selected branch.
    pub select: NsaBranch,
    /// The window, if there is one.
    pub window: Option<NsaBranch>,
    /// Selected blocks, `[batch, n_heads_kv, n_q]`, each ascending.
    pub selected: Vec<Vec<usize>>,
}

/// One branch's softmax attention.
#[derive(Debug, Clone, Default)]
pub struct NsaBranch {
    /// `[batch, n_heads_q, n_q, head_dim_v]`; 0 for a row that sees nothing.
    pub out: Vec<f32>,
    /// `[batch, n_heads_q, n_q]`; -inf for a row that sees nothing.
    pub lse: Vec<f32>,
}

impl NsaBranch {
    pub(super) fn unwritten(s: &AttnShape) -> Self {
        Self { out: vec![f32::NAN; s.rows() * s.head_dim_v], lse: vec![f32::NAN; s.rows()] }
    }
}

/// Gradients, row-major, each as long as its input.
#[derive(Debug, Clone)]
pub struct NsaGrads {
    /// Of the queries.
    pub q: Vec<f32>,
    /// Of the keys; through the means too, unless compressed blocks were given.
    pub k: Vec<f32>,
    /// Of the values, likewise.
    pub v: Vec<f32>,
    /// Of the gate of the compressed branch.
    pub gate_compress: Vec<f32>,
    /// Of the gate of the selected branch.
    pub gate_select: Vec<f32>,
    /// Of the gate of the window; empty without one.
    pub gate_window: Vec<f32>,
    /// Of the compressed keys, given or not.
    pub k_compress: Vec<f32>,
    /// Of the compressed values, given or not.
    pub v_compress: Vec<f32>,
}
