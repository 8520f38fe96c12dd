//! A call on tensors, with tensors besides q, k and v.

use super::kernel::{Kernel, Lengths};
use super::numbers::{floats, prefix_sums};
use super::packed::PackedKernel;
use crate::FlashCall;
use attn_core::candle::candle_core::{self, Result, Tensor};
use attn_core::candle::{AxisOrder, apply_packed, apply_qkv, with_view};
use attn_core::mask::{Mask, SeeAll};
use attn_core::score::{ScoreMod, Unchanged};
use std::sync::Arc;

/// [`FlashCall`] on candle tensors, made by [`FlashCall::on_tensors`]: it trains, and takes ALiBi slopes, an additive bias and
/// sinks as tensors. The last two get gradients if they track them.
///
/// q, k and v are read where they are, in their own dtype, whatever their strides. Only if the bias or the sinks track
/// gradients, or the log-sum-exps are asked for, are they copied, to f32: candle's custom operations take no more than three
/// tensors, so that more travel as one.
///
/// ```
/// use attn_core::candle::candle_core::{DType, Device, Result, Tensor, Var};
/// use attn_flash::Flash;
///
/// # fn main() -> Result<()> {
/// let x = Tensor::randn(0f32, 1.0, (1, 2, 10, 8), &Device::Cpu)?;
/// let bias = Var::zeros((1, 2, 10, 10), DType::F32, &Device::Cpu)?; // learned, one for each head and pair
/// let sinks = Var::zeros(2, DType::F32, &Device::Cpu)?;
/// let attention = Flash::causal().call().on_tensors().bias(&bias).sinks(&sinks);
/// let grads = attention.forward_t(&x, &x, &x)?.sqr()?.sum_all()?.backward()?;
/// assert_eq!(grads.get(&bias).unwrap().dims(), [1, 2, 10, 10]);
/// assert_eq!(grads.get(&sinks).unwrap().dims(), [2]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct FlashTensors<M = SeeAll, C = Unchanged> {
    call: Arc<FlashCall<'static, M, C>>,
    alibi_slopes: Option<Tensor>,
    bias: Option<Tensor>,
    sinks: Option<Tensor>,
}

impl<M, C> Clone for FlashTensors<M, C> {
    fn clone(&self) -> Self {
        let Self { call, alibi_slopes, bias, sinks } = self;
        Self {
            call: call.clone(),
            alibi_slopes: alibi_slopes.clone(),
            bias: bias.clone(),
            sinks: sinks.clone(),
        }
    }
}

impl<M, C> FlashCall<'static, M, C> {
    /// This call on candle tensors.
    pub fn on_tensors(self) -> FlashTensors<M, C> {
        FlashTensors { call: Arc::new(self), alibi_slopes: None, bias: None, sinks: None }
    }
}

impl<M, C> FlashTensors<M, C> {
    /// Scores fade with the distance, behind the soft cap and the call's own score mods: `slopes (n_heads_q)` or
    /// `(batch, n_heads_q)`; the last query stands at the last key, in each packed sequence. Slopes that track gradients are
    /// refused: they get none.
    ///
    /// Source: Press, Smith, Lewis, 2021.
    pub fn alibi(self, slopes: &Tensor) -> Self {
        Self { alibi_slopes: Some(slopes.clone()), ..self }
    }

    /// Added to the scores behind everything else: 1 to 4 axes, right-aligned to `(batch, n_heads_q, n_q, n_kv)`, each of that
    /// length or 1; -inf hides a pair. For packed sequences the batch entry is the sequence, and the lengths are those of the
    /// longest.
    pub fn bias(self, bias: &Tensor) -> Self {
        Self { bias: Some(bias.clone()), ..self }
    }

    /// A logit for each query head that enters the normaliser and has no value, `(n_heads_q)`; see [`FlashCall::sinks`].
    pub fn sinks(self, sinks: &Tensor) -> Self {
        Self { sinks: Some(sinks.clone()), ..self }
    }
}

