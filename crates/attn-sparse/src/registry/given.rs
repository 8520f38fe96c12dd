//! Runs under a choice that came as a tensor.

use crate::{BlockMask, BlockSizes, Builder, Decided, Decision, SparseAttention};
use attn_core::mask::{Align, Band};
use attn_core::registry::{Entry, NamedTensors, Options, run_built, run_qkv};
use attn_core::{AttnError, AttnShape, Result};
use std::sync::Arc;

/// Runs under a choice that is given with the tensors called `names`, which `decide` reads; without them, as ever.
pub(super) fn run_given(
    entry: &Entry,
    options: &Options,
    tensors: &NamedTensors,
    names: &[&str],
    decide: impl FnOnce(&AttnShape) -> Result<Decision>,
) -> Result<NamedTensors> {
    if !names.iter().any(|name| tensors.get(name).is_some()) {
        return run_qkv(entry, options, tensors);
    }
    tensors.only(entry.name, &[&["q", "k", "v", "grad_o"], names].concat())?;
    entry.build(options)?;
    run_decided(options, tensors, decide(&tensors.qkv()?.shape())?)
}

/// Attends what was decided: `o`, `lse`, and gradients with `grad_o`.
pub(super) fn run_decided(
    options: &Options,
    tensors: &NamedTensors,
    decision: Decision,
) -> Result<NamedTensors> {
    let attention =
        SparseAttention { softmax_scale: options.get("scale")?, ..SparseAttention::new(Decided(decision)) };
    run_built(&attention, tensors)
}

/// The blocks that the tensor `name`, `[batch or 1, heads or 1, block rows, block columns]` of flags, lists; causal inside them
/// if asked for.
pub(super) fn given_blocks(
    tensors: &NamedTensors,
    name: &str,
    shape: &AttnShape,
    sizes: BlockSizes,
    causal: bool,
) -> Result<BlockMask> {
    sizes.check()?;
    let tensor = tensors.require(name)?;
    let [batch, heads, rows, columns] = <[usize; 4]>::try_from(tensor.shape.as_slice()).map_err(|_| {
        let expected = "(batch, heads, block rows, block columns)";
        AttnError::value(format!("{name}'s shape"), format!("{:?}", tensor.shape), expected)
    })?;
    let blocks = [shape.n_q.div_ceil(sizes.q), shape.n_kv.div_ceil(sizes.kv)];
    for (axis, found, expected) in [("block rows", rows, blocks[0]), ("block columns", columns, blocks[1])] {
        if found != expected {
            return Err(AttnError::shape(name, axis, found, expected));
        }
    }
    for (axis, found, all) in [("batch", batch, shape.batch), ("heads", heads, shape.n_heads_q)] {
        if found != 1 && found != all {
            return Err(AttnError::shape(name, axis, found, format!("1 or {all}")));
        }
    }
    let mut builder = Builder::new(shape, sizes).per_head(heads.max(1));
    if batch != 1 {
        builder = builder.per_batch();
    }
    if causal {
        builder = builder.inside(Arc::new(Band::causal(shape, Align::BottomRight)));
    }
    builder.from_dense(&tensor.booleans(name)?)
}
