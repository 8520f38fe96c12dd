//! Variants that look at the numbers: selectors, clusters, caches.

use super::{Row, Rule, SPARSE};

const DIRECTION: (&str, Rule) = ("causal", Rule::As("causal"));
const ALWAYS_CAUSAL: (&str, Rule) = ("causal", Rule::Only("true"));

pub(super) const TABLE: &[Row] = &[
    Row { variant: "topk", ours: "topk", options: &[DIRECTION, ("topk", Rule::As("topk"))], ..SPARSE },
    Row {
        variant: "vertical-slash",
        ours: "vertical-slash",
        options: &[
            ALWAYS_CAUSAL,
            ("forced_slash", Rule::As("forced_slash")),
            ("forced_vertical", Rule::As("forced_vertical")),
            ("last_q", Rule::As("last_q")),
            ("num_slash", Rule::As("num_slash")),
            ("num_vertical", Rule::As("num_vertical")),
        ],
        // The reference finds distances for the first head alone; ours finds each head's own.
        given: &[("vertical", "vertical"), ("slash", "slash")],
        ..SPARSE
    },
    Row {
        variant: "minference-block-sparse",
        ours: "minference-block-sparse",
        options: &[
            ALWAYS_CAUSAL,
            ("block_q", Rule::As("block_q")),
            ("block_kv", Rule::As("block_kv")),
            ("topk_blocks", Rule::As("topk_blocks")),
        ],
        ..SPARSE
    },
    Row {
        variant: "flexprefill",
        ours: "flexprefill",
        options: &[
            ALWAYS_CAUSAL,
            ("block_q", Rule::Square("block")),
            ("block_kv", Rule::Square("block")),
            ("gamma", Rule::As("gamma")),
            ("tau", Rule::As("tau")),
            ("min_budget", Rule::As("min_budget")),
            ("max_budget", Rule::As("max_budget")),
        ],
        ..SPARSE
    },
    Row {
        variant: "xattention",
        ours: "xattention",
        options: &[
            ALWAYS_CAUSAL,
            ("block_q", Rule::Square("block")),
            ("block_kv", Rule::Square("block")),
            ("norm", Rule::As("norm")),
            ("stride", Rule::As("stride")),
            ("threshold", Rule::As("threshold")),
        ],
        ..SPARSE
    },
    Row {
        variant: "spargeattn",
        ours: "spargeattn",
        options: &[
            DIRECTION,
            ("block_q", Rule::As("block_q")),
            ("block_kv", Rule::As("block_kv")),
            ("cdfthreshd", Rule::As("cdf")),
            ("simthreshd1", Rule::As("similarity")),
        ],
        ..SPARSE
    },
    Row {
        variant: "moba",
        ours: "moba",
        options: &[ALWAYS_CAUSAL, ("chunk", Rule::As("chunk_len")), ("topk", Rule::As("top_k"))],
        ..SPARSE
    },
    Row {
        variant: "nsa",
        ours: "nsa",
        options: &[
            ("block_size", Rule::As("compress_len")),
            ("block_size", Rule::As("compress_stride")),
            ("block_size", Rule::As("select_len")),
            ("block_counts", Rule::As("n_selected")),
            ("window", Rule::As("window")),
            ("compression", Rule::Only("mean pooling, no overlap")),
        ],
        ..SPARSE
    },
    Row {
        variant: "dsa",
        ours: "dsa",
        options: &[
            ("topk", Rule::As("top_k")),
            ("index_activation", Rule::Only("relu")),
            ("index_scale", Rule::Only("DI**-0.5")),
        ],
        // Many index scores are 0, and equal ones have no order.
        given: &[("selected", "selected")],
        ..SPARSE
    },
    Row {
        variant: "block-indexer",
        ours: "block-indexer",
        options: &[
            ("block_size", Rule::As("block_len")),
            ("local_blocks", Rule::As("local_blocks")),
            ("topk_blocks", Rule::As("top_k")),
        ],
        ..SPARSE
    },
    Row {
        variant: "compressed-heavy",
        ours: "compressed-heavy",
        options: &[("compress_rate", Rule::As("rate")), ("window", Rule::As("window"))],
        // None: no entry is left out.
        remarks: &["index_scale", "index_topk"],
        ..SPARSE
    },
    Row {
        variant: "compressed-sparse",
        ours: "compressed-sparse",
        options: &[
            ("compress_rate", Rule::As("rate")),
            ("window", Rule::As("window")),
            ("index_topk", Rule::As("top_k")),
            ("index_scale", Rule::Only("DI**-0.5 on dots, HI**-0.5 on weights")),
        ],
        given: &[("compressed_mask", "compressed_mask")],
        ..SPARSE
    },
    Row {
        variant: "quest",
        ours: "quest",
        set: &[("causal", "false")],
        options: &[("page", Rule::As("page_len")), ("token_budget", Rule::As("token_budget"))],
        remarks: &["pages"],
        ..SPARSE
    },
    Row { variant: "kv-eviction-knorm", set: &[("policy", "key-norm")], ..EVICTION },
    Row { variant: "kv-eviction-keydiff", set: &[("policy", "key-diff")], ..EVICTION },
    Row { variant: "kv-eviction-observedattention", set: &[("policy", "observed-attention")], ..EVICTION },
    Row {
        variant: "kv-eviction-snapkv",
        set: &[("policy", "snapkv")],
        options: &[
            ("keep", Rule::As("budget")),
            ("window_size", Rule::As("window")),
            ("kernel_size", Rule::As("kernel")),
        ],
        ..EVICTION
    },
    Row {
        variant: "kv-eviction-streamingllm",
        set: &[("policy", "streaming-llm")],
        options: &[("keep", Rule::As("budget")), ("n_sink", Rule::As("n_sinks"))],
        ..EVICTION
    },
    Row { variant: "kv-eviction-tova", set: &[("policy", "tova")], ..EVICTION },
    Row {
        variant: "reformer-lsh",
        ours: "reformer-lsh",
        options: &[
            ("causal", Rule::As("causal")),
            ("bucket_size", Rule::As("bucket_size")),
            ("n_hashes", Rule::As("n_hashes")),
            ("n_buckets", Rule::As("n_buckets")),
            ("attend_across_buckets", Rule::As("attend_across_buckets")),
            ("allow_duplicate_attention", Rule::As("allow_duplicate_attention")),
            ("self_logit", Rule::As("self_logit")),
        ],
        ..SPARSE
    },
    Row {
        variant: "routing",
        ours: "routing",
        set: &[("mean_eps", "1e-5")],
        options: &[
            ("causal", Rule::As("causal")),
            ("num_clusters", Rule::As("num_clusters")),
            ("window", Rule::As("window")),
            ("shared_qk", Rule::As("shared_qk")),
            ("self_logit", Rule::As("self_logit")),
        ],
        remarks: &["num_mem_kv"],
        ..SPARSE
    },
    Row {
        variant: "sinkhorn",
        ours: "sinkhorn",
        options: &[
            ("kind", Rule::As("kind")),
            ("bucket_size", Rule::As("bucket_size")),
            ("n_top", Rule::As("n_top")),
            ("temperature", Rule::Temperature),
        ],
        ..SPARSE
    },
];

/// Caches that are held down to a budget; the ratio is what the budget was computed from.
const EVICTION: Row = Row {
    ours: "kv-eviction",
    options: &[("keep", Rule::As("budget"))],
    remarks: &["compression_ratio"],
    ..SPARSE
};