impl<M: Mask + Send + 'static, C: ScoreMod + Send + 'static> FlashTensors<M, C> {
    /// `q (batch, n_heads_q, n_q, head_dim)`, `k (batch, n_heads_kv, n_kv, head_dim)`,
    /// `v (batch, n_heads_kv, n_kv, head_dim_v)` -> `(batch, n_heads_q, n_q, head_dim_v)`, contiguous.
    ///
    /// # Errors
    /// A tensor off the CPU, of another dtype or rank, or with a strided last axis; sizes that do not fit each other. The
    /// error names the argument.
    pub fn forward_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.run(AxisOrder::Bhnd, None, [q, k, v])
    }

    /// [`FlashTensors::forward_t`] for tensors `(batch, length, heads, width)`.
    ///
    /// # Errors
    /// As [`FlashTensors::forward_t`].
    pub fn forward_bnhd_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.run(AxisOrder::Bnhd, None, [q, k, v])
    }

    /// Packed sequences: `q (total_q, n_heads_q, head_dim)`, `k (total_kv, n_heads_kv, head_dim)`,
    /// `v (total_kv, n_heads_kv, head_dim_v)` -> `(total_q, n_heads_q, head_dim_v)`. Sequence `s` has the rows
    /// `cu_seqlens_q[s]..cu_seqlens_q[s + 1]` of `q` and sees those of `k` and `v` that `cu_seqlens_kv` gives it; both are
    /// `(sequences + 1)` prefix sums, u32, i32 or i64.
    ///
    /// # Errors
    /// As [`FlashTensors::forward_t`]; prefix sums that do not start at 0, that decrease, or that end elsewhere than the
    /// tensors.
    pub fn forward_packed_t(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &Tensor,
        cu_seqlens_kv: &Tensor,
    ) -> Result<Tensor> {
        let names = ["cu_seqlens_q", "cu_seqlens_kv"];
        let lengths = Lengths {
            q: prefix_sums(names[0], cu_seqlens_q)?,
            kv: prefix_sums(names[1], cu_seqlens_kv)?,
            names,
        };
        self.run(AxisOrder::Nhd, Some(lengths), [q, k, v])
    }

    /// [`FlashTensors::forward_t`] and the log-sum-exps `(batch, n_heads_q, n_q)`, f32; both carry gradients.
    ///
    /// # Errors
    /// As [`FlashTensors::forward_t`].
    pub fn forward_with_lse_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.run_packed(AxisOrder::Bhnd, self.kernel(None)?, [q, k, v])
    }

    pub(super) fn run(
        &self,
        order: AxisOrder,
        lengths: Option<Lengths>,
        qkv: [&Tensor; 3],
    ) -> Result<Tensor> {
        let kernel = self.kernel(lengths)?;
        let tracked = |t: &Option<Tensor>| t.as_ref().is_some_and(Tensor::track_op);
        if tracked(&kernel.bias) || tracked(&kernel.sinks) {
            return Ok(self.run_packed(order, kernel, qkv)?.0);
        }
        let [q, k, v] = qkv;
        apply_qkv(kernel, order, q, k, v)
    }

    fn kernel(&self, lengths: Option<Lengths>) -> Result<Kernel<M, C>> {
        let slopes = self.alibi_slopes.as_ref().map(|slopes| {
            let name = "alibi_slopes";
            if slopes.track_op() {
                candle_core::bail!(
                    "{name}: tracks gradients, which it would not get; expected `{name}.detach()`"
                );
            }
            if !matches!(slopes.rank(), 1 | 2) {
                let expected = "(n_heads_q) or (batch, n_heads_q)";
                candle_core::bail!("{name}'s shape is {:?}, expected {expected}", slopes.dims());
            }
            floats(name, slopes)?.flatten_all()?.to_vec1::<f32>()
        });
        let numbers = |name: &str, t: &Option<Tensor>| t.as_ref().map(|t| floats(name, t)).transpose();
        Ok(Kernel {
            call: self.call.clone(),
            slopes: slopes.transpose()?,
            bias: numbers("bias", &self.bias)?,
            sinks: numbers("sinks", &self.sinks)?,
            lengths,
        })
    }

    /// Everything in f32, so that whatever tracks gradients gets them; the output in the dtype of the queries.
    fn run_packed(
        &self,
        order: AxisOrder,
        mut kernel: Kernel<M, C>,
        qkv: [&Tensor; 3],
    ) -> Result<(Tensor, Tensor)> {
        let mut inputs = Vec::with_capacity(5);
        for (name, tensor) in ["q", "k", "v"].into_iter().zip(qkv) {
            // Refuses what the other path would refuse, in the same words.
            with_view(name, tensor, order, |_| Ok(()))?;
            inputs.push((name, heads_before_length(order, tensor)?));
        }
        for (name, other) in [("k", qkv[1]), ("v", qkv[2])] {
            if other.dtype() != qkv[0].dtype() {
                let (found, expected) = (other.dtype(), qkv[0].dtype());
                candle_core::bail!("{name}: dtype is {found:?}, expected {expected:?} (as in q)");
            }
        }
        let mut moved = |name: &'static str, tensor: &mut Option<Tensor>| {
            let tensor = tensor.take_if(|t| t.track_op());
            let is_some = tensor.is_some();
            inputs.extend(tensor.map(|tensor| (name, tensor)));
            is_some
        };
        let (bias, sinks) = (moved("bias", &mut kernel.bias), moved("sinks", &mut kernel.sinks));
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, t)| (*name, t)).collect();
        let outputs = apply_packed(PackedKernel { kernel, bias, sinks }, &inputs)?;
        let [out, lse] = outputs.as_slice() else {
            candle_core::bail!("flash: {} outputs, expected 2", outputs.len());
        };
        let out = match order {
            AxisOrder::Bhnd => out.clone(),
            AxisOrder::Bnhd => out.transpose(1, 2)?.contiguous()?,
            AxisOrder::Nhd => out.squeeze(0)?.transpose(0, 1)?.contiguous()?,
        };
        Ok((out.to_dtype(qkv[0].dtype())?, lse.clone()))
    }
}

/// The same tensor as `(batch, heads, length, width)`.
fn heads_before_length(order: AxisOrder, tensor: &Tensor) -> Result<Tensor> {
    match order {
        AxisOrder::Bhnd => Ok(tensor.clone()),
        AxisOrder::Bnhd => tensor.transpose(1, 2),
        AxisOrder::Nhd => tensor.transpose(0, 1)?.unsqueeze(0),
    }
}
