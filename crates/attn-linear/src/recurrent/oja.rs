//! Gated Oja's rule.

use super::front::{self, BETA, CAUSAL, FINE_CHUNK, LOG_DECAY, SCALE};
use super::pull;
use crate::matrix_state::{
    Chunk, Decay, Extra, Options, Plan, Pull, Recurrence, Sizes, StateVariant, Tokens, Width,
};
use attn_core::registry::OptionSpec;
use attn_core::{Result, softmax_scale_or_default};

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
