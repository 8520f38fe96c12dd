//! Decoding with page bounds that are kept up to date.

use super::Quest;
use super::bounds::PageBounds;
use super::select::{choose, grow_all};
use crate::attention::spec;
use attn_core::{AttnError, OutMut, Qkv, Result, StreamShape, StreamState, TensorView, softmax_scale_or_default};
use attn_flash::cache::KvCache;
use attn_flash::engine::{KvView, Problem, attend_any};

/// All keys and values, and the bounds of the complete pages.
pub(super) struct QuestStream {
    quest: Quest,
    softmax_scale: f32,
    shape: StreamShape,
    cache: KvCache,
    /// `[batch * n_heads_kv]`.
    bounds: Vec<PageBounds>,
}

impl QuestStream {
    pub(super) fn start(quest: Quest, softmax_scale: Option<f32>, shape: StreamShape) -> Result<Self> {
        if shape.n_heads_kv == 0 || !shape.n_heads_q.is_multiple_of(shape.n_heads_kv) {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        let bounds = || PageBounds::new(quest.page_len, shape.head_dim);
        Ok(Self {
            quest,
            softmax_scale: softmax_scale_or_default(softmax_scale, shape.head_dim)?,
            shape,
            cache: KvCache::new(shape.into(), shape.dtype.into())?,
            bounds: (0..shape.batch * shape.n_heads_kv).map(|_| bounds()).collect(),
        })
    }

    fn attend(&mut self, q: TensorView<'_>, out: OutMut<'_>) -> Result<()> {
        let (k, v) = self.cache.views()?;
        let x = Qkv::new(q, tensor(k)?, tensor(v)?)?;
        grow_all(&mut self.bounds, x.k(), x.shape().n_kv / self.quest.page_len);
        let decision = self.quest.mask(&x, &choose(&self.quest, &x, &self.bounds))?;
        attend_any(Problem::batch(x), out, None, &spec(&decision, self.softmax_scale, &x.shape()))
    }
}

/// The cache has the stream's dtype, so this is one of its three.
fn tensor(view: KvView<'_>) -> Result<TensorView<'_>> {
    match view {
        KvView::F32(view) => Ok(TensorView::F32(view)),
        KvView::Bf16(view) => Ok(TensorView::Bf16(view)),
        KvView::F16(view) => Ok(TensorView::F16(view)),
        KvView::Int8 { .. } => Err(AttnError::unsupported("quest", "a cache in int8")),
    }
}

impl StreamState for QuestStream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        let before = self.cache.len();
        self.cache.append(*x.k(), *x.v())?;
        let done = self.attend(*x.q(), out);
        if done.is_err() {
            self.cache.truncate(before);
            self.bounds.iter_mut().for_each(|bounds| bounds.truncate(before / self.quest.page_len));
        }
        done
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn bytes(&self) -> usize {
        self.cache.bytes() + self.bounds.iter().map(PageBounds::bytes).sum::<usize>()
    }
}
