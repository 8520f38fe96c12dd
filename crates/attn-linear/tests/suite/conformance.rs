//! Every variant holds what its profile promises.

use attn_core::registry::{Entry, Options, find};
use attn_linear::registry;
use attn_testkit::conformance;

/// The defaults, both values of `causal`, and chunks whose edges short inputs reach.
fn check(name: &str, causal: bool) {
    let entry: Entry = *find(&registry(), name).unwrap();
    conformance::check(&entry);
    let chunks = [1, 7, 16].map(|len| Options::new().with("causal", causal).with("chunk_len", len));
    conformance::check_with(&entry, &chunks);
}

#[test]
fn linear_keeps_its_promises() {
    check("linear", true);
    check("linear", false);
}

#[test]
fn linear_elu_keeps_its_promises() {
    check("linear-elu", true);
    check("linear-elu", false);
}

#[test]
fn retnet_keeps_its_promises() {
    check("retnet", true);
    let entry = *find(&registry(), "retnet").unwrap();
    conformance::check_with(&entry, &[Options::new().with("gammas", "torchscale")]);
}
