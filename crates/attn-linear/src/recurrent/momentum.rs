//! The delta rule with momentum, and Titans.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Extra, Options, Part, Plan, Pull, Recurrence, Sizes, StateVariant, Tokens, Width, copy,
};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

const ETA: OptionSpec =
    OptionSpec { name: "eta", default: "0.3", help: "size of a step, where no tensor gives it" };
const LOG_MU: OptionSpec = OptionSpec {
    name: "log_mu",
    default: "-0.7",
    help: "natural log of how much momentum stays, where no tensor gives it",
};

/// The delta rule with momentum:
///
/// ```text
/// M_t = e^mu_t M_(t-1) + eta_t k_t (S_(t-1)^T p_t - v_t)^T          S_t = e^g_t S_(t-1) - beta_t M_t
/// o_t = scale q_t^T S_t
/// ```
///
/// The error is read from the previous, unfaded state. Extra inputs: `p [batch, heads, tokens, head_dim]` (the key where it
/// is not given), `beta`, `eta`, `log_decay`, `log_mu [batch, heads, tokens]`. The memory is `S` and `M`.
///
/// Source: the operator of this name in flash-linear-attention 0.6; Behrouz, Zhong, Mirrokni 2025 (Titans), equations 9, 10.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MomentumDelta {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// How much of the momentum reaches the state, where it is not given.
    pub beta: f32,
    /// Size of a step where none is given.
    pub eta: f32,
    /// The state's decay where none is given.
    pub log_decay: f32,
    /// The momentum's decay where none is given.
    pub log_mu: f32,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// Tokens handled at once.
    pub chunk_len: usize,
}

impl MomentumDelta {
    fn read(name: &'static str, options: &attn_core::registry::Options, beta: f32) -> Result<Self> {
        front::causal_only(name, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            beta: front::finite(options, "beta", beta)?,
            eta: front::finite(options, "eta", 0.3)?,
            log_decay: front::log_decay(options, -0.05)?,
            log_mu: front::finite(options, "log_mu", -0.7)?,
            qk_norm: options.get_or("qk_norm", true)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn lay_out(&self, name: &'static str, sizes: &Sizes) -> Result<Plan> {
        let (keys, values) = (sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, keys)?;
        let o = Options { recurrence: Some(Recurrence::Momentum), ..Options::new(name, 2 * keys, values) };
        let plan = Plan::new(Options { decay: Decay::Scalar, scale, chunk_len: self.chunk_len, ..o });
        let parts = vec![
            Part::matrix("initial_state", "sT", 0, keys, values),
            Part::matrix("m0", "mT", keys * values, keys, values),
        ];
        Ok(Plan { parts, ..plan })
    }
}

impl StateVariant for MomentumDelta {
    const NAME: &'static str = "momentum-delta";
    const EXTRAS: &'static [Extra] = &[
        Extra::rows("p", Width::Key),
        Extra::scalar("beta"),
        Extra::scalar("eta"),
        Extra::scalar("log_decay"),
        Extra::scalar("log_mu"),
    ];
    const SUMMARY: &'static str = "The delta rule with momentum (Behrouz et al. 2025)";
    const OPTIONS: &'static [OptionSpec] =
        &[CAUSAL, SCALE, front::QK_NORM, BETA, ETA, LOG_DECAY, LOG_MU, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        Self::read(Self::NAME, options, 0.5)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.lay_out(Self::NAME, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        let width = x.k.width();
        copy(x.v, &mut chunk.v);
        front::copy_decays(x, self.log_decay, chunk);
        chunk.notes.resize(3 * x.len(), 0.0);
        for i in 0..x.len() {
            let (q, k) = (&mut chunk.q[2 * i * width..][..width], &mut chunk.k[2 * i * width..][..2 * width]);
            q.copy_from_slice(x.q.row(i));
            let (k, p) = k.split_at_mut(width);
            k.copy_from_slice(x.k.row(i));
            if self.qk_norm {
                front::normalise(q, width, 1e-6);
                front::normalise(k, width, 1e-6);
            }
            p.copy_from_slice(x.extra("p").map_or(k, |p| p.row(i)));
            chunk.notes[3 * i] = x.number("log_mu", i, self.log_mu);
            chunk.notes[3 * i + 1] = x.number("eta", i, self.eta);
            chunk.notes[3 * i + 2] = x.number("beta", i, self.beta);
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        let width = x.k.width();
        to.v.copy_from_slice(&grads.v);
        pull::decays(grads, to);
        for i in 0..x.len() {
            let (own, one) = (i * width..(i + 1) * width, i..i + 1);
            let (by_key, by_p) = grads.k[2 * i * width..][..2 * width].split_at(width);
            to.q[own.clone()].copy_from_slice(&grads.q[2 * i * width..][..width]);
            to.k[own.clone()].copy_from_slice(by_key);
            match to.extra("p") {
                Some(rows) => rows[own.clone()].copy_from_slice(by_p),
                None => to.k[own.clone()].iter_mut().zip(by_p).for_each(|(d, more)| *d += more),
            }
            if self.qk_norm {
                let made = |rows: &'_ [f32]| rows[2 * i * width..][..width].to_vec();
                pull::normalised(x.q.slice(one.clone()), &made(&chunk.q), 1e-6, &mut to.q[own.clone()]);
                pull::normalised(x.k.slice(one), &made(&chunk.k), 1e-6, &mut to.k[own]);
            }
            for (n, name) in ["log_mu", "eta", "beta"].into_iter().enumerate() {
                to.add(name, i, grads.notes[3 * i + n]);
            }
        }
    }
}

/// Titans with a linear memory and squared loss: [`MomentumDelta`] with `p = k` and `beta = 1`. `e^log_decay` is one minus
/// its forgetting gate, `eta` its step with the loss's factor of 2, and `M` has the other sign.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TitansLinear(pub MomentumDelta);

impl StateVariant for TitansLinear {
    const NAME: &'static str = "titans-linear";
    const EXTRAS: &'static [Extra] =
        &[Extra::scalar("eta"), Extra::scalar("log_decay"), Extra::scalar("log_mu")];
    const SUMMARY: &'static str =
        "Titans with a linear memory: steps with momentum and forgetting (Behrouz et al. 2025)";
    const OPTIONS: &'static [OptionSpec] =
        &[CAUSAL, SCALE, front::QK_NORM, ETA, LOG_DECAY, LOG_MU, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        MomentumDelta::read(Self::NAME, options, 1.0).map(Self)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.0.lay_out(Self::NAME, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, carry: &mut [f32], chunk: &mut Chunk) {
        self.0.fill(x, carry, chunk);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, d_out: &[f32], to: &mut Pull<'_>) {
        self.0.pull(x, chunk, grads, d_out, to);
    }
}
