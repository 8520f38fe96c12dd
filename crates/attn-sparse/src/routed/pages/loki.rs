//! Loki: tokens by the first coordinates of queries and keys along the principal axes of the keys.
//!
//! ```text
//! P           = the rank leading eigenvectors of the covariance of the keys
//! score(i, j) = (P^T q_i) . (P^T k_j)          A(i) = the top_k largest among j <= p
//! ```
//!
//! Keys of a trained head lie near a subspace of few dimensions, so that few coordinates tell most of a score. The
//! authors find the axes once, on text set aside. They are given ([`Loki::axes`]), or found from the first keys of each
//! key/value head. With all axes it is exact top-k attention, with `top_k >= n` dense causal attention. (Scores are not
//! centred: a constant added to all keys moves all scores of a query alike.)
//!
//! Cost of a query: `n / 2` scores of `rank` coordinates, and `top_k` attended keys. Decoding reads `4 rank` bytes a cached
//! token and key/value head.
//!
//! Source: Singhania, Singh, He, Feizi, Bhatele, "Loki: Low-rank Keys for Efficient Sparse Attention", NeurIPS 2024.

use super::principal_axes::principal_axes;
use super::{PageScorer, Pages};
use attn_core::{AttnError, Result};
use std::sync::Arc;

/// Tokens chosen by coordinates along principal axes.
#[derive(Debug, Clone, PartialEq)]
pub struct Loki {
    /// Keys that a query takes.
    pub top_k: usize,
    /// Axes; `None` is a quarter of `head_dim`.
    pub rank: Option<usize>,
    /// First keys from which axes are found; queries that see no more attend all of them.
    pub calibration_len: usize,
    /// The axes of each key/value head, `[n_heads_kv, head_dim, rank]`, where they are known.
    pub axes: Option<Arc<[f32]>>,
}

impl Default for Loki {
    /// 1024 keys, axes found from as many.
    fn default() -> Self {
        Self { top_k: 1024, rank: None, calibration_len: 1024, axes: None }
    }
}

impl Loki {
    fn rank(&self, head_dim: usize) -> usize {
        self.rank.unwrap_or(head_dim.div_ceil(4)).min(head_dim)
    }
}

impl PageScorer for Loki {
    const NAME: &'static str = "loki";

    /// The axes, `[head_dim, rank]`.
    type Sketch = Vec<f32>;

    fn pages(&self) -> Pages {
        Pages { page_len: 1, n_pages: self.top_k, first: 0, last: 0 }
    }

    fn width(&self, head_dim: usize) -> Result<usize> {
        match self.rank(head_dim) {
            0 if head_dim > 0 => Err(AttnError::value("rank", 0, "at least 1")),
            rank => Ok(rank),
        }
    }

    fn check_heads(&self, n_heads_kv: usize, head_dim: usize) -> Result<()> {
        let expected = n_heads_kv * head_dim * self.rank(head_dim);
        match &self.axes {
            Some(axes) if axes.len() != expected => {
                Err(AttnError::shape("axes", "elements", axes.len(), expected))
            }
            None if self.calibration_len == 0 => {
                Err(AttnError::value("calibration_len", 0, "at least 1, or axes that are given"))
            }
            _ => Ok(()),
        }
    }

    fn calibration_len(&self) -> usize {
        if self.axes.is_some() { 0 } else { self.calibration_len }
    }

    fn sketch(&self, kv_head: usize, keys: &[f32], head_dim: usize) -> Vec<f32> {
        let rank = self.rank(head_dim);
        match &self.axes {
            Some(axes) => axes[kv_head * head_dim * rank..][..head_dim * rank].to_vec(),
            None => principal_axes(keys, head_dim, rank),
        }
    }

    fn note(&self, axes: &Vec<f32>, key: &[f32], coordinates: &mut [f32]) {
        coordinates.fill(0.0);
        for (x, axes) in key.iter().zip(axes.chunks_exact(coordinates.len())) {
            coordinates.iter_mut().zip(axes).for_each(|(sum, axis)| *sum += x * axis);
        }
    }

    fn ask(&self, axes: &Vec<f32>, q: &[f32], coordinates: &mut [f32]) {
        self.note(axes, q, coordinates);
    }
}
