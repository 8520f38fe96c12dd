//! The patterns against masks and outputs of other people's code; see `testdata/README.md`.

use attn_core::AttnShape;
use attn_core::mask::{Head, Mask};
use attn_core::registry::{Options, find};
use attn_sparse::{ChunkedCausal, Pattern, SinkWindow, SlidingWindow};
use attn_testkit::golden::{GoldenCase, load_dir};

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|c| c.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

/// The pattern's mask must be the stored one, and its outputs those of dense attention under that mask.
fn check<P: Pattern>(case: &GoldenCase, pattern: P, options: &[(&str, usize)], causal: bool) {
    let shape: AttnShape = case.inputs.qkv().unwrap().shape();
    let (mask, head) = (pattern.mask(&shape).unwrap(), Head { batch: 0, head: 0 });
    let seen = (0..shape.n_q).flat_map(|i| (0..shape.n_kv).map(move |j| (i, j)));
    let seen: Vec<f64> = seen.map(|(i, j)| f64::from(u8::from(mask.sees(head.pair(i, j))))).collect();
    assert_eq!(seen, case.given.require("mask").unwrap().data.to_f64(), "{}: mask", case.case);

    let entries = attn_sparse::registry();
    let entry = find(&entries, P::NAME).unwrap();
    let mut options = options.iter().fold(Options::new(), |all, (name, value)| all.with(name, value));
    if causal {
        options = options.with("causal", true);
    }
    case.assert_outputs(&entry.run(&options, &case.inputs).unwrap());
}

fn size(case: &GoldenCase, name: &str) -> usize {
    case.options[name].as_u64().unwrap() as usize
}

#[test]
fn causal_windows() {
    for case in cases("sliding-window-causal", 6) {
        let window = size(&case, "window");
        check(&case, SlidingWindow::causal(window), &[("window", window)], true);
    }
}

#[test]
fn bidirectional_windows() {
    for case in cases("sliding-window-bidirectional", 3) {
        let (left, right) = (size(&case, "window_left"), size(&case, "window_right"));
        check(&case, SlidingWindow { left, right }, &[("window_left", left), ("window_right", right)], false);
    }
}

#[test]
fn sinks_and_a_window() {
    for case in cases("streaming-sinks", 3) {
        let (n_sinks, window) = (size(&case, "sinks"), size(&case, "window"));
        check(&case, SinkWindow { n_sinks, window }, &[("n_sinks", n_sinks), ("window", window)], false);
    }
}

#[test]
fn chunks() {
    for case in cases("chunked-causal", 2) {
        let chunk_len = size(&case, "chunk");
        check(&case, ChunkedCausal { chunk_len }, &[("chunk_len", chunk_len)], false);
    }
}
