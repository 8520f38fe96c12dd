//! Running a variant on named tensors.

use super::{Entry, NamedTensor, NamedTensors, Options, output_like};
use crate::{Attention, AttnError, Qkv, QkvGrads, Result};

/// Runs a variant whose inputs are `q`, `k`, `v` alone: gives `o`, and `lse` where its rows are softmax rows. With `grad_o`,
/// the gradient of a loss with respect to `o`, it also gives `grad.q`, `grad.k` and `grad.v`.
///
/// # Errors
/// Those of the inputs and of the variant; [`AttnError::Unsupported`] for any other tensor, and for `grad_o` where the
/// variant has no backward pass.
pub fn run_qkv(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(entry.name, &["q", "k", "v", "grad_o"])?;
    run_built(&*entry.build(options)?, tensors)
}

/// [`run_qkv`] for a variant that is built already, perhaps from other tensors that are there; the names are not checked.
///
/// # Errors
/// As [`run_qkv`].
pub fn run_built(attention: &dyn Attention, tensors: &NamedTensors) -> Result<NamedTensors> {
    let x = tensors.qkv()?;
    let mut given = NamedTensors::default();
    let mut out = output_like(&x);
    if let Some(softmax) = attention.as_softmax() {
        let mut lse = vec![f32::NAN; x.shape().rows()];
        softmax.forward_with_lse(x, out.as_out()?, &mut lse)?;
        let [batch, heads, n_q, _] = x.shape().out();
        given.0.insert("lse".into(), NamedTensor::f32("lse", &[batch, heads, n_q], lse)?);
    } else {
        attention.forward(x, out.as_out()?)?;
    }
    if let Some(grad_o) = tensors.get("grad_o") {
        given.0.extend(gradients(attention, x, &mut out, grad_o)?.0);
    }
    given.0.insert("o".into(), out);
    Ok(given)
}

/// `grad.q`, `grad.k` and `grad.v` of a loss whose gradient with respect to the output is `grad_o`, of the output's shape and
/// dtype. Writes the output, as the pass that saves for the gradients computes it.
///
/// # Errors
/// [`AttnError::Unsupported`] if the variant has no backward pass; else those of its passes.
pub fn gradients(
    attention: &dyn Attention,
    x: Qkv<'_>,
    out: &mut NamedTensor,
    grad_o: &NamedTensor,
) -> Result<NamedTensors> {
    let differentiable = attention.as_differentiable().ok_or_else(|| no_backward(attention.name()))?;
    let like = |shape: &[usize]| NamedTensor::unwritten(shape, x.dtype());
    let (mut q, mut k, mut v) = (like(&x.q().shape()), like(&x.k().shape()), like(&x.v().shape()));
    let saved = differentiable.forward_saving(x, out.as_out()?)?;
    let grads = QkvGrads { q: q.as_out()?, k: k.as_out()?, v: v.as_out()? };
    differentiable.backward(x, out.view("o")?, &saved, grad_o.view("grad_o")?, grads)?;
    let named = [("q", q), ("k", k), ("v", v)];
    Ok(NamedTensors(named.into_iter().map(|(name, grad)| (format!("grad.{name}"), grad)).collect()))
}

/// What a variant without a backward pass says to `grad_o`.
pub fn no_backward(variant: &str) -> AttnError {
    AttnError::unsupported(variant, "gradients: it has no backward")
}
