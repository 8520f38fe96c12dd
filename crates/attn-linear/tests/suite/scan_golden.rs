//! The variants of the scan engine against vectors computed by other people's packages.

use crate::golden_cases::{cases, check};
use attn_core::registry::Options;

#[test]
fn hgrn_equals_flash_linear_attention() {
    let cases = cases("hgrn", "");
    assert_eq!(cases.len(), 3);
    cases.iter().for_each(|case| check(case, "hgrn", &Options::new()));
}

#[test]
fn mamba1_equals_transformers() {
    let cases = cases("mamba1", "");
    assert_eq!(cases.len(), 3);
    cases.iter().for_each(|case| check(case, "mamba1", &Options::new()));
}

#[test]
fn longhorn_equals_its_recurrence() {
    let cases = cases("longhorn", "");
    assert_eq!(cases.len(), 2);
    cases.iter().for_each(|case| check(case, "longhorn", &Options::new()));
}

#[test]
fn rwkv4_equals_transformers() {
    let cases = cases("rwkv4", "");
    assert_eq!(cases.len(), 3);
    cases.iter().for_each(|case| check(case, "rwkv4", &Options::new()));
}

#[test]
fn aft_simple_equals_aft_pytorch() {
    let cases = cases("aft", "simple");
    assert_eq!(cases.len(), 6);
    for case in cases {
        check(&case, "aft-simple", &Options::new().with("causal", &case.options["causal"]));
    }
}

#[test]
fn aft_full_equals_aft_pytorch() {
    let cases = cases("aft", "full");
    assert_eq!(cases.len(), 6);
    for case in cases {
        let options = Options::new().with("causal", &case.options["causal"]);
        check(&case, "aft-full", &options);
        // A window that holds every pair is none.
        check(&case, "aft-local", &options.with("window", 64));
    }
}

#[test]
fn rglru_equals_transformers() {
    let cases = cases("rglru", "");
    assert_eq!(cases.len(), 2);
    cases.iter().for_each(|case| check(case, "rglru", &Options::new()));
}
