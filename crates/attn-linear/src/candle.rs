//! Every variant on candle tensors, with all of its inputs and gradients by all of them.
//!
//! A call is one node of candle's graph: inputs, gates and states travel through it together, in f32, and what comes out has the
//! dtype of the queries. States stay f32. The backward pass computes the memory again where it needs it and keeps nothing.

use crate::matrix_state::{StateAttention, StateVariant};
use crate::typed::InputsOf;
use attn_core::AttnError;
use attn_core::Saved;
use attn_core::candle::candle_core::{self, Result, Tensor};
use attn_core::candle::{NamedView, PackedOp, PackedTensor, apply_packed, refuse_gradients};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, TensorData};
use std::sync::{Arc, OnceLock};

/// What was remembered, as tensors: what one call gives, the next one takes.
#[derive(Debug, Clone, Default)]
pub struct TensorState {
    /// Names of parts when they are given, and their numbers, f32.
    parts: Vec<(String, Tensor)>,
}

impl TensorState {
    /// A state of these parts, by the names that the variant knows initial states by.
    pub fn new(parts: impl IntoIterator<Item = (impl Into<String>, Tensor)>) -> Self {
        Self { parts: parts.into_iter().map(|(name, tensor)| (name.into(), tensor)).collect() }
    }

    /// The parts.
    pub fn parts(&self) -> &[(String, Tensor)] {
        &self.parts
    }

    /// The part of this name, as an initial state: `initial_state`, `s0`, ...
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.parts.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|(_, tensor)| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }

    /// The same numbers without the graph that made them: gradients end here.
    #[must_use]
    pub fn detach(&self) -> Self {
        Self { parts: self.parts.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect() }
    }
}

/// A call on tensors, made by [`LinearAttention::on_tensors`](crate::LinearAttention::on_tensors) or [`on_tensors`].
#[derive(Clone)]
pub struct LinearTensors {
    variant: Arc<dyn Runs>,
    inputs: Vec<(String, Tensor)>,
    state: TensorState,
    cu_seqlens: Option<Vec<usize>>,
}

impl<V: StateVariant> StateAttention<V> {
    /// A call on candle tensors, with gradients by every input that tracks them. Rows of tokens are `[batch, heads, n, width]`, or
    /// without the last axis where a row is one number; what is one a head is `[heads]` or `[heads, width]`.
    ///
    /// ```
    /// use attn_core::candle::candle_core::{Device, Result, Tensor, Var};
    /// use attn_linear::typed::GatedDelta;
    /// use attn_linear::{LinearAttention, recurrent::GatedDeltaNet};
    ///
    /// # fn main() -> Result<()> {
    /// let rows = |width| Tensor::randn(0f32, 1.0, (1, 2, 10, width), &Device::Cpu);
    /// let (q, k, v) = (rows(8)?, rows(8)?, rows(4)?);
    /// let log_decay = Var::from_tensor(&Tensor::full(-0.1f32, (1, 2, 10), &Device::Cpu)?)?;
    /// let beta = Tensor::full(0.5f32, (1, 2, 10), &Device::Cpu)?;
    ///
    /// let attention = LinearAttention::<GatedDeltaNet>::configured([])?;
    /// let log_decays = log_decay.as_tensor().clone();
    /// let call = attention.on_tensors(GatedDelta { q, k, v, log_decay: log_decays, beta });
    /// let (out, state) = call.forward_with_state()?;
    /// assert_eq!(out.dims(), [1, 2, 10, 4]);
    /// assert_eq!(state.get("initial_state").unwrap().dims(), [1, 2, 8, 4]);
    /// let grads = out.sqr()?.sum_all()?.backward()?;
    /// assert_eq!(grads.get(&log_decay).unwrap().dims(), [1, 2, 10]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn on_tensors(&self, inputs: impl InputsOf<V, Tensor = Tensor>) -> LinearTensors {
        LinearTensors::new(Arc::new(Matrix(self.clone())), inputs.fields())
    }
}

/// A call of any variant of [`registry`](crate::registry) on candle tensors by name, as [`Entry::run`] knows them.
///
/// # Errors
/// An option that the variant does not have.
pub fn on_tensors<'n>(
    entry: Entry,
    options: &Options,
    inputs: impl IntoIterator<Item = (&'n str, Tensor)>,
) -> Result<LinearTensors> {
    entry.build(options)?;
    Ok(LinearTensors::new(Arc::new(Registered(entry, options.clone())), inputs))
}

