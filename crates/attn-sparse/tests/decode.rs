//! Selection and eviction for decoding: golden files, promises, streams, gradients.

use attn_core::mask::Head;
use attn_core::registry::{Entry, Options, find, gradients, output_like};
use attn_core::{Attention, AttnShape, Qkv, StreamShape, StreamState, Streaming, ViewMut};
use attn_sparse::{
    Decider, EvictionPolicy, KvEviction, Quest, Share, SinkWindow, SparseAttention, Survivors,
};
use attn_testkit::compare::Tol;
use attn_testkit::conformance;
use attn_testkit::golden::{GoldenCase, load_dir};
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;

fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|c| c.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

fn entry(name: &str) -> Entry {
    *find(&attn_sparse::registry(), name).unwrap()
}

fn size(case: &GoldenCase, name: &str) -> usize {
    case.options[name].as_u64().unwrap() as usize
}

fn set(pairs: &[&str]) -> Options {
    Options::parse(pairs.iter().copied()).unwrap()
}

#[test]
fn quest_takes_the_pages_of_its_authors() {
    for case in cases("quest", 2) {
        let (page_len, token_budget) = (size(&case, "page"), size(&case, "token_budget"));
        for causal in [false, true] {
            let quest = Quest { page_len, token_budget, causal, ..Quest::default() };
            assert_eq!(quest.n_pages(), size(&case, "pages"));
            let x = case.inputs.qkv().unwrap();
            let (shape, decision) = (x.shape(), quest.decide(&x).unwrap());
            let mut seen = vec![0.0; shape.rows() * shape.n_kv];
            for (head, seen) in seen.chunks_exact_mut(shape.n_kv).enumerate() {
                for j in decision.selected(Head { batch: 0, head }, 0, shape.n_kv) {
                    seen[j] = 1.0;
                }
            }
            assert_eq!(seen, case.given.require("mask").unwrap().data.to_f64(), "{}", case.case);
            let want = case.aux.require("page_score").unwrap().data.to_f64();
            let got = quest.page_bounds(&x).unwrap();
            for (got, want) in got.iter().zip(&want) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{}: bound {got}, not {want}", case.case);
            }
            let options = Options::new()
                .with("page_len", page_len)
                .with("token_budget", token_budget)
                .with("causal", causal);
            case.assert_outputs(&entry("quest").run(&options, &case.inputs).unwrap());
        }
    }
}

#[test]
fn quest_keeps_its_promises() {
    let configs = [
        set(&["page_len=4", "token_budget=16"]),
        set(&["page_len=4", "token_budget=16", "causal=true"]),
        set(&["page_len=16", "token_budget=1", "causal=true", "keep_own=true"]),
        set(&["page_len=1", "token_budget=7", "causal=true", "scale=0.3"]),
        set(&["page_len=100", "token_budget=300", "causal=true"]),
    ];
    conformance::check_with(&entry("quest"), &configs);
}

/// `[out, dense out]` of queries that see `n_kv` keys.
fn beside_dense(entry: &Entry, options: &Options, shape: AttnShape) -> [Vec<f64>; 2] {
    let problem = Problem::normal(shape, 7);
    let x = problem.qkv().unwrap();
    let attention = entry.build(options).unwrap();
    let mut out = vec![f32::NAN; shape.rows() * shape.head_dim_v];
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    attention.forward(x, view.into()).unwrap();
    let causal = attn_core::mask::Band::causal(&shape, attn_core::mask::Align::BottomRight);
    let exact = attn_core::exact::Exact { mask: &causal, ..Default::default() };
    [out.into_iter().map(f64::from).collect(), exact.all(&x).unwrap().out]
}

fn largest_difference([a, b]: &[Vec<f64>; 2]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn all_pages_are_dense_attention_and_few_are_not() {
    let shape = AttnShape { n_heads_kv: 1, ..AttnShape::square(2, 90, 8) };
    let quest = entry("quest");
    let all = beside_dense(&quest, &set(&["page_len=8", "token_budget=96", "causal=true"]), shape);
    assert!(largest_difference(&all) < 1e-5);
    let few = beside_dense(&quest, &set(&["page_len=8", "token_budget=24", "causal=true"]), shape);
    assert!(largest_difference(&few) > 1e-2, "24 of 90 keys change the output");
}

/// Appends a problem in pieces; gives the output and the bytes held after each piece.
fn stream(attention: &dyn Streaming, problem: &Problem, pieces: &[usize]) -> (Vec<f32>, Vec<usize>) {
    let (x, s) = (problem.qkv().unwrap(), problem.shape);
    let mut state = attention.start(StreamShape::of(&x)).unwrap();
    let mut out = vec![f32::NAN; s.rows() * s.head_dim_v];
    let (mut at, mut bytes) = (0, Vec::new());
    for piece in pieces {
        let rows = at..at + piece;
        let part =
            Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(rows.clone()), x.v().narrow(rows)).unwrap();
        let [_, heads, n, width] = s.out();
        let strides = [heads * n * width, n * width, width, 1];
        let shape = part.shape().out();
        let view = ViewMut::new("out", &mut out[at * width..], shape, strides).unwrap();
        state.append(part, view.into()).unwrap();
        at += piece;
        bytes.push(state.bytes());
    }
    (out, bytes)
}

