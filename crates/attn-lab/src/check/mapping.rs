//! From the golden files' names to ours: variants, options, tensors. Exact attention has its own rules in
//! [`attn_testkit::golden::exact`].
//!
//! A variant or an option that is not here is `unsupported`, with its name: nothing of a file is ever ignored, unless its
//! rule says that it is a remark.

use attn_core::Family;
use attn_testkit::golden::{GoldenCase, Plan, exact};
use serde_json::Value;

mod linear;
mod sparse;

/// What becomes of one option of a file.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// Ours, under this name; null is "not given".
    As(&'static str),
    /// Our variant does exactly this, always.
    Only(&'static str),
    /// Position of query 0, which has to be `n_kv - n_q`.
    Offset,
    /// Where the scale sits: on the keys, so that states hold scaled keys. Comes behind `scale`.
    ScaledKeys,
    /// Decays: a tensor, or a rule that ours knows by another name.
    Decays,
    /// That it is there says that our option has this value.
    Given(&'static str, &'static str),
    /// A formula for raw gates: softplus, or a sigmoid above a lower bound.
    Gate,
    /// Without a gate it is this variant of ours.
    Gated(&'static str),
    /// Kinds that are variants of their own here.
    Kinds(&'static [(&'static str, &'static str)]),
    /// A performer's kernel; exponentials are taken below the largest key.
    Kernel,
    /// A segment's length; the case's name says whether the memory follows the delta rule.
    Segment,
    /// Numbers, ours between commas; of pairs `[a, b]` ours are ranges `a-b`. No numbers are "none".
    List(&'static str),
    /// Pairs `[a, b]`, ours are ranges `a..b` between commas.
    Ranges(&'static str),
    /// A word of ours for one of theirs; other words are the same.
    Word(&'static str, &'static [(&'static str, &'static str)]),
    /// A temperature, which the reference of the kind `sortcut` does not use.
    Temperature,
    /// A number of queries and of keys that ours has once.
    Square(&'static str),
}

/// A row of the table.
struct Row {
    family: Family,
    variant: &'static str,
    ours: &'static str,
    /// Options of ours that the files take for granted.
    set: &'static [(&'static str, &'static str)],
    options: &'static [(&'static str, Rule)],
    /// Options that say what the tensors already say, or what our variant always does.
    remarks: &'static [&'static str],
    /// Input tensors that are called something else here, theirs and ours; an empty name drops one that repeats another.
    /// Outside the linear family, all that are taken besides q, k and v.
    inputs: &'static [(&'static str, &'static str)],
    /// Decisions of the file's selection stage that are fed in, theirs and ours: those that chance or another formula makes.
    given: &'static [(&'static str, &'static str)],
}

impl Row {
    fn knows(&self, key: &str) -> bool {
        self.options.iter().any(|(theirs, _)| *theirs == key) || self.remarks.contains(&key)
    }
}

const TABLE: &[Row] = &[
    Row {
        family: Family::Linear,
        variant: "linear",
        ours: "linear",
        set: &[],
        remarks: &[],
        options: &[
            ("causal", Rule::As("causal")),
            ("scale", Rule::As("scale")),
            ("feature_map", Rule::Only("identity")),
            ("normalize", Rule::Only("false")),
        ],
        inputs: &[("s0", "initial_state")],
        given: &[],
    },
    Row {
        family: Family::Linear,
        variant: "linear-elu",
        ours: "linear-elu",
        set: &[],
        remarks: &[],
        options: &[
            ("causal", Rule::As("causal")),
            ("scale", Rule::As("scale")),
            ("eps", Rule::As("eps")),
            ("feature_map", Rule::Only("elu_plus_one")),
            ("normalize", Rule::Only("true")),
        ],
        inputs: &[("s0", "initial_state"), ("z0", "initial_normaliser")],
        given: &[],
    },
    Row {
        family: Family::Linear,
        variant: "retnet",
        ours: "retnet",
        set: &[],
        // The reference computed it in another form than ours, which has to agree.
        remarks: &["parallel_form"],
        options: &[
            ("scale", Rule::As("scale")),
            ("scale_on", Rule::ScaledKeys),
            ("gamma", Rule::Decays),
            ("xpos", Rule::Only("false")),
        ],
        inputs: &[("s0", "initial_state"), ("log_gamma", "log_decay")],
        given: &[],
    },
    Row {
        family: Family::Hier,
        variant: "h-transformer-1d",
        ours: "h-transformer-1d",
        set: &[],
        // The number of levels follows from the length and the block.
        remarks: &["levels"],
        options: &[
            ("causal", Rule::As("causal")),
            ("block", Rule::As("block_size")),
            ("coarsening_ratio", Rule::Only("2")),
            ("scale", Rule::Only("d**-0.5")),
        ],
        inputs: &[],
        given: &[],
    },
];

/// What our registries need to compute `case`, or why they cannot.
///
/// # Errors
/// Why the case is unsupported.
pub fn plan(case: &GoldenCase) -> Result<Plan, String> {
    if case.family == Family::Exact {
        return exact::plan(case);
    }
    let row = TABLE
        .iter()
        .chain(linear::tables())
        .chain(sparse::tables())
        .find(|row| row.family == case.family && row.variant == case.variant);
    let row = row.ok_or_else(|| format!("no {} variant of ours computes `{}`", case.family, case.variant))?;
    let mut plan = Plan::new(row.ours);
    for (name, tensor) in &case.inputs.0 {
        let ours = match (name.as_str(), row.inputs.iter().find(|(theirs, _)| theirs == name)) {
            (_, Some((_, ours))) => *ours,
            ("q" | "k" | "v", _) => name,
            // A tensor that the variant does not know is an error when it runs.
            (_, None) if row.family != Family::Hier => name,
            (_, None) => return Err(format!("{} does not take a tensor `{name}` here", row.ours)),
        };
        if !ours.is_empty() {
            plan.give(name, ours, tensor.clone());
        }
    }
    for (theirs, ours) in row.given {
        if let Some(tensor) = case.given.get(theirs) {
            plan.inputs.0.insert(ours.to_string(), sparse::for_all_heads(tensor, case));
            // What an indexer chose stands for its tensors.
            plan.inputs.0.retain(|name, _| !name.starts_with("index_"));
        }
    }
    for (theirs, ours) in row.inputs.iter().filter(|(theirs, ours)| theirs != ours) {
        plan.renamed.insert(theirs.to_string(), ours.to_string());
    }
    for (key, value) in row.set {
        plan.set(key, value);
    }
    if let Some(key) = case.options.keys().find(|key| !row.knows(key)) {
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
    match rule {
        Rule::As(_) if value.is_null() => {}
        Rule::As(ours) => plan.set(ours, text),
        Rule::Only(one) if text == one => {}
        Rule::Only(one) => return Err(format!("`{key}` is {text}; {} has only {one}", plan.ours)),
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
            match (text.starts_with("k "), scale, plan.inputs.0.get_mut("k")) {
                (true, Some(scale), Some(k)) => {
                    k.scale(scale as f32);
                    plan.factors.insert("grad.k".into(), scale as f32);
                }
                _ => return Err(format!("`{key}` is {text}, expected the keys")),
            }
            plan.set("scale", 1);
        }
        Rule::Given(ours, value) => plan.set(ours, value),
        Rule::Gate if text.starts_with("g = -5") => plan.set("gate", "lower-bound"),
        Rule::Gate => {}
        Rule::Gated(without) if text == "false" => plan.ours = without,
        Rule::Gated(_) => {}
        Rule::Kinds(kinds) => match kinds.iter().find(|(theirs, _)| *theirs == text) {
            Some((_, ours)) => plan.ours = ours,
            None => return Err(format!("no variant of ours is of the kind {text}")),
        },
        Rule::Kernel => {
            plan.set("key_max", text == "softmax");
            plan.set("kernel", text);
        }
        Rule::Segment => {
            plan.set("segment", text);
            plan.set("delta", case.case.starts_with("delta"));
        }
        Rule::List(_) | Rule::Ranges(_) if value.is_null() => {}
        Rule::List(ours) => plan.set(ours, listed(value, "-")),
        Rule::Ranges(ours) => plan.set(ours, listed(value, "..")),
        Rule::Word(ours, words) => {
            let word = words.iter().find(|(theirs, _)| *theirs == text).map(|(_, ours)| *ours);
            plan.set(ours, word.unwrap_or(&text));
        }
        Rule::Temperature => {
            let unused = case.options.get("kind").and_then(Value::as_str) == Some("sortcut");
            plan.set("temperature", if unused { "1" } else { &text });
        }
        Rule::Square(ours) => match plan.options.0.get(ours) {
            Some(other) if *other != text => {
                return Err(format!("`{key}` is {text} beside {other}; {} has one `{ours}`", plan.ours));
            }
            _ => plan.set(ours, text),
        },
        Rule::Decays => match (plan.inputs.get("log_decay"), text.as_str()) {
            (Some(_), _) => {}
            (None, "1 - 2^(-5-h)") => plan.set("gammas", "fla"),
            (None, other) => return Err(format!("{} has no decays like {other}", plan.ours)),
        },
    }
    Ok(())
}

/// Numbers, or pairs of them joined by `between`, as one would write them after `--set key=`.
fn listed(value: &Value, between: &str) -> String {
    let one = |x: &Value| match x.as_array() {
        Some(pair) => pair.iter().map(plain).collect::<Vec<_>>().join(between),
        None => plain(x),
    };
    match value.as_array().map(Vec::as_slice) {
        None => plain(value),
        Some([]) => "none".to_string(),
        Some(all) => all.iter().map(one).collect::<Vec<_>>().join(","),
    }
}

/// A value as one would write it after `--set key=`.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}
