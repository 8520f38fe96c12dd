//! Gradients of a call on named tensors: `grad.NAME` for every input that has one.
//!
//! Differentiable are `q`, `k`, `v`, `sinks`, `key_bias`, `q_weight`, `k_weight`, `bias`, `relative_table` and `t5_table`;
//! slopes, masks and numbers in options are constants.

use super::biases::Biases;
use super::sequences::Layout;
use crate::FlashCall;
use crate::engine::{ForwardResult, Grads, OutputGrad, Problem};
use attn_core::mask::Mask;
use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::score::ScoreMod;
use attn_core::{AttnError, Result};

/// What the forward pass of a call was given and gave.
pub(super) struct Called<'a, M, C> {
    pub(super) call: &'a FlashCall<'a, M, C>,
    pub(super) layout: Layout,
    pub(super) problem: Problem<'a>,
    pub(super) tensors: &'a NamedTensors,
    pub(super) biases: &'a Biases<'a>,
    pub(super) out: &'a NamedTensor,
    pub(super) lse: &'a [f32],
}

impl<M: Mask, C: ScoreMod> Called<'_, M, C> {
    /// All gradients of a loss whose gradient with respect to the output is `grad_o`.
    ///
    /// # Errors
    /// [`AttnError::Unsupported`] for what has no gradient; those of the backward pass.
    pub(super) fn gradients(&self, grad_o: &NamedTensor) -> Result<NamedTensors> {
        if matches!(self.layout, Layout::Cached | Layout::Paged) {
            return Err(AttnError::unsupported(
                "flash",
                "gradients of keys and values in a cache or in pages",
            ));
        }
        let (mut sinks, mut key_bias) = (self.room("sinks")?, self.room("key_bias")?);
        let (mut gamma_q, mut gamma_k) = (self.room("q_weight")?, self.room("k_weight")?);
        let (mut q, mut k, mut v) = (self.like("q")?, self.like("k")?, self.like("v")?);
        let mut given = NamedTensors::default();
        let learned = self.biases.learned();
        // One bias a pass: two of them share all other gradients.
        for at in 0..learned.len().max(1) {
            let bias = learned.get(at);
            let mut bias_grad = bias.map(|(_, index)| vec![f32::NAN; index.len()]);
            let grads = Grads {
                sinks: sinks.as_deref_mut(),
                key_bias: key_bias.as_deref_mut(),
                gamma_q: gamma_q.as_deref_mut(),
                gamma_k: gamma_k.as_deref_mut(),
                bias: bias.zip(bias_grad.as_deref_mut()).map(|((_, index), grad)| (*index, grad)),
                ..Grads::new(
                    self.layout.view_mut("grad.q", &mut q)?,
                    self.layout.view_mut("grad.k", &mut k)?,
                    self.layout.view_mut("grad.v", &mut v)?,
                )
            };
            let forward = ForwardResult { out: self.layout.view("o", self.out)?, lse: self.lse };
            let grad = OutputGrad { out: self.layout.view("grad_o", grad_o)?, lse: None };
            self.call.backward(self.problem, forward, grad, grads)?;
            if let (Some((name, _)), Some(grad)) = (bias, bias_grad) {
                self.insert(&mut given, name, grad)?;
            }
        }
        let parameters =
            [("sinks", sinks), ("key_bias", key_bias), ("q_weight", gamma_q), ("k_weight", gamma_k)];
        for (name, grad) in parameters {
            if let Some(grad) = grad {
                self.insert(&mut given, name, grad)?;
            }
        }
        for (name, grad) in [("grad.q", q), ("grad.k", k), ("grad.v", v)] {
            given.0.insert(name.into(), grad);
        }
        Ok(given)
    }

    /// Room for the gradient of a tensor of parameters, if it was given.
    fn room(&self, name: &str) -> Result<Option<Vec<f32>>> {
        Ok(self.tensors.f32(name)?.map(|(_, numbers)| vec![f32::NAN; numbers.len()]))
    }

    /// Room for the gradient of q, k or v.
    fn like(&self, name: &str) -> Result<NamedTensor> {
        Ok(NamedTensor::unwritten(&self.tensors.require(name)?.shape, self.problem.q().dtype()))
    }

    fn insert(&self, given: &mut NamedTensors, name: &str, mut grad: Vec<f32>) -> Result<()> {
        let shape = &self.tensors.require(name)?.shape;
        grad.resize(shape.iter().product(), 0.0); // a table has no index where there is no sequence
        given.0.insert(format!("grad.{name}"), NamedTensor::f32(name, shape, grad)?);
        Ok(())
    }
}
