use std::fmt;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::block::{Block, linear};
use super::config::Config;
use super::error::{LmError, Result};
use super::rms_norm::rms_norm;
use super::weights::Weights;

const SHIPPED: &[u8] = include_bytes!("../../model/bytelm.safetensors");

/// The byte-level language model whose global layer gives real `q`, `k`, `v`; see the [module](super).
#[derive(Clone)]
pub struct ByteLm {
    config: Config,
    weights: Weights,
    embedding: Tensor,
    pub(crate) blocks: Vec<Block>,
    final_norm: Tensor,
}

impl fmt::Debug for ByteLm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByteLm").field("config", &self.config).finish_non_exhaustive()
    }
}

impl ByteLm {
    /// The model that comes with the program.
    ///
    /// # Errors
    /// Only if the file in the repository was damaged before compilation.
    pub fn shipped() -> Result<Self> {
        let (config, weights) = Weights::parse(SHIPPED, "the shipped model")?;
        Self::new(config, weights)
    }

    /// A model that [`ByteLm::save`] wrote.
    ///
    /// # Errors
    /// [`LmError::Io`] and [`LmError::Format`], naming the file.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| LmError::io(path, e))?;
        let (config, weights) = Weights::parse(&bytes, &path.display().to_string())?;
        Self::new(config, weights)
    }

    /// A model over given tensors. They are shared, not copied: an optimiser that changes them trains the model.
    ///
    /// # Errors
    /// [`LmError::Format`] naming a tensor that is missing or has another shape than `config` says.
    pub fn new(config: Config, weights: Weights) -> Result<Self> {
        config.check()?;
        let blocks = (0..config.n_layers).map(|layer| Block::new(&config, layer, &weights));
        Ok(Self {
            blocks: blocks.collect::<Result<_>>()?,
            embedding: weights.get("embedding", &[256, config.d_model])?,
            final_norm: weights.get("final_norm", &[config.d_model])?,
            config,
            weights,
        })
    }

    /// Writes the weights as bf16 safetensors with the config in the metadata.
    ///
    /// # Errors
    /// [`LmError::Io`] naming the file; an older file is then still whole.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.weights.write(&self.config, path)
    }

    /// The shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tensors of the model.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    pub(crate) fn embed(&self, bytes: &[u8]) -> candle_core::Result<Tensor> {
        let ids = bytes.iter().map(|&b| u32::from(b)).collect::<Vec<_>>();
        let n = ids.len();
        self.embedding.index_select(&Tensor::from_vec(ids, n, &Device::Cpu)?, 0)
    }

    /// `x [rows, d_model]` to `[rows, 256]`.
    pub(crate) fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        linear(&rms_norm(x, &self.final_norm, self.config.norm_eps)?, &self.embedding)
    }
}

/// Mean of `logsumexp(logits) − logit of the target` over the rows.
pub(crate) fn cross_entropy(logits: &Tensor, targets: &[u8]) -> candle_core::Result<Tensor> {
    let targets = targets.iter().map(|&b| u32::from(b)).collect::<Vec<_>>();
    let n = targets.len();
    candle_nn::loss::cross_entropy(logits, &Tensor::from_vec(targets, n, &Device::Cpu)?)
}
