//! Packed sequences on named tensors, for variants without a state to keep: each sequence is run on its own.

use crate::matrix_state::sequences;
use crate::named;
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, TensorData};
use attn_core::{AttnError, Result};
use std::ops::Range;

/// What [`Entry::runner`] is.
type Runner = fn(&Entry, &Options, &NamedTensors) -> Result<NamedTensors>;

/// Tensors that have a row for every token.
const ROWS: [&str; 4] = ["q", "k", "v", "grad_o"];

/// Runs `runner`, with `cu_seqlens` on each of the sequences of `q`, `k` and `v`: outputs and gradients come packed as the inputs
/// are, gradients of other tensors are summed.
pub(crate) fn run(
    runner: Runner,
    (entry, options, tensors): (&Entry, &Options, &NamedTensors),
) -> Result<NamedTensors> {
    let Some(sums) = named::prefix_sums(tensors)? else { return runner(entry, options, tensors) };
    let rows = ROWS.into_iter().filter(|name| tensors.get(name).is_some());
    let lengths = rows.map(|name| Ok((name, length(name, tensors.require(name)?)?)));
    let lengths: Vec<(&str, usize)> = lengths.collect::<Result<_>>()?;
    let n = lengths.first().map_or(0, |(_, n)| *n);
    if let Some((name, found)) = lengths.iter().find(|(_, found)| *found != n) {
        return Err(AttnError::shape(*name, "length", *found, format!("{n} (as in {})", lengths[0].0)));
    }
    let cuts = sequences(Some(&sums), n)?;
    let mut all = NamedTensors::default();
    // Without sequences there is still an output of no rows.
    let cuts = if cuts.is_empty() { std::iter::once(0..0).collect() } else { cuts };
    for cut in &cuts {
        let mut own = tensors.clone();
        own.0.remove("cu_seqlens");
        for (name, _) in &lengths {
            if let Some(tensor) = own.0.get_mut(*name) {
                *tensor = sliced(tensor, cut);
            }
        }
        for (name, tensor) in runner(entry, options, &own)?.0 {
            let of_rows = name == "o" || ROWS.iter().any(|row| name.strip_prefix("grad.") == Some(row));
            match all.0.get_mut(&name) {
                None => {
                    all.0.insert(name, tensor);
                }
                Some(before) if of_rows => *before = joined(before, &tensor),
                Some(before) => add(before, &tensor),
            }
        }
    }
    Ok(all)
}

fn length(name: &str, tensor: &NamedTensor) -> Result<usize> {
    match tensor.shape[..] {
        [.., n, _] if tensor.shape.len() > 2 => Ok(n),
        _ => {
            let found = format!("{:?}", tensor.shape);
            Err(AttnError::value(format!("{name}'s shape"), found, "(batch, length, width) or with heads"))
        }
    }
}

/// Rows of each matrix `[length, width]`.
fn sliced(tensor: &NamedTensor, cut: &Range<usize>) -> NamedTensor {
    fn rows<E: Copy>(data: &[E], [n, width]: [usize; 2], cut: &Range<usize>) -> Vec<E> {
        let heads = data.chunks_exact((n * width).max(1));
        heads.flat_map(|head| &head[cut.start * width..cut.end * width]).copied().collect()
    }
    let mut shape = tensor.shape.clone();
    let at = shape.len() - 2;
    let axes = [shape[at], shape[at + 1]];
    shape[at] = cut.len();
    let data = match &tensor.data {
        TensorData::F32(data) => TensorData::F32(rows(data, axes, cut)),
        TensorData::Bf16(data) => TensorData::Bf16(rows(data, axes, cut)),
        TensorData::F16(data) => TensorData::F16(rows(data, axes, cut)),
        TensorData::I32(data) => TensorData::I32(rows(data, axes, cut)),
        TensorData::U8(data) => TensorData::U8(rows(data, axes, cut)),
    };
    NamedTensor { shape, data }
}

/// The matrices of one behind those of the other.
fn joined(a: &NamedTensor, b: &NamedTensor) -> NamedTensor {
    fn rows<E: Copy>(a: &[E], b: &[E], heads: usize) -> Vec<E> {
        let (a_len, b_len) = (a.len() / heads.max(1), b.len() / heads.max(1));
        (0..heads).flat_map(|h| [&a[h * a_len..][..a_len], &b[h * b_len..][..b_len]].concat()).collect()
    }
    let mut shape = a.shape.clone();
    let at = shape.len() - 2;
    let heads = shape[..at].iter().product();
    shape[at] += b.shape[at];
    let data = match (&a.data, &b.data) {
        (TensorData::F32(a), TensorData::F32(b)) => TensorData::F32(rows(a, b, heads)),
        (TensorData::Bf16(a), TensorData::Bf16(b)) => TensorData::Bf16(rows(a, b, heads)),
        (TensorData::F16(a), TensorData::F16(b)) => TensorData::F16(rows(a, b, heads)),
        // Outputs are floats of one type.
        (other, _) => other.clone(),
    };
    NamedTensor { shape, data }
}

fn add(sum: &mut NamedTensor, more: &NamedTensor) {
    if let (TensorData::F32(sum), TensorData::F32(more)) = (&mut sum.data, &more.data) {
        sum.iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
    }
}
