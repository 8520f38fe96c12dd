//! Gated linear attention: every key channel fades at its own rate, given token by token.

use super::front::{self, CAUSAL, FINE_CHUNK, LOG_DECAY, SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Extra, Given, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width,
};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

/// `S_t = diag(e^g_t) S_(t-1) + k_t v_t^T`, `o_t = scale q_t^T S_t`.
///
/// Extra input: `log_decay [batch, heads, tokens, head_dim]`, usually `logsigmoid(.)/16`.
///
/// Source: Yang, Wang, Shen, Panda, Kim 2024 (Gated Linear Attention Transformers with Hardware-Efficient Training).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gla {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// The decay where none is given.
    pub log_decay: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for Gla {
    const NAME: &'static str = "gla";
    const EXTRAS: &'static [Extra] = &[Extra::rows("log_decay", Width::Key)];
    const SUMMARY: &'static str =
        "Gated linear attention: a decay for every token and key channel (Yang et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, LOG_DECAY, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            log_decay: front::log_decay(options, -0.05)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        Ok(Plan::new(Options { decay: Decay::Key, scale, chunk_len: self.chunk_len, ..o }))
    }

    const GIVEN: Given = Given::QKV;

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        front::copy_decays(x, self.log_decay, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, _: &Tokens<'_>, _: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        pull::decays(grads, to);
    }
}
