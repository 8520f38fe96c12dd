//! The hierarchical variants by name.

use crate::HTransformer;
use attn_core::Family;
use attn_core::registry::{Entry, OptionSpec, run_qkv};

/// Every variant of this crate.
pub fn registry() -> Vec<Entry> {
    vec![Entry {
        name: "h-transformer-1d",
        family: Family::Hier,
        summary: "Near keys one by one, far ones by means over doubling blocks (Zhu and Soricut 2021)",
        options: &[
            OptionSpec::CAUSAL,
            OptionSpec {
                name: "block_size",
                default: "64",
                help: "nodes of a block, even: a query sees its own block and both neighbours token by token",
            },
            OptionSpec::SCALE,
        ],
        constructor: |options| {
            let block_size = options.get_or("block_size", HTransformer::DEFAULT_BLOCK)?;
            let variant = HTransformer::new(block_size)?.with_causal(options.get_or("causal", false)?);
            Ok(Box::new(match options.get("scale")? {
                Some(scale) => variant.with_softmax_scale(scale)?,
                None => variant,
            }))
        },
        runner: run_qkv,
    }]
}
