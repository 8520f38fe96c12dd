use candle_core::{Device, Tensor};

use super::error::{LmError, Result};

/// The inputs of one attention layer: each tensor is `(1, heads, n, head_dim)`, contiguous, f32.
///
/// They are plain causal attention inputs with the default scale `1/√head_dim`: rotations and factors that a model
/// puts on queries and keys are already in them.
#[derive(Clone, Debug, PartialEq)]
pub struct Captured {
    /// Queries, `n_heads_q` heads.
    pub q: Vec<f32>,
    /// Keys, `n_heads_kv` heads.
    pub k: Vec<f32>,
    /// Values, `n_heads_kv` heads.
    pub v: Vec<f32>,
    /// Query heads.
    pub n_heads_q: usize,
    /// Key and value heads; `n_heads_q / n_heads_kv` consecutive query heads share one.
    pub n_heads_kv: usize,
    /// Positions.
    pub n: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Captured {
    pub(crate) fn zeros(n_heads_q: usize, n_heads_kv: usize, n: usize, head_dim: usize) -> Self {
        let zeros = |heads: usize| vec![0.0; heads * n * head_dim];
        let (q, k, v) = (zeros(n_heads_q), zeros(n_heads_kv), zeros(n_heads_kv));
        Self { q, k, v, n_heads_q, n_heads_kv, n, head_dim }
    }

    /// Puts a stretch that begins at position `first`: `q`, `k`, `v` are `[heads, len, head_dim]`.
    pub(crate) fn put(&mut self, first: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let row = self.head_dim;
        for (all, part) in [(&mut self.q, q), (&mut self.k, k), (&mut self.v, v)] {
            let len = part.dim(1)?;
            let part = part.flatten_all()?.to_vec1::<f32>()?;
            for (head, part) in part.chunks_exact((len * row).max(1)).enumerate() {
                let start = (head * self.n + first) * row;
                all[start..start + len * row].copy_from_slice(part);
            }
        }
        Ok(())
    }

    /// Rows `start..end` of every head of `x`, as `[heads, end − start, head_dim]`.
    pub(crate) fn rows(&self, x: &[f32], start: usize, end: usize) -> Result<Tensor> {
        let row = self.head_dim;
        let heads = x.len() / (self.n * row).max(1);
        if heads * self.n * row != x.len() || start > end || end > self.n {
            let (n, len) = (self.n, x.len());
            return Err(LmError::Argument(format!(
                "attention output: {len} numbers are no (heads, {n}, {row}) tensor with rows {start}..{end}"
            )));
        }
        let mut rows = Vec::with_capacity(heads * (end - start) * row);
        for head in x.chunks_exact((self.n * row).max(1)) {
            rows.extend_from_slice(&head[start * row..end * row]);
        }
        Ok(Tensor::from_vec(rows, (heads, end - start, row), &Device::Cpu)?)
    }
}