#[test]
fn a_stream_of_pages_gives_the_bits_of_the_whole() {
    // Grouped heads, and more than one tile of pages.
    let shape = AttnShape { n_heads_q: 2, n_heads_kv: 1, ..AttnShape::square(2, 600, 8) };
    let problem = Problem::normal(shape, 3);
    let quest = SparseAttention::new(Quest { page_len: 5, token_budget: 30, keep_own: false, causal: true });
    let (whole, _) = stream(&quest, &problem, &[600]);
    let (tokens, bytes) = stream(&quest, &problem, &[vec![257], vec![1; 343]].concat());
    assert!(whole.iter().zip(&tokens).all(|(a, b)| (a - b).abs() < 1e-5), "another choice");
    assert!(bytes[0] >= 257 * 2 * 8 * 4, "keys, values and bounds are counted");
    assert!(Streaming::start(&quest, StreamShape::of(&problem.qkv().unwrap())).unwrap().is_empty());
}

#[test]
fn evictions_keep_what_their_authors_keep() {
    for (variant, policy) in [
        ("knorm", "key-norm"),
        ("observedattention", "observed-attention"),
        ("snapkv", "snapkv"),
        ("streamingllm", "streaming-llm"),
        ("tova", "tova"),
    ] {
        for case in cases(&format!("kv-eviction-{variant}"), 2) {
            let mut options = Options::new().with("policy", policy).with("budget", size(&case, "keep"));
            for (theirs, ours) in
                [("window_size", "window"), ("kernel_size", "kernel"), ("n_sink", "n_sinks")]
            {
                if case.options.contains_key(theirs) {
                    options = options.with(ours, size(&case, theirs));
                }
            }
            let given = entry("kv-eviction").run(&options, &case.inputs).unwrap();
            assert_eq!(given.require("kept").unwrap(), case.given.require("kept").unwrap(), "{variant}");
            case.assert_outputs(&given);

            // Theirs says of forced positions that they are worth as much as the best, and of StreamingLLM's only which
            // are kept.
            let want = case.aux.require("score").unwrap().data.to_f64();
            let got = given.require("score").unwrap().data.to_f64();
            let differ = want.iter().zip(got).filter(|(want, got)| (*want - got).abs() > 1e-5).count();
            let heads = case.inputs.qkv().unwrap().shape().n_heads_kv;
            let expected = [("snapkv", 8 * heads), ("tova", heads), ("streamingllm", differ)];
            let expected = expected.iter().find(|(name, _)| *name == variant).map_or(0, |found| found.1);
            assert_eq!(differ, expected, "{variant}: scores");

            // The attention alone, over positions that are given.
            let mut inputs = case.inputs.clone();
            inputs.0.insert("kept".into(), case.given.require("kept").unwrap().clone());
            case.assert_outputs(&entry("kv-eviction").run(&options, &inputs).unwrap());
        }
    }
}

#[test]
fn evictions_keep_their_promises() {
    let configs = [
        set(&["budget=7"]),
        set(&["budget=20", "n_recent=3", "n_sinks=2", "scale=0.2"]),
        set(&["policy=observed-attention", "budget=16"]),
        set(&["policy=snapkv", "budget=24", "window=5", "pooling=max"]),
        set(&["policy=tova", "share=head", "budget=1"]),
        set(&["policy=streaming-llm", "budget=30"]),
        set(&["policy=key-norm", "budget=15"]),
        set(&["policy=key-diff", "budget=40"]),
        set(&["policy=duo", "budget=10", "full_heads=0"]),
    ];
    conformance::check_with(&entry("kv-eviction"), &configs);
}

#[test]
fn options_of_another_policy_are_refused() {
    let build = |pairs: &[&str]| entry("kv-eviction").build(&set(pairs)).map(drop).map_err(|e| e.to_string());
    for (pairs, word) in [
        (&["policy=tova", "window=4"][..], "window"),
        (&["safeguard=0.5"][..], "safeguard"),
        (&["policy=snapkv", "budget=20"][..], "budget"),
        (&["policy=h3o"][..], "streaming-llm"),
        (&["full_heads=1,x"][..], "full_heads"),
    ] {
        let message = build(pairs).unwrap_err();
        assert!(message.contains(word), "{pairs:?}: {message}");
    }
    assert_eq!(build(&["policy=snapkv", "budget=64", "share=budget", "safeguard=0.5"]), Ok(()));
}

