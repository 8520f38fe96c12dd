//! What a registry is asked to compute a case, and what it gives in the file's own terms.

use super::{GoldenCase, forms};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options};
use attn_core::{AttnError, Result};
use std::collections::BTreeMap;

/// How one case is computed: the result of a mapping from the file's names and options to ours.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Our variant.
    pub ours: &'static str,
    /// Its options.
    pub options: Options,
    /// Its tensors, under our names, in the case's storage type.
    pub inputs: NamedTensors,
    /// Results that the file calls something else: its name (`sT`, `grad.table`), then ours.
    pub renamed: BTreeMap<String, String>,
    /// Results of ours that are multiplied with a number in the file.
    pub factors: BTreeMap<String, f32>,
    /// How it runs.
    pub form: Form,
    /// What a reader of the verdict should know.
    pub notes: Vec<String>,
}

/// How a case runs.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// One call.
    Call,
    /// One call, and a stream appended in these pieces.
    Stream(Vec<usize>),
    /// One call, and a merge of the file's partial results `aux.part_out`, `aux.part_lse`.
    Merge,
    /// The ONNX operator around one call.
    Onnx(Onnx),
}

/// What the ONNX `Attention` operator does besides attending.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Onnx {
    /// Outputs are `(batch, length, heads * width)`.
    pub folded: bool,
    /// Outputs that are inputs: `present_key`, `present_value`.
    pub present: NamedTensors,
    /// A call whose attention weights are asked for as `qk_matmul_output`.
    pub weights: Option<Weights>,
}

/// Attention weights or scores: what a call gives for values that are unit vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// Options of that call.
    pub options: Options,
    /// Its tensors, without `v`.
    pub inputs: NamedTensors,
    /// The scores `ln p + lse` instead of the weights `p`.
    pub scores: bool,
}

/// One way in which a case was computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Computed {
    /// `streamed`, `merged`; empty for the plain call.
    pub label: &'static str,
    /// Results under the file's names: outputs, and gradients as `grad.NAME`.
    pub tensors: NamedTensors,
}

/// What running a plan gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The plain call first.
    pub computed: Vec<Computed>,
    /// Why there are no gradients, if the file holds some.
    pub no_gradients: Option<String>,
}

impl Plan {
    /// A plan of one call, without options and tensors yet.
    pub fn new(ours: &'static str) -> Self {
        Self {
            ours,
            options: Options::new(),
            inputs: NamedTensors::default(),
            renamed: BTreeMap::new(),
            factors: BTreeMap::new(),
            form: Form::Call,
            notes: Vec::new(),
        }
    }

    /// Sets an option.
    pub fn set(&mut self, key: &str, value: impl ToString) {
        self.options.0.insert(key.into(), value.to_string());
    }

    /// Gives the tensor that the file calls `theirs` under our name, and expects its gradient back.
    pub fn give(&mut self, theirs: &str, ours: &str, tensor: NamedTensor) {
        self.inputs.0.insert(ours.into(), tensor);
        if theirs != ours {
            self.renamed.insert(format!("grad.{theirs}"), format!("grad.{ours}"));
        }
    }

    /// Runs the plan, with gradients if the file holds any and the variant has a backward pass.
    ///
    /// # Errors
    /// Those of the variant; [`AttnError`] for a case that does not hold what its form needs.
    pub fn run(&self, entry: &Entry, case: &GoldenCase) -> Result<Outcome> {
        let (called, no_gradients) = self.call(entry, case)?;
        let mut computed = vec![Computed { label: "", tensors: called }];
        match &self.form {
            Form::Call => {}
            Form::Stream(pieces) => {
                let tensors = forms::stream(entry, self, pieces)?;
                computed.push(Computed { label: "streamed", tensors });
            }
            Form::Merge => computed.push(Computed { label: "merged", tensors: forms::merge(case)? }),
            Form::Onnx(onnx) => forms::finish_onnx(entry, onnx, &mut computed[0].tensors)?,
        }
        Ok(Outcome { computed, no_gradients })
    }

    /// The plain call in the file's terms, and why it has no gradients.
    fn call(&self, entry: &Entry, case: &GoldenCase) -> Result<(NamedTensors, Option<String>)> {
        let (Some(w), false) = (&case.w, case.grads.0.is_empty()) else {
            return Ok((self.in_their_terms(case, entry.run(&self.options, &self.inputs)?), None));
        };
        let mut inputs = self.inputs.clone();
        // Some variants have no queries.
        let dtype = inputs.get("q").or(inputs.0.values().next()).and_then(|tensor| tensor.data.dtype());
        let grad_o = dtype.map_or_else(|| w.clone(), |dtype| w.rounded(dtype));
        inputs.0.insert("grad_o".into(), grad_o);
        match entry.run(&self.options, &inputs) {
            Ok(given) => Ok((self.in_their_terms(case, given), None)),
            Err(AttnError::Unsupported { what, .. }) => {
                let given = entry.run(&self.options, &self.inputs)?;
                let none = what.contains("`grad_o`") || what.contains("no backward");
                let why = if none { "has no backward".into() } else { format!("does not support {what}") };
                Ok((self.in_their_terms(case, given), Some(format!("{} {why}", entry.name))))
            }
            Err(other) => Err(other),
        }
    }

    /// Results under the file's names, in its shapes where names differ, multiplied as it multiplies.
    fn in_their_terms(&self, case: &GoldenCase, mut given: NamedTensors) -> NamedTensors {
        for (name, factor) in &self.factors {
            given.0.get_mut(name).into_iter().for_each(|tensor| tensor.scale(*factor));
        }
        for (theirs, ours) in &self.renamed {
            let Some(mut tensor) = given.0.remove(ours) else { continue };
            let wanted = match theirs.strip_prefix("grad.") {
                Some(input) => case.inputs.get(input),
                None => case.outputs.get(theirs),
            };
            if let Some(wanted) = wanted
                && wanted.shape.iter().product::<usize>() == tensor.shape.iter().product::<usize>()
            {
                tensor.shape.clone_from(&wanted.shape);
            }
            given.0.insert(theirs.clone(), tensor);
        }
        given
    }
}
