//! BigBird and the other layouts of blocks.

use super::super::given::{given_blocks, run_given};
use super::super::{at_least_1, build};
use super::{length, list};
use crate::{
    BigBird, BigBirdLayout, BlockLayout, BlockSizes, FixedLayout, GlobalBlocks, LocalLayout,
    LongformerLayout, VariableLayout,
};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options};
use attn_core::{Family, Result};

const BLOCK: OptionSpec = OptionSpec { name: "block", default: "64", help: "positions of a block" };
const SEED: OptionSpec = OptionSpec { name: "seed", default: "0", help: "what random blocks are drawn with" };
const CAUSAL: OptionSpec = OptionSpec {
    name: "causal",
    default: "false",
    help: "blocks up to the diagonal, causal inside it (true|false)",
};
const DIFFERENT: OptionSpec = OptionSpec {
    name: "different_layout_per_head",
    default: "false",
    help: "each head has a layout of its own (true|false)",
};
const HORIZONTAL: OptionSpec = OptionSpec {
    name: "horizontal_global_attention",
    default: "false",
    help: "rows of global blocks see everything; bidirectional only (true|false)",
};
const SLIDING: OptionSpec = OptionSpec {
    name: "num_sliding_window_blocks",
    default: "3",
    help: "blocks around a row's own, half on each side",
};
const GLOBALS: OptionSpec = OptionSpec {
    name: "global_block_indices",
    default: "0",
    help: "global blocks, by commas (none: no block)",
};
const GLOBAL_ENDS: OptionSpec = OptionSpec {
    name: "global_block_end_indices",
    default: "",
    help: "ends of runs that start at the global blocks, exclusive, by commas",
};

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: <BigBird as BlockLayout>::NAME,
            family: Family::Sparse,
            summary: "Window, global and random blocks (Zaheer et al. 2020)",
            options: &[
                BLOCK,
                OptionSpec { name: "num_random_blocks", default: "3", help: "random blocks of a row" },
                OptionSpec {
                    name: "num_window_blocks",
                    default: "3",
                    help: "blocks around a row's own, itself included",
                },
                OptionSpec {
                    name: "num_global_blocks",
                    default: "1",
                    help: "blocks at each end that all see and that see all",
                },
                SEED,
                CAUSAL,
                OptionSpec::SCALE,
            ],
            constructor: |options| build(options, bigbird(options)?),
            runner: |entry, options, tensors| run_layout(entry, options, tensors, bigbird(options)?),
        },
        Entry {
            name: <BigBirdLayout as BlockLayout>::NAME,
            family: Family::Sparse,
            summary: "Neighbouring, first and random blocks (DeepSpeed 2020, after Zaheer et al. 2020)",
            options: &[
                BLOCK,
                OptionSpec { name: "num_random_blocks", default: "1", help: "random blocks of a row" },
                SLIDING,
                OptionSpec { name: "num_global_blocks", default: "1", help: "first blocks that are global" },
                DIFFERENT,
                SEED,
                CAUSAL,
                OptionSpec::SCALE,
            ],
            constructor: |options| build(options, bigbird_layout(options)?),
            runner: |entry, options, tensors| run_layout(entry, options, tensors, bigbird_layout(options)?),
        },
        Entry {
            name: <LongformerLayout as BlockLayout>::NAME,
            family: Family::Sparse,
            summary: "Neighbouring and global blocks (DeepSpeed 2020, after Beltagy et al. 2020)",
            options: &[BLOCK, SLIDING, GLOBALS, GLOBAL_ENDS, CAUSAL, OptionSpec::SCALE],
            constructor: |options| build(options, longformer_layout(options)?),
            runner: |entry, options, tensors| {
                run_layout(entry, options, tensors, longformer_layout(options)?)
            },
        },
        Entry {
            name: <FixedLayout as BlockLayout>::NAME,
            family: Family::Sparse,
            summary: "Local windows of blocks and blocks that stand for them (DeepSpeed 2020, after Child et al. 2019)",
            options: &[
                BLOCK,
                OptionSpec { name: "num_local_blocks", default: "32", help: "blocks of a local window" },
                OptionSpec {
                    name: "num_global_blocks",
                    default: "1",
                    help: "blocks that stand for a window",
                },
                OptionSpec {
                    name: "num_different_global_patterns",
                    default: "1",
                    help: "patterns that heads take in turn",
                },
                HORIZONTAL,
                DIFFERENT,
                CAUSAL,
                OptionSpec::SCALE,
            ],
            constructor: |options| build(options, fixed_layout(options)?),
            runner: |entry, options, tensors| run_layout(entry, options, tensors, fixed_layout(options)?),
        },
        Entry {
            name: <LocalLayout as BlockLayout>::NAME,
            family: Family::Sparse,
            summary: "Neighbouring blocks (DeepSpeed 2020)",
            options: &[BLOCK, SLIDING, CAUSAL, OptionSpec::SCALE],
            constructor: |options| build(options, local_layout(options)?),
            runner: |entry, options, tensors| run_layout(entry, options, tensors, local_layout(options)?),
        },
        Entry {
            name: <VariableLayout as BlockLayout>::NAME,
            family: Family::Sparse,
            summary: "Local windows of given lengths, global and random blocks (DeepSpeed 2020)",
            options: &[
                BLOCK,
                OptionSpec { name: "num_random_blocks", default: "0", help: "random blocks of a row" },
                OptionSpec {
                    name: "local_window_blocks",
                    default: "4",
                    help: "blocks of the local windows, by commas; the last for all that follow",
                },
                GLOBALS,
                GLOBAL_ENDS,
                HORIZONTAL,
                DIFFERENT,
                SEED,
                CAUSAL,
                OptionSpec::SCALE,
            ],
            constructor: |options| build(options, variable_layout(options)?),
            runner: |entry, options, tensors| run_layout(entry, options, tensors, variable_layout(options)?),
        },
    ]
}

