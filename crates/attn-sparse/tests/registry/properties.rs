//! Properties of every variant: linear in values, convex, nothing from or to keys that are not attended, rows without keys,
//! budgets, groups of heads, constants.

use super::{N, build, forward, variants, weights};
use attn_core::registry::{NamedTensor, Options, find, gradients, output_like};
use attn_core::{AttnShape, Causality, ViewMut};
use attn_testkit::inputs::Problem;

fn grouped() -> AttnShape {
    AttnShape { n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, N, 4) }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // NaN is no small difference.
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most })
}

#[test]
fn outputs_are_linear_in_values() {
    let (problem, other) = (Problem::normal(grouped(), 1), Problem::normal(grouped(), 2));
    for (entry, options) in variants() {
        let attention = build(&entry, &options);
        let mixed = problem.v.iter().zip(&other.v).map(|(a, b)| 2.0 * a - 0.5 * b).collect();
        let with = |v: &Vec<f32>| forward(&*attention, &Problem { v: v.clone(), ..problem.clone() });
        let (a, b) = (with(&problem.v), with(&other.v));
        let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| 2.0 * a - 0.5 * b).collect();
        let difference = largest_difference(&with(&mixed), &want);
        assert!(difference < 2e-5, "{}: {difference}", entry.name);
    }
}

#[test]
fn convex_rows_have_weights_that_sum_to_one() {
    let problem = Problem::normal(grouped(), 3);
    for (entry, options) in variants() {
        let attention = build(&entry, &options);
        let weights = weights(&*attention, &problem);
        assert!(weights.iter().all(|w| *w >= 0.0), "{}: a negative weight", entry.name);
        for (row, weights) in weights.chunks_exact(N).enumerate() {
            let sum: f32 = weights.iter().sum();
            let whole = (sum - 1.0).abs() < 1e-5 || weights.iter().all(|w| *w == 0.0);
            assert!(whole || !attention.profile().convex, "{}: row {row} sums to {sum}", entry.name);
            assert!(sum < 1.0 + 1e-5, "{}: row {row} sums to {sum}", entry.name);
        }
    }
}

/// The gradient of one row's output reaches that query and the keys and values it attends, and nothing else, not by one bit.
#[test]
fn gradients_stay_at_zero_where_nothing_is_attended() {
    let problem = Problem::normal(grouped(), 4);
    let (shape, i) = (problem.shape, 40);
    let x = problem.qkv().expect("it fits");
    let of_row = |at: usize| if at / 5 % N == i { (at as f32).cos() } else { 0.0 };
    let grad_o = (0..shape.rows() * 5).map(of_row).collect();
    let grad_o = NamedTensor::f32("grad_o", &shape.out(), grad_o).expect("it fits");
    for (entry, options) in variants() {
        let attention = build(&entry, &options);
        let weights = weights(&*attention, &problem);
        let attended = |j: usize| weights[i * N + j] > 0.0 || weights[(N + i) * N + j] > 0.0;
        let grads = gradients(&*attention, x, &mut output_like(&x), &grad_o).expect("it has gradients");
        let is_zero = |name: &str, row: usize, width: usize| {
            let grad = grads.require(name).expect("it is given").data.to_f64();
            grad[row * width..(row + 1) * width].iter().all(|x| *x == 0.0)
        };
        for j in 0..N {
            assert_eq!(!attended(j), is_zero("grad.v", j, 5), "{}: value {j}", entry.name);
            // The mixture of buckets is learned from all of them.
            if entry.name != "sinkhorn" {
                assert!(attended(j) || is_zero("grad.k", j, 4), "{}: key {j}", entry.name);
                assert!(
                    j == i || is_zero("grad.q", j, 4) && is_zero("grad.q", N + j, 4),
                    "{}: query {j}",
                    entry.name
                );
            }
        }
    }
}

#[test]
fn rows_that_see_no_key_are_zero_and_have_no_gradient() {
    // Thirteen queries stand before all keys.
    let shape = AttnShape { n_q: 20, n_kv: 7, ..grouped() };
    let problem = Problem::normal(shape, 5);
    let x = problem.qkv().expect("it fits");
    let mut checked = 0;
    for (entry, options) in variants() {
        let attention = build(&entry, &options);
        let profile = attention.profile();
        let fits = profile.cross_lengths && profile.causality == Causality::Strict;
        if !fits || entry.name == "padded-causal" {
            continue;
        }
        let out = forward(&*attention, &problem);
        let is_early = |row: usize| row % 20 < 13;
        for (row, out) in out.chunks_exact(5).enumerate() {
            assert!(!is_early(row) || out.iter().all(|x| *x == 0.0), "{}: row {row}", entry.name);
        }
        if let Some(softmax) = attention.as_softmax() {
            let (mut out, mut lse) = (vec![f32::NAN; out.len()], vec![f32::NAN; shape.rows()]);
            let view = ViewMut::contiguous("out", &mut out, shape.out()).expect("it fits");
            softmax.forward_with_lse(x, view.into(), &mut lse).expect("it runs");
            let right =
                |(row, lse): (usize, &f32)| is_early(row) == (*lse == f32::NEG_INFINITY) && !lse.is_nan();
            assert!(lse.iter().enumerate().all(right), "{}: {lse:?}", entry.name);
        }
        let grad_o = vec![1.0; shape.rows() * 5];
        let grad_o = NamedTensor::f32("grad_o", &shape.out(), grad_o).expect("it fits");
        let grads = gradients(&*attention, x, &mut output_like(&x), &grad_o).expect("it has gradients");
        for (name, grad) in &grads.0 {
            let grad = grad.data.to_f64();
            assert!(grad.iter().all(|x| x.is_finite()), "{}: {name}", entry.name);
            if name == "grad.q" {
                let rows = grad.chunks_exact(4).enumerate();
                let early = rows.filter(|(row, _)| is_early(*row)).flat_map(|(_, grad)| grad);
                assert_eq!(early.filter(|x| **x != 0.0).count(), 0, "{}", entry.name);
            }
        }
        checked += 1;
    }
    assert!(checked > 20, "only {checked} variants take such lengths");
}

