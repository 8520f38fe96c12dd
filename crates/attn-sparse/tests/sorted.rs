//! Variants that sort or cluster tokens: other people's numbers, their definitions, gradients, and what they must equal.

use attn_core::exact::Exact;
use attn_core::mask::{Align, Band, Mask, SeeAll};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, TensorData, find};
use attn_core::{AttnShape, View};
use attn_sparse::{Hashing, Reformer, Routing, RoutingInputs};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::conformance;
use attn_testkit::golden::{GoldenCase, load_dir};
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;

fn entry(name: &str) -> Entry {
    *find(&attn_sparse::registry(), name).unwrap()
}

fn set(pairs: &[&str]) -> Options {
    Options::parse(pairs.iter().copied()).expect("key=value")
}

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
        pairs.extend([("allow_duplicate_attention", "allow_duplicate_attention"), ("self_logit", "self_logit")]);
        pairs.push(("causal", "causal_mask"));
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
            ("causal", "causal_mask"),
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
fn small_groups_keep_their_promises() {
    let reformer: &[&[&str]] = &[
        &["bucket_size=8", "n_hashes=3"],
        &["bucket_size=5", "n_hashes=2", "n_buckets=4x2x2", "causal_mask=true"],
        &["bucket_size=16", "n_hashes=1", "attend_across_buckets=false", "n_buckets=4"],
        &["bucket_size=7", "n_hashes=3", "allow_duplicate_attention=false"],
        &["bucket_size=40", "n_hashes=3", "allow_duplicate_attention=false", "shared_qk=true"],
        &["bucket_size=12", "n_hashes=2", "shared_qk=true", "causal_mask=true"],
        &[
            "bucket_size=9",
            "n_hashes=3",
            "n_buckets=6",
            "allow_duplicate_attention=false",
            "attend_across_buckets=false",
            "shared_qk=true",
        ],
    ];
    let routing: &[&[&str]] = &[
        &["num_clusters=3", "window=16"],
        &["num_clusters=40", "window=5", "causal_mask=true"],
        &["num_clusters=1"],
        &["num_clusters=5", "window=30", "shared_qk=true", "causal_mask=true", "mean_eps=1e-5"],
    ];
    for (name, configs) in [("reformer-lsh", reformer), ("routing", routing)] {
        let configs: Vec<Options> = configs.iter().map(|pairs| set(pairs)).collect();
        conformance::check_with(&entry(name), &configs);
    }
}

/// Output of an entry on a problem.
fn run(name: &str, options: &Options, problem: &Problem) -> Vec<f32> {
    let attention = entry(name).build(options).unwrap();
    let mut out = vec![f32::NAN; problem.shape.out().iter().product()];
    let view = attn_core::ViewMut::contiguous("out", &mut out, problem.shape.out()).unwrap();
    attention.forward(problem.qkv().unwrap(), view.into()).unwrap();
    out
}

fn dense(problem: &Problem, causal: bool) -> Vec<f64> {
    let band = Band::causal(&problem.shape, Align::BottomRight);
    let mask: &dyn Mask = if causal { &band } else { &SeeAll };
    Exact { mask, ..Exact::default() }.all(&problem.qkv().unwrap()).unwrap().out
}

#[test]
fn one_group_of_everything_is_dense_attention() {
    let shape = AttnShape { batch: 2, n_heads_kv: 1, head_dim_v: 7, ..AttnShape::square(2, 90, 8) };
    let problem = Problem::normal(shape, 3);
    let tol = Tol::ScaledMax(4e-6);
    for causal in [false, true] {
        let options = |pairs: &[&str]| set(pairs).with("causal_mask", causal);
        let want = dense(&problem, causal);
        for rounds in ["n_hashes=1", "n_hashes=3"] {
            let got = run("reformer-lsh", &options(&["bucket_size=90", rounds]), &problem);
            assert_close(rounds, &got, &want, tol);
            // Two chunks see each other; met in every round, each pair counts once.
            let halves = ["bucket_size=45", rounds, "allow_duplicate_attention=false"];
            assert_close(rounds, &run("reformer-lsh", &options(&halves), &problem), &want, tol);
        }
        for clusters in ["num_clusters=1", "num_clusters=4"] {
            let got = run("routing", &options(&[clusters, "window=1000"]), &problem);
            assert_close(clusters, &got, &want, tol);
        }
    }
    let cross = Problem::normal(AttnShape { n_q: 20, ..shape }, 4);
    for causal in [false, true] {
        let options = set(&["num_clusters=2", "window=90"]).with("causal_mask", causal);
        assert_close("cross lengths", &run("routing", &options, &cross), &dense(&cross, causal), tol);
    }
}

