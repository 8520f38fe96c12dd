//! A needle in a million tokens: one planted key for each query, far before it. What selects by content finds it, as its
//! definition promises; what looks at places misses it.

use attn_core::AttnShape;
use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
use attn_testkit::inputs::Problem;

const N: usize = 1 << 20;
const D: usize = 16;
/// Where the needles lie; query `i` at the end looks for needle `i`.
const NEEDLES: [usize; 3] = [12_345, 500_007, 900_100];

/// `n` keys and values at random, and for each of the last `n_q` queries' last three one key in its direction whose value is
/// its own number.
fn problem(n: usize, n_q: usize, needles: [usize; 3]) -> Problem {
    let mut problem = Problem::normal(AttnShape { n_q, ..AttnShape::square(1, n, D) }, 1);
    problem.k.iter_mut().for_each(|k| *k *= 0.5);
    for (i, at) in needles.into_iter().enumerate() {
        // The same length for all queries, so that the needles stand out equally.
        let row = n_q - needles.len() + i;
        let norm = problem.q_row(0, 0, row).iter().map(|q| q * q).sum::<f32>().sqrt();
        problem.q_row(0, 0, row).iter_mut().for_each(|q| *q *= 4.0 / norm);
        let q = problem.q_row(0, 0, row).to_vec();
        problem.k_row(0, 0, at).iter_mut().zip(&q).for_each(|(k, q)| *k = 8.0 * q);
        problem.v_row(0, 0, at).fill(10.0 * (i + 1) as f32);
    }
    problem
}

fn tensors(problem: Problem) -> NamedTensors {
    let tensor = |name: &str, axes: [usize; 4], data| {
        (name.to_string(), NamedTensor::f32(name, &axes, data).expect("the axes fit"))
    };
    let Problem { shape, q, k, v } = problem;
    NamedTensors([tensor("q", shape.q(), q), tensor("k", shape.k(), k), tensor("v", shape.v(), v)].into())
}

fn haystack() -> NamedTensors {
    tensors(problem(N, NEEDLES.len(), NEEDLES))
}

/// The last three rows of an output.
fn last_rows(name: &str, options: &str, haystack: &NamedTensors, output: &str) -> Vec<Vec<f64>> {
    let entries = attn_sparse::registry();
    let options = Options::parse(options.split_whitespace()).expect("key=value");
    let given = find(&entries, name).expect("a variant").run(&options, haystack).expect("it runs");
    let out = given.require(output).expect("an output").data.to_f64();
    let rows: Vec<Vec<f64>> = out.chunks_exact(D).map(<[f64]>::to_vec).collect();
    rows[rows.len() - NEEDLES.len()..].to_vec()
}

/// The queries whose output is the value of their needle.
fn found(name: &str, options: &str, haystack: &NamedTensors) -> Vec<bool> {
    found_in(name, options, haystack, "o")
}

fn found_in(name: &str, options: &str, haystack: &NamedTensors, output: &str) -> Vec<bool> {
    let rows = last_rows(name, options, haystack, output);
    let is_needle =
        |(i, out): (usize, &Vec<f64>)| out.iter().all(|o| (o - 10.0 * (i + 1) as f64).abs() < 0.1);
    rows.iter().enumerate().map(is_needle).collect()
}

#[test]
fn what_selects_by_content_finds_it() {
    let haystack = haystack();
    for (name, options) in [
        ("quest", "causal=true"),
        ("quest", "causal=true page_len=64 token_budget=256"),
        ("arkvale", ""),
        ("arkvale", "volume=ball page_len=16 token_budget=256"),
        ("double-sparsity", "label_dim=4"),
        ("loki", "rank=4"),
        ("topk", "causal=true"),
        ("topk", "causal=true topk=1"),
        ("moba", "chunk_len=64 top_k=8"),
        ("dsa", "index_dim=16"),
        ("block-indexer", "index_dim=16"),
        ("infllm-v2", ""),
        // The probabilities of the queries themselves.
        ("vertical-slash", ""),
        // The mean of the queries, against means of keys.
        ("minference-block-sparse", ""),
        ("spargeattn", "similarity=-1"),
        // With a stride of 1 every pair lies on an antidiagonal that is summed.
        ("xattention", "stride=1 block=64"),
    ] {
        assert_eq!(found(name, options, &haystack), [true; 3], "{name} {options}");
    }
    assert_eq!(found_in("nsa", "", &haystack, "o_select"), [true; 3], "the selected blocks of nsa");
    assert_eq!(found_in("nsa", "", &haystack, "o_window"), [false; 3], "the window of nsa");
}

