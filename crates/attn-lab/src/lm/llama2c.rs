//! llama2.c checkpoints ("version 0"): a header of seven i32, then f32 matrices `[out, in]`, little-endian.
//!
//! Each tensor is stored for all layers before the next tensor: embedding, `attn_norm`, `wq`, `wk`, `wv`, `wo`,
//! `ffn_norm`, `w1` (gate), `w2` (down), `w3` (up), final norm, two rotary tables that are computed here instead, and a
//! classifier if the vocabulary size in the header is negative. Rotary pairs are neighbours, `theta = 10000`.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::error::{LmError, Result};
use super::llama_like::{LlamaConfig, LlamaLayer, LlamaLike};
use super::rotary::Pairing;

/// Reads a checkpoint.
///
/// # Errors
/// [`LmError::Io`] and [`LmError::Format`], naming the file and what does not fit.
pub fn load(path: &Path) -> Result<LlamaLike> {
    let bytes = std::fs::read(path).map_err(|e| LmError::io(path, e))?;
    parse(&bytes, &path.display().to_string())
}

pub(crate) fn parse(bytes: &[u8], what: &str) -> Result<LlamaLike> {
    let header = Header::parse(bytes, what)?;
    let config = header.config(what)?;
    let &LlamaConfig { d_model, n_heads_q, n_heads_kv, head_dim, d_ff, n_layers, vocab_size, .. } = &config;
    let (q_width, kv_width) = (n_heads_q * head_dim, n_heads_kv * head_dim);
    let mut floats = Floats { rest: bytes[Header::BYTES..].as_chunks::<4>().0, what };

    let embedding = floats.tensor(&[vocab_size, d_model])?;
    let mut stacked = |dims: &[usize]| floats.tensor(&[&[n_layers], dims].concat());
    let attn_norm = stacked(&[d_model])?;
    let wq = stacked(&[q_width, d_model])?;
    let wk = stacked(&[kv_width, d_model])?;
    let wv = stacked(&[kv_width, d_model])?;
    let wo = stacked(&[d_model, q_width])?;
    let ffn_norm = stacked(&[d_model])?;
    let gate = stacked(&[d_ff, d_model])?;
    let down = stacked(&[d_model, d_ff])?;
    let up = stacked(&[d_ff, d_model])?;
    let final_norm = floats.tensor(&[d_model])?;
    floats.tensor(&[2, config.trained_positions, head_dim / 2])?;
    let classifier =
        if header.own_classifier { floats.tensor(&[vocab_size, d_model])? } else { embedding.clone() };
    if !floats.rest.is_empty() {
        return Err(LmError::format(
            what,
            format!("{} bytes too many for its header", 4 * floats.rest.len()),
        ));
    }

    let layer = |l: usize| -> candle_core::Result<LlamaLayer> {
        Ok(LlamaLayer {
            attn_norm: attn_norm.get(l)?.copy()?,
            wq: wq.get(l)?.copy()?,
            wk: wk.get(l)?.copy()?,
            wv: wv.get(l)?.copy()?,
            wo: wo.get(l)?.copy()?,
            ffn_norm: ffn_norm.get(l)?.copy()?,
            gate: gate.get(l)?.copy()?,
            up: up.get(l)?.copy()?,
            down: down.get(l)?.copy()?,
        })
    };
    let layers = (0..n_layers).map(layer).collect::<candle_core::Result<_>>()?;
    Ok(LlamaLike { config, pairing: Pairing::Interleaved, embedding, layers, final_norm, classifier })
}

struct Header {
    fields: [i32; 7],
    own_classifier: bool,
}

impl Header {
    const BYTES: usize = 28;

    fn parse(bytes: &[u8], what: &str) -> Result<Self> {
        let too_short = || LmError::format(what, "too short for a llama2.c checkpoint");
        let words = bytes.get(..Self::BYTES).ok_or_else(too_short)?.as_chunks::<4>().0;
        let mut fields = [0; 7];
        fields.iter_mut().zip(words).for_each(|(field, word)| *field = i32::from_le_bytes(*word));
        let own_classifier = fields[5] < 0;
        fields[5] = fields[5].checked_abs().unwrap_or(0);
        Ok(Self { fields, own_classifier })
    }

    fn config(&self, what: &str) -> Result<LlamaConfig> {
        // Larger sizes than any model has come from a file of another kind, and their products would overflow.
        let plausible =
            |&field: &i32| usize::try_from(field).ok().filter(|&size| (1..=1 << 20).contains(&size));
        let sizes = self.fields.iter().map(plausible).collect::<Option<Vec<_>>>();
        let Some(&[d_model, d_ff, n_layers, n_heads_q, n_heads_kv, vocab_size, trained_positions]) =
            sizes.as_deref()
        else {
            let problem =
                format!("the header {:?} is not that of a llama2.c checkpoint (version 0)", self.fields);
            return Err(LmError::format(what, problem));
        };
        if d_model % n_heads_q != 0 {
            return Err(LmError::format(
                what,
                format!("width {d_model} is no multiple of {n_heads_q} heads"),
            ));
        }
        let config = LlamaConfig {
            d_model,
            n_heads_q,
            n_heads_kv,
            head_dim: d_model / n_heads_q,
            d_ff,
            n_layers,
            vocab_size,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            trained_positions,
        };
        config.check(what)?;
        Ok(config)
    }
}

/// The numbers of a file, taken from the front.
struct Floats<'a> {
    rest: &'a [[u8; 4]],
    what: &'a str,
}

impl Floats<'_> {
    fn tensor(&mut self, dims: &[usize]) -> Result<Tensor> {
        let count = dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        let Some((taken, rest)) = count.and_then(|count| self.rest.split_at_checked(count)) else {
            return Err(LmError::format(self.what, "shorter than its header says"));
        };
        self.rest = rest;
        let values = taken.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(Tensor::from_vec::<_, f32>(values, dims, &Device::Cpu)?)
    }
}
