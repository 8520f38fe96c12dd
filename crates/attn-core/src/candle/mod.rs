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
//! Operations with more inputs or several outputs become nodes through [`apply_packed`].

mod op;
mod packed;
mod storage;
mod stream;

pub use candle_core;
pub use packed::{NamedView, PackedOp, PackedTensor, apply_packed};
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
        let tracked = q.track_op() || k.track_op() || v.track_op();
        q.apply_op3(k, v, op::Op::new(self.clone(), tracked))
    }

    /// [`CandleAttention::forward_t`] for tensors `(batch, length, heads, width)`, without copying the inputs.
    ///
    /// # Errors
    /// As [`CandleAttention::forward_t`].
    fn forward_bnhd_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let swap = |t: &Tensor| t.transpose(1, 2);
        self.forward_t(&swap(q)?, &swap(k)?, &swap(v)?)?.transpose(1, 2)
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
            dtype: dtype(q.dtype())?,
        };
        let stream = self.as_streaming().ok_or_else(|| AttnError::unsupported(self.name(), "streaming"))?;
        Ok(CandleStream::new(stream.start(shape)?))
    }
}

impl<A: Attention + Clone + 'static> CandleAttention for A {}
