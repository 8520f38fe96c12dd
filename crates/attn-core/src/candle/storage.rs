//! Between candle's storages and views.

use crate::{AttnError, DType, Element, OutMut, Qkv, TensorView, View, ViewMut};
use candle_core::{CpuStorage, DType as CandleDType, Layout, Result, Shape};
use half::{bf16, f16};

/// Allocates the output, runs `work` and hands the output over.
pub(super) fn run(
    x: Qkv<'_>,
    work: impl FnOnce(Qkv<'_>, OutMut<'_>) -> crate::Result<()>,
) -> Result<(CpuStorage, Shape)> {
    fn typed<E: Element>(
        x: Qkv<'_>,
        work: impl FnOnce(Qkv<'_>, OutMut<'_>) -> crate::Result<()>,
    ) -> crate::Result<Vec<E>> {
        let shape = x.shape().out();
        let mut out = vec![E::ZERO; shape.iter().product()];
        work(x, ViewMut::contiguous("out", &mut out, shape)?.into())?;
        Ok(out)
    }
    let shape = Shape::from(x.shape().out().to_vec());
    let storage = match x.dtype() {
        DType::F32 => CpuStorage::F32(typed::<f32>(x, work)?),
        DType::Bf16 => CpuStorage::BF16(typed::<bf16>(x, work)?),
        DType::F16 => CpuStorage::F16(typed::<f16>(x, work)?),
    };
    Ok((storage, shape))
}

pub(super) fn dtype(dtype: CandleDType) -> Result<DType> {
    match dtype {
        CandleDType::F32 => Ok(DType::F32),
        CandleDType::BF16 => Ok(DType::Bf16),
        CandleDType::F16 => Ok(DType::F16),
        other => candle_core::bail!("q: dtype is {other:?}, expected f32, bf16 or f16"),
    }
}

pub(super) fn cpu<'a>(tensor: &str, storage: &'a candle_core::Storage) -> Result<&'a CpuStorage> {
    match storage {
        candle_core::Storage::Cpu(storage) => Ok(storage),
        _ => candle_core::bail!("{tensor}: device is not the CPU; attention runs on CPU tensors"),
    }
}

pub(super) fn qkv<'a>(
    q: (&'a CpuStorage, &Layout),
    k: (&'a CpuStorage, &Layout),
    v: (&'a CpuStorage, &Layout),
) -> Result<Qkv<'a>> {
    Ok(Qkv::new(view("q", q)?, view("k", k)?, view("v", v)?)?)
}

pub(super) fn view<'a>(tensor: &str, (storage, layout): (&'a CpuStorage, &Layout)) -> Result<TensorView<'a>> {
    fn typed<'a, E: Element>(tensor: &str, data: &'a [E], layout: &Layout) -> Result<TensorView<'a>> {
        let axes = |x: &[usize]| -> Result<[usize; 4]> {
            x.try_into().map_err(|_| {
                let expected = "(batch, heads, length, width)";
                AttnError::value(format!("{tensor}'s shape"), format!("{:?}", layout.dims()), expected).into()
            })
        };
        let data = &data[layout.start_offset()..];
        Ok(View::new(tensor, data, axes(layout.dims())?, axes(layout.stride())?)?.into())
    }
    match storage {
        CpuStorage::F32(data) => typed(tensor, data, layout),
        CpuStorage::BF16(data) => typed(tensor, data, layout),
        CpuStorage::F16(data) => typed(tensor, data, layout),
        other => {
            let found = format!("{:?}", candle_core::backend::BackendStorage::dtype(other));
            Err(AttnError::DType { tensor: tensor.into(), found, expected: "f32, bf16 or f16".into() }.into())
        }
    }
}
