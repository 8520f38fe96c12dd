//! Running a case: one call, and where the file says so a stream or a merge of parts.

use super::mapping::{Form, Plan};
use super::{Computed, layout};
use attn_core::merge::merge_into;
use attn_core::registry::{Entry, NamedTensor, NamedTensors, TensorData, output_like};
use attn_core::{AttnError, Qkv, Result, StreamShape};
use attn_testkit::golden::GoldenCase;

pub(super) fn run(entry: &Entry, plan: &Plan, case: &GoldenCase) -> Result<Vec<Computed>> {
    let mut called = entry.run(&plan.options, &plan.inputs)?;
    let mut all = Vec::new();
    match &plan.form {
        Form::Call => {}
        Form::Stream(pieces) => {
            all.push(Computed { label: "streamed", tensors: stream(entry, plan, pieces)? })
        }
        Form::Merge => all.push(Computed { label: "merged", tensors: merge(case)? }),
        Form::FoldedHeads => {
            if let Some(folded) = called.get("o").and_then(layout::fold_heads) {
                called.0.insert("o".into(), folded);
            }
        }
    }
    all.insert(0, Computed { label: "", tensors: called });
    Ok(all)
}

/// Appends the inputs piece by piece.
fn stream(entry: &Entry, plan: &Plan, pieces: &[usize]) -> Result<NamedTensors> {
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
fn merge(case: &GoldenCase) -> Result<NamedTensors> {
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
    match tensors.require(name)? {
        NamedTensor { shape, data: TensorData::F32(data) } => Ok((shape, data)),
        _ => Err(AttnError::DType { tensor: name.into(), found: "another".into(), expected: "f32".into() }),
    }
}
