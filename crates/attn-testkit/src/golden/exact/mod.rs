//! From the words of files about exact attention to those of the variant `flash`.
//!
//! An option or a tensor that no rule knows makes the case unsupported, with its name: nothing of a file is ignored,
//! unless its rule says that it is a remark on what the tensors already say.

mod mods;
mod onnx_attention;
mod onnx_flex;
mod onnx_graph;
#[cfg(test)]
mod tests;

use super::{Form, GoldenCase, Plan};
use attn_core::DType;
use attn_core::registry::NamedTensors;
use serde_json::Value;

/// The files' variants, in their words.
const VARIANTS: [&str; 19] = [
    "softmax",
    "causal",
    "sliding_window",
    "logit_softcap",
    "half_input",
    "lse_merge",
    "kv_cache",
    "adversarial",
    "bool_mask",
    "additive_bias",
    "alibi",
    "relative_bias",
    "relative_bias_t5",
    "attention_sink",
    "varlen",
    "paged_kv",
    "dropout_given_mask",
    "qk_norm_rms",
    "qk_norm_l2",
];

/// What `flash` needs to compute `case`, or why it cannot.
///
/// # Errors
/// Why the case is unsupported.
pub fn plan(case: &GoldenCase) -> Result<Plan, String> {
    match case.variant.as_str() {
        "onnx_attention" => onnx_attention::plan(case),
        "onnx_flexattention" => onnx_flex::plan(case),
        "score_mod_mask_mod" => mods::plan(case),
        variant if VARIANTS.contains(&variant) => common(case),
        variant => Err(format!("no exact variant of ours computes `{variant}`")),
    }
}

fn common(case: &GoldenCase) -> Result<Plan, String> {
    let mut plan = Plan::new("flash");
    if case.variant == "lse_merge" {
        plan.form = Form::Merge;
    }
    for name in case.inputs.0.keys() {
        give(&mut plan, case, name)?;
    }
    for (key, value) in &case.options {
        option(&mut plan, key, value)?;
    }
    Ok(plan)
}

/// Gives an input of the file under our name.
fn give(plan: &mut Plan, case: &GoldenCase, name: &str) -> Result<(), String> {
    let tensor = case.inputs.require(name).map_err(|e| e.to_string())?.clone();
    let ours = match name {
        "q" | "k" | "v" | "k_cache" | "v_cache" | "block_table" | "seqlens_k" | "cu_seqlens_q"
        | "cu_seqlens_k" | "mask" | "alibi_slopes" | "sinks" | "keep" | "q_weight" | "k_weight" => name,
        // The same with -inf where a pair is hidden; the gradient is that of `bias`.
        "bias" if case.inputs.get("bias_with_neginf").is_some() => return Ok(()),
        "bias" => name,
        "bias_with_neginf" => "bias",
        "table" if case.variant == "relative_bias_t5" => "t5_table",
        "table" => "relative_table",
        "chunks" => return Ok(()), // the option of this name says the same
        other => return Err(format!("flash does not take a tensor `{other}` here")),
    };
    if name == "bias_with_neginf" {
        plan.inputs.0.insert("bias".into(), tensor);
    } else {
        plan.give(name, ours, tensor);
    }
    Ok(())
}

/// Sets an option of the file in our words.
fn option(plan: &mut Plan, key: &str, value: &Value) -> Result<(), String> {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
    let only = |known: &str| {
        if text == known { Ok(()) } else { Err(format!("`{key}` is {text}; flash has only {known}")) }
    };
    match key {
        _ if value.is_null() => {}
        "causal" | "scale" | "softcap" | "max_distance" | "bidirectional" | "dropout_p" | "seed" => {
            plan.set(key, text);
        }
        "align" => plan.set(key, text.replace('_', "-")),
        "window_left" | "window_right" if text == "-1" => {} // no bound
        "window_left" | "window_right" => plan.set(key, text),
        "eps" => plan.set("qk_norm_eps", text),
        "norm" => norm(plan, &text)?,
        "dtype" => storage(plan, &text)?,
        "chunks" => plan.form = Form::Stream(lengths(value).ok_or_else(|| format!("`{key}` is {text}"))?),
        "mask" => only("bool, 1 = attend")?,
        "formula" => only("-slope_h*|i+Nk-Nq-j|")?,
        "layout" => only("[total, heads, d]; lse [total, heads]")?,
        "cache_layout" => only("[pages, page_size, hkv, d]")?,
        "block_table" => only("-1 = unused")?,
        "num_buckets" => {
            let table = plan.inputs.get("t5_table").and_then(|table| table.shape.first().copied());
            if table.map(|rows| rows.to_string()).as_ref() != Some(&text) {
                return Err(format!("`{key}` is {text}, and the table has {table:?} rows"));
            }
        }
        "page_size" => {
            let cache = plan.inputs.get("k_cache").and_then(|cache| cache.shape.get(1).copied());
            if cache.map(|size| size.to_string()).as_ref() != Some(&text) {
                return Err(format!("`{key}` is {text}, and the cache has pages of {cache:?}"));
            }
        }
        // Remarks on what the tensors say.
        "hq" | "hkv" | "splits" | "bias" | "alibi" => {}
        other => return Err(format!("flash has nothing like the option `{other}`")),
    }
    Ok(())
}

fn lengths(value: &Value) -> Option<Vec<usize>> {
    value.as_array()?.iter().map(|length| Some(length.as_u64()? as usize)).collect()
}

/// `rms over head dim, ...` or `q/max(|q|,EPS)`.
fn norm(plan: &mut Plan, text: &str) -> Result<(), String> {
    if text.starts_with("rms over head dim") {
        plan.set("qk_norm", "rms");
        return Ok(());
    }
    let eps = text.strip_prefix("q/max(|q|,").and_then(|rest| rest.strip_suffix(')'));
    let eps = eps.ok_or_else(|| format!("flash has no norm like `{text}`"))?;
    plan.set("qk_norm", "l2");
    plan.set("qk_norm_eps", eps.trim());
    Ok(())
}

/// Rounds the tensors of floats that have a storage type to it.
fn storage(plan: &mut Plan, name: &str) -> Result<(), String> {
    let dtype = match name {
        "f32" | "float32" => DType::F32,
        "bf16" | "bfloat16" => DType::Bf16,
        "f16" | "float16" => DType::F16,
        "f64" | "float64" => {
            plan.notes.push("float64 in the file, computed in f32".into());
            DType::F32
        }
        other => return Err(format!("flash has no storage type {other}")),
    };
    round(&mut plan.inputs, dtype);
    Ok(())
}

fn round(inputs: &mut NamedTensors, dtype: DType) {
    for name in ["q", "k", "v", "k_cache", "v_cache"] {
        if let Some(tensor) = inputs.0.get_mut(name) {
            *tensor = tensor.rounded(dtype);
        }
    }
}
