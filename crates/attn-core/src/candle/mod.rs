//! Attention on candle tensors.
//!
//! [`CandleAttention`] gives every [`Attention`] methods on tensors: [`CandleAttention::forward_t`] for
//! `(batch, heads, length, width)` and [`CandleAttention::forward_bnhd_t`] for `(batch, length, heads, width)`. Strided
//! tensors are read where they are, as long as the last axis is contiguous; f32, bf16 and f16 are taken as they come.
//! [`CandleStream`] decodes. Work runs on the rayon pool that candle itself is running in.
//!
//! A call is one node of candle's graph. `loss.backward()` reaches q, k and v through [`Attention::as_differentiable`], in
//! their own dtype; the forward pass keeps what that needs only when an input tracks gradients. A variant that has no
//! backward pass fails in `loss.backward()` with an error that names it; gradients are never dropped silently.
//!
//! What a crate adds to the graph itself goes through [`apply_qkv`] (an operation on q, k and v, nothing copied) or
//! [`apply_packed`] (any number of inputs and outputs); [`with_view`] and [`tensor_from`] read and make tensors,
//! [`refuse_gradients`] marks those that have none.

mod op;
mod order;
mod packed;
mod refusal;
mod storage;
mod stream;

pub use candle_core;
pub use op::{QkvOp, apply_qkv};
pub use order::AxisOrder;
pub use packed::{NamedView, PackedOp, PackedTensor, apply_packed};
pub use refusal::refuse_gradients;
pub use storage::{check_cpu, tensor_from, with_view};
pub use stream::CandleStream;

use crate::{Attention, AttnError, StreamShape};
use candle_core::{Result, Tensor};
use storage::dtype;

impl From<AttnError> for candle_core::Error {
    fn from(error: AttnError) -> Self {
        candle_core::Error::Msg(error.to_string()).bt()
    }
}

/// Methods on tensors for every variant that can be cloned; `Arc<dyn Attention>` can.
pub trait CandleAttention: Attention + Clone + 'static {
    /// `q (batch, n_heads_q, n_q, head_dim)`, `k (batch, n_heads_kv, n_kv, head_dim)`,
    /// `v (batch, n_heads_kv, n_kv, head_dim_v)` -> `(batch, n_heads_q, n_q, head_dim_v)`, contiguous.
    ///
    /// # Errors
    /// A tensor off the CPU, of another dtype or rank, or with a strided last axis; those of [`Attention::forward`].
    fn forward_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        apply_qkv(op::Variant(self.clone()), AxisOrder::Bhnd, q, k, v)
    }

    /// [`CandleAttention::forward_t`] for tensors `(batch, length, heads, width)`; the output too is contiguous in that order, and
    /// nothing is copied.
    ///
    /// # Errors
    /// As [`CandleAttention::forward_t`].
    fn forward_bnhd_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        apply_qkv(op::Variant(self.clone()), AxisOrder::Bnhd, q, k, v)
    }

    /// An empty stream of this variant for tensors like `q`, `k`, `v` (layout as [`CandleAttention::forward_t`]; the
    /// lengths do not matter).
    ///
    /// # Errors
    /// A variant that cannot stream; tensors that [`CandleAttention::forward_t`] would refuse.
    fn stream_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<CandleStream> {
        let (q_axes, k_axes, v_axes) = (q.dims4()?, k.dims4()?, v.dims4()?);
        let shape = StreamShape {
            batch: q_axes.0,
            n_heads_q: q_axes.1,
            n_heads_kv: k_axes.1,
            head_dim: q_axes.3,
            head_dim_v: v_axes.3,
            dtype: dtype("q", q.dtype())?,
        };
        let stream = self.as_streaming().ok_or_else(|| AttnError::unsupported(self.name(), "streaming"))?;
        Ok(CandleStream::new(stream.start(shape)?))
    }
}

impl<A: Attention + Clone + 'static> CandleAttention for A {}
