//! Cases computed by other people's code.

use crate::entry;
use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData};
use attn_testkit::compare::assert_close;
use attn_testkit::golden::{GoldenCase, load_dir};

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|c| c.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

/// The options of a case under other names.
fn options(case: &GoldenCase, names: &[(&str, &str)]) -> Options {
    names.iter().fold(Options::new(), |options, (theirs, ours)| match &case.options[*theirs] {
        serde_json::Value::Null => options,
        serde_json::Value::String(text) => options.with(ours, text),
        value => options.with(ours, value),
    })
}

fn i32s(tensor: &NamedTensor) -> &[i32] {
    match &tensor.data {
        TensorData::I32(numbers) => numbers,
        other => panic!("{other:?}"),
    }
}

/// Inputs of a case with some of what it decided.
fn with_given(case: &GoldenCase, without: &[&str], names: &[&str]) -> NamedTensors {
    let mut tensors = case.inputs.clone();
    without.iter().for_each(|name| drop(tensors.0.remove(*name)));
    for name in names {
        tensors.0.insert(name.to_string(), case.given.require(name).unwrap().clone());
    }
    tensors
}

#[test]
fn reformer_golden() {
    for case in cases("reformer-lsh", 4) {
        let names = ["bucket_size", "n_hashes", "n_buckets", "attend_across_buckets"];
        let mut pairs: Vec<(&str, &str)> = names.iter().map(|name| (*name, *name)).collect();
        pairs.extend([
            ("allow_duplicate_attention", "allow_duplicate_attention"),
            ("self_logit", "self_logit"),
        ]);
        pairs.push(("causal", "causal"));
        let options = options(&case, &pairs);
        let drawn = entry("reformer-lsh").run(&options, &case.inputs).unwrap();
        let found = drawn.require("buckets").unwrap();
        let want = case.given.require("buckets").unwrap();
        assert_eq!((i32s(found), &found.shape), (i32s(want), &want.shape), "{}", case.case);
        case.assert_outputs(&drawn);
        let tensors = with_given(&case, &["rotations"], &["buckets"]);
        case.assert_outputs(&entry("reformer-lsh").run(&options, &tensors).unwrap());
    }
}

#[test]
fn routing_golden() {
    for case in cases("routing", 3) {
        let names = [
            ("num_clusters", "num_clusters"),
            ("window", "window"),
            ("causal", "causal"),
            ("shared_qk", "shared_qk"),
            ("self_logit", "self_logit"),
        ];
        let options = options(&case, &names).with("mean_eps", 1e-5);
        let chosen = entry("routing").run(&options, &case.inputs).unwrap();
        for name in ["q_index", "k_index"] {
            let (found, want) = (chosen.require(name).unwrap(), case.given.require(name).unwrap());
            assert_eq!(found.shape, want.shape);
            let window = want.shape[3];
            for (found, want) in i32s(found).chunks(window).zip(i32s(want).chunks(window)) {
                let mut want = want.to_vec();
                want.sort_unstable();
                assert_eq!(found, want, "{} {name}", case.case);
            }
        }
        case.assert_outputs(&chosen);
        let tensors = with_given(&case, &[], &["q_index", "k_index"]);
        case.assert_outputs(&entry("routing").run(&options, &tensors).unwrap());
    }
}

#[test]
fn sinkhorn_golden() {
    for case in cases("sinkhorn", 3) {
        let options = options(&case, &[("kind", "kind"), ("bucket_size", "bucket_size"), ("n_top", "n_top")]);
        // The reference has a temperature, and does not use it for these kinds.
        let options = options.with("temperature", 1);
        let tensors = with_given(&case, &[], &["sort"]);
        case.assert_outputs(&entry("sinkhorn").run(&options, &tensors).unwrap());
        let network = entry("sinkhorn").run(&options, &case.inputs).unwrap();
        case.assert_outputs(&network);
        let (found, want) = (network.require("sort").unwrap(), case.given.require("sort").unwrap());
        assert_eq!(found.shape, want.shape, "{}", case.case);
        let (sources, n_null) = (want.shape[3], case.options["n_top"].as_u64().unwrap() as usize);
        let n_null = if case.options["kind"] == "causal" { n_null } else { 0 };
        // Null sources are equal, so that it does not matter which of them is first.
        let fold = |sort: Vec<f64>| -> Vec<f64> {
            let row = |row: &[f64]| {
                let mut folded = row.to_vec();
                folded[..n_null].fill(row[..n_null].iter().sum());
                folded
            };
            sort.chunks(sources).flat_map(row).collect()
        };
        let mut found = fold(found.data.to_f64());
        let mut want = fold(want.data.to_f64());
        // First and second null source of the first bucket: in any order.
        for sort in [&mut found, &mut want] {
            sort.chunks_mut(sources * n_null.max(1)).for_each(|bucket| {
                let mut rows: Vec<Vec<f64>> = bucket.chunks(sources).map(<[f64]>::to_vec).collect();
                rows.sort_by(|a, b| a.partial_cmp(b).unwrap());
                bucket.copy_from_slice(&rows.concat());
            });
        }
        assert_close(&case.case, &found, &want, case.tolerance_for("out.o").unwrap());
    }
}
