//! RMS norm with a gain, and its gradient.
//!
//! ```text
//! r = 1/√(mean(x²) + eps)      y = x r g
//! dx = r (g dy − x r² mean(x g dy))      dg = Σ_rows x r dy
//! ```

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};

use super::masked_softmax::dot;
use super::rows::{f32_rows, no_input};

/// `x [rows, width]` over its root mean square, times `gain [width]`.
pub(crate) fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> candle_core::Result<Tensor> {
    x.apply_op2(gain, RmsNorm { eps: eps as f32 })
}

#[derive(Clone, Copy)]
struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    fn inverse_rms(self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        gain: &CpuStorage,
        gain_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, gain) = (f32_rows(x, layout)?, f32_rows(gain, gain_layout)?);
        if gain.is_empty() || layout.dims().last() != Some(&gain.len()) {
            return Err(no_input("rms norm", layout));
        }
        let mut out = vec![0.0; x.len()];
        for (x, out) in x.chunks_exact(gain.len()).zip(out.chunks_exact_mut(gain.len())) {
            let r = self.inverse_rms(x);
            for ((out, x), g) in out.iter_mut().zip(x).zip(gain) {
                *out = x * r * g;
            }
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        // The gain's gradient travels as a last row below that of x: an operation returns one tensor.
        let both = x.apply_op3_no_bwd(gain, &grad.contiguous()?, &RmsNormGrad(*self))?;
        let rows = both.dim(0)? - 1;
        Ok((Some(both.narrow(0, 0, rows)?.reshape(x.shape())?), Some(both.get(rows)?)))
    }
}

struct RmsNormGrad(RmsNorm);

impl CustomOp3 for RmsNormGrad {
    fn name(&self) -> &'static str {
        "rms-norm-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        gain: &CpuStorage,
        gain_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, gain, grad) =
            (f32_rows(x, layout)?, f32_rows(gain, gain_layout)?, f32_rows(grad, grad_layout)?);
        let width = gain.len();
        let mut out = vec![0.0; x.len() + width];
        let (dx, dgain) = out.split_at_mut(x.len());
        let mut weighted = vec![0.0; width];
        let rows = x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((x, grad), dx) in rows {
            let r = self.0.inverse_rms(x);
            for i in 0..width {
                weighted[i] = grad[i] * gain[i];
                dgain[i] += x[i] * r * grad[i];
            }
            let shrink = r * r * dot(x, &weighted) / width as f32;
            for i in 0..width {
                dx[i] = r * (weighted[i] - x[i] * shrink);
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((x.len() / width + 1, width))))
    }
}
