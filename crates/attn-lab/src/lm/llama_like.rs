//! A pre-norm transformer of the Llama kind, whatever file its weights came from.
//!
//! ```text
//! h = rms_norm(x)      q, k = rotary(W_q h), rotary(W_k h)      v = W_v h
//! x ← x + W_o attention(q, k, v)                                 causal, scale 1/√head_dim, grouped heads
//! x ← x + W_down (silu(W_gate h') · W_up h')                     h' = rms_norm(x)
//! ```

use std::fmt;
use std::ops::Range;

use candle_core::{Device, Tensor};

use super::attention::{causal_attention, repeat_heads};
use super::block::linear;
use super::captured::Captured;
use super::error::{LmError, Result};
use super::rms_norm::rms_norm;
use super::rotary::{Pairing, Rotary};
use super::swiglu::swiglu;

/// Positions whose attention and feed-forward part are computed at once.
const CHUNK: usize = 2048;

/// The shape of a [`LlamaLike`].
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub n_heads_q: usize,
    /// Key and value heads.
    pub n_heads_kv: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Inner width of the feed-forward part.
    pub d_ff: usize,
    /// Number of layers.
    pub n_layers: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f64,
    /// Positions the model was trained on; longer texts run, but leave its regime.
    pub trained_positions: usize,
}

impl LlamaConfig {
    /// Refuses shapes that no forward pass could run; `what` names the source.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        let &Self { d_model, n_heads_q, n_heads_kv, head_dim, d_ff, n_layers, vocab_size, .. } = self;
        if [d_model, n_heads_q, n_heads_kv, head_dim, d_ff, n_layers, vocab_size].contains(&0) {
            return Err(LmError::format(what, format!("a size is 0 in {self:?}")));
        }
        if n_heads_q % n_heads_kv != 0 {
            let problem = format!("{n_heads_q} query heads cannot share {n_heads_kv} key/value heads");
            return Err(LmError::format(what, problem));
        }
        if head_dim % 2 != 0 {
            return Err(LmError::format(what, format!("head_dim {head_dim} is odd")));
        }
        Ok(())
    }
}

/// The matrices (`[out, in]`) and gains of one layer.
#[derive(Clone)]
pub(crate) struct LlamaLayer {
    pub(crate) attn_norm: Tensor,
    pub(crate) wq: Tensor,
    pub(crate) wk: Tensor,
    pub(crate) wv: Tensor,
    pub(crate) wo: Tensor,
    pub(crate) ffn_norm: Tensor,
    pub(crate) gate: Tensor,
    pub(crate) up: Tensor,
    pub(crate) down: Tensor,
}

/// A model read from a llama2.c checkpoint or from Llama-style safetensors.
#[derive(Clone)]
pub struct LlamaLike {
    pub(crate) config: LlamaConfig,
    pub(crate) pairing: Pairing,
    pub(crate) embedding: Tensor,
    pub(crate) layers: Vec<LlamaLayer>,
    pub(crate) final_norm: Tensor,
    pub(crate) classifier: Tensor,
}

/// One layer's attention inputs, `[heads, n, head_dim]`, after the rotation.
struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl fmt::Debug for LlamaLike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LlamaLike").field("config", &self.config).finish_non_exhaustive()
    }
}

impl LlamaLike {
    /// The shape of the model.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// `q`, `k`, `v` of one layer, rotated, key/value heads not repeated. The layers below run with full causal
    /// attention: layer 0 takes linear time, any other quadratic time in the number of tokens.
    ///
    /// # Errors
    /// [`LmError::Argument`] for no tokens, a token outside of the vocabulary or a layer that does not exist.
    pub fn capture_layer(&self, tokens: &[u32], layer: usize) -> Result<Captured> {
        let &LlamaConfig { n_heads_q, n_heads_kv, head_dim, n_layers, .. } = &self.config;
        if layer >= n_layers {
            return Err(LmError::Argument(format!(
                "layer {layer}: the model has layers 0 to {}",
                n_layers - 1
            )));
        }
        let x = self.residual(tokens, layer)?;
        let Inputs { q, k, v } = self.project(&x, &self.layers[layer])?;
        let mut captured = Captured::zeros(n_heads_q, n_heads_kv, tokens.len(), head_dim);
        captured.put(0, &q, &k, &v)?;
        Ok(captured)
    }

