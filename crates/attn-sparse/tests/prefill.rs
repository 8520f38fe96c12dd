//! Content-based selection for prompts: choices against brute force and other people's code.

use attn_core::mask::Head;
use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData, find};
use attn_core::{AttnShape, Qkv, View};
use attn_sparse::{
    BlockSizes, Decider, ExactTopK, FlexPrefill, MInferenceBlockSparse, SpargeAttn, VerticalSlash, XAttention,
};
use attn_testkit::conformance;
use attn_testkit::golden::{GoldenCase, load_dir};
use std::collections::BTreeSet;

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|c| c.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

fn size(case: &GoldenCase, name: &str) -> usize {
    case.options[name].as_u64().unwrap() as usize
}

fn number(case: &GoldenCase, name: &str) -> f64 {
    case.options[name].as_f64().unwrap()
}

fn options(pairs: &[(&str, String)]) -> Options {
    pairs.iter().fold(Options::new(), |all, (name, value)| all.with(name, value))
}

/// Runs the variant with its own choice, and with the stored one.
fn check_outputs(case: &GoldenCase, name: &str, options: &Options, given: &[&str], own_choice: bool) {
    let entries = attn_sparse::registry();
    let entry = find(&entries, name).unwrap();
    if own_choice {
        case.assert_outputs(&entry.run(options, &case.inputs).unwrap());
    }
    let mut inputs = case.inputs.clone();
    for name in given {
        inputs.0.insert((*name).into(), case.given.require(name).unwrap().clone());
    }
    case.assert_outputs(&entry.run(options, &inputs).unwrap());
}

/// Every pair that the decider sees is one of the stored blocks, up to the query's position if `causal`, and the reverse.
fn check_blocks(case: &GoldenCase, decider: &impl Decider, block: [usize; 2], causal: bool) {
    let x = case.inputs.qkv().unwrap();
    let decision = decider.decide(&x).unwrap();
    let mask = case.given.require("block_mask").unwrap();
    let (rows, cols) = (mask.shape[2], mask.shape[3]);
    let flags = mask.data.to_f64();
    let shape = x.shape();
    for (batch, head) in (0..shape.batch).flat_map(|b| (0..shape.n_heads_q).map(move |h| (b, h))) {
        for i in 0..shape.n_q {
            let listed = |j: &usize| {
                flags[((batch * shape.n_heads_q + head) * rows + i / block[0]) * cols + j / block[1]] == 1.0
            };
            let end = if causal { i + 1 } else { shape.n_kv };
            let want: Vec<usize> = (0..end).filter(listed).collect();
            let got = decision.selected(Head { batch, head }, i, shape.n_kv);
            assert_eq!(got, want, "{}: row {i} of head {head}", case.case);
        }
    }
}

#[test]
fn exact_top_k_chooses_and_attends_as_others_do() {
    for case in cases("topk", 4) {
        let (causal, top_k) = (case.options["causal"].as_bool().unwrap(), size(&case, "topk"));
        let x = case.inputs.qkv().unwrap();
        let decision = ExactTopK { causal, top_k, softmax_scale: None }.decide(&x).unwrap();
        let (flags, s) = (case.given.require("mask").unwrap().data.to_f64(), x.shape());
        for (head, i) in (0..s.n_heads_q).flat_map(|head| (0..s.n_q).map(move |i| (head, i))) {
            let row = &flags[(head * s.n_q + i) * s.n_kv..][..s.n_kv];
            let want: Vec<usize> = (0..s.n_kv).filter(|j| row[*j] == 1.0).collect();
            assert_eq!(decision.selected(Head { batch: 0, head }, i, s.n_kv), want, "{}: row {i}", case.case);
        }
        let options = options(&[("causal", causal.to_string()), ("topk", top_k.to_string())]);
        check_outputs(&case, "topk", &options, &["mask"], true);
    }
}

/// The tensors of head 0.
fn first_head(tensors: &NamedTensors) -> NamedTensors {
    let head = |tensor: &NamedTensor| {
        let TensorData::F32(data) = &tensor.data else { panic!("f32") };
        let [batch, _, n, width] = tensor.shape[..] else { panic!("four axes") };
        assert_eq!(batch, 1);
        NamedTensor::f32("head", &[1, 1, n, width], data[..n * width].to_vec()).unwrap()
    };
    NamedTensors(tensors.0.iter().map(|(name, tensor)| (name.clone(), head(tensor))).collect())
}

