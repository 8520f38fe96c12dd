//! Gradients of packed sequences: one sequence after the other, each on its own part of the inputs.

use super::gradients::{Gradients, backward};
use super::inputs::{Inputs, Per};
use super::memory::Memory;
use super::run::{packed_sizes, prepare, sequences};
use super::variant::AnyVariant;
use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::{AttnError, Result, TensorView};

/// As [`backward`] for sequences whose lengths have the prefix sums `cu_seqlens`.
pub(super) fn backward_packed(
    variant: &dyn AnyVariant,
    x: &Inputs<'_>,
    cu_seqlens: Option<&[usize]>,
    memory: Option<&Memory>,
    d_out: TensorView<'_>,
    d_memory: Option<&[f32]>,
) -> Result<Gradients> {
    let Some(sums) = cu_seqlens else { return backward(variant, x, memory, d_out, d_memory) };
    let (sizes, plan) = prepare(variant, x)?;
    let cuts = sequences(Some(sums), sizes.tokens)?;
    let packed = packed_sizes(&sizes, Some(sums))?;
    if let Some(memory) = memory {
        memory.check(&plan, &packed)?;
    }
    if d_out.shape()[2] != sizes.tokens {
        return Err(AttnError::shape("grad_out", "length", d_out.shape()[2], sizes.tokens));
    }
    if sizes.keys != sizes.tokens * plan.keys_per_token {
        let expected = format!("{} (as many as queries) in packed sequences", sizes.tokens);
        return Err(AttnError::shape("k", "n_kv", sizes.keys, expected));
    }
    // Entry: all heads of one sequence of one batch entry.
    let (n, entry) = (cuts.len(), sizes.heads * plan.memory_len());
    let mut by_memory = vec![0.0; packed.batch * entry];
    if let Some(given) = d_memory {
        if given.len() != by_memory.len() {
            return Err(AttnError::shape("grad_memory", "numbers", given.len(), by_memory.len()));
        }
        by_memory.copy_from_slice(given);
    }
    let mut all = Sums(NamedTensors::default());
    for (at, cut) in cuts.into_iter().enumerate() {
        let per = plan.keys_per_token;
        let keys = cut.start * per..cut.end * per;
        let own = x.narrow(variant.extras(), cut.clone(), keys.clone());
        let before = memory.map(|memory| memory.of_sequence(at, n));
        let entries = (0..sizes.batch).map(|batch| (batch * n + at) * entry..(batch * n + at + 1) * entry);
        let d_after: Vec<f32> = entries.clone().flat_map(|range| by_memory[range].to_vec()).collect();
        let grads = backward(variant, &own, before.as_ref(), d_out.narrow(cut.clone()), Some(&d_after))?;
        for (range, grad) in entries.zip(grads.memory.chunks_exact(entry.max(1))) {
            by_memory[range].copy_from_slice(grad);
        }
        for (name, grad) in grads.inputs.0 {
            let per = variant.extras().iter().find(|extra| extra.name == name).map(|extra| extra.per);
            match (&*name, per) {
                (_, Some(Per::Head)) => all.add(name, grad)?,
                ("q", _) | (_, Some(Per::Token)) => all.put(name, grad, cut.start, sizes.tokens)?,
                _ => all.put(name, grad, keys.start, sizes.keys)?,
            }
        }
    }
    Ok(Gradients { inputs: all.0, memory: by_memory })
}

/// Gradients of all sequences on their way.
struct Sums(NamedTensors);

impl Sums {
    /// Adds to the gradient of an input that all sequences read.
    fn add(&mut self, name: String, grad: NamedTensor) -> Result<()> {
        let (_, from) = floats(&name, &grad)?;
        let mut sum = match self.0.f32(&name)? {
            Some((_, sum)) => sum.to_vec(),
            None => vec![0.0; from.len()],
        };
        sum.iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
        self.0.0.insert(name.clone(), NamedTensor::f32(&name, &grad.shape, sum)?);
        Ok(())
    }

    /// Puts the gradient of the rows from `start` on among those of `len`.
    fn put(&mut self, name: String, grad: NamedTensor, start: usize, len: usize) -> Result<()> {
        let ([batch, heads, rows, width], from) = floats(&name, &grad)?;
        let mut all = match self.0.f32(&name)? {
            Some((_, all)) => all.to_vec(),
            None => vec![0.0; batch * heads * len * width],
        };
        let heads_of =
            all.chunks_exact_mut((len * width).max(1)).zip(from.chunks_exact((rows * width).max(1)));
        heads_of.for_each(|(to, from)| to[start * width..][..from.len()].copy_from_slice(from));
        self.0.0.insert(name.clone(), NamedTensor::f32(&name, &[batch, heads, len, width], all)?);
        Ok(())
    }
}

/// Axes, with ones before them if they are fewer than four, and numbers.
fn floats<'a>(name: &str, tensor: &'a NamedTensor) -> Result<([usize; 4], &'a [f32])> {
    let mut axes = [1; 4];
    let first = 4usize.saturating_sub(tensor.shape.len());
    axes[first..].copy_from_slice(&tensor.shape);
    match &tensor.data {
        attn_core::registry::TensorData::F32(data) => Ok((axes, data)),
        _ => Err(AttnError::DType { tensor: name.into(), found: "another".into(), expected: "f32".into() }),
    }
}
