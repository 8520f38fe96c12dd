//! The exact variants by name.

mod biases;
mod by_sequence;
mod dropout;
mod formula;
mod gradients;
mod masks;
mod norm;
mod options;
mod run;
mod sequences;

pub use formula::{FormulaMask, FormulaScore};

use crate::Naive;
use attn_core::Family;
use attn_core::registry::{Entry, OptionSpec, run_qkv};

/// Every variant of this crate.
pub fn registry() -> Vec<Entry> {
    vec![
        Entry {
            name: "flash",
            family: Family::Exact,
            summary: "Exact softmax attention by tiles, online softmax (Vaswani et al. 2017; Dao et al. 2022)",
            options: options::ALL,
            constructor: |options| Ok(Box::new(options::attention(options)?)),
            runner: |_, options, tensors| run::run(options, tensors),
        },
        Entry {
            name: "naive",
            family: Family::Exact,
            summary: "Exact softmax attention row by row in plain loops, to compare with (Vaswani et al. 2017)",
            options: &[OptionSpec::CAUSAL, OptionSpec::SCALE],
            constructor: |options| {
                let causal = options.get_or("causal", false)?;
                Ok(Box::new(Naive { softmax_scale: options.get("scale")?, causal }))
            },
            runner: run_qkv,
        },
    ]
}
