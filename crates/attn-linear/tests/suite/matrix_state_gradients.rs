//! Gradients of every variant of the matrix-state engine by q, k and v against differences of its definition.

use crate::differences;
use attn_core::AttnShape;
use attn_core::registry::{Options, find};
use attn_linear::registry;

/// Chunks whose edges are inside the sequence, more than a segment of them, two heads that share keys.
fn check(name: &str, options: &[(&str, &str)]) {
    let shape = AttnShape { batch: 2, n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, 21, 4) };
    let entry = *find(&registry(), name).unwrap();
    for chunk_len in [1, 7] {
        let all = options.iter().fold(Options::new(), |all, (key, value)| all.with(key, value));
        differences::check_rounded(&entry, &all.with("chunk_len", chunk_len), shape, 3);
    }
}

#[test]
fn of_plain_and_gated_sums() {
    for name in ["gla", "simple-gla", "lightning", "mamba2", "rwkv5", "rwkv6", "hgrn2", "gateloop", "rodimus"]
    {
        check(name, &[]);
    }
    check("lightnet", &[]);
    check("mlstm", &[("input_gate", "-3")]);
    check("mlstm", &[("input_gate", "3"), ("eps", "0.1")]);
    check("mamba3", &[]);
}

#[test]
fn of_delta_rules() {
    for name in ["deltanet", "gated-deltanet", "kda", "rwkv7", "comba", "gdn2", "dplr", "iplr", "fwp-dpfp"] {
        check(name, &[]);
    }
    for name in ["deltaproduct", "gated-deltaproduct"] {
        check(name, &[("householders", "3")]);
    }
    for name in ["precond-gdn", "precond-kda"] {
        check(name, &[]);
        check(name, &[("qk_norm", "false")]);
    }
}

#[test]
fn of_slots() {
    check("gsa", &[("slots", "6")]);
    check("abc", &[("slots", "6")]);
    check("raven", &[("slots", "4"), ("top_k", "4")]);
}

#[test]
fn of_regressions() {
    check("gated-oja", &[]);
    check("gated-oja", &[("v_norm", "false"), ("beta", "0.2")]);
    for name in ["momentum-delta", "titans-linear", "mesanet"] {
        check(name, &[]);
        check(name, &[("qk_norm", "false")]);
    }
}
