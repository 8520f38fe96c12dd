//! Streams of routers: a cache of keys and values, and the summary from which new queries choose.

use super::router::{Routed, Router};
use attn_core::{AttnError, OutMut, Qkv, Result, StreamShape, StreamState};
use attn_flash::cache::{CacheKind, KvCache};

/// See the module.
pub(super) struct RoutedStream<R: Router> {
    attention: Routed<R>,
    shape: StreamShape,
    cache: KvCache,
    summary: R::Summary,
}

impl<R: Router> RoutedStream<R> {
    pub(super) fn start(attention: Routed<R>, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        let cache = cache_of(shape)?;
        let summary = attention.router.summary(&shape)?;
        attn_core::softmax_scale_or_default(attention.softmax_scale, shape.head_dim)?;
        Ok(Box::new(Self { attention, shape, cache, summary }))
    }
}

/// An empty cache of a stream's dtype.
pub(super) fn cache_of(shape: StreamShape) -> Result<KvCache> {
    if shape.n_heads_kv == 0 || !shape.n_heads_q.is_multiple_of(shape.n_heads_kv) {
        let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
        return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
    }
    KvCache::new(shape.into(), CacheKind::from(shape.dtype))
}

impl<R: Router> StreamState for RoutedStream<R> {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        self.cache.append(*x.k(), *x.v())?;
        self.attention.router.append(&mut self.summary, x.k());
        self.attention.router.observe(&mut self.summary, x.q());
        self.attention.attend(&self.summary, *x.q(), self.cache.views()?, out, None)
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn bytes(&self) -> usize {
        self.cache.bytes() + self.attention.router.bytes(&self.summary)
    }
}
