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
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Erase, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width, copy,
};
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

/// `M` of a use, and its derivative.
fn conditioner(used: f32) -> (f32, f32) {
    let r = (used + 1e-6).ln() + 0.2;
    let bounded = 1.0 + r.abs();
    let m = 1.5f32.powf(-r / bounded);
    (m, -m * 1.5f32.ln() / (bounded * bounded * (used + 1e-6)))
}

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
                *k *= conditioner(*used).0;
            }
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        let key_dim = x.k.width();
        // The keys before they were scaled, and the uses that scaled them.
        let mut raw = Chunk { k: vec![0.0; chunk.k.len()], ..Chunk::default() };
        copy(x.k, &mut raw.k);
        if self.qk_norm {
            front::normalise(&mut raw.k, key_dim, 1e-6);
        }
        let mut uses = to.carry.to_vec();
        uses.resize(to.carry.len() + raw.k.len(), 0.0);
        let faded = |i: usize| x.number("log_decay_use", i, self.log_decay_use).exp();
        for (at, k) in raw.k.iter().enumerate() {
            let adds = x.number("beta_use", at / key_dim, self.beta_use);
            uses[at + key_dim] = faded(at / key_dim) * uses[at] + adds * k * k;
        }
        // First that of the scaled key, to which the erase adds along the unscaled one.
        pull::qkv(grads, to);
        pull::decays(grads, to);
        for at in (0..raw.k.len()).rev() {
            let (i, c, k) = (at / key_dim, at % key_dim, raw.k[at]);
            let (m, slope) = conditioner(uses[at + key_dim]);
            let d_used = to.d_carry[c] + to.k[at] * k * slope;
            let adds = x.number("beta_use", i, self.beta_use);
            to.k[at] = m * to.k[at] + 2.0 * adds * k * d_used;
            to.d_carry[c] = faded(i) * d_used;
            to.add("beta_use", i, k * k * d_used);
            to.add("log_decay_use", i, faded(i) * uses[at] * d_used);
        }
        let mut betas = vec![0.0; x.len()];
        let values = (0..x.len()).map(|w| x.v.row(w));
        let beta = |w: usize| x.number("beta", w, self.beta);
        let [d_k, d_v] = [&mut *to.k, &mut *to.v];
        pull::delta(&raw, grads, key_dim, values, beta, [d_k, d_v], |w, d| betas[w] = d);
        betas.into_iter().enumerate().for_each(|(w, d)| to.add("beta", w, d));
        if self.qk_norm {
            pull::normalised(x.q, &chunk.q, 1e-6, to.q);
            pull::normalised(x.k, &raw.k, 1e-6, to.k);
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

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        self.0.pull(x, chunk, grads, d_out, to);
    }
}
