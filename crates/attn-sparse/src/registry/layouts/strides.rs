//! Sparse Transformer.

use super::super::{at_least_1, build, only_causal};
use super::{build_parted, length};
use crate::{FixedAttention, Pattern, StridedAttention};
use attn_core::registry::{Entry, OptionSpec, run_qkv};
use attn_core::{AttnError, Family};

const MERGED: OptionSpec = OptionSpec {
    name: "merged",
    default: "true",
    help: "every head sees both sets; otherwise even heads the first, odd ones the second (true|false)",
};

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: <StridedAttention as Pattern>::NAME,
            family: Family::Sparse,
            summary: "A window and every stride-th key before, causal (Child et al. 2019)",
            options: &[
                OptionSpec {
                    name: "stride",
                    default: "",
                    help: "keys of the window, and distance of the others; default about sqrt(n_kv)",
                },
                MERGED,
                OptionSpec::SCALE,
            ],
            constructor: |options| {
                only_causal(options, StridedAttention::NAME)?;
                let merged = options.get_or("merged", true)?;
                build_parted(options, StridedAttention { stride: length(options, "stride")?, merged })
            },
            runner: run_qkv,
        },
        Entry {
            name: <FixedAttention as Pattern>::NAME,
            family: Family::Sparse,
            summary: "The own block and the last keys of blocks before, causal (Child et al. 2019)",
            options: &[
                OptionSpec {
                    name: "stride",
                    default: "",
                    help: "positions of a block; default about sqrt(n_kv)",
                },
                OptionSpec {
                    name: "summary",
                    default: "32",
                    help: "last positions of a block that later queries see",
                },
                MERGED,
                OptionSpec::SCALE,
            ],
            constructor: |options| {
                only_causal(options, FixedAttention::NAME)?;
                let (stride, summary) = (length(options, "stride")?, at_least_1(options, "summary", 32)?);
                if let Some(stride) = stride.filter(|stride| summary > *stride) {
                    let expected = format!("at most the stride, {stride}");
                    return Err(AttnError::value("option `summary`", summary, expected));
                }
                build(options, FixedAttention { stride, summary, merged: options.get_or("merged", true)? })
            },
            runner: run_qkv,
        },
    ]
}
