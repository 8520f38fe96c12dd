//! Content-based selection for prompts.
//!
//! Runners also take the choice itself, under the names of the golden files: `block_mask [batch, n_heads_q, rows, columns]` of
//! blocks, `mask [batch, n_heads_q, n_q, n_kv]` of pairs, or `vertical` and `slash [batch, heads, lines]`.

use super::given::{given_blocks, run_given};
use super::named::{CAUSAL, option};
use super::{at_least_1, build, only_causal};
use crate::prefill::{
    ExactTopK, FlexPrefill, Lines, MInferenceBlockSparse, SpargeAttn, VerticalSlash, XAttention,
};
use crate::{BlockSizes, Decider, Decision};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, OptionSpec, Options};
use attn_core::{AttnError, AttnShape, Family, Result};

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: ExactTopK::NAME,
            family: Family::Sparse,
            summary: "The keys of largest score of each query, exactly (Zhao et al. 2019; Gupta et al. 2021)",
            options: const { &[OptionSpec::CAUSAL, option("topk", "64", "keys of each query"), OptionSpec::SCALE] },
            constructor: |options| build(options, exact_top_k(options)?),
            runner: run_top_k,
        },
        Entry {
            name: VerticalSlash::NAME,
            family: Family::Sparse,
            summary: "Keys and distances that the last queries attend, for all (MInference, Jiang et al. 2024)",
            options: const {
                &[
                    option(
                        "num_vertical",
                        "1000",
                        "keys that all later queries see, the forced ones among them",
                    ),
                    option(
                        "num_slash",
                        "6096",
                        "distances at which all queries see, the forced ones among them",
                    ),
                    option("forced_vertical", "30", "keys at the start that are always among them"),
                    option("forced_slash", "100", "shortest distances that are always among them"),
                    option("last_q", "64", "last queries whose probabilities are summed"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| build(options, vertical_slash(options)?),
            runner: run_lines,
        },
        Entry {
            name: MInferenceBlockSparse::NAME,
            family: Family::Sparse,
            summary: "The best blocks of keys by the means of blocks (MInference, Jiang et al. 2024)",
            options: const {
                &[
                    CAUSAL,
                    option("block_q", "64", "queries of a block"),
                    option("block_kv", "64", "keys of a block"),
                    option("topk_blocks", "100", "blocks of keys of each block of queries"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| build(options, minference(options)?),
            runner: |entry, options, tensors| {
                let decider = minference(options)?;
                run_blocks(entry, options, tensors, decider.sizes, decider.causal)
            },
        },
        Entry {
            name: FlexPrefill::NAME,
            family: Family::Sparse,
            summary: "Columns and diagonals of blocks, or blocks by means, by head (Lai et al. 2025)",
            options: const {
                &[
                    option("block", "128", "queries, and keys, of a block"),
                    option("gamma", "0.9", "share of the mass that columns, and diagonals, have to hold"),
                    option("tau", "0.1", "heads whose estimate is closer than this choose single blocks"),
                    option("min_budget", "8", "fewest columns, and diagonals, of blocks"),
                    option("max_budget", "", "most columns, and diagonals, of blocks; none is no bound"),
                    option("budget_tokens", "128", "tokens for which the budget counts one block"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| build(options, flex_prefill(options)?),
            runner: |entry, options, tensors| {
                let sizes = BlockSizes::square(flex_prefill(options)?.block);
                run_blocks(entry, options, tensors, sizes, true)
            },
        },
        Entry {
            name: XAttention::NAME,
            family: Family::Sparse,
            summary: "The fewest blocks that hold a share of the mass on antidiagonals (Xu et al. 2025)",
            options: const {
                &[
                    CAUSAL,
                    option("block", "128", "queries, and keys, of a block; a multiple of stride"),
                    option("stride", "16", "every so many antidiagonals one is summed"),
                    option("threshold", "0.9", "share of the mass, from 0 to 1"),
                    option("norm", "1", "divides the estimated scores"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| build(options, x_attention(options)?),
            runner: |entry, options, tensors| {
                let decider = x_attention(options)?;
                run_blocks(entry, options, tensors, BlockSizes::square(decider.block), decider.causal)
            },
        },
        Entry {
            name: SpargeAttn::NAME,
            family: Family::Sparse,
            summary: "Blocks by the mass of their means, and all whose rows are not alike (Zhang et al. 2025)",
            options: const {
                &[
                    CAUSAL,
                    option("block_q", "128", "queries of a block"),
                    option("block_kv", "64", "keys of a block"),
                    option("similarity", "0.6", "blocks whose mean cosine is not above are always attended"),
                    option("cdf", "0.98", "share of the mass of the others, from 0 to 1"),
                    option("lambda", "", "second stage: blocks this far below the largest score are dropped"),
                    OptionSpec::SCALE,
                ]
            },
            constructor: |options| build(options, sparge(options)?),
            runner: |entry, options, tensors| {
                let decider = sparge(options)?;
                run_blocks(entry, options, tensors, decider.sizes, decider.causal)
            },
        },
    ]
}

fn exact_top_k(options: &Options) -> Result<ExactTopK> {
    let top_k = at_least_1(options, "topk", 64)?;
    Ok(ExactTopK { causal: options.get_or("causal", false)?, top_k, softmax_scale: options.get("scale")? })
}

fn vertical_slash(options: &Options) -> Result<VerticalSlash> {
    only_causal(options, VerticalSlash::NAME)?;
    let usual = VerticalSlash::default();
    Ok(VerticalSlash {
        num_vertical: options.get_or("num_vertical", usual.num_vertical)?,
        num_slash: options.get_or("num_slash", usual.num_slash)?,
        forced_vertical: options.get_or("forced_vertical", usual.forced_vertical)?,
        forced_slash: options.get_or("forced_slash", usual.forced_slash)?,
        last_q: at_least_1(options, "last_q", usual.last_q)?,
        softmax_scale: options.get("scale")?,
    })
}

fn sizes(options: &Options, usual: BlockSizes) -> Result<BlockSizes> {
    let q = at_least_1(options, "block_q", usual.q)?;
    Ok(BlockSizes { q, kv: at_least_1(options, "block_kv", usual.kv)? })
}

fn minference(options: &Options) -> Result<MInferenceBlockSparse> {
    let usual = MInferenceBlockSparse::default();
    Ok(MInferenceBlockSparse {
        causal: options.get_or("causal", usual.causal)?,
        sizes: sizes(options, usual.sizes)?,
        top_k: at_least_1(options, "topk_blocks", usual.top_k)?,
        softmax_scale: options.get("scale")?,
    })
}

fn flex_prefill(options: &Options) -> Result<FlexPrefill> {
    let usual = FlexPrefill::default();
    Ok(FlexPrefill {
        block: at_least_1(options, "block", usual.block)?,
        gamma: share(options, "gamma", usual.gamma)?,
        tau: share(options, "tau", usual.tau)?,
        min_budget: at_least_1(options, "min_budget", usual.min_budget)?,
        max_budget: options.get("max_budget")?,
        budget_tokens: at_least_1(options, "budget_tokens", usual.budget_tokens)?,
        softmax_scale: options.get("scale")?,
    })
}

fn x_attention(options: &Options) -> Result<XAttention> {
    let usual = XAttention::default();
    let (block, stride) =
        (at_least_1(options, "block", usual.block)?, at_least_1(options, "stride", usual.stride)?);
    if !block.is_multiple_of(stride) {
        return Err(AttnError::value("option `block`", block, format!("a multiple of stride = {stride}")));
    }
    Ok(XAttention {
        causal: options.get_or("causal", usual.causal)?,
        block,
        stride,
        threshold: share(options, "threshold", usual.threshold)?,
        norm: options.get_or("norm", usual.norm)?,
        softmax_scale: options.get("scale")?,
    })
}

fn sparge(options: &Options) -> Result<SpargeAttn> {
    let usual = SpargeAttn::default();
    Ok(SpargeAttn {
        causal: options.get_or("causal", usual.causal)?,
        sizes: sizes(options, usual.sizes)?,
        similarity: options.get_or("similarity", usual.similarity)?,
        cdf: share(options, "cdf", usual.cdf)?,
        lambda: options.get("lambda")?,
        softmax_scale: options.get("scale")?,
    })
}

/// An option from 0 to 1.
fn share(options: &Options, name: &str, default: f64) -> Result<f64> {
    let share = options.get_or(name, default)?;
    match (0.0..=1.0).contains(&share) {
        true => Ok(share),
        false => Err(AttnError::value(format!("option `{name}`"), share, "from 0 to 1")),
    }
}

fn run_top_k(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    run_given(entry, options, tensors, &["mask"], |shape| {
        Ok(given_blocks(tensors, "mask", shape, BlockSizes::square(1), false)?.into())
    })
}

fn run_blocks(
    entry: &Entry,
    options: &Options,
    tensors: &NamedTensors,
    sizes: BlockSizes,
    causal: bool,
) -> Result<NamedTensors> {
    run_given(entry, options, tensors, &["block_mask"], |shape| {
        Ok(given_blocks(tensors, "block_mask", shape, sizes, causal)?.into())
    })
}

fn run_lines(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    run_given(entry, options, tensors, &["mask", "vertical", "slash"], |shape| {
        if tensors.get("mask").is_some() {
            tensors.only(entry.name, &["q", "k", "v", "grad_o", "mask"])?;
            return Ok(given_blocks(tensors, "mask", shape, BlockSizes::square(1), false)?.into());
        }
        let (vertical, slash) = (tensors.require("vertical")?, tensors.require("slash")?);
        let heads = (0..shape.batch).flat_map(|batch| (0..shape.n_heads_q).map(move |head| (batch, head)));
        let both = |(batch, head)| {
            Ok((
                numbers("vertical", vertical, shape, batch, head)?,
                numbers("slash", slash, shape, batch, head)?,
            ))
        };
        Ok(Decision::by_lines(Lines::new(shape, shape.batch, heads.map(both).collect::<Result<_>>()?)?))
    })
}

/// The indices of a head in `tensor [batch or 1, heads or 1, lines]`; negative ones are none.
fn numbers(
    name: &str,
    tensor: &NamedTensor,
    shape: &AttnShape,
    batch: usize,
    head: usize,
) -> Result<Vec<usize>> {
    let data = tensor.integers(name)?;
    let fits = |axis: usize, wanted: usize| axis == 1 || axis == wanted;
    match tensor.shape[..] {
        [batches, heads, lines] if fits(batches, shape.batch) && fits(heads, shape.n_heads_q) => {
            let (batch, head) = (batch.min(batches - 1), head.min(heads - 1));
            let of_head = &data[(batch * heads + head) * lines..][..lines];
            Ok(of_head.iter().filter_map(|x| usize::try_from(*x).ok()).collect())
        }
        _ => {
            let expected = format!("[{} or 1, {} or 1, lines]", shape.batch, shape.n_heads_q);
            Err(AttnError::value(format!("{name}'s shape"), format!("{:?}", tensor.shape), expected))
        }
    }
}
