//! Named tensors of a model: drawn from a seed, or read from and written to a safetensors file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::config::Config;
use super::error::{LmError, Result};

const CONFIG_KEY: &str = "config";

/// The tensors of a model by name; f32 in memory.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// Fresh weights for training: the same seed gives the same numbers on every machine.
    pub fn random(config: &Config, seed: u64) -> Result<Self> {
        config.check()?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let &Config { d_model, d_ff, n_heads, n_layers, .. } = config;
        let width = config.attention_width();
        // What adds to the residual starts smaller, so that depth does not make it grow.
        let out_scale = 1.0 / (2.0 * n_layers as f64).sqrt();
        let mut tensors = BTreeMap::new();
        let mut put = |name: String, dims: &[usize], values: Vec<f32>| -> Result<()> {
            tensors.insert(name, Tensor::from_vec(values, dims, &Device::Cpu)?);
            Ok(())
        };
        let mut matrix = |rows: usize, cols: usize, std: f64| -> Vec<f32> {
            (0..rows * cols).map(|_| (std * normal(&mut rng)) as f32).collect()
        };
        put("embedding".into(), &[256, d_model], matrix(256, d_model, 0.05))?;
        put("final_norm".into(), &[d_model], vec![1.0; d_model])?;
        for layer in 0..n_layers {
            let matrices = [
                ("wq", width, d_model, 1.0),
                ("wk", width, d_model, 1.0),
                ("wv", width, d_model, 1.0),
                ("wo", d_model, width, out_scale),
                ("gate", d_ff, d_model, 1.0),
                ("up", d_ff, d_model, 1.0),
                ("down", d_model, d_ff, out_scale),
            ];
            for (name, rows, cols, scale) in matrices {
                let values = matrix(rows, cols, scale / (cols as f64).sqrt());
                put(format!("layers.{layer}.{name}"), &[rows, cols], values)?;
            }
            put(format!("layers.{layer}.attn_norm"), &[d_model], vec![1.0; d_model])?;
            put(format!("layers.{layer}.ffn_norm"), &[d_model], vec![1.0; d_model])?;
        }
        put(format!("layers.{}.log_scale", config.global_layer), &[n_heads], vec![0.3; n_heads])?;
        Ok(Self { tensors })
    }

    /// The tensors in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// How many numbers all tensors hold together.
    pub fn count(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    pub(crate) fn get(&self, name: &str, dims: &[usize]) -> Result<Tensor> {
        let tensor = self.tensors.get(name);
        let tensor = tensor.ok_or_else(|| LmError::format("weights", format!("tensor {name} is missing")))?;
        if tensor.dims() != dims {
            let problem = format!("tensor {name} has shape {:?}, expected {dims:?}", tensor.dims());
            return Err(LmError::format("weights", problem));
        }
        Ok(tensor.clone())
    }

    /// Reads what [`Weights::write`] wrote; `what` names the source in errors.
    pub(crate) fn parse(bytes: &[u8], what: &str) -> Result<(Config, Self)> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| LmError::format(what, e))?;
        let config = header.metadata().as_ref().and_then(|m| m.get(CONFIG_KEY));
        let config = config.ok_or_else(|| LmError::format(what, "no \"config\" in the metadata"))?;
        let config: Config = serde_json::from_str(config).map_err(|e| LmError::format(what, e))?;
        config.check()?;
        Ok((config, Self { tensors: parse_tensors(bytes, what)? }))
    }

    /// Writes all tensors as bf16, with `config` as JSON in the metadata.
    pub(crate) fn write(&self, config: &Config, path: &Path) -> Result<()> {
        let what = || path.display().to_string();
        let mut encoded = Vec::new();
        for (name, tensor) in &self.tensors {
            let values = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            let bytes = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect::<Vec<_>>();
            encoded.push((name, tensor.dims().to_vec(), bytes));
        }
        let views = encoded.iter().map(|(name, dims, bytes)| {
            let view = TensorView::new(Dtype::BF16, dims.clone(), bytes);
            view.map(|view| (name.as_str(), view)).map_err(|e| LmError::format(what(), e))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let config = serde_json::to_string(config).map_err(|e| LmError::format(what(), e))?;
        let metadata = HashMap::from([(CONFIG_KEY.to_string(), config)]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| LmError::format(what(), e))?;
        // A cut-off run must not leave half a file in place of a good one.
        let partial = path.with_extension("partial");
        std::fs::write(&partial, bytes).map_err(|e| LmError::io(&partial, e))?;
        std::fs::rename(&partial, path).map_err(|e| LmError::io(path, e))
    }
}

impl FromIterator<(String, Tensor)> for Weights {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(tensors: I) -> Self {
        Self { tensors: tensors.into_iter().collect() }
    }
}

/// All tensors of a safetensors file as f32.
pub(crate) fn parse_tensors(bytes: &[u8], what: &str) -> Result<BTreeMap<String, Tensor>> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| LmError::format(what, e))?;
    file.iter()
        .map(|(name, view)| {
            let values = decode(&view)
                .ok_or_else(|| LmError::format(what, format!("tensor {name} is {:?}", view.dtype())))?;
            Ok((name.to_string(), Tensor::from_vec(values, view.shape(), &Device::Cpu)?))
        })
        .collect()
}

fn decode(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let halves = || view.data().as_chunks::<2>().0.iter();
    match view.dtype() {
        Dtype::F32 => Some(view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::BF16 => Some(halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
        Dtype::F16 => Some(halves().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()),
        _ => None,
    }
}

/// A normally distributed number (Box–Muller).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let mut unit = || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let radius = (-2.0 * (1.0 - unit()).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit()).cos()
}
