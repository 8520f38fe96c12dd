//! Golden files are read whole, and whatever is wrong with one is said.

use attn_core::Family;
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use attn_testkit::compare::Tol;
use attn_testkit::golden::{GoldenCase, files, load_dir};
use safetensors::{Dtype, tensor::TensorView};
use std::collections::HashMap;

const METADATA: [(&str, &str); 7] = [
    ("format", "attn-golden-1"),
    ("family", "exact"),
    ("variant", "sdpa"),
    ("case", "two-keys"),
    ("reference", "none==0"),
    ("options", r#"{"causal": true, "softmax_scale": 0.5}"#),
    ("tolerance", r#"{"metric": "allclose", "out": [1e-5, 1e-4], "lse": [0, 1e-6], "grad": [1e-3, 0]}"#),
];

/// A file with `in.q = [[1, 2]]`, `out.o = [3]`, masks and indices, after `edit` has changed its metadata.
fn file(edit: impl Fn(&mut HashMap<String, String>)) -> Vec<u8> {
    with_tensor("in.kept", Dtype::I32, edit)
}

fn with_tensor(name: &str, dtype: Dtype, edit: impl Fn(&mut HashMap<String, String>)) -> Vec<u8> {
    let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (q, o, i) = (bytes(&[1.0, 2.0]), bytes(&[3.0]), 7i32.to_le_bytes());
    let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data).unwrap();
    let tensors = [
        ("in.q", view(Dtype::F32, &[1, 2], &q)),
        ("out.o", view(Dtype::F32, &[1], &o)),
        ("out.lse", view(Dtype::F32, &[1], &o)),
        ("grad.q", view(Dtype::F32, &[1, 2], &q)),
        ("given.mask", view(Dtype::BOOL, &[2], &[1, 0])),
        ("w", view(Dtype::F32, &[1], &o)),
        (name, view(dtype, &[1], &i)),
    ];
    let mut metadata = METADATA.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    edit(&mut metadata);
    safetensors::serialize(tensors, Some(metadata)).unwrap()
}

#[test]
fn a_case_is_read_whole() {
    let case = GoldenCase::parse(&file(|_| ())).unwrap();
    assert_eq!((case.family, case.variant.as_str(), case.case.as_str()), (Family::Exact, "sdpa", "two-keys"));
    assert_eq!(case.options["softmax_scale"], 0.5);
    assert_eq!(case.inputs.f32("q").unwrap().unwrap(), (&[1, 2][..], &[1.0, 2.0][..]));
    assert_eq!(case.outputs.f32("o").unwrap().unwrap().1, [3.0]);
    assert_eq!(case.grads.f32("q").unwrap().unwrap().1, [1.0, 2.0]);
    let mask = NamedTensor { shape: vec![2], data: TensorData::U8(vec![1, 0]) };
    assert_eq!(case.given.get("mask"), Some(&mask));
    assert_eq!(case.inputs.get("kept").unwrap().data, TensorData::I32(vec![7]));
    assert_eq!(case.w.unwrap().data, TensorData::F32(vec![3.0]));
}

#[test]
fn tolerances_go_by_name_then_by_group() {
    let case = GoldenCase::parse(&file(|_| ())).unwrap();
    let close = |atol, rtol| Some(Tol::AllClose { atol, rtol });
    assert_eq!(case.tolerance_for("out.o"), close(1e-5, 1e-4));
    assert_eq!(case.tolerance_for("out.sT"), close(1e-5, 1e-4));
    assert_eq!(case.tolerance_for("out.lse"), close(0.0, 1e-6));
    assert_eq!(case.tolerance_for("grad.lse"), close(1e-3, 0.0), "`lse` overrides `out`, not `grad`");
    assert_eq!(case.tolerance_for("aux.scores"), None);

    let scaled = r#"{"metric": "scaled-max", "out": 2e-5, "grad": 1e-4}"#;
    let case = GoldenCase::parse(&file(|m| drop(m.insert("tolerance".into(), scaled.into())))).unwrap();
    assert_eq!(case.tolerance_for("out.lse"), Some(Tol::ScaledMax(2e-5)));
    assert_eq!(case.tolerance_for("grad.q"), Some(Tol::ScaledMax(1e-4)));
}

#[test]
fn outputs_are_compared_by_name_shape_and_value() {
    let case = GoldenCase::parse(&file(|_| ())).unwrap();
    case.assert_outputs(&case.outputs);
    let rejected = |edit: fn(&mut NamedTensors), reason: &str| {
        let mut got = case.outputs.clone();
        edit(&mut got);
        let panic = std::panic::catch_unwind(|| case.assert_outputs(&got)).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(message.contains("sdpa two-keys") && message.contains(reason), "{message}");
    };
    let tensor = |x: f32| NamedTensor { shape: vec![1], data: TensorData::F32(vec![x]) };
    rejected(|got| drop(got.0.remove("lse")), "missing tensor `lse`");
    rejected(|got| got.0.get_mut("o").unwrap().shape = vec![1, 1], "o: shape");
    for wrong in [3.01, 0.0, f32::NAN, f32::INFINITY] {
        let mut got = case.outputs.clone();
        got.0.insert("o".into(), tensor(wrong));
        assert!(std::panic::catch_unwind(|| case.assert_outputs(&got)).is_err(), "{wrong} accepted for 3");
    }
}

#[test]
fn what_is_wrong_is_said() {
    let refused = |bytes: &[u8], words: &[&str]| {
        let error = GoldenCase::parse(bytes).unwrap_err().to_string();
        assert!(words.iter().all(|w| error.contains(w)), "`{error}` should say {words:?}");
        assert!(!error.contains('\n'), "one line: {error}");
    };
    refused(b"no such thing", &["not a safetensors file"]);
    refused(&file(|_| ())[..200], &["not a safetensors file"]);
    refused(&file(|m| drop(m.remove("format"))), &["not a golden file", "attn-golden-1"]);
    refused(&file(|m| drop(m.insert("format".into(), "attn-golden-2".into()))), &["attn-golden-2"]);
    for key in ["family", "variant", "case", "reference", "options", "tolerance"] {
        refused(&file(|m| drop(m.remove(key))), &[key, "missing"]);
    }
    let set = |key: &str, value: &str| file(|m| drop(m.insert(key.into(), value.into())));
    refused(&set("family", "magic"), &["magic", "exact, sparse"]);
    refused(&set("options", "{causal: true}"), &["options", "JSON"]);
    refused(&set("options", "[1]"), &["options", "JSON object"]);
    refused(&set("tolerance", "{}"), &["metric", "allclose or scaled-max"]);
    refused(&set("tolerance", r#"{"metric": "allclose"}"#), &["`out` is missing"]);
    refused(&set("tolerance", r#"{"metric": "allclose", "out": 1}"#), &["`out` is 1", "[atol, rtol]"]);
    refused(&set("tolerance", r#"{"metric": "scaled-max", "out": [1, 2]}"#), &["`out`", "one number"]);
    refused(&set("tolerance", r#"{"metric": "scaled-max", "out": -1}"#), &["`out` is -1"]);
    refused(&with_tensor("stray", Dtype::F32, |_| ()), &["stray", "in.*"]);
    refused(&with_tensor("in.x", Dtype::U32, |_| ()), &["in.x", "U32"]);
}

#[test]
fn folders_are_read_in_a_stable_order() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("b")).unwrap();
    for name in ["z.safetensors", "a.safetensors", "b/m.safetensors"] {
        std::fs::write(dir.path().join(name), file(|_| ())).unwrap();
    }
    std::fs::write(dir.path().join("notes.txt"), "not a case").unwrap();
    let cases = load_dir(dir.path()).unwrap();
    let names: Vec<_> = cases.iter().map(|c| c.path.strip_prefix(dir.path()).unwrap()).collect();
    assert_eq!(
        names.iter().map(|n| n.to_str().unwrap()).collect::<Vec<_>>(),
        ["a.safetensors", "b/m.safetensors", "z.safetensors"]
    );
    assert_eq!(files(dir.path().join("a.safetensors")).unwrap().len(), 1);

    let nowhere = load_dir(dir.path().join("nowhere")).unwrap_err().to_string();
    assert!(nowhere.contains("nowhere") && nowhere.contains("cannot be read"), "{nowhere}");
    std::fs::write(dir.path().join("b/bad.safetensors"), "x").unwrap();
    let bad = load_dir(dir.path()).unwrap_err().to_string();
    assert!(bad.contains("bad.safetensors: is not a safetensors file"), "{bad}");
}
