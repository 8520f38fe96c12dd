//! Llama-style models as Hugging Face stores them: `config.json` beside one or several safetensors files.
//!
//! Rotary pairs are half a head apart. Weights may be f32, f16 or bf16. What this forward pass does not know (scaled
//! rotary frequencies, biases, norms on queries and keys, another activation) is refused: it would give wrong tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::Deserialize;
use serde_json::Value;

use super::error::{LmError, Result};
use super::llama_like::{LlamaConfig, LlamaLayer, LlamaLike};
use super::rotary::Pairing;
use super::weights::parse_tensors;

/// Reads a model: a directory with `config.json`, or a safetensors file with `config.json` beside it.
///
/// # Errors
/// [`LmError::Io`] and [`LmError::Format`], naming the file, the tensor or the feature that does not fit.
pub fn load(path: &Path) -> Result<LlamaLike> {
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
    let config_path = dir.join("config.json");
    let what = config_path.display().to_string();
    let json = std::fs::read(&config_path).map_err(|e| LmError::io(&config_path, e))?;
    let config: HuggingFaceConfig = serde_json::from_slice(&json).map_err(|e| LmError::format(&what, e))?;
    let config = config.checked(&what)?;

    let files = if path.is_dir() { safetensors_files(dir)? } else { vec![path.to_path_buf()] };
    let mut tensors = BTreeMap::new();
    for file in files {
        let bytes = std::fs::read(&file).map_err(|e| LmError::io(&file, e))?;
        tensors.extend(parse_tensors(&bytes, &file.display().to_string())?);
    }
    build(config, Tensors { tensors, what: path.display().to_string() })
}

fn safetensors_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(|e| LmError::io(dir, e))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(|e| LmError::io(dir, e)));
    let mut paths = paths.collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    paths.sort();
    if paths.is_empty() {
        return Err(LmError::format(dir.display().to_string(), "no .safetensors file here"));
    }
    Ok(paths)
}

/// The fields of `config.json` that matter here.
#[derive(Deserialize)]
struct HuggingFaceConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
    rope_theta: Option<f64>,
    // newer files keep theta and the kind of scaling here
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
}

impl HuggingFaceConfig {
    fn checked(self, what: &str) -> Result<LlamaConfig> {
        let refuse = |problem: String| Err(LmError::format(what, problem));
        if let Some(act) = self.hidden_act.filter(|act| act != "silu" && act != "swish") {
            return refuse(format!("hidden_act {act:?} is not supported, only \"silu\""));
        }
        for rope in [&self.rope_scaling, &self.rope_parameters].into_iter().flatten() {
            let kind =
                rope.get("rope_type").or(rope.get("type")).and_then(Value::as_str).unwrap_or("default");
            if kind != "default" {
                return refuse(format!("rotary scaling {kind:?} is not supported"));
            }
        }
        let inner_theta = self.rope_parameters.as_ref().and_then(|rope| rope.get("rope_theta")?.as_f64());
        let heads = self.num_attention_heads;
        if self.head_dim.is_none() && (heads == 0 || !self.hidden_size.is_multiple_of(heads)) {
            return refuse(format!("hidden_size {} is no multiple of {heads} heads", self.hidden_size));
        }
        let config = LlamaConfig {
            d_model: self.hidden_size,
            n_heads_q: heads,
            n_heads_kv: self.num_key_value_heads.unwrap_or(heads),
            head_dim: self.head_dim.unwrap_or_else(|| self.hidden_size / heads),
            d_ff: self.intermediate_size,
            n_layers: self.num_hidden_layers,
            vocab_size: self.vocab_size,
            rope_theta: self.rope_theta.or(inner_theta).unwrap_or(10_000.0),
            norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            trained_positions: self.max_position_embeddings.unwrap_or(2048),
        };
        config.check(what)?;
        Ok(config)
    }
}

/// Tensors by name, each used once.
struct Tensors {
    tensors: BTreeMap<String, Tensor>,
    what: String,
}

impl Tensors {
    fn take(&mut self, name: &str, dims: &[usize]) -> Result<Tensor> {
        self.take_if_there(name, dims)?
            .ok_or_else(|| LmError::format(&self.what, format!("tensor {name} is missing")))
    }

    fn take_if_there(&mut self, name: &str, dims: &[usize]) -> Result<Option<Tensor>> {
        let tensor = self.tensors.remove(name);
        match tensor {
            Some(tensor) if tensor.dims() != dims => {
                let problem = format!("tensor {name} has shape {:?}, expected {dims:?}", tensor.dims());
                Err(LmError::format(&self.what, problem))
            }
            tensor => Ok(tensor),
        }
    }
}

fn build(config: LlamaConfig, mut tensors: Tensors) -> Result<LlamaLike> {
    let &LlamaConfig { d_model, n_heads_q, n_heads_kv, head_dim, d_ff, n_layers, vocab_size, .. } = &config;
    let (q_width, kv_width) = (n_heads_q * head_dim, n_heads_kv * head_dim);
    let embedding = tensors.take("model.embed_tokens.weight", &[vocab_size, d_model])?;
    let layers = (0..n_layers).map(|layer| {
        let mut take =
            |name: &str, dims: &[usize]| tensors.take(&format!("model.layers.{layer}.{name}.weight"), dims);
        Ok(LlamaLayer {
            attn_norm: take("input_layernorm", &[d_model])?,
            wq: take("self_attn.q_proj", &[q_width, d_model])?,
            wk: take("self_attn.k_proj", &[kv_width, d_model])?,
            wv: take("self_attn.v_proj", &[kv_width, d_model])?,
            wo: take("self_attn.o_proj", &[d_model, q_width])?,
            ffn_norm: take("post_attention_layernorm", &[d_model])?,
            gate: take("mlp.gate_proj", &[d_ff, d_model])?,
            up: take("mlp.up_proj", &[d_ff, d_model])?,
            down: take("mlp.down_proj", &[d_model, d_ff])?,
        })
    });
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let final_norm = tensors.take("model.norm.weight", &[d_model])?;
    let classifier = tensors.take_if_there("lm_head.weight", &[vocab_size, d_model])?;
    let classifier = classifier.unwrap_or_else(|| embedding.clone());
    // Rotary tables are computed; anything else left over means that the model does more than this forward pass.
    if let Some(name) = tensors.tensors.keys().find(|name| !name.ends_with("rotary_emb.inv_freq")) {
        let problem = format!("tensor {name} is not part of a plain Llama, so this model is not supported");
        return Err(LmError::format(&tensors.what, problem));
    }
    Ok(LlamaLike { config, pairing: Pairing::HalfSplit, embedding, layers, final_norm, classifier })
}
