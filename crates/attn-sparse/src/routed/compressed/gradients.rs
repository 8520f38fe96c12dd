//! The backward pass: each part with the merged log-sum-exp, then through the entries.

use super::CompressedAttention;
use super::attend::Call;
use super::attention::given;
use super::inputs::{CompressedGrads, CompressedInputs, CompressedOutputs};
use attn_core::{AttnError, Result, View, ViewMut};
use attn_flash::engine::{AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_backward_any};

/// Gradients of one part, or of both: `k` and `v` of tokens, `entry_k` and `entry_v` of entries.
pub(super) struct PartGrads {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) entry_k: Vec<f32>,
    pub(super) entry_v: Vec<f32>,
}

impl Call<'_> {
    /// Gradients, given output and log-sum-exps with the sinks in them.
    pub(super) fn backward(&self, out: &[f32], lse: &[f32], grad_out: &[f32]) -> Result<PartGrads> {
        let s = self.shape;
        let part = |problem: Problem<'_>, spec: &AnySpec<'_>| -> Result<[Vec<f32>; 3]> {
            let shape = problem.shape();
            let [mut q, mut k, mut v] =
                [shape.q(), shape.k(), shape.v()].map(|a| vec![0.0; a.iter().product()]);
            let forward = ForwardResult { out: View::contiguous("out", out, s.out())?.into(), lse };
            let grad = OutputGrad { out: View::contiguous("grad_out", grad_out, s.out())?.into(), lse: None };
            let grads = Grads::new(
                ViewMut::contiguous("grad_q", &mut q, shape.q())?.into(),
                ViewMut::contiguous("grad_k", &mut k, shape.k())?.into(),
                ViewMut::contiguous("grad_v", &mut v, shape.v())?.into(),
            );
            attend_backward_any(problem, forward, grad, grads, spec)?;
            Ok([q, k, v])
        };
        let band = self.band()?;
        let [mut q, k, v] = part(self.raw_problem()?, &self.raw_spec(&band))?;
        let [more_q, entry_k, entry_v] = match self.entries.0.shape()[2] {
            0 => [Vec::new(), Vec::new(), Vec::new()],
            _ => part(self.entry_problem()?, &self.entry_spec(&*self.seen)?)?,
        };
        q.iter_mut().zip(&more_q).for_each(|(q, more)| *q += more);
        Ok(PartGrads { q, k, v, entry_k, entry_v })
    }
}

impl CompressedAttention {
    /// Gradients of a loss, given `grad_out [batch, n_heads_q, n, head_dim]`; `y` is what
    /// [`CompressedAttention::forward_with`] gave for `x`. The choice of entries has no gradient, hence the indexer has none.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    pub fn backward_with(
        &self,
        x: &CompressedInputs<'_>,
        y: &CompressedOutputs,
        grad_out: &[f32],
    ) -> Result<CompressedGrads> {
        x.check(self)?;
        let s = given::shape(x);
        if grad_out.len() != s.rows() * s.head_dim_v {
            return Err(AttnError::shape("grad_out", "elements", grad_out.len(), s.rows() * s.head_dim_v));
        }
        let slots = self.slots(x)?;
        let rows = given::Rows::new(x);
        let call = self.given_call(&s, &rows, &y.compressed, &y.chosen)?;
        let PartGrads { q, k, v, entry_k, entry_v } = match s.rows() {
            0 => PartGrads { q: vec![], k: vec![], v: vec![], entry_k: vec![], entry_v: vec![] },
            _ => call.backward(&y.out, &y.lse, grad_out)?,
        };
        let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<f32>>();
        let pooling = slots.backward(&y.compressed, &sum(&entry_k, &entry_v));
        let mut sinks = vec![0.0f64; x.sinks.map_or(0, <[f32]>::len)];
        if let Some(logits) = x.sinks {
            for (row, (grad, out)) in
                grad_out.chunks_exact(s.head_dim_v).zip(y.out.chunks_exact(s.head_dim_v)).enumerate()
            {
                let head = row / s.n_q % s.n_heads_q;
                let delta: f32 = grad.iter().zip(out).map(|(a, b)| a * b).sum();
                sinks[head] -= f64::from((logits[head] - y.lse[row]).exp() * delta);
            }
        }
        Ok(CompressedGrads {
            q,
            kv_raw: sum(&k, &v),
            compress_kv: pooling.kv,
            compress_gate: pooling.gate,
            position_bias: pooling.bias,
            sinks: sinks.into_iter().map(|x| x as f32).collect(),
        })
    }
}
