//! What all variants of the recurrence engine share: a variant decides its options, the engine does the rest.

use crate::engine::{Spec, State, naive};
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnShape, Causality, Cost, DType, Family, Growth, OutMut, Profile, Qkv, Result, StreamShape,
    StreamState, Streaming, Target,
};

/// A row of the engine's option table: feature map, decay, normaliser, scale.
pub trait Variant: Clone + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// The engine's options for such heads.
    ///
    /// # Errors
    /// [`attn_core::AttnError::Value`] for an option that makes no sense.
    fn spec(&self, n_heads_q: usize, head_dim: usize) -> Result<Spec>;

    /// Whether no query sees a later key.
    fn is_causal(&self) -> bool;

    /// Whether outputs are averages of values: positive weights divided by their sum.
    fn is_convex(&self) -> bool {
        false
    }
}

/// A [`Variant`] as an [`Attention`].
///
/// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
/// `v [batch, n_heads_kv, n_kv, head_dim_v]`, out `[batch, n_heads_q, n_q, head_dim_v]`; f32, bf16 or f16, any strides
/// with a contiguous last axis. Time is linear in the length, memory beyond inputs and output does not grow with it.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_linear::{LinearAttention, LinearElu};
///
/// let (heads, n, d) = (2, 5, 8);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// let attention = LinearAttention::new(LinearElu { causal: true, ..LinearElu::default() });
/// attention.forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into())?;
/// assert!((out[1] - x[1]).abs() < 1e-6, "the first row sees only itself");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LinearAttention<V> {
    /// What is computed.
    pub variant: V,
}

impl<V: Variant> LinearAttention<V> {
    /// The variant, ready to call.
    pub fn new(variant: V) -> Self {
        Self { variant }
    }

    fn spec(&self, shape: &AttnShape) -> Result<Spec> {
        self.variant.spec(shape.n_heads_q, shape.head_dim)
    }

    /// [`Attention::forward`] from a state, which becomes the one after the last key.
    ///
    /// # Errors
    /// As [`Spec::forward`].
    pub fn forward_from(&self, x: Qkv<'_>, out: OutMut<'_>, state: &mut State) -> Result<()> {
        self.spec(&x.shape())?.forward(x, out, Some(state))
    }
}

impl<V: Variant> Attention for LinearAttention<V> {
    fn name(&self) -> &'static str {
        V::NAME
    }

    fn profile(&self) -> Profile {
        let causal = self.variant.is_causal();
        Profile {
            family: Family::Linear,
            target: Target::Own,
            causality: if causal { Causality::Strict } else { Causality::Bidirectional },
            convex: self.variant.is_convex(),
            key_order_free: !causal,
            cross_lengths: true,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: 2e-6,
            time: Growth::Linear,
            memory: Growth::Constant,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        self.spec(shape).map(|spec| spec.cost(shape, dtype)).unwrap_or_default()
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.spec(&x.shape())?.forward(x, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        naive::quadratic(&self.spec(&x.shape())?, x, None)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        if self.variant.is_causal() { Some(self) } else { None }
    }
}

impl<V: Variant> Streaming for LinearAttention<V> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        self.variant.spec(shape.n_heads_q, shape.head_dim)?.start(shape)
    }
}
