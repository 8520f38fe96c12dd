//! Results that carry no gradients, and say so.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};

/// `out` itself if none of the `inputs` that it was made of tracks gradients. Otherwise the same numbers as a node of the graph
/// whose backward pass fails with an error that names `op`: better than gradients that are silently not there.
///
/// # Errors
/// None of its own.
pub fn refuse_gradients(op: &'static str, out: Tensor, inputs: &[&Tensor]) -> Result<Tensor> {
    match inputs.iter().find(|input| input.track_op()) {
        None => Ok(out),
        Some(input) => out.apply_op2(input, Refusal(op)),
    }
}

struct Refusal(&'static str);

impl CustomOp2 for Refusal {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(
        &self,
        out: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((out.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Err(Error::BackwardNotSupported { op: self.0 })
    }
}
