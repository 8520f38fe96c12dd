//! Delta products: several corrections of the state by each token.
//!
//! ```text
//! S <- e^g_t S          then for each of the token's n keys:  S <- S + beta k (v - S^T k)^T          o_t = scale q_t^T S
//! ```
//!
//! Source: Siems et al. 2025 (DeltaProduct: products of Householder transformations).

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, QK_NORM, SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Erase, Extra, Options, Per, Plan, Pull, Sizes, StateVariant, Tokens, Width,
};
use attn_core::registry::OptionSpec;
use attn_core::{AttnError, Result, softmax_scale_or_default};

const EXTRA_BETA: Extra = Extra { name: "beta", per: Per::Key, width: Width::One };
const HOUSEHOLDERS: OptionSpec = OptionSpec {
    name: "householders",
    default: "2",
    help: "keys a token; with as many keys as queries, a token applies its key so many times",
};

/// The delta rule with several keys a token: `k`, `v`, `beta` have `householders` rows for each query, token `t` owns rows
/// `t n .. t n + n - 1`. Where there are as many keys as queries, each is applied `n` times.
///
/// Extra input: `beta [batch, heads, keys]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeltaProduct {
    /// Multiplies the output; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Divides queries and keys by their length.
    pub qk_norm: bool,
    /// The write strength where none is given; in (0, 2).
    pub beta: f32,
    /// Corrections a token makes.
    pub householders: usize,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

impl DeltaProduct {
    fn read(name: &'static str, options: &attn_core::registry::Options) -> Result<Self> {
        front::causal_only(name, options)?;
        let householders = options.get_or("householders", 2)?;
        if householders == 0 {
            return Err(AttnError::value("option `householders`", 0, "at least 1"));
        }
        Ok(Self {
            scale: front::scale(options)?,
            qk_norm: options.get_or("qk_norm", true)?,
            beta: front::finite(options, "beta", 0.5)?,
            householders,
            chunk_len: front::chunk_len(options, front::FINE_CHUNK_LEN)?,
        })
    }

    fn lay_out(&self, name: &'static str, decay: Decay, sizes: &Sizes) -> Result<Plan> {
        let o = Options::new(name, sizes.head_dim, sizes.head_dim_v);
        let scale = softmax_scale_or_default(self.scale, sizes.head_dim)?;
        let (erase, writes, chunk_len) = (Erase::Tied, self.householders, self.chunk_len);
        let plan = Plan::new(Options { decay, erase, writes, scale, chunk_len, ..o });
        let keys_per_token = if sizes.keys == sizes.tokens { 1 } else { self.householders };
        Ok(Plan { keys_per_token, ..plan })
    }

    fn fill_rule(&self, x: &Tokens<'_>, chunk: &mut Chunk) {
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        // Writes that share a key, where a token has one.
        let shared = if x.k.len() == x.len() { self.householders } else { 1 };
        front::copy_q(x, chunk);
        let writes = chunk.k.chunks_exact_mut(key_dim).zip(chunk.v.chunks_exact_mut(value_dim));
        for (w, (k, v)) in writes.enumerate() {
            k.copy_from_slice(x.k.row(w / shared));
            v.copy_from_slice(x.v.row(w / shared));
        }
        if self.qk_norm {
            front::normalise(&mut chunk.q, key_dim, 1e-6);
            front::normalise(&mut chunk.k, key_dim, 1e-6);
        }
        front::delta(chunk, key_dim, value_dim, |w| x.number("beta", w / shared, self.beta));
    }
}

impl DeltaProduct {
    fn pull_rule(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, to: &mut Pull<'_>) {
        let (key_dim, value_dim) = (x.k.width(), x.v.width());
        let shared = if x.k.len() == x.len() { self.householders } else { 1 };
        let (mut dk, mut dv) = (grads.k.clone(), grads.v.clone());
        let mut betas = vec![0.0; x.k.len()];
        let values = (0..x.len() * self.householders).map(|w| x.v.row(w / shared));
        let beta = |w: usize| x.number("beta", w / shared, self.beta);
        let keep = |w: usize, d| betas[w / shared] += d;
        pull::delta(chunk, grads, key_dim, values, beta, [&mut dk, &mut dv], keep);
        betas.into_iter().enumerate().for_each(|(w, d)| to.add("beta", w, d));
        to.q.copy_from_slice(&grads.q);
        if self.qk_norm {
            pull::normalised(x.q, &chunk.q, 1e-6, to.q);
        }
        for (w, d) in dk.chunks_exact_mut(key_dim).enumerate() {
            if self.qk_norm {
                let own = x.k.slice(w / shared..w / shared + 1);
                pull::normalised(own, &chunk.k[w * key_dim..][..key_dim], 1e-6, d);
            }
            to.k[w / shared * key_dim..].iter_mut().zip(d).for_each(|(out, d)| *out += *d);
        }
        for (w, d) in dv.chunks_exact(value_dim).enumerate() {
            to.v[w / shared * value_dim..].iter_mut().zip(d).for_each(|(out, d)| *out += d);
        }
    }
}

impl StateVariant for DeltaProduct {
    const NAME: &'static str = "deltaproduct";
    const EXTRAS: &'static [Extra] = &[EXTRA_BETA];
    const SUMMARY: &'static str = "DeltaProduct: several delta-rule corrections a token (Siems et al. 2025)";
    const OPTIONS: &'static [OptionSpec] = &[CAUSAL, SCALE, QK_NORM, BETA, HOUSEHOLDERS, FINE_CHUNK];

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

/// [`DeltaProduct`] on a state that fades once a token, before its first correction.
///
/// Extra inputs: `beta [batch, heads, keys]`, `log_decay [batch, heads, tokens]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedDeltaProduct {
    /// The corrections.
    pub product: DeltaProduct,
    /// The decay where none is given.
    pub log_decay: f32,
}

impl StateVariant for GatedDeltaProduct {
    const NAME: &'static str = "gated-deltaproduct";
    const EXTRAS: &'static [Extra] = &[EXTRA_BETA, Extra::scalar("log_decay")];
    const SUMMARY: &'static str =
        "Gated DeltaProduct: several corrections a token of a state that fades (Siems et al. 2025)";
    const OPTIONS: &'static [OptionSpec] =
        &[CAUSAL, SCALE, QK_NORM, BETA, LOG_DECAY, HOUSEHOLDERS, FINE_CHUNK];

    fn from_options(options: &attn_core::registry::Options) -> Result<Self> {
        let log_decay = front::log_decay(options, -0.05)?;
        Ok(Self { product: DeltaProduct::read(Self::NAME, options)?, log_decay })
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan> {
        self.product.lay_out(Self::NAME, Decay::Scalar, sizes)
    }

    fn fill(&self, x: &Tokens<'_>, _: &mut [f32], chunk: &mut Chunk) {
        self.product.fill_rule(x, chunk);
        for (i, token) in chunk.log_decay.chunks_exact_mut(self.product.householders).enumerate() {
            token.fill(0.0);
            token[0] = x.number("log_decay", i, self.log_decay);
        }
    }

    const DIFFERENTIABLE: bool = true;

    fn pull(&self, x: &Tokens<'_>, chunk: &Chunk, grads: &Chunk, _: &[f32], to: &mut Pull<'_>) {
        self.product.pull_rule(x, chunk, grads, to);
        for (i, d) in grads.log_decay.iter().step_by(self.product.householders).enumerate() {
            to.add("log_decay", i, *d);
        }
    }
}
