//! Between candle's storages and views.

use super::AxisOrder;
use crate::{AttnError, DType, Element, OutMut, Qkv, TensorView, View, ViewMut};
use candle_core::{
    CpuStorage, DType as CandleDType, Device, DeviceLocation, Layout, Result, Shape, Storage, Tensor,
};
use half::{bf16, f16};

/// Lends `tensor`, called `name` in errors, as a view for the time of `read`. Nothing is copied.
///
/// # Errors
/// A tensor off the CPU, of another dtype or rank, or with a strided last axis; what `read` returns.
pub fn with_view<R>(
    name: &str,
    tensor: &Tensor,
    order: AxisOrder,
    read: impl FnOnce(TensorView<'_>) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    read(view(name, (cpu(name, &storage)?, layout), order)?)
}

/// A tensor that `write` fills through a view of `shape = (batch, heads, length, width)`; contiguous in its own order.
///
/// # Errors
/// What `write` returns.
pub fn tensor_from(
    dtype: DType,
    shape: [usize; 4],
    order: AxisOrder,
    write: impl FnOnce(OutMut<'_>) -> crate::Result<()>,
) -> Result<Tensor> {
    let (storage, shape) = filled(dtype, shape, order, write)?;
    match storage {
        CpuStorage::F32(data) => Tensor::from_vec(data, shape, &Device::Cpu),
        CpuStorage::BF16(data) => Tensor::from_vec(data, shape, &Device::Cpu),
        CpuStorage::F16(data) => Tensor::from_vec(data, shape, &Device::Cpu),
        other => candle_core::bail!("out: dtype is {:?}, expected f32, bf16 or f16", storage_dtype(&other)),
    }
}

/// Allocates a tensor and lets `write` fill it.
pub(super) fn filled(
    dtype: DType,
    shape: [usize; 4],
    order: AxisOrder,
    write: impl FnOnce(OutMut<'_>) -> crate::Result<()>,
) -> Result<(CpuStorage, Shape)> {
    fn typed<E: Element>(
        shape: [usize; 4],
        order: AxisOrder,
        write: impl FnOnce(OutMut<'_>) -> crate::Result<()>,
    ) -> crate::Result<Vec<E>> {
        let mut out = vec![E::ZERO; shape.iter().product()];
        write(ViewMut::new("out", &mut out, shape, order.strides(shape))?.into())?;
        Ok(out)
    }
    let storage = match dtype {
        DType::F32 => CpuStorage::F32(typed::<f32>(shape, order, write)?),
        DType::Bf16 => CpuStorage::BF16(typed::<bf16>(shape, order, write)?),
        DType::F16 => CpuStorage::F16(typed::<f16>(shape, order, write)?),
    };
    Ok((storage, order.dims(shape).into()))
}

/// The dtype of a tensor called `name` as one of ours.
///
/// # Errors
/// Any but f32, bf16 and f16.
pub(super) fn dtype(name: &str, dtype: CandleDType) -> Result<DType> {
    match dtype {
        CandleDType::F32 => Ok(DType::F32),
        CandleDType::BF16 => Ok(DType::Bf16),
        CandleDType::F16 => Ok(DType::F16),
        other => candle_core::bail!("{name}: dtype is {other:?}, expected f32, bf16 or f16"),
    }
}

/// Checks that a tensor called `name` lies in the memory of the CPU.
///
/// # Errors
/// One that lies elsewhere; the error names both.
pub fn check_cpu(name: &str, location: DeviceLocation) -> Result<()> {
    match location {
        DeviceLocation::Cpu => Ok(()),
        other => {
            candle_core::bail!("{name}: device is {other:?}, expected the CPU (`to_device(&Device::Cpu)`)")
        }
    }
}

pub(super) fn cpu<'a>(tensor: &str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        other => candle_core::bail!("{tensor}: device is {:?}, expected the CPU", other.device().location()),
    }
}

pub(super) fn qkv<'a>(
    q: (&'a CpuStorage, &Layout),
    k: (&'a CpuStorage, &Layout),
    v: (&'a CpuStorage, &Layout),
    order: AxisOrder,
) -> Result<Qkv<'a>> {
    Ok(Qkv::new(view("q", q, order)?, view("k", k, order)?, view("v", v, order)?)?)
}

pub(super) fn view<'a>(
    tensor: &str,
    (storage, layout): (&'a CpuStorage, &Layout),
    order: AxisOrder,
) -> crate::Result<TensorView<'a>> {
    fn typed<'a, E: Element>(
        tensor: &str,
        data: &'a [E],
        layout: &Layout,
        order: AxisOrder,
    ) -> crate::Result<TensorView<'a>> {
        let [shape, strides] = order.view(tensor, layout.dims(), layout.stride())?;
        Ok(View::new(tensor, &data[layout.start_offset()..], shape, strides)?.into())
    }
    match storage {
        CpuStorage::F32(data) => typed(tensor, data, layout, order),
        CpuStorage::BF16(data) => typed(tensor, data, layout, order),
        CpuStorage::F16(data) => typed(tensor, data, layout, order),
        other => {
            let found = format!("{:?}", storage_dtype(other));
            Err(AttnError::DType { tensor: tensor.into(), found, expected: "f32, bf16 or f16".into() })
        }
    }
}

fn storage_dtype(storage: &CpuStorage) -> CandleDType {
    candle_core::backend::BackendStorage::dtype(storage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_elsewhere_is_refused_by_name() {
        let error = check_cpu("alibi_slopes", DeviceLocation::Cuda { gpu_id: 1 }).unwrap_err().to_string();
        assert!(error.contains("alibi_slopes") && error.contains("Cuda"), "{error}");
        assert!(check_cpu("q", DeviceLocation::Cpu).is_ok());
    }
}