#[test]
fn later_values_never_reach_earlier_rows_under_the_mask() {
    // Values take no part in sorting.
    let shape = AttnShape::square(2, 130, 8);
    let problem = Problem::normal(shape, 5);
    let mut changed = problem.clone();
    let t = 61;
    changed.v.chunks_exact_mut(130 * 8).for_each(|head| head[t * 8..].iter_mut().for_each(|x| *x += 100.0));
    for (name, pairs) in [
        ("reformer-lsh", &["bucket_size=8", "shared_qk=true"][..]),
        ("reformer-lsh", &["bucket_size=8"]),
        ("routing", &["num_clusters=6", "window=40"]),
    ] {
        let options = set(pairs).with("causal_mask", true);
        let (before, after) = (run(name, &options, &problem), run(name, &options, &changed));
        for (row, (a, b)) in before.chunks(8).zip(after.chunks(8)).enumerate() {
            assert!(row % 130 >= t || a == b, "{name}: row {row}");
        }
        let open = set(pairs);
        let (before, after) = (run(name, &open, &problem), run(name, &open, &changed));
        let reached = before.chunks(8).zip(after.chunks(8)).enumerate().any(|(row, (a, b))| row % 130 < t && a != b);
        assert!(reached, "{name}: without the mask, later values reach earlier rows");
    }
}

#[test]
fn a_token_attends_itself_only_where_nothing_else_is_seen() {
    let mut problem = Problem::normal(AttnShape::square(1, 64, 8), 6);
    problem.v.chunks_exact_mut(8).enumerate().for_each(|(i, row)| row.fill(if i == 20 { 1e4 } else { 0.0 }));
    let shared = set(&["bucket_size=16", "shared_qk=true"]);
    let out = run("reformer-lsh", &shared, &problem);
    assert_eq!(out[20 * 8], 0.0);
    assert!(out.iter().any(|x| *x > 0.0), "others see token 20");
    let causal = shared.with("causal_mask", true);
    problem.v.iter_mut().enumerate().for_each(|(at, x)| *x = at as f32);
    assert_eq!(run("reformer-lsh", &causal, &problem)[..8], problem.v[..8], "the first token sees itself");
}

/// A loss of the definition, and the gradients claimed by the runner.
fn check_gradients(
    name: &str,
    options: &Options,
    tensors: &NamedTensors,
    inputs: &[&str],
    out_shape: [usize; 4],
    loss: impl Fn(&NamedTensors, &[f64]) -> f64,
) {
    let weights: Vec<f32> = (0..out_shape.iter().product()).map(|i: usize| (0.7 * i as f32).sin()).collect();
    let mut all = tensors.clone();
    all.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &out_shape, weights.clone()).unwrap());
    let given = entry(name).run(options, &all).unwrap();
    let weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
    let at: Vec<Vec<f64>> = inputs.iter().map(|i| tensors.require(i).unwrap().data.to_f64()).collect();
    let grads: Vec<Vec<f64>> =
        inputs.iter().map(|i| given.require(&format!("grad.{i}")).unwrap().data.to_f64()).collect();
    let claims: Vec<Claim<'_>> = (0..inputs.len())
        .map(|i| Claim { name: inputs[i], at: &at[i], gradient: &grads[i] })
        .collect();
    let f = |at: &[Vec<f64>]| {
        let mut moved = tensors.clone();
        for (name, numbers) in inputs.iter().zip(at) {
            let axes = tensors.require(name).unwrap().shape.clone();
            let numbers = numbers.iter().map(|x| *x as f32).collect();
            moved.0.insert(name.to_string(), NamedTensor::f32(name, &axes, numbers).unwrap());
        }
        loss(&moved, &weights)
    };
    // Inputs are f32, so steps are long, and rounding leaves some error.
    let check = GradientCheck { step: 0.03, tol: Tol::ScaledMax(3e-4), sample: Some(60), ..GradientCheck::default() };
    check.check(f, &claims).unwrap_or_else(|e| panic!("{name} {options:?}: {e}"));
}

