//! The variants by name.

use super::aft_simple::AftSimple;
use super::hgrn::Hgrn;
use super::longhorn::Longhorn;
use super::mamba1::Mamba1;
use super::min_gru::MinGru;
use super::rg_lru::RgLru;
use super::runners;
use super::rwkv4::Rwkv4;
use crate::named::check_causal;
use crate::packed;
use crate::scan::{ScanAttention, ScanVariant};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options, run_qkv};
use attn_core::{Attention, Family, Result};

const CAUSAL: OptionSpec =
    OptionSpec { name: "causal", default: "true", help: "always true: the recurrence has no other form" };

/// A variant that has no other form, once `causal` is checked.
fn causal<V: ScanVariant>(options: &Options, variant: V) -> Result<Box<dyn Attention>> {
    check_causal(V::NAME, options)?;
    variant.cell(1, 1, 1)?;
    Ok(Box::new(ScanAttention::new(variant)))
}

/// On q, k and v alone as any attention; with the tensor `own` on the variant's own inputs.
fn run(
    own: &str,
    runner: fn(&NamedTensors) -> Result<NamedTensors>,
    (entry, options, tensors): (&Entry, &Options, &NamedTensors),
) -> Result<NamedTensors> {
    if tensors.get(own).is_none() {
        return packed::run(run_qkv, (entry, options, tensors));
    }
    entry.build(options)?;
    runner(tensors)
}

pub(crate) fn entries() -> Vec<Entry> {
    let [aft_full, aft_local] = super::aft_full::entries();
    vec![
        aft_full,
        aft_local,
        Entry {
            name: "hgrn",
            family: Family::Linear,
            summary: "HGRN: a gated linear recurrence a channel (Qin et al. 2023)",
            options: &[
                CAUSAL,
                OptionSpec { name: "lower_bound", default: "0", help: "smallest forget gate, on q, k, v" },
            ],
            constructor: |options| causal(options, Hgrn { lower_bound: options.get_or("lower_bound", 0.0)? }),
            runner: |entry, options, tensors| run("x", runners::hgrn, (entry, options, tensors)),
        },
        Entry {
            name: "mingru",
            family: Family::Linear,
            summary: "minGRU: a recurrent unit whose gates do not look at the state (Feng et al. 2024)",
            options: &[CAUSAL],
            constructor: |options| causal(options, MinGru),
            runner: |entry, options, tensors| run("candidate", runners::min_gru, (entry, options, tensors)),
        },
        Entry {
            name: "rglru",
            family: Family::Linear,
            summary: "RG-LRU: the real-gated linear recurrent unit of Griffin (De et al. 2024)",
            options: &[CAUSAL],
            constructor: |options| causal(options, RgLru),
            runner: |entry, options, tensors| run("x", runners::rg_lru, (entry, options, tensors)),
        },
        Entry {
            name: "mamba1",
            family: Family::Linear,
            summary: "Mamba-1 (S6): a selective state space a channel (Gu and Dao 2023)",
            options: &[CAUSAL],
            constructor: |options| causal(options, Mamba1),
            runner: |entry, options, tensors| run("u", runners::mamba1, (entry, options, tensors)),
        },
        Entry {
            name: "longhorn",
            family: Family::Linear,
            summary: "Longhorn: each value channel is learned online, implicitly (Liu et al. 2024)",
            options: &[
                CAUSAL,
                OptionSpec { name: "beta", default: "0.5", help: "write strength of all tokens, on q, k, v" },
            ],
            constructor: |options| causal(options, Longhorn { beta: options.get_or("beta", 0.5)? }),
            runner: |entry, options, tensors| run("x", runners::longhorn, (entry, options, tensors)),
        },
        Entry {
            name: "rwkv4",
            family: Family::Linear,
            summary: "RWKV-4: a fading running softmax a channel (Peng et al. 2023)",
            options: &[CAUSAL],
            constructor: |options| causal(options, Rwkv4),
            runner: |entry, options, tensors| run("time_decay", runners::rwkv4, (entry, options, tensors)),
        },
        Entry {
            name: "aft-simple",
            family: Family::Linear,
            summary: "AFT-simple: softmax of the keys a channel, gated by the query (Zhai et al. 2021)",
            options: &[OptionSpec::CAUSAL],
            constructor: |options| Ok(Box::new(AftSimple { causal: options.get_or("causal", false)? })),
            runner: |entry, options, tensors| packed::run(runners::aft_simple, (entry, options, tensors)),
        },
    ]
}
