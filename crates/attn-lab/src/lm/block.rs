//! One layer of [`ByteLm`](super::ByteLm): attention, then a gated feed-forward part, each on a normed residual.
//!
//! ```text
//! h  = rms_norm(x)      q, k, v = W_q h, W_k h, W_v h
//! window layer:  q, k ← rotary(q), rotary(k)                  keys i − window < j ≤ i
//! global layer:  q_i  ← s_head ln(i + 1) q_i                  keys j ≤ i
//! x ← x + W_o attention(q, k, v)
//! x ← x + W_down (silu(W_gate h') · W_up h')                  h' = rms_norm(x)
//! ```

use candle_core::{Device, Tensor};

use super::attention::{causal_attention, window_attention};
use super::config::Config;
use super::rms_norm::rms_norm;
use super::rotary::{Pairing, Rotary};
use super::swiglu::swiglu;
use super::weights::Weights;

/// `batch` stretches of `n` bytes; each begins at position `first` of its text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) batch: usize,
    pub(crate) n: usize,
    pub(crate) first: usize,
}

/// The inputs of one layer's attention, each `[batch · heads, n, head_dim]`.
pub(crate) struct Projected {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
}

#[derive(Clone)]
enum Sight {
    Window,
    // [heads]: how fast scores grow with the logarithm of the number of visible keys
    Global { log_scale: Tensor },
}

#[derive(Clone)]
pub(crate) struct Block {
    config: Config,
    sight: Sight,
    attn_norm: Tensor,
    // all matrices [out, in]
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    ffn_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Block {
    pub(crate) fn new(config: &Config, layer: usize, weights: &Weights) -> super::Result<Self> {
        let &Config { d_model, n_heads, d_ff, .. } = config;
        let width = config.attention_width();
        let get = |name: &str, dims: &[usize]| weights.get(&format!("layers.{layer}.{name}"), dims);
        let sight = if layer == config.global_layer {
            Sight::Global { log_scale: get("log_scale", &[n_heads])? }
        } else {
            Sight::Window
        };
        Ok(Self {
            config: config.clone(),
            sight,
            attn_norm: get("attn_norm", &[d_model])?,
            wq: get("wq", &[width, d_model])?,
            wk: get("wk", &[width, d_model])?,
            wv: get("wv", &[width, d_model])?,
            wo: get("wo", &[d_model, width])?,
            ffn_norm: get("ffn_norm", &[d_model])?,
            gate: get("gate", &[d_ff, d_model])?,
            up: get("up", &[d_ff, d_model])?,
            down: get("down", &[d_model, d_ff])?,
        })
    }

    /// What this layer's attention gets from the residual `x [batch · n, d_model]`.
    pub(crate) fn project(&self, x: &Tensor, span: Span) -> candle_core::Result<Projected> {
        let h = rms_norm(x, &self.attn_norm, self.config.norm_eps)?;
        let (q, k, v) = (linear(&h, &self.wq)?, linear(&h, &self.wk)?, linear(&h, &self.wv)?);
        let (q, k) = match &self.sight {
            Sight::Window => {
                let Config { head_dim, rope_theta, .. } = self.config;
                let rotary = Rotary::new(Pairing::HalfSplit, head_dim, rope_theta, span.first, span.n);
                (rotary.apply(&q)?, rotary.apply(&k)?)
            }
            Sight::Global { log_scale } => (self.log_scaled(&q, log_scale, span)?, k),
        };
        Ok(Projected {
            q: self.split_heads(&q, span)?,
            k: self.split_heads(&k, span)?,
            v: self.split_heads(&v, span)?,
        })
    }

    /// This layer's own attention.
    pub(crate) fn attend(&self, Projected { q, k, v }: &Projected) -> candle_core::Result<Tensor> {
        match self.sight {
            Sight::Window => window_attention(q, k, v, self.config.window),
            Sight::Global { .. } => causal_attention(q, k, v),
        }
    }

    /// The residual after this layer, from the residual before it and the attention's output.
    pub(crate) fn finish(&self, x: &Tensor, attended: &Tensor, span: Span) -> candle_core::Result<Tensor> {
        let x = (x + linear(&self.merge_heads(attended, span)?, &self.wo)?)?;
        let h = rms_norm(&x, &self.ffn_norm, self.config.norm_eps)?;
        let inner = swiglu(&linear(&h, &self.gate)?, &linear(&h, &self.up)?)?;
        x + linear(&inner, &self.down)?
    }

    pub(crate) fn forward(&self, x: &Tensor, span: Span) -> candle_core::Result<Tensor> {
        let projected = self.project(x, span)?;
        self.finish(x, &self.attend(&projected)?, span)
    }

    fn log_scaled(&self, q: &Tensor, log_scale: &Tensor, span: Span) -> candle_core::Result<Tensor> {
        let Config { n_heads, head_dim, .. } = self.config;
        let logs = (0..span.n).map(|i| ((span.first + i + 1) as f64).ln() as f32).collect::<Vec<_>>();
        let logs = Tensor::from_vec(logs, (span.n, 1, 1), &Device::Cpu)?;
        let factors = logs.broadcast_mul(&log_scale.reshape((1, n_heads, 1))?)?;
        let q = q.reshape((span.batch, span.n, n_heads, head_dim))?.broadcast_mul(&factors)?;
        q.reshape((span.batch * span.n, n_heads * head_dim))
    }

    fn split_heads(&self, x: &Tensor, span: Span) -> candle_core::Result<Tensor> {
        let Config { n_heads, head_dim, .. } = self.config;
        let x = x.reshape((span.batch, span.n, n_heads, head_dim))?.transpose(1, 2)?;
        x.contiguous()?.reshape((span.batch * n_heads, span.n, head_dim))
    }

    fn merge_heads(&self, x: &Tensor, span: Span) -> candle_core::Result<Tensor> {
        let Config { n_heads, head_dim, .. } = self.config;
        let x = x.reshape((span.batch, n_heads, span.n, head_dim))?.transpose(1, 2)?;
        x.contiguous()?.reshape((span.batch * span.n, n_heads * head_dim))
    }
}

/// `x Wᵀ` for `x [rows, in]`, `w [out, in]`.
pub(crate) fn linear(x: &Tensor, w: &Tensor) -> candle_core::Result<Tensor> {
    x.matmul(&w.t()?)
}
