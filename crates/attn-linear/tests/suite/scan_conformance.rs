//! The variants of the scan engine hold what their profiles promise.

use attn_core::registry::{Options, find};
use attn_linear::registry;
use attn_testkit::conformance;

fn check(name: &str, configs: &[(&str, &str)]) {
    let entry = *find(&registry(), name).unwrap();
    conformance::check(&entry);
    let configs: Vec<Options> = configs.iter().map(|(key, value)| Options::new().with(key, value)).collect();
    if !configs.is_empty() {
        conformance::check_with(&entry, &configs);
    }
}

#[test]
fn hgrn_keeps_its_promises() {
    check("hgrn", &[("lower_bound", "0.9")]);
}

#[test]
fn mingru_keeps_its_promises() {
    check("mingru", &[]);
}

#[test]
fn mamba1_keeps_its_promises() {
    check("mamba1", &[]);
}

#[test]
fn longhorn_keeps_its_promises() {
    check("longhorn", &[]);
}

#[test]
fn rwkv4_keeps_its_promises() {
    check("rwkv4", &[]);
}

#[test]
fn aft_simple_keeps_its_promises() {
    check("aft-simple", &[]);
}

#[test]
fn aft_full_keeps_its_promises() {
    check("aft-full", &[("slope", "1.5")]);
}

#[test]
fn aft_local_keeps_its_promises() {
    check("aft-local", &[("window", "1"), ("window", "7")]);
}

#[test]
fn rglru_keeps_its_promises() {
    check("rglru", &[]);
}
