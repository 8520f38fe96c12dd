//! Golden cases through the registry: outputs, and gradients from `grad_out`.

use attn_core::registry::{NamedTensor, Options, find};
use attn_linear::registry;
use attn_testkit::compare::{Tol, assert_close};
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
    let what = format!("{} {}", case.variant, case.case);
    let got =
        find(&registry(), ours).unwrap().run(options, &tensors).unwrap_or_else(|e| panic!("{what}: {e}"));
    case.assert_outputs(&got);
    for (name, want) in &case.grads.0 {
        let full = format!("grad.{name}");
        let what = format!("{what}: {full}");
        let NamedTensor { shape, data } = got.require(&full).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(*shape, want.shape, "{what}: shape");
        let want = want.data.to_f64();
        let tol = match case.tolerance_for(&full).unwrap_or_else(|| panic!("{what}: no tolerance")) {
            // One token whose output is its value: the gradient by its weight is a difference of equal numbers of order one.
            _ if want.iter().all(|x| x.abs() < 1e-9) => Tol::AllClose { atol: 5e-6, rtol: 0.0 },
            tol => tol,
        };
        assert_close(&what, &data.to_f64(), &want, tol);
    }
}