    /// The logits of the token that follows, one for each id of the vocabulary.
    ///
    /// # Errors
    /// [`LmError::Argument`] for no tokens or a token outside of the vocabulary.
    pub fn next_logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let x = self.residual(tokens, self.config.n_layers)?.narrow(0, tokens.len() - 1, 1)?;
        let x = rms_norm(&x.contiguous()?, &self.final_norm, self.config.norm_eps)?;
        Ok(linear(&x, &self.classifier)?.flatten_all()?.to_vec1()?)
    }

    /// `count` more tokens, always the likeliest one. Runs the whole text for each: for checks, not for use.
    ///
    /// # Errors
    /// As [`LlamaLike::next_logits`].
    pub fn continue_greedily(&self, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
        let mut tokens = prompt.to_vec();
        for _ in 0..count {
            let logits = self.next_logits(&tokens)?;
            let likeliest = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            tokens.extend(likeliest.map(|(token, _)| token as u32));
        }
        Ok(tokens)
    }

    /// The residual `[n, d_model]` before layer `end`.
    fn residual(&self, tokens: &[u32], end: usize) -> Result<Tensor> {
        let vocab_size = self.config.vocab_size;
        if tokens.is_empty() {
            return Err(LmError::Argument("no tokens: there is nothing to capture".to_string()));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(LmError::Argument(format!(
                "token {token}: the model knows the ids 0 to {}",
                vocab_size - 1
            )));
        }
        let n = tokens.len();
        let mut x = self.embedding.index_select(&Tensor::from_slice(tokens, n, &Device::Cpu)?, 0)?;
        for layer in &self.layers[..end] {
            let inputs = self.project(&x, layer)?;
            let chunks = (0..n).step_by(CHUNK).map(|start| start..n.min(start + CHUNK));
            let chunks =
                chunks.map(|rows| self.finish(&x, layer, &inputs, rows)).collect::<Result<Vec<_>>>()?;
            x = Tensor::cat(&chunks, 0)?;
        }
        Ok(x)
    }

    fn project(&self, x: &Tensor, layer: &LlamaLayer) -> Result<Inputs> {
        let &LlamaConfig { head_dim, rope_theta, norm_eps, .. } = &self.config;
        let n = x.dim(0)?;
        let rotary = Rotary::new(self.pairing, head_dim, rope_theta, 0, n);
        let h = rms_norm(x, &layer.attn_norm, norm_eps)?;
        let heads = |x: Tensor| x.reshape((n, (), head_dim))?.transpose(0, 1)?.contiguous();
        Ok(Inputs {
            q: heads(rotary.apply(&linear(&h, &layer.wq)?)?)?,
            k: heads(rotary.apply(&linear(&h, &layer.wk)?)?)?,
            v: heads(linear(&h, &layer.wv)?)?,
        })
    }

    /// The residual behind a layer at positions `rows`.
    fn finish(&self, x: &Tensor, layer: &LlamaLayer, inputs: &Inputs, rows: Range<usize>) -> Result<Tensor> {
        let &LlamaConfig { n_heads_q, n_heads_kv, head_dim, norm_eps, .. } = &self.config;
        let group_size = n_heads_q / n_heads_kv;
        let q = inputs.q.narrow(1, rows.start, rows.len())?;
        let seen = |x: &Tensor| repeat_heads(&x.narrow(1, 0, rows.end)?.contiguous()?, group_size);
        let out = causal_attention(&q, &seen(&inputs.k)?, &seen(&inputs.v)?)?;
        let out = out.transpose(0, 1)?.contiguous()?.reshape((rows.len(), n_heads_q * head_dim))?;
        let x = (x.narrow(0, rows.start, rows.len())? + linear(&out, &layer.wo)?)?;
        let h = rms_norm(&x, &layer.ffn_norm, norm_eps)?;
        let inner = swiglu(&linear(&h, &layer.gate)?, &linear(&h, &layer.up)?)?;
        Ok((x + linear(&inner, &layer.down)?)?)
    }
}