#[test]
fn larger_budgets_see_all_that_smaller_ones_see() {
    let problem = Problem::normal(grouped(), 6);
    let entries = attn_sparse::registry();
    for (name, fixed, option, budgets) in [
        ("topk", "causal=true", "topk", [1, 5, 6, 30]),
        ("quest", "page_len=4 causal=true", "token_budget", [12, 16, 20, 40]),
        ("moba", "chunk_len=8", "top_k", [1, 2, 3, 8]),
        ("dsa", "", "top_k", [1, 2, 9, 64]),
        ("block-indexer", "block_len=4", "top_k", [1, 2, 5, 16]),
        (
            "infllm-v2",
            "mean_len=4 mean_stride=2 block_len=4 local_blocks=2 dense_len=0",
            "top_k",
            [3, 4, 7, 16],
        ),
        ("infllm", "block_len=4 local_blocks=2", "top_k", [3, 4, 7, 16]),
        ("arkvale", "page_len=4 first_pages=1", "token_budget", [12, 16, 24, 64]),
        ("double-sparsity", "label_dim=2 calibration_len=4", "top_k", [4, 5, 12, 64]),
        ("loki", "rank=2 calibration_len=4", "top_k", [4, 5, 12, 64]),
        ("minference-block-sparse", "block_q=4 block_kv=4", "topk_blocks", [1, 2, 5, 16]),
        (
            "vertical-slash",
            "num_slash=4 forced_slash=1 forced_vertical=1 last_q=8",
            "num_vertical",
            [2, 3, 10, 60],
        ),
    ] {
        let entry = find(&entries, name).expect("a variant");
        let mut before: Option<Vec<f32>> = None;
        for budget in budgets {
            let options = Options::parse(fixed.split_whitespace()).expect("key=value").with(option, budget);
            let weights = weights(&*build(entry, &options), &problem);
            if let Some(before) = before {
                let lost = before.iter().zip(&weights).filter(|(before, now)| **before > 0.0 && **now == 0.0);
                assert_eq!(lost.count(), 0, "{name}: {option}={budget} loses pairs");
                assert_ne!(before, weights, "{name}: {option}={budget} changes something");
            }
            before = Some(weights);
        }
    }
}

/// Variants whose choice is shared by the heads of a group, so that the group matters.
const SHARED: [&str; 8] = [
    "block-indexer",
    "compressed-sparse",
    "dsa",
    "duo-attention",
    "infllm",
    "infllm-v2",
    "kv-eviction",
    "nsa",
];

#[test]
fn grouped_heads_are_repeated_heads() {
    let problem = Problem::normal(grouped(), 7);
    let twice = |x: &Vec<f32>| [x.as_slice(), x.as_slice()].concat();
    let shape = AttnShape { n_heads_kv: 2, ..grouped() };
    let repeated = Problem { shape, q: problem.q.clone(), k: twice(&problem.k), v: twice(&problem.v) };
    for (entry, options) in variants().into_iter().filter(|(entry, _)| !SHARED.contains(&entry.name)) {
        let attention = build(&entry, &options);
        let difference =
            largest_difference(&forward(&*attention, &problem), &forward(&*attention, &repeated));
        assert!(difference < 4e-6, "{}: {difference}", entry.name);
    }
}

/// Variants that look at the numbers of queries and keys in ways that a constant changes.
const MOVED: [&str; 9] = [
    // Its index keys are rounded to bf16.
    "block-indexer",
    "compressed-sparse",
    "double-sparsity",
    "dsa",
    "kv-eviction",
    "loki",
    "reformer-lsh",
    "routing",
    "sinkhorn",
];

/// The same constant added to all scores of a row changes no weight.
#[test]
fn a_constant_in_all_scores_changes_nothing() {
    let mut problem = Problem::normal(grouped(), 8);
    problem.q.chunks_exact_mut(4).for_each(|q| q[0] = 1.0);
    let mut moved = problem.clone();
    moved.k.chunks_exact_mut(4).for_each(|k| k[0] += 1.5);
    for (entry, options) in variants().into_iter().filter(|(entry, _)| !MOVED.contains(&entry.name)) {
        // A sink is no score of a key.
        if entry.name == "sink-logit" {
            continue;
        }
        let attention = build(&entry, &options);
        let difference = largest_difference(&weights(&*attention, &problem), &weights(&*attention, &moved));
        assert!(difference < 2e-6, "{}: {difference}", entry.name);
    }
}
