//! The `Attention` operator of ONNX (opsets 23 to 25) in terms of ours.
//!
//! - 3-axis tensors are `(batch, length, heads * width)`.
//! - `past_key` and `past_value` stand before `k` and `v`; query 0 stands behind the past, so that without a past
//!   causal masks are aligned to the top left.
//! - `attn_mask` is a mask if it was bool, else it is added to the scores behind the soft cap; a last axis shorter than
//!   the keys hides the rest.
//! - `nonpad_kv_seqlen` says how many keys of each batch entry are real; the queries stand at their end.
//! - `present_key` and `present_value` are the joined keys and values. `qk_matmul_output` is by its mode: 0 the scaled
//!   scores, 1 the capped ones, 2 those with bias and -inf where hidden, 3 the weights. Flash forms none of them; the
//!   weights are its output for values that are unit vectors, and a score is `ln p + lse`.

use super::super::forms::MOST_KEYS;
use super::super::layout::{concat_lengths, split_heads};
use super::super::{Form, GoldenCase, Onnx, Plan, Weights};
use attn_core::AttnError;
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use serde_json::Value;

pub(super) fn plan(case: &GoldenCase) -> Result<Plan, String> {
    let known = ["q", "k", "v", "past_key", "past_value", "attn_mask", "nonpad_kv_seqlen"];
    if let Some(other) = case.inputs.0.keys().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("no tensor of ours is like `{other}`"));
    }
    let mut plan = Plan::new("flash");
    let folded = case.options.get("rank").and_then(Value::as_u64) == Some(3);
    plan.inputs = qkv(case, folded)?;
    let past = join_past(case, &mut plan.inputs)?;
    plan.set("align", past);
    let present = [("present_key", "k"), ("present_value", "v")]
        .map(|(theirs, ours)| plan.inputs.get(ours).map(|joined| (theirs.to_string(), joined.clone())));
    let present = NamedTensors(present.into_iter().flatten().collect());
    for (key, value) in &case.options {
        match (key.as_str(), value) {
            ("rank" | "op" | "opset" | "attn_mask_dtype" | "q_num_heads" | "kv_num_heads", _) => {}
            // Our softmax is f32 in any case.
            ("qk_matmul_output_mode" | "softmax_precision", _) => {}
            ("dtype" | "scale" | "softcap", value) => super::option(&mut plan, key, value)?,
            ("is_causal", value) => plan.set("causal", value.as_u64() == Some(1)),
            ("left_window_size", value) => super::option(&mut plan, "window_left", value)?,
            ("right_window_size", value) => super::option(&mut plan, "window_right", value)?,
            (other, _) => return Err(format!("flash has nothing like the option `{other}`")),
        }
    }
    if let Some(real) = case.inputs.get("nonpad_kv_seqlen") {
        plan.inputs.0.insert("kv_lens".into(), real.clone());
        plan.set("align", "bottom-right");
    }
    if let Some(mask) = case.inputs.get("attn_mask") {
        let bool_mask = case.options.get("attn_mask_dtype").and_then(Value::as_str) == Some("bool");
        let n_kv = plan.inputs.get("k").and_then(|k| k.shape.get(2).copied()).unwrap_or(0);
        let (name, tensor) = widen(mask, bool_mask, n_kv)?;
        plan.inputs.0.insert(name.into(), tensor);
    }
    let weights = weights(case, &plan)?;
    plan.form = Form::Onnx(Onnx { folded, present, weights });
    Ok(plan)
}

/// The call behind `qk_matmul_output`, if the file holds it.
fn weights(case: &GoldenCase, plan: &Plan) -> Result<Option<Weights>, String> {
    let n_kv = plan.inputs.get("k").and_then(|k| k.shape.get(2).copied()).unwrap_or(0);
    if case.outputs.get("qk_matmul_output").is_none() || n_kv > MOST_KEYS {
        return Ok(None);
    }
    let mode = case.options.get("qk_matmul_output_mode").map_or(Some(0), Value::as_u64);
    let (mut options, mut inputs) = (plan.options.clone(), plan.inputs.clone());
    inputs.0.remove("v");
    match mode {
        Some(0 | 1) => {
            let kept = if mode == Some(0) { &["scale"][..] } else { &["scale", "softcap"] };
            options.0.retain(|name, _| kept.contains(&name.as_str()));
            inputs.0.retain(|name, _| ["q", "k"].contains(&name.as_str()));
        }
        Some(2 | 3) => {}
        _ => return Err(format!("`qk_matmul_output_mode` is {mode:?}, expected 0 to 3")),
    }
    Ok(Some(Weights { options, inputs, scores: mode != Some(3) }))
}

fn qkv(case: &GoldenCase, folded: bool) -> Result<NamedTensors, String> {
    let heads = |key: &str| case.options.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
    let mut inputs = NamedTensors::default();
    for (name, heads) in
        [("q", heads("q_num_heads")), ("k", heads("kv_num_heads")), ("v", heads("kv_num_heads"))]
    {
        let tensor = case.inputs.require(name).map_err(|e: AttnError| e.to_string())?;
        let tensor = if folded {
            split_heads(tensor, heads).ok_or_else(|| format!("`{name}` does not split into {heads} heads"))?
        } else {
            tensor.clone()
        };
        inputs.0.insert(name.into(), tensor);
    }
    Ok(inputs)
}

/// Puts the past before the keys and values; returns its length.
fn join_past(case: &GoldenCase, inputs: &mut NamedTensors) -> Result<usize, String> {
    let mut length = 0;
    for (past, now) in [("past_key", "k"), ("past_value", "v")] {
        let (Some(before), Some(after)) = (case.inputs.get(past), inputs.get(now)) else { continue };
        let joined =
            concat_lengths(before, after).ok_or_else(|| format!("`{past}` does not fit before `{now}`"))?;
        length = before.shape[2];
        inputs.0.insert(now.into(), joined);
    }
    Ok(length)
}

/// The mask under our name, its last axis as long as the keys.
fn widen(mask: &NamedTensor, bool_mask: bool, n_kv: usize) -> Result<(&'static str, NamedTensor), String> {
    fn rows<T: Copy>(from: &[T], len: usize, n_kv: usize, hidden: T) -> Vec<T> {
        let row = |row: &[T]| {
            row.iter().copied().chain(std::iter::repeat_n(hidden, n_kv - len)).collect::<Vec<_>>()
        };
        from.chunks_exact(len.max(1)).flat_map(row).collect()
    }
    let len = mask.shape.last().copied().unwrap_or(0);
    let len = if len == 1 && n_kv > 1 { n_kv } else { len };
    if len > n_kv {
        return Err(format!("`attn_mask` has {len} keys, expected at most {n_kv}"));
    }
    let padded = mask.shape.last() != Some(&1) && len < n_kv;
    let mut shape = mask.shape.clone();
    if let (true, Some(last)) = (padded, shape.last_mut()) {
        *last = n_kv;
    }
    match (&mask.data, bool_mask) {
        (TensorData::U8(seen), true) => {
            let data = if padded { rows(seen, len, n_kv, 0) } else { seen.clone() };
            Ok(("mask", NamedTensor { shape, data: TensorData::U8(data) }))
        }
        (TensorData::F32(bias), false) => {
            let data = if padded { rows(bias, len, n_kv, f32::NEG_INFINITY) } else { bias.clone() };
            Ok(("bias", NamedTensor { shape, data: TensorData::F32(data) }))
        }
        _ => Err("`attn_mask` is neither bool nor float".into()),
    }
}
