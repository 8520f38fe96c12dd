//! One call in candle's graph.

use super::AxisOrder;
use super::storage::{check_cpu, cpu, filled, qkv, view};
use crate::{Attention, AttnError, Element, OutMut, Qkv, QkvGrads, Saved, TensorView, ViewMut};
use candle_core::{CpuStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Tensor, WithDType};
use half::{bf16, f16};
use std::sync::OnceLock;

/// Gradients with respect to q, k and v.
type ThreeGrads = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// An operation on q, k and v with a backward pass; [`apply_qkv`] makes one call of it a node of candle's graph.
pub trait QkvOp: Send + Sync + 'static {
    /// What errors call it.
    fn name(&self) -> &'static str;

    /// Writes `out (batch, n_heads_q, n_q, head_dim_v)`. `tracked` says whether a backward pass may follow; what it will
    /// need besides inputs and output is then returned, or `None` by an operation without gradients.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>, tracked: bool) -> crate::Result<Option<Saved>>;

    /// Writes the gradients of a loss with respect to q, k and v, given its gradient with respect to the output.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> crate::Result<()>;
}

/// Runs `op` on CPU tensors of f32, bf16 or f16, read where they are whatever their strides; the last axis must be
/// contiguous. The output is contiguous in the same order of axes, and carries gradients.
///
/// # Errors
/// A tensor off the CPU, of another dtype or rank, or with a strided last axis; those of [`QkvOp::forward`].
pub fn apply_qkv(op: impl QkvOp, order: AxisOrder, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    for (name, tensor) in [("q", q), ("k", k), ("v", v)] {
        check_cpu(name, tensor.device().location())?;
    }
    let tracked = q.track_op() || k.track_op() || v.track_op();
    q.apply_op3(k, v, Node { op, order, tracked, saved: OnceLock::new() })
}

/// A variant as an operation.
pub(super) struct Variant<A>(pub(super) A);

impl<A: Attention + 'static> QkvOp for Variant<A> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>, tracked: bool) -> crate::Result<Option<Saved>> {
        match self.0.as_differentiable().filter(|_| tracked) {
            Some(variant) => variant.forward_saving(x, out).map(Some),
            None => self.0.forward(x, out).map(|()| None),
        }
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> crate::Result<()> {
        let variant = self.0.as_differentiable();
        let variant = variant.ok_or_else(|| AttnError::unsupported(self.name(), "gradients"))?;
        variant.backward(x, out, saved, grad_out, grads)
    }
}

/// A new value for every call, because it keeps what the backward pass of that call needs.
struct Node<P> {
    op: P,
    order: AxisOrder,
    /// Whether an input tracks gradients.
    tracked: bool,
    saved: OnceLock<Saved>,
}

impl<P: QkvOp> CustomOp3 for Node<P> {
    fn name(&self) -> &'static str {
        self.op.name()
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
        let x = qkv((q, q_layout), (k, k_layout), (v, v_layout), self.order)?;
        filled(x.dtype(), x.shape().out(), self.order, |out| {
            if let Some(saved) = self.op.forward(x, out, self.tracked)? {
                // The graph runs an op once: nothing is there yet.
                let _ = self.saved.set(saved);
            }
            Ok(())
        })
    }

    fn bwd(&self, q: &Tensor, k: &Tensor, v: &Tensor, out: &Tensor, grad_out: &Tensor) -> Result<ThreeGrads> {
        let Some(saved) = self.saved.get() else {
            return Err(Error::BackwardNotSupported { op: self.name() });
        };
        // The gradient of a sum, say, is one number seen from everywhere.
        let grad_out =
            &if grad_out.stride().last() == Some(&1) { grad_out.clone() } else { grad_out.contiguous()? };
        let call = Backward { op: &self.op, order: self.order, saved, inputs: [q, k, v], out, grad_out };
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
    op: &'a dyn QkvOp,
    order: AxisOrder,
    saved: &'a Saved,
    inputs: [&'a Tensor; 3],
    out: &'a Tensor,
    grad_out: &'a Tensor,
}

impl Backward<'_> {
    fn run<E: Element + WithDType>(&self) -> Result<ThreeGrads> {
        let order = self.order;
        let [(q, q_at), (k, k_at), (v, v_at)] = self.inputs.map(Tensor::storage_and_layout);
        let (out, out_at) = self.out.storage_and_layout();
        let (grad_out, grad_out_at) = self.grad_out.storage_and_layout();
        let x = qkv((cpu("q", &q)?, q_at), (cpu("k", &k)?, k_at), (cpu("v", &v)?, v_at), order)?;
        let shape = x.shape();
        let shapes = [shape.q(), shape.k(), shape.v()];
        let [mut dq, mut dk, mut dv] = shapes.map(|s| vec![E::ZERO; s.iter().product()]);
        let grads = QkvGrads {
            q: ViewMut::new("grad_q", &mut dq, shapes[0], order.strides(shapes[0]))?.into(),
            k: ViewMut::new("grad_k", &mut dk, shapes[1], order.strides(shapes[1]))?.into(),
            v: ViewMut::new("grad_v", &mut dv, shapes[2], order.strides(shapes[2]))?.into(),
        };
        let out = view("out", (cpu("out", &out)?, out_at), order)?;
        let grad_out = view("grad_out", (cpu("grad_out", &grad_out)?, grad_out_at), order)?;
        self.op.backward(x, out, self.saved, grad_out, grads)?;
        let tensor = |data, shape| Tensor::from_vec(data, order.dims(shape), &Device::Cpu).map(Some);
        Ok((tensor(dq, shapes[0])?, tensor(dk, shapes[1])?, tensor(dv, shapes[2])?))
    }
}
