//! Decoding on tensors.

use super::storage::{cpu, qkv, tensor_from};
use super::{AxisOrder, refuse_gradients};
use crate::StreamState;
use candle_core::{Result, Tensor};

/// A stream on tensors, for decoding: a backward pass through its outputs is an error.
pub struct CandleStream {
    state: Box<dyn StreamState>,
}

impl CandleStream {
    pub(super) fn new(state: Box<dyn StreamState>) -> Self {
        Self { state }
    }

    /// Appends `n` positions and returns their outputs; layout as [`super::CandleAttention::forward_t`] with `n_q = n_kv = n`.
    ///
    /// # Errors
    /// Tensors that do not fit the stream; the stream is then unchanged.
    pub fn append_t(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let inputs = [q, k, v];
        let (q_data, q_layout) = q.storage_and_layout();
        let (k_data, k_layout) = k.storage_and_layout();
        let (v_data, v_layout) = v.storage_and_layout();
        let (q, k, v) = (cpu("q", &q_data)?, cpu("k", &k_data)?, cpu("v", &v_data)?);
        let x = qkv((q, q_layout), (k, k_layout), (v, v_layout), AxisOrder::Bhnd)?;
        let out = tensor_from(x.dtype(), x.shape().out(), AxisOrder::Bhnd, |out| self.state.append(x, out))?;
        refuse_gradients("stream", out, &inputs)
    }

    /// The state underneath: its length and the bytes it holds.
    pub fn state(&self) -> &dyn StreamState {
        &*self.state
    }
}
