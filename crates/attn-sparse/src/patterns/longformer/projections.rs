//! Global rows with projections of their own.

use super::Longformer;
use crate::parts::{backward, forward};
use crate::store::store;
use attn_core::{
    AttnShape, OutMut, Qkv, QkvGrads, Result, TensorView, check_like, check_lse, softmax_scale_or_default,
};

/// Queries, keys and values of local rows, and those that global rows use: all of one shape and dtype.
///
/// ```
/// use attn_core::{Qkv, View, ViewMut};
/// use attn_sparse::{GlobalProjections, GlobalTokens, Longformer};
///
/// let x: Vec<f32> = (0..8 * 4).map(|i| (i as f32).sin()).collect();
/// let zeros = vec![0.0; x.len()];
/// let qkv = |x| {
///     let view = |name| View::contiguous(name, x, [1, 1, 8, 4]);
///     Qkv::new(view("q")?, view("k")?, view("v")?)
/// };
/// let inputs = GlobalProjections { local: qkv(&x)?, global: qkv(&zeros)? };
/// let longformer = Longformer { window: 1, globals: GlobalTokens::shared([0]), causal: false };
/// let mut out = vec![1.0; x.len()];
/// longformer.forward_projected(inputs, None, ViewMut::contiguous("out", &mut out, [1, 1, 8, 4])?.into())?;
/// assert_eq!(out[..4], [0.0; 4], "the global row takes values of its own projection");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct GlobalProjections<'a> {
    /// `q`, `k`, `v`.
    pub local: Qkv<'a>,
    /// `q_global`, `k_global`, `v_global`.
    pub global: Qkv<'a>,
}

impl GlobalProjections<'_> {
    fn shape(&self) -> Result<AttnShape> {
        let (local, global) = (self.local, self.global);
        let pairs = [
            ("q_global", global.q(), local.q()),
            ("k_global", global.k(), local.k()),
            ("v_global", global.v(), local.v()),
        ];
        for (name, global, local) in pairs {
            check_like(name, global.shape(), global.dtype(), local, local.shape()[3])?;
        }
        Ok(local.shape())
    }
}

/// Gradients of both sets of inputs, each of its input's shape and dtype.
#[derive(Debug)]
pub struct ProjectedGrads<'a> {
    /// Of `q`, `k`, `v`.
    pub local: QkvGrads<'a>,
    /// Of `q_global`, `k_global`, `v_global`.
    pub global: QkvGrads<'a>,
}

impl Longformer {
    /// Attends and gives the log-sum-exps, `[batch, n_heads_q, n_q]`. `softmax_scale` multiplies raw dot products; `None` is
    /// `1/sqrt(head_dim)`.
    ///
    /// Shapes: as [`attn_core::Attention::forward`] for both sets of inputs. Cost and memory: as without projections.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward_projected(
        &self,
        inputs: GlobalProjections<'_>,
        softmax_scale: Option<f32>,
        out: OutMut<'_>,
    ) -> Result<Vec<f32>> {
        let shape = inputs.shape()?;
        self.globals.check(&shape)?;
        inputs.local.check_out(&out)?;
        let scale = softmax_scale_or_default(softmax_scale, shape.head_dim)?;
        let merged = forward(&[inputs.local, inputs.global], &self.two_parts(&shape, 1), scale)?;
        store(out, &merged.out)?;
        Ok(merged.lse)
    }

    /// Writes the gradients of a loss, given its gradient with respect to the output; `out` and `lse` are those of
    /// [`Longformer::forward_projected`].
    ///
    /// # Errors
    /// As [`Longformer::forward_projected`].
    pub fn backward_projected(
        &self,
        inputs: GlobalProjections<'_>,
        softmax_scale: Option<f32>,
        (out, lse): (TensorView<'_>, &[f32]),
        grad_out: TensorView<'_>,
        grads: ProjectedGrads<'_>,
    ) -> Result<()> {
        let shape = inputs.shape()?;
        self.globals.check(&shape)?;
        grads.local.check(&inputs.local)?;
        grads.global.check(&inputs.global)?;
        check_lse(lse, &shape)?;
        for (name, view) in [("out", out), ("grad_out", grad_out)] {
            check_like(name, view.shape(), inputs.local.dtype(), inputs.local.q(), shape.head_dim_v)?;
        }
        let scale = softmax_scale_or_default(softmax_scale, shape.head_dim)?;
        let sources = [inputs.local, inputs.global];
        let [local, global] = backward(&sources, &self.two_parts(&shape, 1), scale, (out, lse), grad_out)?;
        for (sums, grads) in [(local, grads.local), (global, grads.global)] {
            store(grads.q, &sums.q)?;
            store(grads.k, &sums.k)?;
            store(grads.v, &sums.v)?;
        }
        Ok(())
    }
}
