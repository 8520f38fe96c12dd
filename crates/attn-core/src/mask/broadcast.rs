//! Tensors that repeat over the axes on which they have length 1.

use crate::{AttnError, AttnShape, Result};

/// Checks that every pair of `shape` reads an element below `len`: that a tensor made for one problem serves another.
pub(crate) fn check_fits(tensor: &str, len: usize, strides: &[usize; 4], shape: &AttnShape) -> Result<()> {
    let axes = [shape.batch, shape.n_heads_q, shape.n_q, shape.n_kv];
    let far = axes.iter().zip(strides).try_fold(0usize, |far, (n, stride)| {
        n.saturating_sub(1).checked_mul(*stride).and_then(|step| far.checked_add(step))
    });
    if axes.contains(&0) || far.is_some_and(|far| far < len) {
        return Ok(());
    }
    let found = format!("{len} elements made for another shape");
    Err(AttnError::value(tensor, found, format!("one for (batch, n_heads_q, n_q, n_kv) = {axes:?}")))
}

/// Checks that something made for `made` entries of an axis serves `needed`.
pub(crate) fn check_axis(tensor: &str, axis: &'static str, made: usize, needed: usize) -> Result<()> {
    if needed <= made { Ok(()) } else { Err(AttnError::shape(tensor, axis, made, needed)) }
}

/// Strides with which a right-aligned row-major tensor is read as `(batch, n_heads_q, n_q, n_kv)`.
pub(crate) fn broadcast_strides(
    tensor: &str,
    len: usize,
    from: &[usize],
    shape: &AttnShape,
) -> Result<[usize; 4]> {
    let to = [shape.batch, shape.n_heads_q, shape.n_q, shape.n_kv];
    let elements = from.iter().try_fold(1usize, |elements, &n| elements.checked_mul(n));
    if from.len() > 4 || elements != Some(len) {
        let reason =
            format!("shape {from:?} for {len} elements, expected at most 4 axes that hold just these");
        return Err(AttnError::Layout { tensor: tensor.into(), reason });
    }
    let (mut strides, mut step) = ([0; 4], 1);
    for (back, &n) in from.iter().rev().enumerate() {
        let axis = 3 - back;
        if n != 1 && n != to[axis] {
            let name = ["batch", "n_heads_q", "n_q", "n_kv"][axis];
            return Err(AttnError::shape(tensor, name, n, format!("1 or {}", to[axis])));
        }
        strides[axis] = if n == 1 { 0 } else { step };
        step *= n;
    }
    Ok(strides)
}
