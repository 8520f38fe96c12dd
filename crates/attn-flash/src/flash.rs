//! Exact attention for everyday use: full, causal and sliding-window masks, soft cap, grouped heads.

use crate::cache::CacheKind;
use crate::engine::{ForwardResult, Grads, HalfProducts, OutputGrad, Problem};
use crate::stream::{CachedStream, Kept};
use crate::tiles::TileSizes;
use attn_core::exact::Reference;
use attn_core::mask::{Align, Band};
use attn_core::score::SoftCap;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Family, Growth, OutMut, Profile,
    Qkv, QkvGrads, Result, Saved, SoftmaxAttention, StreamShape, StreamState, Streaming, Target, TensorView,
    band_pairs, softmax_flops,
};

/// Exact softmax attention, `softmax(softmax_scale * q k^T) v`, in one pass over the keys with O(1) memory a row.
///
/// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
/// `v [batch, n_heads_kv, n_kv, head_dim_v]`, out `[batch, n_heads_q, n_q, head_dim_v]`; f32, bf16 or f16, any strides
/// with a contiguous last axis. Rows that see no key are zero with a log-sum-exp of -inf.
///
/// Sources: Vaswani et al. 2017; Milakov and Gimelshein 2018; Dao et al. 2022, Dao 2023 (FlashAttention).
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_flash::Flash;
///
/// let (heads, n, d) = (2, 5, 8);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// Flash::causal().forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into())?;
/// assert!((out[0] - x[0]).abs() < 1e-6, "the first row sees only itself");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Flash {
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Where queries stand on the key axis, for causal and windows, when `n_q != n_kv`.
    pub align: Align,
    /// Keys seen before a query's position; `None` is all.
    pub window_left: Option<usize>,
    /// Keys seen after a query's position; `None` is all, and under `causal` none.
    pub window_right: Option<usize>,
    /// Scores become `c tanh(s / c)`.
    pub softcap: Option<f32>,
    /// Block sizes; `None` chooses by shape.
    pub tiles: Option<TileSizes>,
    /// How the forward pass multiplies bf16 and f16.
    pub half_products: HalfProducts,
}

impl Flash {
    /// Every query sees every key.
    pub fn full() -> Self {
        Self::default()
    }

    /// A query sees the keys up to its own position; the last query stands at the last key.
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }

    /// The visible band, or `None` if everything is visible.
    pub fn band(&self, shape: &AttnShape) -> Option<Band> {
        let right = if self.causal { Some(0) } else { self.window_right };
        let band = Band { offset: self.align.offset(shape.n_q, shape.n_kv), left: self.window_left, right };
        (band.left.is_some() || band.right.is_some()).then_some(band)
    }

    /// [`Streaming::start`] with a cache that stores what `kind` says, whatever the dtype of the stream.
    ///
    /// # Errors
    /// As [`Streaming::start`].
    pub fn start_with_cache(&self, shape: StreamShape, kind: CacheKind) -> Result<Box<dyn StreamState>> {
        if !self.causal {
            return Err(AttnError::unsupported(self.name(), "streaming without `causal`"));
        }
        let kept = Kept { sinks: 0, last: self.window_left };
        let call = self.call();
        let attend = move |problem: Problem<'_>, out: OutMut<'_>| call.forward(problem, out, None);
        CachedStream::start_with_cache(attend, shape, kept, kind)
    }

    pub(crate) fn softcap(&self) -> Result<Option<SoftCap>> {
        self.softcap.filter(|c| *c != 0.0).map(SoftCap::new).transpose()
    }
}

impl Attention for Flash {
    fn name(&self) -> &'static str {
        "flash"
    }

    fn profile(&self) -> Profile {
        let windowed = self.window_left.is_some() || (self.window_right.is_some() && !self.causal);
        Profile {
            family: Family::Exact,
            target: if windowed { Target::SoftmaxOverChosen } else { Target::Softmax },
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            convex: true,
            key_order_free: !self.causal && !windowed,
            cross_lengths: true,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: 4e-6,
            time: if self.window_left.is_some() { Growth::Linear } else { Growth::Quadratic },
            memory: Growth::Constant,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let all = shape.n_q as u64 * shape.n_kv as u64;
        let pairs = self.band(shape).map_or(all, |band| band_pairs(shape, &band));
        let heads = (shape.batch * shape.n_heads_q) as u64;
        let tiles = self.tiles.unwrap_or_else(|| TileSizes::auto(shape));
        let scratch = tiles.workspace_bytes(shape) * rayon::current_num_threads() as u64;
        Cost::of(shape, dtype, heads * softmax_flops(pairs, shape), scratch)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.call().forward(x, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        self.call().definition(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        (self.causal && self.align == Align::BottomRight).then_some(self)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl SoftmaxAttention for Flash {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        self.call().forward(x, out, Some(lse))
    }
}

impl Differentiable for Flash {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        let mut lse = vec![0.0; x.shape().rows()];
        self.forward_with_lse(x, out, &mut lse)?;
        Ok(Saved::new(lse))
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        grads.check(&x)?;
        let forward = ForwardResult { out, lse: saved.get::<Vec<f32>>()? };
        let grad = OutputGrad { out: grad_out, lse: None };
        self.call().backward(x, forward, grad, Grads::new(grads.q, grads.k, grads.v))
    }
}

impl Streaming for Flash {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        self.start_with_cache(shape, shape.dtype.into())
    }
}
