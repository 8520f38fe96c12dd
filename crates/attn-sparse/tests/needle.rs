//! A needle in a million tokens: one planted key for each query, far before it. What selects by content finds it, as its
//! definition promises; what looks at places misses it.

use attn_core::AttnShape;
use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
use attn_testkit::inputs::Problem;

const N: usize = 1 << 20;
const D: usize = 16;
/// Where the needles lie; query `i` at the end looks for needle `i`.
const NEEDLES: [usize; 3] = [12_345, 500_007, 900_100];

/// Keys and values at random, and for each of the last queries one key in its direction whose value is its own number.
fn haystack() -> NamedTensors {
    let shape = AttnShape { n_q: NEEDLES.len(), ..AttnShape::square(1, N, D) };
    let mut problem = Problem::normal(shape, 1);
    problem.k.iter_mut().for_each(|k| *k *= 0.5);
    for (i, at) in NEEDLES.into_iter().enumerate() {
        // The same length for all queries, so that the needles stand out equally.
        let norm = problem.q_row(0, 0, i).iter().map(|q| q * q).sum::<f32>().sqrt();
        problem.q_row(0, 0, i).iter_mut().for_each(|q| *q *= 4.0 / norm);
        let q = problem.q_row(0, 0, i).to_vec();
        problem.k_row(0, 0, at).iter_mut().zip(&q).for_each(|(k, q)| *k = 8.0 * q);
        problem.v_row(0, 0, at).fill(10.0 * (i + 1) as f32);
    }
    let tensor = |name: &str, axes: [usize; 4], data| {
        (name.to_string(), NamedTensor::f32(name, &axes, data).expect("the axes fit"))
    };
    let Problem { q, k, v, .. } = problem;
    NamedTensors([tensor("q", shape.q(), q), tensor("k", shape.k(), k), tensor("v", shape.v(), v)].into())
}

/// The queries whose output is the value of their needle.
fn found(name: &str, options: &str, haystack: &NamedTensors) -> Vec<bool> {
    let entries = attn_sparse::registry();
    let options = Options::parse(options.split_whitespace()).expect("key=value");
    let given = find(&entries, name).expect("a variant").run(&options, haystack).expect("it runs");
    let out = given.require("o").expect("an output").data.to_f64();
    let is_needle = |(i, out): (usize, &[f64])| out.iter().all(|o| (o - 10.0 * (i + 1) as f64).abs() < 0.1);
    out.chunks_exact(D).enumerate().map(is_needle).collect()
}

#[test]
fn what_selects_by_content_finds_it() {
    let haystack = haystack();
    for (name, options) in [
        ("quest", "causal=true"),
        ("quest", "causal=true page_len=64 token_budget=256"),
        ("topk", "causal=true"),
        ("topk", "causal=true topk=1"),
        ("moba", "chunk_len=64 top_k=8"),
        ("dsa", "index_dim=16"),
        ("block-indexer", "index_dim=16"),
        ("infllm-v2", ""),
    ] {
        assert_eq!(found(name, options, &haystack), [true; 3], "{name} {options}");
    }
}

#[test]
fn what_looks_at_places_misses_it() {
    let haystack = haystack();
    for (name, options) in [
        ("sliding-window", "causal=true window=65536"),
        ("sink-window", "n_sinks=64 window=4096"),
        ("chunked-causal", "chunk_len=65536"),
        ("dilated-window", "causal=true"),
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
