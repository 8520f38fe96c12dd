//! Selection while decoding, by notes of pages or of single tokens.

use super::named::option;
use super::routed::{CAUSAL, routed};
use super::{at_least_1, length, only_causal};
use crate::{ArkVale, DoubleSparsity, InfLlmMemory, Loki, PageScorer, Pages, Routed, Router, Volume};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options, run_built, run_qkv};
use attn_core::{AttnError, Family, Result};

const TOP_K: OptionSpec = option("top_k", "1024", "keys that a query takes");
const CALIBRATION_LEN: OptionSpec = option(
    "calibration_len",
    "",
    "first keys from which channels or axes are found, attended by all that see no more; default top_k",
);

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: <ArkVale as PageScorer>::NAME,
            family: Family::Sparse,
            summary: "Pages by the largest score in a volume around their keys (ArkVale, Chen et al. 2024)",
            options: const {
                &[
                    CAUSAL,
                    option("page_len", "32", "keys of a page"),
                    option("token_budget", "1024", "keys that a query takes, in whole pages"),
                    option("first_pages", "2", "first pages, taken by every query"),
                    option("last_pages", "2", "last pages, taken by every query, its own included"),
                    option("volume", "box", "what encloses the keys of a page (box|ball)"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| routed(options, ark_vale(options)?),
            runner: run_qkv,
        },
        Entry {
            name: <DoubleSparsity as PageScorer>::NAME,
            family: Family::Sparse,
            summary: "Tokens by a few channels of queries and keys (Double Sparsity, Yang et al. 2024)",
            options: const {
                &[
                    CAUSAL,
                    TOP_K,
                    option("label_dim", "", "channels of a label; default an eighth of head_dim"),
                    CALIBRATION_LEN,
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| routed(options, double_sparsity(options)?),
            runner: run_double_sparsity,
        },
        Entry {
            name: <InfLlmMemory as Router>::NAME,
            family: Family::Sparse,
            summary: "Blocks by their representative keys (InfLLM, Xiao et al. 2024)",
            options: const {
                &[
                    CAUSAL,
                    option("block_len", "128", "keys of a block"),
                    option("n_representatives", "4", "keys that stand for a block"),
                    option("top_k", "49", "blocks that a query sees"),
                    option("init_blocks", "1", "first blocks, seen by every query"),
                    option(
                        "local_blocks",
                        "32",
                        "last blocks, seen by every query, its own included; 2 at least",
                    ),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| routed(options, infllm(options)?),
            runner: run_qkv,
        },
        Entry {
            name: <Loki as PageScorer>::NAME,
            family: Family::Sparse,
            summary: "Tokens by coordinates along the keys' principal axes (Loki, Singhania et al. 2024)",
            options: const {
                &[
                    CAUSAL,
                    TOP_K,
                    option("rank", "", "axes; default a quarter of head_dim"),
                    CALIBRATION_LEN,
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| routed(options, loki(options)?),
            runner: run_loki,
        },
    ]
}

fn ark_vale(options: &Options) -> Result<ArkVale> {
    let default = ArkVale::default();
    let page_len = at_least_1(options, "page_len", default.pages.page_len)?;
    let (first, last) = (options.get_or("first_pages", 2)?, options.get_or("last_pages", 2)?);
    let volume = match options.get::<String>("volume")?.as_deref() {
        None | Some("box") => Volume::Box,
        Some("ball") => Volume::Ball,
        Some(other) => return Err(AttnError::value("option `volume`", format!("`{other}`"), "box or ball")),
    };
    let pages = Pages { page_len, n_pages: options.get_or("token_budget", 1024)? / page_len, first, last };
    pages.check()?;
    Ok(ArkVale { pages, volume })
}

fn double_sparsity(options: &Options) -> Result<DoubleSparsity> {
    let (top_k, calibration_len) = calibrated(options)?;
    Ok(DoubleSparsity { top_k, label_dim: length(options, "label_dim")?, calibration_len, channels: None })
}

fn loki(options: &Options) -> Result<Loki> {
    let (top_k, calibration_len) = calibrated(options)?;
    Ok(Loki { top_k, rank: length(options, "rank")?, calibration_len, axes: None })
}

/// Keys that a query takes, and keys to learn from.
fn calibrated(options: &Options) -> Result<(usize, usize)> {
    let top_k = at_least_1(options, TOP_K.name, 1024)?;
    Ok((top_k, at_least_1(options, CALIBRATION_LEN.name, top_k)?))
}

fn infllm(options: &Options) -> Result<InfLlmMemory> {
    let default = InfLlmMemory::default();
    let infllm = InfLlmMemory {
        block_len: at_least_1(options, "block_len", default.block_len)?,
        n_representatives: at_least_1(options, "n_representatives", default.n_representatives)?,
        n_blocks: at_least_1(options, "top_k", default.n_blocks)?,
        init_blocks: options.get_or("init_blocks", default.init_blocks)?,
        local_blocks: options.get_or("local_blocks", default.local_blocks)?,
    };
    infllm.check()?;
    Ok(infllm)
}

/// `q`, `k`, `v`, and perhaps the channels of each key/value head, `channels [n_heads_kv, label_dim]`.
fn run_double_sparsity(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let Some((shape, channels)) = tensors.i32("channels")? else {
        return run_qkv(entry, options, tensors);
    };
    tensors.only(entry.name, &["q", "k", "v", "grad_o", "channels"])?;
    only_causal(options, entry.name)?;
    let mut router = double_sparsity(options)?;
    let channel = |x: &i32| usize::try_from(*x).map_err(|_| AttnError::value("channels", x, "not negative"));
    router.label_dim = shape.last().copied();
    router.channels = Some(channels.iter().map(channel).collect::<Result<_>>()?);
    run_built(&Routed { router, softmax_scale: options.get("scale")? }, tensors)
}

/// `q`, `k`, `v`, and perhaps the axes of each key/value head, `axes [n_heads_kv, head_dim, rank]`.
fn run_loki(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let Some((shape, axes)) = tensors.f32("axes")? else { return run_qkv(entry, options, tensors) };
    tensors.only(entry.name, &["q", "k", "v", "grad_o", "axes"])?;
    only_causal(options, entry.name)?;
    let mut router = loki(options)?;
    (router.rank, router.axes) = (shape.last().copied(), Some(axes.into()));
    run_built(&Routed { router, softmax_scale: options.get("scale")? }, tensors)
}
