//! Streams of softmax attention: a key/value cache in front of a causal forward pass.

pub use crate::cache::Kept;
use crate::cache::{CacheKind, KvCache};
use crate::engine::{KvView, Problem};
use attn_core::{Attention, AttnError, OutMut, Qkv, Result, StreamShape, StreamState, TensorView};

/// Attends queries to a cache.
type Attend = Box<dyn Fn(&KvCache, TensorView<'_>, OutMut<'_>) -> Result<()> + Send>;

/// A stream of any attention that sees, besides the first `sinks` keys, only the last ones: the new queries attend
/// the kept keys followed by the new ones.
///
/// It works because such attention depends on positions only through "the last query stands at the last key" and
/// "the sinks come first", and both survive dropping the keys in between.
pub struct CachedStream {
    attend: Attend,
    shape: StreamShape,
    kept: Kept,
    cache: KvCache,
    len: usize,
}

impl CachedStream {
    /// An empty stream; the cache has the stream's dtype. `attention` must be causal with the last query at the last
    /// key, and a query must see no key that `kept` drops.
    ///
    /// # Errors
    /// [`AttnError::Shape`] if the heads do not divide or a size is 0.
    pub fn start(
        attention: impl Attention + 'static,
        shape: StreamShape,
        kept: Kept,
    ) -> Result<Box<dyn StreamState>> {
        let attend: Attend = Box::new(move |cache, q, out| {
            let (k, v) = cache.views()?;
            let (Some(k), Some(v)) = (tensor(k), tensor(v)) else {
                let expected = "the dtype of the stream";
                return Err(AttnError::DType {
                    tensor: "k".into(),
                    found: "int8".into(),
                    expected: expected.into(),
                });
            };
            attention.forward(Qkv::new(q, k, v)?, out)
        });
        Self::boxed(attend, shape, kept, shape.dtype.into())
    }

    /// An empty stream whose cache stores what `kind` says; `attend` gets the new queries against all kept keys, under the
    /// conditions of [`CachedStream::start`].
    ///
    /// # Errors
    /// As [`CachedStream::start`].
    pub fn start_with_cache(
        attend: impl Fn(Problem<'_>, OutMut<'_>) -> Result<()> + Send + 'static,
        shape: StreamShape,
        kept: Kept,
        kind: CacheKind,
    ) -> Result<Box<dyn StreamState>> {
        let attend: Attend = Box::new(move |cache, q, out| {
            let (k, v) = cache.views()?;
            attend(Problem::cached(q, k, v, None)?, out)
        });
        Self::boxed(attend, shape, kept, kind)
    }

    fn boxed(
        attend: Attend,
        shape: StreamShape,
        kept: Kept,
        kind: CacheKind,
    ) -> Result<Box<dyn StreamState>> {
        if shape.n_heads_kv == 0 || !shape.n_heads_q.is_multiple_of(shape.n_heads_kv) {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        let cache = KvCache::new(shape.into(), kind)?;
        Ok(Box::new(Self { attend, shape, kept, cache, len: 0 }))
    }
}

/// The view as a tensor, unless it is int8.
fn tensor(view: KvView<'_>) -> Option<TensorView<'_>> {
    match view {
        KvView::F32(view) => Some(TensorView::F32(view)),
        KvView::Bf16(view) => Some(TensorView::Bf16(view)),
        KvView::F16(view) => Some(TensorView::F16(view)),
        KvView::Int8 { .. } => None,
    }
}

impl StreamState for CachedStream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        let before = self.cache.len();
        self.cache.append(*x.k(), *x.v())?;
        if let Err(error) = (self.attend)(&self.cache, *x.q(), out) {
            self.cache.truncate(before);
            return Err(error);
        }
        self.cache.keep(self.kept);
        self.len += x.shape().n_q;
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn bytes(&self) -> usize {
        self.cache.bytes()
    }
}