/// Entries mix a needle with its neighbours: those of its own two tokens, and of the two before.
#[test]
fn compressed_entries_bring_their_share_of_it() {
    let haystack = haystack();
    let rows = last_rows("compressed-sparse", "rate=2 index_dim=16", &haystack, "o");
    for (i, row) in rows.iter().enumerate() {
        // A mean of four tokens, its neighbours' values around 0; the other entries and the window weigh a little, too.
        let quarter = 2.5 * (i + 1) as f64;
        assert!(row.iter().all(|o| (0.5 * quarter..1.2 * quarter).contains(o)), "needle {i}: {row:?}");
    }
}

/// A centroid in the direction of a query has that query and its needle as its nearest.
#[test]
fn centroids_bring_queries_and_needles_together() {
    let mut haystack = haystack();
    let (_, q) = haystack.f32("q").expect("f32").expect("it is there");
    let means = q.iter().map(|x| x / 4.0).collect();
    haystack
        .0
        .insert("means".into(), NamedTensor::f32("means", &[1, 3, D], means).expect("three directions"));
    assert_eq!(found("routing", "causal=true num_clusters=3 window=1", &haystack), [true; 3]);
}

/// Equal directions have equal hashes in every round; queries are their own keys there, scaled to unit length.
#[test]
fn hashes_bring_queries_and_needles_together() {
    let mut problem = problem(N, N, NEEDLES);
    for (i, at) in NEEDLES.into_iter().enumerate() {
        let query: Vec<f32> = problem.q_row(0, 0, N - 3 + i).iter().map(|q| 200.0 * q).collect();
        problem.q_row(0, 0, N - 3 + i).copy_from_slice(&query);
        problem.q_row(0, 0, at).copy_from_slice(&query);
    }
    let haystack = tensors(problem);
    assert_eq!(found("reformer-lsh", "shared_qk=true causal=true n_hashes=2", &haystack), [true; 3]);
}

/// Variants whose cost or definition asks for all queries: fewer tokens.
#[test]
fn prefills_find_it_too() {
    const FEW: usize = 1 << 13;
    let needles = [700, 3_333, 6_001];
    let haystack = tensors(problem(FEW, FEW, needles));
    assert_eq!(found("flexprefill", "block=64 budget_tokens=64", &haystack), [true; 3], "flexprefill");
    // A block's keys are represented by those that the queries after them scored highest.
    let options = "block_len=16 top_k=24 local_blocks=8 n_representatives=2";
    let mut looked_at = problem(FEW, FEW, needles);
    for (i, at) in needles.into_iter().enumerate() {
        let q = looked_at.q_row(0, 0, FEW - 3 + i).to_vec();
        (1..6).for_each(|next| looked_at.q_row(0, 0, at + next).copy_from_slice(&q));
    }
    assert_eq!(found("infllm", options, &tensors(looked_at)), [true; 3], "infllm");
    let mut unseen = problem(FEW, FEW, needles);
    for (i, at) in needles.into_iter().enumerate() {
        let q: Vec<f32> = unseen.q_row(0, 0, FEW - 3 + i).iter().map(|q| -q).collect();
        (1..100).for_each(|next| unseen.q_row(0, 0, at + next).copy_from_slice(&q));
    }
    assert_eq!(found("infllm", options, &tensors(unseen)), [false; 3], "nobody looked at them");
}

#[test]
fn what_looks_at_places_misses_it() {
    let haystack = haystack();
    for (name, options) in [
        ("sliding-window", "causal=true window=65536"),
        ("sink-window", "n_sinks=64 window=4096"),
        ("a-shape", ""),
        ("chunked-causal", "chunk_len=65536"),
        ("dilated-window", "causal=true"),
        ("local-buckets", "causal=true"),
    ] {
        assert_eq!(found(name, options, &haystack), [false; 3], "{name} {options}");
    }
}

#[test]
fn a_cache_keeps_it_if_the_last_queries_looked_at_it() {
    let mut haystack = haystack();
    let q = haystack.0["q"].clone();
    haystack.0.insert("q_next".into(), q);
    for (policy, keeps) in [
        ("policy=snapkv window=3 kernel=1", true),
        ("policy=h2o n_recent=8", true),
        ("policy=observed-attention", true),
        // The norms of needles are the largest.
        ("policy=key-norm", false),
        ("policy=streaming-llm", false),
    ] {
        let options = format!("{policy} budget=1024");
        assert_eq!(found("kv-eviction", &options, &haystack), [keeps; 3], "{policy}");
    }
}
