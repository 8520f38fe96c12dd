//! Patterns that the shape decides, and layouts.

use super::{Row, Rule, SPARSE};

/// Blocks that the reference drew at random are fed in.
const BLOCK_MASK: &[(&str, &str)] = &[("block_mask", "block_mask")];
const DIRECTION: (&str, Rule) = ("causal", Rule::As("causal"));

pub(super) const TABLE: &[Row] = &[
    Row {
        variant: "sliding-window-causal",
        ours: "sliding-window",
        set: &[("causal", "true")],
        options: &[DIRECTION, ("window", Rule::As("window")), ("q_offset", Rule::Offset)],
        ..SPARSE
    },
    Row {
        variant: "sliding-window-bidirectional",
        ours: "sliding-window",
        options: &[
            DIRECTION,
            ("window_left", Rule::As("window_left")),
            ("window_right", Rule::As("window_right")),
            ("q_offset", Rule::Offset),
        ],
        ..SPARSE
    },
    Row {
        variant: "streaming-sinks",
        ours: "sink-window",
        options: &[
            ("causal", Rule::Only("true")),
            ("sinks", Rule::As("n_sinks")),
            ("window", Rule::As("window")),
            ("q_offset", Rule::Offset),
        ],
        ..SPARSE
    },
    Row {
        variant: "chunked-causal",
        ours: "chunked-causal",
        options: &[
            ("causal", Rule::Only("true")),
            ("chunk", Rule::As("chunk_len")),
            ("q_offset", Rule::Offset),
        ],
        ..SPARSE
    },
    Row {
        variant: "padded-causal",
        ours: "padded-causal",
        options: &[("causal", Rule::Only("true")), ("kv_lengths", Rule::List("kv_lengths"))],
        ..SPARSE
    },
    Row {
        variant: "prefix-lm",
        ours: "prefix-lm",
        options: &[("causal", Rule::Only("true")), ("prefix", Rule::As("prefix"))],
        ..SPARSE
    },
    Row {
        variant: "causal-with-bidirectional-spans",
        ours: "causal-with-bidirectional-spans",
        // A tensor of ids says the same, and comes first.
        options: &[("causal", Rule::Only("true")), ("spans", Rule::Ranges("spans"))],
        ..SPARSE
    },
    Row {
        variant: "document",
        ours: "document",
        // A tensor of ids says the same, and comes first.
        options: &[DIRECTION, ("cu_seqlens", Rule::List("cu_seqlens"))],
        ..SPARSE
    },
    Row {
        variant: "dilated-window",
        ours: "dilated-window",
        options: &[DIRECTION, ("window", Rule::As("window")), ("dilation", Rule::As("dilation"))],
        ..SPARSE
    },
    Row {
        variant: "sink-logit",
        ours: "sink-logit",
        options: &[("causal", Rule::Only("true")), ("window", Rule::As("window"))],
        ..SPARSE
    },
    Row {
        variant: "flex-block-mask",
        ours: "flex",
        set: &[("causal", "false")],
        options: &[("block_q", Rule::As("block_q")), ("block_kv", Rule::As("block_kv"))],
        // A Python function: the pairs that it sees are fed in.
        remarks: &["mask_mod"],
        given: &[("mask", "mask")],
        ..SPARSE
    },
    Row {
        variant: "flex-score-mod",
        ours: "flex",
        set: &[("causal", "false")],
        options: &[
            ("score_mod", Rule::Word("score_mod", &[("softcap", "none"), ("softcap_window", "none")])),
            ("softcap", Rule::As("softcap")),
            ("scale", Rule::Only("d**-0.5")),
        ],
        given: &[("mask", "mask")],
        ..SPARSE
    },
    Row {
        variant: "bigbird",
        ours: "bigbird",
        options: &[
            DIRECTION,
            ("block", Rule::As("block")),
            ("num_random_blocks", Rule::As("num_random_blocks")),
            ("num_window_blocks", Rule::As("num_window_blocks")),
        ],
        // First and last.
        remarks: &["global_blocks"],
        given: BLOCK_MASK,
        ..SPARSE
    },
    Row {
        variant: "longformer",
        ours: "longformer",
        // A tensor of flags says which tokens are global, too, and comes first.
        options: &[
            DIRECTION,
            ("window_one_sided", Rule::As("window")),
            ("global_indices", Rule::List("global_tokens")),
        ],
        // The tensors say so.
        remarks: &["separate_global_projections"],
        ..SPARSE
    },
    Row {
        variant: "sparse-transformer-strided",
        ours: "sparse-transformer-strided",
        // Without a word, even heads have the local part, odd ones the strided one.
        set: &[("merged", "false")],
        options: &[
            ("causal", Rule::Only("true")),
            ("stride", Rule::As("stride")),
            ("merged", Rule::As("merged")),
        ],
        ..SPARSE
    },
    Row {
        variant: "sparse-transformer-fixed",
        ours: "sparse-transformer-fixed",
        set: &[("merged", "false")],
        options: &[
            ("causal", Rule::Only("true")),
            ("stride", Rule::As("stride")),
            ("summary", Rule::As("summary")),
            ("merged", Rule::As("merged")),
        ],
        ..SPARSE
    },
    Row {
        variant: "block-layout-bigbird",
        ours: "block-layout-bigbird",
        options: &[
            DIRECTION,
            ("block", Rule::As("block")),
            ("different_layout_per_head", Rule::As("different_layout_per_head")),
            ("num_global_blocks", Rule::As("num_global_blocks")),
            ("num_random_blocks", Rule::As("num_random_blocks")),
            ("num_sliding_window_blocks", Rule::As("num_sliding_window_blocks")),
        ],
        remarks: &["attention", "num_heads"],
        given: BLOCK_MASK,
        ..SPARSE
    },
    Row {
        variant: "block-layout-bslongformer",
        ours: "block-layout-bslongformer",
        options: &[
            DIRECTION,
            ("block", Rule::As("block")),
            ("global_block_indices", Rule::List("global_block_indices")),
            ("global_block_end_indices", Rule::List("global_block_end_indices")),
            ("num_sliding_window_blocks", Rule::As("num_sliding_window_blocks")),
        ],
        remarks: &["attention", "num_heads", "different_layout_per_head"],
        ..SPARSE
    },
    Row {
        variant: "block-layout-fixed",
        ours: "block-layout-fixed",
        options: &[
            DIRECTION,
            ("block", Rule::As("block")),
            ("different_layout_per_head", Rule::As("different_layout_per_head")),
            ("horizontal_global_attention", Rule::As("horizontal_global_attention")),
            ("num_different_global_patterns", Rule::As("num_different_global_patterns")),
            ("num_global_blocks", Rule::As("num_global_blocks")),
            ("num_local_blocks", Rule::As("num_local_blocks")),
        ],
        remarks: &["attention", "num_heads"],
        ..SPARSE
    },
    Row {
        variant: "block-layout-localslidingwindow",
        ours: "block-layout-localslidingwindow",
        options: &[
            DIRECTION,
            ("block", Rule::As("block")),
            ("num_sliding_window_blocks", Rule::As("num_sliding_window_blocks")),
        ],
        remarks: &["attention", "num_heads"],
        ..SPARSE
    },
    Row {
        variant: "block-layout-variable",
        ours: "block-layout-variable",
        options: &[
            DIRECTION,
            ("block", Rule::As("block")),
            ("different_layout_per_head", Rule::As("different_layout_per_head")),
            ("global_block_indices", Rule::List("global_block_indices")),
            ("global_block_end_indices", Rule::List("global_block_end_indices")),
            ("horizontal_global_attention", Rule::As("horizontal_global_attention")),
            ("local_window_blocks", Rule::List("local_window_blocks")),
            ("num_random_blocks", Rule::As("num_random_blocks")),
        ],
        remarks: &["attention", "num_heads"],
        given: BLOCK_MASK,
        ..SPARSE
    },
    Row { variant: "neighborhood-1d", ours: "neighborhood-1d", options: NEIGHBORHOOD, ..SPARSE },
    Row { variant: "neighborhood-2d", ours: "neighborhood-2d", options: NEIGHBORHOOD, ..SPARSE },
    Row { variant: "neighborhood-3d", ours: "neighborhood-3d", options: NEIGHBORHOOD, ..SPARSE },
];

const NEIGHBORHOOD: &[(&str, Rule)] = &[
    ("causal", Rule::List("causal")),
    ("grid", Rule::List("grid")),
    ("kernel_size", Rule::List("kernel_size")),
    ("dilation", Rule::List("dilation")),
    ("stride", Rule::List("stride")),
];