#[test]
fn a_budget_for_all_is_dense_attention_and_a_small_one_is_not() {
    let shape = AttnShape { n_heads_kv: 1, ..AttnShape::square(2, 90, 8) };
    for policy in ["h2o", "snapkv", "tova", "streaming-llm", "key-norm", "key-diff", "observed-attention"] {
        let options = |budget: usize| Options::new().with("policy", policy).with("budget", budget);
        let all = beside_dense(&entry("kv-eviction"), &options(90), shape);
        assert!(largest_difference(&all) < 1e-5, "{policy}");
        let few = beside_dense(&entry("kv-eviction"), &options(40), shape);
        assert!(largest_difference(&few) > 1e-2, "{policy}: 41 of 90 keys change the output");
    }
}

#[test]
fn eviction_by_recency_is_a_window_with_sinks() {
    let shape = AttnShape { batch: 2, ..AttnShape::square(2, 130, 8) };
    let problem = Problem::normal(shape, 9);
    let (n_sinks, budget) = (3, 20);
    let eviction = KvEviction::new(EvictionPolicy::streaming_llm(n_sinks, budget));
    let pattern = SparseAttention::new(SinkWindow { n_sinks, window: budget - n_sinks + 1 });
    let run = |attention: &dyn Attention| {
        let x = problem.qkv().unwrap();
        let mut out = output_like(&x);
        attention.forward(x, out.as_out().unwrap()).unwrap();
        out.data.to_f64()
    };
    assert!(largest_difference(&[run(&eviction), run(&pattern)]) < 1e-5);
}

#[test]
fn a_stream_holds_its_budget_and_no_more_bytes() {
    let shape = AttnShape { n_heads_q: 4, n_heads_kv: 2, ..AttnShape::square(4, 400, 8) };
    let problem = Problem::normal(shape, 11);
    for policy in [
        EvictionPolicy::h2o(8, 40),
        EvictionPolicy::snap_kv(6, 3, 40),
        EvictionPolicy::tova(40),
        EvictionPolicy::key_diff(40),
        EvictionPolicy::streaming_llm(4, 40),
    ] {
        let eviction = KvEviction::new(policy);
        let (whole, _) = stream(&eviction, &problem, &[400]);
        let (tokens, bytes) = stream(&eviction, &problem, &[vec![200], vec![1; 200]].concat());
        assert_eq!(whole, tokens, "pieces do not matter");
        assert!(bytes.windows(2).all(|pair| pair[0] == pair[1]), "{bytes:?}");
        assert!(bytes[0] >= 2 * 41 * 2 * 8 * 4 && bytes[0] < 2 * 128 * 40 * 8, "{}", bytes[0]);
    }
}

#[test]
fn after_a_prompt_the_stream_goes_on_with_the_survivors() {
    let shape = AttnShape { n_heads_q: 4, n_heads_kv: 2, ..AttnShape::square(4, 81, 8) };
    let problem = Problem::normal(shape, 12);
    let x = problem.qkv().unwrap();
    let part = |rows: std::ops::Range<usize>| {
        Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(rows.clone()), x.v().narrow(rows)).unwrap()
    };
    let shared = Share::Budget { safeguard: 0.3 };
    for policy in [
        EvictionPolicy::h2o(3, 20),
        EvictionPolicy::observed_attention(20),
        EvictionPolicy::snap_kv(6, 3, 20),
        EvictionPolicy::tova(20),
        EvictionPolicy::key_diff(20),
        EvictionPolicy { share: shared, ..EvictionPolicy::snap_kv(6, 3, 20) },
        EvictionPolicy::duo(vec![1], 2, 20),
    ] {
        let eviction = KvEviction::new(policy.clone());
        let (prompt, next) = (part(0..80), part(80..81));
        let mut out = output_like(&prompt);
        let mut stream = eviction.prefill(prompt, out.as_out().unwrap()).unwrap();
        assert_eq!(stream.len(), 80);
        let dense = SparseAttention::new(SinkWindow { n_sinks: 0, window: 80 });
        let mut want = output_like(&prompt);
        dense.forward(prompt, want.as_out().unwrap()).unwrap();
        assert!(largest_difference(&[out.data.to_f64(), want.data.to_f64()]) < 1e-5, "a dense prompt");

        let mut positions = stream.positions();
        assert_eq!(positions, eviction.compress(&prompt).unwrap().positions, "{policy:?}");
        let mut got = output_like(&next);
        stream.append(next, got.as_out().unwrap()).unwrap();
        positions.iter_mut().for_each(|kept| kept.push(80));
        let x = Qkv::new(*next.q(), *x.k(), *x.v()).unwrap();
        let mut want = output_like(&next);
        let seen = Survivors::new(positions);
        eviction.attend(x, &seen, want.as_out().unwrap(), None).unwrap();
        assert!(largest_difference(&[got.data.to_f64(), want.data.to_f64()]) < 1e-5, "{policy:?}");
        let held: usize = stream.positions().iter().map(Vec::len).sum();
        let expected = if policy.full_heads.is_empty() { 40 } else { 20 + 81 };
        assert_eq!(held, expected, "{policy:?}");
    }
}

