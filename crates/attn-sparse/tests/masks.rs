//! Masks of whole sequences against masks, outputs and gradients of other people's code; see `testdata/README.md`.

use attn_core::AttnShape;
use attn_core::mask::{Head, Mask, Pair};
use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData, find};
use attn_sparse::{
    BidirectionalSpans, BlockMask, BlockSizes, DilatedWindow, DocumentLayout, Documents, FlexLists, Padded,
    Pattern, PrefixLm, SlidingWindow, SpanLayout,
};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::conformance;
use attn_testkit::golden::{GoldenCase, load_dir};
use attn_testkit::inputs::Problem;
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
fn score_functions() {
    for case in cases("flex-score-mod", 4) {
        let name = case.options["score_mod"].as_str().unwrap();
        let (score_mod, window) = match name {
            "softcap" => ("none", None),
            "softcap_window" => ("none", Some(40)),
            other => (other, None),
        };
        let mut options = Options::new().with("score_mod", score_mod);
        if let Some(cap) = case.options["softcap"].as_f64() {
            options = options.with("softcap", cap);
        }
        check_run(&case, "flex", &options, &[("mask", "mask")]);
        if let Some(window) = window {
            options = options.with("window", window);
        }
        check_run(&case, "flex", &options, &[]);
        check_run(&case, "block-mask", &options.with("window", window.unwrap_or(1000)), &[]);
    }
}

#[test]
fn user_masks() {
    for case in cases("flex-block-mask", 5) {
        let size = |name: &str| case.options[name].as_u64().unwrap() as usize;
        let sizes = BlockSizes { q: size("block_q"), kv: size("block_kv") };
        let shape: AttnShape = case.inputs.qkv().unwrap().shape();
        let seen = case.given.require("mask").unwrap().data.to_f64();
        let sees = move |p: Pair| seen[(p.head * shape.n_q + p.i) * shape.n_kv + p.j] == 1.0;
        let mask = BlockMask::from_predicate(&shape, sizes, sees).unwrap();
        check_mask(&case, &mask);
        check_lists(&case, &mask.flex_lists());

        let formula = match case.options["mask_mod"].as_str().unwrap() {
            "causal" => "j <= i",
            "window" => "j <= i and i - j < 40",
            "per_head" => "j <= i and i - j < 16 * (h + 1)",
            "stripes" => "j < 3 or (i - j) % 7 == 0",
            "holes" => "i > 10 and j < 50",
            other => panic!("{other}"),
        };
        let options = Options::new().with("causal", false).with("mask_mod", formula);
        let options = options.with("block_q", sizes.q).with("block_kv", sizes.kv);
        check_run(&case, "flex", &options, &[]);
        check_run(&case, "flex", &Options::new(), &[("mask", "mask")]);
        check_run(&case, "block-mask", &options.with("mask_mod", "none"), &[("mask", "mask")]);
    }
}

/// The stored lists, without what stands behind their counts.
fn check_lists(case: &GoldenCase, got: &FlexLists) {
    let lists = [
        ("kv_num_blocks", "kv_indices", &got.partial),
        ("full_kv_num_blocks", "full_kv_indices", &got.full),
        ("q_num_blocks", "q_indices", &got.partial_by_key),
    ];
    for (counts, indices, got) in lists {
        let read = |name: &str| case.given.require(name).unwrap();
        let columns = *read(indices).shape.last().unwrap();
        let (want_counts, want) = (read(counts).data.to_f64(), read(indices).data.to_f64());
        assert_eq!(got.indices.len(), want.len(), "{}: {indices}", case.case);
        for (row, count) in want_counts.iter().enumerate() {
            assert_eq!(f64::from(got.counts[row]), *count, "{}: {counts}[{row}]", case.case);
            let of_row = row * columns..row * columns + *count as usize;
            let got: Vec<f64> = got.indices[of_row.clone()].iter().map(|j| f64::from(*j)).collect();
            assert_eq!(got, want[of_row], "{}: {indices} of row {row}", case.case);
        }
    }
}

