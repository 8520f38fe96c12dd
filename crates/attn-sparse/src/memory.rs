//! Streams of deciders that remember something of the keys they have seen.

use crate::SparseAttention;
use crate::decider::{Decider, Decision};
use attn_core::{AttnError, OutMut, Qkv, Result, StreamShape, StreamState, TensorView};
use attn_flash::cache::KvCache;
use attn_flash::engine::KvView;

/// What a decider remembers of the keys of a stream, so that it does not look at all of them for each token.
///
/// Streams of [`SparseAttention`] keep one beside their cache; a caller with a cache of its own asks the decider for one:
///
/// ```
/// use attn_core::{Qkv, StreamShape, View, ViewMut};
/// use attn_sparse::{Decider, Quest, SparseAttention};
///
/// let cache: Vec<f32> = (0..64 * 8).map(|x| (x as f32 * 0.9).sin()).collect();
/// let rows = |n: usize| View::contiguous("x", &cache[..n * 8], [1, 1, n, 8]);
/// let quest = SparseAttention::new(Quest { page_len: 4, token_budget: 16, ..Quest::default() });
/// let x = Qkv::new(rows(1)?, rows(64)?, rows(64)?)?;
/// let mut memory = quest.decider.memory(&StreamShape::of(&x)).expect("Quest has one");
/// let mut out = [0.0; 8];
/// // Once for each new token: only pages that are new are looked at key by key.
/// let decision = memory.decide(&x)?;
/// quest.attend_decided(&decision, x, ViewMut::contiguous("out", &mut out, [1, 1, 1, 8])?.into(), None)?;
/// # Ok::<(), attn_core::AttnError>(())
/// ```
pub trait Memory: Send {
    /// The pairs that the new queries `x.q()` attend of all keys so far, of which the last ones are new. They must be
    /// those that the decider would choose in the whole.
    ///
    /// # Errors
    /// Those of the decider.
    fn decide(&mut self, x: &Qkv<'_>) -> Result<Decision>;

    /// Forgets all keys from `n_kv` on: of a piece that failed.
    fn truncate(&mut self, n_kv: usize);

    /// Bytes held.
    fn bytes(&self) -> usize;
}

/// All keys and values, and what the decider remembers of them.
pub(crate) struct RememberingStream<D> {
    attention: SparseAttention<D>,
    memory: Box<dyn Memory>,
    shape: StreamShape,
    cache: KvCache,
}

impl<D: Decider> RememberingStream<D> {
    pub(crate) fn start(
        attention: SparseAttention<D>,
        memory: Box<dyn Memory>,
        shape: StreamShape,
    ) -> Result<Self> {
        if shape.n_heads_kv == 0 || !shape.n_heads_q.is_multiple_of(shape.n_heads_kv) {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        let cache = KvCache::new(shape.into(), shape.dtype.into())?;
        Ok(Self { attention, memory, shape, cache })
    }

    fn attend(&mut self, q: TensorView<'_>, out: OutMut<'_>) -> Result<()> {
        let (k, v) = self.cache.views()?;
        let x = Qkv::new(q, tensor(k)?, tensor(v)?)?;
        let decision = self.memory.decide(&x)?;
        self.attention.attend_decided(&decision, x, out, None)
    }
}

/// The cache has the stream's dtype, so this is one of its three.
fn tensor(view: KvView<'_>) -> Result<TensorView<'_>> {
    match view {
        KvView::F32(view) => Ok(TensorView::F32(view)),
        KvView::Bf16(view) => Ok(TensorView::Bf16(view)),
        KvView::F16(view) => Ok(TensorView::F16(view)),
        KvView::Int8 { .. } => Err(AttnError::unsupported("a stream with a memory", "a cache in int8")),
    }
}

impl<D: Decider> StreamState for RememberingStream<D> {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        let before = self.cache.len();
        self.cache.append(*x.k(), *x.v())?;
        let done = self.attend(*x.q(), out);
        if done.is_err() {
            self.cache.truncate(before);
            self.memory.truncate(before);
        }
        done
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn bytes(&self) -> usize {
        self.cache.bytes() + self.memory.bytes()
    }
}