#[test]
fn survivors_that_do_not_fit_are_refused() {
    let problem = Problem::normal(AttnShape { n_heads_kv: 1, ..AttnShape::square(2, 5, 4) }, 1);
    let (x, eviction) = (problem.qkv().unwrap(), KvEviction::new(EvictionPolicy::key_norm(3)));
    let attend = |positions: Vec<Vec<usize>>| {
        let mut out = output_like(&x);
        let done = eviction.attend(x, &Survivors::new(positions), out.as_out().unwrap(), None);
        done.unwrap_err().to_string()
    };
    assert!(attend(vec![vec![0], vec![1]]).contains("survivors"));
    assert!(attend(vec![vec![0, 5]]).contains('5'));
    let wide = Problem::normal(AttnShape { n_q: 6, ..AttnShape::square(1, 5, 4) }, 1);
    assert!(eviction.compress(&wide.qkv().unwrap()).unwrap_err().to_string().contains("n_q is 6"));
}

/// `sum(out * w)` in f64, over the keys that each query of each head sees.
fn loss(s: &AttnShape, seen: &[Vec<usize>], w: &[f64], at: &[Vec<f64>]) -> f64 {
    let [q, k, v] = at else { panic!("q, k, v") };
    let (d, dv) = (s.head_dim, s.head_dim_v);
    let mut sum = 0.0;
    for (row, seen) in seen.iter().enumerate() {
        let keys = row / s.n_q / s.group_size() * s.n_kv;
        let q = &q[row * d..][..d];
        let score = |j: &usize| q.iter().zip(&k[(keys + j) * d..]).map(|(q, k)| q * k).sum::<f64>();
        let weights: Vec<f64> = seen.iter().map(|j| (score(j) / (d as f64).sqrt()).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (j, weight) in seen.iter().zip(weights) {
            let value = &v[(keys + j) * dv..][..dv];
            let dot: f64 = value.iter().zip(&w[row * dv..]).map(|(v, w)| v * w).sum();
            sum += weight / total * dot;
        }
    }
    sum
}

#[test]
fn gradients_are_those_of_the_pairs_attended() {
    let shape = AttnShape { n_heads_q: 2, n_heads_kv: 1, head_dim_v: 3, ..AttnShape::square(2, 75, 4) };
    let problem = Problem::normal(shape, 13);
    let x = problem.qkv().unwrap();
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let w: Vec<f32> = (0..shape.rows() * 3).map(|at| (at as f32 * 0.37).sin()).collect();
    let quest = SparseAttention::new(Quest { page_len: 4, token_budget: 12, keep_own: false, causal: true });
    let eviction = KvEviction::new(EvictionPolicy::h2o(4, 12));
    let decisions = [quest.decide(&x).unwrap(), eviction.decide(&x).unwrap()];
    let attentions: [&dyn Attention; 2] = [&quest, &eviction];
    for (attention, decision) in attentions.into_iter().zip(decisions) {
        let seen: Vec<Vec<usize>> = (0..shape.rows())
            .map(|row| decision.selected(Head { batch: 0, head: row / 75 }, row % 75, 75))
            .collect();
        let mut out = output_like(&x);
        let grad_o = attn_core::registry::NamedTensor::f32("grad_o", &shape.out(), w.clone()).unwrap();
        let grads = gradients(attention, x, &mut out, &grad_o).unwrap();
        let grad = |name: &str| grads.require(name).unwrap().data.to_f64();
        let (q, k, v) = (wide(&problem.q), wide(&problem.k), wide(&problem.v));
        let (gq, gk, gv) = (grad("grad.q"), grad("grad.k"), grad("grad.v"));
        let claims = [
            Claim { name: "q", at: &q, gradient: &gq },
            Claim { name: "k", at: &k, gradient: &gk },
            Claim { name: "v", at: &v, gradient: &gv },
        ];
        let check = GradientCheck { tol: Tol::ScaledMax(1e-5), sample: Some(60), ..GradientCheck::default() };
        let w = wide(&w);
        check.check(|at| loss(&shape, &seen, &w, at), &claims).unwrap();
    }
}
