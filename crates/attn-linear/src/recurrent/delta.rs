//! The delta rule and its gated forms: a token corrects what its key reads.
//!
//! ```text
//! S~_t = e^g_t S_(t-1)          S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T          o_t = scale q_t^T S_t
//! ```
//!
//! [`DeltaNet`] has no decay, [`GatedDeltaNet`] one a token, [`Kda`] one a token and key channel. They are three rows of
//! one table; the front end below serves all three.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, QK_NORM, SCALE, sigmoid, softplus};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Erase, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width, copy,
};
use attn_core::registry::OptionSpec;
use attn_core::{AttnError, Result, softmax_scale_or_default};
use std::str::FromStr;

/// What the three have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeltaRule {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// The write strength where none is given; in (0, 2).
    pub beta: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl DeltaRule {
    fn from_options(name: &'static str, options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(name, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            qk_norm: options.get_or("qk_norm", true)?,
            beta: front::finite(options, "beta", 0.5)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, name: &'static str, decay: Decay, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(name, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        Ok(Plan::new(Options { decay, erase: Erase::Tied, scale, chunk_len: self.chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, chunk: &mut Chunk) {
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        front::copy_qkv(x, chunk);
        if self.qk_norm {
            front::normalise(&mut chunk.q, key_dim, 1e-6);
            front::normalise(&mut chunk.k, key_dim, 1e-6);
        }
        match x.extra("beta").filter(|beta| beta.width() > 1) {
            None => front::delta(chunk, key_dim, value_dim, |w| x.number("beta", w, self.beta)),
            Some(beta) => {
                // A strength a value channel: the solves of the columns differ by it.
                chunk.strength.resize(chunk.v.len(), 0.0);
                copy(beta, &mut chunk.strength);
                chunk.a.iter_mut().zip(&chunk.k).for_each(|(a, k)| *a = -k);
                chunk.v.iter_mut().zip(&chunk.strength).for_each(|(v, beta)| *v *= beta);
            }
        }
    }
}

impl DeltaRule {
    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        match x.extra("beta").filter(|beta| beta.width() > 1) {
            None => {
                let mut betas = vec![0.0; x.len()];
                let beta = |w| x.number("beta", w, self.beta);
                let keep = |w: usize, d| betas[w] = d;
                pull::delta(chunk, grads, x.k.width(), x.v.iter(), beta, [&mut *to.k, &mut *to.v], keep);
                betas.into_iter().enumerate().for_each(|(w, d)| to.add("beta", w, d));
            }
            Some(_) => {
                to.k.iter_mut().zip(&grads.a).for_each(|(dk, da)| *dk -= da);
                to.v.iter_mut().zip(&chunk.strength).for_each(|(dv, beta)| *dv *= beta);
                if let Some(d) = to.extra("beta") {
                    let rows = d.iter_mut().zip(&grads.strength).zip(x.v.iter().flatten()).zip(&grads.v);
                    rows.for_each(|(((d, erased), v), dv)| *d = erased + v * dv);
                }
            }
        }
        pull::norms(x, chunk, self.qk_norm, to);
    }
}

/// The delta rule without decay.
///
/// Extra input: `beta [batch, heads, tokens]`, or `[.., head_dim_v]` for a strength a value channel.
///
/// Source: Schlag, Irie, Schmidhuber 2021; Yang, Wang, Zhang, Shen, Kim 2024 (its chunked form).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeltaNet(pub DeltaRule);

impl StateVariant for DeltaNet {
    const NAME: &'static str = "deltanet";
    const EXTRAS: &'static [Extra] = &[Extra::rows("beta", Width::OneOrValue)];
    const SUMMARY: &'static str =
        "The delta rule: a token corrects what its key reads (Schlag et al. 2021, Yang et al. 2024)";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, QK_NORM, BETA, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        DeltaRule::from_options(Self::NAME, options).map(Self)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.0.plan(Self::NAME, Decay::None, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        self.0.fill(x, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        self.0.pull(x, chunk, grads, to);
    }
}

/// How raw gates become decays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gate {
    /// `g = -e^a_log softplus(raw + dt_bias)`.
    #[default]
    Softplus,
    /// `g = -5 sigmoid(e^a_log (raw + dt_bias))`: no stronger than `e^-5`.
    LowerBound,
}

impl FromStr for Gate {
    type Err = AttnError;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "softplus" => Ok(Self::Softplus),
            "lower-bound" => Ok(Self::LowerBound),
            _ => Err(AttnError::value("gate", s, "softplus or lower-bound")),
        }
    }
}

impl Gate {
    fn decay(self, raw: f32, a_log: f32, bias: f32) -> f32 {
        match self {
            Self::Softplus => -a_log.exp() * softplus(raw + bias),
            Self::LowerBound => -5.0 * sigmoid(a_log.exp() * (raw + bias)),
        }
    }

