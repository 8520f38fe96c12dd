//! The variants of kernelised attention hold what their profiles promise.

use attn_core::registry::{Options, find};
use attn_linear::registry;
use attn_testkit::conformance;

fn check(name: &str, configs: &[&[(&str, &str)]]) {
    let entry = *find(&registry(), name).unwrap();
    conformance::check(&entry);
    let of =
        |pairs: &&[(&str, &str)]| pairs.iter().fold(Options::new(), |all, (key, value)| all.with(key, value));
    let configs: Vec<Options> = configs.iter().map(of).collect();
    if !configs.is_empty() {
        conformance::check_with(&entry, &configs);
    }
}

#[test]
fn linear_relu_keeps_its_promises() {
    check("linear-relu", &[&[("eps", "0.5")]]);
}

#[test]
fn performer_keeps_its_promises() {
    check(
        "performer",
        &[&[("kernel", "relu")], &[("kernel", "relu"), ("causal", "true")], &[("key_max", "false")]],
    );
}

#[test]
fn rfa_keeps_its_promises() {
    check("rfa", &[&[("gate", "0.7")], &[("gate", "1")], &[("gate", "0")]]);
}

#[test]
fn cosformer_keeps_its_promises() {
    check("cosformer", &[&[("causal", "true"), ("length", "1048576")]]);
}

#[test]
fn based_keeps_its_promises() {
    check("based", &[&[("normalize", "false")]]);
}

#[test]
fn rebased_keeps_its_promises() {
    check("rebased", &[]);
}

#[test]
fn hedgehog_keeps_its_promises() {
    check("hedgehog", &[&[("factor", "1")]]);
}

#[test]
fn efficient_keeps_its_promises() {
    check("efficient", &[&[("scale", "0.25")]]);
}
