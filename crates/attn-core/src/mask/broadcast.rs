//! Tensors that repeat over the axes on which they have length 1.

use crate::{AttnError, AttnShape, Result};

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
