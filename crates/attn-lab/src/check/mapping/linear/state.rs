//! Variants of the matrix-state engine.

use super::super::{Row, Rule};
use super::{LINEAR, SCALE};

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
];
