//! The `FlexAttention` operator of ONNX in terms of ours: graphs become formulas; a graph that multiplies all
//! probabilities with one number multiplies the values instead.

use super::super::{GoldenCase, Plan};
use super::onnx_graph::formula;
use serde_json::Value;

pub(super) fn plan(case: &GoldenCase) -> Result<Plan, String> {
    let mut plan = Plan::new("flash");
    for name in case.inputs.0.keys() {
        match name.as_str() {
            "q" | "k" | "v" => super::give(&mut plan, case, name)?,
            other => return Err(format!("no tensor of ours is like `{other}`")),
        }
    }
    for (key, value) in &case.options {
        match (key.as_str(), value) {
            ("op" | "opset" | "enable_gqa" | "softmax_precision", _) => {}
            ("rank", value) if value.as_u64() == Some(4) => {}
            ("score_mod" | "mask_mod", Value::String(graph)) => plan.set(key, formula(graph)?),
            ("prob_mod", Value::String(graph)) => {
                let factor = factor(&formula(graph)?)?;
                plan.inputs.0.get_mut("v").into_iter().for_each(|v| v.scale(factor));
            }
            ("scale" | "dtype", value) => super::option(&mut plan, key, value)?,
            (other, value) => return Err(format!("flash has nothing like the option `{other}` = {value}")),
        }
    }
    Ok(plan)
}

/// `c` of `(s * (c))`, whichever comes first.
fn factor(formula: &str) -> Result<f32, String> {
    let product = formula.strip_prefix('(').and_then(|rest| rest.strip_suffix(')'));
    let both = product.and_then(|product| product.split_once(" * "));
    let number = match both {
        Some(("s", number)) | Some((number, "s")) => number.trim_matches(['(', ')']).parse().ok(),
        _ => None,
    };
    number.ok_or_else(|| format!("flash multiplies weights with a number only, not {formula}"))
}
