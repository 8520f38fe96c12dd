//! One call in candle's graph.

use super::storage::{cpu, qkv, run, view};
use crate::{Attention, Differentiable, Element, QkvGrads, Saved, ViewMut};
use candle_core::{CpuStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Tensor, WithDType};
use half::{bf16, f16};
use std::sync::OnceLock;

/// Gradients with respect to q, k and v.
type ThreeGrads = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// One call of a variant; a new value for every call, because it keeps what the backward pass of that call needs.
pub(super) struct Op<A> {
    attention: A,
    /// Whether an input tracks gradients.
    tracked: bool,
    saved: OnceLock<Saved>,
}

impl<A: Attention> Op<A> {
    pub(super) fn new(attention: A, tracked: bool) -> Self {
        Self { attention, tracked, saved: OnceLock::new() }
    }

    fn differentiable(&self) -> Option<&dyn Differentiable> {
        self.attention.as_differentiable().filter(|_| self.tracked)
    }
}

impl<A: Attention> CustomOp3 for Op<A> {
    fn name(&self) -> &'static str {
        self.attention.name()
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = qkv((q, q_layout), (k, k_layout), (v, v_layout))?;
        run(x, |x, out| match self.differentiable() {
            None => self.attention.forward(x, out),
            Some(attention) => {
                let saved = attention.forward_saving(x, out)?;
                // The graph runs an op once: nothing is there yet.
                let _ = self.saved.set(saved);
                Ok(())
            }
        })
    }

    fn bwd(&self, q: &Tensor, k: &Tensor, v: &Tensor, out: &Tensor, grad_out: &Tensor) -> Result<ThreeGrads> {
        let (Some(attention), Some(saved)) = (self.differentiable(), self.saved.get()) else {
            return Err(Error::BackwardNotSupported { op: self.name() });
        };
        // The gradient of a sum, say, is one number seen from everywhere.
        let grad_out =
            &if grad_out.stride().last() == Some(&1) { grad_out.clone() } else { grad_out.contiguous()? };
        let call = Backward { attention, saved, inputs: [q, k, v], out, grad_out };
        match q.dtype() {
            DType::F32 => call.run::<f32>(),
            DType::BF16 => call.run::<bf16>(),
            DType::F16 => call.run::<f16>(),
            other => candle_core::bail!("q: dtype is {other:?}, expected f32, bf16 or f16"),
        }
    }
}

/// The backward pass of one call.
struct Backward<'a> {
    attention: &'a dyn Differentiable,
    saved: &'a Saved,
    inputs: [&'a Tensor; 3],
    out: &'a Tensor,
    grad_out: &'a Tensor,
}

impl Backward<'_> {
    fn run<E: Element + WithDType>(&self) -> Result<ThreeGrads> {
        let [(q, q_at), (k, k_at), (v, v_at)] = self.inputs.map(Tensor::storage_and_layout);
        let (out, out_at) = self.out.storage_and_layout();
        let (grad_out, grad_out_at) = self.grad_out.storage_and_layout();
        let x = qkv((cpu("q", &q)?, q_at), (cpu("k", &k)?, k_at), (cpu("v", &v)?, v_at))?;
        let shape = x.shape();
        let shapes = [shape.q(), shape.k(), shape.v()];
        let [mut dq, mut dk, mut dv] = shapes.map(|s| vec![E::ZERO; s.iter().product()]);
        let grads = QkvGrads {
            q: ViewMut::contiguous("grad_q", &mut dq, shapes[0])?.into(),
            k: ViewMut::contiguous("grad_k", &mut dk, shapes[1])?.into(),
            v: ViewMut::contiguous("grad_v", &mut dv, shapes[2])?.into(),
        };
        let out = view("out", (cpu("out", &out)?, out_at))?;
        let grad_out = view("grad_out", (cpu("grad_out", &grad_out)?, grad_out_at))?;
        self.attention.backward(x, out, self.saved, grad_out, grads)?;
        let tensor = |data, shape: [usize; 4]| Tensor::from_vec(data, shape.to_vec(), &Device::Cpu).map(Some);
        Ok((tensor(dq, shapes[0])?, tensor(dk, shapes[1])?, tensor(dv, shapes[2])?))
    }
}
