//! Streams: the last raw keys and values, and the entries of all.

use super::CompressedAttention;
use super::attend::Call;
use super::entries::EntryMeans;
use crate::routed::rows::heads_f32;
use crate::routed::stream::cache_of;
use crate::store::store;
use attn_core::{AttnShape, OutMut, Qkv, Result, StreamShape, StreamState, View, softmax_scale_or_default};
use attn_flash::cache::{Kept, KvCache};

/// See the module.
pub(super) struct CompressedStream {
    attention: CompressedAttention,
    shape: StreamShape,
    softmax_scale: f32,
    raw: KvCache,
    means: EntryMeans,
    len: usize,
}

impl CompressedStream {
    pub(super) fn start(attention: CompressedAttention, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        let means = EntryMeans::new(&attention, &shape)?;
        let softmax_scale = softmax_scale_or_default(attention.softmax_scale, shape.head_dim)?;
        Ok(Box::new(Self { attention, shape, softmax_scale, raw: cache_of(shape)?, means, len: 0 }))
    }
}

impl StreamState for CompressedStream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        self.raw.append(*x.k(), *x.v())?;
        self.means.append(&self.attention, x.k(), x.v())?;
        self.len += x.shape().n_q;
        let shape = AttnShape { n_kv: self.len, ..x.shape() };
        let q = heads_f32(x.q(), 0..shape.n_q);
        let q = View::contiguous("q", &q, shape.q())?;
        let call = Call {
            attention: self.attention,
            shape,
            softmax_scale: self.softmax_scale,
            q,
            raw: self.raw.views()?,
            entries: self.means.cache.views()?,
            seen: self.attention.seen_by_means(&self.means, &q, &shape)?,
        };
        store(out, &call.attend(None)?.0)?;
        self.raw.keep(Kept { sinks: 0, last: Some(self.attention.window - 1) });
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn bytes(&self) -> usize {
        self.raw.bytes() + self.means.bytes()
    }
}
