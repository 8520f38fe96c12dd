//! Golden cases through the registry: outputs, and gradients from `grad_out`.

use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
use attn_linear::registry;
use attn_testkit::compare::assert_close;
use attn_testkit::golden::{GoldenCase, load_dir};

/// The stored cases of a variant whose name starts with `prefix`.
pub(crate) fn cases(variant: &str, prefix: &str) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    all.into_iter().filter(|case| case.variant == variant && case.case.starts_with(prefix)).collect()
}

/// Runs a case on the variant `ours` and compares every output and every gradient it stores.
pub(crate) fn check(case: &GoldenCase, ours: &str, options: &Options) {
    let mut tensors = case.inputs.clone();
    if let Some(w) = &case.w {
        tensors.0.insert("grad_out".into(), w.clone());
    }
    check_on(case, ours, options, &tensors);
}

/// [`check`] on other tensors than the case's own.
pub(crate) fn check_on(case: &GoldenCase, ours: &str, options: &Options, tensors: &NamedTensors) {
    let what = format!("{} {}", case.variant, case.case);
    let got =
        find(&registry(), ours).unwrap().run(options, tensors).unwrap_or_else(|e| panic!("{what}: {e}"));
    case.assert_outputs(&got);
    for (name, want) in &case.grads.0 {
        let full = format!("grad.{name}");
        let what = format!("{what}: {full}");
        let NamedTensor { shape, data } = got.require(&full).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(*shape, want.shape, "{what}: shape");
        let tol = case.tolerance_for(&full).unwrap_or_else(|| panic!("{what}: no tolerance"));
        assert_close(&what, &data.to_f64(), &want.data.to_f64(), tol);
    }
}
