//! The registry against vectors computed by other people's packages.

use crate::golden_cases::{self, check_named};
use attn_core::registry::{NamedTensor, Options, TensorData};
use attn_testkit::golden::GoldenCase;

fn cases(variant: &str) -> Vec<GoldenCase> {
    golden_cases::cases(variant, "")
}

fn floats(tensor: &NamedTensor) -> &[f32] {
    let TensorData::F32(data) = &tensor.data else { panic!("not f32") };
    data
}

/// Outputs and gradients; `state_unit` is what the file's states are multiplied by.
fn check(case: &GoldenCase, options: &Options, state_unit: f32) {
    let names = [("s0", "initial_state"), ("z0", "initial_normaliser"), ("log_gamma", "log_decay")];
    check_named(case, &case.variant, &names, state_unit, options);
}

/// The file's options that have the same name and meaning here.
fn options(case: &GoldenCase, names: &[&str]) -> Options {
    names.iter().fold(Options::new(), |options, name| options.with(name, &case.options[*name]))
}

#[test]
fn linear_equals_flash_linear_attention() {
    let cases = cases("linear");
    assert_eq!(cases.len(), 5);
    for case in cases {
        check(&case, &options(&case, &["causal", "scale"]), 1.0);
    }
}

#[test]
fn linear_elu_equals_flash_linear_attention_and_performer() {
    let cases = cases("linear-elu");
    assert_eq!(cases.len(), 8);
    for case in cases {
        check(&case, &options(&case, &["causal", "scale", "eps"]), 1.0);
    }
}

#[test]
fn retnet_equals_flash_linear_attention() {
    let cases: Vec<_> = cases("retnet").into_iter().filter(|c| c.case.starts_with("fla")).collect();
    assert_eq!(cases.len(), 3);
    for case in cases {
        check(&case, &options(&case, &["scale"]), 1.0);
    }
}

#[test]
fn retnet_equals_yet_another_retnet() {
    let cases: Vec<_> = cases("retnet").into_iter().filter(|c| !c.case.starts_with("fla")).collect();
    assert_eq!(cases.len(), 4);
    for case in &cases {
        let scale = case.options["scale"].as_f64().unwrap() as f32;
        check(case, &options(case, &["scale"]), scale);
    }
    // The decays in these files are those of the option `gammas=torchscale`.
    for case in cases.iter().filter(|c| c.case.starts_with("rec")) {
        let given = floats(case.inputs.get("log_gamma").unwrap());
        for (want, got) in given.iter().zip(attn_linear::Gammas::Torchscale.log_decay(given.len())) {
            assert!((want - got).abs() <= 1e-6 * want.abs(), "{}: {got} {want}", case.case);
        }
    }
}
