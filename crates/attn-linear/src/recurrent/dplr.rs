//! Diagonal or identity plus low rank: the state's transition is a gate plus any rank-one matrix.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, QK_NORM, SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Erase, EraseAt, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width, copy,
};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

/// `S_t = (diag(e^g_t) + b_t a_t^T) S_(t-1) + k_t v_t^T`, `o_t = scale q_t^T S_t`.
///
/// Extra inputs: `a`, `b`, `log_decay [batch, heads, tokens, head_dim]`. Without `a` and `b`, they are `-k` and `beta k`.
///
/// Source: Peng et al. 2025 (the recurrence of RWKV-7 in general); flash-linear-attention's generalised delta rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dplr {
    /// What it shares with the form without decay.
    pub iplr: Iplr,
    /// The decay where none is given.
    pub log_decay: f32,
}

/// `S_t = (I + b_t a_t^T) S_(t-1) + k_t v_t^T`: [`Dplr`] without decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Iplr {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// `b` by `k`, where neither `a` nor `b` is given.
    pub beta: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl Iplr {
    fn read(name: &'static str, options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(name, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            qk_norm: options.get_or("qk_norm", true)?,
            beta: front::finite(options, "beta", 0.5)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn lay_out(&self, name: &'static str, decay: Decay, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(name, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        let (erase, erase_at, chunk_len) = (Erase::Untied, EraseAt::Before, self.chunk_len);
        Ok(Plan::new(Options { decay, erase, erase_at, scale, chunk_len, ..o }))
    }

    fn fill_rule(&self, x: &Tokens<'_>, chunk: &mut Chunk) {
        front::copy_qkv(x, chunk);
        if self.qk_norm {
            front::normalise(&mut chunk.q, x.k.width(), 1e-6);
            front::normalise(&mut chunk.k, x.k.width(), 1e-6);
        }
        match x.extra("a") {
            Some(a) => copy(a, &mut chunk.a),
            None => chunk.a.iter_mut().zip(&chunk.k).for_each(|(a, k)| *a = -k),
        }
        match x.extra("b") {
            Some(b) => copy(b, &mut chunk.b),
            None => chunk.b.iter_mut().zip(&chunk.k).for_each(|(b, k)| *b = self.beta * k),
        }
    }
}

impl Iplr {
    fn pull_rule(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        match to.extra("a") {
            Some(d) => d.copy_from_slice(&grads.a),
            None => to.k.iter_mut().zip(&grads.a).for_each(|(dk, da)| *dk -= da),
        }
        match to.extra("b") {
            Some(d) => d.copy_from_slice(&grads.b),
            None => to.k.iter_mut().zip(&grads.b).for_each(|(dk, db)| *dk += self.beta * db),
        }
        pull::norms(x, chunk, self.qk_norm, to);
    }
}

const OPTIONS: &[OptionSpec] = &[CAUSAL, SCALE, QK_NORM, BETA, FINE_CHUNK];

impl StateVariant for Iplr {
    const NAME: &'static str = "iplr";
    const EXTRAS: &'static [Extra] = &[Extra::rows("a", Width::Key), Extra::rows("b", Width::Key)];
    const SUMMARY: &'static str = "Identity plus low rank: a generalised delta rule";
    const OPTIONS: &'static [OptionSpec] = OPTIONS;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        Self::read(Self::NAME, options)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.lay_out(Self::NAME, Decay::None, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        self.fill_rule(x, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        self.pull_rule(x, chunk, grads, to);
    }
}

impl StateVariant for Dplr {
    const NAME: &'static str = "dplr";
    const EXTRAS: &'static [Extra] =
        &[Extra::rows("a", Width::Key), Extra::rows("b", Width::Key), Extra::rows("log_decay", Width::Key)];
    const SUMMARY: &'static str =
        "Diagonal plus low rank: a generalised delta rule, every key channel fading (Peng et al. 2025)";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, QK_NORM, BETA, LOG_DECAY, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        Ok(Self { iplr: Iplr::read(Self::NAME, options)?, log_decay: front::log_decay(options, -0.05)? })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.iplr.lay_out(Self::NAME, Decay::Key, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        self.iplr.fill_rule(x, chunk);
        front::copy_decays(x, self.log_decay, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        self.iplr.pull_rule(x, chunk, grads, to);
        pull::decays(grads, to);
    }
}
