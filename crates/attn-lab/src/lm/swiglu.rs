//! `silu(gate) · up`, and its gradient, in one pass over memory.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};

use super::rows::f32_rows;

/// `silu(gate) · up`, element by element; `silu(x) = x / (1 + e^−x)`.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
    gate.apply_op2(up, SwiGlu)
}

struct SwiGlu;

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (gate, up) = (f32_rows(gate, gate_layout)?, f32_rows(up, up_layout)?);
        let out = gate.iter().zip(up).map(|(&g, u)| g * sigmoid(g) * u).collect();
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let both = gate.apply_op3_no_bwd(up, &grad.contiguous()?, &SwiGluGrad)?;
        Ok((Some(both.get(0)?), Some(both.get(1)?)))
    }
}

/// Both gradients, stacked: an operation returns one tensor.
struct SwiGluGrad;

impl CustomOp3 for SwiGluGrad {
    fn name(&self) -> &'static str {
        "swiglu-grad"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (gate, up, grad) =
            (f32_rows(gate, gate_layout)?, f32_rows(up, up_layout)?, f32_rows(grad, grad_layout)?);
        let mut out = vec![0.0; 2 * gate.len()];
        let (dgate, dup) = out.split_at_mut(gate.len());
        for i in 0..gate.len() {
            let s = sigmoid(gate[i]);
            let silu = gate[i] * s;
            dup[i] = grad[i] * silu;
            dgate[i] = grad[i] * up[i] * (s + silu * (1.0 - s));
        }
        let dims = [&[2], gate_layout.dims()].concat();
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }
}
