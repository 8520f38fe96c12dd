//! Streams of native sparse attention: a cache, and the compressed blocks beside it.

use super::branches::Rows;
use super::compression::Compressed;
use super::{CompressedKv, Nsa, NsaInputs};
use crate::routed::index_inputs::check_axes;
use crate::routed::rows::heads_f32;
use crate::routed::stream::cache_of;
use crate::store::store;
use attn_core::{
    AttnError, AttnShape, OutMut, Qkv, Result, StreamShape, StreamState, TensorView, View,
    softmax_scale_or_default,
};
use attn_flash::cache::KvCache;

/// See the module. Decoding reads compressed keys and values, selected blocks and the window.
#[derive(Debug)]
pub struct NsaStream {
    nsa: Nsa,
    shape: StreamShape,
    softmax_scale: f32,
    cache: KvCache,
    compressed: Compressed,
    /// Whether compressed blocks are given; unknown before the first token.
    given: Option<bool>,
}

impl Nsa {
    /// An empty stream.
    ///
    /// # Errors
    /// [`AttnError`] for sizes or head counts that do not fit.
    pub fn stream(&self, shape: StreamShape) -> Result<NsaStream> {
        self.check()?;
        let cache = cache_of(shape)?;
        let softmax_scale = softmax_scale_or_default(self.softmax_scale, shape.head_dim)?;
        let compressed = Compressed::new(&shape);
        Ok(NsaStream { nsa: *self, shape, softmax_scale, cache, compressed, given: None })
    }
}

impl NsaStream {
    /// Appends tokens, with their gates; with the compressed blocks that end among them, if blocks are made elsewhere (then
    /// from the first token on); with selected blocks, if those were chosen elsewhere. Writes what the tokens attend.
    ///
    /// # Errors
    /// [`AttnError`] for inputs that do not fit the stream or each other; nothing has then been appended.
    pub fn append_with(&mut self, x: &NsaInputs<'_>, out: OutMut<'_>) -> Result<()> {
        let qkv = x.qkv;
        self.shape.check(&qkv)?;
        qkv.check_out(&out)?;
        NsaInputs { compressed: None, ..*x }.check(&self.nsa)?;
        let (s, before) = (qkv.shape(), self.compressed.len());
        let is_given = x.compressed.is_some();
        if self.given.is_some_and(|given| given != is_given) {
            let (found, expected) = if is_given { ("given", "means") } else { ("none", "given blocks") };
            return Err(AttnError::value("k_compress", found, format!("{expected}, as before")));
        }
        if let Some(CompressedKv { k, v }) = &x.compressed {
            let new = self.nsa.n_complete(before + s.n_kv) - self.nsa.n_complete(before);
            check_axes("k_compress", k.shape(), [s.batch, s.n_heads_kv, new, s.head_dim])?;
            check_axes("v_compress", v.shape(), [s.batch, s.n_heads_kv, new, s.head_dim_v])?;
        }
        if s.n_kv > 0 {
            self.given = Some(is_given);
        }
        self.cache.append(*qkv.k(), *qkv.v())?;
        match &x.compressed {
            Some(CompressedKv { k, v }) => self.compressed.append_given(k, v, s.n_kv),
            None => self.compressed.append(&self.nsa, qkv.k(), qkv.v()),
        }
        let shape = AttnShape { n_kv: self.cache.len(), ..s };
        if shape.rows() == 0 {
            return Ok(());
        }
        let q = heads_f32(qkv.q(), 0..shape.n_q);
        let rows = Rows { shape, softmax_scale: self.softmax_scale };
        let q = View::contiguous("q", &q, shape.q())?;
        let parts = self.nsa.attend(&rows, q, self.cache.views()?, &self.compressed, x.selected)?;
        store(out, &self.nsa.gated(&parts, x.gates.as_ref(), shape.head_dim_v)?)?;
        Ok(())
    }
}

impl NsaStream {
    /// Appends keys and values `(batch, n_heads_kv, n, width)` of tokens whose outputs nobody asks for, such as those of a prompt
    /// that has been read elsewhere. Time `O(n)`.
    ///
    /// # Errors
    /// [`AttnError`] for keys or values that do not fit the stream, and where blocks are made elsewhere; nothing has then been
    /// appended.
    pub fn append_keys(&mut self, k: TensorView<'_>, v: TensorView<'_>) -> Result<()> {
        if self.given == Some(true) {
            return Err(AttnError::value("k_compress", "none", "given blocks, as before"));
        }
        self.cache.append(k, v)?;
        self.compressed.append(&self.nsa, &k, &v);
        if k.shape()[2] > 0 {
            self.given = Some(false);
        }
        Ok(())
    }
}

impl StreamState for NsaStream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.append_with(&NsaInputs::new(x), out)
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn bytes(&self) -> usize {
        self.cache.bytes() + self.compressed.bytes()
    }
}
