//! Linear attention with positive features and a normaliser: an average of values with weights `phi(q) . phi(k)`.

use crate::CHUNK_LEN;
use crate::engine::{Decay, Normaliser, Spec, State, naive};
use crate::feature_map::EluPlusOne;
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnShape, Causality, Cost, DType, Family, Growth, OutMut, Profile, Qkv, Result, StreamShape,
    StreamState, Streaming, Target,
};
use std::sync::Arc;

/// Linear attention with `phi(x) = elu(x) + 1`:
///
/// ```text
/// S_t = S_(t-1) + phi(k_t) v_t^T      z_t = z_(t-1) + phi(k_t)
/// o_t = scale S_t^T phi(q_t) / (scale phi(q_t) . z_t + eps)
/// ```
///
/// and the same with the sums over all keys without `causal`.
///
/// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
/// `v [batch, n_heads_kv, n_kv, head_dim_v]`, out `[batch, n_heads_q, n_q, head_dim_v]`; f32, bf16 or f16, any strides
/// with a contiguous last axis.
///
/// Source: Katharopoulos, Vyas, Pappas, Fleuret 2020 (Transformers are RNNs).
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_linear::LinearElu;
///
/// let (heads, n, d) = (2, 5, 8);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// let attention = LinearElu { causal: true, ..LinearElu::default() };
/// attention.forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into())?;
/// assert!((out[1] - x[1]).abs() < 1e-6, "the first row sees only itself");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearElu {
    /// Multiplies the weights; cancels in the quotient but for `eps`.
    pub scale: f32,
    /// Added to the sum of weights.
    pub eps: f32,
    /// A query sees no key after its own position; the last query stands at the last key.
    pub causal: bool,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Default for LinearElu {
    fn default() -> Self {
        Self { scale: 1.0, eps: 1e-10, causal: false, chunk_len: CHUNK_LEN }
    }
}

impl LinearElu {
    /// The engine's options.
    pub fn spec(&self) -> Spec {
        Spec {
            name: "linear-elu",
            causal: self.causal,
            scale: self.scale,
            features: Some(Arc::new(EluPlusOne)),
            decay: Decay::None,
            normaliser: Normaliser::SumPlus { eps: self.eps },
            chunk_len: self.chunk_len,
        }
    }

    /// [`Attention::forward`] from a state, which becomes the one after the last key.
    ///
    /// # Errors
    /// As [`Spec::forward`].
    pub fn forward_from(&self, x: Qkv<'_>, out: OutMut<'_>, state: &mut State) -> Result<()> {
        self.spec().forward(x, out, Some(state))
    }
}

impl Attention for LinearElu {
    fn name(&self) -> &'static str {
        "linear-elu"
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Linear,
            target: Target::Own,
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            convex: true,
            key_order_free: !self.causal,
            cross_lengths: true,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: 2e-6,
            time: Growth::Linear,
            memory: Growth::Constant,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        self.spec().cost(shape, dtype)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.spec().forward(x, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        naive::quadratic(&self.spec(), x, None)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        self.causal.then_some(self)
    }
}

impl Streaming for LinearElu {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        self.spec().start(shape)
    }
}