#[test]
fn vertical_and_slash_lines_are_those_of_others() {
    for case in cases("vertical-slash", 2) {
        let decider = VerticalSlash {
            num_vertical: size(&case, "num_vertical"),
            num_slash: size(&case, "num_slash"),
            forced_vertical: size(&case, "forced_vertical"),
            forced_slash: size(&case, "forced_slash"),
            last_q: size(&case, "last_q"),
            softmax_scale: None,
        };
        let x = case.inputs.qkv().unwrap();
        let (decision, s) = (decider.decide(&x).unwrap(), x.shape());
        let lines = |name: &str, head: usize| -> BTreeSet<usize> {
            let tensor = case.given.require(name).unwrap();
            let [_, heads, n] = tensor.shape[..] else { panic!("three axes") };
            let all = tensor.data.to_f64();
            all[head.min(heads - 1) * n..][..n].iter().map(|x| *x as usize).collect()
        };
        // The reference has distances for the first head alone; its keys are each head's own.
        for i in 0..s.n_q {
            let (vertical, slash) = (lines("vertical", 0), lines("slash", 0));
            let want: Vec<usize> =
                (0..=i).filter(|j| vertical.contains(j) || slash.contains(&(i - j))).collect();
            assert_eq!(
                decision.selected(Head { batch: 0, head: 0 }, i, s.n_kv),
                want,
                "{}: row {i}",
                case.case
            );
        }
        let last = decision.selected(Head { batch: 0, head: 1 }, s.n_q - 1, s.n_kv);
        assert!(lines("vertical", 1).iter().all(|key| last.contains(key)), "{}: keys of head 1", case.case);
        let options = ["num_vertical", "num_slash", "forced_vertical", "forced_slash", "last_q"]
            .iter()
            .fold(Options::new(), |all, name| all.with(name, size(&case, name)));
        check_outputs(&case, "vertical-slash", &options, &["mask"], false);
        // The first head alone, under its lines.
        let entries = attn_sparse::registry();
        let entry = find(&entries, "vertical-slash").unwrap();
        let (own, mut tensors) = (first_head(&case.inputs), first_head(&case.inputs));
        let lines = |name: &str| case.given.require(name).unwrap().clone();
        let vertical = lines("vertical");
        let TensorData::I32(keys) = &vertical.data else { panic!("indices") };
        let n = vertical.shape[2];
        let keys = NamedTensor { shape: vec![1, 1, n], data: TensorData::I32(keys[..n].to_vec()) };
        tensors.0.extend([("vertical".into(), keys), ("slash".into(), lines("slash"))]);
        let [own, given] = [own, tensors].map(|tensors| entry.run(&options, &tensors).unwrap());
        let want = case.outputs.require("o").unwrap().data.to_f64();
        for got in [own, given] {
            let got = got.require("o").unwrap().data.to_f64();
            let worst = got.iter().zip(&want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
            assert!(worst <= 1e-5, "{}: {worst:e}", case.case);
        }
    }
}

#[test]
fn blocks_by_means_are_those_of_minference() {
    for case in cases("minference-block-sparse", 2) {
        let sizes = BlockSizes { q: size(&case, "block_q"), kv: size(&case, "block_kv") };
        let top_k = size(&case, "topk_blocks");
        let decider = MInferenceBlockSparse { causal: true, sizes, top_k, softmax_scale: None };
        check_blocks(&case, &decider, [sizes.q, sizes.kv], true);
        let options = ["block_q", "block_kv", "topk_blocks"]
            .iter()
            .fold(Options::new(), |all, name| all.with(name, size(&case, name)));
        check_outputs(&case, "minference-block-sparse", &options, &["block_mask"], true);
    }
}

#[test]
fn flex_prefill_blocks_are_those_of_others() {
    for case in cases("flexprefill", 2) {
        let (gamma, tau) = (number(&case, "gamma"), number(&case, "tau"));
        let (min_budget, max_budget) = (size(&case, "min_budget"), size(&case, "max_budget"));
        let block = size(&case, "block_q");
        let usual = FlexPrefill::default();
        let decider = FlexPrefill { block, gamma, tau, min_budget, max_budget: Some(max_budget), ..usual };
        check_blocks(&case, &decider, [block; 2], true);
        let options = options(&[
            ("block", block.to_string()),
            ("gamma", gamma.to_string()),
            ("tau", tau.to_string()),
            ("min_budget", min_budget.to_string()),
            ("max_budget", max_budget.to_string()),
        ]);
        check_outputs(&case, "flexprefill", &options, &["block_mask"], true);
    }
}

#[test]
fn antidiagonal_blocks_are_those_of_xattention() {
    for case in cases("xattention", 2) {
        let (block, stride) = (size(&case, "block_q"), size(&case, "stride"));
        let (threshold, norm) = (number(&case, "threshold"), number(&case, "norm"));
        let decider =
            XAttention { causal: true, block, stride, threshold, norm: norm as f32, softmax_scale: None };
        check_blocks(&case, &decider, [block; 2], true);
        let options = options(&[
            ("block", block.to_string()),
            ("stride", stride.to_string()),
            ("threshold", threshold.to_string()),
            ("norm", norm.to_string()),
        ]);
        check_outputs(&case, "xattention", &options, &["block_mask"], true);
    }
}

#[test]
fn sparge_blocks_are_those_of_others() {
    for case in cases("spargeattn", 1) {
        let sizes = BlockSizes { q: size(&case, "block_q"), kv: size(&case, "block_kv") };
        let (similarity, cdf) = (number(&case, "simthreshd1"), number(&case, "cdfthreshd"));
        let decider = SpargeAttn { sizes, similarity: similarity as f32, cdf, ..SpargeAttn::default() };
        check_blocks(&case, &decider, [sizes.q, sizes.kv], true);
        let options = options(&[
            ("block_q", sizes.q.to_string()),
            ("block_kv", sizes.kv.to_string()),
            ("similarity", similarity.to_string()),
            ("cdf", cdf.to_string()),
        ]);
        check_outputs(&case, "spargeattn", &options, &["block_mask"], true);
    }
}

/// All promises of small configurations but `nan-rows`: a query that is NaN spoils the mean of its block, which then takes all
/// blocks, so that other rows of the block change.
#[test]
fn small_blocks_keep_their_promises() {
    let configs: [(&str, &[&str]); 6] = [
        ("topk", &["causal=true topk=1", "causal=true topk=7", "topk=20", "topk=3 scale=-0.5"]),
        ("vertical-slash", &["num_vertical=5 num_slash=9 forced_vertical=2 forced_slash=3 last_q=7"]),
        (
            "minference-block-sparse",
            &["block_q=16 block_kv=16 topk_blocks=2", "block_q=8 block_kv=12 topk_blocks=3 causal=false"],
        ),
        ("flexprefill", &["block=16 min_budget=1 gamma=0.5 tau=0", "block=8 gamma=0.6 tau=1 min_budget=1"]),
        ("xattention", &["block=16 stride=4 threshold=0.5", "block=12 stride=3 threshold=0.4 causal=false"]),
        (
            "spargeattn",
            &[
                "block_q=32 block_kv=16 similarity=-1 cdf=0.5",
                "block_q=8 block_kv=8 similarity=-1 cdf=0.4 causal=false lambda=1",
            ],
        ),
    ];
    let entries = attn_sparse::registry();
    for (name, configs) in configs {
        let configs: Vec<Options> =
            configs.iter().map(|config| Options::parse(config.split(' ')).unwrap()).collect();
        let mut report = conformance::report(find(&entries, name).unwrap(), &configs);
        if name != "topk" {
            report.findings.retain(|finding| finding.promise != "nan-rows");
        }
        assert!(report.is_clean() && report.findings.len() > 15, "{report}");
    }
}

/// Numbers around 0.
fn numbers(len: usize, seed: f32) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + 1.0) * seed).sin() * 2.0).collect()
}

