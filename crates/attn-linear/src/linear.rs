//! Linear attention without feature map or normaliser: the sum of all writes, read by the query.

use crate::CHUNK_LEN;
use crate::engine::{Decay, Normaliser, Spec};
use crate::variant::Variant;
use attn_core::{Result, softmax_scale_or_default};

/// `S_t = S_(t-1) + k_t v_t^T`, `o_t = scale S_t^T q_t`; the same as `scale q (k^T v)` without `causal`.
///
/// The weights `q . k` have either
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

impl Variant for Linear {
    const NAME: &'static str = "linear";

    fn spec(&self, _: usize, head_dim: usize) -> Result<Spec> {
        Ok(Spec {
            name: Self::NAME,
            causal: self.causal,
            scale: softmax_scale_or_default(self.scale, head_dim)?,
            features: None,
            decay: Decay::None,
            normaliser: Normaliser::None,
            chunk_len: self.chunk_len,
        })
    }

    fn is_causal(&self) -> bool {
        self.causal
    }
}
