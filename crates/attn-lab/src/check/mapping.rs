//! The one table from the golden files' names to ours: variants, options, tensors.
//!
//! A variant or an option that is not here is `unsupported`, with its name: nothing of a file is ever ignored, unless its
//! rule says that it is a remark.

use super::onnx;
use attn_core::registry::{NamedTensors, Options};
use attn_core::{DType, Family};
use attn_testkit::golden::GoldenCase;
use serde_json::Value;

/// How one case is computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Our variant.
    pub ours: &'static str,
    /// Its options.
    pub options: Options,
    /// Its tensors, under our names, in the case's storage type.
    pub inputs: NamedTensors,
    /// The file's names of outputs that we call something else.
    pub outputs: &'static [(&'static str, &'static str)],
    /// How it runs.
    pub form: Form,
}

impl Plan {
    /// What we call the output `theirs`.
    pub fn output_name<'a>(&self, theirs: &'a str) -> &'a str {
        self.outputs.iter().find(|(name, _)| *name == theirs).map_or(theirs, |(_, ours)| ours)
    }
}

/// How a case runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// One call.
    Call,
    /// One call, and a stream appended in these pieces.
    Stream(Vec<usize>),
    /// One call, and a merge of the file's partial results `aux.part_out`, `aux.part_lse`.
    Merge,
    /// One call on `(batch, length, heads * width)` tensors that were split into heads.
    FoldedHeads,
}

/// What becomes of one option of a file.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// Ours, under this name; null is "not given".
    As(&'static str),
    /// A side of a window: ours, under this name; -1 is "no bound".
    Side(&'static str),
    /// `top_left` or `bottom_right`: our `align`.
    Align,
    /// Our variant does exactly this, always.
    Only(&'static str),
    /// The storage type of q, k and v.
    Storage,
    /// Position of query 0, which has to be `n_kv - n_q`.
    Offset,
    /// Pieces of a stream.
    Pieces,
    /// Where the scale sits: on the keys, so that states hold scaled keys. Comes behind `scale`.
    ScaledKeys,
    /// Decays: a tensor, or a rule that ours knows by another name.
    Decays,
    /// A remark on what the tensors already say.
    Remark,
}

/// A row of the table.
struct Row {
    family: Family,
    variant: &'static str,
    ours: &'static str,
    options: &'static [(&'static str, Rule)],
    /// Input tensors besides q, k and v: theirs and ours; an empty name drops one that repeats another.
    inputs: &'static [(&'static str, &'static str)],
    outputs: &'static [(&'static str, &'static str)],
}

const BAND: &[(&str, Rule)] = &[
    ("causal", Rule::As("causal")),
    ("align", Rule::Align),
    ("scale", Rule::As("scale")),
    ("softcap", Rule::As("softcap")),
    ("window_left", Rule::Side("window_left")),
    ("window_right", Rule::Side("window_right")),
    ("hq", Rule::Remark),
    ("hkv", Rule::Remark),
    ("dtype", Rule::Storage),
    ("chunks", Rule::Pieces),
    ("splits", Rule::Remark),
    ("mask", Rule::Remark),
    ("bias", Rule::Remark),
    ("alibi", Rule::Remark),
    ("formula", Rule::Only("-slope_h*|i+Nk-Nq-j|")),
];

const fn exact(variant: &'static str, inputs: &'static [(&'static str, &'static str)]) -> Row {
    Row { family: Family::Exact, variant, ours: "flash", options: BAND, inputs, outputs: &[] }
}

const TABLE: &[Row] = &[
    exact("softmax", &[]),
    exact("causal", &[]),
    exact("sliding_window", &[]),
    exact("logit_softcap", &[]),
    exact("half_input", &[]),
    exact("lse_merge", &[]),
    exact("kv_cache", &[("chunks", "")]),
    exact("adversarial", &[("mask", "mask")]),
    exact("bool_mask", &[("mask", "mask")]),
    exact("additive_bias", &[("bias", ""), ("bias_with_neginf", "bias")]),
    exact("alibi", &[("alibi_slopes", "alibi_slopes")]),
    Row {
        family: Family::Sparse,
        variant: "sliding-window-causal",
        ours: "sliding-window",
        options: &[
            ("causal", Rule::As("causal")),
            ("window", Rule::As("window")),
            ("q_offset", Rule::Offset),
        ],
        inputs: &[],
        outputs: &[],
    },
    Row {
        family: Family::Sparse,
        variant: "sliding-window-bidirectional",
        ours: "sliding-window",
        options: &[
            ("causal", Rule::As("causal")),
            ("window_left", Rule::As("window_left")),
            ("window_right", Rule::As("window_right")),
            ("q_offset", Rule::Offset),
        ],
        inputs: &[],
        outputs: &[],
    },
    Row {
        family: Family::Sparse,
        variant: "streaming-sinks",
        ours: "sink-window",
        options: &[
            ("causal", Rule::Only("true")),
            ("sinks", Rule::As("n_sinks")),
            ("window", Rule::As("window")),
            ("q_offset", Rule::Offset),
        ],
        inputs: &[],
        outputs: &[],
    },
    Row {
        family: Family::Sparse,
        variant: "chunked-causal",
        ours: "chunked-causal",
        options: &[
            ("causal", Rule::Only("true")),
            ("chunk", Rule::As("chunk_len")),
            ("q_offset", Rule::Offset),
        ],
        inputs: &[],
        outputs: &[],
    },
    Row {
        family: Family::Linear,
        variant: "linear",
        ours: "linear",
        options: &[
            ("causal", Rule::As("causal")),
            ("scale", Rule::As("scale")),
            ("feature_map", Rule::Only("identity")),
            ("normalize", Rule::Only("false")),
        ],
        inputs: &[("s0", "initial_state")],
        outputs: &[],
    },
    Row {
        family: Family::Linear,
        variant: "linear-elu",
        ours: "linear-elu",
        options: &[
            ("causal", Rule::As("causal")),
            ("scale", Rule::As("scale")),
            ("eps", Rule::As("eps")),
            ("feature_map", Rule::Only("elu_plus_one")),
            ("normalize", Rule::Only("true")),
        ],
        inputs: &[("s0", "initial_state"), ("z0", "initial_normaliser")],
        outputs: &[],
    },
    Row {
        family: Family::Linear,
        variant: "retnet",
        ours: "retnet",
        options: &[
            ("scale", Rule::As("scale")),
            ("scale_on", Rule::ScaledKeys),
            ("gamma", Rule::Decays),
            ("xpos", Rule::Only("false")),
            // The reference computed it in another form than ours, which has to agree.
            ("parallel_form", Rule::Remark),
        ],
        inputs: &[("s0", "initial_state"), ("log_gamma", "log_decay")],
        outputs: &[],
    },
    Row {
        family: Family::Hier,
        variant: "h-transformer-1d",
        ours: "h-transformer-1d",
        options: &[
            ("causal", Rule::As("causal")),
            ("block", Rule::As("block_size")),
            ("coarsening_ratio", Rule::Only("2")),
            // The number of levels follows from the length and the block.
            ("levels", Rule::Remark),
            ("scale", Rule::Only("d**-0.5")),
        ],
        inputs: &[],
        outputs: &[],
    },
];

