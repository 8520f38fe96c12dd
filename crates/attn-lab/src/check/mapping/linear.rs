//! The linear family's names in the golden files, and ours.

use super::{Row, Rule};
use attn_core::Family;

const LINEAR: Row =
    Row { family: Family::Linear, variant: "", ours: "", set: &[], options: &[], remarks: &[], inputs: &[] };
const SCALE: &[(&str, Rule)] = &[("scale", Rule::As("scale"))];

pub(super) const TABLE: &[Row] = &[
    Row {
        variant: "gla",
        ours: "gla",
        options: SCALE,
        remarks: &["gate"],
        inputs: &[("g", "log_decay"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "simple-gla",
        ours: "simple-gla",
        options: SCALE,
        remarks: &["gate"],
        inputs: &[("g", "log_decay"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "deltanet",
        ours: "deltanet",
        set: &[("qk_norm", "false")],
        options: SCALE,
        remarks: &["beta", "beta_range", "k_unit_norm"],
        inputs: &[("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "gated-deltanet",
        ours: "gated-deltanet",
        set: &[("qk_norm", "false")],
        options: &[("qk_l2norm", Rule::Given("qk_norm", "true")), ("scale", Rule::As("scale"))],
        remarks: &["gate", "beta_range"],
        inputs: &[("A_log", "a_log"), ("g", "log_decay"), ("g_raw", "gate_raw"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "kda",
        ours: "kda",
        set: &[("qk_norm", "false")],
        options: &[
            ("gate", Rule::Gate),
            ("qk_l2norm", Rule::Given("qk_norm", "true")),
            ("scale", Rule::As("scale")),
        ],
        remarks: &["qk_heads", "value_heads"],
        inputs: &[("A_log", "a_log"), ("g", "log_decay"), ("g_raw", "gate_raw"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "mamba2",
        ours: "mamba2",
        options: &[("dt_softplus", Rule::As("softplus")), ("scale", Rule::As("scale"))],
        remarks: &["D", "chunk_size", "groups", "layout"],
        inputs: &[("A", "a"), ("Bm", "k"), ("Cm", "q"), ("D", "d"), ("s0", "initial_state"), ("x", "v")],
        ..LINEAR
    },
    Row {
        variant: "rwkv5",
        ours: "rwkv5",
        options: SCALE,
        remarks: &["bonus", "gate"],
        inputs: &[("log_w", "log_decay"), ("s0", "initial_state"), ("u", "bonus")],
        ..LINEAR
    },
    Row {
        variant: "rwkv6",
        ours: "rwkv6",
        options: SCALE,
        remarks: &["bonus", "gate"],
        inputs: &[("log_w", "log_decay"), ("s0", "initial_state"), ("u", "bonus")],
        ..LINEAR
    },
    Row {
        variant: "rwkv7",
        ours: "rwkv7",
        options: SCALE,
        remarks: &["engine_a", "engine_b", "gate", "key", "kk"],
        inputs: &[("a", "alpha"), ("log_w", "log_decay"), ("r", "q"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "lightning",
        ours: "lightning",
        options: SCALE,
        remarks: &["block_size", "layer", "layers", "slope"],
        inputs: &[("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "hgrn2",
        ours: "hgrn2",
        options: &[("lower_bound", Rule::As("lower_bound")), ("scale", Rule::As("scale"))],
        remarks: &["gate"],
        inputs: &[("f", "k"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "gated-deltaproduct",
        ours: "gated-deltaproduct",
        set: &[("qk_norm", "false")],
        options: &[
            ("gate", Rule::Gated("deltaproduct")),
            ("num_householder", Rule::As("householders")),
            ("scale", Rule::As("scale")),
        ],
        remarks: &["layout"],
        inputs: &[("g", "log_decay"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "comba",
        ours: "comba",
        set: &[("qk_norm", "false")],
        options: SCALE,
        inputs: &[("g", "log_decay"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "gdn2",
        ours: "gdn2",
        set: &[("qk_norm", "false")],
        options: SCALE,
        inputs: &[("b", "erase_gate"), ("g", "log_decay"), ("s0", "initial_state"), ("wgate", "write_gate")],
        ..LINEAR
    },
    Row {
        variant: "dplr",
        ours: "dplr",
        set: &[("qk_norm", "false")],
        options: SCALE,
        inputs: &[("g", "log_decay"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "iplr",
        ours: "iplr",
        set: &[("qk_norm", "false")],
        options: SCALE,
        inputs: &[("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "lightnet",
        ours: "lightnet",
        options: SCALE,
        remarks: &["gate"],
        inputs: &[("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "gateloop",
        ours: "gateloop",
        options: SCALE,
        remarks: &["gate"],
        inputs: &[("g", "log_decay")],
        ..LINEAR
    },
    Row {
        variant: "rodimus",
        ours: "rodimus",
        options: &[("k_norm_eps", Rule::Only("1e-12")), ("scale", Rule::As("scale"))],
        remarks: &["gate"],
        inputs: &[("gl", "gate_raw"), ("s0", "initial_state"), ("tl", "temperature_raw")],
        ..LINEAR
    },
    Row {
        variant: "mlstm",
        ours: "mlstm",
        options: &[("eps", Rule::As("eps")), ("scale", Rule::As("scale"))],
        remarks: &["denom", "forget", "input", "scale_on", "state"],
        inputs: &[("f", "forget_gate"), ("i", "input_gate"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "gsa",
        ours: "gsa",
        options: SCALE,
        remarks: &["slots", "state"],
        inputs: &[("g", "log_decay"), ("s", "slots")],
        ..LINEAR
    },
    Row {
        variant: "abc",
        ours: "abc",
        options: SCALE,
        remarks: &["gate", "slots"],
        inputs: &[("s", "slots")],
        ..LINEAR
    },
    Row {
        variant: "precond-gdn",
        ours: "precond-gdn",
        options: &[
            ("eps", Rule::Only("1e-6")),
            ("log_atk_scale", Rule::Only("-0.2")),
            ("qk_l2norm_inside", Rule::As("qk_norm")),
            ("scale", Rule::As("scale")),
            ("x", Rule::Only("1.5")),
        ],
        inputs: &[
            ("a0", "use0"),
            ("aT", "useT"),
            ("beta_atk", "beta_use"),
            ("g", "log_decay"),
            ("g_atk", "log_decay_use"),
            ("s0", "initial_state"),
        ],
        ..LINEAR
    },
    Row {
        variant: "precond-kda",
        ours: "precond-kda",
        options: &[
            ("eps", Rule::Only("1e-6")),
            ("log_atk_scale", Rule::Only("-0.2")),
            ("qk_l2norm_inside", Rule::As("qk_norm")),
            ("scale", Rule::As("scale")),
            ("x", Rule::Only("1.5")),
        ],
        inputs: &[
            ("a0", "use0"),
            ("aT", "useT"),
            ("beta_atk", "beta_use"),
            ("g", "log_decay"),
            ("g_atk", "log_decay_use"),
            ("s0", "initial_state"),
        ],
        ..LINEAR
    },
    Row {
        variant: "fwp-dpfp",
        ours: "fwp-dpfp",
        options: &[("nu", Rule::As("nu")), ("scale", Rule::As("scale"))],
        remarks: &["feature_dim", "feature_map", "feature_norm"],
        inputs: &[("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "mamba3",
        ours: "mamba3",
        options: SCALE,
        remarks: &["angleT", "rotated_pairs", "rotation", "trapezoid"],
        inputs: &[
            ("A", "a"),
            ("D", "d"),
            ("kprev", "k_before"),
            ("s0", "initial_state"),
            ("vprev", "v_before"),
        ],
        ..LINEAR
    },
    Row {
        variant: "gated-oja",
        ours: "gated-oja",
        set: &[("v_norm", "false")],
        options: SCALE,
        inputs: &[("gv", "log_decay"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "momentum-delta",
        ours: "momentum-delta",
        set: &[("qk_norm", "false")],
        options: SCALE,
        remarks: &["error_reads"],
        inputs: &[("g", "log_decay"), ("g_mu", "log_mu"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "titans-linear",
        ours: "titans-linear",
        set: &[("qk_norm", "false")],
        options: &[("beta", Rule::Only("1")), ("scale", Rule::As("scale"))],
        remarks: &["error_reads", "p"],
        inputs: &[("g", "log_decay"), ("g_mu", "log_mu"), ("s0", "initial_state")],
        ..LINEAR
    },
    Row {
        variant: "mesanet",
        ours: "mesanet",
        set: &[("qk_norm", "false")],
        options: SCALE,
        remarks: &["lamb", "solver"],
        inputs: &[("g", "log_decay"), ("lamb", "lambda")],
        ..LINEAR
    },
    Row { variant: "hgrn", ours: "hgrn", remarks: &["layout"], ..LINEAR },
    Row {
        variant: "mamba1",
        ours: "mamba1",
        options: &[("dt_softplus", Rule::Only("true"))],
        remarks: &["layout"],
        ..LINEAR
    },
    Row {
        variant: "longhorn",
        ours: "longhorn",
        options: &[("scale", Rule::Only("1.0"))],
        remarks: &["gate"],
        ..LINEAR
    },
    Row { variant: "rwkv4", ours: "rwkv4", remarks: &["decay", "layout"], ..LINEAR },
    Row {
        variant: "rglru",
        ours: "rglru",
        options: &[("c", Rule::Only("8.0"))],
        remarks: &["layout", "reset"],
        ..LINEAR
    },
    Row {
        variant: "aft",
        ours: "aft-simple",
        options: &[("causal", Rule::As("causal")), ("kind", Rule::Only("simple"))],
        remarks: &["layout"],
        ..LINEAR
    },
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
        options: &[("causal", Rule::As("causal")), ("gate", Rule::Only("null"))],
        remarks: &["denom", "feature_map", "features"],
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
