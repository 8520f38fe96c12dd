//! Golden cases through the registry: outputs, and gradients from `grad_o`.

use crate::golden_variations;
use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
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
    check_named(case, ours, &[], 1.0, options);
}

/// As [`check`], where `names` says what we call some of the file's tensors, and the file's states are ours times
/// `state_unit`.
pub(crate) fn check_named(
    case: &GoldenCase,
    ours: &str,
    names: &[(&str, &str)],
    state_unit: f32,
    options: &Options,
) {
    let our_name =
        |name: &str| names.iter().find(|(theirs, _)| *theirs == name).map_or(name, |(_, n)| n).to_string();
    let unit = |name: &str| match name {
        "initial_state" => 1.0 / state_unit,
        "grad.initial_state" => 1.0 / state_unit,
        "sT" => state_unit,
        _ => 1.0,
    };
    let scaled = |name: &str, tensor: &NamedTensor| {
        let mut tensor = tensor.clone();
        if unit(name) != 1.0 {
            tensor.scale(unit(name));
        }
        tensor
    };
    let inputs = case.inputs.0.iter().map(|(name, tensor)| (our_name(name), scaled(&our_name(name), tensor)));
    let mut tensors = NamedTensors(inputs.collect());
    if let (Some(w), false) = (&case.w, case.grads.0.is_empty()) {
        tensors.0.insert("grad_o".into(), w.clone());
    }
    let what = format!("{} {}", case.variant, case.case);
    let entry = *find(&registry(), ours).unwrap();
    let got = entry.run(options, &tensors).unwrap_or_else(|e| panic!("{what}: {e}"));
    let outputs = case.outputs.0.keys().map(|name| {
        let ours = our_name(name);
        (name.clone(), scaled(&ours, got.require(&ours).unwrap_or_else(|e| panic!("{what}: {e}"))))
    });
    case.assert_outputs(&NamedTensors(outputs.collect()));
    for (name, want) in &case.grads.0 {
        let (theirs, full) = (format!("grad.{name}"), format!("grad.{}", our_name(name)));
        let what = format!("{what}: {full}");
        let got = scaled(&full, got.require(&full).unwrap_or_else(|e| panic!("{what}: {e}")));
        assert_eq!(got.shape, want.shape, "{what}: shape");
        let want = want.data.to_f64();
        let tol = match case.tolerance_for(&theirs).unwrap_or_else(|| panic!("{what}: no tolerance")) {
            // One token whose output is its value: the gradient by its weight is a difference of equal numbers of order one.
            _ if want.iter().all(|x| x.abs() < 1e-9) => Tol::AllClose { atol: 5e-6, rtol: 0.0 },
            tol => tol,
        };
        assert_close(&what, &got.data.to_f64(), &want, tol);
    }
    if case.case.ends_with("t17") {
        golden_variations::packed(&entry, options, &tensors);
        golden_variations::halves(&entry, options, &tensors);
    }
}
