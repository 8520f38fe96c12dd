//! Streams of softmax attention: a key/value cache in front of a causal forward pass.

pub use crate::cache::Kept;
use crate::cache::KvCache;
use attn_core::{Attention, AttnError, DType, Element, OutMut, Qkv, Result, StreamShape, StreamState};
use half::{bf16, f16};

/// A stream of any attention that sees, besides the first `sinks` keys, only the last ones: the new queries attend
/// the kept keys followed by the new ones.
///
/// It works because such attention depends on positions only through "the last query stands at the last key" and
/// "the sinks come first", and both survive dropping the keys in between.
pub struct CachedStream<A, E> {
    attention: A,
    shape: StreamShape,
    kept: Kept,
    cache: KvCache<E>,
    len: usize,
}

impl<A: Attention + 'static> CachedStream<A, f32> {
    /// An empty stream; the cache has the stream's dtype. `attention` must be causal with the last query at the last
    /// key, and a query must see no key that `kept` drops.
    ///
    /// # Errors
    /// [`AttnError::Shape`] if the heads do not divide.
    pub fn start(attention: A, shape: StreamShape, kept: Kept) -> Result<Box<dyn StreamState>> {
        if shape.n_heads_kv == 0 || !shape.n_heads_q.is_multiple_of(shape.n_heads_kv) {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        Ok(match shape.dtype {
            DType::F32 => Box::new(CachedStream::<A, f32>::new(attention, shape, kept)),
            DType::Bf16 => Box::new(CachedStream::<A, bf16>::new(attention, shape, kept)),
            DType::F16 => Box::new(CachedStream::<A, f16>::new(attention, shape, kept)),
        })
    }
}

impl<A: Attention, E: Element> CachedStream<A, E> {
    fn new(attention: A, shape: StreamShape, kept: Kept) -> Self {
        Self { attention, shape, kept, cache: KvCache::new(shape), len: 0 }
    }
}

impl<A: Attention, E: Element> StreamState for CachedStream<A, E> {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        let (Some(k), Some(v)) = (E::untag(*x.k()), E::untag(*x.v())) else {
            let (found, expected) = (x.dtype().to_string(), E::DTYPE.to_string());
            return Err(AttnError::DType { tensor: "k".into(), found, expected });
        };
        self.cache.append(&k, &v);
        let (k, v) = self.cache.views()?;
        self.attention.forward(Qkv::new(*x.q(), k, v)?, out)?;
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
