//! What some cases need besides one call: a stream, a merge of parts, the conventions of ONNX.

use super::GoldenCase;
use super::layout;
use super::plan::{Onnx, Plan, Weights};
use attn_core::merge::merge_into;
use attn_core::registry::{Entry, NamedTensor, NamedTensors, TensorData, output_like};
use attn_core::{AttnError, Qkv, Result, StreamShape};

/// Appends the inputs piece by piece.
pub(super) fn stream(entry: &Entry, plan: &Plan, pieces: &[usize]) -> Result<NamedTensors> {
    let attention = entry.build(&plan.options)?;
    let streaming =
        attention.as_streaming().ok_or_else(|| AttnError::unsupported(entry.name, "streaming"))?;
    let x = plan.inputs.qkv()?;
    let (total, n) = (pieces.iter().sum::<usize>(), x.shape().n_q);
    if total != n {
        return Err(AttnError::value("chunks", format!("{pieces:?}"), format!("pieces that sum to {n}")));
    }
    let mut state = streaming.start(StreamShape::of(&x))?;
    let mut parts = Vec::new();
    let mut at = 0;
    for &len in pieces {
        let rows = at..at + len;
        let piece = Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(rows.clone()), x.v().narrow(rows))?;
        let mut out = output_like(&piece);
        state.append(piece, out.as_out()?)?;
        parts.push(out);
        at += len;
    }
    let joined = parts.into_iter().reduce(|a, b| layout::concat_lengths(&a, &b).unwrap_or(a));
    Ok(NamedTensors(joined.map(|o| ("o".to_string(), o)).into_iter().collect()))
}

/// Merges the file's partial results over disjoint keys, one after the other.
pub(super) fn merge(case: &GoldenCase) -> Result<NamedTensors> {
    let (out_shape, part_out) = floats(&case.aux, "part_out")?;
    let (lse_shape, part_lse) = floats(&case.aux, "part_lse")?;
    let parts = lse_shape.first().copied().unwrap_or(0).max(1);
    let (rows, elements) = (part_lse.len() / parts, part_out.len() / parts);
    let (mut out, mut lse) = (vec![0.0; elements], vec![f32::NEG_INFINITY; rows]);
    for part in 0..parts {
        merge_into(
            &mut out,
            &mut lse,
            &part_out[part * elements..][..elements],
            &part_lse[part * rows..][..rows],
        )?;
    }
    let o = NamedTensor::f32("o", out_shape.get(1..).unwrap_or(&[]), out)?;
    let lse = NamedTensor::f32("lse", lse_shape.get(1..).unwrap_or(&[]), lse)?;
    Ok(NamedTensors([("o".into(), o), ("lse".into(), lse)].into()))
}

fn floats<'a>(tensors: &'a NamedTensors, name: &str) -> Result<(&'a [usize], &'a [f32])> {
    match tensors.f32(name)? {
        Some(found) => Ok(found),
        None => tensors.require(name).map(|tensor| (tensor.shape.as_slice(), &[][..])),
    }
}

/// Adds the operator's other outputs, in its layout.
pub(super) fn finish_onnx(entry: &Entry, onnx: &Onnx, given: &mut NamedTensors) -> Result<()> {
    if onnx.folded
        && let Some(folded) = given.get("o").and_then(layout::fold_heads)
    {
        given.0.insert("o".into(), folded);
    }
    given.0.extend(onnx.present.0.clone());
    if let Some(asked) = &onnx.weights {
        given.0.insert("qk_matmul_output".into(), weights(entry, asked)?);
    }
    Ok(())
}

/// Most keys for which weights are computed: they take a matrix of unit vectors.
pub(super) const MOST_KEYS: usize = 512;

/// The weights of each key: outputs for values that are the unit vectors.
pub(super) fn weights(entry: &Entry, asked: &Weights) -> Result<NamedTensor> {
    let (q, k) = (asked.inputs.require("q")?.view("q")?, asked.inputs.require("k")?.view("k")?);
    let ([batch, heads, n, _], dtype) = (k.shape(), q.dtype());
    let unit = (0..batch * heads * n * n).map(|at| f32::from(u8::from(at / n % n == at % n))).collect();
    let mut inputs = asked.inputs.clone();
    inputs.0.insert("v".into(), NamedTensor::f32("v", &[batch, heads, n, n], unit)?.rounded(dtype));
    let given = entry.run(&asked.options, &inputs)?;
    let weights = given.require("o")?;
    if !asked.scores {
        return Ok(weights.clone());
    }
    let (p, lse) = (weights.data.to_f64(), given.require("lse")?.data.to_f64());
    let scores = p.iter().enumerate().map(|(at, p)| (p.ln() + lse[at / n]) as f32).collect();
    Ok(NamedTensor { shape: weights.shape.clone(), data: TensorData::F32(scores) })
}