impl LinearTensors {
    fn new<'n>(variant: Arc<dyn Runs>, inputs: impl IntoIterator<Item = (&'n str, Tensor)>) -> Self {
        let inputs = inputs.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect();
        Self { variant, inputs, state: TensorState::default(), cu_seqlens: None }
    }

    /// From what was remembered; its gradients are those of any other input.
    #[must_use]
    pub fn initial_state(self, state: &TensorState) -> Self {
        Self { state: state.clone(), ..self }
    }

    /// Sequences packed one behind the other: prefix sums of their lengths, from 0 to all tokens. Each is a run of its own, with a
    /// batch entry of its own in states.
    #[must_use]
    pub fn cu_seqlens(self, sums: &[usize]) -> Self {
        Self { cu_seqlens: Some(sums.to_vec()), ..self }
    }

    /// The outputs `[batch, heads, n, head_dim_v]`, in the dtype of the first input.
    ///
    /// # Errors
    /// A tensor off the CPU, or one that the variant does not know or that does not fit; the error names it.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.forward_with_state()?.0)
    }

    /// The outputs, and what is remembered after the last token. Gradients by the latter reach the inputs for variants of the
    /// matrix-state engine; for the others they are refused.
    ///
    /// # Errors
    /// As [`LinearTensors::forward`].
    pub fn forward_with_state(&self) -> Result<(Tensor, TensorState)> {
        let all: Vec<(&str, &Tensor)> = self
            .inputs
            .iter()
            .chain(&self.state.parts)
            .map(|(name, tensor)| (name.as_str(), tensor))
            .collect();
        let Some((_, first)) = all.first() else {
            candle_core::bail!("{}: there are no inputs", self.variant.name());
        };
        let tracked = all.iter().filter(|(_, tensor)| tensor.track_op()).map(|(name, _)| name.to_string());
        let told = Arc::new(OnceLock::new());
        let op = Op {
            variant: self.variant.clone(),
            cu_seqlens: self.cu_seqlens.clone(),
            tracked: tracked.collect(),
            told: told.clone(),
        };
        let mut outputs = apply_packed(op, &all)?.into_iter();
        let (Some(out), Some(told)) = (outputs.next(), told.get()) else {
            candle_core::bail!("{}: there is no output", self.variant.name());
        };
        let inputs: Vec<&Tensor> = all.iter().map(|(_, tensor)| *tensor).collect();
        let mut parts = Vec::with_capacity(told.len());
        for (part, tensor) in told.iter().zip(outputs) {
            let tensor = if self.variant.differentiates_states() {
                tensor
            } else {
                refuse_gradients("a last state", tensor.detach(), &inputs)?
            };
            parts.push((part.initial.clone(), tensor));
        }
        Ok((out.to_dtype(first.dtype())?, TensorState { parts }))
    }
}

/// A part of what is remembered: what it is called before the first token, and after the last.
#[derive(Debug)]
struct StatePart {
    initial: String,
    after: String,
}

/// A variant on named tensors.
trait Runs: Send + Sync {
    fn name(&self) -> &'static str;

    /// `o` and what is remembered.
    fn run(&self, tensors: &NamedTensors) -> attn_core::Result<NamedTensors>;

    /// `grad.NAME` of the inputs, given `grad_o` and, if it [can](Runs::differentiates_states), `grad_NAME` of what is remembered.
    fn run_backward(&self, tensors: &NamedTensors) -> attn_core::Result<NamedTensors>;

    fn differentiates_states(&self) -> bool;

    /// The parts among the outputs that can be given back.
    fn parts(&self, tensors: &NamedTensors, outputs: &NamedTensors) -> attn_core::Result<Vec<StatePart>>;
}

/// A variant of the matrix-state engine.
struct Matrix<V>(StateAttention<V>);

impl<V: StateVariant> Runs for Matrix<V> {
    fn name(&self) -> &'static str {
        V::NAME
    }

    fn run(&self, tensors: &NamedTensors) -> attn_core::Result<NamedTensors> {
        self.0.run(tensors)
    }

    fn run_backward(&self, tensors: &NamedTensors) -> attn_core::Result<NamedTensors> {
        self.0.run_backward(tensors)
    }

    fn differentiates_states(&self) -> bool {
        true
    }

    fn parts(&self, tensors: &NamedTensors, outputs: &NamedTensors) -> attn_core::Result<Vec<StatePart>> {
        let parts = self.0.state_parts(tensors)?.into_iter();
        let told = parts.filter(|(_, after)| outputs.get(after).is_some());
        Ok(told.map(|(initial, after)| StatePart { initial: initial.into(), after: after.into() }).collect())
    }
}

/// A variant by name.
struct Registered(Entry, Options);

