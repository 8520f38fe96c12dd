//! Comba and GDN-2: gated delta rules whose erase reads along another direction than the write key's, or with gates of
//! its own.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, QK_NORM, SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Erase, Extra, Options, Plan, Pull, Sizes, StateVariant, Tokens, Width,
};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

/// With a prediction key `p`:
///
/// ```text
/// S~ = e^g_t S          S <- S~ + beta k (v - S~^T p)^T          o = scale (q - d p)^T S
/// ```
///
/// Extra inputs: `p [batch, heads, tokens, head_dim]`, `beta`, `log_decay [batch, heads, tokens]`, `d [heads]` (0 where it is
/// not given). Without `p`, it is the key times `p_scale`.
///
/// Source: Hu et al. 2025 (Comba: Improving Bilinear RNNs with Closed-loop Control).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comba {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// The write strength where none is given.
    pub beta: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// The prediction key in terms of the key, where none is given.
    pub p_scale: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for Comba {
    const NAME: &'static str = "comba";
    const EXTRAS: &'static [Extra] = &[
        Extra::rows("p", Width::Key),
        Extra::scalar("beta"),
        Extra::scalar("log_decay"),
        Extra::head("d", Width::One),
    ];
    const SUMMARY: &'static str =
        "Comba: a gated delta rule that predicts along a key of its own (Hu et al. 2025)";
    const OPTIONS: &'static [OptionSpec] = &[
        CAUSAL,
        SCALE,
        QK_NORM,
        BETA,
        LOG_DECAY,
        OptionSpec {
            name: "p_scale",
            default: "0.9",
            help: "prediction key by key, where no tensor gives it",
        },
        FINE_CHUNK,
    ];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            qk_norm: options.get_or("qk_norm", true)?,
            beta: front::finite(options, "beta", 0.5)?,
            log_decay: front::log_decay(options, -0.05)?,
            p_scale: front::finite(options, "p_scale", 0.9)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        let (decay, erase, chunk_len) = (Decay::Scalar, Erase::Tied, self.chunk_len);
        Ok(Plan::new(Options { decay, erase, scale, chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        front::copy_qkv(x, chunk);
        if self.qk_norm {
            front::normalise(&mut chunk.q, key_dim, 1e-6);
            front::normalise(&mut chunk.k, key_dim, 1e-6);
        }
        front::copy_decays(x, self.log_decay, chunk);
        let p = x.extra("p");
        for i in 0..x.len() {
            let (beta, d) = (x.number("beta", i, self.beta), x.number("d", i, 0.0));
            let own = i * key_dim..(i + 1) * key_dim;
            let (q, k) = (&mut chunk.q[own.clone()], &chunk.k[own.clone()]);
            for (c, (a, q)) in chunk.a[own].iter_mut().zip(q).enumerate() {
                let p = p.map_or(self.p_scale * k[c], |p| p.row(i)[c]);
                *q -= d * p;
                *a = -beta * p;
            }
            chunk.v[i * value_dim..][..value_dim].iter_mut().for_each(|v| *v *= beta);
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        pull::qkv(grads, to);
        pull::decays(grads, to);
        let given = x.extra("p");
        for i in 0..x.len() {
            let (beta, d) = (x.number("beta", i, self.beta), x.number("d", i, 0.0));
            let own = i * key_dim..(i + 1) * key_dim;
            let (da, dq) = (&grads.a[own.clone()], &grads.q[own.clone()]);
            let (mut erased, mut corrected) = (0.0, 0.0);
            for (c, at) in own.enumerate() {
                let p = given.map_or(self.p_scale * chunk.k[at], |p| p.row(i)[c]);
                erased -= p * da[c];
                corrected -= p * dq[c];
                let dp = -beta * da[c] - d * dq[c];
                match to.extra("p") {
                    Some(rows) => rows[at] = dp,
                    None => to.k[at] += self.p_scale * dp,
                }
            }
            let dv = &mut to.v[i * value_dim..][..value_dim];
            let written: f32 = x.v.row(i).iter().zip(&*dv).map(|(v, dv)| v * dv).sum();
            dv.iter_mut().for_each(|dv| *dv *= beta);
            to.add("beta", i, erased + written);
            to.add("d", i, corrected);
        }
        if self.qk_norm {
            // The query was corrected after its norm: its unit vector is found again.
            let mut q = vec![0.0; x.len() * key_dim];
            crate::matrix_state::copy(x.q, &mut q);
            front::normalise(&mut q, key_dim, 1e-6);
            pull::normalised(x.q, &q, 1e-6, to.q);
            pull::normalised(x.k, &chunk.k, 1e-6, to.k);
        }
    }
}

/// The gated delta rule with an erase gate a key channel and a write gate a value channel:
///
/// ```text
/// S~ = diag(e^g_t) S          S <- S~ + k (w o v - S~^T (b o k))^T          o = scale q^T S
/// ```
///
/// Extra inputs: `log_decay`, `erase_gate [batch, heads, tokens, head_dim]`, `write_gate [.., head_dim_v]`.
///
/// Source: the operator of this name in flash-linear-attention 0.6.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gdn2 {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// Both gates where none are given.
    pub beta: f32,
    /// The decay where none is given.
    pub log_decay: f32,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl StateVariant for Gdn2 {
    const NAME: &'static str = "gdn2";
    const EXTRAS: &'static [Extra] = &[
        Extra::rows("log_decay", Width::Key),
        Extra::rows("erase_gate", Width::Key),
        Extra::rows("write_gate", Width::Value),
    ];
    const SUMMARY: &'static str = "GDN-2: a delta rule with erase, write and decay gates of every channel";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, QK_NORM, BETA, LOG_DECAY, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(Self::NAME, options)?;
        Ok(Self {
            scale: front::scale(options)?,
            qk_norm: options.get_or("qk_norm", true)?,
            beta: front::finite(options, "beta", 0.5)?,
            log_decay: front::log_decay(options, -0.05)?,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(Self::NAME, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        let (decay, erase, chunk_len) = (Decay::Key, Erase::Tied, self.chunk_len);
        Ok(Plan::new(Options { decay, erase, scale, chunk_len, ..o }))
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        front::copy_qkv(x, chunk);
        if self.qk_norm {
            front::normalise(&mut chunk.q, x.k.width(), 1e-6);
            front::normalise(&mut chunk.k, x.k.width(), 1e-6);
        }
        front::copy_decays(x, self.log_decay, chunk);
        front::multiply_by(x.extra("write_gate"), self.beta, &mut chunk.v);
        chunk.a.iter_mut().zip(&chunk.k).for_each(|(a, k)| *a = -k);
        front::multiply_by(x.extra("erase_gate"), self.beta, &mut chunk.a);
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        pull::qkv(grads, to);
        pull::decays(grads, to);
        if let Some(d) = to.extra("erase_gate") {
            d.iter_mut().zip(&chunk.k).zip(&grads.a).for_each(|((d, k), da)| *d = -k * da);
        }
        if let Some(d) = to.extra("write_gate") {
            d.iter_mut().zip(x.v.iter().flatten()).zip(&grads.v).for_each(|((d, v), dv)| *d = v * dv);
        }
        let mut erased = grads.a.clone();
        front::multiply_by(x.extra("erase_gate"), self.beta, &mut erased);
        to.k.iter_mut().zip(&erased).for_each(|(dk, da)| *dk -= da);
        front::multiply_by(x.extra("write_gate"), self.beta, to.v);
        pull::norms(x, chunk, self.qk_norm, to);
    }
}