#[test]
fn layouts_of_blocks_are_what_their_dense_masks_are() {
    let shape = AttnShape { batch: 2, n_heads_kv: 1, ..AttnShape::square(2, 40, 8) };
    let problem = Problem::normal(shape, 3);
    let mut tensors = NamedTensors::default();
    for (name, axes, data) in
        [("q", shape.q(), &problem.q), ("k", shape.k(), &problem.k), ("v", shape.v(), &problem.v)]
    {
        tensors.0.insert(name.into(), NamedTensor::f32(name, &axes, data.clone()).unwrap());
    }
    let entries = attn_sparse::registry();
    let run = |options: &[&str], extra: &[(&str, Vec<usize>, TensorData)]| {
        let mut tensors = tensors.clone();
        for (name, shape, data) in extra {
            tensors.0.insert((*name).into(), NamedTensor { shape: shape.clone(), data: data.clone() });
        }
        let options = Options::parse(options.iter().copied()).unwrap();
        find(&entries, "block-mask").unwrap().run(&options, &tensors)
    };
    // Blocks of 16 queries and 8 keys: 3 x 5; each head its own layout.
    let lists = [[vec![0, 2], vec![1], vec![0, 3, 4]], [vec![4], vec![], vec![1, 2]]];
    let (mut layout, mut dense) = (vec![0; 2 * 15], vec![0; 2 * 1600]);
    for (head, rows) in lists.iter().enumerate() {
        for (row, columns) in rows.iter().enumerate() {
            columns.iter().for_each(|column| layout[head * 15 + row * 5 + column] = 1);
            for (i, j) in (row * 16..40.min(row * 16 + 16)).flat_map(|i| (0..40).map(move |j| (i, j))) {
                dense[head * 1600 + i * 40 + j] = u8::from(columns.contains(&(j / 8)));
            }
        }
    }
    let sizes = ["block_q=16", "block_kv=8", "causal=false"];
    let want = run(&sizes, &[("mask", vec![2, 40, 40], TensorData::U8(dense))]).unwrap();
    let got = run(&sizes, &[("block_mask", vec![2, 3, 5], TensorData::U8(layout))]).unwrap();
    assert_eq!(got, want);

    let twice = lists.iter().chain(&lists).flatten();
    let blocks: Vec<i32> = twice.clone().flatten().map(|column| *column as i32).collect();
    let mut row_ptr = vec![0];
    twice.for_each(|columns| row_ptr.push(row_ptr[row_ptr.len() - 1] + columns.len() as i32));
    // A list for each head and entry; the formula speaks of both, so that there are as many.
    let apart = ["block_q=16", "block_kv=8", "causal=false", "mask_mod=h >= 0 and b >= 0"];
    let csr = |row_ptr: Vec<i32>| {
        let blocks = ("blocks", vec![blocks.len()], TensorData::I32(blocks.clone()));
        run(&apart, &[("row_ptr", vec![row_ptr.len()], TensorData::I32(row_ptr)), blocks])
    };
    assert_eq!(csr(row_ptr.clone()).unwrap(), want);
    row_ptr[3] = -1;
    assert!(csr(row_ptr).unwrap_err().to_string().contains("row_ptr"));
}

#[test]
fn small_settings_keep_their_promises() {
    let set = |pairs: &[&str]| Options::parse(pairs.iter().copied()).unwrap();
    let all: [(&str, Vec<Options>); 11] = [
        (
            "flex",
            vec![
                set(&["window=9", "score_mod=alibi"]),
                set(&["causal=false", "window=9", "softcap=2"]),
                set(&["mask_mod=(i - j) % 5 == 0 or h == 1 and j < 3", "block_q=16", "block_kv=8"]),
                set(&["causal=false", "score_mod=s / 2 - 0.1 |i - j|"]),
            ],
        ),
        (
            "block-mask",
            vec![
                set(&["window=9", "block_q=7", "block_kv=3"]),
                set(&["mask_mod=i % 3 > 0 or j % 2 == 0", "block_q=8", "block_kv=16"]),
            ],
        ),
        (
            "longnet",
            vec![
                set(&["segments=8,24", "dilations=1,4", "causal=true"]),
                set(&["segments=6,30,35", "dilations=2,3,5"]),
                set(&["segments=64", "dilations=1", "causal=true"]),
            ],
        ),
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