impl Runs for Registered {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn run(&self, tensors: &NamedTensors) -> attn_core::Result<NamedTensors> {
        self.0.run(&self.1, tensors)
    }

    fn run_backward(&self, tensors: &NamedTensors) -> attn_core::Result<NamedTensors> {
        self.0.run(&self.1, tensors)
    }

    fn differentiates_states(&self) -> bool {
        false
    }

    /// `sT` is what `s0` becomes; `initial_state` is the engine's own name for it.
    fn parts(&self, tensors: &NamedTensors, outputs: &NamedTensors) -> attn_core::Result<Vec<StatePart>> {
        let engine = tensors.get("initial_state").is_some();
        let told = outputs.0.keys().filter_map(|name| Some((name, name.strip_suffix('T')?)));
        let initial = |stem: &str| match stem {
            "s" if engine => "initial_state".into(),
            stem => format!("{stem}0"),
        };
        Ok(told.map(|(after, stem)| StatePart { initial: initial(stem), after: after.clone() }).collect())
    }
}

struct Op {
    variant: Arc<dyn Runs>,
    cu_seqlens: Option<Vec<usize>>,
    /// Inputs that track gradients.
    tracked: Vec<String>,
    /// The outputs behind `o`.
    told: Arc<OnceLock<Vec<StatePart>>>,
}

impl Op {
    fn tensors(&self, inputs: &[NamedView<'_>]) -> attn_core::Result<NamedTensors> {
        let mut all = NamedTensors::default();
        for NamedView { name, data, shape } in inputs {
            all.0.insert(name.to_string(), NamedTensor::f32(name, shape, data.to_vec())?);
        }
        if let Some(sums) = &self.cu_seqlens {
            let index = |sum: &usize| {
                i32::try_from(*sum).map_err(|_| AttnError::value("cu_seqlens", sum, "at most 2^31 - 1"))
            };
            let data = TensorData::I32(sums.iter().map(index).collect::<attn_core::Result<_>>()?);
            all.0.insert("cu_seqlens".into(), NamedTensor { shape: vec![sums.len()], data });
        }
        Ok(all)
    }
}

impl PackedOp for Op {
    fn name(&self) -> &'static str {
        self.variant.name()
    }

    fn forward(&self, inputs: &[NamedView<'_>]) -> attn_core::Result<(Vec<PackedTensor>, Saved)> {
        let tensors = self.tensors(inputs)?;
        let outputs = self.variant.run(&tensors)?;
        let parts = self.variant.parts(&tensors, &outputs)?;
        let names = std::iter::once("o").chain(parts.iter().map(|part| part.after.as_str()));
        let packed = names.map(|name| {
            outputs.require(name)?;
            let (shape, data) = outputs.f32(name)?.unwrap_or_default();
            Ok(PackedTensor { data: data.to_vec(), shape: shape.to_vec() })
        });
        let packed = packed.collect::<attn_core::Result<_>>()?;
        // The graph runs an op once: nothing is there yet.
        let _ = self.told.set(parts);
        Ok((packed, Saved::new(())))
    }

    fn backward(
        &self,
        inputs: &[NamedView<'_>],
        _: &[NamedView<'_>],
        _: &Saved,
        grad_outputs: &[NamedView<'_>],
    ) -> attn_core::Result<Vec<Option<Vec<f32>>>> {
        let mut tensors = self.tensors(inputs)?;
        let parts = self.told.get().map_or(&[][..], Vec::as_slice);
        for (at, NamedView { data, shape, .. }) in grad_outputs.iter().enumerate() {
            let name = match at {
                0 => "grad_o".to_string(),
                // A loss that does not look at what is remembered says zero.
                _ if !self.variant.differentiates_states() || data.iter().all(|x| *x == 0.0) => continue,
                _ => format!("grad_{}", parts[at - 1].after),
            };
            let grad = NamedTensor::f32(&name, shape, data.to_vec())?;
            tensors.0.insert(name, grad);
        }
        let mut grads = self.variant.run_backward(&tensors)?;
        let mut all = Vec::with_capacity(inputs.len());
        for NamedView { name, .. } in inputs {
            all.push(match grads.0.remove(&format!("grad.{name}")).map(|grad| grad.data) {
                Some(TensorData::F32(grad)) => Some(grad),
                _ if self.tracked.iter().any(|tracked| tracked == name) => {
                    return Err(AttnError::unsupported(
                        self.variant.name(),
                        format!("gradients by `{name}`"),
                    ));
                }
                _ => None,
            });
        }
        Ok(all)
    }
}
