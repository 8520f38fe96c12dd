//! Memories written once a segment: promises, gradients, and vectors computed elsewhere.

use crate::differences;
use crate::golden_cases::{cases, check};
use attn_core::AttnShape;
use attn_core::registry::{Options, find};
use attn_linear::registry;
use attn_testkit::conformance;

fn promises(name: &str, configs: &[&[(&str, &str)]]) {
    let entry = *find(&registry(), name).unwrap();
    conformance::check(&entry);
    let of =
        |pairs: &&[(&str, &str)]| pairs.iter().fold(Options::new(), |all, (key, value)| all.with(key, value));
    conformance::check_with(&entry, &configs.iter().map(of).collect::<Vec<_>>());
}

#[test]
fn ttt_linear_keeps_its_promises() {
    promises("ttt-linear", &[&[("mini_batch", "1")], &[("mini_batch", "7")]]);
}

#[test]
fn infini_keeps_its_promises() {
    promises("infini", &[&[("delta", "true")], &[("segment", "1")], &[("segment", "7"), ("delta", "true")]]);
}

#[test]
fn gradients_equal_finite_differences() {
    let shape = AttnShape { batch: 2, n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, 20, 4) };
    let ttt = Options::new().with("mini_batch", 6).with("eps", 0.1);
    let infini = Options::new().with("segment", 6).with("eps", 0.1);
    for (name, options) in
        [("ttt-linear", ttt), ("infini", infini.clone()), ("infini", infini.with("delta", true))]
    {
        let entry = *find(&registry(), name).unwrap();
        differences::check(&entry, &options, shape, 5);
    }
}

#[test]
fn ttt_linear_equals_flash_linear_attention() {
    let cases = cases("ttt-linear", "");
    assert_eq!(cases.len(), 3);
    for case in cases {
        check(&case, "ttt-linear", &Options::new().with("mini_batch", &case.options["mini_batch"]));
    }
}

#[test]
fn infini_equals_its_recurrence() {
    let cases = cases("infini", "");
    assert_eq!(cases.len(), 4);
    for case in cases {
        let options = Options::new().with("segment", &case.options["segment"]).with("eps", 1e-6);
        check(&case, "infini", &options.with("delta", case.case.starts_with("delta")));
    }
}