    /// [`Gate::fill`] backwards.
    fn pull(self, x: &Tokens<'_>, grads: &Chunk, to: &mut Pull<'_>) {
        let Some(raw) = x.extra("gate_raw") else { return pull::decays(grads, to) };
        let (a_log, bias, width) = (x.number("a_log", 0, 0.0), x.extra("dt_bias"), raw.width());
        for (at, dg) in grads.log_decay.iter().enumerate() {
            let (i, c) = (at / width, at % width);
            let biased = raw.row(i)[c] + bias.map_or(0.0, |bias| bias.row(i)[c]);
            let (by_raw, by_log) = match self {
                Self::Softplus => (-a_log.exp() * sigmoid(biased), -a_log.exp() * softplus(biased)),
                Self::LowerBound => {
                    let z = a_log.exp() * biased;
                    let slope = -5.0 * pull::sigmoid_slope(z);
                    (slope * a_log.exp(), slope * z)
                }
            };
            to.add("gate_raw", at, dg * by_raw);
            to.add("dt_bias", at, dg * by_raw);
            to.add("a_log", i, dg * by_log);
        }
    }

    /// The decays from raw gates, or as they are given.
    fn fill(self, x: &Tokens<'_>, default: f32, chunk: &mut Chunk) {
        let Some(raw) = x.extra("gate_raw") else { return front::copy_decays(x, default, chunk) };
        let a_log = x.number("a_log", 0, 0.0);
        let bias = x.extra("dt_bias");
        for (i, out) in chunk.log_decay.chunks_exact_mut(raw.width()).enumerate() {
            for (c, (out, raw)) in out.iter_mut().zip(raw.row(i)).enumerate() {
                *out = self.decay(*raw, a_log, bias.map_or(0.0, |bias| bias.row(i)[c]));
            }
        }
    }
}

/// The delta rule with a decay a token; the error is read from the faded state.
///
/// Extra inputs: `beta [batch, heads, tokens]`; `log_decay [batch, heads, tokens]`, or `gate_raw` of that shape with
/// `a_log`, `dt_bias [heads]` for `-e^a_log softplus(gate_raw + dt_bias)`.
///
/// Source: Yang, Kautz, Hatamizadeh 2025 (Gated Delta Networks), equation 10.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedDeltaNet {
    /// What it shares with the ungated form.
    pub rule: DeltaRule,
    /// The decay where none is given.
    pub log_decay: f32,
}

impl StateVariant for GatedDeltaNet {
    const NAME: &'static str = "gated-deltanet";
    const EXTRAS: &'static [Extra] = &[
        Extra::rows("beta", Width::OneOrValue),
        Extra::scalar("log_decay"),
        Extra::scalar("gate_raw"),
        Extra::head("a_log", Width::One),
        Extra::head("dt_bias", Width::One),
    ];
    const SUMMARY: &'static str = "The delta rule on a state that fades (Yang, Kautz, Hatamizadeh 2025)";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, QK_NORM, BETA, LOG_DECAY, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        let rule = DeltaRule::from_options(Self::NAME, options)?;
        Ok(Self { rule, log_decay: front::log_decay(options, -0.05)? })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.rule.plan(Self::NAME, Decay::Scalar, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        self.rule.fill(x, chunk);
        Gate::Softplus.fill(x, self.log_decay, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        self.rule.pull(x, chunk, grads, to);
        Gate::Softplus.pull(x, grads, to);
    }
}

/// Kimi delta attention: the delta rule with a decay a token and key channel.
///
/// Extra inputs: as [`GatedDeltaNet`], with `log_decay`, `gate_raw [batch, heads, tokens, head_dim]` and
/// `dt_bias [heads, head_dim]`. q and k may have fewer heads than v.
///
/// Source: Kimi Team 2025 (Kimi Linear).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kda {
    /// What it shares with the ungated form.
    pub rule: DeltaRule,
    /// The decay where none is given.
    pub log_decay: f32,
    /// How raw gates become decays.
    pub gate: Gate,
}

impl StateVariant for Kda {
    const NAME: &'static str = "kda";
    const EXTRAS: &'static [Extra] = &[
        Extra::rows("beta", Width::OneOrValue),
        Extra::rows("log_decay", Width::Key),
        Extra::rows("gate_raw", Width::Key),
        Extra::head("a_log", Width::One),
        Extra::head("dt_bias", Width::Key),
    ];
    const SUMMARY: &'static str =
        "Kimi delta attention: the delta rule, every key channel fading (Kimi Team 2025)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        SCALE,
        QK_NORM,
        BETA,
        LOG_DECAY,
        OptionSpec {
            name: "gate",
            default: "softplus",
            help: "how raw gates become decays: softplus, lower-bound",
        },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        let rule = DeltaRule::from_options(Self::NAME, options)?;
        let (log_decay, gate) = (front::log_decay(options, -0.05)?, options.get_or("gate", Gate::default())?);
        Ok(Self { rule, log_decay, gate })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.rule.plan(Self::NAME, Decay::Key, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        self.rule.fill(x, chunk);
        self.gate.fill(x, self.log_decay, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        self.rule.pull(x, chunk, grads, to);
        self.gate.pull(x, grads, to);
    }
}
