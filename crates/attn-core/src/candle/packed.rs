//! Operations with any number of inputs and outputs, in candle's graph.
//!
//! A custom operation of candle takes at most three tensors and gives one. Here the inputs travel end to end in one
//! flat tensor, and so do the outputs; `cat`, `narrow` and `reshape` have gradients, so the graph sees through them.
//! Everything between is f32; conversions from and to other dtypes have gradients too.

use super::storage::{check_cpu, cpu};
use crate::{AttnError, Saved};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Error, Layout, Result, Shape, Tensor};
use std::sync::{Arc, OnceLock};

/// A contiguous tensor of any rank with the name that errors call it.
#[derive(Debug, Clone, Copy)]
pub struct NamedView<'a> {
    /// What errors call it.
    pub name: &'a str,
    /// Row-major elements.
    pub data: &'a [f32],
    /// Axes, outermost first.
    pub shape: &'a [usize],
}

/// An output: row-major elements and their axes.
#[derive(Debug, Clone)]
pub struct PackedTensor {
    /// Row-major elements.
    pub data: Vec<f32>,
    /// Axes, outermost first.
    pub shape: Vec<usize>,
}

/// An operation with a backward pass on any number of f32 tensors; [`apply_packed`] makes it a node of candle's graph.
pub trait PackedOp: Send + Sync + 'static {
    /// What errors call it.
    fn name(&self) -> &'static str;

    /// The outputs, and what [`PackedOp::backward`] needs besides inputs and outputs.
    ///
    /// # Errors
    /// [`AttnError`] naming the input that does not fit.
    fn forward(&self, inputs: &[NamedView<'_>]) -> crate::Result<(Vec<PackedTensor>, Saved)>;

    /// The gradient with respect to each input, in their order and row-major; `None` stands for zeros. `outputs` and
    /// `grad_outputs` come in the order of the forward pass; an output that the loss does not use has zeros.
    ///
    /// # Errors
    /// [`AttnError`] naming what does not fit.
    fn backward(
        &self,
        inputs: &[NamedView<'_>],
        outputs: &[NamedView<'_>],
        saved: &Saved,
        grad_outputs: &[NamedView<'_>],
    ) -> crate::Result<Vec<Option<Vec<f32>>>>;
}

/// Runs `op` on named CPU tensors of any float dtype and layout; the outputs are f32 and carry gradients.
///
/// # Errors
/// No inputs, a tensor off the CPU; those of [`PackedOp::forward`]; an output that does not fill its shape.
pub fn apply_packed(op: impl PackedOp, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>> {
    if inputs.is_empty() {
        candle_core::bail!("{}: there are no inputs, expected at least one", op.name());
    }
    let mut flat = Vec::with_capacity(inputs.len());
    for (name, tensor) in inputs {
        check_cpu(name, tensor.device().location())?;
        flat.push(tensor.to_dtype(DType::F32)?.flatten_all()?);
    }
    let tensors = inputs.iter().map(|(name, tensor)| (name.to_string(), tensor.dims().to_vec())).collect();
    let forward = Arc::new(OnceLock::new());
    let node = Node { op, inputs: Axes(tensors), forward: forward.clone() };
    let packed = Tensor::cat(&flat, 0)?.apply_op1(node)?;
    let Some(Forward { outputs, .. }) = forward.get() else {
        candle_core::bail!("the forward pass did not run");
    };
    let mut start = 0;
    let unpack = outputs.0.iter().map(|(_, shape)| {
        let len = shape.iter().product();
        start += len;
        packed.narrow(0, start - len, len)?.reshape(shape.as_slice())
    });
    unpack.collect()
}

/// Names and shapes of tensors that lie end to end.
struct Axes(Vec<(String, Vec<usize>)>);

impl Axes {
    fn views<'a>(&'a self, mut data: &'a [f32]) -> crate::Result<Vec<NamedView<'a>>> {
        let mut views = Vec::with_capacity(self.0.len());
        for (name, shape) in &self.0 {
            let len = shape.iter().product();
            let (tensor, rest) = data
                .split_at_checked(len)
                .ok_or_else(|| AttnError::shape(name.clone(), "elements", data.len(), len))?;
            views.push(NamedView { name, data: tensor, shape });
            data = rest;
        }
        Ok(views)
    }
}

/// What one forward pass leaves.
struct Forward {
    outputs: Axes,
    saved: Saved,
}

struct Node<P> {
    op: P,
    inputs: Axes,
    forward: Arc<OnceLock<Forward>>,
}

impl<P: PackedOp> CustomOp1 for Node<P> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (outputs, saved) = self.op.forward(&self.inputs.views(floats(storage, layout)?)?)?;
        let (mut flat, mut axes) = (Vec::new(), Vec::new());
        for (at, PackedTensor { data, shape }) in outputs.into_iter().enumerate() {
            let (name, expected) = (format!("output {at}"), shape.iter().product::<usize>());
            if data.len() != expected {
                return Err(AttnError::shape(name, "elements", data.len(), expected).into());
            }
            flat.extend_from_slice(&data);
            axes.push((name, shape));
        }
        let len = flat.len();
        // The graph runs a node once: nothing is there yet.
        let _ = self.forward.set(Forward { outputs: Axes(axes), saved });
        Ok((CpuStorage::F32(flat), Shape::from(len)))
    }

    fn bwd(&self, packed: &Tensor, out: &Tensor, grad_out: &Tensor) -> Result<Option<Tensor>> {
        let Some(Forward { outputs, saved }) = self.forward.get() else {
            return Err(Error::BackwardNotSupported { op: self.name() });
        };
        let grad_out = grad_out.contiguous()?;
        let [(x, x_at), (y, y_at), (dy, dy_at)] = [packed, out, &grad_out].map(Tensor::storage_and_layout);
        let inputs = self.inputs.views(floats(cpu("inputs", &x)?, x_at)?)?;
        let y = outputs.views(floats(cpu("outputs", &y)?, y_at)?)?;
        let dy = outputs.views(floats(cpu("grad_outputs", &dy)?, dy_at)?)?;
        let grads = self.op.backward(&inputs, &y, saved, &dy)?;
        if grads.len() != inputs.len() {
            return Err(AttnError::shape("gradients", "inputs", grads.len(), inputs.len()).into());
        }
        let mut flat = Vec::with_capacity(packed.elem_count());
        for (input, grad) in inputs.iter().zip(grads) {
            let (name, len) = (format!("gradient of {}", input.name), input.data.len());
            match grad {
                None => flat.resize(flat.len() + len, 0.0),
                Some(grad) if grad.len() == len => flat.extend(grad),
                Some(grad) => return Err(AttnError::shape(name, "elements", grad.len(), len).into()),
            }
        }
        let len = flat.len();
        Tensor::from_vec(flat, len, &Device::Cpu).map(Some)
    }
}

fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| AttnError::value("packed tensor", "strided", "contiguous elements"))?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}
