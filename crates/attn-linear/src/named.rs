//! Named tensors in and out of typed inputs, for the registry's runners.
//!
//! Besides its inputs a runner here takes `grad_o`, the gradient by `o`, and then also gives `grad.NAME` for every input.

use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData};
use attn_core::{AttnError, DType, OutMut, Result, TensorView, View};

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
    let Some((shape, sums)) = tensors.i32("cu_seqlens")? else { return Ok(None) };
    if shape.len() != 1 {
        let found = format!("{shape:?}");
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

/// Adds the gradient by the input `name`, of its shape and storage type.
pub(crate) fn give_grad(
    all: &mut NamedTensors,
    inputs: &NamedTensors,
    name: &str,
    data: Vec<f32>,
) -> Result<()> {
    let Some(input) = inputs.get(name) else { return Ok(()) };
    let full = format!("grad.{name}");
    let grad = NamedTensor::f32(&full, &input.shape, data)?;
    all.0.insert(full, grad.rounded(input.data.dtype().unwrap_or(DType::F32)));
    Ok(())
}

/// An output of `like`'s storage type, told as of `shape`, that `write` writes as `(batch, heads, length, width)`.
pub(crate) fn output(
    like: &TensorView<'_>,
    axes: [usize; 4],
    shape: &[usize],
    write: impl FnOnce(OutMut<'_>) -> Result<()>,
) -> Result<NamedTensor> {
    let mut out = NamedTensor::unwritten(&axes, like.dtype());
    write(out.as_out()?)?;
    out.shape = shape.to_vec();
    Ok(out)
}

/// The tensors with the halves among `names` as f32; `None` if there are none.
pub(crate) fn widened<'n>(
    tensors: &NamedTensors,
    names: impl Iterator<Item = &'n str>,
) -> Option<NamedTensors> {
    let is_half = |name: &&str| {
        let dtype = tensors.get(name).and_then(|tensor| tensor.data.dtype());
        dtype.is_some_and(|dtype| dtype != DType::F32)
    };
    let halves: Vec<&str> = names.filter(is_half).collect();
    if halves.is_empty() {
        return None;
    }
    let mut all = tensors.clone();
    for name in halves {
        if let Some(tensor) = all.0.get_mut(name) {
            tensor.data = TensorData::F32(tensor.data.to_f64().into_iter().map(|x| x as f32).collect());
        }
    }
    Some(all)
}

/// The tensor `(.., rows, columns)` with its last two axes exchanged.
pub(crate) fn transposed(tensors: &NamedTensors, name: &str) -> Result<NamedTensor> {
    turned(tensors.require(name)?, name)
}

/// As [`transposed`] of a tensor that `name` names.
pub(crate) fn turned(tensor: &NamedTensor, name: &str) -> Result<NamedTensor> {
    let shape = &tensor.shape[..];
    let [outer @ .., rows, columns] = shape else {
        return Err(AttnError::value(format!("{name}'s shape"), format!("{shape:?}"), "at least two axes"));
    };
    let (rows, columns) = (*rows, *columns);
    let data = match &tensor.data {
        TensorData::F32(data) => TensorData::F32(transpose(data, rows, columns)),
        TensorData::Bf16(data) => TensorData::Bf16(transpose(data, rows, columns)),
        TensorData::F16(data) => TensorData::F16(transpose(data, rows, columns)),
        _ => return Err(integers(name)),
    };
    Ok(NamedTensor { shape: [outer, &[columns, rows]].concat(), data })
}

/// Matrices `[rows, columns]`, one after another, as `[columns, rows]`.
pub(crate) fn transpose<E: Copy>(data: &[E], rows: usize, columns: usize) -> Vec<E> {
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
