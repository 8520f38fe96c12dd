//! Preconditioned gated delta rules: keys are written scaled by the inverse of how much their channels have been used.
//!
//! With the running use `A_t = e^ga A_(t-1) + beta_a k^2` of every key channel and `M = 1.5^(-r / (1 + |r|))`,
//! `r = ln(A_t + 1e-6) + 0.2`:
//!
//! ```text
//! S~ = e^g S          S <- S~ + beta (k o M) (v - S~^T k)^T          o = scale q^T S
//! ```
//!
//! Source: the operators of these names in flash-linear-attention 0.6.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, QK_NORM, SCALE};
use crate::matrix_state::{Chunk, Decay, Erase, Extra, Options, Plan, Sizes, StateVariant, Tokens, Width};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

const OPTIONS: &[OptionSpec] = &[
    CAUSAL,
    SCALE,
    QK_NORM,
    BETA,
    LOG_DECAY,
    OptionSpec {
        name: "beta_use",
        default: "0.05",
        help: "what a key adds to the use, where no tensor gives it",
    },
    OptionSpec {
        name: "log_decay_use",
        default: "-0.05",
        help: "decay of the use, where no tensor gives it",
    },
    FINE_CHUNK,
];

/// One decay a token.
///
/// Extra inputs: `beta`, `log_decay`, `beta_use`, `log_decay_use [batch, heads, tokens]`. The use is part of the memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecondGdn {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// The write strength where none is given.
    pub beta: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// What a key adds to the use, where none is given.
    pub beta_use: f32,
    /// The decay of the use where none is given.
    pub log_decay_use: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl PrecondGdn {
    fn read(name: &'static str, options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(name, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            qk_norm: options.get_or("qk_norm", true)?,
            beta: front::finite(options, "beta", 0.5)?,
            log_decay: front::log_decay(options, -0.05)?,
            beta_use: front::finite(options, "beta_use", 0.05)?,
            log_decay_use: front::finite(options, "log_decay_use", -0.05)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn lay_out(&self, name: &'static str, decay: Decay, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(name, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        let (erase, chunk_len) = (Erase::Tied, self.chunk_len);
        let plan = Plan::new(Options { decay, erase, scale, chunk_len, ..o });
        Ok(plan.carrying("use0", "useT", sizes.head_dim, 0.0))
    }
}

impl StateVariant for PrecondGdn {
    const NAME: &'static str = "precond-gdn";
    const EXTRAS: &'static [Extra] = &[
        Extra::scalar("beta"),
        Extra::scalar("log_decay"),
        Extra::scalar("beta_use"),
        Extra::scalar("log_decay_use"),
    ];
    const SUMMARY: &'static str = "Gated delta rule that writes less along much-used key channels";
    const OPTIONS: &'static [OptionSpec] = OPTIONS;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        Self::read(Self::NAME, options)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.lay_out(Self::NAME, Decay::Scalar, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, used: &mut [f32], chunk: &mut Chunk) {
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        front::copy_qkv(x, chunk);
        if self.qk_norm {
            front::normalise(&mut chunk.q, key_dim, 1e-6);
            front::normalise(&mut chunk.k, key_dim, 1e-6);
        }
        front::copy_decays(x, self.log_decay, chunk);
        front::delta(chunk, key_dim, value_dim, |w| x.number("beta", w, self.beta));
        for (i, k) in chunk.k.chunks_exact_mut(key_dim).enumerate() {
            let fade = x.number("log_decay_use", i, self.log_decay_use).exp();
            let adds = x.number("beta_use", i, self.beta_use);
            for (k, used) in k.iter_mut().zip(&mut *used) {
                *used = fade * *used + adds * *k * *k;
                let r = (*used + 1e-6).ln() + 0.2;
                *k *= 1.5f32.powf(-r / (1.0 + r.abs()));
            }
        }
    }
}

/// One decay a token and key channel: `log_decay [batch, heads, tokens, head_dim]`; else as [`PrecondGdn`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecondKda(pub PrecondGdn);

impl StateVariant for PrecondKda {
    const NAME: &'static str = "precond-kda";
    const EXTRAS: &'static [Extra] = &[
        Extra::scalar("beta"),
        Extra::rows("log_decay", Width::Key),
        Extra::scalar("beta_use"),
        Extra::scalar("log_decay_use"),
    ];
    const SUMMARY: &'static str = "Kimi delta attention that writes less along much-used key channels";
    const OPTIONS: &'static [OptionSpec] = OPTIONS;

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        PrecondGdn::read(Self::NAME, options).map(Self)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.0.lay_out(Self::NAME, Decay::Key, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, used: &mut [f32], chunk: &mut Chunk) {
        self.0.fill(x, used, chunk);
    }
}
