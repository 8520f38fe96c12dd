//! The contiguous f32 numbers behind a tensor, as the module's own operations read them.

use candle_core::{CpuStorage, Layout};

/// All numbers of a contiguous f32 tensor.
pub(crate) fn f32_rows<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((start, end)), CpuStorage::F32(numbers)) => Ok(&numbers[start..end]),
        _ => Err(candle_core::Error::Msg("expected a contiguous f32 tensor".into()).bt()),
    }
}

pub(crate) fn no_input(what: &str, layout: &Layout) -> candle_core::Error {
    candle_core::Error::Msg(format!("{what}: cannot take a tensor of shape {:?}", layout.dims())).bt()
}