/// Runs the layout that the options derive, or the one that is given as `block_mask`.
fn run_layout(
    entry: &Entry,
    options: &Options,
    tensors: &NamedTensors,
    layout: impl BlockLayout,
) -> Result<NamedTensors> {
    run_given(entry, options, tensors, &["block_mask"], |shape| {
        let sizes = BlockSizes::square(layout.block());
        Ok(given_blocks(tensors, "block_mask", shape, sizes, layout.causal())?.into())
    })
}

fn checked<L: BlockLayout>(layout: L) -> Result<L> {
    layout.check().map(|()| layout)
}

fn bigbird(options: &Options) -> Result<BigBird> {
    Ok(BigBird {
        block: at_least_1(options, "block", 64)?,
        num_random_blocks: options.get_or("num_random_blocks", 3)?,
        num_window_blocks: options.get_or("num_window_blocks", 3)?,
        num_global_blocks: options.get_or("num_global_blocks", 1)?,
        seed: options.get_or("seed", 0)?,
        causal: options.get_or("causal", false)?,
    })
}

fn bigbird_layout(options: &Options) -> Result<BigBirdLayout> {
    Ok(BigBirdLayout {
        local: local_layout(options)?,
        num_random_blocks: options.get_or("num_random_blocks", 1)?,
        num_global_blocks: options.get_or("num_global_blocks", 1)?,
        different_layout_per_head: options.get_or("different_layout_per_head", false)?,
        seed: options.get_or("seed", 0)?,
    })
}

fn global_blocks(options: &Options) -> Result<GlobalBlocks> {
    let starts = if options.0.contains_key(GLOBALS.name) { list(options, GLOBALS.name)? } else { vec![0] };
    Ok(GlobalBlocks { starts, ends: list(options, GLOBAL_ENDS.name)? })
}

fn longformer_layout(options: &Options) -> Result<LongformerLayout> {
    checked(LongformerLayout { local: local_layout(options)?, globals: global_blocks(options)? })
}

fn local_layout(options: &Options) -> Result<LocalLayout> {
    Ok(LocalLayout {
        block: at_least_1(options, "block", 64)?,
        num_sliding_window_blocks: options.get_or("num_sliding_window_blocks", 3)?,
        causal: options.get_or("causal", false)?,
    })
}

fn fixed_layout(options: &Options) -> Result<FixedLayout> {
    checked(FixedLayout {
        block: at_least_1(options, "block", 64)?,
        num_local_blocks: at_least_1(options, "num_local_blocks", 32)?,
        num_global_blocks: at_least_1(options, "num_global_blocks", 1)?,
        num_different_global_patterns: length(options, "num_different_global_patterns")?.unwrap_or(1),
        horizontal_global_attention: options.get_or("horizontal_global_attention", false)?,
        different_layout_per_head: options.get_or("different_layout_per_head", false)?,
        causal: options.get_or("causal", false)?,
    })
}

fn variable_layout(options: &Options) -> Result<VariableLayout> {
    let windows = list(options, "local_window_blocks")?;
    checked(VariableLayout {
        block: at_least_1(options, "block", 64)?,
        num_random_blocks: options.get_or("num_random_blocks", 0)?,
        local_window_blocks: if windows.is_empty() { vec![4] } else { windows },
        globals: global_blocks(options)?,
        horizontal_global_attention: options.get_or("horizontal_global_attention", false)?,
        different_layout_per_head: options.get_or("different_layout_per_head", false)?,
        causal: options.get_or("causal", false)?,
        seed: options.get_or("seed", 0)?,
    })
}
