//! Kernelised attention, low-rank attention, memories of segments.

use super::super::{Row, Rule};
use super::LINEAR;

pub(super) const TABLE: &[Row] = &[
    Row {
        variant: "linear-relu",
        ours: "linear-relu",
        options: &[
            ("causal", Rule::As("causal")),
            ("eps", Rule::As("eps")),
            ("feature_map", Rule::Only("relu")),
            ("normalize", Rule::Only("true")),
            ("scale", Rule::Only("1.0")),
        ],
        ..LINEAR
    },
    Row {
        variant: "performer",
        ours: "performer",
        set: &[("key_max", "false")],
        options: &[
            ("causal", Rule::As("causal")),
            ("denom_eps", Rule::As("denom_eps")),
            ("feature_eps", Rule::As("feature_eps")),
            ("kernel", Rule::Kernel),
        ],
        remarks: &["data_scale", "denom", "features", "max_key", "max_query", "ortho_scaling"],
        ..LINEAR
    },
    Row {
        variant: "rfa",
        ours: "rfa",
        options: &[("causal", Rule::As("causal"))],
        // The gates are a tensor.
        remarks: &["denom", "feature_map", "features", "gate"],
        ..LINEAR
    },
    Row {
        variant: "cosformer",
        ours: "cosformer",
        options: &[
            ("causal", Rule::As("causal")),
            ("eps", Rule::As("eps")),
            ("m", Rule::As("length")),
            ("scale", Rule::Only("1.0")),
        ],
        remarks: &["feature_map", "normalize"],
        ..LINEAR
    },
    Row {
        variant: "based",
        ours: "based",
        options: &[
            ("causal", Rule::As("causal")),
            ("eps", Rule::As("eps")),
            ("normalize", Rule::As("normalize")),
        ],
        remarks: &["feature_map"],
        ..LINEAR
    },
    Row {
        variant: "rebased",
        ours: "rebased",
        options: &[("causal", Rule::As("causal")), ("eps", Rule::As("eps"))],
        remarks: &["feature_map", "normalize"],
        ..LINEAR
    },
    Row {
        variant: "hedgehog",
        ours: "hedgehog",
        options: &[("causal", Rule::As("causal")), ("eps", Rule::As("eps")), ("scale", Rule::Only("1.0"))],
        remarks: &["feature_dim", "feature_map", "normalize"],
        ..LINEAR
    },
    Row {
        variant: "efficient",
        ours: "efficient",
        options: &[("causal", Rule::As("causal")), ("scale", Rule::As("scale"))],
        remarks: &["k", "q", "denom"],
        ..LINEAR
    },
    Row {
        variant: "linformer",
        ours: "linformer",
        options: &[("causal", Rule::Only("false"))],
        remarks: &["max_len", "rank", "scale", "shared_EF", "short_input"],
        ..LINEAR
    },
    Row {
        variant: "nystrom",
        ours: "nystromformer",
        set: &[("init", "global")],
        options: &[
            ("causal", Rule::Only("false")),
            ("landmarks", Rule::As("landmarks")),
            ("pinv_iters", Rule::As("pinv_iters")),
        ],
        remarks: &["conv_kernel", "padding", "pinv_init", "scale"],
        ..LINEAR
    },
    Row {
        variant: "agent",
        ours: "agent",
        options: &[("bias", Rule::Only("null")), ("causal", Rule::Only("false"))],
        remarks: &["agents", "scale"],
        ..LINEAR
    },
    Row {
        variant: "ttt-linear",
        ours: "ttt-linear",
        options: &[("mini_batch", Rule::As("mini_batch"))],
        remarks: &["eps", "eta", "final_state", "scale"],
        ..LINEAR
    },
    Row {
        variant: "infini",
        ours: "infini",
        options: &[("eps", Rule::As("eps")), ("segment", Rule::Segment)],
        remarks: &["feature_map", "read"],
        ..LINEAR
    },
    Row {
        variant: "xca",
        ours: "xca",
        options: &[("causal", Rule::Only("false"))],
        remarks: &["attention"],
        ..LINEAR
    },
];
