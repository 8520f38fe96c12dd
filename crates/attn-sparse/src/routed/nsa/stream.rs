//! Streams of native sparse attention: a cache, and the compressed blocks beside it.

use super::Nsa;
use super::branches::Rows;
use super::compression::Compressed;
use crate::routed::rows::heads_f32;
use crate::routed::stream::cache_of;
use crate::store::store;
use attn_core::{AttnShape, OutMut, Qkv, Result, StreamShape, StreamState, View, softmax_scale_or_default};
use attn_flash::cache::KvCache;

/// See the module. Decoding reads compressed keys and values, selected blocks and the window.
pub(super) struct NsaStream {
    nsa: Nsa,
    shape: StreamShape,
    softmax_scale: f32,
    cache: KvCache,
    compressed: Compressed,
}

impl NsaStream {
    pub(super) fn start(nsa: Nsa, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        nsa.check()?;
        let cache = cache_of(shape)?;
        let softmax_scale = softmax_scale_or_default(nsa.softmax_scale, shape.head_dim)?;
        Ok(Box::new(Self { nsa, shape, softmax_scale, cache, compressed: Compressed::new(&shape) }))
    }
}

impl StreamState for NsaStream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        self.cache.append(*x.k(), *x.v())?;
        self.compressed.append(&self.nsa, x.k(), x.v());
        let shape = AttnShape { n_kv: self.cache.len(), ..x.shape() };
        if shape.rows() == 0 {
            return Ok(());
        }
        let q = heads_f32(x.q(), 0..shape.n_q);
        let rows = Rows { shape, softmax_scale: self.softmax_scale };
        let q = View::contiguous("q", &q, shape.q())?;
        let parts = self.nsa.attend(&rows, q, self.cache.views()?, &self.compressed, None)?;
        store(out, &self.nsa.gated(&parts, None, shape.head_dim_v)?)?;
        Ok(())
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn bytes(&self) -> usize {
        self.cache.bytes() + self.compressed.bytes()
    }
}
