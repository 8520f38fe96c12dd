//! Named tensors in and out of typed inputs, for the registry's runners.
//!
//! Besides its inputs a runner here takes `grad_o`, the gradient by `o`, and then also gives `grad.NAME` for every input.

use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData};
use attn_core::{AttnError, OutMut, Result, TensorView, View, ViewMut};

/// The tensor as `(batch, heads, length, width)`; three axes are `(batch, length, width)` of one head.
pub(crate) fn view<'a>(tensors: &'a NamedTensors, name: &str) -> Result<TensorView<'a>> {
    let tensor = tensors.require(name)?;
    let axes = match tensor.shape[..] {
        [batch, n, width] => [batch, 1, n, width],
        [batch, heads, n, width] => [batch, heads, n, width],
        _ => {
            let expected = "(batch, length, width) or (batch, heads, length, width)";
            return Err(AttnError::value(format!("{name}'s shape"), format!("{:?}", tensor.shape), expected));
        }
    };
    match &tensor.data {
        TensorData::F32(data) => Ok(View::contiguous(name, data, axes)?.into()),
        TensorData::Bf16(data) => Ok(View::contiguous(name, data, axes)?.into()),
        TensorData::F16(data) => Ok(View::contiguous(name, data, axes)?.into()),
        _ => Err(integers(name)),
    }
}

/// A number a token: `(batch, heads, length)` as `(batch, heads, length, 1)`.
pub(crate) fn numbers<'a>(tensors: &'a NamedTensors, name: &str) -> Result<TensorView<'a>> {
    let tensor = tensors.require(name)?;
    let [batch, heads, n] = tensor.shape[..] else {
        let found = format!("{:?}", tensor.shape);
        return Err(AttnError::value(format!("{name}'s shape"), found, "(batch, heads, length)"));
    };
    let axes = [batch, heads, n, 1];
    match &tensor.data {
        TensorData::F32(data) => Ok(View::contiguous(name, data, axes)?.into()),
        TensorData::Bf16(data) => Ok(View::contiguous(name, data, axes)?.into()),
        TensorData::F16(data) => Ok(View::contiguous(name, data, axes)?.into()),
        _ => Err(integers(name)),
    }
}

/// `cu_seqlens (sequences + 1)`, if it is there: the prefix sums of the lengths of packed sequences.
pub(crate) fn prefix_sums(tensors: &NamedTensors) -> Result<Option<Vec<usize>>> {
    let Some(tensor) = tensors.get("cu_seqlens") else { return Ok(None) };
    let TensorData::I32(sums) = &tensor.data else {
        let found = tensor.data.dtype().map_or("u8".into(), |dtype| dtype.to_string());
        return Err(AttnError::DType { tensor: "cu_seqlens".into(), found, expected: "i32".into() });
    };
    if tensor.shape.len() != 1 {
        let found = format!("{:?}", tensor.shape);
        return Err(AttnError::value("cu_seqlens' shape", found, "(sequences + 1)"));
    }
    let size = |sum: &i32| {
        usize::try_from(*sum).map_err(|_| AttnError::value("cu_seqlens", sum, "numbers from 0 to all tokens"))
    };
    sums.iter().map(size).collect::<Result<Vec<_>>>().map(Some)
}

fn integers(name: &str) -> AttnError {
    AttnError::DType { tensor: name.into(), found: "integers".into(), expected: "floats".into() }
}

/// The numbers of an f32 tensor that has to be there, of this shape.
pub(crate) fn floats<'a>(tensors: &'a NamedTensors, name: &str, shape: &[usize]) -> Result<&'a [f32]> {
    tensors.require(name)?;
    match optional(tensors, name, shape)? {
        Some(data) => Ok(data),
        None => Ok(&[]),
    }
}

/// The numbers of an f32 tensor, if it is there, of this shape.
pub(crate) fn optional<'a>(
    tensors: &'a NamedTensors,
    name: &str,
    shape: &[usize],
) -> Result<Option<&'a [f32]>> {
    match tensors.f32(name)? {
        Some((found, _)) if found != shape => {
            Err(AttnError::value(format!("{name}'s shape"), format!("{found:?}"), format!("{shape:?}")))
        }
        given => Ok(given.map(|(_, data)| data)),
    }
}

/// Lengths of the axes of a tensor that has to be there.
pub(crate) fn shape<'a>(tensors: &'a NamedTensors, name: &str) -> Result<&'a [usize]> {
    Ok(&tensors.require(name)?.shape)
}

/// Adds an f32 tensor.
pub(crate) fn give(all: &mut NamedTensors, name: &str, shape: &[usize], data: Vec<f32>) -> Result<()> {
    all.0.insert(name.into(), NamedTensor::f32(name, shape, data)?);
    Ok(())
}

/// Adds the gradient by the input `name`, of its shape.
pub(crate) fn give_grad(
    all: &mut NamedTensors,
    inputs: &NamedTensors,
    name: &str,
    data: Vec<f32>,
) -> Result<()> {
    match inputs.get(name) {
        Some(input) => give(all, &format!("grad.{name}"), &input.shape, data),
        None => Ok(()),
    }
}

/// An f32 output `(batch, heads, length, width)` written by `write`.
pub(crate) fn output(axes: [usize; 4], write: impl FnOnce(OutMut<'_>) -> Result<()>) -> Result<Vec<f32>> {
    let mut out = vec![f32::NAN; axes.iter().product()];
    write(ViewMut::contiguous("out", &mut out, axes)?.into())?;
    Ok(out)
}

/// The f32 tensor `(.., rows, columns)` with its last two axes exchanged.
pub(crate) fn transposed(tensors: &NamedTensors, name: &str) -> Result<NamedTensor> {
    let shape = shape(tensors, name)?;
    let [outer @ .., rows, columns] = shape else {
        return Err(AttnError::value(format!("{name}'s shape"), format!("{shape:?}"), "at least two axes"));
    };
    let axes = [outer, &[*columns, *rows]].concat();
    NamedTensor::f32(name, &axes, transpose(floats(tensors, name, shape)?, *rows, *columns))
}

/// Matrices `[rows, columns]`, one after another, as `[columns, rows]`.
pub(crate) fn transpose(data: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let matrices = data.chunks_exact((rows * columns).max(1));
    matrices
        .flat_map(|m| (0..columns).flat_map(move |j| (0..rows).map(move |i| m[i * columns + j])))
        .collect()
}

/// Refuses `causal=false`.
pub(crate) fn check_causal(variant: &str, options: &Options) -> Result<()> {
    match options.get_or("causal", true)? {
        true => Ok(()),
        false => Err(AttnError::unsupported(variant, "causal=false")),
    }
}
