//! The same call as an operation on any number of f32 tensors: the bias and the sinks get gradients too.

use super::kernel::{ExtraGrads, Extras, Kernel};
use crate::engine::{ForwardResult, OutputGrad};
use attn_core::candle::{NamedView, PackedOp, PackedTensor};
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::{AttnError, Qkv, QkvGrads, Result, Saved, View, ViewMut};

/// q, k and v come first, each `(batch, heads, length, width)`; then a bias and sinks, where they have gradients. The outputs
/// are the output, `(batch, n_heads_q, n_q, head_dim_v)`, and the log-sum-exps, `(batch, n_heads_q, n_q)`.
#[derive(Debug)]
pub(super) struct PackedKernel<M, C> {
    pub(super) kernel: Kernel<M, C>,
    /// Whether the bias is an input.
    pub(super) bias: bool,
    /// Whether the sinks are an input.
    pub(super) sinks: bool,
}

impl<M: Mask, C: ScoreMod> PackedKernel<M, C> {
    fn inputs<'a>(&self, x: &[NamedView<'a>]) -> Result<(Qkv<'a>, Extras<'a>)> {
        let [q, k, v, rest @ ..] = x else {
            return Err(AttnError::shape("inputs", "tensors", x.len(), "q, k, v and what has gradients"));
        };
        let view = |t: &NamedView<'a>| View::contiguous(t.name, t.data, axes(t)?);
        let mut rest = rest.iter().map(|t| (t.data, t.shape));
        let bias = self.bias.then(|| rest.next()).flatten();
        let sinks = self.sinks.then(|| rest.next()).flatten();
        Ok((Qkv::new(view(q)?, view(k)?, view(v)?)?, Extras { bias, sinks }))
    }
}

fn axes(t: &NamedView<'_>) -> Result<[usize; 4]> {
    let four = "(batch, heads, length, width)";
    t.shape
        .try_into()
        .map_err(|_| AttnError::value(format!("{}'s shape", t.name), format!("{:?}", t.shape), four))
}

impl<M: Mask + Send + 'static, C: ScoreMod + Send + 'static> PackedOp for PackedKernel<M, C> {
    fn name(&self) -> &'static str {
        "flash"
    }

    fn forward(&self, inputs: &[NamedView<'_>]) -> Result<(Vec<PackedTensor>, Saved)> {
        let (x, extras) = self.inputs(inputs)?;
        let shape = x.shape();
        let mut out = vec![0.0; shape.out().iter().product()];
        let mut lse = vec![0.0; shape.rows()];
        self.kernel.with_extras(extras, |extras| {
            let out = ViewMut::contiguous("out", &mut out, shape.out())?.into();
            self.kernel.forward(x, extras, out, Some(&mut lse))
        })?;
        let outputs = vec![
            PackedTensor { data: out, shape: shape.out().to_vec() },
            PackedTensor { data: lse, shape: shape.out()[..3].to_vec() },
        ];
        Ok((outputs, Saved::new(())))
    }

    fn backward(
        &self,
        inputs: &[NamedView<'_>],
        outputs: &[NamedView<'_>],
        _: &Saved,
        grad_outputs: &[NamedView<'_>],
    ) -> Result<Vec<Option<Vec<f32>>>> {
        let ([out, lse], [grad_out, grad_lse]) = (outputs, grad_outputs) else {
            return Err(AttnError::shape("outputs", "tensors", outputs.len(), 2));
        };
        let (x, extras) = self.inputs(inputs)?;
        let mut grads: Vec<Vec<f32>> = inputs.iter().map(|t| vec![0.0; t.data.len()]).collect();
        {
            let shape = x.shape();
            let mut grads = grads.iter_mut();
            let mut next = || grads.next().map(Vec::as_mut_slice).unwrap_or_default();
            let grads = QkvGrads {
                q: ViewMut::contiguous("grad_q", next(), shape.q())?.into(),
                k: ViewMut::contiguous("grad_k", next(), shape.k())?.into(),
                v: ViewMut::contiguous("grad_v", next(), shape.v())?.into(),
            };
            let extra = ExtraGrads { bias: self.bias.then(&mut next), sinks: self.sinks.then(&mut next) };
            let forward =
                ForwardResult { out: View::contiguous("out", out.data, axes(out)?)?.into(), lse: lse.data };
            let grad = OutputGrad {
                out: View::contiguous("grad_out", grad_out.data, axes(grad_out)?)?.into(),
                lse: Some(grad_lse.data),
            };
            self.kernel.with_extras(extras, |extras| {
                self.kernel.backward(x, extras, forward, grad, (grads, extra))
            })?;
        }
        Ok(grads.into_iter().map(Some).collect())
    }
}