fn named(problem: &Problem) -> NamedTensors {
    let shape = problem.shape;
    let tensors = [("q", shape.q(), &problem.q), ("k", shape.k(), &problem.k), ("v", shape.v(), &problem.v)];
    let tensor = |(name, axes, data): (&str, [usize; 4], &Vec<f32>)| {
        (name.to_string(), NamedTensor::f32(name, &axes, data.clone()).unwrap())
    };
    NamedTensors(tensors.into_iter().map(tensor).collect())
}

fn weighted(out: &[f64], weights: &[f64]) -> f64 {
    out.iter().zip(weights).map(|(o, w)| o * w).sum()
}

#[test]
fn reformer_gradients() {
    let shape = AttnShape { n_heads_kv: 1, head_dim_v: 3, ..AttnShape::square(2, 21, 4) };
    let problem = Problem::normal(shape, 8);
    let configs = [
        Reformer { bucket_size: 6, n_hashes: 3, ..Reformer::default() },
        Reformer { bucket_size: 6, n_hashes: 2, causal_mask: true, shared_qk: true, ..Reformer::default() },
        Reformer { bucket_size: 5, n_hashes: 2, allow_duplicate_attention: false, ..Reformer::default() },
        Reformer { bucket_size: 5, n_hashes: 1, attend_across_buckets: false, ..Reformer::default() },
    ];
    for config in configs {
        let x = problem.qkv().unwrap();
        let config = Reformer { n_buckets: vec![4], ..config };
        let (q, k) = (config.buckets(&x, false, Hashing::Drawn), config.buckets(&x, true, Hashing::Drawn));
        let (q, k) = (q.unwrap(), k.unwrap());
        let mut tensors = named(&problem);
        for (name, heads, buckets) in [("buckets", 2, &q), ("buckets_k", 1, &k)] {
            let axes = vec![1, heads, config.n_hashes, 21];
            tensors.0.insert(name.into(), NamedTensor { shape: axes, data: TensorData::I32(buckets.clone()) });
        }
        let options = Options::new()
            .with("bucket_size", config.bucket_size)
            .with("n_hashes", config.n_hashes)
            .with("n_buckets", 4)
            .with("causal_mask", config.causal_mask)
            .with("shared_qk", config.shared_qk)
            .with("attend_across_buckets", config.attend_across_buckets)
            .with("allow_duplicate_attention", config.allow_duplicate_attention);
        let loss = |tensors: &NamedTensors, weights: &[f64]| {
            let hashing = Hashing::Buckets { q: &q, k: &k };
            weighted(&config.definition_with(&tensors.qkv().unwrap(), hashing).unwrap().out, weights)
        };
        check_gradients("reformer-lsh", &options, &tensors, &["q", "k", "v"], shape.out(), loss);
    }
}

#[test]
fn routing_gradients() {
    let shape = AttnShape { n_heads_kv: 1, head_dim_v: 3, ..AttnShape::square(2, 21, 4) };
    let problem = Problem::normal(shape, 9);
    let memory = Problem::normal(AttnShape { n_q: 2, n_kv: 2, ..AttnShape::square(6, 2, 4) }, 10);
    for (causal_mask, shared_qk) in [(false, false), (true, false), (true, true)] {
        let config = Routing {
            num_clusters: Some(3),
            window: Some(8),
            causal_mask,
            shared_qk,
            mean_eps: 0.1,
            ..Routing::default()
        };
        let x = problem.qkv().unwrap();
        let [q_index, k_index] = config.select(&x, &RoutingInputs::default()).unwrap();
        let mut tensors = named(&problem);
        for (name, index) in [("q_index", &q_index), ("k_index", &k_index)] {
            let tensor = NamedTensor { shape: vec![1, 2, 3, 8], data: TensorData::I32(index.clone()) };
            tensors.0.insert(name.into(), tensor);
        }
        for (name, width, numbers) in [("mem_key", 4, &memory.k), ("mem_value", 3, &memory.v)] {
            let numbers = numbers[..2 * 3 * 2 * width].to_vec();
            let tensor = NamedTensor::f32(name, &[2, 3, 2, width], numbers).unwrap();
            tensors.0.insert(name.into(), tensor);
        }
        let options = set(&["num_clusters=3", "window=8", "mean_eps=0.1"])
            .with("causal_mask", causal_mask)
            .with("shared_qk", shared_qk);
        let loss = |tensors: &NamedTensors, weights: &[f64]| {
            let number = |name: &str| tensors.f32(name).unwrap().map(|(_, numbers)| numbers);
            let inputs = RoutingInputs {
                means: None,
                mem_key: number("mem_key"),
                mem_value: number("mem_value"),
                q_index: Some(&q_index),
                k_index: Some(&k_index),
            };
            weighted(&config.definition_with(&tensors.qkv().unwrap(), &inputs).unwrap().out, weights)
        };
        let inputs = ["q", "k", "v", "mem_key", "mem_value"];
        check_gradients("routing", &options, &tensors, &inputs, shape.out(), loss);
    }
}

