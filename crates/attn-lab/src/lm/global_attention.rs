use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::attention::{causal_attention, repeat_heads, window_attention};
use super::captured::Captured;
use super::error::Result;

/// What stands in the place of the global layer's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GlobalAttention {
    /// Full causal attention, as the model was trained.
    Exact,
    /// Zeros: what the model knows without the layer.
    Removed,
    /// The given number of keys up to the query: what it knows from nearby.
    Window(usize),
}

impl GlobalAttention {
    /// The output at every position, `(n_heads_q, n, head_dim)`.
    ///
    /// # Errors
    /// If the captured tensors do not have the shape they state.
    pub fn attend(self, inputs: &Captured) -> Result<Vec<f32>> {
        Ok(self.rows(inputs, 0..inputs.n)?.flatten_all()?.to_vec1()?)
    }

    /// The output at positions `rows`, `[n_heads_q, rows, head_dim]`.
    pub(crate) fn rows(self, inputs: &Captured, rows: Range<usize>) -> Result<Tensor> {
        let Range { start, end } = rows;
        let q = || inputs.rows(&inputs.q, start, end);
        match self {
            Self::Removed => Ok(Tensor::zeros(q()?.shape(), DType::F32, &Device::Cpu)?),
            Self::Exact => {
                let k = shared(&inputs.rows(&inputs.k, 0, end)?, inputs)?;
                let v = shared(&inputs.rows(&inputs.v, 0, end)?, inputs)?;
                Ok(causal_attention(&q()?, &k, &v)?)
            }
            Self::Window(window) => {
                let first = start.saturating_sub(window.saturating_sub(1));
                let k = shared(&inputs.rows(&inputs.k, first, end)?, inputs)?;
                let v = shared(&inputs.rows(&inputs.v, first, end)?, inputs)?;
                let q = inputs.rows(&inputs.q, first, end)?;
                let out = window_attention(&q, &k, &v, window.max(1))?;
                Ok(out.narrow(1, start - first, end - start)?.contiguous()?)
            }
        }
    }
}

/// Key or value heads repeated until every query head has its own.
fn shared(x: &Tensor, inputs: &Captured) -> Result<Tensor> {
    Ok(repeat_heads(x, inputs.n_heads_q / inputs.n_heads_kv.max(1))?)
}
