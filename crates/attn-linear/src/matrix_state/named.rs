//! A variant of the engine on named tensors.

use super::attention::StateAttention;
use super::head::blind;
use super::inputs::{Inputs, Sizes};
use super::memory::{Memory, Part};
use super::packed::backward_packed;
use super::run::{forward, packed_sizes, prepare};
use super::variant::{Plan, StateVariant};
use crate::named;
use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::{AttnError, DType, Result};

impl<V: StateVariant> StateAttention<V> {
    /// Runs on named tensors: q, k, v, the variant's extra inputs, the parts of its memory, and `cu_seqlens` of packed sequences.
    /// Gives `o` and the memory after the last token, unless queries stand before the first key. With `grad_o`, the gradient of a
    /// loss by `o`, it also gives what [`StateAttention::run_backward`] gives.
    ///
    /// # Errors
    /// [`AttnError`] naming the tensor that is missing, not read, or does not fit.
    pub fn run(&self, tensors: &NamedTensors) -> Result<NamedTensors> {
        let wide = named::widened(tensors, V::EXTRAS.iter().map(|extra| extra.name));
        let call = self.named_call(wide.as_ref().unwrap_or(tensors))?;
        let NamedCall { x, sizes, plan, packed, cu_seqlens, initial, has_memory } = call;
        let cu_seqlens = cu_seqlens.as_deref();
        let shape = [sizes.batch, sizes.heads, sizes.tokens, sizes.head_dim_v];
        let mut out = NamedTensor::unwritten(&shape, x.q.dtype());
        // Queries before every key know no memory.
        let mut all = if blind(&plan, sizes.tokens, sizes.keys) > 0 && !has_memory {
            forward(&self.variant, &x, cu_seqlens, out.as_out()?, None)?;
            NamedTensors::default()
        } else {
            let mut memory = initial;
            forward(&self.variant, &x, cu_seqlens, out.as_out()?, Some(&mut memory))?;
            memory.tensors(&packed)?
        };
        if tensors.get("grad_o").is_some() {
            all.0.extend(self.run_backward(tensors)?.0);
        }
        all.0.insert("o".into(), out);
        Ok(all)
    }

    /// The gradients alone: of the tensors of [`StateAttention::run`] with `grad_o` and, where the loss depends on the memory after
    /// the last token, `grad_NAME` of its parts, gives `grad.NAME` for every tensor it was given.
    ///
    /// # Errors
    /// As [`StateAttention::run`].
    pub fn run_backward(&self, tensors: &NamedTensors) -> Result<NamedTensors> {
        let wide = named::widened(tensors, V::EXTRAS.iter().map(|extra| extra.name));
        let call = self.named_call(wide.as_ref().unwrap_or(tensors))?;
        let NamedCall { x, plan, packed, cu_seqlens, initial, has_memory, .. } = call;
        let memory = has_memory.then_some(&initial);
        let grad_memory = Memory::gradient(&plan, &packed, tensors)?;
        let grad_o = tensors.require("grad_o")?.view("grad_o")?;
        let cu_seqlens = cu_seqlens.as_deref();
        let grads = backward_packed(
            &self.variant,
            &x,
            cu_seqlens,
            memory,
            grad_o,
            grad_memory.as_ref().map(Memory::numbers),
        )?;
        let of_memory = initial.initial_parts(&packed, &grads.memory)?;
        let mut all = NamedTensors::default();
        for (name, grad) in grads.inputs.0.into_iter().chain(of_memory.0) {
            let Some(given) = tensors.get(&name) else { continue };
            if given.shape.iter().product::<usize>() != grad.shape.iter().product::<usize>() {
                let what = format!("the gradient of `{name}` given for every token: it is one of the heads");
                return Err(AttnError::unsupported(V::NAME, what));
            }
            let grad = NamedTensor { shape: given.shape.clone(), ..grad };
            all.0.insert(format!("grad.{name}"), grad.rounded(given.data.dtype().unwrap_or(DType::F32)));
        }
        Ok(all)
    }

    /// What the parts of the memory are called before the first token and after the last, those that can be given and are told.
    ///
    /// # Errors
    /// As [`StateAttention::run`].
    pub fn state_parts(&self, tensors: &NamedTensors) -> Result<Vec<(&'static str, &'static str)>> {
        let plan = self.named_call(tensors)?.plan;
        let both = |part: &&Part| !part.initial.is_empty() && !part.after.is_empty();
        Ok(plan.parts.iter().filter(both).map(|part| (part.initial, part.after)).collect())
    }

    fn named_call<'a>(&self, tensors: &'a NamedTensors) -> Result<NamedCall<'a>> {
        let x = Inputs::of(tensors, V::EXTRAS)?;
        let (sizes, plan) = prepare(&self.variant, &x)?;
        let cu_seqlens = named::prefix_sums(tensors)?;
        let packed = packed_sizes(&sizes, cu_seqlens.as_deref())?;
        let parts: Vec<&str> =
            plan.parts.iter().map(|part| part.initial).filter(|name| !name.is_empty()).collect();
        let after: Vec<String> = plan.parts.iter().map(|part| format!("grad_{}", part.after)).collect();
        let extras = V::EXTRAS.iter().map(|extra| extra.name);
        let known = ["q", "k", "v", "cu_seqlens", "grad_o"].into_iter().chain(extras);
        let known: Vec<&str> =
            known.chain(parts.iter().copied()).chain(after.iter().map(String::as_str)).collect();
        tensors.only(V::NAME, &known)?;
        let initial = Memory::of(&plan, &packed, tensors)?;
        let has_memory = parts.iter().any(|name| tensors.get(name).is_some());
        Ok(NamedCall { x, sizes, plan, packed, cu_seqlens, initial, has_memory })
    }
}

/// A call on named tensors.
struct NamedCall<'a> {
    x: Inputs<'a>,
    sizes: Sizes,
    plan: Plan,
    /// The memory's.
    packed: Sizes,
    cu_seqlens: Option<Vec<usize>>,
    initial: Memory,
    has_memory: bool,
}
