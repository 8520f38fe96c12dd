//! A decision as calls of the softmax engine.

use crate::decider::{Arrangement, Decision};
use crate::prefill;
use crate::residues;
use attn_core::score::ScoreMod;
use attn_core::{AttnError, AttnShape, OutMut, Qkv, Result, TensorView};
use attn_flash::TileSizes;
use attn_flash::engine::{
    AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_any, attend_backward_any,
};

/// What is computed for the pairs of a decision.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) decision: &'a Decision,
    pub(crate) softmax_scale: f32,
    pub(crate) score_mod: &'a (dyn ScoreMod + 'a),
    /// `[n_heads_q]`.
    pub(crate) sinks: Option<&'a [f32]>,
}

impl Call<'_> {
    fn spec(&self, shape: &AttnShape) -> AnySpec<'_> {
        let tiles = match self.decision.arrangement() {
            Arrangement::Apart(block) => Some(TileSizes::auto(shape).rows_apart_by(*block)),
            _ => None,
        };
        let base = AnySpec::new(self.softmax_scale, self.decision.mask(), self.score_mod);
        AnySpec { tiles, sinks: self.sinks, ..base }
    }

    /// Writes `out`, and the log-sum-exps if they are asked for.
    pub(crate) fn forward(&self, x: Qkv<'_>, out: OutMut<'_>, lse: Option<&mut [f32]>) -> Result<()> {
        let shape = x.shape();
        match self.decision.arrangement() {
            Arrangement::ByResidue(residues) => {
                self.check(&x, &out, lse.as_deref())?;
                residues::forward(self, residues, x, out, lse)
            }
            Arrangement::ByLines(lines) if self.sinks.is_none() && self.score_mod.is_identity() => {
                self.check(&x, &out, lse.as_deref())?;
                prefill::attend_lines(lines, self.softmax_scale, x, out, lse)
            }
            _ => attend_any(Problem::batch(x), out, lse, &self.spec(&shape)),
        }
    }

    /// Writes the gradients of q, k, v, and those of `grads.sinks` and `grads.bias` that are asked for.
    pub(crate) fn backward(
        &self,
        x: Qkv<'_>,
        forward: ForwardResult<'_>,
        grad_out: TensorView<'_>,
        grads: Grads<'_>,
    ) -> Result<()> {
        match self.decision.arrangement() {
            Arrangement::ByResidue(residues) => {
                self.check_backward(&x, &forward, &grad_out)?;
                residues::backward(self, residues, x, forward, grad_out, grads)
            }
            _ => {
                let grad = OutputGrad { out: grad_out, lse: None };
                attend_backward_any(Problem::batch(x), forward, grad, grads, &self.spec(&x.shape()))
            }
        }
    }

    /// What the engine would check of the whole before it writes anything.
    fn check(&self, x: &Qkv<'_>, out: &OutMut<'_>, lse: Option<&[f32]>) -> Result<()> {
        let shape = x.shape();
        x.check_out(out)?;
        lse.map_or(Ok(()), |lse| attn_core::check_lse(lse, &shape))?;
        self.decision.mask().check(&shape)?;
        self.score_mod.check(&shape)
    }

    fn check_backward(
        &self,
        x: &Qkv<'_>,
        forward: &ForwardResult<'_>,
        grad_out: &TensorView<'_>,
    ) -> Result<()> {
        let shape = x.shape();
        for (name, found) in [("out", forward.out.shape()), ("grad_out", grad_out.shape())] {
            let axes = ["batch", "n_heads_q", "n_q", "head_dim_v"].into_iter().zip(found).zip(shape.out());
            if let Some(((axis, found), expected)) = axes.into_iter().find(|((_, found), want)| found != want)
            {
                return Err(AttnError::shape(name, axis, found, expected));
            }
        }
        attn_core::check_lse(forward.lse, &shape)?;
        self.decision.mask().check(&shape)?;
        self.score_mod.check(&shape)?;
        match self.score_mod.has_derivative() {
            true => Ok(()),
            false => Err(AttnError::unsupported("the backward pass", "a score mod without derivative")),
        }
    }
}
