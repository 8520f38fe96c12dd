//! Linear attention without feature map or normaliser: the sum of all writes, read by the query.

use crate::CHUNK_LEN;
use crate::engine::{Decay, Normaliser, Spec, State, naive};
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnShape, Causality, Cost, DType, Family, Growth, OutMut, Profile, Qkv, Result, StreamShape,
    StreamState, Streaming, Target, softmax_scale_or_default,
};

/// `S_t = S_(t-1) + k_t v_t^T`, `o_t = scale S_t^T q_t`; the same as `scale q (k^T v)` without `causal`.
///
/// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
/// `v [batch, n_heads_kv, n_kv, head_dim_v]`, out `[batch, n_heads_q, n_q, head_dim_v]`. The weights `q . k` have either
/// sign and are not normalised: outputs grow with the length.
///
/// Sources: Schmidhuber 1992 (fast weights); Katharopoulos et al. 2020.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Linear {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// A query sees no key after its own position; the last query stands at the last key.
    pub causal: bool,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Default for Linear {
    fn default() -> Self {
        Self { scale: None, causal: false, chunk_len: CHUNK_LEN }
    }
}

impl Linear {
    /// The engine's options for such heads.
    ///
    /// # Errors
    /// [`attn_core::AttnError::Value`] for a scale that is not finite.
    pub fn spec(&self, head_dim: usize) -> Result<Spec> {
        Ok(Spec {
            name: "linear",
            causal: self.causal,
            scale: softmax_scale_or_default(self.scale, head_dim)?,
            features: None,
            decay: Decay::None,
            normaliser: Normaliser::None,
            chunk_len: self.chunk_len,
        })
    }

    /// [`Attention::forward`] from a state, which becomes the one after the last key.
    ///
    /// # Errors
    /// As [`Spec::forward`].
    pub fn forward_from(&self, x: Qkv<'_>, out: OutMut<'_>, state: &mut State) -> Result<()> {
        self.spec(x.shape().head_dim)?.forward(x, out, Some(state))
    }
}

impl Attention for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Linear,
            target: Target::Own,
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            convex: false,
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
        self.spec(shape.head_dim).map(|spec| spec.cost(shape, dtype)).unwrap_or_default()
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.spec(x.shape().head_dim)?.forward(x, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        naive::quadratic(&self.spec(x.shape().head_dim)?, x, None)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        self.causal.then_some(self)
    }
}

impl Streaming for Linear {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        self.spec(shape.head_dim)?.start(shape)
    }
}
