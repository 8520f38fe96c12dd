//! A variant of the engine as an [`Attention`], and on typed inputs.

use super::columns;
use super::definition::definition;
use super::gradients::{Gradients, backward, backward_into};
use super::head::chunk_len;
use super::inputs::{Inputs, Sizes};
use super::memory::Memory;
use super::packed::backward_packed;
use super::run::{Workspace, forward, packed_sizes, prepare};
use super::variant::StateVariant;
use crate::recomputed::store;
use attn_core::exact::Reference;
use attn_core::registry::NamedTensors;
use attn_core::{
    Attention, AttnError, AttnShape, Causality, Cost, DType, Differentiable, Family, Growth, OutMut, Profile,
    Qkv, QkvGrads, Result, Saved, StreamShape, StreamState, Streaming, Target, TensorView, check_like,
};

/// A [`StateVariant`], ready to call.
///
/// Its [`Attention::forward`] takes q, k and v alone, and the constants of its configuration for all that is not given;
/// [`StateAttention::forward_inputs`] takes everything. Time is linear in the length, memory beyond inputs and output constant.
///
/// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`, `v [batch, n_heads_kv, n_kv,
/// head_dim_v]`, out `[batch, n_heads_q, n_q, head_dim_v]`; f32, bf16 or f16, any strides with a contiguous last axis, f32
/// memory. Most variants are causal and need as many keys as queries. Where there may be more or fewer, the last query
/// stands at the last key: the first keys are past for every query, the first queries stand before every key and give 0.
///
/// ```
/// use attn_core::{Attention, Qkv, View, ViewMut};
/// use attn_linear::{LinearAttention, LinearElu};
///
/// let (heads, n, d) = (2, 5, 8);
/// let x: Vec<f32> = (0..heads * n * d).map(|i| (i as f32).sin()).collect();
/// let view = |name| View::contiguous(name, &x, [1, heads, n, d]);
/// let mut out = vec![0.0; x.len()];
/// let qkv = Qkv::new(view("q")?, view("k")?, view("v")?)?;
/// let attention = LinearAttention::new(LinearElu { causal: true, ..LinearElu::default() });
/// attention.forward(qkv, ViewMut::contiguous("out", &mut out, [1, heads, n, d])?.into())?;
/// assert!((out[1] - x[1]).abs() < 1e-6, "the first row sees only itself");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct StateAttention<V> {
    /// What is computed.
    pub variant: V,
}

impl<V: StateVariant> StateAttention<V> {
    /// The variant, ready to call.
    pub fn new(variant: V) -> Self {
        Self { variant }
    }

    /// Computes `out [batch, heads, tokens, head_dim_v]`. With a `memory`, it is that before the first token, and
    /// afterwards that after the last.
    ///
    /// # Errors
    /// [`AttnError`] naming the input that does not fit; nothing has then been written.
    pub fn forward_inputs(&self, x: &Inputs<'_>, out: OutMut<'_>, memory: Option<&mut Memory>) -> Result<()> {
        forward(&self.variant, x, None, out, memory)
    }

    /// [`StateAttention::forward_inputs`] of sequences packed one behind the other: `cu_seqlens` are the prefix sums of their
    /// lengths in tokens, from 0 to all of them. Each is a run of its own; nothing crosses a boundary. The memory has a batch
    /// entry for each sequence of each batch entry.
    ///
    /// # Errors
    /// As [`StateAttention::forward_inputs`]; [`AttnError::Value`] for sums that do not rise from 0 to the tokens.
    pub fn forward_packed(
        &self,
        x: &Inputs<'_>,
        cu_seqlens: &[usize],
        out: OutMut<'_>,
        memory: Option<&mut Memory>,
    ) -> Result<()> {
        forward(&self.variant, x, Some(cu_seqlens), out, memory)
    }

    /// A memory of nothing for packed sequences.
    ///
    /// # Errors
    /// As [`StateAttention::forward_packed`].
    pub fn packed_memory(&self, x: &Inputs<'_>, cu_seqlens: &[usize]) -> Result<Memory> {
        let (sizes, plan) = prepare(&self.variant, x)?;
        Ok(Memory::new(&plan, &packed_sizes(&sizes, Some(cu_seqlens))?))
    }

    /// The gradients of a loss with respect to all inputs and the memory before the first token, given that of the
    /// output and, where the loss depends on it, that of the memory after the last token, `[batch, heads, memory]`.
    ///
    /// # Errors
    /// As [`StateAttention::forward_inputs`]; [`AttnError::Unsupported`] for a variant without gradients.
    pub fn backward_inputs(
        &self,
        x: &Inputs<'_>,
        memory: Option<&Memory>,
        grad_out: TensorView<'_>,
        grad_memory: Option<&[f32]>,
    ) -> Result<Gradients> {
        backward(&self.variant, x, memory, grad_out, grad_memory)
    }

    /// [`StateAttention::backward_inputs`] of [packed](StateAttention::forward_packed) sequences.
    ///
    /// # Errors
    /// As [`StateAttention::backward_inputs`]; [`AttnError::Value`] for sums that do not rise from 0 to the tokens.
    pub fn backward_packed(
        &self,
        x: &Inputs<'_>,
        cu_seqlens: &[usize],
        memory: Option<&Memory>,
        grad_out: TensorView<'_>,
        grad_memory: Option<&[f32]>,
    ) -> Result<Gradients> {
        backward_packed(&self.variant, x, Some(cu_seqlens), memory, grad_out, grad_memory)
    }

    /// The definition on typed inputs: the recurrence in f64.
    ///
    /// # Errors
    /// As [`StateAttention::forward_inputs`].
    pub fn definition_inputs(&self, x: &Inputs<'_>, memory: Option<&Memory>) -> Result<Reference> {
        definition(&self.variant, x, memory)
    }

