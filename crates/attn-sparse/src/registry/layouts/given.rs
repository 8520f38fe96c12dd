//! Runs of a variant that is built already: with a layout, or with tokens, that came as a tensor.

use crate::block_mask::{BlockMask, BlockSizes, Builder};
use crate::decider::{Decider, Decision, Promises, Work};
use attn_core::mask::{Align, Band};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData, gradients, output_like};
use attn_core::{Attention, AttnError, AttnShape, Qkv, Result};
use std::sync::Arc;

/// `o`, `lse`, and with `grad_o` the gradients of `q`, `k` and `v`.
pub(super) fn run(attention: &dyn Attention, tensors: &NamedTensors) -> Result<NamedTensors> {
    let x = tensors.qkv()?;
    let mut given = NamedTensors::default();
    let mut out = output_like(&x);
    let mut lse = vec![f32::NAN; x.shape().rows()];
    match attention.as_softmax() {
        Some(softmax) => softmax.forward_with_lse(x, out.as_out()?, &mut lse)?,
        None => attention.forward(x, out.as_out()?)?,
    }
    let [batch, heads, n_q, _] = x.shape().out();
    given.0.insert("lse".into(), NamedTensor::f32("lse", &[batch, heads, n_q], lse)?);
    if let Some(grad_o) = tensors.get("grad_o") {
        given.0.extend(gradients(attention, x, &mut out, grad_o)?.0);
    }
    given.0.insert("o".into(), out);
    Ok(given)
}

/// A tensor of true and false.
pub(super) fn booleans(name: &str, tensor: &NamedTensor) -> Result<Vec<bool>> {
    match &tensor.data {
        TensorData::U8(data) => Ok(data.iter().map(|x| *x != 0).collect()),
        TensorData::I32(data) => Ok(data.iter().map(|x| *x != 0).collect()),
        other => {
            let found = other.dtype().map_or("another".into(), |dtype| dtype.to_string());
            Err(AttnError::DType { tensor: name.into(), found, expected: "u8 or i32 (0 is false)".into() })
        }
    }
}

/// A layout that was given instead of drawn.
#[derive(Clone)]
pub(super) struct GivenBlocks<P> {
    /// The pattern whose promises hold.
    pub(super) pattern: P,
    pub(super) mask: Arc<BlockMask>,
}

impl<P: Decider> Decider for GivenBlocks<P> {
    const NAME: &'static str = P::NAME;

    fn decide(&self, _: &Qkv<'_>) -> Result<Decision> {
        Ok(Decision::from((*self.mask).clone()))
    }

    fn promises(&self) -> Promises {
        self.pattern.promises()
    }

    fn work(&self, _: &AttnShape) -> Work {
        Work { pairs: self.mask.n_pairs(), ..Work::default() }
    }
}

/// `block_mask [batch or 1, heads or 1, block rows, block columns]` as a mask; causal inside the listed blocks if asked for.
pub(super) fn block_mask(
    tensor: &NamedTensor,
    shape: &AttnShape,
    block: usize,
    causal: bool,
) -> Result<BlockMask> {
    let layout = booleans("block_mask", tensor)?;
    let n = |length: usize| length.div_ceil(block.max(1));
    let [batch, heads, rows, cols] = <[usize; 4]>::try_from(tensor.shape.as_slice()).map_err(|_| {
        let expected = "(batch, heads, block rows, block columns)";
        AttnError::value("block_mask's shape", format!("{:?}", tensor.shape), expected)
    })?;
    for (axis, found, expected) in
        [("block rows", rows, n(shape.n_q)), ("block columns", cols, n(shape.n_kv))]
    {
        if found != expected {
            return Err(AttnError::shape("block_mask", axis, found, expected));
        }
    }
    if batch != 1 && batch != shape.batch {
        return Err(AttnError::shape("block_mask", "batch", batch, format!("1 or {}", shape.batch)));
    }
    let mut builder = Builder::new(shape, BlockSizes::square(block)).per_head(heads);
    if batch != 1 {
        builder = builder.per_batch();
    }
    if causal {
        builder = builder.inside(Arc::new(Band::causal(shape, Align::BottomRight)));
    }
    builder.from_dense(&layout)
}
