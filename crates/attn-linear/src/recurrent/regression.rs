//! Test-time regression: states that are fitted to the tokens so far, by steps with momentum or exactly; and Oja's rule.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, SCALE, UNIT_SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Extra, Options, Part, Plan, Pull, Reads, Recurrence, Sizes, StateVariant, Tokens, Width,
    copy, copy_or,
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

/// MesaNet: the least-squares fit of the values so far, solved at every token:
///
/// ```text
/// H_t = e^g_t H_(t-1) + beta_t k_t k_t^T          G_t = e^g_t G_(t-1) + beta_t k_t v_t^T
/// o_t = scale G_t^T x_t          (H_t + diag(lambda)) x_t = q_t
/// ```
///
/// The solve is by conjugate gradients to the precision of f32, for all tokens of a chunk together; by Cholesky where these do
/// not arrive, and for gradients. Extra inputs: `beta`, `log_decay [batch, heads,
/// tokens]`, `lambda [heads, head_dim]`, above 0.
///
/// Source: von Oswald et al. 2025 (MesaNet), equations 4 to 6.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MesaNet {
    /// Multiplies the output.
    pub scale: f32,
    /// The write strength where none is given.
    pub beta: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// The regulariser where none is given; above 0.
    pub lambda: f32,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// Tokens handled at once.
    pub chunk_len: usize,
}

impl StateVariant for MesaNet {
    const NAME: &'static str = "mesanet";
    const EXTRAS: &'static [Extra] =
        &[Extra::scalar("beta"), Extra::scalar("log_decay"), Extra::head("lambda", Width::Key)];
    const SUMMARY: &'static str =
        "MesaNet: the least-squares fit of the past, solved exactly (von Oswald et al. 2025)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        UNIT_SCALE,
        front::QK_NORM,
        BETA,
        LOG_DECAY,
        OptionSpec { name: "lambda", default: "1", help: "regulariser, where no tensor gives it; above 0" },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        let lambda = front::finite(options, "lambda", 1.0)?;
        if lambda <= 0.0 {
            return Err(attn_core::AttnError::value("option `lambda`", lambda, "above 0"));
        }
        Ok(Self {
            scale: front::finite(options, "scale", 1.0)?,
            beta: front::finite(options, "beta", 0.5)?,
            log_decay: front::log_decay(options, -0.05)?,
            lambda,
            qk_norm: options.get_or("qk_norm", true)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let (keys, values) = (sizes.head_dim, sizes.head_dim_v);
        let o = Options::new(Self::NAME, keys, keys + values);
        let o = Options { recurrence: Some(Recurrence::Regression), ..o };
        let plan =
            Plan::new(Options { decay: Decay::Scalar, scale: self.scale, chunk_len: self.chunk_len, ..o });
        let whole = |initial, after| Part::matrix(initial, after, 0, keys, keys + values);
        let parts = vec![
            whole("hkk0", "hkkT").columns(0, keys, keys + values),
            whole("hkv0", "hkvT").columns(keys, values, keys + values),
        ];
        Ok(Plan { parts, ..plan })
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        let (keys, values) = (x.k.width(), x.v.width());
        copy(x.q, &mut chunk.q);
        copy(x.k, &mut chunk.k);
        if self.qk_norm {
            front::normalise(&mut chunk.q, keys, 1e-6);
            front::normalise(&mut chunk.k, keys, 1e-6);
        }
        front::copy_decays(x, self.log_decay, chunk);
        for (i, row) in chunk.v.chunks_exact_mut(keys + values).enumerate() {
            let k = &mut chunk.k[i * keys..][..keys];
            row[..keys].copy_from_slice(k);
            row[keys..].copy_from_slice(x.v.row(i));
            let beta = x.number("beta", i, self.beta);
            k.iter_mut().for_each(|k| *k *= beta);
        }
        chunk.bonus.resize(keys, 0.0);
        let lambda = x.extra("lambda").filter(|_| !x.is_empty());
        copy_or(lambda.map(|rows| rows.slice(0..1)), self.lambda, &mut chunk.bonus);
    }

    const FINISHES: bool = true;

    fn finish(&self, x: &Tokens<'_>, _: &Chunk, reads: Reads<'_>, out: &mut [f32]) {
        let (keys, values) = (x.k.width(), x.v.width());
        let rows = out.chunks_exact_mut(values).zip(reads.rows.chunks_exact(keys + values));
        rows.for_each(|(out, read)| {
            out.iter_mut().zip(&read[keys..]).for_each(|(o, x)| *o = reads.scale * x)
        });
    }

    const DIFFERENTIABLE: bool = true;

    fn pull_finish(
        &self,
        x: &Tokens<'_>,
        _: &Chunk,
        reads: Reads<'_>,
        d_out: &[f32],
        [d_rows, _]: [&mut [f32]; 2],
        _: &mut Pull<'_>,
    ) {
        let (keys, values) = (x.k.width(), x.v.width());
        let rows = d_rows.chunks_exact_mut(keys + values).zip(d_out.chunks_exact(values));
        rows.for_each(|(d_row, d)| d_row[keys..].iter_mut().zip(d).for_each(|(to, d)| *to = reads.scale * d));
    }

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        let (keys, values) = (x.k.width(), x.v.width());
        to.q.copy_from_slice(&grads.q);
        pull::decays(grads, to);
        let mut made = Vec::with_capacity(chunk.k.len());
        let rows = chunk.v.chunks_exact(keys + values).zip(grads.v.chunks_exact(keys + values));
        for (i, (row, d_row)) in rows.enumerate() {
            let (k, by_key) = (&row[..keys], &grads.k[i * keys..][..keys]);
            let beta = x.number("beta", i, self.beta);
            let d_k = to.k[i * keys..][..keys].iter_mut().zip(d_row).zip(by_key);
            d_k.for_each(|((d, by_row), by_key)| *d = by_row + beta * by_key);
            to.v[i * values..][..values].copy_from_slice(&d_row[keys..]);
            to.add("beta", i, k.iter().zip(by_key).map(|(k, d)| k * d).sum());
            made.extend_from_slice(k);
        }
        if self.qk_norm {
            pull::normalised(x.q, &chunk.q, 1e-6, to.q);
            pull::normalised(x.k, &made, 1e-6, to.k);
        }
        // One row for all tokens: the first one's gradient is that of the chunk.
        if let Some(d) = to.extra("lambda") {
            d[..keys].copy_from_slice(&grads.bonus);
        }
    }

