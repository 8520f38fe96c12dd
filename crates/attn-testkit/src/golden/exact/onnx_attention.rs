//! The `Attention` operator of ONNX (opsets 23 to 25) in terms of ours.
//!
//! - 3-axis tensors are `(batch, length, heads * width)`.
//! - `past_key` and `past_value` stand before `k` and `v`; query 0 stands behind the past, so that without a past
//!   causal masks are aligned to the top left.
//! - `attn_mask` is a mask if it was bool, else it is added to the scores behind the soft cap; a last axis shorter than
//!   the keys hides the rest.
//! - `nonpad_kv_seqlen` says how many keys of each batch entry are real; the queries stand at their end.

use super::layout::{concat_lengths, convert_qkv, split_heads};
use super::mapping::{Form, Plan};
use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData};
use attn_core::{AttnError, DType};
use attn_testkit::golden::GoldenCase;
use serde_json::Value;

pub(super) fn plan(case: &GoldenCase) -> Result<Plan, String> {
    let known = ["q", "k", "v", "past_key", "past_value", "attn_mask", "nonpad_kv_seqlen"];
    if let Some(other) = case.inputs.0.keys().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("no tensor of ours is like `{other}`"));
    }
    let folded = case.options.get("rank").and_then(Value::as_u64) == Some(3);
    let mut inputs = qkv(case, folded)?;
    let past = join_past(case, &mut inputs)?;
    let mut options = Options::new().with("align", past);
    let mut dtype = DType::F32;
    for (key, value) in &case.options {
        options = match (key.as_str(), value) {
            ("rank" | "op" | "opset" | "attn_mask_dtype" | "q_num_heads" | "kv_num_heads", _) => options,
            // What they ask for beside the output is not compared; our softmax is f32 in any case.
            ("qk_matmul_output_mode" | "softmax_precision", _) => options,
            ("dtype", Value::String(name)) => {
                dtype = match name.as_str() {
                    "float32" => DType::F32,
                    "float16" => DType::F16,
                    "bfloat16" => DType::Bf16,
                    other => return Err(format!("flash has no storage type {other}")),
                };
                options
            }
            ("is_causal", value) => options.with("causal", value.as_u64() == Some(1)),
            ("softcap" | "scale", value) => options.with(key, value),
            ("left_window_size", value) => options.with("window_left", value),
            ("right_window_size", value) => options.with("window_right", value),
            (other, _) => return Err(format!("flash has nothing like the option `{other}`")),
        };
    }
    if let Some(real) = case.inputs.get("nonpad_kv_seqlen") {
        return Err(format!("flash has no lengths by batch entry (`nonpad_kv_seqlen` {:?})", real.data));
    }
    if let Some(mask) = case.inputs.get("attn_mask") {
        let bool_mask = case.options.get("attn_mask_dtype").and_then(Value::as_str) == Some("bool");
        let n_kv = inputs.get("k").and_then(|k| k.shape.get(2).copied()).unwrap_or(0);
        let (name, tensor) = widen(mask, bool_mask, n_kv)?;
        inputs.0.insert(name.into(), tensor);
    }
    convert_qkv(&mut inputs, dtype);
    let form = if folded { Form::FoldedHeads } else { Form::Call };
    Ok(Plan { ours: "flash", options, inputs, outputs: &[], form })
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
