//! Linear attention without feature map or normaliser: the sum of all writes, read by the query.

use crate::CHUNK_LEN;
use crate::matrix_state::{Chunk, Extra, Given, Options, Plan, Pull, Sizes, StateVariant, Tokens};
use crate::recurrent::{front, pull};
use attn_core::registry::OptionSpec;
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

impl StateVariant for Linear {
    const NAME: &'static str = "linear";
    const EXTRAS: &'static [Extra] = &[];
    const SUMMARY: &'static str =
        "Linear attention, neither mapped nor normalised: fast weights (Schmidhuber 1992)";
    const OPTIONS: &'static [OptionSpec] = &[OptionSpec::CAUSAL, front::SCALE, front::CHUNK];
    const GIVEN: Given = Given::QKV;
    const CROSS: bool = true;
    const DIFFERENTIABLE: bool = true;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        let causal = options.get_or("causal", false)?;
        Ok(Self { scale: front::scale(options)?, causal, chunk_len: front::chunk_len(options, CHUNK_LEN)? })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        let plan = Plan::new(Options { scale, chunk_len: self.chunk_len, ..o });
        Ok(Plan { causal: self.causal, ..plan })
    }

    fn fill(&self, _: &Tokens<'_>, _: &mut [f32], _: &mut Chunk) {}

    fn pull(&self, _: &Tokens<'_>, _: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
    }

    fn is_causal(&self) -> bool {
        self.causal
    }
}
