//! Double Sparsity: tokens by a few channels of queries and keys, those of largest magnitude.
//!
//! ```text
//! C           = the label channels c with the largest mean |k_jc|
//! score(i, j) = sum_{c in C} q_ic k_jc          A(i) = the top_k largest among j <= p
//! ```
//!
//! Channels are a property of a trained head; the authors find them once, on text set aside. They are given
//! ([`DoubleSparsity::channels`]), or found from the first keys of each key/value head. With all channels it is exact
//! top-k attention, with `top_k >= n` dense causal attention.
//!
//! Cost of a query: `n / 2` scores of `label_dim` channels, and `top_k` attended keys. Decoding reads `4 label_dim` bytes a
//! cached token and key/value head.
//!
//! Source: Yang, Sheng, Gonzalez, Stoica, Zheng, "Post-Training Sparse Attention with Double Sparsity", 2024.

use super::{PageScorer, Pages};
use crate::select::top_k;
use attn_core::{AttnError, Result};
use std::sync::Arc;

/// Tokens chosen by label channels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoubleSparsity {
    /// Keys that a query takes.
    pub top_k: usize,
    /// Channels of a label; `None` is an eighth of `head_dim`.
    pub label_dim: Option<usize>,
    /// First keys from which channels are found; queries that see no more attend all of them.
    pub calibration_len: usize,
    /// The channels of each key/value head, `[n_heads_kv, label_dim]`, where they are known.
    pub channels: Option<Arc<[usize]>>,
}

impl Default for DoubleSparsity {
    /// 1024 keys, channels found from as many.
    fn default() -> Self {
        Self { top_k: 1024, label_dim: None, calibration_len: 1024, channels: None }
    }
}

impl PageScorer for DoubleSparsity {
    const NAME: &'static str = "double-sparsity";

    /// The channels.
    type Sketch = Vec<usize>;

    fn pages(&self) -> Pages {
        Pages { page_len: 1, n_pages: self.top_k, first: 0, last: 0 }
    }

    fn width(&self, head_dim: usize) -> Result<usize> {
        let width = self.label_dim.unwrap_or(head_dim.div_ceil(8)).min(head_dim);
        if width == 0 && head_dim > 0 {
            return Err(AttnError::value("label_dim", 0, "at least 1"));
        }
        Ok(width)
    }

    fn check_heads(&self, n_heads_kv: usize, head_dim: usize) -> Result<()> {
        let Some(channels) = &self.channels else {
            return match self.calibration_len {
                0 => Err(AttnError::value("calibration_len", 0, "at least 1, or channels that are given")),
                _ => Ok(()),
            };
        };
        let expected = n_heads_kv * self.width(head_dim)?;
        if channels.len() != expected {
            return Err(AttnError::shape("channels", "elements", channels.len(), expected));
        }
        match channels.iter().find(|channel| **channel >= head_dim) {
            Some(channel) => Err(AttnError::value("channels", channel, format!("below {head_dim}"))),
            None => Ok(()),
        }
    }

    fn calibration_len(&self) -> usize {
        if self.channels.is_some() { 0 } else { self.calibration_len }
    }

    fn sketch(&self, kv_head: usize, keys: &[f32], head_dim: usize) -> Vec<usize> {
        let width = self.label_dim.unwrap_or(head_dim.div_ceil(8)).min(head_dim);
        if let Some(channels) = &self.channels {
            return channels[kv_head * width..][..width].to_vec();
        }
        let mut magnitudes = vec![0.0; head_dim];
        for key in keys.chunks_exact(head_dim.max(1)) {
            magnitudes.iter_mut().zip(key).for_each(|(sum, x)| *sum += x.abs());
        }
        top_k(&magnitudes, width)
    }

    fn note(&self, channels: &Vec<usize>, key: &[f32], label: &mut [f32]) {
        label.iter_mut().zip(channels).for_each(|(to, channel)| *to = key[*channel]);
    }

    fn ask(&self, channels: &Vec<usize>, q: &[f32], label: &mut [f32]) {
        self.note(channels, q, label);
    }
}
