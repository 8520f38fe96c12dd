//! Masks and score mods that a file defines in words: `keep j<=i and (i-j)%3==0`, `s + head_bias[h,j]`.
//!
//! `keep` before a condition makes a mask; all else is the new score. `same NAME` compares the ids of that tensor at the
//! query and at the key. `NAME[axes]` as a summand is a bias, broadcast over the other axes of `b, h, i, j`. What is left is
//! a formula that `flash` reads.

use super::super::{GoldenCase, Plan};
use attn_core::registry::{NamedTensor, TensorData};

pub(super) fn plan(case: &GoldenCase) -> Result<Plan, String> {
    let mut plan = Plan::new("flash");
    let text = |key: &str| case.options.get(key).and_then(|value| value.as_str());
    let mut definition = text("definition").ok_or("no `definition`")?.to_string();
    for name in case.inputs.0.keys() {
        match name.as_str() {
            "q" | "k" | "v" => super::give(&mut plan, case, name)?,
            _ => definition = use_tensor(&mut plan, case, name, &definition)?,
        }
    }
    for (key, value) in &case.options {
        match key.as_str() {
            "definition" => {}
            "mod" => {} // its name
            _ => super::option(&mut plan, key, value)?,
        }
    }
    match definition.trim().strip_prefix("keep ") {
        Some("true") => {}
        Some(condition) => plan.set("mask_mod", condition),
        None if definition.trim() == "s" => {}
        None => plan.set("score_mod", definition),
    }
    Ok(plan)
}

/// Gives a tensor of which the definition speaks; returns the definition without it.
fn use_tensor(plan: &mut Plan, case: &GoldenCase, name: &str, definition: &str) -> Result<String, String> {
    let tensor = case.inputs.require(name).map_err(|e| e.to_string())?;
    if let (TensorData::I32(_), Some((before, after))) =
        (&tensor.data, definition.split_once(&format!("same {name}")))
    {
        plan.inputs.0.insert("documents_q".into(), tensor.clone());
        plan.inputs.0.insert("documents_kv".into(), tensor.clone());
        return Ok(format!("{before}true{after}"));
    }
    let unclear = || format!("the definition `{definition}` does not add `{name}[axes]`");
    let (before, after) = definition.split_once(&format!("{name}[")).ok_or_else(unclear)?;
    let (axes, after) = after.split_once(']').ok_or_else(unclear)?;
    let summed = before.trim_end().strip_suffix('+').filter(|_| is_summand(before, after));
    let shape = broadcast(axes, &tensor.shape).ok_or_else(unclear)?;
    if plan.inputs.get("bias").is_some() {
        return Err("flash takes one bias".into());
    }
    plan.give(name, "bias", NamedTensor { shape, data: tensor.data.clone() });
    Ok(format!("{}{after}", summed.ok_or_else(unclear)?.trim_end()))
}

/// Whether what stands between is a summand of the whole.
fn is_summand(before: &str, after: &str) -> bool {
    let depth = before.chars().fold(0, |depth, c| depth + i32::from(c == '(') - i32::from(c == ')'));
    let after = after.trim_start();
    depth == 0
        && before.matches('|').count().is_multiple_of(2)
        && (after.is_empty() || after.starts_with(['+', '-']))
}

/// The shape over `b, h, i, j` of a tensor over `axes`, some of them in this order.
fn broadcast(axes: &str, shape: &[usize]) -> Option<Vec<usize>> {
    let axes: Vec<&str> = axes.split(',').map(str::trim).collect();
    let mut lengths = shape.iter();
    let mut named = axes.iter().peekable();
    let all = ["b", "h", "i", "j"].map(|axis| match named.next_if(|name| **name == axis) {
        Some(_) => lengths.next().copied(),
        None => Some(1),
    });
    let all: Option<Vec<usize>> = all.into_iter().collect();
    all.filter(|_| named.next().is_none() && lengths.next().is_none())
}
