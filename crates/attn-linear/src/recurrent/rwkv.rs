//! RWKV-5 and RWKV-6: the query reads before its token is written, with a bonus for its own write.
//!
//! ```text
//! o_t = scale q_t^T (S_(t-1) + diag(u) k_t v_t^T)          S_t = diag(e^w_t) S_(t-1) + k_t v_t^T
//! ```
//!
//! Sources: Peng et al. 2024 (Eagle and Finch: RWKV with matrix-valued states), equations 8 and 16.

use super::front::{self, CAUSAL, FINE_CHUNK, LOG_DECAY, UNIT_SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Extra, Given, Options, Plan, Pull, Read, Sizes, StateVariant, Tokens, Width, copy_or,
};
use attn_core::Result;
use attn_core::registry::OptionSpec;
use attn_core::view::Rows;

const OPTIONS: &[OptionSpec] = &[
    CAUSAL,
    UNIT_SCALE,
    LOG_DECAY,
    OptionSpec {
        name: "bonus",
        default: "1",
        help: "what a token's own write weighs, where no tensor gives it",
    },
    FINE_CHUNK,
];

/// RWKV-6: the decays differ from token to token.
///
/// Extra inputs: `log_decay [batch, heads, tokens, head_dim]`, `-e^raw`; `bonus [heads, head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rwkv6 {
    /// Multiplies the output.
    pub scale: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// The bonus where none is given.
    pub bonus: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for Rwkv6 {
    const NAME: &'static str = "rwkv6";
    const EXTRAS: &'static [Extra] =
        &[Extra::rows("log_decay", Width::Key), Extra::head("bonus", Width::Key)];
    const SUMMARY: &'static str = "RWKV-6: key channels fade, a bonus for the own token (Peng et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = OPTIONS;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::finite(options, "scale", 1.0)?,
            log_decay: front::log_decay(options, -0.05)?,
            bonus: front::finite(options, "bonus", 1.0)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let (decay, read) = (Decay::Key, Read::Pre);
        Ok(Plan::new(Options { decay, read, scale: self.scale, chunk_len: self.chunk_len, ..o }))
    }

    const GIVEN: Given = Given::QKV;

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        front::copy_decays(x, self.log_decay, chunk);
        let bonus = x.extra("bonus").filter(|_| !x.is_empty());
        copy_or(bonus.map(|rows: Rows<'_, f32>| rows.slice(0..1)), self.bonus, &mut chunk.bonus);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, _: &Tokens<'_>, _: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        pull::decays(grads, to);
        // One row for all tokens: the first one's gradient is that of the chunk.
        if let Some(d) = to.extra("bonus") {
            d[..grads.bonus.len()].copy_from_slice(&grads.bonus);
        }
    }
}

/// RWKV-5: a channel's decay is the same for all tokens, `log_decay [heads, head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rwkv5(pub Rwkv6);

impl StateVariant for Rwkv5 {
    const NAME: &'static str = "rwkv5";
    const EXTRAS: &'static [Extra] = Rwkv6::EXTRAS;
    const SUMMARY: &'static str =
        "RWKV-5: key channels fade at constant rates, a bonus for the own token (Peng et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = OPTIONS;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Rwkv6::from_options(options).map(Self)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.0.plan(sizes)
    }

    const GIVEN: Given = Given::QKV;

    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk) {
        self.0.fill(x, carry, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        self.0.pull(x, chunk, grads, d_out, to);
    }
}
