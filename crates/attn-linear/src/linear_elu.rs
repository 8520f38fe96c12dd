//! Linear attention with positive features and a normaliser: an average of values with weights `phi(q) . phi(k)`.

use crate::CHUNK_LEN;
use crate::engine::{Decay, Normaliser, Spec};
use crate::feature_map::EluPlusOne;
use crate::variant::Variant;
use attn_core::Result;
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
/// Source: Katharopoulos, Vyas, Pappas, Fleuret 2020 (Transformers are RNNs).
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

impl Variant for LinearElu {
    const NAME: &'static str = "linear-elu";

    fn spec(&self, _: usize, _: usize) -> Result<Spec> {
        Ok(Spec {
            name: Self::NAME,
            causal: self.causal,
            scale: self.scale,
            features: Some(Arc::new(EluPlusOne)),
            decay: Decay::None,
            normaliser: Normaliser::SumPlus { eps: self.eps },
            chunk_len: self.chunk_len,
        })
    }

    fn is_causal(&self) -> bool {
        self.causal
    }

    fn is_convex(&self) -> bool {
        true
    }
}
