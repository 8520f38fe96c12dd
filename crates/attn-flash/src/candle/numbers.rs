//! Tensors that are read as plain numbers.

use attn_core::AttnError;
use attn_core::candle::candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor};
use attn_core::candle::{candle_core, check_cpu};

/// `tensor` as contiguous f32 on the CPU; conversions carry gradients.
///
/// # Errors
/// A tensor off the CPU or without fractions: a mask of 0 and 1, say, is not a bias.
pub(super) fn floats(name: &str, tensor: &Tensor) -> Result<Tensor> {
    check_cpu(name, tensor.device().location())?;
    match tensor.dtype() {
        DType::F32 | DType::BF16 | DType::F16 | DType::F64 => tensor.to_dtype(DType::F32)?.contiguous(),
        other => candle_core::bail!("{name}: dtype is {other:?}, expected a float dtype"),
    }
}

/// The numbers of a tensor that [`floats`] made.
pub(super) fn as_slice<'a>(storage: &'a Storage, layout: &Layout) -> attn_core::Result<&'a [f32]> {
    let slice = match storage {
        Storage::Cpu(CpuStorage::F32(data)) => {
            layout.contiguous_offsets().map(|(start, end)| &data[start..end])
        }
        _ => None,
    };
    slice.ok_or_else(|| AttnError::value("tensor", "strided or not f32", "contiguous f32 on the CPU"))
}

/// A vector of whole numbers: prefix sums of lengths.
///
/// # Errors
/// A tensor of another rank; those of [`integers`].
pub(super) fn prefix_sums(name: &str, tensor: &Tensor) -> Result<Vec<i32>> {
    if tensor.rank() != 1 {
        candle_core::bail!("{name}'s shape is {:?}, expected (sequences + 1)", tensor.dims());
    }
    integers(name, tensor)
}

/// All numbers of a tensor, row-major.
///
/// # Errors
/// A tensor off the CPU, not of u32, i32 or i64, or with a number that an i32 does not hold.
pub(super) fn integers(name: &str, tensor: &Tensor) -> Result<Vec<i32>> {
    check_cpu(name, tensor.device().location())?;
    let tensor = tensor.flatten_all()?;
    let wide: Vec<i64> = match tensor.dtype() {
        DType::U32 => tensor.to_vec1::<u32>()?.into_iter().map(i64::from).collect(),
        DType::I32 => tensor.to_vec1::<i32>()?.into_iter().map(i64::from).collect(),
        DType::I64 => tensor.to_vec1::<i64>()?,
        other => candle_core::bail!("{name}: dtype is {other:?}, expected u32, i32 or i64"),
    };
    let narrow =
        |x| i32::try_from(x).map_err(|_| AttnError::value(name, x, "numbers that fit an i32").into());
    wide.into_iter().map(narrow).collect()
}