fn view(data: &[f32], shape: [usize; 4]) -> View<'_, f32> {
    View::contiguous("x", data, shape).unwrap()
}

#[test]
fn settings_that_take_all_are_dense() {
    let shape = AttnShape { batch: 2, n_heads_kv: 1, ..AttnShape::square(2, 150, 8) };
    let (q, k) = (numbers(2 * 2 * 150 * 8, 0.31), numbers(2 * 150 * 8, 0.77));
    let (q, k) = (view(&q, shape.q()), view(&k, shape.k()));
    let x = Qkv::new(q, k, k).unwrap();
    let (sizes, block) = (BlockSizes::square(16), 16);
    let decisions = [
        ("topk", ExactTopK { causal: true, top_k: 149, softmax_scale: None }.decide(&x)),
        ("topk of all", ExactTopK { causal: true, top_k: 150, softmax_scale: None }.decide(&x)),
        (
            "vertical",
            VerticalSlash { num_vertical: 150, num_slash: 0, ..VerticalSlash::default() }.decide(&x),
        ),
        ("slash", VerticalSlash { num_vertical: 0, num_slash: 150, ..VerticalSlash::default() }.decide(&x)),
        (
            "minference",
            MInferenceBlockSparse { sizes, top_k: 10, ..MInferenceBlockSparse::default() }.decide(&x),
        ),
        (
            "lines",
            FlexPrefill { block, gamma: 1.0, tau: 0.0, budget_tokens: 16, ..FlexPrefill::default() }
                .decide(&x),
        ),
        ("single blocks", FlexPrefill { block, gamma: 1.0, tau: 1.0, ..FlexPrefill::default() }.decide(&x)),
        ("xattention", XAttention { block, stride: 4, threshold: 1.0, ..XAttention::default() }.decide(&x)),
        ("cdf", SpargeAttn { sizes, similarity: -1.0, cdf: 1.0, ..SpargeAttn::default() }.decide(&x)),
        ("similarity", SpargeAttn { sizes, similarity: 1.0, cdf: 0.0, ..SpargeAttn::default() }.decide(&x)),
    ];
    for (name, decision) in decisions {
        let decision = decision.unwrap();
        for (batch, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            for i in 0..150 {
                // One of 150 keys is too many for the last row alone.
                let most = if name == "topk" { 149 } else { 150 };
                let got = decision.selected(Head { batch, head }, i, 150);
                assert_eq!(got.len(), (i + 1).min(most), "{name}: row {i}");
            }
        }
    }
}