/// What our registries need to compute `case`, or why they cannot.
///
/// # Errors
/// Why the case is unsupported.
pub fn plan(case: &GoldenCase) -> Result<Plan, String> {
    if (case.family, case.variant.as_str()) == (Family::Exact, "onnx_attention") {
        return onnx::plan(case);
    }
    let row = TABLE.iter().find(|row| row.family == case.family && row.variant == case.variant);
    let row = row.ok_or_else(|| format!("no {} variant of ours computes `{}`", case.family, case.variant))?;
    let mut plan = Plan {
        ours: row.ours,
        options: Options::new(),
        inputs: NamedTensors::default(),
        outputs: row.outputs,
        form: if row.variant == "lse_merge" { Form::Merge } else { Form::Call },
    };
    for (name, tensor) in &case.inputs.0 {
        let ours = match (name.as_str(), row.inputs.iter().find(|(theirs, _)| theirs == name)) {
            ("q" | "k" | "v", _) => name,
            (_, Some((_, ours))) => *ours,
            (_, None) => return Err(format!("{} does not take a tensor `{name}` here", row.ours)),
        };
        if !ours.is_empty() {
            plan.inputs.0.insert(ours.to_string(), tensor.clone());
        }
    }
    if let Some(key) = case.options.keys().find(|key| row.options.iter().all(|(theirs, _)| theirs != key)) {
        return Err(format!("{} has nothing like the option `{key}`", row.ours));
    }
    // In the table's order, since a later rule may build on an earlier one.
    for (key, rule) in row.options {
        if let Some(value) = case.options.get(*key) {
            apply(*rule, key, value, case, &mut plan)?;
        }
    }
    Ok(plan)
}

fn apply(rule: Rule, key: &str, value: &Value, case: &GoldenCase, plan: &mut Plan) -> Result<(), String> {
    let text = plain(value);
    let set = |plan: &mut Plan, ours: &str, text: &str| plan.options.0.insert(ours.into(), text.into());
    match rule {
        Rule::Remark => {}
        Rule::As(_) if value.is_null() => {}
        Rule::Side(_) if text == "-1" => {}
        Rule::As(ours) | Rule::Side(ours) => drop(set(plan, ours, &text)),
        Rule::Align => drop(set(plan, "align", &text.replace('_', "-"))),
        Rule::Only(one) if text == one => {}
        Rule::Only(one) => return Err(format!("`{key}` is {text}; {} has only {one}", plan.ours)),
        Rule::Storage => {
            let dtype: DType = text.parse().map_err(|e: attn_core::AttnError| e.to_string())?;
            super::layout::convert_qkv(&mut plan.inputs, dtype);
        }
        Rule::Offset => {
            let lengths = ["q", "k"].map(|name| case.inputs.get(name).and_then(|t| t.shape.get(2).copied()));
            let aligned = match lengths {
                [Some(n_q), Some(n_kv)] => n_kv as i64 - n_q as i64,
                _ => 0,
            };
            if value.as_i64() != Some(aligned) {
                return Err(format!("`{key}` is {text}; {} puts the last query at the last key", plan.ours));
            }
        }
        Rule::ScaledKeys => {
            let scale = case.options.get("scale").and_then(Value::as_f64);
            match (text.starts_with("k "), scale) {
                (true, Some(scale)) => super::layout::scale(&mut plan.inputs, "k", scale as f32),
                _ => return Err(format!("`{key}` is {text}, expected the keys")),
            }
            set(plan, "scale", "1");
        }
        Rule::Decays => match (plan.inputs.get("log_decay"), text.as_str()) {
            (Some(_), _) => {}
            (None, "1 - 2^(-5-h)") => drop(set(plan, "gammas", "fla")),
            (None, other) => return Err(format!("{} has no decays like {other}", plan.ours)),
        },
        Rule::Pieces => {
            let pieces = value
                .as_array()
                .map(|all| all.iter().filter_map(Value::as_u64).map(|n| n as usize).collect());
            plan.form =
                Form::Stream(pieces.ok_or_else(|| format!("`{key}` is {text}, expected a list of lengths"))?);
        }
    }
    Ok(())
}

/// A value as one would write it after `--set key=`.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}
