//! Cross-covariance attention: promises, gradients, and its formula in float64.

use crate::differences;
use crate::golden_cases::{cases, check};
use attn_core::AttnShape;
use attn_core::registry::{Options, find};
use attn_linear::registry;
use attn_testkit::conformance;

#[test]
fn xca_keeps_its_promises() {
    let entry = *find(&registry(), "xca").unwrap();
    conformance::check(&entry);
    conformance::check_with(&entry, &[Options::new().with("temperature", 5)]);
}

#[test]
fn gradients_equal_finite_differences() {
    let entry = *find(&registry(), "xca").unwrap();
    for head_dim_v in [3, 4, 6] {
        let shape = AttnShape { batch: 2, head_dim_v, ..AttnShape::square(2, 70, 4) };
        differences::check(&entry, &Options::new().with("temperature", 3), shape, 5);
    }
}

#[test]
fn xca_equals_its_formula() {
    let cases = cases("xca", "");
    assert_eq!(cases.len(), 2);
    cases.iter().for_each(|case| check(case, "xca", &Options::new()));
}