    fn max_error(&self) -> f64 {
        1e-4
    }
}

/// Gated Oja's rule, the delta rule of the transposed state:
///
/// ```text
/// S~_t = S_(t-1) diag(e^g_t)          S_t = S~_t + beta_t (k_t - S~_t v_t) v_t^T          o_t = scale q_t^T S_t
/// ```
///
/// Extra inputs: `beta [batch, heads, tokens]`, `log_decay [batch, heads, tokens, head_dim_v]`.
///
/// Source: Oja 1982; the operator `gated_oja_rule` in flash-linear-attention 0.6.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedOja {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// The write strength where none is given.
    pub beta: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// Divides values by their length.
    pub v_norm: bool,
    /// Tokens handled at once.
    pub chunk_len: usize,
}

impl StateVariant for GatedOja {
    const NAME: &'static str = "gated-oja";
    const EXTRAS: &'static [Extra] = &[Extra::scalar("beta"), Extra::rows("log_decay", Width::Value)];
    const SUMMARY: &'static str = "Gated Oja's rule: the delta rule of the transposed state";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        SCALE,
        OptionSpec { name: "v_norm", default: "true", help: "divides values by their length (true|false)" },
        BETA,
        LOG_DECAY,
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            beta: front::finite(options, "beta", 0.5)?,
            log_decay: front::log_decay(options, -0.05)?,
            v_norm: options.get_or("v_norm", true)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let o = Options { recurrence: Some(Recurrence::Oja), ..o };
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        Ok(Plan::new(Options { decay: Decay::Value, scale, chunk_len: self.chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        front::copy_qkv(x, chunk);
        if self.v_norm {
            front::normalise(&mut chunk.v, x.v.width(), 1e-6);
        }
        front::copy_decays(x, self.log_decay, chunk);
        chunk.notes.resize(x.len(), 0.0);
        for (i, k) in chunk.k.chunks_exact_mut(x.k.width()).enumerate() {
            chunk.notes[i] = x.number("beta", i, self.beta);
            k.iter_mut().for_each(|k| *k *= chunk.notes[i]);
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        pull::decays(grads, to);
        for (i, k) in x.k.iter().enumerate() {
            let d_k = &mut to.k[i * k.len()..][..k.len()];
            let written: f32 = k.iter().zip(&*d_k).map(|(k, d)| k * d).sum();
            d_k.iter_mut().for_each(|d| *d *= chunk.notes[i]);
            to.add("beta", i, written + grads.notes[i]);
        }
        if self.v_norm {
            pull::normalised(x.v, &chunk.v, 1e-6, to.v);
        }
    }
}
