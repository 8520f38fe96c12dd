//! Windows and chunks.

use super::{at_least_1, build, only_causal};
use crate::{ChunkedCausal, Pattern, SinkWindow, SlidingWindow};
use attn_core::registry::{Entry, OptionSpec, Options, run_qkv};
use attn_core::{AttnError, Family, Result};

pub(super) fn entries() -> Vec<Entry> {
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
                only_causal(options, SinkWindow::NAME)?;
                build(
                    options,
                    SinkWindow {
                        n_sinks: options.get_or("n_sinks", 4)?,
                        window: at_least_1(options, "window", 512)?,
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
                build(options, ChunkedCausal { chunk_len: at_least_1(options, "chunk_len", 512)? })
            },
            runner: run_qkv,
        },
    ]
}

fn sliding_window(options: &Options) -> Result<SlidingWindow> {
    let (causal, side) = (options.get_or("causal", false)?, at_least_1(options, "window", 512)? - 1);
    let right = options.get("window_right")?;
    if causal && right.is_some_and(|right: usize| right > 0) {
        return Err(AttnError::value("option `window_right`", right.unwrap_or(0), "0 with `causal=true`"));
    }
    let right = right.unwrap_or(if causal { 0 } else { side });
    Ok(SlidingWindow { left: options.get_or("window_left", side)?, right })
}
