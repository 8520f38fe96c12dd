//! The variants of kernelised attention against vectors computed by other people's packages.

use crate::golden_cases::{cases, check};
use attn_core::registry::Options;
use attn_testkit::golden::GoldenCase;

/// The file's options that have the same name and meaning here.
fn options(case: &GoldenCase, names: &[&str]) -> Options {
    names.iter().fold(Options::new(), |options, name| {
        let value = &case.options[*name];
        options.with(name, value.as_str().map_or_else(|| value.to_string(), str::to_string))
    })
}

#[test]
fn linear_relu_equals_performer_pytorch() {
    let cases = cases("linear-relu", "");
    assert_eq!(cases.len(), 1);
    cases.iter().for_each(|case| check(case, "linear-relu", &options(case, &["causal", "eps"])));
}

#[test]
fn performer_equals_performer_pytorch() {
    let cases = cases("performer", "");
    assert_eq!(cases.len(), 8);
    for case in cases {
        let options = options(&case, &["causal", "kernel", "feature_eps", "denom_eps"]);
        // The package takes the largest of all keys in the causal form too.
        let options = options.with("key_max", case.options["kernel"] == "softmax");
        check(&case, "performer", &options);
    }
}

#[test]
fn rfa_equals_its_recurrence() {
    let cases = cases("rfa", "");
    assert_eq!(cases.len(), 6);
    cases.iter().for_each(|case| check(case, "rfa", &options(case, &["causal"])));
}

#[test]
fn cosformer_equals_its_formula() {
    let cases = cases("cosformer", "");
    assert_eq!(cases.len(), 6);
    for case in cases {
        check(&case, "cosformer", &options(&case, &["causal", "eps"]).with("length", &case.options["m"]));
    }
}

#[test]
fn based_equals_flash_linear_attention() {
    let cases = cases("based", "");
    assert_eq!(cases.len(), 4);
    cases.iter().for_each(|case| check(case, "based", &options(case, &["causal", "eps", "normalize"])));
}

#[test]
fn rebased_equals_flash_linear_attention() {
    let cases = cases("rebased", "");
    assert_eq!(cases.len(), 3);
    cases.iter().for_each(|case| check(case, "rebased", &options(case, &["causal", "eps"])));
}

#[test]
fn hedgehog_equals_flash_linear_attention() {
    let cases = cases("hedgehog", "");
    assert_eq!(cases.len(), 3);
    cases.iter().for_each(|case| check(case, "hedgehog", &options(case, &["causal", "eps"])));
}

#[test]
fn efficient_equals_linear_attention_transformer_and_performer_pytorch() {
    let cases = cases("efficient", "");
    assert_eq!(cases.len(), 8);
    cases.iter().for_each(|case| check(case, "efficient", &options(case, &["causal", "scale"])));
}
