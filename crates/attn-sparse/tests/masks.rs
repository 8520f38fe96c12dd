//! Masks of whole sequences against masks, outputs and gradients of other people's code; see `testdata/README.md`.

use attn_core::AttnShape;
use attn_core::mask::{Head, Mask};
use attn_core::registry::{NamedTensors, Options, find};
use attn_sparse::{
    BidirectionalSpans, DilatedWindow, DocumentLayout, Documents, Padded, Pattern, PrefixLm, SlidingWindow,
    SpanLayout,
};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::conformance;
use attn_testkit::golden::{GoldenCase, load_dir};
use serde_json::Value;

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|c| c.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

/// The mask must be the stored one, which may be shared by batch entries and heads.
fn check_mask(case: &GoldenCase, mask: &dyn Mask) {
    let shape: AttnShape = case.inputs.qkv().unwrap().shape();
    let given = case.given.require("mask").unwrap();
    let [batch, heads, n_q, n_kv] = given.shape[..] else { panic!("{}: {:?}", case.case, given.shape) };
    assert_eq!((n_q, n_kv), (shape.n_q, shape.n_kv));
    let given = given.data.to_f64();
    for b in 0..shape.batch {
        for h in 0..shape.n_heads_q {
            let first = ((b % batch) * heads + h % heads) * n_q * n_kv;
            for (at, want) in given[first..first + n_q * n_kv].iter().enumerate() {
                let (i, j) = (at / n_kv, at % n_kv);
                let sees = mask.sees(Head { batch: b, head: h }.pair(i, j));
                assert_eq!(sees, *want == 1.0, "{} {}: ({b}, {h}, {i}, {j})", case.variant, case.case);
            }
        }
    }
}

/// Outputs, and gradients where they are stored.
fn check_run(case: &GoldenCase, name: &str, options: &Options, extra: &[(&str, &str)]) {
    let entries = attn_sparse::registry();
    let entry = find(&entries, name).unwrap();
    let mut tensors = case.inputs.clone();
    for (from, to) in extra {
        let tensor = tensors.0.remove(*from).or_else(|| case.given.get(from).cloned());
        if !to.is_empty() {
            tensors.0.insert((*to).into(), tensor.unwrap());
        }
    }
    case.assert_outputs(&entry.run(options, &tensors).unwrap());
    if let Some(w) = &case.w {
        tensors.0.insert("grad_o".into(), w.clone());
        let got: NamedTensors = entry.run(options, &tensors).unwrap();
        case.assert_outputs(&got);
        assert!(!case.grads.0.is_empty());
        for (input, want) in &case.grads.0 {
            let full = format!("grad.{input}");
            let (_, got) = got.f32(&full).unwrap().unwrap_or_else(|| panic!("no {full}"));
            let tol: Tol = case.tolerance_for(&full).unwrap();
            assert_close(&format!("{} {}: {full}", case.variant, case.case), got, &want.data.to_f64(), tol);
        }
    }
}

fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
}

fn joined(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

fn mask_of<P: Pattern>(case: &GoldenCase, pattern: &P) -> P::Mask {
    pattern.mask(&case.inputs.qkv().unwrap().shape()).unwrap()
}

#[test]
fn padding() {
    for case in cases("padded-causal", 1) {
        let lengths = numbers(&case.options["kv_lengths"]);
        let options = Options::new().with("kv_lengths", joined(&lengths)).with("causal", true);
        check_mask(&case, &mask_of(&case, &Padded { lengths, causal: true }));
        check_run(&case, "padded-causal", &options, &[]);
    }
}

#[test]
fn prefixes() {
    for case in cases("prefix-lm", 1) {
        let prefix = case.options["prefix"].as_u64().unwrap() as usize;
        check_mask(&case, &mask_of(&case, &PrefixLm { prefix: vec![prefix] }));
        check_run(&case, "prefix-lm", &Options::new().with("prefix", prefix), &[]);
    }
}

#[test]
fn spans() {
    for case in cases("causal-with-bidirectional-spans", 1) {
        let spans: Vec<_> = case.options["spans"].as_array().unwrap().iter().map(numbers).collect();
        let ranges: Vec<_> = spans.iter().map(|s| s[0]..s[1]).collect();
        let text: Vec<_> = spans.iter().map(|s| format!("{}..{}", s[0], s[1])).collect();
        check_mask(&case, &mask_of(&case, &BidirectionalSpans { spans: SpanLayout::Ranges(ranges) }));
        let name = "causal-with-bidirectional-spans";
        check_run(&case, name, &Options::new(), &[]);
        check_run(&case, name, &Options::new().with("spans", text.join(",")), &[("span_ids", "")]);
    }
}

#[test]
fn documents() {
    for case in cases("document", 2) {
        let offsets = numbers(&case.options["cu_seqlens"]);
        let causal = case.options["causal"].as_bool().unwrap();
        let options = Options::new().with("causal", causal);
        check_run(&case, "document", &options, &[]);
        let options = options.with("cu_seqlens", joined(&offsets));
        check_run(&case, "document", &options, &[("document_ids", "")]);
        check_mask(&case, &mask_of(&case, &Documents { layout: DocumentLayout::Offsets(offsets), causal }));
    }
}

#[test]
fn dilated_windows() {
    for case in cases("dilated-window", 2) {
        let size = |name: &str| case.options[name].as_u64().unwrap() as usize;
        let causal = case.options["causal"].as_bool().unwrap();
        let (window, dilation) = (size("window"), size("dilation"));
        check_mask(&case, &mask_of(&case, &DilatedWindow::new(window, dilation, causal)));
        let options = Options::new().with("window", window).with("dilation", dilation);
        check_run(&case, "dilated-window", &options.with("causal", causal), &[]);
    }
}

#[test]
fn sink_logits() {
    for case in cases("sink-logit", 2) {
        let window = case.options["window"].as_u64().map(|w| w as usize);
        check_mask(&case, &mask_of(&case, &SlidingWindow::causal(window.unwrap_or(usize::MAX))));
        let options = Options::new().with("causal", true);
        let options = window.map_or(options.clone(), |window| options.with("window", window));
        check_run(&case, "sink-logit", &options, &[]);
    }
}

#[test]
fn small_settings_keep_their_promises() {
    let set = |pairs: &[&str]| Options::parse(pairs.iter().copied()).unwrap();
    let all: [(&str, Vec<Options>); 8] = [
        ("prefix-lm", vec![set(&["prefix=0"]), set(&["prefix=17"])]),
        ("causal-with-bidirectional-spans", vec![set(&["span_len=5", "span_every=9"])]),
        ("document", vec![set(&["document_len=7"]), set(&["document_len=33", "causal=false"])]),
        (
            "local-buckets",
            vec![
                set(&["bucket=7", "causal=true"]),
                set(&["bucket=16", "back=0", "forward=2"]),
                set(&["bucket=1", "back=3", "forward=0"]),
            ],
        ),
        (
            "dilated-window",
            vec![
                set(&["window=3", "dilation=5"]),
                set(&["window=1", "dilation=1", "causal=true"]),
                set(&["window=9", "dilation=2", "causal=true"]),
                set(&["window=2", "dilation=300"]),
            ],
        ),
        ("a-shape", vec![set(&["n_sinks=3", "window=9"])]),
        ("duo-attention", vec![set(&["n_sinks=2", "window=5"]), set(&["full_heads=1.0"])]),
        ("sink-logit", vec![set(&["window=9", "sink=1.5"]), set(&["causal=false", "window=5"])]),
    ];
    for (name, configs) in all {
        conformance::check_with(find(&attn_sparse::registry(), name).unwrap(), &configs);
    }
}
