//! What a variant of kernelised attention decides, and what a call of it is given.

use super::maps::Map;
use attn_core::{Qkv, Result, TensorView};

/// What the sum of weighted values is divided by, with `D` the sum of weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Normaliser {
    /// Nothing.
    None,
    /// `D + eps`.
    Plus(f32),
    /// `max(D, eps)`.
    AtLeast(f32),
    /// `phi(q) . (z + eps 1)` with `z` the sum of keys' features.
    EachPlus(f32),
    /// Each feature's row of the state by the sum of that feature over the keys. Not causal.
    Rows,
}

impl Normaliser {
    /// Whether weights are summed.
    pub(crate) fn divides(self) -> bool {
        self != Self::None
    }
}

/// A row of options of kernelised attention.
#[derive(Debug, Clone)]
pub struct FeatureSpec {
    /// What queries become.
    pub queries: Map,
    /// What keys become.
    pub keys: Map,
    /// What outputs are divided by.
    pub normaliser: Normaliser,
    /// Multiplies the weights.
    pub scale: f32,
    /// Keys' exponents are lowered by the largest of all keys, later ones included.
    pub key_max: bool,
    /// The gate of all tokens where none are given; `None` is no gate.
    pub gate: Option<f32>,
}

/// Where a cell's gates come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Gate {
    None,
    Constant(f32),
    Given,
}

/// What a call is given.
#[derive(Debug, Clone, Copy)]
pub struct FeatureInputs<'a> {
    /// Queries, keys, values.
    pub x: Qkv<'a>,
    /// For [gated](FeatureVariant::GATED) variants, `(batch, heads, length, 1)` in `[0, 1]`: what is left of the past at a token.
    pub gate: Option<TensorView<'a>>,
    /// Sequences packed one behind the other: prefix sums of their lengths, from 0 to all tokens. Each is a run of its own, and
    /// has a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

impl<'a> From<Qkv<'a>> for FeatureInputs<'a> {
    fn from(x: Qkv<'a>) -> Self {
        Self { x, gate: None, cu_seqlens: None }
    }
}

/// A variant of kernelised attention: two feature maps and a normaliser.
pub trait FeatureVariant: Clone + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// Whether its causal form takes gates.
    const GATED: bool = false;

    /// Whether no query sees a later key.
    fn is_causal(&self) -> bool;

    /// The options for heads of `head_dim` and sequences of up to `n` rows.
    ///
    /// # Errors
    /// [`attn_core::AttnError::Value`] for an option that makes no sense.
    fn spec(&self, n_heads_q: usize, head_dim: usize, n: usize) -> Result<FeatureSpec>;

    /// Whether features depend on the length of the whole, so that a stream would have to know it.
    fn needs_length(&self) -> bool {
        false
    }

    /// Outputs are averages of the values seen.
    fn is_convex(&self) -> bool {
        false
    }

    /// Permuting keys changes nothing, without `causal`.
    fn is_key_order_free(&self) -> bool {
        true
    }

    /// [`attn_core::Profile::max_error`].
    fn max_error(&self) -> f64 {
        1e-5
    }
}
