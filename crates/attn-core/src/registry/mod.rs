//! Variants by name: what the conformance suite, the benches and the `attn` program are driven by.
//!
//! A variant crate exports `registry() -> Vec<Entry>`. An [`Entry`] knows the variant's options with their
//! defaults, builds it from `key=value` pairs, and runs it on named tensors (so that gates, masks and weights can
//! come from a file).
//!
//! Names of tensors that every variant shares: `q`, `k`, `v` in, `o` out, and `lse` where rows are softmax rows. A runner
//! that is also given `grad_o`, the gradient of a loss with respect to `o` in `o`'s shape and dtype, also returns `grad.NAME`
//! for every differentiable input it was given (`grad.q`, `grad.k`, `grad.v`, `grad.sinks`, `grad.bias`,
//! `grad.initial_state`, ...), each of its input's shape; a variant without a backward pass refuses `grad_o` with
//! [`AttnError::Unsupported`]. [`run_qkv`] does so for every variant whose
//! [`as_differentiable`](Attention::as_differentiable) is there.

mod options;
mod run;
mod tensors;

pub use options::Options;
pub use run::{gradients, no_backward, run_built, run_qkv};
pub use tensors::{NamedTensor, NamedTensors, TensorData, output_like};

use crate::{Attention, AttnError, Family, Result};

/// One option of a variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct OptionSpec {
    /// Its key.
    pub name: &'static str,
    /// Its value when not given, as it would be written; empty for "none".
    pub default: &'static str,
    /// One line of help.
    pub help: &'static str,
}

impl OptionSpec {
    /// `causal`, off unless given.
    pub const CAUSAL: Self = Self {
        name: "causal",
        default: "false",
        help: "a query sees no key after its position (true|false)",
    };

    /// `scale` of softmax scores.
    pub const SCALE: Self =
        Self { name: "scale", default: "", help: "multiplies raw dot products; default 1/sqrt(head_dim)" };
}

/// A registered variant.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Stable kebab-case name.
    pub name: &'static str,
    /// Its family.
    pub family: Family,
    /// One line: what it does, and from which paper.
    pub summary: &'static str,
    /// Its options.
    pub options: &'static [OptionSpec],
    /// Builds the variant. Called through [`Entry::build`], which has checked the names of the options.
    pub constructor: fn(&Options) -> Result<Box<dyn Attention>>,
    /// Runs it on named tensors; [`run_qkv`] for variants whose inputs are q, k and v alone.
    pub runner: fn(&Entry, &Options, &NamedTensors) -> Result<NamedTensors>,
}

impl Entry {
    /// The variant configured by `options`.
    ///
    /// # Errors
    /// [`AttnError::Value`] for an option that the variant does not have (naming those it has) or a value that
    /// cannot be read.
    pub fn build(&self, options: &Options) -> Result<Box<dyn Attention>> {
        self.check(options)?;
        (self.constructor)(options)
    }

    /// Runs the variant on `q`, `k`, `v` and what else it knows, returns `o` and what else it gives (`lse`, `sT`).
    ///
    /// # Errors
    /// As [`Entry::build`]; [`AttnError::Missing`] for a tensor that is not there.
    pub fn run(&self, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
        self.check(options)?;
        (self.runner)(self, options, tensors)
    }

    /// The options with their defaults filled in.
    pub fn defaults(&self) -> Options {
        let given = self.options.iter().filter(|o| !o.default.is_empty());
        Options(given.map(|o| (o.name.to_string(), o.default.to_string())).collect())
    }

    fn check(&self, options: &Options) -> Result<()> {
        let unknown = options.0.keys().find(|key| !self.options.iter().any(|o| o.name == **key));
        let Some(key) = unknown else { return Ok(()) };
        let known: Vec<&str> = self.options.iter().map(|o| o.name).collect();
        Err(AttnError::value(
            format!("option `{key}` of {}", self.name),
            "unknown",
            format!("one of: {}", known.join(", ")),
        ))
    }
}

/// Finds an entry by name.
///
/// # Errors
/// [`AttnError::Value`] that lists the known names.
pub fn find<'a>(entries: &'a [Entry], name: &str) -> Result<&'a Entry> {
    entries.iter().find(|e| e.name == name).ok_or_else(|| {
        let known: Vec<&str> = entries.iter().map(|e| e.name).collect();
        AttnError::value("variant", name, format!("one of: {}", known.join(", ")))
    })
}
