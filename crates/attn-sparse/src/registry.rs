//! The sparse variants by name.

use crate::{ChunkedCausal, Pattern, SinkWindow, SlidingWindow, SparseAttention};
use attn_core::registry::{Entry, OptionSpec, Options, run_qkv};
use attn_core::{Attention, AttnError, Family, Result};

/// Every variant of this crate.
pub fn registry() -> Vec<Entry> {
    vec![
        Entry {
            name: SlidingWindow::NAME,
            family: Family::Sparse,
            summary: "Keys near the query (Child et al. 2019; Beltagy et al. 2020)",
            options: &[
                OptionSpec { name: "causal", default: "false", help: "no key after the query (true|false)" },
                OptionSpec {
                    name: "window",
                    default: "512",
                    help: "keys on each side of the query, its own included (1 sees itself alone)",
                },
                OptionSpec {
                    name: "window_left",
                    default: "",
                    help: "keys before the query, instead of window - 1",
                },
                OptionSpec {
                    name: "window_right",
                    default: "",
                    help: "keys after the query, instead of window - 1",
                },
                OptionSpec::SCALE,
            ],
            constructor: |options| build(options, sliding_window(options)?),
            runner: run_qkv,
        },
        Entry {
            name: SinkWindow::NAME,
            family: Family::Sparse,
            summary: "The first keys and the last ones, causal (StreamingLLM, Xiao et al. 2024)",
            options: &[
                OptionSpec {
                    name: "n_sinks",
                    default: "4",
                    help: "keys at the start that every later query sees",
                },
                OptionSpec {
                    name: "window",
                    default: "512",
                    help: "last keys seen, the query's own included",
                },
                OptionSpec::SCALE,
            ],
            constructor: |options| {
                if !options.get_or("causal", true)? {
                    return Err(AttnError::unsupported(SinkWindow::NAME, "`causal=false`"));
                }
                build(
                    options,
                    SinkWindow {
                        n_sinks: options.get_or("n_sinks", 4)?,
                        window: at_least_1(options, "window")?,
                    },
                )
            },
            runner: run_qkv,
        },
        Entry {
            name: ChunkedCausal::NAME,
            family: Family::Sparse,
            summary: "Keys of the query's own chunk, causal (Llama 4's local layers, Meta 2025)",
            options: &[
                OptionSpec { name: "chunk_len", default: "512", help: "positions of a chunk" },
                OptionSpec::SCALE,
            ],
            constructor: |options| {
                build(options, ChunkedCausal { chunk_len: at_least_1(options, "chunk_len")? })
            },
            runner: run_qkv,
        },
    ]
}

fn build<P: Pattern>(options: &Options, pattern: P) -> Result<Box<dyn Attention>> {
    Ok(Box::new(SparseAttention { pattern, softmax_scale: options.get("scale")? }))
}

/// A length with the default 512; 0 would hide even a query's own key.
fn at_least_1(options: &Options, name: &str) -> Result<usize> {
    match options.get_or(name, 512)? {
        0 => Err(AttnError::value(format!("option `{name}`"), 0, "at least 1: a query's own key")),
        length => Ok(length),
    }
}

fn sliding_window(options: &Options) -> Result<SlidingWindow> {
    let (causal, side) = (options.get_or("causal", false)?, at_least_1(options, "window")? - 1);
    let right = options.get("window_right")?;
    if causal && right.is_some_and(|right: usize| right > 0) {
        return Err(AttnError::value("option `window_right`", right.unwrap_or(0), "0 with `causal=true`"));
    }
    let right = right.unwrap_or(if causal { 0 } else { side });
    Ok(SlidingWindow { left: options.get_or("window_left", side)?, right })
}