#[test]
fn centroids_move_to_their_tokens() {
    let shape = AttnShape { batch: 2, ..AttnShape::square(1, 40, 2) };
    // Two bundles of directions.
    let bundle = |i: usize| if i.is_multiple_of(2) { [1.0, 0.1] } else { [-0.1, -3.0] };
    let rows: Vec<f32> = (0..80).flat_map(bundle).collect();
    let view = |name| View::contiguous(name, &rows, shape.q()).unwrap();
    let x = attn_core::Qkv::new(view("q"), view("k"), view("v")).unwrap();
    let config = Routing::default();
    let mut means = vec![0.6, 0.8, 0.6, -0.8, -0.8, 0.6];
    config.update_means(&x, &mut means, 0.0).unwrap();
    let unit = |x: f32, y: f32| [x / x.hypot(y), y / x.hypot(y)];
    let want: Vec<f64> = [unit(1.0, 0.1), unit(-0.1, -3.0), [-0.8, 0.6]].concat().iter().map(|x| f64::from(*x)).collect();
    assert_close("decay 0", &means, &want, Tol::ScaledMax(1e-6));
    let mut slow = vec![0.6, 0.8];
    config.update_means(&x, &mut slow, 1.0).unwrap();
    assert_eq!(slow, [0.6, 0.8]);
    assert!(config.update_means(&x, &mut means, 1.5).unwrap_err().to_string().contains("decay is 1.5"));
    assert!(config.update_means(&x, &mut [0.0; 3], 0.5).unwrap_err().to_string().contains("means"));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let problem = Problem::normal(AttnShape::square(2, 16, 4), 11);
    let refused = |name: &str, options: &Options, more: &[(&str, NamedTensor)], word: &str| {
        let mut tensors = named(&problem);
        more.iter().for_each(|(name, tensor)| drop(tensors.0.insert(name.to_string(), tensor.clone())));
        let error = entry(name).run(options, &tensors).expect_err(word).to_string();
        assert!(error.contains(word), "{name}: {error}");
    };
    let floats = |n: usize| NamedTensor::f32("x", &[n], vec![0.5; n]).unwrap();
    let ints = |numbers: &[i32]| NamedTensor { shape: vec![numbers.len()], data: TensorData::I32(numbers.to_vec()) };
    let none = Options::new();
    refused("reformer-lsh", &set(&["n_buckets=3"]), &[], "n_buckets");
    refused("reformer-lsh", &none, &[("rotations", floats(7))], "rotations");
    refused("reformer-lsh", &none, &[("buckets", ints(&[0; 128])), ("buckets_k", ints(&[0; 5]))], "buckets_k");
    refused("reformer-lsh", &set(&["n_buckets=4"]), &[("buckets", ints(&[9; 128])), ("buckets_k", ints(&[0; 128]))], "buckets");
    refused("reformer-lsh", &none, &[("buckets", floats(128))], "buckets");
    refused("routing", &none, &[("means", floats(5))], "means");
    refused("routing", &none, &[("mem_key", floats(16)), ("mem_value", floats(15))], "mem_value");
    refused("routing", &set(&["num_clusters=1"]), &[("q_index", ints(&[0, 1, 2, 16]))], "q_index");
    refused("routing", &set(&["num_clusters=1"]), &[("q_index", ints(&[0, 1, 2, 2]))], "2 twice");
    refused("routing", &set(&["mean_eps=-1"]), &[], "mean_eps");
}
