//! From the bytes of a safetensors file to a case.

use super::{FORMAT, GoldenCase, GoldenError};
use crate::compare::Tol;
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<GoldenCase, GoldenError> {
    case(path, bytes).map_err(|problem| GoldenError::new(path, problem))
}

fn case(path: &Path, bytes: &[u8]) -> Result<GoldenCase, String> {
    let not_safetensors = |e| format!("is not a safetensors file: {e}");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(not_safetensors)?;
    let file = SafeTensors::deserialize(bytes).map_err(not_safetensors)?;
    let metadata: BTreeMap<String, String> =
        header.metadata().clone().unwrap_or_default().into_iter().collect();
    match metadata.get("format").map(String::as_str) {
        Some(FORMAT) => {}
        Some(other) => {
            return Err(format!("is not a golden file: `format` is `{other}`, expected `{FORMAT}`"));
        }
        None => return Err(format!("is not a golden file: no metadata `format`, expected `{FORMAT}`")),
    }
    let text = |key: &str| {
        let missing = || format!("metadata `{key}` is missing; found: {}", names(metadata.keys()));
        metadata.get(key).cloned().ok_or_else(missing)
    };
    let json = |key: &str| -> Result<Map<String, Value>, String> {
        serde_json::from_str(&text(key)?).map_err(|e| format!("metadata `{key}` is not a JSON object: {e}"))
    };
    let mut case = GoldenCase {
        path: path.to_path_buf(),
        family: text("family")?.parse().map_err(|e: attn_core::AttnError| format!("metadata: {e}"))?,
        variant: text("variant")?,
        case: text("case")?,
        reference: text("reference")?,
        options: json("options")?,
        tolerance: tolerances(&json("tolerance")?)?,
        inputs: NamedTensors::default(),
        outputs: NamedTensors::default(),
        grads: NamedTensors::default(),
        given: NamedTensors::default(),
        aux: NamedTensors::default(),
        w: None,
        metadata,
    };
    for (name, view) in file.tensors() {
        let tensor = read(&name, &view)?;
        let group = match name.split_once('.') {
            Some(("in", rest)) => Some((&mut case.inputs, rest)),
            Some(("out", rest)) => Some((&mut case.outputs, rest)),
            Some(("grad", rest)) => Some((&mut case.grads, rest)),
            Some(("given", rest)) => Some((&mut case.given, rest)),
            Some(("aux", rest)) => Some((&mut case.aux, rest)),
            _ => None,
        };
        match group {
            Some((group, rest)) => drop(group.0.insert(rest.to_string(), tensor)),
            None if name == "w" => case.w = Some(tensor),
            None => return Err(format!("tensor `{name}` is none of in.*, out.*, grad.*, given.*, aux.*, w")),
        }
    }
    if case.outputs.0.is_empty() {
        return Err("holds no tensor `out.*`, so nothing can be checked".into());
    }
    Ok(case)
}

fn names<'a>(keys: impl Iterator<Item = &'a String>) -> String {
    keys.map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// `{"metric": "allclose", "out": [atol, rtol], ...}` or `{"metric": "scaled-max", "out": t, ...}`.
fn tolerances(json: &Map<String, Value>) -> Result<BTreeMap<String, Tol>, String> {
    let metric = json.get("metric").and_then(Value::as_str).unwrap_or("none");
    let number = |value: &Value| value.as_f64().filter(|t| t.is_finite() && *t >= 0.0);
    let read = |value: &Value| match (metric, value) {
        ("allclose", Value::Array(both)) if both.len() == 2 => {
            Some(Tol::AllClose { atol: number(&both[0])?, rtol: number(&both[1])? })
        }
        ("scaled-max", value) => number(value).map(Tol::ScaledMax),
        _ => None,
    };
    let expected = match metric {
        "allclose" => "[atol, rtol]",
        "scaled-max" => "one number",
        other => return Err(format!("tolerance: `metric` is {other}, expected allclose or scaled-max")),
    };
    let mut tolerances = BTreeMap::new();
    for (name, value) in json.iter().filter(|(name, _)| *name != "metric") {
        let tol =
            read(value).ok_or_else(|| format!("tolerance: `{name}` is {value}, expected {expected}"))?;
        tolerances.insert(name.clone(), tol);
    }
    if tolerances.contains_key("out") { Ok(tolerances) } else { Err("tolerance: `out` is missing".into()) }
}

fn read(name: &str, view: &TensorView<'_>) -> Result<NamedTensor, String> {
    let bytes = view.data();
    let (words, _) = bytes.as_chunks::<4>(); // safetensors has checked the length against shape and dtype
    let data = match view.dtype() {
        Dtype::F32 => TensorData::F32(words.iter().map(|w| f32::from_le_bytes(*w)).collect()),
        Dtype::I32 => TensorData::I32(words.iter().map(|w| i32::from_le_bytes(*w)).collect()),
        Dtype::U8 | Dtype::BOOL => TensorData::U8(bytes.to_vec()),
        other => return Err(format!("tensor `{name}` is {other:?}, expected F32, I32, U8 or BOOL")),
    };
    Ok(NamedTensor { shape: view.shape().to_vec(), data })
}