/// Of a threshold of 0, nothing beside the first block and the own ones is left.
#[test]
fn no_share_is_reached_by_what_is_always_seen() {
    let shape = AttnShape::square(1, 160, 8);
    let (q, k) = (numbers(160 * 8, 0.3113), numbers(160 * 8, 0.7717));
    let (q, k) = (view(&q, shape.q()), view(&k, shape.k()));
    let attention = XAttention { threshold: 0.0, block: 16, stride: 4, ..XAttention::default() };
    let decision = attention.decide(&Qkv::new(q, k, k).unwrap()).unwrap();
    for i in 0..160 {
        let mut want: Vec<usize> = (0..16).chain(i / 16 * 16..i + 1).filter(|j| *j <= i).collect();
        want.sort_unstable();
        want.dedup();
        assert_eq!(decision.selected(Head { batch: 0, head: 0 }, i, 160), want, "row {i}");
    }
}

#[test]
fn a_planted_key_is_found_and_blocks_are_few() {
    let (n, d, planted) = (4096, 16, 1234);
    let shape = AttnShape::square(1, n, d);
    let (mut q, mut k) = (numbers(n * d, 0.3113), numbers(n * d, 0.7717));
    // Queries from 3968 on look for it; it is the only key of its direction.
    k[planted * d..][..d].fill(12.0);
    q[3968 * d..].iter_mut().for_each(|q| *q += 3.0);
    let (q, k) = (view(&q, shape.q()), view(&k, shape.k()));
    let x = Qkv::new(q, k, k).unwrap();
    let decisions = [
        ExactTopK { causal: true, top_k: 4, softmax_scale: None }.decide(&x),
        VerticalSlash { num_vertical: 40, num_slash: 110, ..VerticalSlash::default() }.decide(&x),
        MInferenceBlockSparse { top_k: 4, ..MInferenceBlockSparse::default() }.decide(&x),
        FlexPrefill { min_budget: 2, tau: 0.0, ..FlexPrefill::default() }.decide(&x),
        XAttention { threshold: 0.5, ..XAttention::default() }.decide(&x),
    ];
    for (at, decision) in decisions.into_iter().enumerate() {
        let selected = decision.unwrap().selected(Head { batch: 0, head: 0 }, n - 1, n);
        assert!(selected.contains(&planted), "decider {at} misses the key");
        assert!(selected.len() < n / 2, "decider {at} takes {} keys", selected.len());
    }
}
