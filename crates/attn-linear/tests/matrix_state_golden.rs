//! The variants of the matrix-state engine against vectors computed by other people's packages.

use attn_core::registry::{NamedTensors, Options, find};
use attn_linear::registry;
use attn_testkit::golden::{GoldenCase, load_dir};

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|case| case.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

/// Inputs under our names.
fn renamed(case: &GoldenCase, names: &[(&str, &str)]) -> NamedTensors {
    let ours = |name: &String| {
        names.iter().find(|(theirs, _)| theirs == name).map_or(name.clone(), |(_, o)| o.to_string())
    };
    NamedTensors(case.inputs.0.iter().map(|(name, tensor)| (ours(name), tensor.clone())).collect())
}

/// Runs every case of `variant`, with the file's scale, as ours.
fn check_as(
    variant: &str,
    ours: &str,
    count: usize,
    names: &[(&str, &str)],
    options: impl Fn(&GoldenCase) -> Options,
) {
    for case in cases(variant, count) {
        let tensors = renamed(
            &case,
            &[&[("s0", "initial_state"), ("g", "log_decay"), ("log_w", "log_decay")], names].concat(),
        );
        let options = options(&case).with("scale", &case.options["scale"]);
        let got = find(&registry(), ours).unwrap().run(&options, &tensors).unwrap();
        case.assert_outputs(&got);
    }
}

fn check(variant: &str, count: usize, names: &[(&str, &str)], options: impl Fn(&GoldenCase) -> Options) {
    check_as(variant, variant, count, names, options);
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
