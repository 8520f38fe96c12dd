use serde::{Deserialize, Serialize};

use super::error::{LmError, Result};

/// The shape of a [`ByteLm`](super::ByteLm); stored as JSON in the metadata of its weights file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Attention heads of every layer.
    pub n_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Inner width of the feed-forward part.
    pub d_ff: usize,
    /// Number of layers.
    pub n_layers: usize,
    /// The one layer with full causal attention; all others see a window.
    pub global_layer: usize,
    /// Keys that a query of a window layer sees, itself included.
    pub window: usize,
    /// Base of the rotary frequencies of the window layers.
    pub rope_theta: f64,
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f64,
}

impl Config {
    /// The shape of the shipped model.
    pub fn shipped() -> Self {
        Self {
            d_model: 128,
            n_heads: 2,
            head_dim: 64,
            d_ff: 224,
            n_layers: 4,
            global_layer: 2,
            window: 64,
            rope_theta: 1000.0,
            norm_eps: 1e-5,
        }
    }

    /// Refuses shapes that no forward pass could run.
    ///
    /// # Errors
    /// [`LmError::Argument`] naming the field.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("d_model", self.d_model),
            ("n_heads", self.n_heads),
            ("head_dim", self.head_dim),
            ("d_ff", self.d_ff),
            ("n_layers", self.n_layers),
            ("window", self.window),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(LmError::Argument(format!("model config: {name} is 0")));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(LmError::Argument(format!("model config: head_dim {} is odd", self.head_dim)));
        }
        if self.global_layer >= self.n_layers {
            let Self { global_layer, n_layers, .. } = self;
            return Err(LmError::Argument(format!(
                "model config: global_layer is {global_layer}, but there are {n_layers} layers"
            )));
        }
        Ok(())
    }

    pub(crate) fn attention_width(&self) -> usize {
        self.n_heads * self.head_dim
    }
}