    /// A memory of nothing for a call with `x`.
    ///
    /// # Errors
    /// As [`StateAttention::forward_inputs`].
    pub fn memory(&self, x: &Inputs<'_>) -> Result<Memory> {
        let (sizes, plan) = prepare(&self.variant, x)?;
        Ok(Memory::new(&plan, &sizes))
    }

    /// The memory before the first token, from tensors called as its parts are; of nothing where none is given.
    ///
    /// # Errors
    /// As [`StateAttention::forward_inputs`]; [`AttnError`] naming a part that is missing or has another shape.
    pub fn memory_of(&self, x: &Inputs<'_>, tensors: &NamedTensors) -> Result<Memory> {
        let (sizes, plan) = prepare(&self.variant, x)?;
        Memory::of(&plan, &sizes, tensors)
    }
}

/// The sizes of a plain call.
fn plain(shape: &AttnShape, cross: bool) -> Sizes {
    let sizes = Sizes::new(shape.batch, shape.n_heads_q, shape.n_q, shape.head_dim, shape.head_dim_v);
    Sizes { keys: if cross { shape.n_kv } else { shape.n_q }, ..sizes }
}

/// q, k and v of a plain call.
fn inputs<V: StateVariant>(x: Qkv<'_>) -> Result<Inputs<'_>> {
    let s = x.shape();
    if !V::CROSS && s.n_q != s.n_kv {
        return Err(AttnError::shape("k", "n_kv", s.n_kv, format!("{} (as in q)", s.n_q)));
    }
    Ok(x.into())
}

impl<V: StateVariant> Attention for StateAttention<V> {
    fn name(&self) -> &'static str {
        V::NAME
    }

    fn profile(&self) -> Profile {
        let causal = self.variant.is_causal();
        Profile {
            family: Family::Linear,
            target: Target::Own,
            causality: if causal { Causality::Strict } else { Causality::Bidirectional },
            convex: self.variant.is_convex(),
            key_order_free: !causal,
            cross_lengths: V::CROSS,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: self.variant.max_error(),
            time: Growth::Linear,
            memory: Growth::Constant,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let sizes = plain(shape, V::CROSS);
        let Ok(plan) = self.variant.plan(&sizes) else { return Cost::default() };
        let heads = (shape.batch * shape.n_heads_q) as u64;
        let flops = plan.flops(&sizes);
        let threads = rayon::current_num_threads();
        let (o, chunks) = (&plan.stages[0], shape.n_q / chunk_len(&plan, &sizes));
        let left = columns::left_over(o, heads as usize, chunks, threads).filter(|_| columns::fit(&plan));
        let (threads, window) = match left {
            Some(left) => (threads as u64, left.bytes(o, threads)),
            None => (heads.min(threads as u64), 0),
        };
        let allocated =
            threads * Workspace::bytes(&plan, &sizes, dtype) + 4 * heads * plan.memory_len() as u64 + window;
        Cost::of(shape, dtype, heads * flops, allocated)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        forward(&self.variant, &inputs::<V>(x)?, None, out, None)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        definition(&self.variant, &inputs::<V>(*x)?, None)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        if self.variant.is_causal() { Some(self) } else { None }
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        if V::DIFFERENTIABLE { Some(self) } else { None }
    }
}

impl<V: StateVariant> Differentiable for StateAttention<V> {
    /// Saves nothing: the backward pass computes the states again.
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        self.forward(x, out)?;
        Ok(Saved::new(()))
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        let width = x.shape().head_dim_v;
        check_like("out", out.shape(), out.dtype(), x.q(), width)?;
        check_like("grad_out", grad_out.shape(), grad_out.dtype(), x.q(), width)?;
        grads.check(&x)?;
        saved.get::<()>()?;
        let (mut to, mut rest) = ([None, None, None], Vec::new());
        let grads = [("q", grads.q), ("k", grads.k), ("v", grads.v)];
        for ((name, out), to) in grads.into_iter().zip(&mut to) {
            match out {
                OutMut::F32(out) => match out.into_slice() {
                    Ok(out) => *to = Some(out),
                    Err(out) => rest.push((name, OutMut::F32(out))),
                },
                out => rest.push((name, out)),
            }
        }
        let all = backward_into(&self.variant, &inputs::<V>(x)?, None, grad_out, None, to)?.inputs;
        for (name, out) in rest {
            let (_, data) = all.f32(name)?.unwrap_or((&[], &[]));
            store(out, data);
        }
        Ok(())
    }
}

impl<V: StateVariant> Streaming for StateAttention<V> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        if !self.variant.is_causal() {
            return Err(AttnError::unsupported(V::NAME, "streaming without `causal`"));
        }
        let divides = shape.n_heads_kv > 0 && shape.n_heads_q.is_multiple_of(shape.n_heads_kv);
        if !divides {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        let sizes = Sizes::new(shape.batch, shape.n_heads_q, 1, shape.head_dim, shape.head_dim_v);
        let plan = self.variant.plan(&sizes)?;
        plan.stages.iter().try_for_each(super::Options::check)?;
        let memory = Memory::new(&plan, &sizes);
        Ok(Box::new(Stream { variant: self.variant.clone(), shape, memory, len: 0 }))
    }
}

/// A sequence fed piece by piece: the memory is all there is to remember.
struct Stream<V> {
    variant: V,
    shape: StreamShape,
    memory: Memory,
    len: usize,
}

impl<V: StateVariant> StreamState for Stream<V> {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        forward(&self.variant, &inputs::<V>(x)?, None, out, Some(&mut self.memory))?;
        self.len += x.shape().n_q;
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}
