//! Simple gated linear attention: the whole state fades at a rate given token by token.

use super::front::{self, CAUSAL, CHUNK, LOG_DECAY, SCALE};
use super::pull;
use crate::CHUNK_LEN;
use crate::matrix_state::{Chunk, Decay, Extra, Given, Options, Plan, Pull, Sizes, StateVariant, Tokens};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

/// `S_t = e^g_t S_(t-1) + k_t v_t^T`, `o_t = scale q_t^T S_t`.
///
/// Extra input: `log_decay [batch, heads, tokens]`, usually `logsigmoid(.)/16`. With `log_decay = A dt`, `v = dt x` and
/// `scale = 1` it is the core of Mamba-2.
///
/// Source: Yang, Wang, Shen, Panda, Kim 2024 (gated linear attention with a scalar gate); Dao and Gu 2024.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SimpleGla {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// The decay where none is given.
    pub log_decay: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for SimpleGla {
    const NAME: &'static str = "simple-gla";
    const EXTRAS: &'static [Extra] = &[Extra::scalar("log_decay")];
    const SUMMARY: &'static str = "Linear attention with a decay for every token (Yang et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, LOG_DECAY, CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            log_decay: front::log_decay(options, -0.05)?,
            chunk_len: front::chunk_len(options, CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        Ok(Plan::new(Options { decay: Decay::Scalar, scale, chunk_len: self.chunk_len, ..o }))
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
