//! The variants of the matrix-state engine against vectors computed by other people's packages.

use crate::golden_cases::{self, check_named};
use attn_core::registry::Options;
use attn_linear::recurrent::Lightning;
use attn_testkit::golden::GoldenCase;

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let cases = golden_cases::cases(variant, "");
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

/// Outputs and gradients of every case of `variant`, with the file's scale.
fn check(variant: &str, count: usize, names: &[(&str, &str)], options: impl Fn(&GoldenCase) -> Options) {
    for case in cases(variant, count) {
        check_as(&case, variant, names, options(&case));
    }
}

fn check_as(case: &GoldenCase, ours: &str, names: &[(&str, &str)], options: Options) {
    let usual = [("s0", "initial_state"), ("g", "log_decay"), ("log_w", "log_decay")];
    let options = options.with("scale", &case.options["scale"]);
    check_named(case, ours, &[&usual[..], names].concat(), 1.0, &options);
}

fn plain(_: &GoldenCase) -> Options {
    Options::new()
}

fn raw_keys(_: &GoldenCase) -> Options {
    Options::new().with("qk_norm", false)
}

/// What `qk_l2norm` says, and how the file's gate is called here.
fn normed(case: &GoldenCase) -> Options {
    let gate = case.options.get("gate").and_then(|gate| gate.as_str()).unwrap_or_default();
    let options = Options::new().with("qk_norm", case.options.contains_key("qk_l2norm"));
    if gate.starts_with("g = -5") { options.with("gate", "lower-bound") } else { options }
}

const GATES: &[(&str, &str)] = &[("g_raw", "gate_raw"), ("A_log", "a_log")];

#[test]
fn gated_linear_attention_equals_flash_linear_attention() {
    check("gla", 5, &[], plain);
    check("simple-gla", 5, &[], plain);
}

#[test]
fn delta_rules_equal_flash_linear_attention_and_transformers() {
    check("deltanet", 5, &[], raw_keys);
    check("gated-deltanet", 8, GATES, normed);
    check("kda", 8, GATES, normed);
}

#[test]
fn mamba2_equals_transformers() {
    let names = [("Bm", "k"), ("Cm", "q"), ("x", "v"), ("A", "a"), ("D", "d")];
    check("mamba2", 5, &names, |case| Options::new().with("softplus", &case.options["dt_softplus"]));
}

#[test]
fn rwkv_equals_flash_linear_attention() {
    check("rwkv5", 1, &[("u", "bonus")], plain);
    check("rwkv6", 5, &[("u", "bonus")], plain);
    check("rwkv7", 5, &[("r", "q"), ("a", "alpha")], plain);
}

#[test]
fn lightning_equals_transformers() {
    check("lightning", 3, &[], plain);
    // Its slopes are the ones we take where none are given.
    for case in cases("lightning", 3) {
        let slopes = case.inputs.f32("slope").unwrap().unwrap().1;
        let [layer, layers] = ["layer", "layers"].map(|name| case.options[name].as_u64().unwrap() as usize);
        let ours = Lightning { scale: 1.0, layer, layers, chunk_len: 64 };
        for (h, slope) in slopes.iter().enumerate() {
            let got = ours.slope(h, slopes.len());
            assert!((got - slope).abs() <= 1e-6 * slope, "{}: {got} {slope}", case.case);
        }
    }
}

#[test]
fn hgrn2_equals_flash_linear_attention() {
    check("hgrn2", 3, &[("f", "k")], |case| Options::new().with("lower_bound", &case.options["lower_bound"]));
}

#[test]
fn delta_products_equal_flash_linear_attention() {
    let options = |case: &GoldenCase| raw_keys(case).with("householders", &case.options["num_householder"]);
    for case in cases("gated-deltaproduct", 3) {
        let gated = case.options["gate"].as_bool().unwrap();
        let name = if gated { "gated-deltaproduct" } else { "deltaproduct" };
        check_as(&case, name, &[], options(&case));
    }
}

#[test]
fn other_delta_rules_equal_flash_linear_attention() {
    check("comba", 3, &[], raw_keys);
    check("gdn2", 3, &[("b", "erase_gate"), ("wgate", "write_gate")], raw_keys);
    check("dplr", 3, &[], raw_keys);
    check("iplr", 3, &[], raw_keys);
}

#[test]
fn gates_of_other_kinds_equal_their_packages() {
    check("lightnet", 3, &[], plain);
    check("gateloop", 2, &[], plain);
    check("rodimus", 3, &[("gl", "gate_raw"), ("tl", "temperature_raw")], plain);
}

#[test]
fn mlstm_equals_xlstm() {
    let names = [("f", "forget_gate"), ("i", "input_gate")];
    check("mlstm", 5, &names, |case| Options::new().with("eps", &case.options["eps"]));
}

#[test]
fn slot_memories_equal_flash_linear_attention() {
    check("gsa", 5, &[("s", "slots")], plain);
    check("abc", 2, &[("s", "slots")], plain);
}

#[test]
fn preconditioned_delta_rules_equal_flash_linear_attention() {
    let names = [("a0", "use0"), ("aT", "useT"), ("beta_atk", "beta_use"), ("g_atk", "log_decay_use")];
    for (variant, count) in [("precond-gdn", 3), ("precond-kda", 3)] {
        for case in cases(variant, count) {
            let options = Options::new().with("qk_norm", &case.options["qk_l2norm_inside"]);
            check_as(&case, variant, &names, options);
        }
    }
}

#[test]
fn fast_weights_equal_flash_linear_attention() {
    check("fwp-dpfp", 3, &[], |case| Options::new().with("nu", &case.options["nu"]));
}

#[test]
fn mamba3_equals_its_recurrence() {
    let names = [("A", "a"), ("D", "d"), ("kprev", "k_before"), ("vprev", "v_before")];
    check("mamba3", 3, &names, plain);
}

#[test]
fn ojas_rule_equals_its_recurrence() {
    check("gated-oja", 3, &[("gv", "log_decay")], |_| Options::new().with("v_norm", false));
}

#[test]
fn momentum_equals_flash_linear_attention() {
    check("momentum-delta", 3, &[("g_mu", "log_mu")], raw_keys);
    check("titans-linear", 3, &[("g_mu", "log_mu")], raw_keys);
}

#[test]
fn mesanet_equals_flash_linear_attention() {
    check("mesanet", 3, &[("lamb", "lambda")], raw_keys);
}
