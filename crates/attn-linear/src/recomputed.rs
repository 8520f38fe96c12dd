//! Attention whose backward pass starts from the inputs alone: it computes again what it needs, and nothing is saved.

use attn_core::{Attention, Element, OutMut, Qkv, Result, TensorView, ViewMut};

/// See the module; [`differentiable`] makes it an [`attn_core::Differentiable`].
pub(crate) trait Recomputed: Attention {
    /// By `q`, `k` and `v`, row-major and of their shapes.
    fn qkv_gradients(&self, x: Qkv<'_>, grad_out: TensorView<'_>) -> Result<[Vec<f32>; 3]>;
}

/// `differentiable!(impl for Type)` or `differentiable!(impl <V: Bound> for Type<V>)`: from the type's [`Recomputed`].
macro_rules! differentiable {
    (impl $(<$v:ident: $bound:ident>)? for $attention:ty) => {
        impl$(<$v: $bound>)? attn_core::Differentiable for $attention {
            fn forward_saving(
                &self,
                x: attn_core::Qkv<'_>,
                out: attn_core::OutMut<'_>,
            ) -> attn_core::Result<attn_core::Saved> {
                attn_core::Attention::forward(self, x, out)?;
                Ok(attn_core::Saved::new(()))
            }

            fn backward(
                &self,
                x: attn_core::Qkv<'_>,
                _: attn_core::TensorView<'_>,
                _: &attn_core::Saved,
                grad_out: attn_core::TensorView<'_>,
                grads: attn_core::QkvGrads<'_>,
            ) -> attn_core::Result<()> {
                grads.check(&x)?;
                let all = $crate::recomputed::Recomputed::qkv_gradients(self, x, grad_out)?;
                for (out, grad) in [grads.q, grads.k, grads.v].into_iter().zip(&all) {
                    $crate::recomputed::store(out, grad);
                }
                Ok(())
            }
        }
    };
}
pub(crate) use differentiable;

/// Rounds `data [batch, heads, length, width]` into `out`.
pub(crate) fn store(out: OutMut<'_>, data: &[f32]) {
    fn typed<E: Element>(out: ViewMut<'_, E>, data: &[f32]) {
        let mut rows = data.chunks_exact(out.shape()[3].max(1));
        for mut block in out.into_blocks(usize::MAX) {
            for i in 0..block.out.len() {
                let row = rows.next().unwrap_or_default();
                block.out.row_mut(i).iter_mut().zip(row).for_each(|(o, x)| *o = E::store(*x));
            }
        }
    }
    match out {
        OutMut::F32(out) => typed(out, data),
        OutMut::Bf16(out) => typed(out, data),
        OutMut::F16(out) => typed(out, data),
    }
}
